"""Ranks that have met hold one model, to the bit; what it is, plain dicts say; alone nothing changes."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from streamcl.config import ConfigError
from streamcl.group.merge import merge_of
from streamcl.group.ranks import Ranks
from streamcl.learner import Learner
from streamcl.protocols import StreamclError
from streamcl.state import digest
from tests.group.crew import FEATURES, Click, Member, alike, config, crew, meet

if TYPE_CHECKING:
    from streamcl.plasticity.continual_backprop import ContinualBackprop

SOME = effort(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
click = st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.integers(0, 1))
rounds = st.lists(st.lists(st.lists(click, max_size=5), min_size=3, max_size=3), min_size=1, max_size=4)
ROWS: dict[str, Any] = {"kind": "categorical", "table": {"max_rows": 4, "admission": "all"}}
TABLES = {**FEATURES, "user": ROWS, "item": {**ROWS, "table": {"max_rows": 5, "admission": "all", "full": "refuse"}}}
PAST = {
    **FEATURES,
    "rate": {"kind": "rate", "of": "item", "half_life_s": 7.0, "keys": 4},
    "count": {"kind": "count", "of": "item", "half_life_events": 5.0},
    "mine": {"kind": "rate", "of": "user"},
    "fans": {"kind": "history", "of": "user", "by": "item", "last": 3, "keys": 4},
    "since": {"kind": "elapsed", "by": "item"},
}
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "eager": {"worker": {"engine": "eager"}},
    "replay": {"replay": {"retention": "recency", "per_event": 2, "capacity": 8}},
    "adam": {"optimizer": {"kind": "adam"}},
    "ftrl": {"optimizer": {"kind": "ftrl", "l1": 0.01}},
    "sgd": {"optimizer": {"kind": "sgd"}},
    "logistic": {"model": {"kind": "logistic"}},
    "tables": {"features": TABLES},
    "tables, eager": {"features": TABLES, "worker": {"engine": "eager"}, "optimizer": {"kind": "adam"}},
    "fields": {"features": {**FEATURES, "item": {**FEATURES["item"], "optimizer": {"kind": "ftrl"}}}},
    "past": {"features": PAST},
    "ema": {"plugins": [{"kind": "ema", "decay": 0.8}, {"kind": "served", "sets": ["ema"]}]},
    "plasticity": {"plasticity": [{"kind": "continual_backprop", "replacement_rate": 0.2, "maturity": 2}]},
    "outer": {"group": {"merge": "outer"}},
    "outer, tables": {"group": {"merge": "outer"}, "features": TABLES},
    "outer, plasticity": {
        "group": {"merge": "outer"},
        "plasticity": [{"kind": "continual_backprop", "replacement_rate": 0.2, "maturity": 2}],
    },
}


def follow(members: list[Member], course: list[list[list[Click]]]) -> None:
    for parts in course:
        for member, part in zip(members, parts, strict=True):
            member.learn(*part)
        meet(members)


@pytest.mark.parametrize("kind", KINDS)
@SOME
@given(rounds)
def test_ranks_that_have_met_are_alike_to_the_bit_and_so_are_two_runs(kind: str, course: Any) -> None:
    made = config(**KINDS[kind])
    first, second = crew(made, 3), crew(made, 3)
    for members in (first, second):
        follow(members, course)
        assert alike(members)
    assert digest(first[0].common()) == digest(second[0].common())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("outer")])
def test_one_rank_alone_is_nothing_but_a_learner(kind: str) -> None:
    made = config(**KINDS[kind])
    [member], alone = crew(made, 1), Member(made, 0, 1)
    for n in range(4):
        clicks = [("abcdef"[(n + i) % 6], "uvwxyz"[i * n % 6], i % 2) for i in range(6)]
        member.learn(*clicks)
        alone.learn(*clicks)
        assert meet([member])[0] == (0, 0, 0.0)
    assert digest(member.learner.state_dict()) == digest(alone.learner.state_dict())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("outer") and kind != "past"])
def test_where_one_rank_alone_has_learned_all_become_what_it_is(kind: str) -> None:
    """To the bit; and those who have learned nothing pull nobody back."""
    made = config(**KINDS[kind])
    members, alone = crew(made, 3), Member(made, 0, 1)
    for n in range(4):
        clicks = [("abcd"[(n + i) % 4], "uvwx"[i * n % 4], i % 2) for i in range(6)]
        members[1].learn(*clicks)
        alone.learn(*clicks)
        meet(members)
        assert alike(members)
        assert torch.equal(members[0].learner.engine.dense.flat, alone.learner.engine.dense.flat)
        if members[0].learner.tables is None:
            assert torch.equal(members[2].learner.engine.table, alone.learner.engine.table)
        np.testing.assert_array_equal(members[2].learner.numerics.m2, alone.learner.numerics.m2)
        assert members[2].learner.version == alone.learner.version


@pytest.mark.parametrize("engine", ["fused", "eager"])
@SOME
@given(st.lists(st.lists(click, max_size=6), min_size=2, max_size=4))
def test_rows_are_merged_as_plain_dicts_merge_them(engine: str, parts: list[list[Click]]) -> None:
    members = crew(config(optimizer={"kind": "sgd"}, worker={"engine": engine}), len(parts))
    start = members[0].learner.engine.table.clone()
    steps: list[dict[int, int]] = []
    for member, part in zip(members, parts, strict=True):
        touched: dict[int, int] = {}
        for user, item, label in part:
            for name, value in (("user", user), ("item", item)):
                row = member.featurizer.fields[name].row(value)
                touched[row] = touched.get(row, 0) + 1
            member.learn((user, item, label))
        steps.append(touched)
    ended = [member.learner.engine.table.clone() for member in members]
    meet(members)
    merged = members[0].learner.engine.table
    for row in range(len(start)):
        mine = [(touched[row], table[row]) for touched, table in zip(steps, ended, strict=True) if row in touched]
        total = sum(count for count, _ in mine)
        expected = start[row] + sum(((count / total) * (value - start[row]) for count, value in mine), start[row] * 0)
        torch.testing.assert_close(merged[row], expected, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_all_numbers() -> None:
    made = config()
    members, one = crew(made, 3), Member(made, 0, 1)
    for n, member in enumerate(members):
        clicks: list[Click] = [("abc"[i % 3], "u" * (1 + n + i), i % 2) for i in range(3 * n)]
        member.learn(*clicks)
        one.time = 0.0
        one.learn(*clicks)
    meet(members)
    for name in ("count", "mean", "m2"):
        mine, theirs = (getattr(each.learner.numerics, name) for each in (members[0], one))
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    assert members[0].learner.version == one.learner.version == 9


def test_a_unit_made_anew_on_one_rank_is_new_on_all() -> None:
    """With its weights, its age and its utility there; the others' news of the old unit is gone."""
    members = crew(config(**KINDS["plasticity"]), 3)
    for rank, member in enumerate(members):
        member.learn(*[("abcdef"[i % 6], "uvwxyz"[(i + rank) % 6], i % 2) for i in range((2, 9, 2)[rank])])
    rules = [cast("ContinualBackprop", member.learner.rules["continual_backprop"]) for member in members]
    fresh = rules[1].born > 0
    assert fresh.any() and not fresh.all() and not rules[0].born.any() and not rules[2].born.any()
    before = rules[1].state_dict()
    dense = members[1].learner.engine.dense
    weight, out = (dense.params[f"deep.hidden.{i}.weight"].detach().clone() for i in (0, 1))
    meet(members)
    assert alike(members)
    after = rules[0].state_dict()
    assert after["step"] == 2 + 9 + 2 and after["replaced"] == before["replaced"]
    assert after["eligible_steps"] == before["eligible_steps"]
    for name in ("mean", "mean_use"):
        assert torch.equal(after[name][fresh], before[name][fresh])
    assert torch.equal(after["step"] - after["born"][fresh], before["step"] - before["born"][fresh])
    units = fresh[:6].nonzero().squeeze(1)
    params = members[2].learner.engine.dense.params
    assert torch.equal(params["deep.hidden.0.weight"][units], weight[units])
    assert torch.equal(params["deep.hidden.1.weight"][:, units], out[:, units])


