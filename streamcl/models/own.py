"""A user's model, by import path: found, built from the seed, and tried before the first event comes.

    # mine.py, on PYTHONPATH; in the config: [model] kind = "mine:Bilinear", options = {rank = 4}
    class Bilinear(Network):
        def __init__(self, shape: Shape, rank: int = 8) -> None:
            super().__init__(shape)
            self.left = nn.Linear(shape.fields * shape.dim, rank)
            self.right = nn.Linear(shape.fields * shape.dim, rank)
            self.head = nn.Linear(rank, shape.outputs)

        def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
            x = vectors.flatten(1)  # (B, F * D)
            return self.head(self.left(x) * self.right(x))

It keeps the initialisation of its own constructor, which may draw from torch's generator: that stands at the seed
meanwhile.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamcl.config import ConfigError
from streamcl.models.tower import Network, Shape
from streamcl.random import key_of

ROWS = 3


def build(kind: str, shape: Shape, options: Mapping[str, Any], seed: int) -> Network:
    """The model of `module:Class`.

    Raises:
        ConfigError: it can't be found or built; its output has another shape, is not finite, is not the same twice,
            hangs on the other rows of a batch, or on numbers that are no parameters; it leaves no gradient.
    """
    made = _class_of(kind)
    model = _made(made, kind, shape, options, seed)
    _try(model, made, kind, shape, options, seed)
    return model


def _class_of(kind: str) -> type[Network]:
    module, _, name = kind.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ConfigError(f"model.kind: {kind}: {type(error).__name__}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Network)):
        raise ConfigError(f"model.kind: {kind} is no subclass of streamcl.models.Network")
    return found


def _made(made: type[Network], kind: str, shape: Shape, options: Mapping[str, Any], seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_of(seed, f"model.{kind}") >> 1)
        try:
            return made(shape, **options)
        except Exception as error:
            where = "model.options" if options and isinstance(error, TypeError) else "model.kind"
            raise ConfigError(f"{where}: {kind} can't be built: {type(error).__name__}: {error}") from error


def _try(model: Network, made: type[Network], kind: str, shape: Shape, options: Mapping[str, Any], seed: int) -> None:
    def refuse(fault: str) -> ConfigError:
        return ConfigError(f"model.kind: {kind}: {fault}")

    again = _made(made, kind, shape, options, seed)
    for name, value in model.state_dict().items():
        if not torch.equal(value, again.state_dict()[name]):
            raise refuse(f"{name} begins otherwise each time; draw from torch's generator alone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = _inputs(model, shape)
        before = {name: value.clone() for name, value in model.named_buffers()}
        try:
            output, repeated = model(*given), model(*given)
            alone = torch.cat([model(*(each[b : b + 1] for each in given)) for b in range(ROWS)])
        except Exception as error:
            raise refuse(f"forward: {type(error).__name__}: {error}") from error
    wanted = (ROWS, shape.outputs)
    if not isinstance(output, Tensor) or output.shape != wanted:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise refuse(f"forward must return (B, O) = {wanted}, not {got}")
    if not bool(torch.isfinite(output).all()):
        raise refuse("forward returns what is not finite")
    if not torch.equal(output, repeated):
        raise refuse("forward says something else the second time, as with dropout; nothing random may happen in it")
    if not torch.allclose(output, alone, rtol=1e-3, atol=1e-5):
        raise refuse("forward says something else of a row beside others, as with batch norm; rows must be apart")
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    if changed:
        raise refuse(f"forward changes the buffer {changed[0]!r}, which no checkpoint holds; make it a parameter")
    if not output.requires_grad:
        raise refuse("forward leaves no gradient")


def _inputs(model: Network, shape: Shape) -> tuple[Tensor, ...]:
    slots = len(shape.slots)
    first, vectors, items = (
        torch.randn(ROWS, *size).requires_grad_()
        for size in ((shape.fields, shape.outputs), (shape.fields, model.dim), (slots, model.dim))
    )
    empty = 0 if model.first_order else first.shape[2]
    first, dense = first[:, :, empty:], torch.randn(ROWS, shape.numerics)
    return (first, vectors, dense, items, torch.ones(ROWS, slots)) if model.slots else (first, vectors, dense)
