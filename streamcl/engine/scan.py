"""The compiled loop of the fused engine: predictions and learning steps in the order of the stream, one at a time.

What is computed is what `engine.eager` and `Learner.learn` compute, for a model whose arithmetic is known here; see
`fused` for what that covers. Everything it changes lies in arrays that the learner owns.

Shape: B rows of a step (the live one first), S slots, F fields, D embedding, N numerics, E = F x D + N, O outputs, W
numbers of a table's row, P dense parameters, U hidden units of all layers, C cross layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from streamcl.compiled import entry, exact, fast
from streamcl.engine.kernels import (
    add_scaled,
    affine,
    binary_loss,
    cross_entropy,
    dot,
    move,
    outer,
    pull_back,
    put,
    self_corrected,
    sigmoid,
)

ANSWER, LEARN, REFUSE = range(3)
BINARY, MULTICLASS, REGRESSION = range(3)
NO_PAIRS, SUMMED, PROJECTED = range(3)
DONE, REFUSED, DUE = range(3)
"""Why the loop has ended: all is done; the operation before `next` could not be learned; something rare is due then."""

GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Net(NamedTuple):
    """What is learned. Slots that the optimiser hasn't are empty."""

    flat: Any  # (P,)
    slots: Any  # three of (P,)
    table: Any  # (R, W)
    rows: Any  # (R x W,) the same
    row_slots: Any  # three of (R x W,); Adam's steps (R,)


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
    label: Any  # (n,)
    served: Any  # (n,) what it was answered with, or NaN: in this chunk, by operation `source`
    source: Any  # (n,)
    held: Any  # (n,) rows held before it
    slot: Any  # (n,) where it will be kept; -1: nowhere


class Found(NamedTuple):
    """What came of them."""

    output: Any  # (n, O)
    served: Any  # (n, P) float32
    entered: Any  # (n, E), or (0, 0) where nobody asks
    hidden: Any  # (n, H), or (0, 0)
    drawn: Any  # (n, draw), or (0, 0)
    norm: Any  # (n,) of the dense gradient


class Scratch(NamedTuple):
    x: Any  # (Bmax, E) embeddings and numerics
    dx: Any  # (Bmax, E)
    crossed: Any  # (C, Bmax, E) what each cross layer has said
    factors: Any  # (C, Bmax, E) what it has multiplied by
    turned: Any  # (C, Bmax, E) the gradient by that
    own: Any  # (E,)
    acts: Any  # flat: (Bmax, n) of each layer
    deltas: Any  # flat, the same
    z: Any  # (Bmax, O)
    dz: Any  # (Bmax, O)
    total: Any  # (Bmax, D)
    pull: Any  # (Bmax, D)
    products: Any  # (Bmax, D)
    y: Any  # (Bmax,)
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


@exact
def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@exact
def below(n: int, key: Any, step: int, index: int) -> Any:
    """`streamcl.random.below`."""
    a = _mix(_mix(key + np.uint64(step) * GOLDEN) + np.uint64(index + 1) * GOLDEN)
    low, b = np.uint64(0xFFFFFFFF), np.uint64(n)
    a0, a1, b0, b1 = a & low, a >> np.uint64(32), b & low, b >> np.uint64(32)
    middle = a1 * b0 + ((a0 * b0) >> np.uint64(32))
    carry = a0 * b1 + (middle & low)
    return np.int64(a1 * b1 + (middle >> np.uint64(32)) + (carry >> np.uint64(32)))


@exact
def _observe(count: Any, mean: Any, m2: Any, scaled: Any, row: Any) -> None:
    """`RunningNorm.update`."""
    for i in range(len(count)):
        value = float(row[i])
        if scaled[i] and math.isfinite(value):
            delta = value - mean[i]
            count[i] += 1.0
            mean[i] += delta / max(count[i], 1.0)
            m2[i] += delta * (value - mean[i])


@exact
def _deviation(count: float, m2: float) -> float:
    variance = m2 / max(count, 1.0)
    return math.sqrt(variance) if variance > 0.0 else 1.0