def test_nobody_hears_of_anybody_with_merge_none() -> None:
    members = crew(config(group={"merge": "none"}), 2)
    members[0].learn(("a", "u", 1), ("b", "v", 0))
    before = [digest(member.learner.state_dict()) for member in members]
    told = meet(members)
    assert [digest(member.learner.state_dict()) for member in members] == before
    assert told[0].divergence == told[1].divergence > 0.0


def test_divergence_is_of_the_farthest_rank_by_the_length_of_the_mean() -> None:
    members = crew(config(), 2)
    members[0].learn(("a", "u", 1), ("b", "v", 0))
    flats = [member.learner.engine.dense.flat.detach().double().numpy() for member in members]
    mean = sum(flats) / 2
    expected = max(np.linalg.norm(each - mean) for each in flats) / np.linalg.norm(mean)
    assert meet(members)[1].divergence == pytest.approx(expected)


def test_the_outer_optimiser_is_nesterovs_on_the_mean_of_moves() -> None:
    """As torch's SGD takes it, the mean move being minus the gradient."""
    members = crew(config(group={"merge": "outer", "outer_learning_rate": 0.6, "outer_momentum": 0.8}), 2)
    mirror = torch.nn.Parameter(members[0].learner.engine.dense.flat.detach().clone())
    outer = torch.optim.SGD([mirror], lr=0.6, momentum=0.8, nesterov=True)
    for n in range(4):
        for rank, member in enumerate(members):
            member.learn(*[("abcdef"[(n + i) % 6], "uvwxyz"[i + rank], i % 2) for i in range(3)])
        moved = sum(member.learner.engine.dense.flat.detach() - mirror.detach() for member in members) / 2
        mirror.grad = -torch.as_tensor(moved)
        outer.step()
        meet(members)
        torch.testing.assert_close(members[1].learner.engine.dense.flat.detach(), mirror.detach())


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam", "ftrl"])
def test_a_gradient_is_the_sum_of_all_ranks_and_its_step_is_the_optimisers(kind: Any) -> None:
    said = {"worker": {"engine": "eager"}, "group": {"merge": "gradient"}}
    members = crew(config(**said, optimizer={"kind": kind}), 3)
    for n in range(4):
        dense = members[0].learner.engine.dense
        start, slots = dense.flat.detach().clone(), [slot.clone() for slot in dense.slots]
        table = members[0].learner.engine.table.clone()
        total = torch.zeros_like(start)
        for member, part in zip(
            members, ([("a", "u", 1)], [("b", "vx"[n % 2], 0)], [("a", "w", 1)][: n % 2]), strict=True
        ):
            member.learn(*part)
            parts: Any = member.merge.parts["weights"]
            assert (parts.noted.total is not None) == bool(part)
            total += parts.noted.total.dense if part else 0.0
        meet(members)
        assert alike(members)
        expected, held = dense.update.step(start, total, slots)
        torch.testing.assert_close(dense.flat.detach(), expected, rtol=1e-6, atol=1e-7)
        for mine, theirs in zip(dense.slots, held, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        assert (members[0].learner.engine.table != table).any()


def test_a_group_of_gradients_is_one_learner_where_one_rank_has_all_events() -> None:
    said = {"worker": {"engine": "eager"}, "group": {"merge": "gradient"}}
    members, alone = crew(config(**said), 2), Member(config(**said), 0, 1)
    for n in range(6):
        for member in (members[1], alone):
            member.learn(("abc"[n % 3], "uvw"[n // 2], n % 2))
        meet(members)
    assert digest(members[0].common()) == digest(members[1].common()) == digest(alone.common())


@pytest.mark.parametrize("kind", ["fused", "outer", "tables", "ema"])
def test_a_group_goes_on_from_its_state_to_the_bit(kind: str) -> None:
    made = config(**KINDS[kind])
    members = crew(made, 2)
    for n in range(2):
        for rank, member in enumerate(members):
            member.learn(*[("abcdef"[(n + i) % 6], "uvwxyz"[i + rank], i % 2) for i in range(4)])
        meet(members)
    saved = [copy.deepcopy((m.learner.state_dict(), m.merge.state_dict())) for m in members]
    resumed = crew(made, 2)
    for member, (learner, merge) in zip(resumed, saved, strict=True):
        member.learner.load_state_dict(learner)
        member.merge.load_state_dict(merge)
        member.time = members[0].time
    assert digest(saved[0][1]) == digest(saved[1][1])
    for each in (members, resumed):
        for rank, member in enumerate(each):
            member.learn(*[("abcdef"[(5 + i) % 6], "uvwxyz"[i + rank], i % 2) for i in range(4)])
        meet(each)
    assert digest(members[0].common()) == digest(resumed[0].common())


def test_whoever_follows_rows_is_told_of_those_that_others_have_moved() -> None:
    made = config()
    learner, told = Learner(made), set[int]()
    learner.engine.watch = lambda ids: told.update(ids.tolist())
    members = crew(made, 2)
    members[0].learner = learner
    members[0].merge = merge_of(made, learner, Ranks(0, 2))
    before = learner.engine.table.clone()
    members[1].learn(("a", "u", 1))
    meet(members)
    moved = (learner.engine.table != before).any(1).nonzero().squeeze(1).tolist()
    assert moved and set(moved) <= told


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"group": {"merge": "gradient"}}, "gradient needs worker.engine = eager"),
        ({"plasticity": [{"kind": "redo"}]}, "no meaning yet for plasticity redo"),
        ({"plugins": [{"kind": "previous"}]}, "keep other weights: previous"),
    ],
)
def test_what_has_no_meaning_in_a_group_is_refused_by_name(said: Any, text: str) -> None:
    made = config(**said)
    with pytest.raises(ConfigError, match=text):
        merge_of(made, Learner(made), Ranks(0, 2))


def test_ranks_that_have_not_begun_with_one_model_do_not_meet() -> None:
    members = [Member(config(seed=seed), seed, 2) for seed in range(2)]
    before = digest(members[0].learner.state_dict())
    with pytest.raises(StreamclError, match="not begun with one model"):
        meet(members)
    assert digest(members[0].learner.state_dict()) == before


class _Threads(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(table))
        self.table, self.meeting = table, barrier

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.table[self.rank] = tensor
        self.meeting.wait()
        found = list(self.table)
        self.meeting.wait()
        return found


def test_meeting_is_saying_and_hearing() -> None:
    made = config()
    table: list[Any] = [None] * 2
    barrier = threading.Barrier(2)
    by_meeting, by_hand = crew(made, 2), crew(made, 2)
    for members in (by_meeting, by_hand):
        members[0].learn(("a", "u", 1))
        members[1].learn(("b", "u", 0), ("b", "v", 1))
    for rank, member in enumerate(by_meeting):
        member.merge.ranks = _Threads(rank, table, barrier)
    threads = [threading.Thread(target=member.merge.meet, args=(member.examples,)) for member in by_meeting]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meet(by_hand)
    assert alike(by_meeting) and digest(by_meeting[0].common()) == digest(by_hand[0].common())
