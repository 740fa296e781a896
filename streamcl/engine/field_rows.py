"""Rows of the table that are learned as their field says: fewer numbers, another optimiser, another rate.

All rows lie in one table of one width. A field with a smaller `embedding_dim` uses the first numbers of its rows; the
others are zero from the start, and no gradient reaches them: as if rows were shorter and filled up with zeros, which
is how mixed widths meet in one interaction. It saves no memory.

Source:
    Ginart et al. 2021 (mixed dimension embeddings), arXiv 1909.11810.

Differs from the source:
    Narrow rows are filled up with zeros instead of projected: no weight of the model depends on how wide a field is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.derived import History
from streamcl.engine.optimizers import Slots, Update, build_update
from streamcl.features import Layout
from streamcl.stations import Category, Optimizer


def said(config: Config) -> str | None:
    """The first setting of a field's own, by its path; None when all rows are alike."""
    for name, feature in sorted(config.features.items()):
        for setting in ("embedding_dim", "optimizer"):
            if isinstance(feature, Category) and getattr(feature, setting) is not None:
                return f"features.{name}.{setting}"
    return None


class FieldRows:
    """Widths and updates of all rows, by field.

    Args:
        table: (R, W) with the hashed rows at least.
        first: Numbers of a row before its embedding.
        rate: Learning rate of rows whose field names none.

    Shape:
        Of n rows: ids (n,) int64 in ascending order, values and gradients (n, W). Slots are those of every kind of
        optimiser in use, one behind the other, the config's own first; a row uses those of its field's kind alone.
    """

    def __init__(self, config: Config, layout: Layout, table: Tensor, first: int, rate: float) -> None:
        self.first, self.width = first, table.shape[1]
        self.names = layout.dynamic
        self.owners = _owners(config.features, layout)  # (base, name) in ascending order
        self._plans = {name: _plan(config, rate, name) for _, name in self.owners}
        told = dict.fromkeys([(config.optimizer.kind, rate, config.optimizer.l1, config.optimizer.l2)])
        told |= dict.fromkeys(self._plans.values())
        self._groups = {each: build_update(_optimizer(config, each), each[1]) for each in told}
        self._spans: dict[str, slice] = {}
        held = 0
        for (kind, *_), update in self._groups.items():
            if kind not in self._spans:
                count = len(update.slots(table[:1]))
                self._spans[kind] = slice(held, held + count)
                held += count
        place = {each: i for i, each in enumerate(self._groups)}
        dims = {name: _dim(config, name) for _, name in self.owners}
        self._starts = torch.tensor([base for base, _ in self.owners])
        self._dims = torch.tensor([first + dims[name] for _, name in self.owners])
        self._group = torch.tensor([place[self._plans[name]] for _, name in self.owners])

    def attach(self, bases: Sequence[int]) -> None:
        """Where the rows of the dynamic tables begin, in the order of `Layout.dynamic`."""
        at = {name: i for i, (_, name) in enumerate(self.owners)}
        own = torch.tensor([at[name] for name in self.names])
        self._starts = torch.cat((self._starts, torch.tensor(bases)))
        self._dims, self._group = (torch.cat((each, each[own])) for each in (self._dims, self._group))

    def narrow(self, table: Tensor) -> None:
        """Zero what rows of a table (R, W) don't use, in place."""
        ends = [*self._starts.tolist()[1:], len(table)]
        for start, end, dim in zip(self._starts.tolist(), ends, self._dims.tolist(), strict=True):
            table[start:end, dim:] = 0.0

    def keep(self, ids: Tensor) -> Tensor:
        """(n, W) bool: numbers that are used; first-order weights are."""
        return torch.arange(self.width) < self._dims[self._field(ids)].unsqueeze(1)

    def slots(self, table: Tensor) -> Slots:
        """Of the whole table (R, W): as its rows begin."""
        found: list[Tensor] = []
        for kind in self._spans:
            groups = [(i, update) for i, (each, update) in enumerate(self._groups.items()) if each[0] == kind]
            begun = [slot.clone() for slot in groups[0][1].slots(table)]
            for i, update in groups[1:]:
                at = self._rows_of(i, len(table))
                for slot, other in zip(begun, update.slots(table[at]), strict=True):
                    slot[at] = other
            found += begun
        return tuple(found)

    def step(self, ids: Tensor, value: Tensor, gradient: Tensor, slots: Sequence[Tensor]) -> tuple[Tensor, Slots]:
        """As `Update.step`, each row by its field's."""
        value, held = value.clone(), [slot.clone() for slot in slots]
        for update, span, at in self.parts(ids):
            value[at], new = update.step(value[at], gradient[at], [slot[at] for slot in held[span]])
            for slot, each in zip(held[span], new, strict=True):
                slot[at] = each
        return value, tuple(held)

    def moved(self, ids: Tensor, value: Tensor, slots: Sequence[Tensor]) -> Slots:
        """As `Update.moved`, each row by its field's."""
        held = [slot.clone() for slot in slots]
        for update, span, at in self.parts(ids):
            for slot, each in zip(held[span], update.moved(value[at], [slot[at] for slot in held[span]]), strict=True):
                slot[at] = each
        return tuple(held)

    def parts(self, ids: Tensor) -> list[tuple[Update, slice, Tensor]]:
        """Every group that has any of these rows: its update, its slots, the places of its rows."""
        group = self._group[self._field(ids)]
        found = []
        for i, ((kind, *_), update) in enumerate(self._groups.items()):
            at = (group == i).nonzero().squeeze(1)
            if len(at):
                found.append((update, self._spans[kind], at))
        return found

    def _rows_of(self, group: int, rows: int) -> Tensor:
        return (self._group[self._field(torch.arange(rows))] == group).nonzero().squeeze(1)

    def _field(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, ids, right=True) - 1


Plan = tuple[Literal["sgd", "adagrad", "adam", "ftrl"], float, float, float]
"""Kind, rate, l1 and l2 of an optimiser."""


def _plan(config: Config, rate: float, name: str) -> Plan:
    whole, own = config.optimizer, getattr(config.features[name], "optimizer", None)
    if own is None:
        return whole.kind, rate, whole.l1, whole.l2
    return (
        own.kind or whole.kind,
        own.learning_rate or rate,
        whole.l1 if own.l1 is None else own.l1,
        whole.l2 if own.l2 is None else own.l2,
    )


def _optimizer(config: Config, plan: Plan) -> Optimizer:
    kind, _, l1, l2 = plan
    return config.optimizer.model_copy(update={"kind": kind, "l1": l1, "l2": l2})


def _dim(config: Config, name: str) -> int:
    own = getattr(config.features[name], "embedding_dim", None)
    return config.model.embedding_dim if own is None else int(own)


def _owners(features: Mapping[str, Any], layout: Layout) -> list[tuple[int, str]]:
    """Where the hashed rows of each field begin, but for histories that share another's."""
    found = {}
    for base, at in zip(layout.slot_base.tolist(), layout.slot_field.tolist(), strict=True):
        name = layout.fields[at]
        if not (isinstance(features[name], History) and features[name].rows == "shared"):
            found[base] = name
    return sorted(found.items())
