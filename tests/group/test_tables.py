"""Dynamic tables of a group: which ids have rows, and what is in them, plain dicts by id say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from streamcl.engine import table_merge
from tests.group.crew import FEATURES, Click, Member, alike, config, crew, meet

SOME = effort(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
click = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("uv"), st.integers(0, 1))
rounds = st.lists(st.lists(st.lists(click, max_size=5), min_size=2, max_size=2), min_size=1, max_size=4)


def made(engine: str = "fused", **table: Any) -> Any:
    features = {**FEATURES, "user": {"kind": "categorical", "table": {"admission": "all", **table}}}
    return config(features=features, optimizer={"kind": "sgd"}, worker={"engine": engine})


def held(member: Member) -> dict[str, torch.Tensor]:
    """The vector of each user that has a row."""
    tables = member.learner.tables
    assert tables is not None
    found = {}
    for user in "abcdefgh":
        [row] = table_merge.found(tables, np.array([member.featurizer.fields["user"].row(user)]))
        if row >= 0:
            found[user] = member.learner.engine.table[tables.first + row].clone()
    return found


def fresh(user: str) -> torch.Tensor:
    """What an id begins with, whoever admits it: the vector of a learner that moves nothing."""
    still = made()
    still = still.model_copy(update={"optimizer": still.optimizer.model_copy(update={"learning_rate": 1e-30})})
    member = Member(still, 0, 1)
    member.learn((user, "u", 1))
    return held(member)[user]


FRESH = {user: fresh(user) for user in "abcdefgh"}


@pytest.mark.parametrize("engine", ["fused", "eager"])
@SOME
@given(rounds)
def test_rows_are_merged_by_the_ids_that_have_them(engine: str, course: list[list[list[Click]]]) -> None:
    members = crew(made(engine, max_rows=100), 2)
    before: dict[str, torch.Tensor] = {}
    for parts in course:
        steps = []
        for member, part in zip(members, parts, strict=True):
            member.learn(*part)
            steps.append({user: [each[0] for each in part].count(user) for user, _, _ in part})
        ended = [held(member) for member in members]
        new = [set(each) - set(before) for each in ended]
        meet(members)
        assert alike(members)
        merged = held(members[1])
        assert set(merged) == set().union(*ended)
        for user, vector in merged.items():
            start = before.get(user, FRESH[user])
            # A row that has come is told of once more than it was learned from.
            told = [
                (n[user] + (user in came), e[user]) for n, came, e in zip(steps, new, ended, strict=True) if user in n
            ]
            total = sum(count for count, _ in told)
            moved = sum(((count / max(total, 1)) * (value - start) for count, value in told), start * 0)
            torch.testing.assert_close(vector, start + moved, rtol=1e-5, atol=1e-6)
        before = merged


@SOME
@given(rounds, st.booleans())
def test_a_full_table_keeps_its_cap_and_its_books_are_in_order(course: list[list[list[Click]]], refuses: bool) -> None:
    members = crew(made(max_rows=3, full="refuse" if refuses else "evict_lru"), 2)
    for parts in course:
        for member, part in zip(members, parts, strict=True):
            member.learn(*part)
        meet(members)
        assert alike(members)
        for member in members:
            tables = member.learner.tables
            assert tables is not None
            of = tables.of
            used = np.flatnonzero(of.keys)
            assert len(used) == of.used[0] <= 3 and of.high[0] - of.freed[0] == of.used[0]
            listed, row = [], int(of.oldest[0])
            while row >= 0:
                listed.append(row)
                row = int(of.newer[row])
            assert sorted(listed) == used.tolist()
            assert (table_merge.found(tables, of.keys[used]) == used).all()
            free = torch.from_numpy(of.keys == 0)
            assert not member.learner.engine.table[tables.first : tables.first + len(free)][free].any()


def test_an_id_that_is_new_to_two_ranks_begins_with_one_vector_and_counts_for_both() -> None:
    members = crew(made(max_rows=100), 2)
    members[0].learn(("a", "u", 1), ("a", "v", 0))
    members[1].learn(("b", "u", 1), ("a", "u", 1))
    meet(members)
    tables = members[0].learner.tables
    assert tables is not None
    [row] = table_merge.found(tables, np.array([members[0].featurizer.fields["user"].row("a")]))
    assert tables.of.count[row] == 3 and tables.of.first_seen[row] == 1.0 and tables.of.last_seen[row] == 2.0


def test_an_id_that_one_rank_has_lost_and_nobody_else_has_learned_of_is_lost_to_all() -> None:
    members = crew(made(max_rows=3), 2)
    members[0].learn(("a", "u", 1), ("b", "u", 1), ("c", "u", 1))
    meet(members)
    members[1].learn(("a", "u", 1))
    members[0].learn(*((user, "u", 0) for user in "def"))  # a, b and c have to go
    meet(members)
    assert set(held(members[0])) == set(held(members[1])) and alike(members)
    assert "b" not in held(members[1]) and "c" not in held(members[1]) and len(held(members[0])) == 3
