"""Dynamic embedding tables: a row for each id, without collisions, bounded, admitted and expired by events alone.

An event's features carry ids (`streamcl.features`); so do waiting tickets, replayed rows and published outcomes. Which
row of the engine's table an id has is looked up when it is read, so one whose row has gone meanwhile reads as zero, and
is not admitted again by that. Only `Learner.learn` admits, counts and renews; predicting and replaying touch nothing.

What a learned event does, in this order:

1. The clock is the latest event time learned. An id of the event whose row is older than `ttl_s`, were it not for
   `min_keep`, has none any more.
2. An id without a row that has earned one (`stations.Admission`) gets one: a vector drawn by (seed, table, id), fresh
   optimiser slots. In a full table that refuses it gets none. The decision rests on the events before this one.
3. The step is taken. An id without a row adds the zero vector and no first-order weight, and takes no gradient.
4. Rows that were read are renewed; ids that have none are counted in the filter, each time they are listed.
5. A table that is over its cap loses the rows learned from longest ago. Then its hand passes `sweep` rows on, and takes
   those that are too old: never below `min_keep`, and no more than `max_evict_ratio` of the rows in one round.

An event that can't be learned does nothing of this.

Source:
    Liu et al. 2022 (Monolith), arXiv 2209.07663, sections 2.2.1 and 2.2.2: collisionless tables, admission by count
    and by chance, expiry by time.

Differs from the source:
    The index probes one after the other instead of cuckoo hashing, so that deleting leaves nothing behind; the filter
    is a count-min sketch of generations with conservative update (Estan & Varghese 2002), not cells with a signature;
    rows expire behind each event, by event time, never in a pause at a save. Tables of several fields aren't shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config, ConfigError
from streamcl.engine import table_rows
from streamcl.engine.kernels import KINDS
from streamcl.features import Featurizer, Layout
from streamcl.index import NONE
from streamcl.protocols import State
from streamcl.random import key_of
from streamcl.records import Encoded
from streamcl.stations import Admission, Dynamic

Arrays = NDArray[Any]
Columns = Sequence[Tensor]
"""The engine's table (R, W), and the slots of its optimiser (R, ...)."""

ROWS = 1 << 20
"""Most rows of a table that sets no bound (count)."""
GENERATIONS = {"count": 7, "bloom": 2}
POLICIES = {
    "all": table_rows.AT_ONCE,
    "count": table_rows.COUNTED,
    "bloom": table_rows.COUNTED,
    "probabilistic": table_rows.BY_CHANCE,
}
MISSED = 0.05
"""Share of ids that are not in yet after `threshold` occurrences, by chance."""

_ROW = ("keys", "count", "first_seen", "last_seen", "newer", "older", "free")
_TABLE = ("newest", "oldest", "used", "high", "freed", "hand", "quota", "turn", "filled", "told")
_ALL = ("clock", "events", "counts")
REASONS = {"ttl": table_rows.BY_TTL, "lru": table_rows.BY_LRU, "forget": table_rows.FORGOTTEN}


def bookkeeping() -> int:
    """Bytes of a row beside its vector and slots: four numbers of 8, three links of 4, and at most four index cells."""
    return 4 * 8 + 3 * 4 + 4 * 4


def filter_of(admission: Admission) -> tuple[int, int, int, int]:
    """(cells of a generation, hashes, generations, occurrences of one); nothing where nothing is counted.

    m = -n ln p / (ln 2)^2 cells and k = log2 1/p hashes, for n occurrences in each generation (Bloom 1970); p is what
    all generations may err together.
    """
    if admission.kind not in GENERATIONS:
        return 0, 0, 1, 1
    generations = GENERATIONS[admission.kind]
    span = math.ceil(admission.capacity / generations)
    least = -math.log(admission.error / generations)
    return math.ceil(span * least / math.log(2.0) ** 2), math.ceil(least / math.log(2.0)), generations + 1, span


