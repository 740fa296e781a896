"""The weights of a group's ranks: dense ones whole, of the table the rows that the round has touched.

Every rank keeps the weights that all had when they last met, as much memory as the model again, so that what travels
are values, what is merged are moves, and a rank that has learned nothing pulls nobody back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config
from streamcl.engine.optimizers import Slots, Update
from streamcl.group.blend import Share, blend

if TYPE_CHECKING:
    from streamcl.engine.eager import Eager
    from streamcl.learner import Learner

Said = Mapping[str, Tensor]
"""What a rank says of its round: tensors by name."""
Ints = NDArray[np.int64]

_SPARE = 1 << 16  # ids noted before they are sorted out


class Part(Protocol):
    """Something of a learner that a group merges."""

    def say(self) -> dict[str, Tensor]:
        """What this rank has made of it since the ranks last met; changes nothing."""
        ...

    def hear(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        """Become what all ranks, in their order, have made of it; `examples` each has learned. A new round begins."""
        ...

    def begin(self) -> None:
        """A round begins with what the learner holds now."""
        ...


class Touches:
    """How many steps have changed each row of the table. Memory: 16 bytes a row, and as much again unsorted."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._noted: list[Ints] = []
        self._unsorted = 0
        self._rows, self._steps = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, ids: Tensor) -> None:
        """These were changed, each as often as it stands there; the tensor is kept as it is."""
        self._noted.append(ids.numpy())
        self._unsorted += len(ids)
        if self._unsorted > _SPARE + len(self._rows):
            self.counts()

    def counts(self) -> tuple[Ints, Ints]:
        """Rows in ascending order, and how often each was changed."""
        if self._noted:
            rows, steps = np.unique(np.concatenate(self._noted), return_counts=True)
            both = np.concatenate((self._rows, rows))
            self._rows, place = np.unique(both, return_inverse=True)
            self._steps = np.bincount(place, np.concatenate((self._steps, steps))).astype(np.int64)
            self._noted, self._unsorted = [], 0
        return self._rows, self._steps


