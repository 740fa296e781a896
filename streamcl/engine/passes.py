"""One step of a model whose arithmetic is known: what it says, its gradients, its weights moved; shapes: `layout`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import exact, fast, fast_inlined, view
from streamcl.engine.kernels import add_scaled, affine, dot, move, outer, pull_back, put
from streamcl.engine.layout import NO_PAIRS, PROJECTED, SUMMED
from streamcl.index import find


@exact
def deviation(count: float, m2: float) -> float:
    variance = m2 / max(count, 1.0)
    return math.sqrt(variance) if variance > 0.0 else 1.0


@exact
def standardised(value: float, count: float, mean: float, m2: float, clip: float) -> Any:
    found = (value - mean) / deviation(count, m2)
    return np.float32(0.0) if math.isnan(found) else np.float32(min(max(found, -clip), clip))


@fast_inlined
def gather(b: int, ids: Any, weights: Any, dense: Any, net: Any, plan: Any, norms: Any, s: Any) -> None:
    """Row b of the scratch: pooled embeddings and standardised numbers, and the first-order part of z."""
    x, z, dim, first = s.x[b], s.z[b], plan.dim, plan.first
    table, slot_field, mine, weighing, numbers = net.table, plan.slot_field, s.ids[b], s.weights[b], s.numbers[b]
    keys, cells, behind, void = net.tables.keys, net.tables.cells, net.tables.first, net.tables.void
    x[:] = 0.0
    z[:] = 0.0
    for slot in range(len(ids)):
        weight, id = weights[slot], ids[slot]
        if id < 0:
            row = find(id, keys, cells)
            id = behind + row if row >= 0 else void
            weight = weight if row >= 0 else np.float32(0.0)
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


@view
def _matrix(flat: Any, at: int, rows: int, columns: int) -> Any:
    return flat[at : at + rows * columns].reshape((rows, columns))


@view
def of_layer(held: Any, layers: Any, level: int, largest: int) -> Any:
    """(Bmax, n) of what is held for all hidden layers: what one has said, or the gradient by that."""
    at = 0
    for k in range(level):
        at += layers[k, 1]
    return _matrix(held, at * largest, largest, layers[level, 1])


@fast_inlined
def forward(count: int, flat: Any, plan: Any, s: Any) -> None:
    """z (B, O) of what was gathered; all that the way back needs stays in the scratch."""
    outputs, largest, z = plan.outputs, len(s.x), s.z
    if plan.linear >= 0:
        width = s.numbers.shape[1]
        w, bias = _matrix(flat, plan.linear, outputs, width), flat[plan.linear + outputs * width :]
        for b in range(count):
            for o in range(outputs):
                z[b, o] += dot(w[o], s.numbers[b]) + bias[o]
    if plan.pairs != NO_PAIRS:
        for b in range(count):
            _pairs(b, flat, plan, s)
    for c in range(len(plan.crosses)):
        _cross(c, count, flat, plan, s)
    layers, held, x = plan.layers, s.acts, _entering(len(plan.crosses), s.crossed, s.x)
    for level in range(len(layers)):
        width, units, at, end = layers[level]
        w, bias = _matrix(flat, at, units, width), flat[end : end + units]
        if level == len(layers) - 1:
            for b in range(count):
                for o in range(outputs):
                    z[b, o] += dot(w[o], x[b]) + bias[o]
            return
        y = of_layer(held, layers, level, largest)
        affine(w, bias, x, count, y)
        _rectify(count, y)
        x = y


@view
def _entering(c: int, crossed: Any, x: Any) -> Any:
    """(Bmax, E) what enters cross layer c, or behind the last of them the tower."""
    return crossed[c - 1] if c else x


@fast_inlined
def _cross(c: int, count: int, flat: Any, plan: Any, s: Any) -> None:
    """x_{c+1} = x_0 * (W x_c + b) + x_c"""
    width = s.x.shape[1]
    at, bias = plan.crosses[c]
    given, x, factors, said = s.x, _entering(c, s.crossed, s.x), s.factors[c], s.crossed[c]
    affine(_matrix(flat, at, width, width), flat[bias : bias + width], x, count, factors)
    for b in range(count):
        for j in range(width):
            said[b, j] = given[b, j] * factors[b, j] + x[b, j]


@fast
def _rectify(count: int, h: Any) -> None:
    zero = h.dtype.type(0)
    for b in range(np.uint64(count)):
        for j in range(np.uint64(h.shape[1])):
            h[b, j] = max(h[b, j], zero) if h[b, j] == h[b, j] else h[b, j]


@fast_inlined
def _pairs(b: int, flat: Any, plan: Any, s: Any) -> None:
    dim = plan.dim
    half = flat.dtype.type(0.5)
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
        s.z[b, o] += dot(flat[at : at + dim], products)


@fast_inlined
def backward(count: int, net: Any, plan: Any, s: Any) -> None:
    """The gradients by all sums of the tower, and dx (B, E)."""
    largest, layers, mix, flat = len(s.x), plan.layers, s.mix, net.flat
    if not len(layers):
        s.dx[:count] = 0.0
    d, dx, said, deltas = s.dz, s.dx, s.acts, s.deltas
    last = 0 if plan.fields * plan.dim or len(plan.crosses) else 1  # nobody learns from the gradient by mere numbers
    for level in range(len(layers) - 1, last - 1, -1):
        width, units, at, _ = layers[level]
        w = _matrix(flat, at, units, width)
        to = dx if level == 0 else of_layer(deltas, layers, level - 1, largest)
        for b in range(count):
            pull_back(w, d, b, mix, to)
        if level > 0:
            _mask(count, to, of_layer(said, layers, level - 1, largest))
        d = to
    if len(plan.crosses):
        for b in range(count):
            _pull_cross(b, flat, plan, s)
    if plan.pairs != NO_PAIRS:
        for b in range(count):
            _pull_pairs(b, net, plan, s)


@fast_inlined
def _pull_cross(b: int, flat: Any, plan: Any, s: Any) -> None:
    """dx of row b: from the gradient by what entered the tower to that by what entered the first cross layer."""
    width = s.x.shape[1]
    dx, given, own, back = s.dx[b], s.x[b], s.own, s.back
    own[:] = 0.0
    for c in range(len(plan.crosses) - 1, -1, -1):
        turned, factors = s.turned[c], s.factors[c, b]
        for j in range(width):
            turned[b, j] = dx[j] * given[j]
            own[j] += dx[j] * factors[j]
        pull_back(_matrix(flat, plan.crosses[c, 0], width, width), turned, b, s.mix, back)
        for j in range(width):
            dx[j] += back[b, j]
    for j in range(width):
        dx[j] += own[j]


@fast
def _mask(count: int, d: Any, h: Any) -> None:
    zero = d.dtype.type(0)
    for b in range(np.uint64(count)):
        for j in range(np.uint64(d.shape[1])):
            d[b, j] = d[b, j] if h[b, j] > zero else zero


@fast_inlined
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


@fast_inlined
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


@fast_inlined
def dense_gradients(count: int, plan: Any, s: Any) -> Any:
    """`grads` (P,); returns the sum of its squares. Of one row, whose matrices are products, only the small parts."""
    largest, layers, outputs, mix = len(s.x), plan.layers, plan.outputs, s.mix
    g, total, said, deltas = s.grads, s.grads.dtype.type(0), s.acts, s.deltas
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
        total += _layer_gradient(count, s.turned[c], _entering(c, s.crossed, s.x), w, b, g, mix)
    x = _entering(len(plan.crosses), s.crossed, s.x)
    for level in range(len(layers)):
        d = s.dz if level == len(layers) - 1 else of_layer(deltas, layers, level, largest)
        total += _layer_gradient(count, d, x, layers[level, 2], layers[level, 3], g, mix)
        if level < len(layers) - 1:
            x = of_layer(said, layers, level, largest)
    return total


@fast
def _layer_gradient(count: int, d: Any, x: Any, w: int, b: int, g: Any, mix: Any) -> Any:
    """Of weights and bias at w and b, from d (B, O) and x (B, I); returns the sum of its squares."""
    units, width = d.shape[1], x.shape[1]
    _summed(d, count, g[b : b + units])
    squares = dot(g[b : b + units], g[b : b + units])
    if count == 1:
        return squares + dot(d[0], d[0]) * dot(x[0], x[0])
    outer(d, x, count, mix, _matrix(g, w, units, width))
    return squares + dot(g[w : w + units * width], g[w : w + units * width])


@fast
def _summed(d: Any, count: int, out: Any) -> None:
    put(out, d[0])
    for b in range(1, count):
        for j in range(len(out)):
            out[j] += d[b, j]


@fast_inlined
def update(count: int, touched: int, net: Any, plan: Any, s: Any) -> None:
    width, layers, largest, outputs = net.table.shape[1], plan.layers, len(s.x), plan.outputs
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
        x = _entering(cross, s.crossed, s.x)
        _move_layer(count, s.turned[cross], x, w, bias, kind, rates, flat, a, b, c, grads, all_rows, none)
    x, said, deltas = _entering(len(plan.crosses), s.crossed, s.x), s.acts, s.deltas
    for level in range(len(layers)):
        d = s.dz if level == len(layers) - 1 else of_layer(deltas, layers, level, largest)
        w, bias = layers[level, 2], layers[level, 3]
        _move_layer(count, d, x, w, bias, kind, rates, flat, a, b, c, grads, all_rows, none)
        if level < len(layers) - 1:
            x = of_layer(said, layers, level, largest)


@fast
def _move_layer(
    count: int,
    d: Any,
    x: Any,
    w: int,
    bias: int,
    kind: int,
    rates: Any,
    flat: Any,
    a: Any,
    b: Any,
    c: Any,
    grads: Any,
    all_rows: Any,
    none: Any,
) -> None:
    units, inputs = d.shape[1], x.shape[1]
    move(kind, rates, flat, a, b, c, bias, all_rows, 1, units, none, grads[bias:], units, units)
    if count > 1:
        n = units * inputs
        move(kind, rates, flat, a, b, c, w, all_rows, 1, n, none, grads[w:], n, n)
        return
    # Of one row the gradient is a product of two vectors: it is never written down.
    move(kind, rates, flat, a, b, c, w, all_rows, units, inputs, d[0], x[0], 0, inputs)
