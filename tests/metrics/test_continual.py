"""Hand-made traces with known answers, and what holds for every trace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl.metrics.continual import (
    BySegment,
    Trace,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    min_accuracy,
    prequential_accuracy,
    scenarios,
    stability_gap,
    time_buckets,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from streamcl.records import Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.testing import check_stateful

R = np.array([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 1.0]])

TRACE = Trace(
    np.array(
        [
            [0.4, 0.1, 0.0],
            [0.9, 0.2, 0.1],  # segment 0 learned
            [0.3, 0.5, 0.2],  # dips to .3 ...
            [0.5, 0.9, 0.2],
            [0.6, 0.8, 0.3],  # ... and is back at .6; segment 1 learned
            [0.2, 0.4, 0.8],
            [0.7, 0.5, 1.0],
        ]
    ),
    np.array([0, 0, 1, 1, 1, 2, 2]),
)


def test_a_known_matrix_has_known_figures() -> None:
    assert average_accuracy(R) == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert backward_transfer(R) == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert forward_transfer(R, [0.5, 0.1, 0.1]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
    assert time_buckets(R) == pytest.approx(((0.9 + 0.8 + 1.0) / 3, (0.6 + 0.7 + 0.5) / 3, (0.2 + 0.1 + 0.3) / 3))


def test_the_matrix_is_the_trace_where_each_segment_ends() -> None:
    assert TRACE.ends.tolist() == [1, 4, 6]
    assert TRACE.matrix().tolist() == R.tolist()
    assert TRACE.learned == 3


def test_a_known_trace_has_known_worst_cases() -> None:
    assert min_accuracy(TRACE) == pytest.approx((0.2 + 0.4) / 2)
    assert worst_case_accuracy(TRACE) == pytest.approx(1.0 / 3 + 2 / 3 * 0.3)


def test_a_known_trace_has_known_falls_and_rises_in_a_window() -> None:
    assert windowed_forgetting(TRACE, 2) == pytest.approx((0.6 + 0.4 + 0.0) / 3)
    assert windowed_forgetting(TRACE, 7) == pytest.approx((0.7 + 0.5 + 0.0) / 3)  # .9 to .2, .9 to .4
    assert windowed_plasticity(TRACE, 2) == pytest.approx((0.5 + 0.4 + 0.2) / 3)
    assert windowed_plasticity(TRACE, 7) == pytest.approx((0.5 + 0.4 + 0.2) / 3)


def test_the_gap_is_the_dip_that_heals_and_not_what_stays_lost() -> None:
    # Segment 0 while 1 is learned: .9, down to .3, .6 after. While 2 is: .6, .2, .7; segment 1 then: .8, .4, .5.
    assert stability_gap(TRACE) == pytest.approx((0.3 + 0.4 + 0.1) / 3)
    plain_forgetting = Trace(np.array([[1.0, 0.0], [0.6, 0.5], [0.2, 1.0]]), np.array([0, 1, 1]))
    assert stability_gap(plain_forgetting) == 0.0
    assert backward_transfer(plain_forgetting.matrix()) == pytest.approx(-0.8)


def test_with_one_segment_nothing_is_transferred_yet() -> None:
    trace = Trace(np.array([[0.5, 0.1], [0.7, 0.2]]), np.array([0, 0]))
    r = trace.matrix()
    assert average_accuracy(r) == worst_case_accuracy(trace) == 0.7  # nothing is known of segment 1 yet
    undefined = backward_transfer(r), forward_transfer(r, [0.1, 0.1]), forgetting(r), min_accuracy(trace)
    assert all(math.isnan(value) for value in (*undefined, stability_gap(trace)))


@pytest.mark.parametrize("during", [[1, 1], [0, 2], [1, 0], [0, 1, 1], []])
def test_a_trace_out_of_order_is_refused(during: list[int]) -> None:
    with pytest.raises(ValueError, match="during"):
        Trace(np.zeros((len(during) or 2, 2))[:2], np.array(during, np.int64))


def test_an_accuracy_in_percent_or_missing_is_refused() -> None:
    for wrong in (98.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="accuracy"):
            Trace(np.array([[wrong]]), np.array([0]))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Of one to four segments, each evaluated one to four times."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    during = np.repeat(np.arange(len(counts)), counts)
    columns = len(counts) + draw(st.integers(0, 2))
    cells = st.integers(0, 20).map(lambda hits: hits / 20)
    flat = draw(st.lists(cells, min_size=len(during) * columns, max_size=len(during) * columns))
    return Trace(np.array(flat).reshape(len(during), columns), during)


@given(traces(), st.integers(2, 6))
def test_figures_keep_their_bounds(trace: Trace, window: int) -> None:
    r, earlier = trace.matrix(), trace.learned - 1
    assert 0 <= average_accuracy(r) <= 1
    assert 0 <= worst_case_accuracy(trace) <= 1
    assert worst_case_accuracy(trace) <= average_accuracy(r) + 1e-12
    assert 0 <= windowed_forgetting(trace, window) <= windowed_forgetting(trace, window + 1) <= 1
    assert 0 <= windowed_plasticity(trace, window) <= windowed_plasticity(trace, window + 1) <= 1
    if earlier:
        assert -1 <= backward_transfer(r) <= 1
        assert forgetting(r) >= -backward_transfer(r) - 1e-12  # the best is at least what it was when learned
        assert min_accuracy(trace) <= r[-1, :earlier].mean() + 1e-12
        assert 0 <= stability_gap(trace) <= 1
        assert np.isfinite(forward_transfer(r, np.zeros(r.shape[1])))


def slow_min_accuracy(trace: Trace) -> float:
    lows = []
    for j in range(trace.learned - 1):
        after = [n for n in range(len(trace.during)) if trace.during[n] > j]
        lows.append(min(float(trace.accuracy[n, j]) for n in after))
    return sum(lows) / len(lows) if lows else math.nan


def slow_fall(trace: Trace, window: int, sign: int) -> float:
    falls = []
    for j in range(trace.learned):
        rows = [n for n in range(len(trace.during)) if trace.during[n] >= j]
        pairs = [(m, n) for m in rows for n in rows if m <= n < m + window]
        falls.append(max(sign * float(trace.accuracy[m, j] - trace.accuracy[n, j]) for m, n in pairs))
    return sum(falls) / len(falls)


@given(traces(), st.integers(2, 6))
def test_the_figures_are_those_of_the_obvious_loops(trace: Trace, window: int) -> None:
    assert min_accuracy(trace) == pytest.approx(slow_min_accuracy(trace), nan_ok=True)
    assert windowed_forgetting(trace, window) == pytest.approx(slow_fall(trace, window, 1))
    assert windowed_plasticity(trace, window) == pytest.approx(slow_fall(trace, window, -1))


@given(traces())
def test_an_evaluation_said_twice_changes_nothing_but_windows(trace: Trace) -> None:
    twice = Trace(trace.accuracy.repeat(2, 0), trace.during.repeat(2))
    for figure in (min_accuracy, worst_case_accuracy, stability_gap):
        assert figure(twice) == pytest.approx(figure(trace), nan_ok=True)
    assert twice.matrix().tolist() == trace.matrix().tolist()


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        windowed_forgetting(TRACE, 1)


def test_three_scenarios_of_the_same_logits() -> None:
    members = [[0, 1], [2, 3]]
    logits = [
        [5, 1, 0, 0],  # right, whoever asks
        [0, 1, 5, 0],  # class 0 or 1? 1, right. Which role? the first, wrong
        [0, 1, 0, 5],  # role and task are right, the class is of the other segment
        [9, 1, 2, 0],  # task and role: the first, right
        [3, 4, 2, 1],  # the role is wrong: of its own classes the first would have been right
    ]
    found = scenarios(logits, [0, 1, 1, 2, 2], [0, 0, 0, 1, 1], members)
    assert found.task_incremental == pytest.approx(5 / 5)
    assert found.domain_incremental == pytest.approx(3 / 5)
    assert found.class_incremental == pytest.approx(1 / 5)


@given(st.integers(0, 1000), st.permutations(range(3)))
def test_class_incremental_is_never_easier_and_the_names_of_segments_do_not_matter(seed: int, order: list[int]) -> None:
    draws = np.random.default_rng(seed)
    members = draws.permutation(7)[:6].reshape(3, 2)  # one class belongs to nobody
    logits, segments = draws.integers(0, 3, (20, 7)), draws.integers(0, 3, 20)
    labels = members[segments, draws.integers(0, 2, 20)]
    found = scenarios(logits, labels, segments, members)
    assert found.class_incremental <= min(found.task_incremental, found.domain_incremental)
    renamed = np.argsort(order)
    assert scenarios(logits, labels, renamed[segments], members[order]) == found


def test_prequential_accuracy_is_the_share_of_right_answers_so_far() -> None:
    assert prequential_accuracy([1, 0, 0, 1]).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])


def answered(n: int, served: list[float], label: float, segment: str) -> Outcome:
    nothing = Encoded(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    scores: NDArray[np.float32] = np.array(served, np.float32)
    ticket = Ticket(str(n), float(n), nothing, Scores(scores, scores, 0), Origin("events", 0, n), segment)
    return Outcome(ticket, label, Fate.JOINED, 0.0)


def test_the_live_accuracy_of_each_segment_is_that_of_its_own_answers() -> None:
    live = BySegment()
    assert live.read() == {}
    for n, (score, label, segment) in enumerate([(0.9, 1, "a"), (0.2, 1, "a"), (0.5, 1, "b"), (0.1, 0, "a")]):
        assert live.update(answered(n, [score], float(label), segment)) == ()
    assert live.update(answered(4, [0.1, 0.2, 0.7], 1.0, "c")) == ()
    assert live.accuracies() == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 0.0})
    assert live.read() == pytest.approx(
        {
            "segments": 3.0,
            "segment_accuracy_current": 0.0,
            "segment_accuracy_worst": 0.0,
            "segment_accuracy_mean": 5 / 9,
        }
    )


def test_the_segment_heard_of_longest_ago_gives_way() -> None:
    live = BySegment(most=2)
    for n, segment in enumerate("abac"):
        live.update(answered(n, [1.0], 1.0, segment))
    assert list(live.accuracies()) == ["a", "c"]


def test_the_live_accuracy_goes_on_from_any_point() -> None:
    def exercise(live: BySegment, step: int) -> dict[str, Any]:
        live.update(answered(step, [step % 3 / 2], float(step % 2), f"{step // 2 % 5}"))
        return live.accuracies() | live.read()

    check_stateful(lambda: BySegment(most=3), exercise, steps=15)
