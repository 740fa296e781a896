from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import signal, stats

from streamcl.sweep.significance import difference, holm

REPEATS, EVENTS, PHI = 400, 6_000, 0.5


def autocorrelated(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """AR(1) with PHI: what two models that are equally good may differ by, event after event."""
    return np.asarray(signal.lfilter([1.0], [1.0, -PHI], rng.normal(size=count + 100))[100:])


def test_equally_good_models_are_told_apart_as_often_as_the_level_says() -> None:
    """Of 400 at .05, 20 are expected, deviation 4.4; four of them on either side.

    A test that takes the events for independent has a standard error too small by sqrt((1 + PHI) / (1 - PHI)) = 1.73
    and sees a difference in 26 %: 103, deviation 8.8.
    """
    rng = np.random.default_rng(1)
    rows = [autocorrelated(EVENTS, rng) for _ in range(REPEATS)]
    alarms = sum(difference(row).p < 0.05 for row in rows)
    assert 20 - 4 * 4.4 < alarms < 20 + 4 * 4.4
    naive = sum(stats.ttest_1samp(row, 0.0).pvalue < 0.05 for row in rows)
    assert naive > 103 - 4 * 8.8


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 400 intervals of 95 %, 380 hold it, deviation 4.4."""
    rng = np.random.default_rng(2)
    found = [difference(0.1 + autocorrelated(EVENTS, rng)) for _ in range(REPEATS)]
    assert abs(sum(each.low <= 0.1 <= each.high for each in found) - 380) < 4 * 4.4


def test_a_true_difference_is_seen() -> None:
    """.1 is five times the standard error, 2 / sqrt(10,000) = .02."""
    found = difference(-0.1 + autocorrelated(10_000, np.random.default_rng(3)))
    assert found.p < 0.001
    assert found.high < 0


def test_the_same_answers_are_no_difference_at_all() -> None:
    found = difference(np.zeros(1_000))
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_too_few_events_say_nothing() -> None:
    found = difference(np.random.default_rng(0).normal(size=199))
    assert math.isnan(found.p)
    assert math.isnan(difference(np.zeros(0)).mean)
    assert not math.isnan(difference(np.random.default_rng(0).normal(size=200)).p)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]) -> None:
    level, rejected = 0.05, set[int]()
    for rank, at in enumerate(sorted(range(len(ps)), key=lambda at: ps[at])):
        if ps[at] * (len(ps) - rank) > level:
            break
        rejected.add(at)
    assert {at for at, p in enumerate(holm(ps)) if p <= level} == rejected
