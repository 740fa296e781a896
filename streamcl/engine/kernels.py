"""The compiled arithmetic of the fused engine: dense layers, losses, and the optimisers' updates of one row.

All loops run over the last axis, which is contiguous, so that the compiler makes vector code of them. What `fast` does
to sums and roots is right to a few units of the last place in float32, to rounding in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streamcl.compiled import exact, fast
from streamcl.engine.optimizers import FTRL, Adagrad, Adam
from streamcl.engine.reloop import NOISE

SGD_KIND, ADAGRAD_KIND, ADAM_KIND, FTRL_KIND = range(4)
KINDS = {"sgd": SGD_KIND, "adagrad": ADAGRAD_KIND, "adam": ADAM_KIND, "ftrl": FTRL_KIND}

_LOG1, _LOG2 = math.log(Adam.BETA1), math.log(Adam.BETA2)
_FIRST, _SECOND = 1.0 - Adam.BETA1, 1.0 - Adam.BETA2
_EPSILON, _BETA = Adam.EPSILON, FTRL.BETA
assert Adagrad.INITIAL > 0.0  # noqa: S101 - `move` divides by a root of it without asking


_intrinsic: Callable[[Any], Any] = intrinsic


@_intrinsic
def _fetch(_typing: Any, array: Any, _index: Any) -> Any:
    """Ask the processor for the cache line of a number of a flat array, and go on without it."""

    def made(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        first = context.make_array(signature.args[0])(context, builder, given[0]).data
        place = builder.bitcast(builder.gep(first, [given[1]]), ir.IntType(8).as_pointer())
        flags = [ir.Constant(ir.IntType(32), flag) for flag in (1, 3, 1)]  # to be written, kept near, data
        kind = ir.FunctionType(ir.VoidType(), [place.type, *(flag.type for flag in flags)])
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind), [place, *flags])
        return context.get_dummy_value()

    return types.void(array, types.intp), made


@fast
def foresee(ids: Any, width: int, rows: Any, a: Any, b: Any, c: Any) -> None:
    """Ask for rows of a table and of its slots, as `move` has them, before they are needed.

    Of a table of ten million rows each is far away in memory, and its page unknown: that takes longer than arithmetic.
    """
    line = 64 // rows.itemsize
    for id in ids:
        if id >= 0:  # else it is for a dynamic table to find
            for p in range(id * width, (id + 1) * width + line - 1, line):
                at = min(p, (id + 1) * width - 1)
                _fetch(rows, at)
                if len(a):
                    _fetch(a, at)
                if len(b):
                    _fetch(b, at)
            if len(c):
                _fetch(c, id)


@fast
def affine(w: Any, bias: Any, x: Any, count: int, y: Any) -> None:
    """y (B, O) = x (B, I) w^T + bias; w (O, I), the first `count` rows. Four rows by two units share what they load."""
    units, width, zero = w.shape[0], np.uint64(w.shape[1]), w.dtype.type(0)
    b = 0
    while b + 4 <= count:
        b0, b1, b2, b3 = np.uint64(b), np.uint64(b + 1), np.uint64(b + 2), np.uint64(b + 3)
        i = 0
        while i + 2 <= units:
            p, q = np.uint64(i), np.uint64(i + 1)
            a0 = a1 = a2 = a3 = zero
            c0 = c1 = c2 = c3 = zero
            for j in range(width):
                a0 += w[p, j] * x[b0, j]
                a1 += w[p, j] * x[b1, j]
                a2 += w[p, j] * x[b2, j]
                a3 += w[p, j] * x[b3, j]
                c0 += w[q, j] * x[b0, j]
                c1 += w[q, j] * x[b1, j]
                c2 += w[q, j] * x[b2, j]
                c3 += w[q, j] * x[b3, j]
            y[b0, p], y[b1, p], y[b2, p], y[b3, p] = a0 + bias[p], a1 + bias[p], a2 + bias[p], a3 + bias[p]
            y[b0, q], y[b1, q], y[b2, q], y[b3, q] = c0 + bias[q], c1 + bias[q], c2 + bias[q], c3 + bias[q]
            i += 2
        while i < units:
            p = np.uint64(i)
            a0 = a1 = a2 = a3 = zero
            for j in range(width):
                a0 += w[p, j] * x[b0, j]
                a1 += w[p, j] * x[b1, j]
                a2 += w[p, j] * x[b2, j]
                a3 += w[p, j] * x[b3, j]
            y[b0, p], y[b1, p], y[b2, p], y[b3, p] = a0 + bias[p], a1 + bias[p], a2 + bias[p], a3 + bias[p]
            i += 1
        b += 4
    while b < count:
        affine_one(w, bias, x, b, y)
        b += 1


@fast
def affine_one(w: Any, bias: Any, x: Any, b: int, y: Any) -> None:
    """Row b of it. Four units share what they load."""
    units, width, zero, b0 = w.shape[0], np.uint64(w.shape[1]), w.dtype.type(0), np.uint64(b)
    i = 0
    while i + 4 <= units:
        p, q, r, t = np.uint64(i), np.uint64(i + 1), np.uint64(i + 2), np.uint64(i + 3)
        a0 = a1 = a2 = a3 = zero
        for j in range(width):
            a0 += w[p, j] * x[b0, j]
            a1 += w[q, j] * x[b0, j]
            a2 += w[r, j] * x[b0, j]
            a3 += w[t, j] * x[b0, j]
        y[b0, p], y[b0, q], y[b0, r], y[b0, t] = a0 + bias[p], a1 + bias[q], a2 + bias[r], a3 + bias[t]
        i += 4
    while i < units:
        p = np.uint64(i)
        a0 = zero
        for j in range(width):
            a0 += w[p, j] * x[b0, j]
        y[b0, p] = a0 + bias[p]
        i += 1


@fast
def dot(a: Any, b: Any) -> Any:
    total = a.dtype.type(0)
    for j in range(len(a)):
        total += a[j] * b[j]
    return total


@fast
def put(out: Any, x: Any) -> None:
    """out = x; an assignment of arrays is slower to compile, for the text of its error is compiled with it."""
    for j in range(len(x)):
        out[j] = x[j]


@fast
def add_scaled(out: Any, scale: Any, x: Any) -> None:
    """out += scale x"""
    for j in range(len(out)):
        out[j] += scale * x[j]


@fast
def pull_back(w: Any, d: Any, b: int, units: Any, out: Any) -> None:
    """Row b of out (B, I) = d (B, O) w, w (O, I). A unit whose gradient is 0 costs nothing: behind a ReLU a half."""
    width, b0, m, k = np.uint64(w.shape[1]), np.uint64(b), 0, 0
    for i in range(len(w)):
        if d[b, i] != 0.0:
            units[m] = i
            m += 1
    for j in range(width):
        out[b0, j] = 0.0
    while k + 4 <= m:
        p, q, r, t = np.uint64(units[k]), np.uint64(units[k + 1]), np.uint64(units[k + 2]), np.uint64(units[k + 3])
        d0, d1, d2, d3 = d[b0, p], d[b0, q], d[b0, r], d[b0, t]
        for j in range(width):
            out[b0, j] += d0 * w[p, j] + d1 * w[q, j] + d2 * w[r, j] + d3 * w[t, j]
        k += 4
    while k < m:
        p = np.uint64(units[k])
        d0 = d[b0, p]
        for j in range(width):
            out[b0, j] += d0 * w[p, j]
        k += 1


@fast
def outer(d: Any, x: Any, count: int, rows: Any, g: Any) -> None:
    """g (O, I) = sum over the first `count` of d (B, O) and x (B, I)."""
    units, width, zero = g.shape[0], np.uint64(g.shape[1]), g.dtype.type(0)
    for i in range(units):
        at, m = np.uint64(i), 0
        for b in range(count):
            if d[b, i] != 0.0:
                rows[m] = b
                m += 1
        if m == 0:
            for j in range(width):
                g[at, j] = zero
            continue
        for k in range(m, m + 3):
            rows[k] = rows[0]
        k = 0
        while k < m:
            p, q, r, t = np.uint64(rows[k]), np.uint64(rows[k + 1]), np.uint64(rows[k + 2]), np.uint64(rows[k + 3])
            d0 = d[p, at]
            d1 = d[q, at] if k + 1 < m else zero
            d2 = d[r, at] if k + 2 < m else zero
            d3 = d[t, at] if k + 3 < m else zero
            if k == 0:
                for j in range(width):
                    g[at, j] = d0 * x[p, j] + d1 * x[q, j] + d2 * x[r, j] + d3 * x[t, j]
            else:
                for j in range(width):
                    g[at, j] += d0 * x[p, j] + d1 * x[q, j] + d2 * x[r, j] + d3 * x[t, j]
            k += 4


@fast
def move(
    kind: int,
    rates: Any,
    w: Any,
    a: Any,
    b: Any,
    c: Any,
    base: int,
    index: Any,
    count: int,
    width: int,
    slopes: Any,
    g: Any,
    stride: int,
    steps: int,
) -> None:
    """One update of `count` rows of `width` weights by the optimiser, in place; see `streamcl.engine.optimizers`.

    Of flat arrays: weights w and slots a, b; Adam's steps c, of which a row has `steps`, 1 or as many as weights. Row u
    lies `index[u]` rows, or without an index u rows, behind `base`. Its gradient is g from u x stride on, times
    `slopes[u]` where there are slopes. rates (3,): learning rate, l1, l2.

    Slices, and fields of tuples, would cost more than a short row's arithmetic: each counts its references. Indices are
    unsigned, for what may count from the end of an array is not made vector code of.
    """
    rate, l2, one = rates[0], rates[2], w.dtype.type(1)
    indexed, sloping = len(index) > 0, len(slopes) > 0
    if kind == SGD_KIND:
        _move_sgd(rate, l2, w, base, index, count, width, slopes, g, stride)
    elif kind == ADAGRAD_KIND:
        _move_adagrad(rate, l2, w, a, base, index, count, width, slopes, g, stride)
    elif kind == ADAM_KIND:
        for u in range(count):
            row = index[u] if indexed else u
            p, q = base + row * width, row * steps + (base if steps == width else 0)
            scale = slopes[u] if sloping else one
            _move_adam(rate, l2, w, a, b, c, p, width, q, steps, scale, g, u * stride)
    else:
        for u in range(count):
            p = base + (index[u] if indexed else u) * width
            _move_ftrl(rates, w, a, b, p, width, slopes[u] if sloping else one, g, u * stride)


@fast
def _move_sgd(
    rate: Any, l2: Any, w: Any, base: int, index: Any, count: int, width: int, slopes: Any, g: Any, stride: int
) -> None:
    indexed, sloping, one, n = len(index) > 0, len(slopes) > 0, w.dtype.type(1), np.uint64(width)
    for u in range(count):
        scale = slopes[u] if sloping else one
        if scale != 0.0 or l2 != 0.0:
            p, at = np.uint64(base + (index[u] if indexed else u) * width), np.uint64(u * stride)
            for j in range(n):
                w[p + j] -= rate * (scale * g[at + j] + l2 * w[p + j])


@fast
def _move_adagrad(
    rate: Any, l2: Any, w: Any, a: Any, base: int, index: Any, count: int, width: int, slopes: Any, g: Any, stride: int
) -> None:
    indexed, sloping, one, n = len(index) > 0, len(slopes) > 0, w.dtype.type(1), np.uint64(width)
    for u in range(count):
        scale = slopes[u] if sloping else one
        if scale != 0.0 or l2 != 0.0:
            p, at = np.uint64(base + (index[u] if indexed else u) * width), np.uint64(u * stride)
            for j in range(n):
                slope = scale * g[at + j] + l2 * w[p + j]
                total = a[p + j] + slope * slope
                a[p + j] = total
                w[p + j] -= rate * slope / np.sqrt(total)


@fast
def _move_adam(
    rate: Any, l2: Any, w: Any, a: Any, b: Any, c: Any, p: Any, n: int, c_at: Any, c_n: int, scale: Any, g: Any, at: Any
) -> None:
    p, at, c_at = np.uint64(p), np.uint64(at), np.uint64(c_at)  # no index counts from the end
    one, first, second = w.dtype.type(1), w.dtype.type(_FIRST), w.dtype.type(_SECOND)
    for j in range(np.uint64(n)):
        slope = scale * g[at + j] + l2 * w[p + j]
        a[p + j] += first * (slope - a[p + j])
        b[p + j] += second * (slope * slope - b[p + j])
    alike = True
    for j in range(np.uint64(c_n)):
        alike &= c[c_at + j] == c[c_at]
    for j in range(np.uint64(c_n)):
        c[c_at + j] += one
    if alike:  # but for units that were made anew all weights have taken as many steps
        _adam_step(rate, w, a, b, p, n, c[c_at])
        return
    for j in range(np.uint64(n)):
        _adam_step(rate, w, a, b, p + j, 1, c[c_at + j])


@exact
def _adam_step(rate: Any, w: Any, a: Any, b: Any, p: Any, n: int, steps: Any) -> None:
    p = np.uint64(p)  # no index counts from the end
    one = w.dtype.type(1)
    unbias1 = w.dtype.type(-math.expm1(steps * _LOG1))
    unbias2 = w.dtype.type(-math.expm1(steps * _LOG2))
    epsilon = w.dtype.type(_EPSILON)
    by1, by2 = rate / unbias1, one / unbias2
    for j in range(np.uint64(n)):
        w[p + j] -= by1 * a[p + j] / (np.sqrt(b[p + j] * by2) + epsilon)


@exact
def _move_ftrl(rates: Any, w: Any, z: Any, n2: Any, p: Any, n: int, scale: Any, g: Any, at: Any) -> None:
    p, at = np.uint64(p), np.uint64(at)  # no index counts from the end
    rate, l1, l2 = rates[0], rates[1], rates[2]
    beta = w.dtype.type(_BETA)
    for j in range(np.uint64(n)):
        slope = scale * g[at + j]
        total = n2[p + j] + slope * slope
        root = np.sqrt(total)
        z[p + j] += slope - (root - np.sqrt(n2[p + j])) / rate * w[p + j]
        n2[p + j] = total
        shrunk = z[p + j] - min(max(z[p + j], -l1), l1)
        w[p + j] = -shrunk / ((beta + root) / rate + l2)


@exact
def sigmoid(z: Any) -> Any:
    return 1.0 / (1.0 + math.exp(-z)) if z > -700.0 else 0.0


@exact
def cross_entropy(z: Any, y: Any, d: Any) -> Any:
    """Of logits (C,) and a class; its gradient goes to d (C,)."""
    highest = z[0]
    for k in range(1, len(z)):
        highest = max(highest, z[k])
    total = 0.0
    for k in range(len(z)):
        power = math.exp(z[k] - highest)
        d[k] = power
        total += power
    for k in range(len(z)):
        d[k] /= total
    label = int(y)
    loss = math.log(total) + highest - z[label]
    d[label] -= 1.0
    return loss


@exact
def binary_loss(z: Any, y: float) -> Any:
    """(loss, gradient) of one logit."""
    p = sigmoid(z)
    return max(z, 0.0) - z * y + math.log1p(math.exp(-abs(z))), p - y


@exact
def self_corrected(loss: float, slope: float, z: float, y: float, served: float, alpha: float) -> Any:
    """(loss, gradient) of `reloop.self_corrected`."""
    p = sigmoid(z)
    lost, gained = served - p, p - served
    worse = (y * lost if lost > NOISE else 0.0) + ((1.0 - y) * gained if gained > NOISE else 0.0)
    turn = (1.0 - y if gained > NOISE else 0.0) - (y if lost > NOISE else 0.0)
    return (1.0 - alpha) * loss + alpha * worse, (1.0 - alpha) * slope + alpha * turn * p * (1.0 - p)