class Weights:
    """Dense parameters and hashed rows, each with its optimiser's slots; see `blend` for how they become one."""

    def __init__(self, config: Config, learner: Learner) -> None:
        self.engine: Eager = learner.engine
        self.hashed = self.engine.tables.first if self.engine.tables else len(self.engine.table)
        self.touches = Touches()
        self.heard: Sequence[Said] = ()  # of the round that ends
        # (P,) of the round: whose a dense weight is to say, -1 for all; see `beside.Renewals`.
        self.owner = torch.full((len(self.engine.dense.flat),), -1)
        self.moving: Tensor = self.engine.dense.flat[:0]
        self.moving_rows: Tensor = torch.zeros(len(self.engine.table), 0)
        self._follow()
        self.begin()

    def _follow(self) -> None:
        """Be told of every row that moves, beside whoever is told already."""
        self.others = self.engine.watch
        others, add = self.others, self.touches.add

        def both(ids: Tensor) -> None:
            add(ids)
            if others is not None:
                others(ids)

        self.engine.watch = both

    def begin(self) -> None:
        dense, engine = self.engine.dense, self.engine
        self.flat, self.slots = dense.flat.detach().clone(), [slot.clone() for slot in dense.slots]
        self.table, *self.row_slots = map(self._copied, (engine.table.detach(), *engine.row_slots))
        self.touches.clear()

    def start(self) -> int:
        """A checksum of the dense weights that this round began with."""
        return xxhash.xxh32_intdigest(self.flat.numpy().tobytes())

    def close(self) -> None:
        """All parts have heard what this one was told."""
        self.heard = ()
        self.touches.clear()

    def _copied(self, column: Tensor) -> Tensor:
        """What a dynamic table has not used yet takes no memory here either."""
        tables = self.engine.tables
        if tables is None:
            return column.clone()
        copy = torch.zeros_like(column)
        for span in tables.ever_used():
            copy[span] = column[span]
        return copy

    def say(self) -> dict[str, Tensor]:
        dense, (ids, steps) = self.engine.dense, self.touches.counts()
        hashed = ids < self.hashed
        rows = torch.from_numpy(ids[hashed])
        said = {"flat": dense.flat.detach(), **numbered("slot", dense.slots)}
        said |= {"ids": rows, "steps": torch.from_numpy(steps[hashed]), "rows": self.engine.table.detach()[rows]}
        return said | numbered("row_slot", [slot[rows] for slot in self.engine.row_slots])

    def hear(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        self.heard = said
        with torch.no_grad():
            self._hear_dense(said, examples)
            self._hear_rows(said)

    def _hear_dense(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        dense, everywhere = self.engine.dense, torch.arange(len(self.flat))
        shares = [
            Share(everywhere, each["flat"], tuple(listed("slot", each)), torch.full((len(self.flat),), count))
            for each, count in zip(said, examples, strict=True)
            if count
        ]
        flat, slots = self.one(dense.update, self.flat, self.slots, shares, self.moving)
        for rank, each in enumerate(said):
            mine = self.owner == rank
            for column, given in zip((flat, *slots), (each["flat"], *listed("slot", each)), strict=True):
                column[mine] = given[mine]
            self.moving[mine[: len(self.moving)]] = 0.0
        for mine, base, new in zip((dense.flat, *dense.slots), (self.flat, *self.slots), (flat, *slots), strict=True):
            mine.copy_(new)
            base.copy_(new)

    def _hear_rows(self, said: Sequence[Said]) -> None:
        ids = torch.unique(torch.cat([each["ids"] for each in said]))
        shares = [
            Share(torch.searchsorted(ids, each["ids"]), each["rows"], tuple(listed("row_slot", each)), each["steps"])
            for each in said
        ]
        self.put(ids, *self.one_of_rows(ids, shares))

    def one(
        self, update: Update, value: Tensor, slots: Sequence[Tensor], shares: Sequence[Share], moving: Tensor
    ) -> tuple[Tensor, Slots]:
        """What becomes of weights that stood at `value`; `moving` is what a merge of another kind remembers of them."""
        return blend(update, value, slots, shares)

    def one_of_rows(self, ids: Tensor, shares: Sequence[Share]) -> tuple[Tensor, Slots]:
        """The same of rows (n,) of the table, each by its field's optimiser; `at` of shares is their place in `ids`."""
        value, slots, moving = self.table[ids], [slot[ids] for slot in self.row_slots], self.moving_rows[ids]
        by_field = self.engine.by_field
        if by_field is None:
            new, held = self.one(self.engine.row_update, value, slots, shares, moving)
        else:
            new, held = value.clone(), tuple(slot.clone() for slot in slots)
            for update, span, places in by_field.parts(ids):
                some = [_some(share, _places(len(ids), places), span) for share in shares]
                went = moving[places]
                new[places], kept = self.one(update, value[places], [s[places] for s in slots[span]], some, went)
                moving[places] = went
                for slot, each in zip(held[span], kept, strict=True):
                    slot[places] = each
        self.moving_rows[ids] = moving
        return new, held

    def put(self, ids: Tensor, value: Tensor, slots: Slots) -> None:
        """These rows (n,) are what all have come to, here and in what the next round starts from."""
        engine = self.engine
        columns = zip((engine.table, *engine.row_slots), (self.table, *self.row_slots), (value, *slots), strict=True)
        for mine, base, new in columns:
            mine.index_copy_(0, ids, new)
            base.index_copy_(0, ids, new)
        if self.others is not None and len(ids):
            self.others(ids)


def _some(share: Share, place: Tensor, span: slice) -> Share:
    """Of the rows whose new place (n,) is not -1."""
    at = place[share.at]
    here = at >= 0
    return Share(at[here], share.value[here], tuple(slot[here] for slot in share.slots[span]), share.steps[here])


def _places(count: int, some: Tensor) -> Tensor:
    """(n,) where each of n stands among some of them, or -1."""
    place = torch.full((count,), -1)
    place[some] = torch.arange(len(some))
    return place


def numbered(name: str, slots: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{name}{i}": slot for i, slot in enumerate(slots)}


def listed(name: str, said: Said) -> list[Tensor]:
    return [said[f"{name}{i}"] for i in range(sum(each.removeprefix(name).isdigit() for each in said))]
