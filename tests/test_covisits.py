"""Co-visitation against a list of all that was seen together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.covisits import LEAST, Together
from streamcl.features import Field
from streamcl.records import Encoded, Selector, mark
from streamcl.state import digest
from streamcl.sums import Place
from tests.test_past import Stream

BASE, BAG, SLOTS = 10, 100, 3
ONE = Place(Field("item", ("item",), BASE, 50, 0, 1, "mean", {}))
BESIDE = Place(Field("seen", ("seen",), BAG, 50, 1, SLOTS, "mean", {}))


def ids_of(item: int, seen: list[int]) -> Any:
    ids = np.full(1 + SLOTS, BAG, np.int64)
    ids[0] = BASE + item
    ids[1 : 1 + len(seen)] = BAG + np.array(seen, np.int64)
    return ids


class Slow:
    def __init__(self, half_life: float | None, power: float) -> None:
        self.half_life, self.power = half_life, power
        self.seen: list[tuple[frozenset[int], float, float]] = []

    def add(self, item: int, beside: list[int], now: float) -> None:
        for j, a in enumerate(beside):
            if item and a and a != item:
                self.seen.append((frozenset((a, item)), 1.0 / (1 + j), now))

    def _sum(self, those: frozenset[int], now: float) -> float:
        age = [(w, now - t) for pair, w, t in self.seen if those <= pair]
        return sum(w * (0.5 ** (past / self.half_life) if self.half_life else 1.0) for w, past in age)

    def read(self, item: int, beside: list[int], now: float) -> float:
        total = 0.0
        for j, a in enumerate(beside):
            if item and a and a != item and (w := self._sum(frozenset((a, item)), now)):
                one, other = self._sum(frozenset((item,)), now), self._sum(frozenset((a,)), now)
                total += w / (other ** (1 - self.power) * one**self.power) / (1 + j)
        return total


EVENT = st.tuples(st.integers(0, 5), st.lists(st.integers(0, 5), max_size=SLOTS))


@given(
    half_life=st.sampled_from([None, 4.0]),
    power=st.sampled_from([0.0, 0.25, 1.0]),
    events=st.lists(EVENT, max_size=30),
    asked=st.lists(EVENT, min_size=1, max_size=5),
)
def test_it_says_what_a_list_of_everything_says(
    half_life: float | None, power: float, events: list[Any], asked: list[Any]
) -> None:
    held, slow = Together(1000, half_life, power), Slow(half_life, power)
    for now, (item, beside) in enumerate(events):
        held.add(ids_of(item, beside), ONE, BESIDE, float(now), 1)
        slow.add(item, beside, float(now))
    for item, beside in asked:
        total, values = held.read(ids_of(item, beside), ONE, BESIDE, 31.0)
        assert total == pytest.approx(slow.read(item, beside, 31.0))
        assert values == (sum(map(bool, beside)) if item else 0)
    again = Together(1000, half_life, power)
    again.load_state_dict(held.state_dict())
    assert digest(again.state_dict()) == digest(held.state_dict())


def test_a_power_of_0_is_the_share_in_what_came_beside() -> None:
    held = Together(100, None, 0.0)
    for item in (2, 2, 3):
        held.add(ids_of(item, [1]), ONE, BESIDE, 0.0, 1)
    assert held.read(ids_of(2, [1]), ONE, BESIDE, 0.0)[0] == pytest.approx(2 / 3)
    assert held.read(ids_of(1, [3]), ONE, BESIDE, 0.0)[0] == pytest.approx(1.0)
    assert held.read(ids_of(2, [4, 1]), ONE, BESIDE, 0.0)[0] == pytest.approx(2 / 3 / 2)


def test_many_pairs_give_way() -> None:
    held = Together(20, None, 0.5)
    for n in range(1, 49):
        held.add(ids_of(n, [n + 1]), ONE, BESIDE, float(n), 1)
    assert (len(held.pairs), len(held.values)) == (20, 20)
    assert held.read(ids_of(1, [2]), ONE, BESIDE, 50.0) == (0.0, 1)
    assert held.read(ids_of(48, [49]), ONE, BESIDE, 50.0)[0] > 0.0


def test_what_one_key_alone_has_seen_is_forgotten() -> None:
    held = Together(20, None, 0.5)
    held.add(ids_of(1, [2]), ONE, BESIDE, 0.0, mark("a"))
    held.add(ids_of(3, [4]), ONE, BESIDE, 0.0, mark("b"))
    assert held.forget(Selector(key="a")) == 3
    assert held.read(ids_of(1, [2]), ONE, BESIDE, 0.0) == (0.0, 1)
    assert held.read(ids_of(3, [4]), ONE, BESIDE, 0.0)[0] == pytest.approx(1.0)


def test_an_event_reads_what_events_of_label_1_before_it_have_seen_together() -> None:
    stream = Stream(
        item={"kind": "categorical", "buckets": 50},
        seen={"kind": "bag", "buckets": 50, "max_items": 3},
        co={"kind": "covisits", "of": "item", "beside": "seen"},
    )

    def read(asked: Encoded) -> float:
        return stream.number("co", asked)

    assert math.isnan(read(stream.ask(item="a", seen=[])))
    assert read(stream.ask(item="a", seen=["b"])) == pytest.approx(math.log(LEAST))
    stream.hear(stream.see(0.0, item="a", seen=["b"]), 0.0, 1.0)
    assert read(stream.ask(item="a", seen=["b"])) == pytest.approx(math.log(LEAST))
    stream.hear(stream.see(1.0, item="a", seen=["b"]), 1.0, 1.0)
    assert read(stream.ask(item="a", seen=["b"])) == pytest.approx(math.log(LEAST + 1.0))
    assert read(stream.ask(item="b", seen=["a"])) == pytest.approx(math.log(LEAST + 1.0))
    assert read(stream.ask(item="a", seen=["c"])) == pytest.approx(math.log(LEAST))


def test_a_history_can_be_what_it_is_seen_beside() -> None:
    stream = Stream(
        clicked={"kind": "history", "of": "item", "by": "user", "when": "positive", "last": 2},
        co={"kind": "covisits", "of": "item", "beside": "clicked", "power": 0.0},
    )
    for step, item in enumerate("abc"):
        stream.hear(stream.see(float(step), user="u", item=item), 1.0)
    # c came behind b and a, at 1 and 1/2; of what came with b, 1 of 2.
    asked = stream.ask(9.0, user="u", item="a")  # beside c and b
    assert stream.number("co", asked) == pytest.approx(math.log(LEAST + 0.5 / 1.5 + 1.0 / 2.0 / 2))