@exact
def _standardised(value: float, count: float, mean: float, m2: float, clip: float) -> Any:
    found = (value - mean) / _deviation(count, m2)
    return np.float32(0.0) if math.isnan(found) else np.float32(min(max(found, -clip), clip))


@fast
def _gather(b: int, ids: Any, weights: Any, dense: Any, net: Any, plan: Any, norms: Any, s: Any) -> None:
    """Row b of the scratch: pooled embeddings and standardised numbers, and the first-order part of z."""
    x, z, dim, first = s.x[b], s.z[b], plan.dim, plan.first
    table, slot_field, mine, weighing, numbers = net.table, plan.slot_field, s.ids[b], s.weights[b], s.numbers[b]
    x[:] = 0.0
    z[:] = 0.0
    for slot in range(len(ids)):
        weight, id = weights[slot], ids[slot]
        mine[slot] = id
        weighing[slot] = weight
        if weight != 0.0:
            for o in range(first):
                z[o] += weight * table[id, o]
            at = slot_field[slot] * dim
            for j in range(dim):
                x[at + j] += weight * table[id, first + j]
    at = plan.fields * dim
    count, mean, m2, clip = norms.count, norms.mean, norms.m2, norms.clip
    for i in range(len(dense)):
        value = _standardised(dense[i], count[i], mean[i], m2[i], clip[i])
        x[at + i] = value
        numbers[i] = value


@fast
def _matrix(flat: Any, at: int, rows: int, columns: int) -> Any:
    return flat[at : at + rows * columns].reshape((rows, columns))


@fast
def _layer(flat: Any, plan: Any, level: int) -> Any:
    """(weights, bias) of a layer."""
    width, units, w, b = plan.layers[level]
    return _matrix(flat, w, units, width), flat[b : b + units]


@fast
def _of_layer(flat: Any, plan: Any, level: int, largest: int) -> Any:
    """(Bmax, n) of what is held for all hidden layers."""
    at = 0
    for k in range(level):
        at += plan.layers[k, 1]
    return _matrix(flat, at * largest, largest, plan.layers[level, 1])


@fast
def _acts(s: Any, plan: Any, level: int, largest: int) -> Any:
    """(Bmax, n) what layer `level` has said."""
    return _of_layer(s.acts, plan, level, largest)


@fast
def _deltas(s: Any, plan: Any, level: int, largest: int) -> Any:
    """(Bmax, n) the gradient by what it has said."""
    return _of_layer(s.deltas, plan, level, largest)


@fast
def _forward(count: int, net: Any, plan: Any, s: Any) -> None:
    """z (B, O) of what was gathered; all that the way back needs stays in the scratch."""
    outputs, largest, flat, z = plan.outputs, len(s.x), net.flat, s.z
    if plan.linear >= 0:
        width = s.numbers.shape[1]
        w, bias = _matrix(flat, plan.linear, outputs, width), flat[plan.linear + outputs * width :]
        for b in range(count):
            for o in range(outputs):
                z[b, o] += dot(w[o], s.numbers[b]) + bias[o]
    if plan.pairs != NO_PAIRS:
        for b in range(count):
            _pairs(b, net, plan, s)
    levels = len(plan.layers)
    for c in range(len(plan.crosses)):
        _cross(c, count, flat, plan, s)
    x = _entering(plan, s)
    for level in range(levels):
        w, bias = _layer(flat, plan, level)
        if level == levels - 1:
            for b in range(count):
                for o in range(outputs):
                    z[b, o] += dot(w[o], x[b]) + bias[o]
            return
        y = _acts(s, plan, level, largest)
        affine(w, bias, x, count, y)
        for b in range(count):
            _rectify(y[b])
        x = y


@fast
def _entering(plan: Any, s: Any) -> Any:
    """(Bmax, E) what enters the tower."""
    return _into_cross(len(plan.crosses), s)


