"""Weights shrink a little and are disturbed a little, at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamcl.plugin import Grads, Rule, Step
from streamcl.protocols import State
from streamcl.random import key_of, noise_array

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class ShrinkAndPerturb(Rule):
    """With SGD w <- w - lr (g + lambda w) + sigma xi; with `scaled` w <- w - lr (g + lambda w + sigma xi).

    In step t = 0, 1, ... of this rule: the gradient becomes g + lambda w (+ sigma xi, if `scaled`); the optimiser takes
    its step; and unless `scaled`, sigma xi is added to the weights. xi is one number of mean 0 and variance 1 for each
    parameter, biases included: `noise_array(key_of(seed, "shrink_and_perturb"), t, P)`. Other optimisers scale what is
    in the gradient as they scale the gradient. FTRL makes its weights of sums of gradients, so what is added to a
    weight would be gone with its next step: only `scaled` goes with it.

    Args:
        strength: lambda, 1 / step.
        sigma: Standard deviation of the noise. With both 0 training is bit for bit as it was.
        scaled: The noise is in the gradient, so that the learning rate scales it.
        seed: Of the noise.

    Source:
        Ash & Adams 2020, arXiv 1910.08475: lambda w + noise when new data come. At each step:
        Dohare et al. 2024, Nature 632:768-774 (default); `scaled`: Elsayed & Mahmood 2024, arXiv 2404.00781, the
        baseline of the same name.

    Differs from the source:
        The noise is a sum of four uniforms, see `noise_array`.
    """

    def __init__(
        self, dense: Dense, strength: float = 1e-4, sigma: float = 1e-5, *, scaled: bool = False, seed: int = 0
    ) -> None:
        self.dense, self.strength, self.sigma, self.scaled = dense, strength, sigma, scaled
        self.key = key_of(seed, "shrink_and_perturb")
        self.step = 0

    def transform(self, grads: Grads, step: Step) -> Grads:
        gradient = grads.dense
        if self.strength:
            gradient = gradient.add(self.dense.flat, alpha=self.strength)
        if self.sigma and self.scaled:
            gradient = gradient.add(self._noise(), alpha=self.sigma)
        return grads.with_dense(gradient)

    def after(self, step: Step) -> None:
        if self.sigma and not self.scaled:
            self.dense.flat.add_(self._noise(), alpha=self.sigma)
        self.step += 1

    def _noise(self) -> Tensor:
        flat = self.dense.flat
        return torch.from_numpy(noise_array(self.key, self.step, len(flat))).to(flat)

    def state_dict(self) -> State:
        return {"step": self.step}

    def load_state_dict(self, state: State) -> None:
        self.step = int(state.get("step", 0))
