from typing import Any

import numpy as np
import pytest
import torch

from streamcl.continual.forgetting_curve import Engrams, ForgettingCurve, useful_recalls
from streamcl.learner import Learner
from streamcl.plugin import Plan, Step
from streamcl.records import Selector
from tests.continual.rows import held, made, resumes
from tests.test_learner import stream


def visit(rows: list[int], before: list[float], now: list[float], number: int = 50) -> Step:
    """A step in which these rows are replayed, with the losses of their last visits and of this one."""
    step = Step(number, Plan(), None, None, torch.ones(len(rows)), index=torch.tensor(rows))
    step.columns = {"loss": torch.tensor(before)}
    step.losses = torch.tensor(now)
    return step


def test_a_recall_was_useful_if_the_loss_has_fallen_by_more_than_the_margin() -> None:
    rows, helped = useful_recalls(visit([4, 2, 7, 2], [1.0, 1.0, 1.0, 1.0], [0.5, 0.97, 1.2, 0.97]), 0.05)
    assert rows.tolist() == [2, 4, 7]
    assert helped.tolist() == [False, True, False]


@pytest.mark.parametrize("clock", ["steps", "event_time"])
def test_rows_fade_by_age_and_strength_from_the_last_useful_recall(clock: str) -> None:
    plugin, learner = held([{"kind": "forgetting_curve", "clock": clock, "growth": 2.0}], 5, "plugin")
    assert isinstance(plugin, ForgettingCurve)
    memory = learner.memory
    memory.columns["recalls"][:5] = memory.columns["recalled"][:5] = 0
    memory.columns["written"][:5] = memory.owners.times[:5] = [10, 20, 30, 40, 48]
    plugin.time_s = 50.0
    plugin.after(visit([0, 2], [1.0, 1.0], [0.1, 2.0], number=49))  # row 0 to use, row 2 not; now is 50
    plugin.steps, plugin.time_s = 60, 60.0
    expected = [-10 / 3, -40.0, -30.0, -20.0, -12.0]
    np.testing.assert_allclose(plugin.scores(memory), expected)
    assert plugin.place(0.0, memory) == 1


def test_draws_alone_strengthen_nothing_unless_that_is_asked_for() -> None:
    for reinforce, recalls in (("useful", 0.0), ("draw", 2.0)):
        plugin, learner = held([{"kind": "forgetting_curve", "reinforce": reinforce}], 5, "plugin")
        learner.memory.columns["recalls"][:5] = 0
        plugin.after(visit([1, 3, 3], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]))  # type: ignore[attr-defined]
        assert learner.memory.columns["recalls"][:5].sum() == recalls


def test_without_any_recall_it_is_the_memory_of_the_newest() -> None:
    learner = Learner(made(["forgetting_curve"], "plugin", per_event=0))
    for item in stream("multiclass", 70):
        learner.learn(item)
    assert sorted(learner.memory.owners.times[:20].tolist()) == list(range(50, 70))


def test_an_engram_lives_for_its_span_and_longer_for_each_useful_recall() -> None:
    plugin, learner = held([{"kind": "engrams", "lifespan": 30.0, "gain": 7.0}], 4, "plugin")
    assert isinstance(plugin, Engrams)
    learner.memory.columns["written"][:4], learner.memory.columns["life"][:4] = [10, 12, 14, 16], 0
    plugin.after(visit([0, 3], [1.0, 1.0], [0.5, 1.5], number=19))
    assert plugin.scores(learner.memory).tolist() == [27.0, 22.0, 24.0, 26.0]
    assert plugin.place(0.0, learner.memory) == 1


def tied(size: int = 6) -> tuple[Engrams, Learner]:
    plugin, learner = held(["engrams"], size, "plugin")
    assert isinstance(plugin, Engrams)
    for name in ("tie", "tie_written", "tie_count"):
        learner.memory.columns[name][:] = 0
    learner.memory.columns["written"][:size] = np.arange(size) + 100
    return plugin, learner


def test_rows_recalled_together_call_each_other() -> None:
    plugin, learner = tied()
    for _ in range(3):
        plugin.strengthen(np.array([1, 4]))
    calls: dict[int, set[int]] = {}
    for number in range(60):
        first, second = plugin.pick(2, number, learner.memory)[0].tolist()
        calls.setdefault(first, set()).add(second)
    assert calls[1] == {4}
    assert calls[4] == {1}
    assert all(len(calls[row]) > 1 for row in (0, 2, 3, 5))  # uniform


def test_a_tie_to_a_row_that_has_been_overwritten_is_none() -> None:
    plugin, learner = tied()
    plugin.strengthen(np.array([1, 4]))
    learner.memory.columns["written"][4] = 500
    called = {plugin.pick(2, number, learner.memory)[0].tolist()[1] for number in range(60)}
    assert len(called) > 3


def test_ties_are_few_and_the_most_frequent_ones_stay() -> None:
    plugin, learner = tied(12)
    for _ in range(10):
        for other in (*range(1, 12), 5, 5):
            plugin._tie(0, other)
    held_ties = learner.memory.columns["tie"][0][learner.memory.columns["tie_count"][0] > 0]
    assert 5 in held_ties  # 30 of 130 > 130 / (4 + 1): Misra and Gries keep it


def test_ties_follow_their_rows_when_others_are_forgotten() -> None:
    plugin, learner = tied()
    plugin.strengthen(np.array([1, 4]))
    plugin.strengthen(np.array([2, 5]))
    times = learner.memory.owners.times
    learner.forget(Selector(from_s=float(times[2]), until_s=float(times[2]) + 0.5))
    assert len(learner.memory) == 5
    columns = learner.memory.columns
    assert (columns["tie"][1][0], columns["tie_count"][1][0]) == (3, 1)  # 4 has moved to 3
    assert (columns["tie"][3][0], columns["tie_count"][3][0]) == (1, 1)
    assert columns["tie_count"][4].sum() == 0  # 5, now 4, was tied to the one that is gone


@pytest.mark.parametrize(
    "settings", [{"kind": "forgetting_curve"}, {"kind": "forgetting_curve", "clock": "event_time"}, {"kind": "engrams"}]
)
def test_fading_is_resumed_to_the_bit(settings: dict[str, Any]) -> None:
    assert resumes([settings], "plugin")