@fast
def _into_cross(c: int, s: Any) -> Any:
    """(Bmax, E) what enters cross layer c."""
    return s.crossed[c - 1] if c else s.x


@fast
def _cross(c: int, count: int, flat: Any, plan: Any, s: Any) -> None:
    """x_{c+1} = x_0 * (W x_c + b) + x_c"""
    width = s.x.shape[1]
    at, bias = plan.crosses[c]
    given, x, factors, said = s.x, _into_cross(c, s), s.factors[c], s.crossed[c]
    affine(_matrix(flat, at, width, width), flat[bias : bias + width], x, count, factors)
    for b in range(count):
        for j in range(width):
            said[b, j] = given[b, j] * factors[b, j] + x[b, j]


@fast
def _rectify(h: Any) -> None:
    zero = h.dtype.type(0)
    for j in range(len(h)):
        h[j] = max(h[j], zero) if h[j] == h[j] else h[j]


@fast
def _pairs(b: int, net: Any, plan: Any, s: Any) -> None:
    dim = plan.dim
    half = net.flat.dtype.type(0.5)
    total, products = s.total[b], s.products[b]
    total[:] = 0.0
    products[:] = 0.0
    for f in range(plan.fields):
        v = s.x[b, f * dim : (f + 1) * dim]
        for j in range(dim):
            total[j] += v[j]
            products[j] += v[j] * v[j]
    for j in range(dim):
        products[j] = half * (total[j] * total[j] - products[j])
    if plan.pairs == SUMMED:
        for j in range(dim):
            s.z[b, 0] += products[j]
        return
    for o in range(plan.outputs):
        at = plan.projection + o * dim
        s.z[b, o] += dot(net.flat[at : at + dim], products)


@exact
def _losses(count: int, served: float, plan: Any, s: Any) -> None:
    """dz (B, O): the gradient of the step's loss by z."""
    for b in range(count):
        share = 1.0 if b == 0 else plan.share
        if len(plan.class_weights):
            share *= plan.class_weights[int(s.y[b])]
        z, dz = s.z[b], s.dz[b]
        if plan.task == BINARY:
            loss, slope = binary_loss(z[0], s.y[b])
            if plan.alpha and b == 0:
                loss, slope = self_corrected(loss, slope, z[0], s.y[b], served, plan.alpha)
            dz[0] = slope
        elif plan.task == MULTICLASS:
            cross_entropy(z, s.y[b], dz)
        else:
            dz[0] = z[0] - s.y[b]
        for o in range(len(dz)):
            dz[o] *= share


@fast
def _backward(count: int, net: Any, plan: Any, s: Any) -> None:
    """The gradients by all sums of the tower, and dx (B, E)."""
    largest, levels, mix = len(s.x), len(plan.layers), s.mix
    if not levels:
        s.dx[:count] = 0.0
    d = s.dz
    for level in range(levels - 1, -1, -1):
        w, _ = _layer(net.flat, plan, level)
        to = s.dx if level == 0 else _deltas(s, plan, level - 1, largest)
        for b in range(count):
            pull_back(w, d[b], mix, to[b])
        if level > 0:
            h = _acts(s, plan, level - 1, largest)
            for b in range(count):
                _mask(to[b], h[b])
        d = to
    if len(plan.crosses):
        for b in range(count):
            _pull_cross(b, net.flat, plan, s)
    if plan.pairs != NO_PAIRS:
        for b in range(count):
            _pull_pairs(b, net, plan, s)


@fast
def _pull_cross(b: int, flat: Any, plan: Any, s: Any) -> None:
    """dx of row b: from the gradient by what entered the tower to that by what entered the first cross layer."""
    width = s.x.shape[1]
    dx, given, own, back = s.dx[b], s.x[b], s.own, s.g[:width]
    own[:] = 0.0
    for c in range(len(plan.crosses) - 1, -1, -1):
        turned, factors = s.turned[c, b], s.factors[c, b]
        for j in range(width):
            turned[j] = dx[j] * given[j]
            own[j] += dx[j] * factors[j]
        pull_back(_matrix(flat, plan.crosses[c, 0], width, width), turned, s.mix, back)
        for j in range(width):
            dx[j] += back[j]
    for j in range(width):
        dx[j] += own[j]


