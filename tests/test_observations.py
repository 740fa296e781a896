"""Every rule gives what it says, whatever the order of arrival and the signs of the rewards."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.observations import RULES, Observation, aggregate
from streamcl.records import LABELS, Origin
from tests.test_archive import joiner
from tests.test_join import at, label, ticket

ORACLES: dict[str, Callable[[list[float]], float]] = {
    "first": lambda v: v[0],
    "last": lambda v: v[-1],
    "sum": lambda v: float(sum(map(Fraction, v))),
    "mean": statistics.fmean,
    "max": lambda v: sorted(v)[-1],
    "min": lambda v: sorted(v)[0],
    "count": len,
    "any": lambda v: float(sum(x != 0 for x in v) > 0),
}
VALUES = st.lists(st.floats(-1e9, 1e9), max_size=8)


def observed(values: list[float]) -> list[Observation]:
    return [Observation(float(n // 2), Origin(LABELS, 0, n), value) for n, value in enumerate(values)]


@given(st.sampled_from(sorted(RULES)), VALUES | st.lists(st.floats(-9, -1), max_size=5) | st.just([0.0, 0.0]),
    st.floats(-5, 5), st.randoms(use_true_random=False))  # fmt: skip
def test_a_rule_is_what_it_says_in_whatever_order_they_came(
    rule: str, values: list[float], default: float, chance: random.Random
) -> None:
    seen = observed(values)
    chance.shuffle(seen)
    found = aggregate(rule, seen, default)
    assert found == aggregate(rule, observed(values), default)
    assert math.isclose(found, ORACLES[rule](values) if values else default, rel_tol=1e-12, abs_tol=1e-300)


@pytest.mark.parametrize(("rule", "value"), [("sum", -6.0), ("max", -1.0), ("last", -2.0), ("any", 1.0)])
@pytest.mark.parametrize("memory", [2, 1000])
def test_what_was_observed_is_told_when_the_window_closes(rule: str, value: float, memory: int) -> None:
    join = joiner(memory, aggregate=rule)
    join.label(label("0", 0.5, 0, -3.0))  # before its event
    for offset in range(6):
        join.add(ticket(str(offset), 1.0, offset))
    assert join.label(label("0", 5.0, 2, -2.0)) is None
    assert join.label(label("0", 3.0, 1, -1.0)) is None
    assert join.label(label("0", 12.0, 3, -9.0)) is None  # late
    assert at(join, 11.0) == []
    outcomes = {o.ticket.id: (o.label, o.fate, o.delay_s) for o in at(join, 11.5)}
    assert outcomes["0"] == (value, "joined", 4.0)
    assert outcomes["1"] == (0.0, "expired", 10.0)
    assert join.counts == {"late": 1, "joined": 1, "expired": 5}


def test_an_event_without_an_observation_has_the_default_reward() -> None:
    join = joiner(1000, aggregate="mean", default=-1.5)
    join.add(ticket("a", 0.0))
    assert [o.label for o in at(join, 11.0)] == [-1.5]
