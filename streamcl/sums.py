"""Decayed sums by value: how often it came and what its labels were, compiled, for an event's slots in one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamcl.compiled import entry, exact
from streamcl.features import Field
from streamcl.index import NONE, enter, find, leave
from streamcl.protocols import State
from streamcl.records import Selector

SHARED = -1
"""Owner of what events of several keys have made: it stays when one of them is forgotten, as what is learned does."""

LN2 = math.log(2.0)
ENTRY = np.dtype([(name, np.float64) for name in ("sum", "weight", "clock")] + [("owner", np.int64)])
LINKS = np.dtype([("older", np.int32), ("newer", np.int32)])
USED, OLDEST, NEWEST = range(3)


Sum = tuple[float, float, float, int]
"""(sum, weight, clock, owner)"""
T = TypeVar("T")


class Round(Generic[T]):
    """What was kept of the values that a round of a group has touched, as it stood before; see `streamcl.group.past`.

    Attributes:
        before: By value, None where there was nothing.
        lost: Values that had to go meanwhile, whether or not they have come back.
    """

    def __init__(self) -> None:
        self.before: dict[int, T | None] = {}
        self.lost: set[int] = set()

    def lose(self, value: int, was: T) -> None:
        self.before.setdefault(value, was)
        self.lost.add(value)


class Place:
    """Where a feature's values stand in the rows of an event: 0 is a missing one."""

    __slots__ = ("base", "end", "slot")

    def __init__(self, field: Field) -> None:
        self.slot, self.end, self.base = field.slot, field.slot + field.slots, field.base

    def of(self, ids: Any) -> int:
        """Of the only slot, or the first."""
        return int(ids[self.slot]) - self.base

    def all(self, ids: NDArray[np.int64]) -> list[int]:
        """Of those that are there."""
        return [id - self.base for id in ids[self.slot : self.end].tolist() if id != self.base]