@fast
def _mask(d: Any, h: Any) -> None:
    zero = d.dtype.type(0)
    for j in range(len(d)):
        d[j] = d[j] if h[j] > zero else zero


@fast
def _pull_pairs(b: int, net: Any, plan: Any, s: Any) -> None:
    dim = plan.dim
    pull = s.pull[b]
    if plan.pairs == SUMMED:
        pull[:] = s.dz[b, 0]
    else:
        pull[:] = 0.0
        for o in range(plan.outputs):
            at = plan.projection + o * dim
            add_scaled(pull, s.dz[b, o], net.flat[at : at + dim])
    for f in range(plan.fields):
        v, d = s.x[b, f * dim : (f + 1) * dim], s.dx[b, f * dim : (f + 1) * dim]
        for j in range(dim):
            d[j] += pull[j] * (s.total[b, j] - v[j])


@exact
def _touch(count: int, s: Any) -> int:
    """Which rows the step reads, each once, in `touched`; how many. `place` says where a slot's row stands there."""
    s.stamp[0] += 1
    stamp, buckets = s.stamp[0], len(s.stamps)
    found = 0
    for b in range(count):
        for slot in range(s.ids.shape[1]):
            row = s.ids[b, slot]
            at = np.int64((np.uint64(row) * GOLDEN) >> np.uint64(40)) & (buckets - 1)
            while s.stamps[at] == stamp and s.buckets[0, at] != row:
                at = (at + 1) & (buckets - 1)
            if s.stamps[at] != stamp:
                s.stamps[at] = stamp
                s.buckets[0, at], s.buckets[1, at] = row, found
                s.touched[found] = row
                found += 1
            s.place[b, slot] = s.buckets[1, at]
    return found


@fast
def _row_gradients(count: int, touched: int, plan: Any, s: Any) -> Any:
    """`row_grads` (U, W); returns the sum of its squares."""
    first, dim, slot_field = plan.first, plan.dim, plan.slot_field
    place, weights, dz, dx, grads = s.place, s.weights, s.dz, s.dx, s.row_grads
    grads[:touched] = 0.0
    for b in range(count):
        for slot in range(weights.shape[1]):
            weight = weights[b, slot]
            if weight != 0.0:
                row, at = place[b, slot], slot_field[slot] * dim
                for o in range(first):
                    grads[row, o] += weight * dz[b, o]
                for j in range(dim):
                    grads[row, first + j] += weight * dx[b, at + j]
    flat = grads.reshape(grads.size)[: touched * grads.shape[1]]
    return dot(flat, flat)


@fast
def _dense_gradients(count: int, plan: Any, s: Any) -> Any:
    """`grads` (P,); returns the sum of its squares. Of one row, whose matrices are products, only the small parts."""
    largest, levels, outputs = len(s.x), len(plan.layers), plan.outputs
    g, total = s.grads, s.grads.dtype.type(0)
    if plan.linear >= 0:
        width = s.numbers.shape[1]
        at = plan.linear
        outer(s.dz, s.numbers, count, s.mix, _matrix(g, at, outputs, width))
        end = at + outputs * width + outputs
        _summed(s.dz, count, g[end - outputs : end])
        total += dot(g[at:end], g[at:end])
    if plan.pairs == PROJECTED:
        at, end = plan.projection, plan.projection + outputs * plan.dim
        outer(s.dz, s.products, count, s.mix, _matrix(g, at, outputs, plan.dim))
        total += dot(g[at:end], g[at:end])
    for c in range(len(plan.crosses)):
        w, b = plan.crosses[c]
        total += _layer_gradient(count, s.turned[c], _into_cross(c, s), w, b, s)
    for level in range(levels):
        _, _, w, b = plan.layers[level]
        d = s.dz if level == levels - 1 else _deltas(s, plan, level, largest)
        x = _entering(plan, s) if level == 0 else _acts(s, plan, level - 1, largest)
        total += _layer_gradient(count, d, x, w, b, s)
    return total


