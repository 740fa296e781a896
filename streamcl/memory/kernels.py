"""The compiled inner loops of the error memory: each takes a batch of queries, one query at a time, in order.

One and the same loop serves one query and many, so that a batch changes no bit of a result. `reassoc` lets the
compiler add up a dot product in vector lanes: the order is fixed by the machine code, not by the data.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import compiler

_fast = compiler(fastmath={"reassoc", "contract", "nsz"})


@_fast
def read_rows(
    queries: Any, centre: Any, rows: Any, values: Any, size: int, head: int, k: int, tau: float, fade: float, out: Any
) -> None:
    """Softmax-weighted means of the values of the k rows that are most similar by cosine.

    queries (B, d) raw; rows (M, d) of unit length, `size` of them in use; values (M, V); `head` where the next row
    goes; `fade` is ln 2 / half-life, 0 for none. out (B, 1 + V): how many rows entered, and the means.
    """
    d, width = rows.shape[1], values.shape[1]
    similarity = np.empty(size, np.float32)
    query = np.empty(d, np.float32)
    best, which = np.empty(k, np.float32), np.empty(k, np.int64)  # a heap: the least similar of the best on top
    for b in range(len(queries)):
        out[b] = 0.0
        norm = np.float32(0.0)
        for j in range(d):
            query[j] = queries[b, j] - centre[j]
            norm += query[j] * query[j]
        if not (norm > 0.0 and norm < np.inf):
            continue
        scale = np.float32(1.0) / np.sqrt(norm)
        for i in range(size):
            total = np.float32(0.0)
            for j in range(d):
                total += rows[i, j] * query[j]
            similarity[i] = total * scale
        found = 0
        for i in range(size):
            value = similarity[i]
            if found < k:
                place, found = found, found + 1
                while place > 0 and best[(place - 1) >> 1] > value:
                    best[place], which[place] = best[(place - 1) >> 1], which[(place - 1) >> 1]
                    place = (place - 1) >> 1
                best[place], which[place] = value, i
            elif value > best[0]:
                place = 0
                while True:
                    child = 2 * place + 1
                    if child >= found:
                        break
                    if child + 1 < found and best[child + 1] < best[child]:
                        child += 1
                    if best[child] >= value:
                        break
                    best[place], which[place] = best[child], which[child]
                    place = child
                best[place], which[place] = value, i
        weights = 0.0
        for n in range(found):
            age = (head - 1 - which[n]) % size
            weight = math.exp((float(best[n]) - 1.0) / tau - fade * age)
            weights += weight
            for v in range(width):
                out[b, 1 + v] += weight * values[which[n], v]
        for v in range(width):
            out[b, 1 + v] /= max(weights, 1e-300)
        out[b, 0] = found


@_fast
def buckets(key: Any, centre: Any, planes: Any, out: Any) -> bool:
    """SimHash: the bucket of a key in each of K arrays; planes (K, L, d), out (K,). False: the key has no direction."""
    arrays, bits, d = planes.shape
    moved = np.empty(d, np.float32)
    norm = np.float32(0.0)
    for j in range(d):
        moved[j] = key[j] - centre[j]
        norm += moved[j] * moved[j]
    if not (norm > 0.0 and norm < np.inf):
        return False
    for a in range(arrays):
        code = 0
        for bit in range(bits):
            total = np.float32(0.0)
            for j in range(d):
                total += planes[a, bit, j] * moved[j]
            if total > 0.0:
                code |= 1 << bit
        out[a] = code
    return True


@_fast
def read_sketch(
    queries: Any,
    centre: Any,
    planes: Any,
    sums: Any,
    touched: Any,
    writes: int,
    since: int,
    fade: float,
    least: float,
    out: Any,
) -> None:
    """Pooled means over a query's buckets. sums (K, 2^L, 1 + V), touched (K, 2^L), out (B, 1 + V).

    A bucket touched at `since` or before reads as empty; one with a count below `least` is left out. The support is
    the mean count of those that entered.
    """
    arrays, width = len(planes), sums.shape[2]
    codes = np.empty(arrays, np.int64)
    for b in range(len(queries)):
        out[b] = 0.0
        if not buckets(queries[b], centre, planes, codes):
            continue
        entered = 0
        for a in range(arrays):
            last = touched[a, codes[a]]
            if last <= since:
                continue
            factor = math.exp(-fade * (writes - last))
            if sums[a, codes[a], 0] * factor < least:
                continue
            entered += 1
            for v in range(width):
                out[b, v] += factor * sums[a, codes[a], v]
        if entered and out[b, 0] > 0.0:
            for v in range(1, width):
                out[b, v] /= out[b, 0]
            out[b, 0] /= entered


@_fast
def write_sketch(
    key: Any, centre: Any, planes: Any, sums: Any, touched: Any, writes: int, since: int, fade: float, values: Any
) -> bool:
    """Add (1, values) to the key's buckets, after what they hold has decayed. `writes` counts this one already."""
    codes = np.empty(len(planes), np.int64)
    if not buckets(key, centre, planes, codes):
        return False
    for a in range(len(planes)):
        last = touched[a, codes[a]]
        factor = 0.0 if last <= since else math.exp(-fade * (writes - last))
        sums[a, codes[a], 0] = sums[a, codes[a], 0] * factor + 1.0
        for v in range(len(values)):
            sums[a, codes[a], 1 + v] = sums[a, codes[a], 1 + v] * factor + values[v]
        touched[a, codes[a]] = writes
    return True


@compiler()
def put_right(
    given: float, label_mean: float, given_mean: float, gamma: float, strength: float, low: float, high: float
) -> float:
    """One number of `compensation.compensated`, bit for bit."""
    score = given + strength * (gamma * (label_mean - given) + (1.0 - gamma) * (label_mean - given_mean))
    return min(max(score, low), high)


@compiler()
def follow_losses(scores: Any, pairs: Any, label: float, binary: bool, least: float, rate: float, losses: Any) -> None:
    """Move each pair's running loss (n,) by what it would have lost, where one number is served.

    scores: given, label mean, given mean; NaN for the means where nothing was found. pairs (n, 2): gamma, lambda.
    """
    given, label_mean, given_mean = scores
    low, high = (least, 1.0 - least) if binary else (-np.inf, np.inf)
    for n in range(len(pairs)):
        score = given
        if not np.isnan(label_mean):
            score = put_right(given, label_mean, given_mean, pairs[n, 0], pairs[n, 1], low, high)
        loss = -math.log(max(score if label > 0.5 else 1.0 - score, least)) if binary else (score - label) ** 2
        losses[n] += rate * (loss - losses[n])
