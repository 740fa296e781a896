"""Optimisers as pure functions of (value, gradient, slots), for dense weights and for a table's touched rows alike.

torch.optim holds one step count per tensor and walks whole tensors; here every row has its own slots, so an update
costs O(rows touched), and a row that is dropped or reset leaves nothing behind.

Shape:
    `slots(value)` gives tensors whose first axis is the value's; `step(value, gradient, slots)` gives the new value
    and the new slots, same shapes, and changes nothing in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from streamcl.stations import Optimizer

Slots = tuple[Tensor, ...]


class Update(Protocol):
    def slots(self, value: Tensor, /) -> Slots: ...

    def step(self, value: Tensor, gradient: Tensor, slots: Sequence[Tensor], /) -> tuple[Tensor, Slots]: ...

    def moved(self, value: Tensor, slots: Sequence[Tensor], /) -> Slots:
        """The slots, once something else than a step has given a weight this value."""
        ...


class SGD:
    """w <- w - lr * g."""

    def __init__(self, config: Optimizer, rate: float) -> None:
        self.rate, self.l2 = rate, config.l2

    def slots(self, _value: Tensor) -> Slots:
        return ()

    def step(self, value: Tensor, gradient: Tensor, _slots: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        return value - self.rate * (gradient + self.l2 * value if self.l2 else gradient), ()

    def moved(self, _value: Tensor, slots: Sequence[Tensor]) -> Slots:
        return tuple(slots)


class Adagrad:
    """Per-coordinate rates that fall with the squared gradients seen.

    Source:
        Duchi et al. 2011, section 1.1, diagonal form.

    Differs from the source:
        The accumulator starts at `INITIAL`, which keeps the first steps from having length lr whatever the gradient.
    """

    INITIAL = 0.1

    def __init__(self, config: Optimizer, rate: float) -> None:
        self.rate, self.l2 = rate, config.l2

    def slots(self, value: Tensor) -> Slots:
        return (torch.full_like(value, self.INITIAL),)

    def step(self, value: Tensor, gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        if self.l2:
            gradient = gradient + self.l2 * value
        total = torch.addcmul(slots[0], gradient, gradient)
        return torch.addcdiv(value, gradient, total.sqrt(), value=-self.rate), (total,)

    def moved(self, _value: Tensor, slots: Sequence[Tensor]) -> Slots:
        return tuple(slots)


class Adam:
    """Momentum and scale per coordinate; a row counts its own steps, so a rare one is bias-corrected as rare.

    Source:
        Kingma & Ba 2015, algorithm 1.

    Differs from the source:
        Rows that an example doesn't touch keep their moments (lazy Adam).
    """

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

    def __init__(self, config: Optimizer, rate: float) -> None:
        self.rate, self.l2 = rate, config.l2

    def slots(self, value: Tensor) -> Slots:
        steps = value.new_zeros(value.shape[0], *(1,) * (value.dim() - 1))
        return torch.zeros_like(value), torch.zeros_like(value), steps

    def step(self, value: Tensor, gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        if self.l2:
            gradient = gradient + self.l2 * value
        first = torch.lerp(slots[0], gradient, 1.0 - self.BETA1)
        second = torch.lerp(slots[1], gradient * gradient, 1.0 - self.BETA2)
        steps = slots[2] + 1.0
        # 1 - beta^t, by expm1: the subtraction would lose a third of float32's digits in the first steps.
        unbias1, unbias2 = (-torch.expm1(steps * math.log(beta)) for beta in (self.BETA1, self.BETA2))
        scale = (second / unbias2).sqrt() + self.EPSILON
        return value - self.rate * (first / unbias1) / scale, (first, second, steps)

    def moved(self, _value: Tensor, slots: Sequence[Tensor]) -> Slots:
        return tuple(slots)


class FTRL:
    """Follow the regularised leader: per-coordinate rates with exact zeros under `l1`.

    Source:
        McMahan et al. 2013, algorithm 1, beta = 1; `learning_rate` is its alpha.

    Differs from the source:
        z starts where the closed form gives the initial weight, so that embeddings keep their initialisation.
    """

    BETA = 1.0

    def __init__(self, config: Optimizer, rate: float) -> None:
        self.rate, self.l1, self.l2 = rate, config.l1, config.l2

    def slots(self, value: Tensor) -> Slots:
        z = -value.detach() * (self.BETA / self.rate + self.l2) - self.l1 * torch.sign(value.detach())
        return z, torch.zeros_like(value)

    def step(self, value: Tensor, gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        z, n = slots
        total = torch.addcmul(n, gradient, gradient)
        sigma = (total.sqrt() - n.sqrt()) / self.rate
        z = z + gradient - sigma * value
        shrunk = z - torch.clamp(z, -self.l1, self.l1) if self.l1 else z
        return -shrunk / ((self.BETA + total.sqrt()) / self.rate + self.l2), (z, total)

    def moved(self, value: Tensor, slots: Sequence[Tensor]) -> Slots:
        n = slots[1]
        z = -value * ((self.BETA + n.sqrt()) / self.rate + self.l2) - self.l1 * torch.sign(value)
        return z, n


UPDATES: dict[str, type[SGD] | type[Adagrad] | type[Adam] | type[FTRL]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "adam": Adam,
    "ftrl": FTRL,
}


def build_update(config: Optimizer, rate: float) -> Update:
    return UPDATES[config.kind](config, rate)