@fast
def _layer_gradient(count: int, d: Any, x: Any, w: int, b: int, s: Any) -> Any:
    """Of weights and bias at w and b, from d (B, O) and x (B, I); returns the sum of its squares."""
    g, units, width = s.grads, d.shape[1], x.shape[1]
    _summed(d, count, g[b : b + units])
    squares = dot(g[b : b + units], g[b : b + units])
    if count == 1:
        return squares + dot(d[0], d[0]) * dot(x[0], x[0])
    outer(d, x, count, s.mix, _matrix(g, w, units, width))
    return squares + dot(g[w : w + units * width], g[w : w + units * width])


@fast
def _summed(d: Any, count: int, out: Any) -> None:
    put(out, d[0])
    for b in range(1, count):
        for j in range(len(out)):
            out[j] += d[b, j]


@fast
def _update(count: int, touched: int, net: Any, plan: Any, s: Any) -> None:
    width, levels, largest, outputs = net.table.shape[1], len(plan.layers), len(s.x), plan.outputs
    kind, rates, flat, (a, b, c) = plan.optimizer, plan.rates, net.flat, net.slots
    all_rows, none, grads = s.touched[:0], s.g[:0], s.grads
    row_a, row_b, row_c = net.row_slots
    steps = len(row_c) // max(len(net.table), 1)  # Adam counts the steps of a row, not of each weight
    row_grads = s.row_grads.reshape(s.row_grads.size)
    move(
        kind, plan.row_rates, net.rows, row_a, row_b, row_c, 0, s.touched, touched, width, none, row_grads, width, steps
    )
    if plan.linear >= 0:
        n = outputs * (s.numbers.shape[1] + 1)
        move(kind, rates, flat, a, b, c, plan.linear, all_rows, 1, n, none, grads[plan.linear :], n, n)
    if plan.pairs == PROJECTED:
        n = outputs * plan.dim
        move(kind, rates, flat, a, b, c, plan.projection, all_rows, 1, n, none, grads[plan.projection :], n, n)
    for cross in range(len(plan.crosses)):
        w, bias = plan.crosses[cross]
        _move_layer(count, s.turned[cross], _into_cross(cross, s), w, bias, net, plan, s)
    for level in range(levels):
        _, _, w, bias = plan.layers[level]
        d = s.dz if level == levels - 1 else _deltas(s, plan, level, largest)
        x = _entering(plan, s) if level == 0 else _acts(s, plan, level - 1, largest)
        _move_layer(count, d, x, w, bias, net, plan, s)


@fast
def _move_layer(count: int, d: Any, x: Any, w: int, bias: int, net: Any, plan: Any, s: Any) -> None:
    kind, rates, flat, (a, b, c) = plan.optimizer, plan.rates, net.flat, net.slots
    all_rows, none, grads, units, inputs = s.touched[:0], s.g[:0], s.grads, d.shape[1], x.shape[1]
    move(kind, rates, flat, a, b, c, bias, all_rows, 1, units, none, grads[bias:], units, units)
    if count > 1:
        n = units * inputs
        move(kind, rates, flat, a, b, c, w, all_rows, 1, n, none, grads[w:], n, n)
        return
    # Of one row the gradient is a product of two vectors: it is never written down.
    move(kind, rates, flat, a, b, c, w, all_rows, units, inputs, d[0], x[0], 0, inputs)


