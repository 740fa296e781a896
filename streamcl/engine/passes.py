"""One step of a model whose arithmetic is known: what it says, its gradients, its weights moved; shapes: `layout`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import exact, fast
from streamcl.engine.kernels import add_scaled, affine, dot, move, outer, pull_back, put
from streamcl.engine.layout import NO_PAIRS, PROJECTED, SUMMED


@exact
def deviation(count: float, m2: float) -> float:
    variance = m2 / max(count, 1.0)
    return math.sqrt(variance) if variance > 0.0 else 1.0


@exact
def standardised(value: float, count: float, mean: float, m2: float, clip: float) -> Any:
    found = (value - mean) / deviation(count, m2)
    return np.float32(0.0) if math.isnan(found) else np.float32(min(max(found, -clip), clip))


@fast
def gather(b: int, ids: Any, weights: Any, dense: Any, net: Any, plan: Any, norms: Any, s: Any) -> None:
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
        value = standardised(dense[i], count[i], mean[i], m2[i], clip[i])
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
def acts(s: Any, plan: Any, level: int, largest: int) -> Any:
    """(Bmax, n) what layer `level` has said."""
    return _of_layer(s.acts, plan, level, largest)


@fast
def _deltas(s: Any, plan: Any, level: int, largest: int) -> Any:
    """(Bmax, n) the gradient by what it has said."""
    return _of_layer(s.deltas, plan, level, largest)


@fast
def forward(count: int, net: Any, plan: Any, s: Any) -> None:
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
        y = acts(s, plan, level, largest)
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


@fast
def backward(count: int, net: Any, plan: Any, s: Any) -> None:
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
            h = acts(s, plan, level - 1, largest)
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


@fast
def row_gradients(count: int, touched: int, plan: Any, s: Any) -> Any:
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
def dense_gradients(count: int, plan: Any, s: Any) -> Any:
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
        x = _entering(plan, s) if level == 0 else acts(s, plan, level - 1, largest)
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
def update(count: int, touched: int, net: Any, plan: Any, s: Any) -> None:
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
        x = _entering(plan, s) if level == 0 else acts(s, plan, level - 1, largest)
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
