"""What the plasticity bench compares: a net and the method it learns by, run by the compiled kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.plasticity_kernel import Net, Rules, Units, learn, mixed
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
        self.rules = Rules(
            *(classes, method.layer_norm, method.learning_rate, method.l2, method.l2_init, method.noise),
            *(method.clipping, method.replacement_rate, method.maturity, method.decay, method.bias_transfer),
            *(method.upgd, method.upgd_decay, method.upgd_noise, method.upgd_l2),
            key=np.uint64(key_of(seed, "upgd" if method.upgd else "shrink_and_perturb")),
        )
        hidden = layers - 1, most
        keys = [np.uint64(key_of(seed, f"continual_backprop.{layer}")) for layer in range(layers - 1)]
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
