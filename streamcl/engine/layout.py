"""Where the compiled loop of the fused engine finds what it works on: tuples of arrays, and numbers that name kinds.

Shape: B rows of a step (the live one first), S slots, F fields, D embedding, N numerics, E = F x D + N, O outputs, W
numbers of a table's row, P dense parameters, U hidden units of all layers, C cross layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ANSWER, LEARN, REFUSE = range(3)
BINARY, MULTICLASS, REGRESSION = range(3)
NO_PAIRS, SUMMED, PROJECTED = range(3)
NO_DELAY, FNW, FNC = range(3)
DONE, REFUSED, DUE = range(3)
"""Why the loop has ended: all is done; the operation before `next` could not be learned; something rare is due then."""


class Net(NamedTuple):
    """What is learned. Slots that the optimiser hasn't are empty."""

    flat: Any  # (P,)
    slots: Any  # three of (P,)
    table: Any  # (R, W)
    rows: Any  # (R x W,) the same
    row_slots: Any  # three of (R x W,); Adam's steps (R,)
    tables: Any  # the dynamic ones, a `table_rows.Tables`


class Plan(NamedTuple):
    """What the model is made of, and what a step is."""

    task: int
    optimizer: int
    outputs: int
    first: int  # numbers of a row that are first-order weights
    fields: int
    dim: int
    linear: int  # where the weights (O, N) of the linear part begin in `flat`, its bias (O,) behind; -1: none
    pairs: int  # NO_PAIRS, ...
    projection: int  # where the projection (O, D) of the pairs begins
    crosses: Any  # (C, 2): where weights (E, E) and bias of each cross layer begin
    layers: Any  # (L + 1, 4): inputs, units, where weights and bias begin; the head last; (0, 4) without a tower
    slot_field: Any  # (S,)
    key: Any  # uint64, of the draws
    draw: int
    share: float  # weight of each replayed row's loss
    label_scaled: Any  # (1,) True
    alpha: float  # of the ReLoop loss; 0: none
    delayed: int  # NO_DELAY, ...
    shift: float  # of the logit in the loss
    class_weights: Any  # (C,) by label; (0,): all alike
    largest: float  # norm of a gradient that is still learned from
    rates: Any  # (3,) of the dense weights
    row_rates: Any  # (3,)


class Norms(NamedTuple):
    """Running statistics of the numerics (N,) and of the label (1,), and N clips; `scaled` (N,) bool."""

    count: Any
    mean: Any
    m2: Any
    clip: Any
    scaled: Any
    y_count: Any
    y_mean: Any
    y_m2: Any


class Rows(NamedTuple):
    """Replayed rows."""

    ids: Any
    weights: Any
    dense: Any
    y: Any
    sample_weights: Any


class Renewal(NamedTuple):
    """Of continual backpropagation. `on` says whether there is any."""

    on: bool
    corrected: bool
    decay: float
    maturity: int
    starts: Any  # (L,) of each layer's units among the U; -1: not watched
    rates: Any  # (L,)
    replaced: Any  # (L,) at the present rate
    eligible: Any  # (L,) steps
    step: Any  # (1,)
    mean_use: Any  # (U,)
    mean: Any  # (U,)
    born: Any  # (U,)
    powers: Any  # decay ** age of the first ages


class Average(NamedTuple):
    """Of the weights, as `weight_sets.Average` holds it. `on` says whether there is one."""

    on: bool
    decay: float
    step: Any  # (1,)
    flat: Any  # (P,)
    table: Any  # (R, W)
    at: Any  # (R,) the step that a row's average is of


class Serving(NamedTuple):
    """Which weights answer. K sets; none: the live ones."""

    sets: Any  # (K,) 0: live, 1: their average
    losses: Any  # (K,) recent
    keep: float  # what a loss still weighs an outcome later


class Watch(NamedTuple):
    """Of diagnostics. `every` 0: none."""

    every: int
    report: int
    steps: Any  # (2,) steps, sampled
    ring: Any  # (window, U + 1)


class Chunk(NamedTuple):
    """n operations."""

    kind: Any  # (n,) ANSWER, LEARN, or REFUSE where the label is none
    ids: Any  # (n, S)
    weights: Any
    dense: Any  # (n, N) raw
    time: Any  # (n,) of the event
    label: Any  # (n,)
    weight: Any  # (n,) of the loss
    served: Any  # (n,) what it was answered with, or NaN: in this chunk, by operation `source`
    source: Any  # (n,)
    noted: Any  # (n, K, O) what the sets said of an event of an earlier chunk, or (0, K, O)
    known: Any  # (n,) whether they had
    again: Any  # (n,) whether it has the features of the operation before it
    held: Any  # (n,) rows held before it
    slot: Any  # (n,) where it will be kept; -1: nowhere


class Found(NamedTuple):
    """What came of them."""

    output: Any  # (n, O)
    served: Any  # (n, P) float32
    entered: Any  # (n, E), or (0, 0) where nobody asks
    hidden: Any  # (n, H), or (0, 0)
    noted: Any  # (n, K, O) what each set says, or (0, K, O)
    drawn: Any  # (n, draw), or (0, 0)
    norm: Any  # (n,) of the dense gradient


class Scratch(NamedTuple):
    x: Any  # (Bmax, E) embeddings and numerics
    dx: Any  # (Bmax, E)
    crossed: Any  # (C, Bmax, E) what each cross layer has said
    factors: Any  # (C, Bmax, E) what it has multiplied by
    turned: Any  # (C, Bmax, E) the gradient by that
    own: Any  # (E,)
    back: Any  # (Bmax, E)
    acts: Any  # flat: (Bmax, n) of each layer
    deltas: Any  # flat, the same
    z: Any  # (Bmax, O)
    dz: Any  # (Bmax, O)
    total: Any  # (Bmax, D)
    pull: Any  # (Bmax, D)
    products: Any  # (Bmax, D)
    y: Any  # (Bmax,)
    share: Any  # (Bmax,) float64, what a row's loss is multiplied by
    numbers: Any  # (Bmax, N)
    place: Any  # (Bmax, S) of a slot's row among the touched
    ids: Any  # (Bmax, S)
    weights: Any  # (Bmax, S)
    touched: Any  # (Bmax x S,)
    row_grads: Any  # (Bmax x S, W)
    grads: Any  # (P,)
    g: Any  # (widest,)
    mix: Any  # (widest or Bmax + 3,) int64
    buckets: Any  # (2, power of two): whose it is, and its place
    stamps: Any  # (power of two,)
    stamp: Any  # (1,)
    keep: Any  # (3, N + 1) float64: running means as they stood before a step
    said: Any  # (O,)
