"""Dynamic tables in a group: rows are merged by the ids that have them, and lie at one place on every rank.

Ranks admit and evict by themselves while a round lasts. When they meet, each takes back what its round has done to its
tables, so that all stand where they last met, and then does what all have come to, in one order:

1. An id that any rank has learned of in the round, and still has, has a row. One that a rank has lost meanwhile, and no
   other has learned of, loses it.
2. Where that makes more rows than the cap allows, those learned from longest ago go; where the table refuses instead,
   the ids that came first in event time stay.
3. Rows that are new begin as new ones do, which (seed, table, id) decide: so all ranks have begun them alike, and merge
   their moves by `blend`. Events learned are added up; of the times an id was first and last seen the earliest and the
   latest hold.

Filters of admission, and what is counted for metrics, are each rank's own: an id is admitted by what one rank has seen
of it. A row that is forgotten on one rank and learned of on another in the same round stays; forgetting by key does not
come to that where the group is sharded by that key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.engine import table_merge
from streamcl.engine.table_merge import Base
from streamcl.group.blend import Share
from streamcl.group.weights import Said, Weights, listed, numbered

if TYPE_CHECKING:
    from streamcl.engine.tables import DynamicTables

Ints = NDArray[np.int64]


class Ids:
    """The dynamic tables of a learner. Heard behind its `Weights`, with whose rules rows are merged."""

    def __init__(self, tables: DynamicTables, weights: Weights) -> None:
        self.tables, self.weights = tables, weights
        self.begin()

    def begin(self) -> None:
        self.base = Base(self.tables)

    def _touched(self) -> tuple[Ints, Ints]:
        """Rows of dynamic tables that the round has changed, and how often."""
        rows, steps = self.weights.touches.counts()
        first, end = self.tables.first, self.tables.of.void
        mine = (rows >= first) & (rows < end)
        return rows[mine] - first, steps[mine]

    def say(self) -> dict[str, Tensor]:
        of, engine = self.tables.of, self.weights.engine
        rows, steps = self._touched()
        before, counted = (self.base.books[name][rows] for name in ("keys", "count"))
        gone = before[(before != 0) & (table_merge.found(self.tables, before) < 0)]
        there = of.keys[rows] != 0
        rows, steps = rows[there], steps[there]
        order = np.argsort(of.keys[rows])
        rows, steps = rows[order], steps[order]
        known = dict(zip(before.tolist(), counted.tolist(), strict=True))
        earlier = np.array([known.get(key, 0) for key in of.keys[rows].tolist()], np.int64)
        at = torch.from_numpy(rows + self.tables.first)
        said = {
            "keys": of.keys[rows],
            "place": table_merge.owner(self.tables, rows),
            "steps": steps,
            "events": np.maximum(of.count[rows] - earlier, 0),
            "first_seen": of.first_seen[rows],
            "last_seen": of.last_seen[rows],
            "gone": np.sort(gone),
            "clock": of.clock.copy(),
        }
        found = {name: torch.from_numpy(each) for name, each in said.items()}
        return found | {"rows": engine.table.detach()[at]} | numbered("slot", [slot[at] for slot in engine.row_slots])

    def hear(self, said: Sequence[Said], _examples: Sequence[int]) -> None:
        with torch.no_grad():
            changed = self._take_back()
            came, went = self._agree(said)
            keys = np.unique(np.concatenate([each["keys"].numpy() for each in said]))
            keys = keys[table_merge.found(self.tables, keys) >= 0]
            rows = table_merge.found(self.tables, keys)
            at = torch.from_numpy(rows + self.tables.first)
            # What is new has just begun: the next round's start knows it by nobody else.
            other = torch.from_numpy(np.concatenate((went, came)) + self.tables.first)
            for base, mine in zip(self._bases(), self._columns(), strict=True):
                base[other] = mine[other]
            order = torch.argsort(at)  # rows by their place, as `blend` by field wants them
            shares = [self._share(each, keys, order) for each in said]
            self.weights.put(at[order], *self.weights.one_of_rows(at[order], shares))
            self._enter(said, keys, rows)
            self.tables.of.clock[0] = max(float(each["clock"][0]) for each in said)
            every = np.unique(np.concatenate((changed, rows, went)))
            self.base.keep(every)
            if self.weights.others is not None:
                self.weights.others(torch.from_numpy(every + self.tables.first))

    def _columns(self) -> list[Tensor]:
        return [self.weights.engine.table, *self.weights.engine.row_slots]

    def _bases(self) -> list[Tensor]:
        return [self.weights.table, *self.weights.row_slots]

    def _take_back(self) -> Ints:
        rows, _ = self._touched()
        self.base.restore(rows)
        at = torch.from_numpy(rows + self.tables.first)
        for mine, base in zip(self._columns(), self._bases(), strict=True):
            mine[at] = base[at]
        return rows

    def _agree(self, said: Sequence[Said]) -> tuple[Ints, Ints]:
        """Which ids have a row from now on: the rows that came, and those that went."""
        tables, of = self.tables, self.tables.of
        learned = [each["events"].numpy() > 0 for each in said]  # the others' rows were replayed only
        told = np.concatenate([each["keys"].numpy()[some] for each, some in zip(said, learned, strict=True)])
        keys, at = np.unique(told, return_index=True)
        place = np.concatenate([each["place"].numpy()[some] for each, some in zip(said, learned, strict=True)])[at]
        lost = np.setdiff1d(np.concatenate([each["gone"].numpy() for each in said]), keys)
        went = table_merge.found(tables, lost)
        went = went[went >= 0]
        table_merge.remove(tables, went)
        rows = table_merge.found(tables, keys)
        table_merge.unlist(tables, rows[rows >= 0])
        first, last = self._times(said, keys, rows)
        keeps = np.ones(len(keys), np.bool_)
        removed = [went]
        for t in range(len(of.base)):
            mine = np.flatnonzero(place == t)
            over = int(of.used[t] + (rows[mine] < 0).sum() - of.cap[t])
            if over <= 0:
                continue
            if of.refuses[t]:
                fresh = mine[rows[mine] < 0]
                keeps[fresh[np.lexsort((keys[fresh], first[fresh]))][len(fresh) - over :]] = False
                continue
            old = table_merge.oldest(tables, t, over)
            table_merge.remove(tables, old)
            removed.append(old)
            over -= len(old)
            if over > 0:
                keeps[mine[np.lexsort((keys[mine], last[mine]))][:over]] = False
        dropped = rows[~keeps & (rows >= 0)]
        table_merge.enlist(tables, dropped)  # only what stands in a list can be removed
        table_merge.remove(tables, dropped)
        removed.append(dropped)
        new = keeps & (rows < 0)
        came = table_merge.make(tables, keys[new], place[new])
        return came, np.concatenate(removed)

    def _times(self, said: Sequence[Said], keys: Ints, rows: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n,) when ids were first and last seen, by anybody."""
        of, known = self.tables.of, rows >= 0
        first = np.where(known, of.first_seen[rows], np.inf)
        last = np.where(known, of.last_seen[rows], -np.inf)
        for each in said:
            at, mine = _places(keys, each["keys"].numpy())
            first[at] = np.minimum(first[at], each["first_seen"].numpy()[mine])
            last[at] = np.maximum(last[at], each["last_seen"].numpy()[mine])
        return first, last

    def _share(self, each: Said, keys: Ints, order: Tensor) -> Share:
        at, mine = _places(keys, each["keys"].numpy())
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        some = torch.from_numpy(mine)
        slots = tuple(slot[some] for slot in listed("slot", each))
        return Share(place[torch.from_numpy(at)], each["rows"][some], slots, each["steps"][some])

    def _enter(self, said: Sequence[Said], keys: Ints, rows: Ints) -> None:
        """The books of these ids, and the order in which they were last learned of."""
        of, fresh = self.tables.of, self.tables.of.count[rows] == 0
        learned = np.zeros(len(keys), np.bool_)
        of.first_seen[rows], of.last_seen[rows] = self._times(said, keys, np.where(fresh, -1, rows))
        for each in said:
            at, mine = _places(keys, each["keys"].numpy())
            of.count[rows[at]] += each["events"].numpy()[mine]
            learned[at] |= each["events"].numpy()[mine] > 0
        keys, rows = keys[learned], rows[learned]
        table_merge.enlist(self.tables, rows[np.lexsort((keys, of.last_seen[rows]))])


def _places(keys: Ints, some: Ints) -> tuple[Ints, Ints]:
    """Where some ids stand among `keys`, ascending, and which of the some that are."""
    at = np.searchsorted(keys, some)
    mine = np.flatnonzero(keys[np.minimum(at, len(keys) - 1)] == some) if len(keys) else np.zeros(0, np.int64)
    return at[mine], mine