def cap_of(table: Dynamic, row_bytes: int, slots: int, where: str) -> int:
    """Most rows of a table. Raises ConfigError when `max_bytes` is too little for the filter and one event's rows."""
    if table.max_bytes is None:
        return table.max_rows or ROWS
    width, _, generations, _ = filter_of(table.admission)
    rows = (table.max_bytes - width * generations) // (row_bytes + bookkeeping()) - slots
    if rows < max(slots, table.min_keep):
        raise ConfigError(
            f"{where}.max_bytes: {table.max_bytes} bytes are too few: {width * generations} for the filter, and"
            f" {row_bytes + bookkeeping()} for each of {slots + max(slots, table.min_keep)} rows"
        )
    return int(rows)


class DynamicTables:
    """All dynamic tables of a learner. Their vectors and slots lie in the engine's table, behind the hashed rows.

    Args:
        columns: (numbers of a row, bytes of one number, of all slots together) of the engine's table.

    Attributes:
        rows: That the engine's table has to have for them, the one that reads as zero included; it is the last.

    Raises:
        ConfigError: a table's `max_bytes` is too little.
    """

    def __init__(self, config: Config, layout: Layout, row_bytes: int, first_order: int, rates: Arrays) -> None:
        self.names, self.first = layout.dynamic, layout.rows
        tables: list[Dynamic] = [config.features[name].table for name in self.names]  # type: ignore[union-attr, misc]
        slots = [int((layout.slot_table == t).sum()) for t in range(len(tables))]
        where = [f"features.{name}.table" for name in self.names]
        caps = [cap_of(*each) for each in zip(tables, [row_bytes] * len(tables), slots, where, strict=True)]
        room = [cap + spare for cap, spare in zip(caps, slots, strict=True)]
        filters = [filter_of(table.admission) for table in tables]
        sizes = [width * generations for width, _, generations, _ in filters]
        total, n = sum(room), len(tables)
        self.rows = total + 1
        self.row_bytes = row_bytes
        self.filter_bytes = sizes
        self.featurizer = Featurizer(config)

        def whole(values: Sequence[int]) -> Arrays:
            return np.array(values, np.int64)

        self.of = table_rows.Tables(
            slot_table=layout.slot_table,
            void=layout.rows + total,
            first=layout.rows,
            base=whole([sum(room[:t]) for t in range(n)]),
            room=whole(room),
            cap=whole(caps),
            admission=whole([POLICIES[table.admission.kind] for table in tables]),
            threshold=whole([table.admission.threshold for table in tables]),
            chance=np.array([1.0 - MISSED ** (1.0 / table.admission.threshold) for table in tables]),
            ttl=np.array([math.inf if table.ttl_s is None else table.ttl_s for table in tables]),
            sweep=whole([table.sweep for table in tables]),
            min_keep=whole([table.min_keep for table in tables]),
            ratio=np.array([table.max_evict_ratio for table in tables]),
            refuses=np.array([table.full == "refuse" for table in tables], np.bool_),
            draws=np.array([key_of(config.seed, f"table.{name}") for name in self.names], np.uint64),
            lots=np.array([key_of(config.seed, f"table.{name}.admission") for name in self.names], np.uint64),
            filter_at=whole([sum(sizes[:t]) for t in range(n)]),
            width=whole([each[0] for each in filters]),
            hashes=whole([each[1] for each in filters]),
            generations=whole([each[2] for each in filters]),
            span=whole([each[3] for each in filters]),
            turn=np.zeros(n, np.int64),
            filled=np.zeros(n, np.int64),
            counts=np.zeros(sum(sizes), np.uint8),
            keys=np.zeros(total, np.int64),
            count=np.zeros(total, np.int64),
            first_seen=np.zeros(total),
            last_seen=np.zeros(total),
            newer=np.zeros(total, np.int32),
            older=np.zeros(total, np.int32),
            free=np.zeros(total, np.int32),
            cells=np.zeros(1 << (2 * total).bit_length(), np.int32),
            newest=np.full(n, NONE, np.int64),
            oldest=np.full(n, NONE, np.int64),
            used=np.zeros(n, np.int64),
            high=np.zeros(n, np.int64),
            freed=np.zeros(n, np.int64),
            hand=np.zeros(n, np.int64),
            quota=np.zeros(n, np.int64),
            clock=np.full(1, -math.inf),
            events=np.zeros(1, np.int64),
            told=np.zeros((n, table_rows.NUMBERS), np.int64),
            before=np.zeros((n, table_rows.NUMBERS), np.int64),
            made=np.zeros((len(layout.slot_table), 3), np.int64),
            optimizer=KINDS[config.optimizer.kind],
            first_order=first_order,
            scale=config.model.init_scale,
            rates=rates,
        )
        self.keep: Callable[[Tensor], Tensor] | None = None  # (n, W) bool: what rows (n,) of the engine's table use
        self.moved = np.zeros(3 * len(layout.slot_table) + int(self.of.sweep.sum()), np.int64)
        self.made = 0

    def attach(self, columns: Columns) -> None:
        """The engine's tensors: they live as long as it does."""
        flat = [column.numpy().reshape(-1) for column in columns[1:]]
        self.columns = columns
        nothing = columns[0].numpy().reshape(-1)[:0]
        a, b, c = (*flat, nothing, nothing, nothing)[:3]
        self.data = columns[0].numpy(), a, b, c

    def resolve(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the engine's table, and weights: 0 for an id without a row. Any shape; changes nothing."""
        asked, given = ids.contiguous().view(-1).numpy(), weights.contiguous().view(-1).numpy()
        rows, heavy = np.empty_like(asked), np.empty_like(given)
        table_rows.place(asked, given, self.of, rows, heavy)
        return torch.from_numpy(rows).view(ids.shape), torch.from_numpy(heavy).view(ids.shape)

    def admit(self, features: Encoded, time_s: float) -> None:
        """An event is about to be learned; `retract` or `complete` follows."""
        table, a, _, _ = self.data
        self.made = table_rows.admit_now(features.ids, features.weights, time_s, self.of, table, a)
        if self.keep is not None and self.made:
            new = self.of.made[: self.made, 0]
            rows = torch.from_numpy(new[new >= 0] + self.first)
            for column in self.columns[: 2 if self.of.optimizer == KINDS["ftrl"] else 1]:  # its z makes the weight
                column[rows] *= self.keep(rows)

    def retract(self) -> None:
        """It was not learned: as if nobody had asked."""
        table_rows.retract_now(self.made, self.of, *self.data)

    def complete(self, features: Encoded, time_s: float) -> Tensor:
        """It was. Returns the rows of the engine's table that came or went, each once."""
        n = table_rows.complete_now(self.made, features.ids, features.weights, time_s, self.of, *self.data, self.moved)
        return torch.from_numpy(np.unique(self.moved[:n]))

    def forget(self, field: str, text: str) -> Tensor:
        """The row of a category goes. Returns where it was in the engine's table, (0,) or (1,)."""
        [found] = [each for each in (*self.featurizer.categoricals, *self.featurizer.bags) if each.name == field]
        at = table_rows.evict_now(found.row(text), self.of, *self.data)
        return torch.tensor([at] if at >= 0 else [], dtype=torch.int64)

    # What replicas follow: which id has which row. The rest is the writer's own.

    def keys(self) -> Tensor:
        """(D,) of all rows; 0 where there is none."""
        return torch.from_numpy(self.of.keys)

    def keys_at(self, ids: Tensor) -> Tensor:
        """(n,) of rows of the engine's table; 0 for what is free, or no row of a dynamic table."""
        return torch.from_numpy(self.of.keys[self._own(ids)] * self._mine(ids))

    def gone(self, ids: Tensor) -> Tensor:
        """(n,) bool: rows of dynamic tables that nobody has."""
        return torch.from_numpy(self._mine(ids) & (self.of.keys[self._own(ids)] == 0))

    def put_keys(self, ids: Tensor, keys: Tensor) -> None:
        """These rows of the engine's table belong to these ids from now on, or with 0 to none."""
        mine = self._mine(ids)
        rows, new = self._own(ids)[mine], keys.numpy()[mine]
        table_rows.unindex(rows[self.of.keys[rows] != 0], self.of.keys, self.of.cells)
        self.of.keys[rows] = new
        table_rows.index(rows[new != 0], self.of.keys, self.of.cells)

    def fits(self, ids: Tensor, keys: Tensor) -> bool:
        """Whether `put_keys` may be called with them."""
        return ids.shape == keys.shape and bool((keys.numpy()[~self._mine(ids)] == 0).all() and (keys <= 0).all())

    def _mine(self, ids: Tensor) -> NDArray[np.bool_]:
        return (ids.numpy() >= self.first) & (ids.numpy() < self.of.void)

    def _own(self, ids: Tensor) -> NDArray[np.int64]:
        """Rows of dynamic tables; 0 for others."""
        return np.where(self._mine(ids), ids.numpy() - self.first, 0)

    def ever_used(self) -> list[slice]:
        """Spans of the engine's table that a state has to hold: the hashed rows, and of each table those ever used."""
        spans = zip(self.of.base.tolist(), self.of.high.tolist(), strict=True)
        return [slice(0, self.first), *(slice(self.first + base, self.first + base + high) for base, high in spans)]

    def pack(self, column: Tensor) -> Tensor:
        """What a state holds of a column (R, ...): a copy."""
        return torch.cat([column.detach()[span] for span in self.ever_used()])

    def unpack(self, column: Tensor, packed: Tensor) -> None:
        """The inverse, once `load_state_dict` has been called."""
        begin = 0
        for span in self.ever_used():
            column[span] = packed[begin : begin + span.stop - span.start]
            begin += span.stop - span.start

    def read(self) -> dict[str, float]:
        """By table, under `table:FIELD:`, reasons behind it."""
        found: dict[str, float] = {}
        for t, name in enumerate(self.names):
            told, high = self.of.told[t].tolist(), int(self.of.high[t])
            asked, oldest = max(told[table_rows.ASKED], 1), int(self.of.oldest[t])
            each = {
                "rows": float(self.of.used[t]),
                "bytes": float(high * (self.row_bytes + bookkeeping()) + self.filter_bytes[t]),
                "admitted": float(told[table_rows.ADMITTED]),
                "refused": float(told[table_rows.REFUSED]),
                "hit_ratio": told[table_rows.FOUND] / asked,
                "oov_ratio": told[table_rows.OOV] / asked,
                **{f"evicted:{reason}": float(told[at]) for reason, at in REASONS.items()},
            }
            if oldest >= 0:
                each["oldest_last_seen_s"] = float(self.of.last_seen[oldest])
            found |= {f"table:{name}:{what}": value for what, value in each.items()}
        return found

    def state_dict(self) -> State:
        of = self.of
        used = np.concatenate([np.arange(b, b + h) for b, h in zip(of.base, of.high, strict=True)]).astype(np.int64)
        held = {name: getattr(of, name)[used] for name in _ROW}
        return held | {name: getattr(of, name).copy() for name in (*_TABLE, *_ALL)}

    def load_state_dict(self, state: State) -> None:
        of = self.of
        with torch.no_grad():
            for span in self.ever_used()[1:]:
                for column in self.columns:
                    column[span] = 0.0
        for name in (*_ROW, "cells"):
            getattr(of, name)[:] = 0
        for name in (*_TABLE, *_ALL):
            getattr(of, name)[:] = state[name]
        used = np.concatenate([np.arange(b, b + h) for b, h in zip(of.base, of.high, strict=True)]).astype(np.int64)
        for name in _ROW:
            getattr(of, name)[used] = state[name]
        table_rows.index(used[of.keys[used] != 0], of.keys, of.cells)
