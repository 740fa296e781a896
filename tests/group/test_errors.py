"""The error memory of a group: sums add up, rows stay at home."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from streamcl.memory.forms import ByKey, Sketch
from streamcl.state import digest
from tests.group.crew import Click, Member, config, crew, meet

SOME = effort(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
click = st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.integers(0, 1))
rounds = st.lists(st.lists(st.lists(click, max_size=5), min_size=2, max_size=2), min_size=1, max_size=3)
MEMORIES: dict[str, Any] = {
    "sketch": {"kind": "sketch", "arrays": 3, "bits": 4, "half_life_events": None},
    "fading sketch": {"kind": "sketch", "arrays": 3, "bits": 4, "half_life_events": 5.0},
    "key": {"kind": "key", "key": "item", "half_life_events": None},
    "fading key": {"kind": "key", "key": "item", "half_life_events": 5.0, "capacity": 3},
}


def made(kind: str) -> Any:
    return config(error_memory=[MEMORIES[kind]])


def form(member: Member) -> Any:
    return member.learner.recall.stages[0].form


@pytest.mark.parametrize("kind", MEMORIES)
@SOME
@given(rounds)
def test_ranks_that_have_met_remember_the_same(kind: str, course: list[list[list[Click]]]) -> None:
    members = crew(made(kind), 2)
    for parts in course:
        for member, part in zip(members, parts, strict=True):
            member.learn(*part)
        meet(members)
        assert digest(form(members[0]).state_dict()) == digest(form(members[1]).state_dict())


@pytest.mark.parametrize("kind", ["sketch", "key"])
@SOME
@given(rounds)
def test_as_many_records_are_in_the_sums_as_were_written(kind: str, course: list[list[list[Click]]]) -> None:
    members = crew(made(kind), 2)
    written = 0
    for parts in course:
        for member, part in zip(members, parts, strict=True):
            member.learn(*part)
            written += len(part)
        meet(members)
    found = form(members[1])
    if isinstance(found, Sketch):
        np.testing.assert_allclose(found.sums[:, :, 0].sum(1), found.writes, rtol=1e-5)
    else:
        assert isinstance(found, ByKey) and sum(entry[1] for entry in found.sums.values()) == pytest.approx(written)
    assert found.writes == written


def test_sums_by_key_are_those_that_one_memory_would_hold() -> None:
    members = crew(made("key"), 2)
    members[0].learn(("a", "u", 1), ("b", "v", 1))
    members[1].learn(("c", "u", 0))
    alone = [form(member).sums for member in members]
    expected: dict[int, list[float]] = {}
    for each in alone:
        for key, entry in each.items():
            expected[key] = [a + b for a, b in zip(expected.get(key, [0.0] * (len(entry) - 1)), entry[1:], strict=True)]
    meet(members)
    assert {key: entry[1:] for key, entry in form(members[0]).sums.items()} == {
        key: pytest.approx(entry) for key, entry in expected.items()
    }


def test_by_the_key_of_the_shards_and_row_by_row_each_rank_remembers_its_own() -> None:
    for memory in ({"kind": "key", "key": "user"}, {"kind": "knn"}):
        members = crew(config(error_memory=[memory]), 2)
        members[0].learn(("a", "u", 1))
        before = [digest(form(member).state_dict()) for member in members]
        meet(members)
        assert [digest(form(member).state_dict()) for member in members] == before
