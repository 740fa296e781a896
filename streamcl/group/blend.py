"""How what several ranks have made of the same weights becomes one: pure functions of values and optimiser slots.

All start a round from the same weight w0, and rank k ends it at w_k after n_k steps on it. The merged weight is
w0 + sum of n_k (w_k - w0) / sum of n_k: the mean over the ranks that have touched it, by steps. So a rank that has not
touched a weight says nothing of it, and of a row that one rank has read a hundred times and another once the first says
what it is. A weight that one rank alone has moved becomes what that rank made of it, bit for bit, its slots too.

| optimiser | slots |
|---|---|
| `sgd` | none |
| `adagrad` | the mean of the accumulators, by steps |
| `adam` | means of both moments, by steps; of the step counts the highest |
| `ftrl` | n: the mean by steps; z: what gives the mean weight under it, and of a weight of 0 their mean within l1 |

Adding up moves and accumulators instead, as if one learner had taken all steps, was worse but in short rounds; see "A
group's merge" in DECISIONS.md.

Sums run in the order of ranks, by additions, products, quotients and roots alone, which IEEE 754 rounds alike on every
machine: every rank merges for itself and comes to the same bits.

Source:
    Local SGD: Stich 2019, arXiv 1805.09767; federated averaging: McMahan et al. 2017, arXiv 1602.05629, algorithm 1.

Differs from the source:
    Weighed by steps on each row instead of examples on the client, and the optimiser's slots are averaged too, where
    the sources' clients have none, or begin each round with fresh ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streamcl.engine.optimizers import FTRL, Adam, Slots, Update


class Share(NamedTuple):
    """What one rank has made of some of n weights or rows.

    Shape:
        at (m,) int64, each once; value (m, ...); each slot (m, ...); steps (m,): taken on each, above 0.
    """

    at: Tensor
    value: Tensor
    slots: Slots
    steps: Tensor


def blend(update: Update, value: Tensor, slots: Sequence[Tensor], shares: Sequence[Share]) -> tuple[Tensor, Slots]:
    """The new value and slots of n weights or rows: `value` (n, ...) and `slots` are those of the round's start."""
    new = mean(value, shares)
    held = [mean(slot, [each._replace(value=each.slots[i]) for each in shares]) for i, slot in enumerate(slots)]
    if isinstance(update, Adam):
        held[2] = slots[2].clone()
        for share in shares:
            held[2][share.at] = torch.maximum(held[2][share.at], share.slots[2])
    if isinstance(update, FTRL):
        z, _ = update.moved(new, held)
        held[0] = torch.where(new == 0.0, held[0].clamp(-update.l1, update.l1), z)
    alone(shares, (new, *held))
    return new, tuple(held)


def mean(value: Tensor, shares: Sequence[Share]) -> Tensor:
    """(n, ...) by steps; what nobody has touched stays."""
    total, moved = value.new_zeros(len(value)), torch.zeros_like(value)
    for share in shares:
        steps = share.steps.to(value)
        total[share.at] += steps
        moved[share.at] += over(steps, value) * (share.value - value[share.at])
    return value + moved / over(total.clamp_min(1.0), value)


def alone(shares: Sequence[Share], columns: Sequence[Tensor]) -> None:
    """What one rank alone has touched is that rank's, to the bit; value and slots (n, ...) are changed in place."""
    many = torch.zeros(len(columns[0]), dtype=torch.int64)
    for share in shares:
        many[share.at] += 1
    for share in shares:
        only = many[share.at] == 1
        for column, given in zip(columns, (share.value, *share.slots), strict=True):
            column[share.at[only]] = given[only]


def over(column: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, ...), to go along with (n, ...)."""
    return column.view(-1, *(1,) * (like.dim() - 1))
