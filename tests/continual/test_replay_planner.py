from typing import Any

import numpy as np
import pytest
import torch

from streamcl.continual.replay_planner import KFPF, Schedule, Spaced
from streamcl.learner import Learner
from streamcl.plugin import Plan, PluginError, Step
from tests.continual.rows import BOUNDARY, bound, chi_square, held, made, resumes
from tests.test_learner import learned, stream


def test_a_row_is_due_at_intervals_that_grow_with_its_visits() -> None:
    settings = {"kind": "spaced", "interval": 10.0, "growth": 2.0, "longest": 60.0}
    plugin, learner = held([settings], 5, hits=[0, 1, 2, 3, 60], last_seen=[0, 0, 0, 0, 0])
    assert isinstance(plugin, Spaced)
    np.testing.assert_allclose(plugin.overdue(learner.memory, 40), [4.0, 2.0, 1.0, 40 / 60, 40 / 60])
    plugin.steps = 40
    outcome = stream("multiclass", 1)[0]
    assert plugin.plan(Plan(draw=4), outcome, ()).draw == 3
    assert plugin.plan(Plan(draw=2), outcome, ()).draw == 2
    plugin.steps = 5
    assert plugin.plan(Plan(draw=4), outcome, ()).draw == 1
    assert plugin.pick(3, 40, learner.memory)[0].tolist() == [0, 1, 2]


def test_spaced_rows_are_visited_when_they_are_due_and_not_before() -> None:
    settings = {"kind": "spaced", "interval": 8.0, "growth": 1.0, "least": 0}
    learner = Learner(made([settings], "reservoir", per_event=20))
    seen: dict[int, int] = {}
    for item in stream("multiclass", 60):
        before = learner.memory.columns["last_seen"][: len(learner.memory)].copy()
        hits = learner.memory.columns["hits"][: len(learner.memory)].copy()
        learner.learn(item)
        now = learner.steps - 1
        for row in np.flatnonzero(learner.memory.columns["hits"][: len(before)] > hits):
            gap = now - int(before[row])
            seen[gap] = seen.get(gap, 0) + 1
    assert set(seen) == {8}


def test_arms_are_drawn_with_their_chances_and_rows_are_of_the_arm() -> None:
    plugin, learner = held([{"kind": "schedule", "explore": 0.3}])
    assert isinstance(plugin, Schedule)
    plugin.logs = np.log(np.array([0.5, 0.3, 0.2]))
    expected = 0.7 * np.array([0.5, 0.3, 0.2]) + 0.1
    counts = np.zeros(3)
    for number in range(1500):
        index, _ = plugin.pick(4, number, learner.memory)
        labels = set(learner.memory.y[index.numpy()].tolist())
        assert plugin.choice is not None
        assert labels == {float(plugin.choice[0])}
        counts[plugin.choice[0]] += 1
    assert chi_square(counts, expected) < bound(3)


def test_an_empty_class_is_never_chosen() -> None:
    plugin, learner = held(["schedule"])
    learner.memory.y[:20] = np.arange(20) % 2
    for number in range(100):
        plugin.pick(2, number, learner.memory)  # type: ignore[attr-defined]
        assert plugin.choice[0] < 2  # type: ignore[attr-defined]


def test_the_bandit_finds_the_arm_that_pays_and_follows_when_another_does() -> None:
    plugin, learner = held([{"kind": "schedule", "rate": 0.2, "share": 0.01}])
    assert isinstance(plugin, Schedule)
    for best in (2, 0):
        for number in range(600):
            number += 1000 * best
            plugin.pick(2, number, learner.memory)
            assert plugin.choice is not None
            plugin.before_loss = 1.0
            reward = 0.5 if plugin.choice[0] == best else 0.0
            plugin._probed = lambda _, left=1.0 - reward: left  # type: ignore[method-assign, misc]
            plugin.after(Step(number, Plan(), None, None, torch.ones(0)))
        assert plugin.chances(np.ones(3, np.bool_)).argmax() == best
        assert plugin.chances(np.ones(3, np.bool_))[best] > 0.6


def test_how_much_is_drawn_may_be_chosen_too() -> None:
    settings = {"kind": "schedule", "over": "amount", "amounts": [0, 2, 7]}
    learner, counts = Learner(made([settings])), set[int]()
    for item in stream("multiclass", 60):
        before = learner.memory.uniform

        def counted(n: int, step: int, before: Any = before) -> Any:
            counts.add(n)
            return before(n, step)

        learner.memory.uniform = counted  # type: ignore[method-assign]
        learner.learn(item)
        learner.memory.uniform = before  # type: ignore[method-assign]
    assert counts == {2, 7}


