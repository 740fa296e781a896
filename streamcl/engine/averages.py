"""An average of the weights beside the live ones, in the compiled loop: `weights.Average`, and the plug-in `served`."""

from __future__ import annotations

from typing import Any

from streamcl.compiled import exact, exact_inlined, fast_inlined
from streamcl.engine.kernels import binary_loss, cross_entropy, put
from streamcl.engine.layout import BINARY, MULTICLASS
from streamcl.engine.passes import forward


@fast_inlined
def average_says(ids: Any, weights: Any, plan: Any, table: Any, average: Any, s: Any, out: Any) -> None:
    """What the average makes of the features that have been gathered goes to out (O,); x and z are its own then."""
    x, z, dim, first, slot_field = s.x[0], s.z[0], plan.dim, plan.first, plan.slot_field
    own, at, step, decay = average.table, average.at, average.step[0], average.decay
    x[: plan.fields * dim] = 0.0
    z[:] = 0.0
    for slot in range(len(ids)):
        weight, id = weights[slot], ids[slot]
        if weight != 0.0:
            kept = x.dtype.type(decay ** (step - at[id]))
            for o in range(first):
                z[o] += weight * (table[id, o] + kept * (own[id, o] - table[id, o]))
            start = slot_field[slot] * dim
            for j in range(dim):
                x[start + j] += weight * (table[id, first + j] + kept * (own[id, first + j] - table[id, first + j]))
    forward(1, average.flat, plan, s)
    put(out, z)


@fast_inlined
def bring_up(touched: int, rows: Any, table: Any, average: Any) -> None:
    """These rows are about to change."""
    own, at, step, decay = average.table, average.at, average.step[0], average.decay
    for u in range(touched):
        row = rows[u]
        kept = own.dtype.type(decay ** (step - at[row]))
        for j in range(own.shape[1]):
            own[row, j] = table[row, j] + kept * (own[row, j] - table[row, j])
        at[row] = step


@fast_inlined
def follow(touched: int, rows: Any, flat: Any, table: Any, average: Any) -> None:
    """A step has been taken."""
    average.step[0] += 1
    own, at, step, mine = average.table, average.at, average.step[0], average.flat
    moved = mine.dtype.type(1.0 - average.decay)
    for j in range(len(mine)):
        mine[j] += moved * (flat[j] - mine[j])
    for u in range(touched):
        row = rows[u]
        for j in range(own.shape[1]):
            own[row, j] += moved * (table[row, j] - own[row, j])
        at[row] = step


@exact_inlined
def judge(noted: Any, y: float, plan: Any, serving: Any, s: Any) -> None:
    """The label of what each set said, noted (K, O), has come; y as the loss takes it."""
    losses, spare = serving.losses, s.dz[0]
    for k in range(len(losses)):
        z = noted[k]
        if plan.task == BINARY:
            loss = binary_loss(z[0], y)[0]
        elif plan.task == MULTICLASS:
            loss = cross_entropy(z, y, spare)
        else:
            loss = 0.5 * (z[0] - y) ** 2
        losses[k] = losses[k] * serving.keep + loss


@exact
def chosen(losses: Any) -> int:
    """The set of the lowest recent loss; of equal ones the first."""
    best = 0
    for k in range(1, len(losses)):
        if losses[k] < losses[best]:
            best = k
    return best
