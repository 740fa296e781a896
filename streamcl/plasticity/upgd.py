"""What is of use is kept, what isn't is learned and disturbed: utility-based perturbed gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamcl.plugin import Grads, Rule, Step
from streamcl.protocols import State
from streamcl.random import key_of, noise_array

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class UPGD(Rule):
    """First-order UPGD: w <- (1 - lr lambda) w - lr (g + sigma xi) (1 - s), s near 1 for weights of much utility.

    In step t = 1, 2, ... of this rule, with the gradient and weights before the optimiser's step and for every
    parameter, biases included: u <- beta u + (1 - beta) (-g w), the utility to first order (what the loss would grow by
    without the weight). Then

        s = sigmoid(u / ((1 - beta^t) max u)),                  the maximum over all parameters (default), or
        s = sigmoid(u' / |u'|), u' = u / (1 - beta^t),          the norm over one unit's weights (`local`)

    and the gradient that the optimiser takes is (g + sigma xi)(1 - s) + lambda w, or g + sigma xi (1 - s) + lambda w if
    not `protecting`. xi is `noise_array(key_of(seed, "upgd"), t - 1, P)`. Only SGD's step makes the formula of it, so
    the learning rate is the optimiser's. A weight that is made anew has utility 0; t goes on.

    Args:
        decay: beta of the utilities.
        sigma: Standard deviation of the noise.
        strength: lambda, 1 / step.
        local: Utilities are compared among the weights of a unit (a row of a matrix; all biases of a layer are one
            row) instead of among all.
        protecting: Useful weights are also kept from the gradient; without it from the noise alone.
        seed: Of the noise.

    Source:
        Elsayed & Mahmood 2024, arXiv 2404.00781, algorithm 1 (first-order utility). As in the authors' code the maximum
        is that of u without bias correction, so in the first of 1 / (1 - beta) steps s is nearly a step function of the
        sign of u. Their drop-in class has a step size of 2 lr; this one hasn't.

    Differs from the source:
        If no utility is positive, s is 0 for negative ones (and 1/2 for those of 0): the source would divide by a
        negative maximum and protect the worst. A filter of a convolution is one row, not each of its kernels' lines.
    """

    def __init__(
        self,
        dense: Dense,
        *,
        decay: float = 0.9999,
        sigma: float = 0.1,
        strength: float = 0.01,
        local: bool = False,
        protecting: bool = True,
        seed: int = 0,
    ) -> None:
        self.dense, self.decay, self.sigma, self.strength = dense, decay, sigma, strength
        self.local, self.protecting = local, protecting
        self.key = key_of(seed, "upgd")
        self.step = 0
        self.utility = dense.traces["upgd"] = torch.zeros_like(dense.flat)  # (P,) u
        rows = [torch.Size((1,)) if p.dim() < 2 else p.shape[:1] for p in dense.params.values()]
        lengths = [p.numel() // n[0] for p, n in zip(dense.params.values(), rows, strict=True) for _ in range(n[0])]
        self._lengths = torch.tensor(lengths, device=dense.flat.device)  # (rows,)

    def transform(self, grads: Grads, step: Step) -> Grads:
        gradient = grads.dense
        self.utility.lerp_(-(gradient * self.dense.flat), 1.0 - self.decay)
        open_ = torch.sigmoid(-self._scaled())  # 1 - s
        noise = self._noise()
        taken = (gradient + noise) * open_ if self.protecting else torch.addcmul(gradient, noise, open_)
        return grads.with_dense(taken.add_(self.dense.flat, alpha=self.strength) if self.strength else taken)

    def _scaled(self) -> Tensor:
        utility = self.utility / (1.0 - self.decay ** (self.step + 1))
        if not self.local:
            return utility / self.utility.max().clamp_min(torch.finfo(utility.dtype).tiny)
        norms = torch.segment_reduce(utility * utility, "sum", lengths=self._lengths).sqrt().clamp_min(1e-12)
        return utility / norms.repeat_interleave(self._lengths, output_size=len(utility))

    def _noise(self) -> Tensor:
        flat = self.dense.flat
        if not self.sigma:
            return torch.zeros_like(flat)
        return torch.from_numpy(noise_array(self.key, self.step, len(flat))).to(flat).mul_(self.sigma)

    def after(self, step: Step) -> None:
        self.step += 1

    def state_dict(self) -> State:
        return {"step": self.step, "utility": self.utility.clone()}

    def load_state_dict(self, state: State) -> None:
        self.step = int(state.get("step", 0))
        if state:
            self.utility.copy_(self.dense.fitted(state["utility"], torch.zeros_like(self.utility)))
        else:
            self.utility.zero_()