def test_boundaries_make_arms_of_segments_and_keep_their_number() -> None:
    learner = Learner(made([{"kind": "schedule", "over": "segment", "parts": 3}], "reservoir"))
    [plugin] = learner.plugins.values()
    assert isinstance(plugin, Schedule)
    for number, item in enumerate(stream("multiclass", 60)):
        assert learner.learn(item, [BOUNDARY] if number % 15 == 14 else [])
    assert len(plugin.logs) == 3
    assert len(plugin.strata.bounds) == 2


def finetuned(modules: list[str], **settings: Any) -> tuple[Learner, list[dict[str, bool]]]:
    """A learner with k-FPF, and for each step after a live one which parameters it has moved."""
    learner = Learner(made([{"kind": "k_fpf", "every": 5, "passes": 2, "draw": 3, "modules": modules, **settings}]))
    moved: list[dict[str, bool]] = []
    take = learner.engine.step

    def watching(step: Step) -> bool:
        before = {name: param.detach().clone() for name, param in learner.engine.dense.params.items()}
        before["table"] = learner.engine.table.clone()
        taken = take(step)
        after = {**learner.engine.dense.params, "table": learner.engine.table}
        if not step.plan.live:
            moved.append({name: not torch.equal(before[name], after[name]) for name in before})
        return taken

    learner.engine.step = watching  # type: ignore[method-assign]
    for item in stream("multiclass", 23):
        assert learner.learn(item)
    return learner, moved


def test_every_few_steps_the_memory_alone_moves_the_modules_that_are_named() -> None:
    learner, moved = finetuned(["deep.head"])
    names = [name for name in moved[0] if moved[0][name]]
    assert names
    assert all("head" in name for name in names)
    assert learner.read()["k_fpf_finetunings"] == 3  # with events 6, 12 and 18: five events lie between
    assert len(moved) == 6
    assert learner.steps == 23 + 6
    assert learner.version == 23


def test_without_names_those_move_that_moved_most() -> None:
    learner, moved = finetuned([], share=0.25)
    [plugin] = learner.plugins.values()
    assert isinstance(plugin, KFPF)
    count = max(1, round(0.25 * len(learner.engine.dense.params)))
    assert all(sum(each.values()) <= count for each in moved)
    assert len(plugin.chosen) == count
    best = np.argsort(-plugin.moved, kind="stable")[:count]
    assert set(plugin.chosen) == {list(learner.engine.dense.params)[place] for place in best}


def test_a_drift_brings_a_finetuning_when_asked_to() -> None:
    learner = Learner(made([{"kind": "k_fpf", "every": 0, "on": ["boundary"], "passes": 3}]))
    for number, item in enumerate(stream("multiclass", 20)):
        learner.learn(item, [BOUNDARY] if number == 12 else [])
    assert learner.steps == 23


def test_the_loss_of_the_event_is_kept_not_that_of_a_finetuning() -> None:
    outcomes = stream("multiclass", 6)
    plain = learned(made([{"kind": "by_loss", "uniform": 1.0}]), outcomes)
    tuned = learned(made([{"kind": "k_fpf", "every": 5}, {"kind": "by_loss", "uniform": 1.0}]), outcomes)
    assert tuned.steps == plain.steps + 1
    assert tuned.memory.columns["loss"][5] == plain.memory.columns["loss"][5]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "spaced", "interval": 4.0},
        {"kind": "schedule"},
        {"kind": "schedule", "over": "amount", "amounts": [1, 3]},
        {"kind": "schedule", "over": "segment", "parts": 2},
        {"kind": "schedule", "over": "age"},
        {"kind": "k_fpf", "every": 4},
    ],
)
def test_plans_are_resumed_to_the_bit(settings: dict[str, Any]) -> None:
    assert resumes([settings], "reservoir")


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(PluginError, match="k_fpf: no parameter begins with 'nose'"):
        Learner(made([{"kind": "k_fpf", "modules": ["nose"]}]))


@pytest.mark.parametrize("replay", [{"weight": 0.0}, {"retention": "none"}])
def test_a_finetuning_of_nothing_is_refused(replay: dict[str, Any]) -> None:
    config = made(["k_fpf"])
    changed = config.model_copy(update={"replay": config.replay.model_copy(update=replay)})
    with pytest.raises(PluginError, match="k_fpf: there is nothing to replay"):
        Learner(changed)