@fast
def _renew(count: int, plan: Any, renewal: Any, s: Any) -> bool:
    """The running means of continual backpropagation; whether a unit is due."""
    renewal.step[0] += 1
    step, largest = renewal.step[0], len(s.x)
    one = s.x.dtype.type(1)
    rate, n = s.x.dtype.type(1.0 - renewal.decay), s.x.dtype.type(count)
    due = False
    for level in range(len(renewal.starts)):
        start = renewal.starts[level]
        if start < 0:
            continue
        h = _acts(s, plan, level, largest)
        units = h.shape[1]
        mean, mean_use = renewal.mean[start : start + units], renewal.mean_use[start : start + units]
        born = renewal.born[start : start + units]
        sums = s.g[:units]
        put(sums, h[0])
        for b in range(1, count):
            add_scaled(sums, one, h[b])
        for j in range(units):
            mean[j] += rate * (sums[j] / n - mean[j])
        if renewal.corrected:
            _correct(count, step, renewal.decay, renewal.powers, born, mean, h, sums)
        for j in range(units):
            mean_use[j] += rate * (sums[j] / n - mean_use[j])
        old = 0
        for j in range(units):
            old += step - born[j] > renewal.maturity
        renewal.eligible[level] += old
        owed = math.floor(renewal.rates[level] * renewal.eligible[level]) - renewal.replaced[level]
        due |= owed > 0 and old > 0
    return due


@exact
def _correct(count: int, step: int, decay: float, powers: Any, born: Any, mean: Any, h: Any, sums: Any) -> None:
    """sums (n,) of |h - its mean|."""
    for j in range(len(mean)):
        age = step - born[j]
        kept = powers[age] if age < len(powers) else decay**age
        centre = mean[j] / h.dtype.type(1.0 - kept)
        total = h.dtype.type(0)
        for b in range(count):
            total += abs(h[b, j] - centre)
        sums[j] = total


@fast
def _sample(norm: Any, plan: Any, watch: Any, s: Any) -> Any:
    """A learning step has been taken; whether a report is due."""
    watch.steps[0] += 1
    if watch.steps[0] % watch.every == 0:
        row = watch.ring[watch.steps[1] % len(watch.ring)]
        at = 0
        for level in range(len(plan.layers) - 1):
            h = _acts(s, plan, level, len(s.x))[0]
            put(row[at:], h)
            at += len(h)
        row[at] = norm
        watch.steps[1] += 1
    return watch.steps[0] % watch.report == 0


@exact
def _label(y: float, plan: Any, norms: Any) -> Any:
    if plan.task != REGRESSION:
        return y
    return _standardised(y, norms.y_count[0], norms.y_mean[0], norms.y_m2[0], 10.0)


@exact
def _answer(n: int, plan: Any, norms: Any, found: Any, s: Any) -> None:
    """Output and served score of operation n."""
    z, served = s.z[0], found.served[n]
    put(found.output[n], z)
    if plan.task == BINARY:
        served[0] = sigmoid(z[0])
    elif plan.task == REGRESSION:
        served[0] = norms.y_mean[0] + z[0] * _deviation(norms.y_count[0], norms.y_m2[0])
    else:
        highest, total = z[0], 0.0
        for o in range(1, len(z)):
            highest = max(highest, z[o])
        for o in range(len(z)):
            total += math.exp(z[o] - highest)
        for o in range(len(z)):
            served[o] = math.exp(z[o] - highest) / total


@exact
def _step(n: int, count: int, served: float, net: Any, plan: Any, found: Any, s: Any) -> tuple[bool, int]:
    """One update on the first `count` rows of the scratch; (whether it could be, how many rows of the table moved)."""
    _forward(count, net, plan, s)
    _losses(count, served, plan, s)
    _backward(count, net, plan, s)
    touched = _touch(count, s)
    rows = float(_row_gradients(count, touched, plan, s))
    dense = float(_dense_gradients(count, plan, s))
    if not math.sqrt(rows + dense) <= plan.largest:
        return False, 0
    found.norm[n] = math.sqrt(dense)
    _update(count, touched, net, plan, s)
    return True, touched


