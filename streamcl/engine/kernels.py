"""The compiled arithmetic of the fused engine: dense layers, losses, and the optimisers' updates of one row.

All loops run over the last axis, which is contiguous, so that the compiler makes vector code of them. What `fast` does
to sums and roots is right to a few units of the last place in float32, to rounding in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import exact, fast
from streamcl.engine.optimizers import FTRL, Adagrad, Adam

SGD_KIND, ADAGRAD_KIND, ADAM_KIND, FTRL_KIND = range(4)
KINDS = {"sgd": SGD_KIND, "adagrad": ADAGRAD_KIND, "adam": ADAM_KIND, "ftrl": FTRL_KIND}

_LOG1, _LOG2 = math.log(Adam.BETA1), math.log(Adam.BETA2)
_FIRST, _SECOND = 1.0 - Adam.BETA1, 1.0 - Adam.BETA2
_EPSILON, _BETA = Adam.EPSILON, FTRL.BETA
assert Adagrad.INITIAL > 0.0  # noqa: S101 - `move` divides by a root of it without asking


@fast
def affine(w: Any, bias: Any, x: Any, count: int, y: Any) -> None:
    """y (B, O) = x (B, I) w^T + bias; w (O, I), the first `count` rows. Four rows by two units share what they load."""
    units, width = w.shape
    zero = w.dtype.type(0)
    b = 0
    while b + 4 <= count:
        x0, x1, x2, x3 = x[b], x[b + 1], x[b + 2], x[b + 3]
        i = 0
        while i + 2 <= units:
            p, q = w[i], w[i + 1]
            a0 = a1 = a2 = a3 = zero
            c0 = c1 = c2 = c3 = zero
            for j in range(width):
                a0 += p[j] * x0[j]
                a1 += p[j] * x1[j]
                a2 += p[j] * x2[j]
                a3 += p[j] * x3[j]
                c0 += q[j] * x0[j]
                c1 += q[j] * x1[j]
                c2 += q[j] * x2[j]
                c3 += q[j] * x3[j]
            y[b, i], y[b + 1, i], y[b + 2, i], y[b + 3, i] = a0 + bias[i], a1 + bias[i], a2 + bias[i], a3 + bias[i]
            i += 1
            y[b, i], y[b + 1, i], y[b + 2, i], y[b + 3, i] = c0 + bias[i], c1 + bias[i], c2 + bias[i], c3 + bias[i]
            i += 1
        while i < units:
            for r in range(4):
                y[b + r, i] = dot(w[i], x[b + r]) + bias[i]
            i += 1
        b += 4
    while b < count:
        affine_one(w, bias, x[b], y[b])
        b += 1


@fast
def affine_one(w: Any, bias: Any, x: Any, y: Any) -> None:
    """y (O,) = w (O, I) x (I,) + bias. Four units share what they load."""
    units, width = w.shape
    zero = w.dtype.type(0)
    i = 0
    while i + 4 <= units:
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        a0 = a1 = a2 = a3 = zero
        for j in range(width):
            a0 += w0[j] * x[j]
            a1 += w1[j] * x[j]
            a2 += w2[j] * x[j]
            a3 += w3[j] * x[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = a0 + bias[i], a1 + bias[i + 1], a2 + bias[i + 2], a3 + bias[i + 3]
        i += 4
    while i < units:
        y[i] = dot(w[i], x) + bias[i]
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
def pull_back(w: Any, d: Any, units: Any, out: Any) -> None:
    """out (I,) = w^T (I, O) d (O,). A unit whose gradient is 0 costs nothing: behind a ReLU half of them."""
    width = w.shape[1]
    m = 0
    for i in range(len(w)):
        if d[i] != 0.0:
            units[m] = i
            m += 1
    out[:] = 0.0
    k = 0
    while k + 8 <= m:
        d0, d1, d2, d3 = d[units[k]], d[units[k + 1]], d[units[k + 2]], d[units[k + 3]]
        d4, d5, d6, d7 = d[units[k + 4]], d[units[k + 5]], d[units[k + 6]], d[units[k + 7]]
        w0, w1, w2, w3 = w[units[k]], w[units[k + 1]], w[units[k + 2]], w[units[k + 3]]
        w4, w5, w6, w7 = w[units[k + 4]], w[units[k + 5]], w[units[k + 6]], w[units[k + 7]]
        for j in range(width):
            out[j] += (
                d0 * w0[j] + d1 * w1[j] + d2 * w2[j] + d3 * w3[j] + d4 * w4[j] + d5 * w5[j] + d6 * w6[j] + d7 * w7[j]
            )
        k += 8
    while k < m:
        add_scaled(out, d[units[k]], w[units[k]])
        k += 1


@fast
def outer(d: Any, x: Any, count: int, rows: Any, g: Any) -> None:
    """g (O, I) = sum over the first `count` of d (B, O) and x (B, I)."""
    units, width = g.shape
    zero = g.dtype.type(0)
    for i in range(units):
        m = 0
        for b in range(count):
            if d[b, i] != 0.0:
                rows[m] = b
                m += 1
        out = g[i]
        if m == 0:
            out[:] = 0.0
            continue
        for k in range(m, m + 3):
            rows[k] = rows[0]
        k = 0
        while k < m:
            d0 = d[rows[k], i]
            d1 = d[rows[k + 1], i] if k + 1 < m else zero
            d2 = d[rows[k + 2], i] if k + 2 < m else zero
            d3 = d[rows[k + 3], i] if k + 3 < m else zero
            x0, x1, x2, x3 = x[rows[k]], x[rows[k + 1]], x[rows[k + 2]], x[rows[k + 3]]
            if k == 0:
                for j in range(width):
                    out[j] = d0 * x0[j] + d1 * x1[j] + d2 * x2[j] + d3 * x3[j]
            else:
                for j in range(width):
                    out[j] += d0 * x0[j] + d1 * x1[j] + d2 * x2[j] + d3 * x3[j]
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
        for u in range(count):
            scale = slopes[u] if sloping else one
            if scale != 0.0 or l2 != 0.0:
                p = base + (index[u] if indexed else u) * width
                _move_sgd(rate, l2, w, p, width, scale, g, u * stride)
    elif kind == ADAGRAD_KIND:
        for u in range(count):
            scale = slopes[u] if sloping else one
            if scale != 0.0 or l2 != 0.0:
                p = base + (index[u] if indexed else u) * width
                _move_adagrad(rate, l2, w, a, p, width, scale, g, u * stride)
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
def _move_sgd(rate: Any, l2: Any, w: Any, p: Any, n: int, scale: Any, g: Any, at: Any) -> None:
    p, at = np.uint64(p), np.uint64(at)  # no index counts from the end
    for j in range(np.uint64(n)):
        w[p + j] -= rate * (scale * g[at + j] + l2 * w[p + j])


@fast
def _move_adagrad(rate: Any, l2: Any, w: Any, a: Any, p: Any, n: int, scale: Any, g: Any, at: Any) -> None:
    p, at = np.uint64(p), np.uint64(at)  # no index counts from the end
    for j in range(np.uint64(n)):
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
        total += math.exp(z[k] - highest)
    for k in range(len(z)):
        d[k] = math.exp(z[k] - highest) / total
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
    """(loss, gradient) of `eager.self_corrected`."""
    p = sigmoid(z)
    worse = y * max(served - p, 0.0) + (1.0 - y) * max(p - served, 0.0)
    turn = (1.0 - y if p >= served else 0.0) - (y if served >= p else 0.0)
    return (1.0 - alpha) * loss + alpha * worse, (1.0 - alpha) * slope + alpha * turn * p * (1.0 - p)
