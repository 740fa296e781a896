import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from streamcl.metrics import Prequential
from streamcl.records import Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.stations import Task

NOTHING = Encoded(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
TASKS: list[Task] = ["binary", "multiclass", "regression"]


def outcome(label: float, served: ArrayLike) -> Outcome:
    scores = np.asarray(served, dtype=np.float32)
    ticket = Ticket("id", 0.0, NOTHING, Scores(scores + 7, scores, 0), Origin("events", 0, 0))
    return Outcome(ticket, label, Fate.INLINE, 0.0)


def outcomes(task: Task, count: int, seed: int = 0) -> list[Outcome]:
    draws = np.random.default_rng(seed)
    width = 3 if task == "multiclass" else 1
    served = draws.dirichlet(np.ones(3), count)[:, :width]
    labels = draws.normal(size=count) if task == "regression" else draws.integers(0, max(width, 2), count)
    return [outcome(float(label), row) for label, row in zip(labels, served, strict=True)]


def plain(tree: Any) -> Any:
    """The state with its arrays spelt out, so that equality is bit by bit."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return (tree.dtype.str, tree.shape, tree.tobytes()) if isinstance(tree, np.ndarray) else tree


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 60), window=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_restore_at_any_point_equals_the_uninterrupted_run(task: Task, cut: int, window: int, seed: int) -> None:
    whole, first, second = (Prequential(task, window, 3) for _ in range(3))
    stream = outcomes(task, 60, seed)
    losses = [whole.update(o) for o in stream]
    before = [first.update(o) for o in stream[:cut]]
    second.load_state_dict(first.state_dict())
    assert before + [second.update(o) for o in stream[cut:]] == losses
    assert plain(second.state_dict()) == plain(whole.state_dict())
    assert second.read() == whole.read()


@pytest.mark.parametrize("task", TASKS)
def test_the_order_of_examples_changes_only_what_looks_back(task: Task) -> None:
    forward, backward = Prequential(task, 50, 3), Prequential(task, 50, 3)
    stream = outcomes(task, 50)
    for there, back in zip(stream, reversed(stream), strict=True):
        forward.update(there)
        backward.update(back)
    looks_back = "no_change", "baseline", "_decayed"
    one, two = (
        {name: value for name, value in metrics.read().items() if not any(each in name for each in looks_back)}
        for metrics in (forward, backward)
    )
    assert one == pytest.approx(two, rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_reading_and_saving_change_nothing(task: Task) -> None:
    quiet, asked = Prequential(task, 7, 3), Prequential(task, 7, 3)
    for o in outcomes(task, 30):
        quiet.update(o)
        asked.update(o)
        asked.read()
        asked.state_dict()
    assert plain(asked.state_dict()) == plain(quiet.state_dict())


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_of_what_update_returns_is_the_loss_that_read_reports(task: Task) -> None:
    metrics = Prequential(task, 7, 3)
    mean = sum(metrics.update(o) for o in outcomes(task, 40)) / 40
    read = metrics.read()
    assert mean == pytest.approx(read["rmse"] ** 2 if task == "regression" else read["log_loss"], rel=1e-12)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_finite_loss_is_counted_and_enters_no_sum(task: Task, bad: float) -> None:
    metrics, clean = Prequential(task, 7, 3), Prequential(task, 7, 3)
    for o in outcomes(task, 10):
        clean.update(o)
        metrics.update(o)
        assert not math.isfinite(metrics.update(outcome(bad, [0.5, 0.25, 0.25])))
        assert not math.isfinite(metrics.update(outcome(0.0, [math.nan] * 3)))
    assert metrics.read() == clean.read() | {"unscored": 20}


@pytest.mark.parametrize("task", TASKS)
@given(cuts=st.lists(st.integers(0, 60), max_size=5))
def test_many_at_once_are_to_the_bit_what_they_are_one_by_one(task: Task, cuts: list[int]) -> None:
    stream = outcomes(task, 60)
    stream.append(outcome(math.nan, stream[0].ticket.scores.served))
    single, many = Prequential(task, 7, 3), Prequential(task, 7, 3)
    losses: list[float] = []
    for start, end in pairwise([0, *sorted(cuts), len(stream)]):
        part = stream[start:end]
        losses += many.add([o.label for o in part], [o.ticket.scores.served for o in part])
    assert np.array_equal(losses, [single.update(o) for o in stream], equal_nan=True)
    assert plain(many.state_dict()) == plain(single.state_dict())


@pytest.mark.parametrize("task", TASKS)
def test_only_the_served_score_counts(task: Task) -> None:
    metrics = Prequential(task, 7, 3)
    certain = [1.0, 0.0, 0.0] if task == "multiclass" else [0.0]
    assert metrics.update(outcome(0.0, certain)) == pytest.approx(0, abs=2e-6)


@pytest.mark.parametrize("task", TASKS)
def test_every_value_is_finite_from_the_first_example_on(task: Task) -> None:
    metrics = Prequential(task, 4, 3)
    for o in outcomes(task, 12):
        assert all(math.isfinite(value) for value in metrics.read().values())
        metrics.update(o)


@pytest.mark.parametrize("task", TASKS)
def test_the_state_is_of_constant_size_and_holds_only_arrays_and_json(task: Task) -> None:
    def size(tree: Any) -> int:
        if isinstance(tree, dict):
            return sum(map(size, tree.values()))
        if isinstance(tree, np.ndarray):
            return tree.nbytes
        json.dumps(tree, allow_nan=False)
        return 8

    metrics, stream = Prequential(task, 5, 3), outcomes(task, 50)
    metrics.update(stream[0])
    early = size(metrics.state_dict())
    for o in stream:
        metrics.update(o)
    assert size(metrics.state_dict()) == early


def test_a_state_of_another_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics\.window"):
        Prequential("binary", 5, 2).load_state_dict(Prequential("binary", 6, 2).state_dict())
