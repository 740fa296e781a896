"""What the plasticity bench compares: a net and the method it learns by, run by the compiled kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.plasticity_draws import mixed
from streamcl.bench.plasticity_kernel import learn
from streamcl.bench.plasticity_state import Net, Rules, Units
from streamcl.bench.quality import Floats
from streamcl.random import key_of, uniform_array


@dataclass(frozen=True, slots=True)
class Method:
    """A way to learn: SGD with what is added to it. Zero switches a part off.

    Args:
        linear: No hidden layer.
        layer_norm: Sums of a hidden layer are brought to mean 0 and deviation 1, without parameters.
        l2, l2_init: Pull to 0, and to where a weight began; inside the gradient.
        noise: Sigma of the noise added to every parameter after each step.
        clipping: Zeta; no parameter is further from 0 than zeta / sqrt(fan_in).
        replacement_rate, maturity, decay, bias_transfer: Continual backpropagation.
        upgd: Utility-based gated update, with `upgd_decay` of utilities, `upgd_noise` and `upgd_l2`.
        redo_every: Steps between two looks of ReDo, for units of at most `redo_tau` of the mean activation.
        silence: Self-normalised resets, with the arguments of the product's rule.
    """

    name: str
    learning_rate: float = 0.01
    linear: bool = False
    layer_norm: bool = False
    l2: float = 0.0
    l2_init: float = 0.0
    noise: float = 0.0
    clipping: float = 0.0
    replacement_rate: float = 0.0
    maturity: int = 100
    decay: float = 0.99
    bias_transfer: bool = True
    upgd: bool = False
    upgd_decay: float = 0.9999
    upgd_noise: float = 0.1
    upgd_l2: float = 0.01
    redo_every: int = 0
    redo_tau: float = 0.025
    silence: bool = False
    percentile: float = 0.99
    expansion: float = 2.0
    revisit: int = 10_000
    initial: int = 1000
    shortest: int = 100
    longest: int = 10_000

    @property
    def resets(self) -> str:
        """The name that the product keys redraws by."""
        return "redo" if self.redo_every else "self_normalized_resets" if self.silence else "continual_backprop"

    def at(self, learning_rate: float) -> Method:
        return replace(self, learning_rate=learning_rate)


@dataclass(frozen=True, slots=True)
class Examples:
    """Inputs (M, I) in whole numbers, as real ones once multiplied by `scale`, and targets (M,): values or classes."""

    inputs: NDArray[np.uint8]
    targets: Floats
    scale: float = 1.0


class Learner:
    """A ReLU net of the given widths, Kaiming uniform, biases 0, gain 1 for the last layer; always the same by seed.

    Args:
        classes: Softmax cross-entropy over the outputs; else the squared error of one.

    Attributes:
        units: What is known of hidden units; `units.fired` may be set to 0 at any time.
    """

    def __init__(
        self, widths: Sequence[int], method: Method, seed: int, *, classes: bool = False, dtype: Any = np.float32
    ) -> None:
        if method.linear:
            widths = (widths[0], widths[-1])
        self.widths, self.step = tuple(widths), 0
        layers, most, inputs = len(widths) - 1, max(widths[1:]), max(widths[:-1])
        weights, biases = np.zeros((layers, most, inputs), dtype), np.zeros((layers, most), dtype)
        for layer, values in enumerate(initial_weights(widths, seed)):
            weights[layer, : widths[layer + 1], : widths[layer]] = values
        self.net = Net(
            np.array(widths, np.int64),
            *(weights, biases, weights.copy(), biases.copy()),
            values=np.zeros((layers + 1, max(widths)), dtype),
            deltas=np.zeros((layers, most), dtype),
            scales=np.zeros(layers, dtype),
            back=np.zeros(max(widths), dtype),
        )
        shared = {name: getattr(method, name) for name in Rules._fields if hasattr(method, name)}
        noise = np.uint64(key_of(seed, "upgd" if method.upgd else "shrink_and_perturb"))
        self.rules = Rules(classes=classes, key=noise, **shared)
        hidden = layers - 1, most
        bins = silence_bins(method.longest) if method.silence else np.zeros(0, np.int64)
        keys = [np.uint64(key_of(seed, f"{method.resets}.{layer}")) for layer in range(layers - 1)]
        self.units = Units(
            age=np.zeros(hidden, np.int64),
            mean_abs=np.zeros(hidden, dtype),
            mean=np.zeros(hidden, dtype),
            fired=np.zeros(hidden, np.int64),
            eligible_steps=np.zeros(layers - 1, np.int64),
            replaced=np.zeros(layers - 1, np.int64),
            due=np.zeros(layers - 1, np.int64),
            chosen=np.zeros(hidden, np.int64),
            bases=np.array([mixed(key) for key in keys], np.uint64),
            utility=np.zeros_like(weights) if method.upgd else np.zeros((layers, 0, 0), dtype),
            bias_utility=np.zeros_like(biases),
            threshold=np.full(hidden, method.initial, np.int64),
            bins=bins,
            histogram=np.zeros((*hidden, len(bins)), np.int64),
        )

    def learn(
        self, examples: Examples, order: NDArray[np.int64] | None = None, columns: NDArray[np.int64] | None = None
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Test, then train, on the examples at `order` with their inputs in the order `columns`.

        Returns the losses, and whether the largest output was the right one.
        """
        order = np.arange(len(examples.targets)) if order is None else order
        columns = np.arange(examples.inputs.shape[1]) if columns is None else columns
        losses, hits = np.empty(len(order)), np.empty(len(order), np.bool_)
        learn(
            self.net, self.rules, self.units, self.step,
            examples.inputs, examples.scale, order, columns, examples.targets, losses, hits,
        )  # fmt: skip
        self.step += len(order)
        return losses, hits

    def parameters(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """(weight (out, in), bias (out,)) of each layer, as views."""
        return [
            (self.net.weights[layer, :outputs, :inputs], self.net.biases[layer, :outputs])
            for layer, (inputs, outputs) in enumerate(itertools.pairwise(self.widths))
        ]

    def silent(self, examples: int) -> Floats:
        """By hidden layer, the share of values that were 0 in the `examples` since `fired` was set to 0."""
        widths = self.widths[1:-1]
        return np.array([1 - self.units.fired[i, :n].sum() / (n * examples) for i, n in enumerate(widths)])

    def dead(self) -> float:
        """Share of all hidden units that have not fired since `fired` was set to 0; NaN without a hidden unit."""
        widths = self.widths[1:-1]
        dead = sum(int((self.units.fired[i, :n] == 0).sum()) for i, n in enumerate(widths))
        return dead / sum(widths) if widths else math.nan


def initial_weights(widths: Sequence[int], seed: int) -> list[Floats]:
    """(out, in) of each layer: uniform within sqrt(6 / fan_in), the last layer's within sqrt(3 / fan_in)."""
    found = []
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        bound = math.sqrt((3.0 if layer == len(widths) - 2 else 6.0) / inputs)
        draws = uniform_array(key_of(seed, f"bench.plasticity.{layer}"), outputs * inputs)
        found.append(((2.0 * draws - 1.0) * bound).reshape(outputs, inputs))
    return found


def silence_bins(longest: int) -> NDArray[np.int64]:
    """Upper ends of the bins that silences are counted in, eight per doubling, as the product has them."""
    ends = {math.ceil(2.0 ** (j / 8)) for j in range(8 * longest.bit_length())}
    return np.array(sorted({end for end in ends if end < longest} | {longest}), np.int64)
