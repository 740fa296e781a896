"""Further tasks from payload to metrics: labels that come late, early, never, or without one of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamcl.config import Config
from streamcl.learner import Learner
from streamcl.metrics import Prequential, TaskMetrics
from streamcl.readings import Reported, Shards
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.testing import check_stateful, equal_states
from tests.journey import BROKER, Item, click, die_after, fill, finish, repeat, settings, view
from tests.test_worker import letters

TASKS = {"like": {"label": "liked"}, "buy": {"label": "shop.bought", "default": 0}}


def tasked(folder: Path, **changes: Any) -> Config:
    model = {"kind": "mmoe", "embedding_dim": 2, "hidden": [4], "multitask": {"experts": 2, "hidden": [3]}}
    return settings(folder, **{"tasks": TASKS, "model": model, **changes})


def outcome(label: float, also: tuple[float, ...] = (), fate: Fate = Fate.JOINED, **served: float) -> Outcome:
    notes = {f"task.{name}": np.array([value], np.float32) for name, value in served.items()}
    scores = Scores(np.zeros(1, np.float32), np.array([0.5], np.float32), 0, (), notes)
    empty = np.zeros(0, np.float32)
    ticket = Ticket("1", 0.0, Encoded(np.zeros(0, np.int64), empty, empty), scores, Origin(EVENTS, 0, 0))
    return Outcome(ticket, label, fate, 0.0, also)


def test_each_task_is_measured_over_the_events_whose_label_is_known() -> None:
    metrics, alone = TaskMetrics(["like", "buy"], 8), Prequential("binary", 8, 2)
    metrics.update([outcome(1.0, (0.0, 1.0), buy=0.25, like=0.75), outcome(1.0, (math.nan, 0.0), buy=0.25, like=0.75)])
    metrics.update([outcome(1.0, (1.0, 1.0))])  # of a ticket without their scores
    metrics.update([outcome(0.0, fate=Fate.EXPIRED, buy=0.5, like=0.5)])
    for label, served in ((1.0, 0.75), (0.0, 0.75), (0.0, 0.5)):
        alone.add([label], [np.array([served], np.float32)])
    told = metrics.read()
    assert {name: told[f"task_like.{name}"] for name in alone.read()} == alone.read()
    assert told["task_buy.examples"] == 2


def test_they_resume_to_the_bit() -> None:
    def exercise(metrics: TaskMetrics, step: int) -> Any:
        metrics.update([outcome(1.0, (float(step % 2), math.nan), buy=0.1 * step, like=0.5)])
        return metrics.read()

    check_stateful(lambda: TaskMetrics(["like", "buy"], 3), exercise, steps=6)


def stream() -> list[Item]:
    """Views a second apart; of ten, labels of six come late, one early, one is sent twice, and two never come."""
    items = [view(n, float(n)) for n in range(40)]
    for n in range(40):
        fields: dict[str, Any] = {"liked": n % 2} if n % 3 else {}
        fields |= {"shop": {"bought": 1}} if n % 4 == 1 else {}
        if n % 10 < 7:
            items.append(click(n, n + 4.5, **fields))
        if n % 10 == 7:
            items.append(click(n, n - 0.5, **fields))
        if n % 10 == 3:
            items.append(click(n, n + 6.5, liked=0))
    return sorted(items, key=lambda item: item.time_s)


def test_labels_of_all_tasks_travel_with_the_first(tmp_path: Path) -> None:
    fill(stream())
    found = finish(tasked(tmp_path))
    told = found.worker.readings()
    counts = found.worker.counts
    assert counts["learned"] == counts["joined"] + counts["expired"] == told["task_buy.examples"]
    unknown = sum(n % 10 < 8 and n % 3 == 0 for n in range(40))
    assert told["task_like.examples"] == counts["learned"] - unknown
    bought = sum(n % 10 < 8 and n % 4 == 1 for n in range(40))
    assert told["task_buy.base_rate"] == pytest.approx(bought / counts["learned"])
    said = [json.loads(message.value or b"") for message in found.scores]
    assert all(0.0 < each["tasks"][name] < 1.0 for each in said for name in TASKS)
    assert said[-1]["tasks"]["like"] != said[0]["tasks"]["like"] != said[-1]["score"]
    assert isinstance(found.worker.learner, Learner)
    rows = found.worker.learner.memory.columns["tasks"]
    assert rows.shape == (8, 2)
    assert np.isnan(rows[:, 1]).any()
    assert not np.isnan(rows[:, 0]).any()


@pytest.mark.parametrize("kind", ["deepfm", "mmoe", "recurrent"])
def test_a_killed_worker_of_several_tasks_equals_one_that_was_not(tmp_path: Path, kind: str) -> None:
    model = {"kind": kind, "embedding_dim": 2, "hidden": [4], "recurrent": {"units": 2, "keys": 8}}
    fill(stream())
    whole = finish(tasked(tmp_path / "whole", model=model))
    for turns in (3, 6):
        fill(stream())
        config = tasked(tmp_path / f"{turns}", model=model)
        die_after(config, turns)
        assert finish(config).digest == whole.digest
    assert repeat(config).digest == whole.digest


def test_inline_labels_stand_in_the_event(tmp_path: Path) -> None:
    events = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}
    config = tasked(tmp_path, labels=None, events={**events, "unknown_fields": "dead_letter"})
    fill([view(n, float(n), clicked=n % 2, liked=None if n % 4 else 1, shop={"bought": True}) for n in range(8)])
    told = finish(config).worker.readings()
    assert (told["task_like.examples"], told["task_like.base_rate"]) == (2, 1.0)
    assert (told["task_buy.examples"], told["task_buy.base_rate"]) == (8, 1.0)


def test_a_label_that_is_none_of_a_task_goes_to_the_dead_letters(tmp_path: Path) -> None:
    fill([view(0, 0.0), click(0, 1.0, liked=0.5), view(1, 2.0), click(1, 3.0, shop={"bought": "yes"})])
    finish(tasked(tmp_path))
    errors = [letter["error"] for letter in letters()]
    assert errors == [
        "field 'liked': the label must be an integer from 0 to 1",
        "field 'shop.bought': expected a number, not string",
    ]


def test_prometheus_tells_tasks_apart_by_a_label(tmp_path: Path) -> None:
    fill(stream())
    shards = Shards(labelled=False)
    worker = finish(tasked(tmp_path)).worker
    shards.by_index[0] = Reported()
    shards.by_index[0].readings = worker.readings()
    families = {family.name: family for family in shards.collect()}
    assert {sample.labels["task"] for sample in families["streamcl_task_auc"].samples} == set(TASKS)
    assert not [name for name in families if "like" in name]


def test_an_old_orphan_has_no_further_labels(tmp_path: Path) -> None:
    fill([click(0, 1.0)])
    worker = finish(settings(tmp_path)).worker
    state = worker.joiner.state_dict()
    assert all(len(orphan) == 6 for orphan in state["orphans"])
    worker.joiner.load_state_dict(state)
    assert equal_states(worker.joiner.state_dict(), state)
