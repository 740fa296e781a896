"""What the compiled learner of the plasticity bench works on: arrays, and the numbers of a method."""

from __future__ import annotations

from typing import Any, NamedTuple


class Net(NamedTuple):
    """Weights, what they began as, and room for one example's values and gradients."""

    widths: Any  # (L + 1,) int64
    weights: Any  # (L, O, I)
    biases: Any  # (L, O)
    initial_weights: Any
    initial_biases: Any
    values: Any  # (L + 1, max) of the example: the input, then each layer's output
    deltas: Any  # (L, O) gradients of the loss at a layer's sums
    scales: Any  # (L,) of the layer norm: 1 / deviation
    back: Any  # (max,) room for gradients on their way back


class Rules(NamedTuple):
    """What a method does beside the gradient step; 0 switches a part off. Names as in the product's configuration."""

    classes: bool  # softmax cross-entropy instead of the squared error
    layer_norm: bool
    learning_rate: float
    l2: float
    l2_init: float
    noise: float  # sigma of shrink-and-perturb
    clipping: float  # zeta of weight clipping
    replacement_rate: float  # of continual backpropagation
    maturity: int
    decay: float
    bias_transfer: bool
    upgd: bool
    upgd_decay: float  # beta
    upgd_noise: float
    upgd_l2: float
    redo_every: int
    redo_tau: float
    silence: bool  # self-normalised resets
    percentile: float
    expansion: float
    revisit: int
    shortest: int
    longest: int
    key: Any  # uint64, of the method's noise


class Units(NamedTuple):
    """What is known of hidden units, and of each layer of them."""

    age: Any  # (L - 1, O) int64 steps since the last reset
    mean_abs: Any  # (L - 1, O); of ReDo the total since the last look
    mean: Any  # (L - 1, O)
    fired: Any  # (L - 1, O) int64: examples with a value above 0, since somebody set it to 0
    eligible_steps: Any  # (L - 1,) int64
    replaced: Any  # (L - 1,) int64
    due: Any  # (L - 1,) int64: how many begin anew in this step
    chosen: Any  # (L - 1, O) int64: which
    bases: Any  # (L - 1,) uint64: where the layer's redraws begin
    utility: Any  # (L, O, I) of UPGD
    bias_utility: Any  # (L, O)
    threshold: Any  # (L - 1, O) int64: of self-normalised resets, whose `age` is a unit's silence
    bins: Any  # (K,) int64 upper ends
    histogram: Any  # (L - 1, O, K) int64
