"""What the steps of a chunk will read, gathered ahead of them: it hangs on the stream and on draws, never on weights.

So a device is sent all of it at once, and is asked nothing until the chunk is done. Which rows are replayed, what they
hold (though it be an event of this very chunk), and numbers standardised by what is known at each step: as
`engine.scan` finds them, one after the other, and to the bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamcl.compiled import entry, exact, exact_inlined
from streamcl.engine.layout import ANSWER, Chunk, Norms, Rows
from streamcl.engine.passes import standardised
from streamcl.engine.scan import below, observe

Arrays = NDArray[Any]


class Ahead(NamedTuple):
    """n operations of up to B rows, the live one first; T = B x S.

    The rows of the table that a step touches come once each, ascending; behind them the first comes again and again.
    """

    kind: Arrays  # (n,) ANSWER or LEARN
    ids: Arrays  # (n, B, S)
    weights: Arrays  # (n, B, S) float32
    numbers: Arrays  # (n, B, N) float32
    y: Arrays  # (n, B) float32
    share: Arrays  # (n, B)
    touched: Arrays  # (n, T)
    distinct: Arrays  # (n,) of them
    place: Arrays  # (n, T) of a slot's row among the touched
    order: Arrays  # (n, T) slots, those of the first touched row first
    starts: Arrays  # (n, T + 1) where in `order` those of each touched row begin
    drawn: Arrays  # (n, B - 1) places in memory
    before: Arrays  # (n, 3, N + 1) running count, mean, m2 of the numerics and of the label


def empty(n: int, rows: int, slots: int, numbers: int) -> Ahead:
    """Room for n operations."""
    cells = rows * slots
    return Ahead(
        kind=np.zeros(n, np.int32),
        ids=np.zeros((n, rows, slots), np.int64),
        weights=np.zeros((n, rows, slots), np.float32),
        numbers=np.zeros((n, rows, numbers), np.float32),
        y=np.zeros((n, rows), np.float32),
        share=np.zeros((n, rows)),
        touched=np.zeros((n, cells), np.int64),
        distinct=np.zeros(n, np.int32),
        place=np.zeros((n, cells), np.int64),
        order=np.zeros((n, cells), np.int32),
        starts=np.zeros((n, cells + 1), np.int32),
        drawn=np.zeros((n, rows - 1), np.int64),
        before=np.zeros((n, 3, numbers + 1)),
    )


@exact
def _row(ids: Any, weights: Any, dense: Any, norms: Any, a: Any, at: int, b: int) -> None:
    for s in range(len(ids)):
        a.ids[at, b, s] = ids[s]
        a.weights[at, b, s] = weights[s]
    for i in range(len(dense)):
        a.numbers[at, b, i] = standardised(dense[i], norms.count[i], norms.mean[i], norms.m2[i], norms.clip[i])


@exact_inlined
def _target(y: float, regression: bool, norms: Any) -> Any:
    return standardised(y, norms.y_count[0], norms.y_mean[0], norms.y_m2[0], 10.0) if regression else y


@exact
def _sift(at: int, a: Any) -> None:
    """Sort the slots of a step by their rows, those of one row in their order; each row once."""
    rows, slots = a.ids.shape[1], a.ids.shape[2]
    order, ids, n = a.order[at], a.ids[at], rows * slots
    for k in range(n):
        order[k] = k
    width = 1
    spare = a.place[at]  # until it is filled
    while width < n:  # a merge sort, from short runs to long ones
        start = 0
        while start < n:
            middle, end = min(start + width, n), min(start + 2 * width, n)
            i, j, k = start, middle, start
            while k < end:
                left = i < middle
                if left and j < end:
                    p, q = order[i], order[j]
                    left = ids[p // slots, p % slots] <= ids[q // slots, q % slots]
                spare[k] = order[i] if left else order[j]
                i += left
                j += not left
                k += 1
            start = end
        for k in range(n):
            order[k] = spare[k]
        width *= 2
    found = 0
    for k in range(n):
        p = order[k]
        id = ids[p // slots, p % slots]
        if k == 0 or a.touched[at, found - 1] != id:
            a.touched[at, found] = id
            a.starts[at, found] = k
            found += 1
        a.place[at, p] = found - 1
    a.distinct[at] = found
    for k in range(found, n + 1):
        a.starts[at, k] = n
        if k < n:
            a.touched[at, k] = a.touched[at, 0]


@entry
def gather(
    first: int,
    stop: int,
    steps: int,
    key: Any,
    share: float,
    regression: bool,
    label_scaled: Any,
    chunk: Chunk,
    norms: Norms,
    memory: Rows,
    writer: Any,
    a: Ahead,
) -> None:
    """Operations first, ..., stop - 1 of a chunk into places 0, ... of `a`; moves the running means.

    Args:
        steps: Taken before; what draws are keyed by.
        share: Weight of each replayed row's loss, times its sample weight.
        writer: (capacity,) which operation of the chunk has written a place of the memory; -1: none, it is as it was.
    """
    draw, width, at = a.drawn.shape[1], len(norms.count), 0
    for n in range(first, stop):
        at = n - first
        before = a.before[at]
        a.kind[at] = chunk.kind[n]
        for i in range(width):
            before[0, i], before[1, i], before[2, i] = norms.count[i], norms.mean[i], norms.m2[i]
        before[0, width], before[1, width], before[2, width] = norms.y_count[0], norms.y_mean[0], norms.y_m2[0]
        if chunk.kind[n] == ANSWER:
            _row(chunk.ids[n], chunk.weights[n], chunk.dense[n], norms, a, at, 0)
            continue
        observe(norms.count, norms.mean, norms.m2, norms.scaled, chunk.dense[n])
        if regression:
            observe(norms.y_count, norms.y_mean, norms.y_m2, label_scaled, chunk.label[n : n + 1])
        _row(chunk.ids[n], chunk.weights[n], chunk.dense[n], norms, a, at, 0)
        a.y[at, 0], a.share[at, 0] = _target(chunk.label[n], regression, norms), chunk.weight[n]
        for i in range(draw):
            place = below(chunk.held[n], key, steps, i)
            a.drawn[at, i] = place
            j = writer[place]
            if j >= 0:
                _row(chunk.ids[j], chunk.weights[j], chunk.dense[j], norms, a, at, 1 + i)
                a.y[at, 1 + i], a.share[at, 1 + i] = _target(chunk.label[j], regression, norms), share * chunk.weight[j]
            else:
                _row(memory.ids[place], memory.weights[place], memory.dense[place], norms, a, at, 1 + i)
                a.y[at, 1 + i] = _target(memory.y[place], regression, norms)
                a.share[at, 1 + i] = share * memory.sample_weights[place]
        _sift(at, a)
        if chunk.slot[n] >= 0:
            writer[chunk.slot[n]] = n
        steps += 1


@entry
def write(first: int, done: int, stop: int, chunk: Chunk, memory: Rows, writer: Any) -> None:
    """Operations first, ..., done - 1 have been done: keep their rows; and let nobody have written any more."""
    for n in range(first, stop):
        place = chunk.slot[n]
        if chunk.kind[n] == ANSWER or place < 0:
            continue
        writer[place] = -1
        if n < done:
            for s in range(chunk.ids.shape[1]):
                memory.ids[place, s] = chunk.ids[n, s]
                memory.weights[place, s] = chunk.weights[n, s]
            for i in range(chunk.dense.shape[1]):
                memory.dense[place, i] = chunk.dense[n, i]
            memory.y[place], memory.sample_weights[place] = chunk.label[n], chunk.weight[n]
