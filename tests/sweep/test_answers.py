from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from streamcl import backtest
from streamcl.config import Config
from streamcl.stations import Task
from streamcl.sweep.answers import Answers, figures, losses
from streamcl.sweep.log import begin, follow, scan
from tests.sweep.logs import shop


def answers(events: list[int], labels: list[float], served: list[float] | None = None) -> Answers:
    scores = np.array(served or [0.5] * len(events), np.float32).reshape(-1, 1)
    return Answers(np.array(events, np.int64), np.array(labels, np.float64), scores, np.zeros(len(events), np.int64))


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_figures_are_the_workers_own(tmp_path: Path, task: Task) -> None:
    """Whole stream and window; but for the AUC of the whole stream, which the worker bins: see `auc_bound`."""
    data = Config.load(shop(tmp_path)).model_dump(mode="json")
    config = Config.parse({**data, "task": task, "model": {"kind": "logistic", "classes": 2}})
    with contextlib.closing(backtest.build(backtest.redirected(config, {}))) as worker:
        log = scan(config)
        begin(worker, log)
        outcomes = [outcome for turn, _ in follow(worker, log, 0, log.events) for outcome in turn.outcomes]
        told = worker.metrics.read()
    found = figures(task, Answers.of(outcomes).once(), config.metrics.window)
    shared = (told.keys() & found.keys()) - {"auc"}
    assert len(shared) == {"binary": 13, "multiclass": 8, "regression": 6}[task]
    assert {name: found[name] for name in shared} == pytest.approx({name: told[name] for name in shared}, abs=1e-9)
    if task == "binary":
        assert abs(found["auc"] - told["auc"]) <= told["auc_bound"]
        assert found["gauc"] == pytest.approx(0.5, abs=0.1)  # a click depends on who it is alone


def test_an_event_counts_once_with_its_last_label_where_it_came_first() -> None:
    found = answers([7, 3, 9, 3], [0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]).once()
    assert found.events.tolist() == [7, 3, 9]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.served[:, 0].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_others_are_judged_by_the_bases_labels_on_the_events_of_both() -> None:
    ours, theirs, differ = answers([4, 2, 1], [0, 1, 0], [0.4, 0.2, 0.1]).judged_by(answers([1, 2, 3], [0, 0, 1]))
    assert ours.events.tolist() == theirs.events.tolist() == [1, 2]
    assert ours.labels.tolist() == theirs.labels.tolist() == [0, 0]
    assert ours.served[:, 0].tolist() == pytest.approx([0.1, 0.2])
    assert differ == 1


def test_nothing_answered_has_no_figures() -> None:
    for task in ("binary", "multiclass", "regression"):
        found = figures(task, Answers.joined([Answers.of(())]), 10)
        assert set(found) == {"examples", "unscored"}


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    found = answers([1, 2], [1.0, 0.0], [float("nan"), 0.5])
    assert figures("binary", found, 10)["unscored"] == 1
    assert figures("binary", found, 10)["log_loss"] == pytest.approx(np.log(2))
    assert not np.isfinite(losses("binary", found)[0])
