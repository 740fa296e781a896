"""The compiled loop of the fused engine: predictions and learning steps in the order of the stream, one at a time.

What is computed is what `engine.eager` and `Learner.learn` compute, for a model whose arithmetic is known here; see
`fused` for what that covers. Everything it changes lies in arrays that the learner owns; see `layout` for their shapes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import entry, exact, exact_inlined, fast_inlined
from streamcl.engine.averages import average_says, bring_up, chosen, follow, judge
from streamcl.engine.kernels import add_scaled, binary_loss, cross_entropy, foresee, put, self_corrected, sigmoid
from streamcl.engine.layout import (
    ANSWER,
    BINARY,
    DONE,
    DUE,
    FNC,
    FNW,
    MULTICLASS,
    REFUSE,
    REFUSED,
    REGRESSION,
    Average,
    Chunk,
    Found,
    Net,
    Norms,
    Plan,
    Renewal,
    Rows,
    Scratch,
    Serving,
    Watch,
)
from streamcl.engine.passes import (
    backward,
    dense_gradients,
    deviation,
    forward,
    gather,
    of_layer,
    row_gradients,
    standardised,
    update,
)
from streamcl.engine.table_rows import admit, complete, retract

LARGEST_ODDS = 1.0 - 1e-6
GOLDEN, MIX1, MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


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
def observe(count: Any, mean: Any, m2: Any, scaled: Any, row: Any) -> None:
    """`RunningNorm.update`."""
    for i in range(len(count)):
        value = float(row[i])
        if scaled[i] and math.isfinite(value):
            delta = value - mean[i]
            count[i] += 1.0
            mean[i] += delta / max(count[i], 1.0)
            m2[i] += delta * (value - mean[i])


@exact_inlined
def _losses(count: int, served: float, plan: Any, s: Any) -> None:
    """dz (B, O): the gradient of the step's loss by z."""
    for b in range(count):
        share = s.share[b]
        if len(plan.class_weights):
            share *= plan.class_weights[int(s.y[b])]
        z, dz = s.z[b], s.dz[b]
        if plan.task == BINARY:
            logit = z[0] + plan.shift
            loss, slope = binary_loss(logit, s.y[b])
            if plan.alpha and b == 0:
                loss, slope = self_corrected(loss, slope, logit, s.y[b], served, plan.alpha)
            if plan.delayed == FNW:
                slope *= 1.0 + sigmoid(logit)
                slope *= sigmoid(-logit) if s.y[b] < 0.5 else 1.0
            dz[0] = slope
        elif plan.task == MULTICLASS:
            cross_entropy(z, s.y[b], dz)
        else:
            dz[0] = z[0] - s.y[b]
        for o in range(len(dz)):
            dz[o] *= share


@exact_inlined
def _touch(count: int, void: int, s: Any) -> int:
    """Which rows the step reads, each once, in `touched`, but for the one that stands for none; how many. `place` says
    where a slot's row stands there.
    """
    s.stamp[0] += 1
    stamp, buckets = s.stamp[0], len(s.stamps)
    found = 0
    for b in range(count):
        for slot in range(s.ids.shape[1]):
            row = s.ids[b, slot]
            if row == void:
                s.place[b, slot] = 0  # its weight is 0
                continue
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


@fast_inlined
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
        h = of_layer(s.acts, plan.layers, level, largest)
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


@fast_inlined
def _sample(norm: Any, plan: Any, watch: Any, s: Any) -> Any:
    """A learning step has been taken; whether a report is due."""
    watch.steps[0] += 1
    if watch.steps[0] % watch.every == 0:
        row = watch.ring[watch.steps[1] % len(watch.ring)]
        at = 0
        for level in range(len(plan.layers) - 1):
            h = of_layer(s.acts, plan.layers, level, len(s.x))[0]
            put(row[at:], h)
            at += len(h)
        row[at] = norm
        watch.steps[1] += 1
    return watch.steps[0] % watch.report == 0