class Sums:
    """Decayed (sum, weight, clock, owner) of each of the last `keys` values that were written.

    Args:
        half_life: Of what was added, by a clock that the caller reads; None: for ever.

    Memory: 48 bytes a value and 8 to 16 of its index, taken as values come, twice as many whenever room is out.
    """

    FIRST = 64

    def __init__(self, keys: int, half_life: float | None) -> None:
        self.keys = keys
        self.rate = LN2 / half_life if half_life else 0.0
        self.round: Round[Sum] | None = None
        self._begin(self.FIRST)
        nothing = np.zeros(1, np.int64)
        for now in (0, 0.0):  # machine code is there before the first event is
            held = self.rows, self.entries, self.cells
            _read(*held, nothing, 0, 1, 0, now, self.rate)
            _read_row(*held, 0, now, self.rate)
            _add(*held[:2], self.links, self.cells, self.ends, nothing, 0, 1, 0, 0.0, now, 0, False, self.rate)

    def _begin(self, room: int) -> None:
        self.room = min(self.keys, room)
        self.used = 0
        self.rows = np.zeros(self.room, np.int64)
        self.entries = np.zeros(self.room, ENTRY)
        self.links = np.zeros(self.room, LINKS)
        self.cells = _cells(self.room)
        self.ends = np.array([0, NONE, NONE], np.int64)

    def read(self, ids: NDArray[np.int64], place: Place, now: float) -> tuple[float, float, float, int]:
        """(sum, weight) of an event's values together, as they have decayed; the latest clock (-inf: none is kept);
        and how many values the event has.
        """
        return _read(  # type: ignore[no-any-return]
            self.rows, self.entries, self.cells, ids, place.slot, place.end, place.base, now, self.rate
        )

    def read_row(self, row: int, now: float) -> tuple[float, float]:
        return _read_row(self.rows, self.entries, self.cells, row, now, self.rate)  # type: ignore[no-any-return]

    def make_room(self, values: int) -> None:
        """For so many more."""
        if not self.used + values > self.room < self.keys:
            return
        more = min(self.keys, 2 * self.room + values) - self.room
        self.room += more
        for name in ("rows", "entries", "links"):
            column = getattr(self, name)
            setattr(self, name, np.concatenate((column, np.zeros(more, column.dtype))))
        self.cells = _cells(self.room)
        _enter_all(self.rows, self.used, self.cells)

    def add(
        self, ids: NDArray[np.int64], place: Place, value: float, now: float, owner: int, of_all: bool = False
    ) -> None:
        """To each of an event's values; `of_all`: to row 0 first, which is everybody's."""
        self.make_room(1 + place.end - place.slot)
        if self.round is not None:
            with self.noted([*([0] if of_all else []), *place.all(ids)]):
                self._add(ids, place, value, now, owner, of_all)
            return
        self._add(ids, place, value, now, owner, of_all)

    def _add(self, ids: NDArray[np.int64], place: Place, value: float, now: float, owner: int, of_all: bool) -> None:
        held = self.rows, self.entries, self.links, self.cells, self.ends
        self.used = _add(*held, ids, place.slot, place.end, place.base, value, now, owner, of_all, self.rate)

    def forget(self, who: Selector) -> int:
        """What one key alone has made begins anew, for events can't be taken out of a sum; what several have, stays."""
        state = self._state()
        meant = state["owners"] != SHARED
        if who.owners is not None:
            meant &= np.isin(state["owners"], list(who.owners))
        if meant.any():
            for row in state["rows"][meant].tolist() if self.round is not None else ():
                self.round.lose(row, self.entry(row))  # type: ignore[union-attr, arg-type]
            self._take({name: column[~meant] for name, column in state.items()}, self.room)
        return int(meant.sum())

    def entry(self, row: int) -> Sum | None:
        """As it was written."""
        at = _place_of(row, self.rows, self.cells)
        return None if at < 0 else self.entries[at].item()

    def decayed(self, entry: Sum, now: float) -> tuple[float, float]:
        """Its (sum, weight) by then."""
        left = math.exp(-self.rate * max(now - entry[2], 0.0)) if self.rate else 1.0
        return entry[0] * left, entry[1] * left

    @contextmanager
    def noted(self, rows: list[int]) -> Iterator[None]:
        """These rows are written meanwhile: how they stood goes into the round, and who has given way to them."""
        round_ = self.round
        assert round_ is not None  # noqa: S101
        for row in rows:
            if row not in round_.before:
                round_.before[row] = self.entry(row)
        going = [*rows, *self._oldest(2 * len(rows))] if self.used + len(rows) > self.keys else []
        were = [(row, self.entry(row)) for row in going]
        yield
        for row, was in were:
            # Of more rows than there is room for one may have gone and come back.
            if was is not None and (len(set(rows)) > self.keys or _place_of(row, self.rows, self.cells) < 0):
                round_.lose(row, was)

    def _oldest(self, count: int) -> list[int]:
        order = np.zeros(min(count, self.used), np.int64)
        _walk(self.links, self.ends, order)
        return list(self.rows[order].tolist())

    def drop(self, row: int) -> None:
        """Whether or not it is there; the round does not hear of it."""
        _drop(self.rows, self.entries, self.links, self.cells, self.ends, row)
        self.used = int(self.ends[USED])

    def put(self, row: int, entry: Sum) -> None:
        """As the one written last, in the room of the one written longest ago where there is no other."""
        self.make_room(1)
        self.drop(row)
        _put(self.rows, self.entries, self.links, self.cells, self.ends, row, *entry)
        self.used = int(self.ends[USED])

    def __len__(self) -> int:
        return self.used

    def state_dict(self) -> State:
        return self._state()

    def _state(self) -> dict[str, NDArray[Any]]:
        """In the order of writing."""
        order = np.zeros(self.used, np.int64)
        _walk(self.links, self.ends, order)
        entries = self.entries[order]
        numbers = np.stack([entries[name] for name in ("sum", "weight", "clock")], 1)
        return {"rows": self.rows[order], "numbers": numbers, "owners": entries["owner"].copy()}

    def load_state_dict(self, state: State) -> None:
        """Of more values than there may be the last ones."""
        self._begin(self.FIRST)
        if state:
            self._take({name: state[name][-self.keys :] for name in ("rows", "numbers", "owners")}, self.room)

    def _take(self, state: dict[str, NDArray[Any]], room: int) -> None:
        n = len(state["rows"])
        self._begin(max(room, n))
        self.used = self.ends[USED] = n
        self.rows[:n] = state["rows"]
        for at, name in enumerate(("sum", "weight", "clock")):
            self.entries[name][:n] = state["numbers"][:, at]
        self.entries["owner"][:n] = state["owners"]
        if n:
            self.links["older"][:n] = np.arange(n) - 1
            self.links["newer"][:n] = np.arange(n) + 1
            self.links["newer"][n - 1] = NONE
            self.ends[OLDEST], self.ends[NEWEST] = 0, n - 1
        _enter_all(self.rows, n, self.cells)


def _cells(room: int) -> NDArray[np.int32]:
    """Of an index that is half full at most."""
    return np.zeros(1 << (2 * room - 1).bit_length(), np.int32)


@exact
def left_of(at: int, entries: Any, now: float, rate: float) -> float:
    """Of what was added, by now."""
    return math.exp(-rate * max(now - entries[at].clock, 0.0)) if rate > 0.0 else 1.0