@entry
def scan(
    n: int,
    steps: int,
    chunk: Chunk,
    found: Found,
    net: Net,
    plan: Plan,
    norms: Norms,
    memory: Rows,
    renewal: Renewal,
    watch: Watch,
    moved: Any,
    s: Scratch,
) -> tuple[int, int, int]:
    """Operations n, n + 1, ... of a chunk.

    Args:
        steps: Taken before; what draws are keyed by.
        moved: (k,) rows of the table that were changed, -1 behind each step's; (0,) where nobody asks.

    Returns:
        The operation that is next, why it has ended, and how much of `moved` is filled.
    """
    logged, width = 0, len(norms.count)
    keep = np.empty((3, width + 1))
    kinds, all_ids, all_weights, all_dense, labels = chunk.kind, chunk.ids, chunk.weights, chunk.dense, chunk.label
    count_, mean, m2, y_count, y_mean, y_m2 = norms.count, norms.mean, norms.m2, norms.y_count, norms.y_mean, norms.y_m2
    rows_ids, rows_weights, rows_dense, rows_y = memory.ids, memory.weights, memory.dense, memory.y
    held, slots, source, given, asked = chunk.held, chunk.slot, chunk.source, chunk.served, found.served
    draw, key, regression, y, norm = plan.draw, plan.key, plan.task == REGRESSION, s.y, found.norm
    entered, hidden, drawn, scaled, every = found.entered, found.hidden, found.drawn, norms.scaled, watch.every
    levels, renewing = len(plan.layers), renewal.on
    while n < len(kinds):
        ids, weights, dense = all_ids[n], all_weights[n], all_dense[n]
        if kinds[n] == REFUSE:
            return n + 1, REFUSED, logged
        if kinds[n] == ANSWER:
            _gather(0, ids, weights, dense, net, plan, norms, s)
            _forward(1, net, plan, s)
            _answer(n, plan, norms, found, s)
            if len(entered) and plan.dim:
                put(entered[n], s.x[0])
            if len(hidden) and levels:
                put(hidden[n], s.x[0] if levels == 1 else _acts(s, plan, levels - 2, len(s.x))[0])
            n += 1
            continue
        put(keep[0], count_)
        put(keep[1], mean)
        put(keep[2], m2)
        keep[0, width], keep[1, width], keep[2, width] = y_count[0], y_mean[0], y_m2[0]
        _observe(count_, mean, m2, scaled, dense)
        if regression:
            _observe(y_count, y_mean, y_m2, plan.label_scaled, labels[n : n + 1])
        served = given[n] if source[n] < 0 else float(asked[source[n], 0])
        count = 1
        _gather(0, ids, weights, dense, net, plan, norms, s)
        y[0] = _label(labels[n], plan, norms)
        if held[n]:
            for i in range(draw):
                row = below(held[n], key, steps, i)
                if len(drawn):
                    drawn[n, i] = row
                _gather(count, rows_ids[row], rows_weights[row], rows_dense[row], net, plan, norms, s)
                y[count] = _label(rows_y[row], plan, norms)
                count += 1
        taken, touched = _step(n, count, served, net, plan, found, s)
        if not taken and count > 1:  # is it the event, or what is replayed?
            count = 1
            _gather(0, ids, weights, dense, net, plan, norms, s)
            taken, touched = _step(n, count, served, net, plan, found, s)
        n += 1
        if not taken:
            put(count_, keep[0, :width])
            put(mean, keep[1, :width])
            put(m2, keep[2, :width])
            y_count[0], y_mean[0], y_m2[0] = keep[0, width], keep[1, width], keep[2, width]
            return n, REFUSED, logged
        steps += 1
        if len(moved):
            put(moved[logged:], s.touched[:touched])
            logged += touched
        due = _renew(count, plan, renewal, s) if renewing else False
        if every and _sample(norm[n - 1], plan, watch, s):
            due = True
        slot = slots[n - 1]
        if slot >= 0:
            put(rows_ids[slot], ids)
            put(rows_weights[slot], weights)
            put(rows_dense[slot], dense)
            rows_y[slot] = labels[n - 1]
        if due:
            return n, DUE, logged
    return n, DONE, logged