@exact_inlined
def _label(y: float, plan: Any, norms: Any) -> Any:
    if plan.task != REGRESSION:
        return y
    return standardised(y, norms.y_count[0], norms.y_mean[0], norms.y_m2[0], 10.0)


@exact_inlined
def _answer(n: int, z: Any, plan: Any, norms: Any, found: Any) -> None:
    """Output z (O,) and served score of operation n, which is that of the output as it is handed out."""
    served = found.served[n]
    put(found.output[n], z)
    z = found.output[n]
    if plan.task == BINARY:
        served[0] = min(math.exp(min(z[0], 0.0)), LARGEST_ODDS) if plan.delayed == FNC else sigmoid(z[0])
    elif plan.task == REGRESSION:
        served[0] = norms.y_mean[0] + z[0] * deviation(norms.y_count[0], norms.y_m2[0])
    else:
        highest, total = z[0], 0.0
        for o in range(1, len(z)):
            highest = max(highest, z[o])
        for o in range(len(z)):
            total += math.exp(z[o] - highest)
        for o in range(len(z)):
            served[o] = math.exp(z[o] - highest) / total


@exact_inlined
def _step(
    n: int,
    count: int,
    passed: bool,
    served: float,
    net: Any,
    plan: Any,
    average: Any,
    found: Any,
    s: Any,
) -> tuple[bool, int]:
    """One update on the first `count` rows of the scratch, whose forward pass may be there already; (whether it could
    be, how many rows of the table moved).
    """
    if not passed:
        forward(count, net.flat, plan, s)
    _losses(count, served, plan, s)
    backward(count, net, plan, s)
    touched = _touch(count, net.tables.void, s)
    rows = float(row_gradients(count, touched, plan, s))
    dense = float(dense_gradients(count, plan, s))
    if not math.sqrt(rows + dense) <= plan.largest:
        return False, 0
    found.norm[n] = math.sqrt(dense)
    if average.on:
        bring_up(touched, s.touched, net.table, average)
    update(count, touched, net, plan, s)
    if average.on:
        follow(touched, s.touched, net.flat, net.table, average)
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
    average: Average,
    serving: Serving,
    watch: Watch,
    moved: Any,
    s: Scratch,
) -> tuple[int, int, int]:
    """Operations n, n + 1, ... of a chunk.

    Args:
        steps: Taken before; what draws are keyed by.
        moved: (k,) rows of the table that were changed, that came or that went; (0,) where nobody asks.

    Returns:
        The operation that is next, why it has ended, and how much of `moved` is filled.
    """
    logged, width = 0, len(norms.count)
    keep, said = s.keep, s.said
    kinds, all_ids, all_weights, all_dense, labels = chunk.kind, chunk.ids, chunk.weights, chunk.dense, chunk.label
    count_, mean, m2, y_count, y_mean, y_m2 = norms.count, norms.mean, norms.m2, norms.y_count, norms.y_mean, norms.y_m2
    rows_ids, rows_weights, rows_dense, rows_y = memory.ids, memory.weights, memory.dense, memory.y
    rows_share, share = memory.sample_weights, s.share
    held, slots, source, given, asked = chunk.held, chunk.slot, chunk.source, chunk.served, found.served
    weights_of = chunk.weight
    draw, key, regression, y, norm = plan.draw, plan.key, plan.task == REGRESSION, s.y, found.norm
    entered, hidden, drawn, scaled, every = found.entered, found.hidden, found.drawn, norms.scaled, watch.every
    levels, renewing, again, steady = len(plan.layers), renewal.on, chunk.again, True
    tables, times, (row_a, row_b, row_c) = net.tables, chunk.time, net.row_slots
    dynamic = len(tables.base) > 0
    sets, noted, before, known = serving.sets, found.noted, chunk.noted, chunk.known
    for i in range(width):
        steady = steady and not scaled[i]
    fresh = n  # the first operation whose pass is not in the scratch, though the one before it may have its features
    while n < len(kinds):
        ids, weights, dense = all_ids[n], all_weights[n], all_dense[n]
        if kinds[n] == REFUSE:
            return n + 1, REFUSED, logged
        if n + 1 < len(kinds) and not again[n + 1]:
            foresee(all_ids[n + 1], net.table.shape[1], net.rows, row_a, row_b, row_c)
        if kinds[n] == ANSWER:
            gather(0, ids, weights, dense, net, plan, norms, s)
            for k in range(len(sets)):
                if sets[k] == 1:
                    average_says(ids, weights, plan, net.table, average, s, noted[n, k])
                    gather(0, ids, weights, dense, net, plan, norms, s)
            forward(1, net.flat, plan, s)
            for k in range(len(sets)):
                if sets[k] == 0:
                    put(noted[n, k], s.z[0])
            if len(sets):
                put(said, noted[n, chosen(serving.losses)])
            else:
                put(said, s.z[0])
            _answer(n, said, plan, norms, found)
            if len(entered) and plan.dim:
                put(entered[n], s.x[0])
            if len(hidden) and levels:
                put(hidden[n], s.x[0] if levels == 1 else of_layer(s.acts, plan.layers, levels - 2, len(s.x))[0])
            n += 1
            fresh = n + 1
            continue
        # What was just answered is learned from: the pass is the same, as long as nothing has moved in between.
        passed = steady and n < fresh and again[n] and not (held[n] and draw)
        put(keep[0], count_)
        put(keep[1], mean)
        put(keep[2], m2)
        keep[0, width], keep[1, width], keep[2, width] = y_count[0], y_mean[0], y_m2[0]
        observe(count_, mean, m2, scaled, dense)
        if regression:
            observe(y_count, y_mean, y_m2, plan.label_scaled, labels[n : n + 1])
        made = 0
        if dynamic:
            made = admit(ids, weights, times[n], tables, net.table, row_a)
            passed = passed and made == 0
        served = given[n] if source[n] < 0 else float(asked[source[n], 0])
        y[0], share[0], count = _label(labels[n], plan, norms), weights_of[n], 1
        for i in range(draw if held[n] else 0):
            row = below(held[n], key, steps, i)
            if len(drawn):
                drawn[n, i] = row
            gather(count, rows_ids[row], rows_weights[row], rows_dense[row], net, plan, norms, s)
            y[count], share[count] = _label(rows_y[row], plan, norms), plan.share * rows_share[row]
            count += 1
        while True:
            if not passed:
                gather(0, ids, weights, dense, net, plan, norms, s)
            taken, touched = _step(n, count, passed, served, net, plan, average, found, s)
            if taken or count == 1:
                break
            count = 1  # is it the event, or what is replayed?
        n += 1
        if not taken:
            put(count_, keep[0, :width])
            put(mean, keep[1, :width])
            put(m2, keep[2, :width])
            y_count[0], y_mean[0], y_m2[0] = keep[0, width], keep[1, width], keep[2, width]
            if dynamic:
                retract(made, tables, net.table, row_a, row_b, row_c)
            return n, REFUSED, logged
        steps += 1
        if len(sets) and source[n - 1] >= 0:
            judge(noted[source[n - 1]], y[0], plan, serving, s)
        elif len(sets) and known[n - 1]:
            judge(before[n - 1], y[0], plan, serving, s)
        if len(moved):
            put(moved[logged:], s.touched[:touched])
            logged += touched
        if dynamic:
            rest = tables, net.table, row_a, row_b, row_c
            logged = complete(made, ids, weights, times[n - 1], *rest, moved, logged)
        due = _renew(count, plan, renewal, s) if renewing else False
        if every and _sample(norm[n - 1], plan, watch, s):
            due = True
        slot = slots[n - 1]
        if slot >= 0:
            put(rows_ids[slot], ids)
            put(rows_weights[slot], weights)
            put(rows_dense[slot], dense)
            rows_y[slot], rows_share[slot] = labels[n - 1], weights_of[n - 1]
        if due:
            return n, DUE, logged
    return n, DONE, logged
