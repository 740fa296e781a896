"""Simulated delays are what they are said to be, and every method answers every event."""

from __future__ import annotations

import numpy as np
import pytest

from streamcl.bench.stream_delay import LOSSES, MEAN, NAIVE, ORACLE, WAITING, WINDOW, delayed, interleaved, scores_of
from streamcl.bench.streams import LABEL, TIME, Dataset


def dataset(count: int) -> Dataset:
    payloads = [{"user": n % 7, "n": n, TIME: float(n), LABEL: int(n % 7 < 3)} for n in range(count)]
    return Dataset("simulated", {"user": "categorical"}, payloads)


@pytest.mark.parametrize("kind", ["exponential", "heavy"])
def test_positives_alone_come_late_and_by_their_law(kind: str) -> None:
    """The median of the exponential is ln 2 of its mean, of the Pareto twice its least; within 4 deviations."""
    count = 70_000
    data = dataset(count)
    late = delayed(data, kind, 0)
    positive = data.labels() > 0.5
    assert np.isinf(late.delays[~positive]).all()
    assert (late.delays[positive] >= 1.0).all()
    median = {"exponential": np.log(2), "heavy": 0.2}[kind] * MEAN * count
    assert abs(np.mean(late.delays[positive] > median) - 0.5) < 4 * 0.5 / np.sqrt(positive.sum())
    assert late.labels.sum() == (late.delays <= WINDOW * count).sum()
    assert not np.array_equal(late.delays, delayed(data, kind, 1).delays)


def test_interleaved_events_are_the_same_events_in_another_order() -> None:
    data = dataset(200)
    mixed = interleaved(data, 200, 0)
    assert sorted(payload["n"] for payload in mixed.payloads) == list(range(200))
    assert list(mixed.payloads) != list(data.payloads)


@pytest.mark.parametrize("method", [ORACLE, NAIVE, WAITING, *LOSSES])
def test_every_event_is_answered(method: str) -> None:
    scores = scores_of(delayed(dataset(300), "exponential", 0), method, 0)
    assert len(scores) == 300
    assert ((scores >= 0.0) & (scores <= 1.0)).all()
