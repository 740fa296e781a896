"""Sums by value against a list of everything that was ever added."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.features import Field
from streamcl.records import Selector, mark
from streamcl.state import digest
from streamcl.sums import SHARED, Place, Sums

BASE, SLOT, SLOTS = 100, 1, 3


def place() -> Place:
    return Place(Field("bag", ("bag",), BASE, 50, SLOT, SLOTS, "mean", {}))


class Added(NamedTuple):
    row: int
    value: float
    now: float
    owner: int


class Slow:
    """All that was added, in order; what has given way is taken out."""

    def __init__(self, keys: int, half_life: float | None) -> None:
        self.keys, self.half_life = keys, half_life
        self.added: list[Added] = []

    def rows(self) -> list[int]:
        """In the order of their last writing."""
        return list(dict.fromkeys(each.row for each in reversed(self.added)))[::-1]

    def add(self, *added: Any) -> None:
        self.added.append(Added(*added))
        if len(rows := self.rows()) > self.keys:
            self.added = [each for each in self.added if each.row != rows[0]]

    def read(self, row: int, now: float) -> tuple[float, float]:
        mine = [each for each in self.added if each.row == row]
        left = [0.5 ** ((now - each.now) / self.half_life) if self.half_life else 1.0 for each in mine]
        return sum(w * each.value for w, each in zip(left, mine, strict=True)), sum(left)

    def owner(self, row: int) -> int:
        owners = {each.owner for each in self.added if each.row == row}
        return owners.pop() if len(owners) == 1 else SHARED

    def forget(self, owner: int) -> int:
        meant = [row for row in self.rows() if self.owner(row) == owner]
        self.added = [each for each in self.added if each.row not in meant]
        return len(meant)


EVENT = st.tuples(st.lists(st.integers(-3, 9), max_size=SLOTS), st.booleans(), st.integers(1, 3))


def ids_of(rows: list[int]) -> Any:
    """A slot of another field, the bag's, and one behind; 0 is a missing value, in the bag's middle too."""
    ids = np.full(SLOT + SLOTS + 1, BASE, np.int64)
    ids[0] = ids[-1] = BASE + 5
    ids[SLOT : SLOT + len(rows)] = BASE + np.array(rows, np.int64)
    return ids


def put(held: Sums, row: int, value: float, now: float, owner: int) -> None:
    held.add(ids_of([row]), place(), value, now, owner)


@given(
    keys=st.integers(1, 9),
    half_life=st.sampled_from([None, 5.0]),
    events=st.lists(EVENT, max_size=40),
    forgotten=st.integers(1, 3),
)
def test_sums_decay_and_give_way_as_a_list_of_everything_would(
    keys: int, half_life: float | None, events: list[tuple[list[int], bool, int]], forgotten: int
) -> None:
    held, slow, bag = Sums(keys, half_life), Slow(keys, half_life), place()

    def agree(now: float) -> None:
        assert len(held) == len(slow.rows())
        state = held.state_dict()
        assert state["rows"].tolist() == slow.rows()
        assert state["owners"].tolist() == [slow.owner(row) for row in slow.rows()]
        for row in range(-3, 10):
            assert held.read_row(row, now) == pytest.approx(slow.read(row, now))

    for now, (rows, value, owner) in enumerate(events):
        held.add(ids_of(rows), bag, float(value), float(now), owner)
        for row in filter(None, rows):
            slow.add(row, float(value), float(now), owner)
        read = held.read(ids_of(rows), bag, now + 1.0)
        each = [slow.read(row, now + 1.0) for row in filter(None, rows)]
        assert read[:2] == pytest.approx((sum(s for s, _ in each), sum(w for _, w in each)))
        assert read[3] == len(each)
        assert read[2] == (now if each else -math.inf)
    agree(len(events))
    key = "somebody"
    put(held, 3, 1.0, 50.0, mark(key))
    slow.add(3, 1.0, 50.0, mark(key))
    agree(50.0)
    assert held.forget(Selector(key=key)) == slow.forget(mark(key))
    agree(51.0)
    put(held, 7, 1.0, 60.0, forgotten)
    slow.add(7, 1.0, 60.0, forgotten)
    agree(60.0)


def test_many_values_grow_and_give_way_and_come_back_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    held = Sums(700, 300.0)
    rows = [row for row in rng.integers(-1500, 1500, 6_000).tolist() if row]
    for now, row in enumerate(rows):
        put(held, row, float(now % 2), float(now), 1 + now % 2)
    oldest: dict[int, int] = {}
    for now, row in enumerate(rows):  # the oracle's own list would take a minute
        oldest.pop(row, None)
        oldest[row] = now
    assert held.state_dict()["rows"].tolist() == list(oldest)[-700:]
    again = Sums(700, 300.0)
    again.load_state_dict(held.state_dict())
    assert digest(again.state_dict()) == digest(held.state_dict())
    for part in (held, again):
        for now, row in enumerate(rows[:1_000], len(rows)):
            put(part, row, 1.0, float(now), 1)
    assert digest(again.state_dict()) == digest(held.state_dict())


def test_a_smaller_room_takes_the_last_values() -> None:
    held, small = Sums(100, None), Sums(3, None)
    for row in range(1, 11):
        put(held, row, 1.0, float(row), 1)
    small.load_state_dict(held.state_dict())
    assert small.state_dict()["rows"].tolist() == [8, 9, 10]
    assert small.read_row(7, 11.0) == (0.0, 0.0)
    assert small.read_row(8, 11.0) == (1.0, 1.0)


def test_what_is_everybodys_outlives_each_of_them() -> None:
    held = Sums(9, None)
    for row, key in ((1, "a"), (2, "b"), (1, "b")):
        held.add(ids_of([row]), place(), 1.0, 0.0, mark(key), of_all=True)
    assert held.read_row(0, 1.0) == (3.0, 3.0)
    assert held.forget(Selector(key="b")) == 1
    assert held.state_dict()["rows"].tolist() == [0, 1]


def test_a_clock_that_goes_back_takes_nothing_back() -> None:
    held = Sums(4, 5.0)
    put(held, 1, 1.0, 10.0, 1)
    put(held, 1, 1.0, 0.0, 1)
    assert held.read_row(1, 10.0) == (2.0, 2.0)
    assert held.read_row(1, 15.0) == pytest.approx((1.0, 1.0))