@entry
def _read(
    rows: Any, entries: Any, cells: Any, ids: Any, start: int, end: int, base: int, now: float, rate: float
) -> Any:
    total, weight, clock, values = 0.0, 0.0, -math.inf, 0
    for slot in range(start, end):
        if ids[slot] != base:
            values += 1
            at = find(ids[slot] - base, rows, cells)
            if at >= 0:
                left = left_of(at, entries, now, rate)
                total += entries[at].sum * left
                weight += entries[at].weight * left
                clock = max(clock, entries[at].clock)
    return total, weight, clock, values


@entry
def _read_row(rows: Any, entries: Any, cells: Any, row: int, now: float, rate: float) -> Any:
    at = find(row, rows, cells)
    if at < 0:
        return 0.0, 0.0
    left = left_of(at, entries, now, rate)
    return entries[at].sum * left, entries[at].weight * left


@exact
def _tie(at: int, behind: int, before: int, links: Any, ends: Any) -> None:
    """The one older than `at` is followed by `behind`, the one newer than it follows `before`."""
    older, newer = links[at].older, links[at].newer
    if older >= 0:
        links[older].newer = behind
    else:
        ends[OLDEST] = behind
    if newer >= 0:
        links[newer].older = before
    else:
        ends[NEWEST] = before


@exact
def _take_out(at: int, links: Any, ends: Any) -> None:
    _tie(at, links[at].newer, links[at].older, links, ends)


@exact
def _put_last(at: int, links: Any, ends: Any) -> None:
    last = ends[NEWEST]
    links[at].older, links[at].newer = last, NONE
    if last >= 0:
        links[last].newer = at
    else:
        ends[OLDEST] = at
    ends[NEWEST] = at


@exact
def _new(rows: Any, links: Any, cells: Any, ends: Any, row: int) -> Any:
    """Where a row that is not there goes, as the newest."""
    if ends[USED] < len(rows):
        at = ends[USED]
        ends[USED] += 1
    else:
        at = ends[OLDEST]
        _take_out(at, links, ends)
        leave(at, rows, cells)
    rows[at] = row
    enter(at, rows, cells)
    _put_last(at, links, ends)
    return at


@exact
def write(
    rows: Any, entries: Any, links: Any, cells: Any, ends: Any,
    row: int, value: float, now: float, owner: int, rate: float,
) -> None:  # fmt: skip
    at = find(row, rows, cells)
    if at >= 0:
        each = entries[at]
        left = left_of(at, entries, now, rate)
        each.sum = each.sum * left + value
        each.weight = each.weight * left + 1.0
        each.clock = max(now, each.clock)
        if each.owner != owner:
            each.owner = SHARED
        if ends[NEWEST] != at:
            _take_out(at, links, ends)
            _put_last(at, links, ends)
        return
    at = _new(rows, links, cells, ends, row)
    each = entries[at]
    each.sum, each.weight, each.clock, each.owner = value, 1.0, now, owner


@entry
def _add(
    rows: Any, entries: Any, links: Any, cells: Any, ends: Any,
    ids: Any, start: int, end: int, base: int, value: float, now: float, owner: int, of_all: bool, rate: float,
) -> Any:  # fmt: skip
    if of_all:
        write(rows, entries, links, cells, ends, 0, value, now, SHARED, rate)
    for slot in range(start, end):
        if ids[slot] != base:
            write(rows, entries, links, cells, ends, ids[slot] - base, value, now, owner, rate)
    return ends[USED]


@entry
def _place_of(row: int, rows: Any, cells: Any) -> Any:
    return find(row, rows, cells)


@entry
def _put(
    rows: Any, entries: Any, links: Any, cells: Any, ends: Any,
    row: int, total: float, weight: float, clock: float, owner: int,
) -> None:  # fmt: skip
    each = entries[_new(rows, links, cells, ends, row)]
    each.sum, each.weight, each.clock, each.owner = total, weight, clock, owner


@entry
def _drop(rows: Any, entries: Any, links: Any, cells: Any, ends: Any, row: int) -> None:
    """The last place is filled first and emptied first."""
    at = find(row, rows, cells)
    if at < 0:
        return
    _take_out(at, links, ends)
    leave(at, rows, cells)
    ends[USED] -= 1
    last = ends[USED]
    if at == last:
        return
    leave(last, rows, cells)
    rows[at], entries[at], links[at] = rows[last], entries[last], links[last]
    enter(at, rows, cells)
    _tie(at, at, at, links, ends)


@entry
def _walk(links: Any, ends: Any, order: Any) -> None:
    at = ends[OLDEST]
    for i in range(len(order)):
        order[i] = at
        at = links[at].newer


@entry
def _enter_all(rows: Any, n: int, cells: Any) -> None:
    for at in range(n):
        enter(at, rows, cells)
