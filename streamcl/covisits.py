"""How often two values were seen together, compiled: see `streamcl.derived.Covisits` for what is kept and read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.compiled import entry, exact
from streamcl.index import find
from streamcl.protocols import State
from streamcl.records import Selector
from streamcl.sums import Place, Sums, left_of, write

LEAST = 1e-4
MIX = np.uint64(0xBF58476D1CE4E5B9)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Together:
    """Sums of pairs, and of each of their values.

    Args:
        keys: Pairs (count), and values; those written longest ago give way.
    """

    def __init__(self, keys: int, half_life: float | None, power: float) -> None:
        self.pairs, self.values, self.power = Sums(keys, half_life), Sums(keys, half_life), power
        nothing, place = np.zeros(1, np.int64), (0, 0, 0, 1, 0)
        for now in (0, 0.0):  # machine code is there before the first event is
            _read(*_read_of(self.pairs), *_read_of(self.values), nothing, *place, now, self.pairs.rate, power)
            _add(*_held(self.pairs), *_held(self.values), nothing, *place, now, 0, self.pairs.rate)

    def read(self, ids: NDArray[np.int64], one: Place, bag: Place, now: float) -> tuple[float, int]:
        """The sum over the bag, and how many values it has, 0 where there is none in question."""
        held = *_read_of(self.pairs), *_read_of(self.values)
        where = one.slot, one.base, bag.slot, bag.end, bag.base
        return _read(*held, ids, *where, now, self.pairs.rate, self.power)  # type: ignore[no-any-return]

    def add(self, ids: NDArray[np.int64], one: Place, bag: Place, now: float, owner: int) -> None:
        self.pairs.make_room(bag.end - bag.slot)
        self.values.make_room(1 + bag.end - bag.slot)
        if self.pairs.round is None:
            self._add(ids, one, bag, now, owner)
            return
        value, beside = one.of(ids), bag.all(ids)
        pairs = [_pair_of(value, each) for each in beside]
        with self.pairs.noted(pairs), self.values.noted([value, *beside]):
            self._add(ids, one, bag, now, owner)

    def _add(self, ids: NDArray[np.int64], one: Place, bag: Place, now: float, owner: int) -> None:
        where = one.slot, one.base, bag.slot, bag.end, bag.base
        _add(*_held(self.pairs), *_held(self.values), ids, *where, now, owner, self.pairs.rate)
        self.pairs.used, self.values.used = int(self.pairs.ends[0]), int(self.values.ends[0])

    def forget(self, who: Selector) -> int:
        return self.pairs.forget(who) + self.values.forget(who)

    def __len__(self) -> int:
        return len(self.pairs) + len(self.values)

    def state_dict(self) -> State:
        return {"pairs": self.pairs.state_dict(), "values": self.values.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.pairs.load_state_dict(state.get("pairs", {}))
        self.values.load_state_dict(state.get("values", {}))


def _read_of(sums: Sums) -> tuple[Any, Any, Any]:
    return sums.rows, sums.entries, sums.cells


def _held(sums: Sums) -> tuple[Any, Any, Any, Any, Any]:
    return sums.rows, sums.entries, sums.links, sums.cells, sums.ends


@exact
def _pair(a: Any, b: Any) -> Any:
    """Unordered, 63 bits."""
    low, high = np.uint64(min(a, b)), np.uint64(max(a, b))
    z = (low * GOLDEN + high) * MIX
    z = (z ^ (z >> np.uint64(32))) * GOLDEN
    return np.int64((z ^ (z >> np.uint64(29))) >> np.uint64(1))


@entry
def _pair_of(a: int, b: int) -> Any:
    return _pair(a, b)


@exact
def _sum(row: Any, rows: Any, entries: Any, cells: Any, now: float, rate: float) -> float:
    at = find(row, rows, cells)
    return entries[at].sum * left_of(at, entries, now, rate) if at >= 0 else 0.0


@entry
def _read(
    pairs: Any, pair_entries: Any, pair_cells: Any, values: Any, value_entries: Any, value_cells: Any,
    ids: Any, one: int, base: int, start: int, end: int, bag_base: int, now: float, rate: float, power: float,
) -> Any:  # fmt: skip
    value = ids[one] - base
    if value == 0:
        return 0.0, 0
    total, found = 0.0, 0
    own = _sum(value, values, value_entries, value_cells, now, rate) ** power
    for slot in range(start, end):
        if ids[slot] == bag_base:
            continue
        found += 1
        beside = ids[slot] - bag_base
        together = _sum(_pair(value, beside), pairs, pair_entries, pair_cells, now, rate)
        if together > 0.0:
            other = _sum(beside, values, value_entries, value_cells, now, rate)
            if own > 0.0 and other > 0.0:  # else: gave way
                total += together / (other ** (1.0 - power) * own * (1 + slot - start))
    return total, found


@entry
def _add(
    pairs: Any, pair_entries: Any, pair_links: Any, pair_cells: Any, pair_ends: Any,
    values: Any, value_entries: Any, value_links: Any, value_cells: Any, value_ends: Any,
    ids: Any, one: int, base: int, start: int, end: int, bag_base: int, now: float, owner: int, rate: float,
) -> None:  # fmt: skip
    value = ids[one] - base
    if value == 0:
        return
    whole = 0.0
    for slot in range(start, end):
        beside = ids[slot] - bag_base
        if beside != 0 and beside != value:
            share = 1.0 / (1 + slot - start)
            pair = _pair(value, beside)
            write(pairs, pair_entries, pair_links, pair_cells, pair_ends, pair, share, now, owner, rate)
            write(values, value_entries, value_links, value_cells, value_ends, beside, share, now, owner, rate)
            whole += share
    if whole > 0.0:
        write(values, value_entries, value_links, value_cells, value_ends, value, whole, now, owner, rate)
