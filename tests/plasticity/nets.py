"""Small nets, and one step of learning as the eager engine takes it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.engine.dense import Dense
from streamcl.engine.optimizers import build_update
from streamcl.plasticity import ContinualBackprop, Taps, find
from streamcl.plugin import Grads, Plan, Rule, Step
from streamcl.stations import Optimizer

STEP = Step(0, Plan(), None, None, torch.ones(1))
"""One that plasticity has no question about."""


def transformed(rule: Rule, gradient: Tensor) -> Tensor:
    """(P,) what a rule makes of a gradient of no row of the table."""
    none = torch.zeros(0, dtype=torch.int64)
    return rule.transform(Grads(gradient, none, torch.zeros(0, 1)), STEP).dense


class Net:
    """A module with its dense parameters, taps and rules."""

    def __init__(self, module: nn.Module, kind: str = "sgd", rate: float = 0.01, **optimizer: Any) -> None:
        self.module = module
        self.dense = Dense(module, build_update(Optimizer.model_validate({"kind": kind, **optimizer}), rate))
        self.taps = Taps(module, find(module))
        self.rules: list[Rule] = []

    def continual_backprop(self, **settings: Any) -> ContinualBackprop:
        rule = ContinualBackprop(self.dense, self.module, self.taps, **settings)
        self.rules.append(rule)
        return rule

    def step(self, x: Tensor, y: Tensor) -> None:
        """One example or several: squared error, gradient 2e."""
        self.descend(((self.module(x) - y) ** 2).sum(1).mean())

    def descend(self, loss: Tensor) -> None:
        gradient = self.dense.gradient(torch.autograd.grad(loss, list(self.dense.params.values())))
        with torch.no_grad():
            for rule in self.rules:
                rule.before(STEP)
            for rule in self.rules:
                gradient = transformed(rule, gradient)
            self.dense.step(gradient)
            for rule in self.rules:
                rule.after(STEP)

    def learn(self, steps: int, start: int = 0, rows: int = 1) -> None:
        """Steps `start` to `start + steps` of one endless stream of noise."""
        for i in range(start, start + steps):
            self.step(*example(self.module, i, rows))

    def weight(self, name: str) -> Tensor:
        return self.dense.params[f"{name}.weight"].detach()

    def bias(self, name: str) -> Tensor:
        return self.dense.params[f"{name}.bias"].detach()


def example(module: nn.Module, step: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    first = next(module.parameters())
    inputs = (8, 8) if first.dim() == 4 else ()
    shape = (rows, first.shape[1], *inputs)
    return torch.randn(shape, generator=generator, dtype=first.dtype), torch.randn(
        rows, 1, generator=generator, dtype=first.dtype
    )


def mlp(
    *widths: int, dtype: torch.dtype = torch.float64, seed: int = 0, activation: type[nn.Module] = nn.ReLU
) -> nn.Module:
    """Linear layers of these widths with activations between them; modules 0, 2, 4, ..."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def convolutional(seed: int = 0, norm: bool = False) -> nn.Module:
    """8 x 8 maps: module 0 conv (3 channels), 3 conv (4 channels of 4 x 4), 6 linear (5 units), 8 the output."""
    torch.manual_seed(seed)
    between: Sequence[nn.Module] = [nn.BatchNorm2d(3)] if norm else [nn.Identity()]
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), *between, nn.ReLU()),
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Sequential(nn.MaxPool2d(2), nn.Flatten())),
        *(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 1)),
    ).double()
