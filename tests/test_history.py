"""What the status page remembers: bounded, by the clock on the wall, shards together as each figure asks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.history import COLUMNS, MARKS, History
from streamcl.readings import Reported
from streamcl.records import DeadLetter, Origin, Record, Signal, Stream, Turn

EVENTS_0 = Stream("events", 0)
ORIGIN = Origin("events", 0, 7)


def reported(position: int = 0, lag: int = 0, /, **readings: float | None) -> Reported:
    made = Reported()
    made.position, made.lag = {EVENTS_0: position}, {EVENTS_0: lag}
    made.readings = {name: value for name, value in readings.items() if value is not None}
    return made


def turn(records: int = 0, reasons: tuple[str, ...] = (), drifts: int = 0) -> Turn:
    letters = tuple(DeadLetter(Record(ORIGIN, "views", 0.0, b"{"), reason, "bad") for reason in reasons)
    signals = tuple(Signal("drift", "loss", ORIGIN) for _ in range(drifts))
    return Turn(records=records, position={}, dead_letters=letters, signals=signals)


@given(st.integers(1, 8), st.lists(st.sampled_from([None, 0.25, 0.5]), max_size=30), st.integers(-1, 40))
def test_the_ring_holds_the_newest_samples_and_no_more(size: int, losses: list[float | None], since: int) -> None:
    history = History(size)
    for at, loss in enumerate(losses):
        history.sample(float(at), {0: reported(log_loss_window=loss)})
    kept = [(at, loss) for at, loss in enumerate(losses)][-size:]
    expected = [(at, math.nan if loss is None else loss) for at, loss in kept if at > since]
    series = history.series([0], since)
    np.testing.assert_array_equal(np.column_stack([series["time"], series["loss"]]), np.array(expected).reshape(-1, 2))
    assert series.keys() == {"time", *COLUMNS}


def test_a_shard_that_left_is_forgotten_and_one_that_came_has_no_past() -> None:
    history = History(4)
    history.observe(0, turn(records=3))
    history.sample(0.0, {0: reported(auc_window=0.5)})
    history.left(0)
    history.sample(2.0, {1: reported(auc_window=0.7)})
    assert history.facts.keys() == {1}
    np.testing.assert_array_equal(history.series([0, 1])["auc"], [math.nan, 0.7])
    np.testing.assert_array_equal(history.series([0])["auc"], [math.nan, math.nan])


@pytest.mark.parametrize(
    ("column", "expected"),
    [("lag_records", 6.0), ("loss", 0.3), ("dormant", 0.4), ("lag_s", 2.0), ("calibration", 1.5)],
)
def test_shards_come_together_as_sum_mean_or_worst_and_what_is_unknown_counts_for_nothing(
    column: str, expected: float
) -> None:
    history = History(4)
    for at in range(2):
        first = reported(
            10, 2 * at, lag_s=1.0, log_loss_window=0.2, layer_0_dormant_ratio=0.1, layer_1_dormant_ratio=0.4
        )
        second = reported(5, 4 * at, log_loss_window=0.4, layer_0_dormant_ratio=0.2, calibration_window=1.5, lag_s=2.0)
        history.sample(2.0 * at, {0: first, 1: second})
    assert history.series([0, 1])[column][-1] == pytest.approx(expected)


def test_the_loss_of_a_constant_is_the_entropy_of_the_base_rate() -> None:
    history = History(2)
    history.sample(0.0, {0: reported(log_loss_window=0.45, ne_window=0.9)})
    assert history.series([0])["loss_constant"][0] == pytest.approx(0.5)


def test_a_regression_shows_its_root_mean_squared_error_against_that_of_the_mean() -> None:
    history = History(2)
    history.sample(0.0, {0: reported(rmse_window=0.8, baseline_rmse_window=1.0)})
    series = history.series([0])
    assert (series["loss"][0], series["loss_constant"][0]) == (0.8, 1.0)


def test_records_per_second_are_of_the_time_between_two_samples() -> None:
    history = History(4)
    for at, records in ((0.0, 50), (2.0, 10), (6.0, 20)):
        history.observe(0, turn(records))
        history.sample(at, {0: reported()})
    np.testing.assert_array_equal(history.series([0])["events_per_s"], [math.nan, 5.0, 5.0])


def test_frozen_weights_are_shown_beside_the_live_ones_on_the_same_sample() -> None:
    history = History(2)
    history.sample(0.0, {0: reported(**{"sampled:frozen:log_loss": 0.6, "sampled:live:log_loss": 0.5})})
    series = history.series([0])
    assert (series["loss_frozen"][0], series["loss_sampled"][0]) == (0.6, 0.5)


def test_facts_are_counted_by_shard_and_alarms_are_bounded() -> None:
    history = History(2)
    history.observe(0, turn(4, ("schema", "schema", "future"), drifts=1))
    history.observe(1, turn(1, drifts=MARKS + 5))
    history.saved(1, 900)
    first, second = history.facts[0], history.facts[1]
    assert (first.records, first.dead_letters, first.alarms) == (4, {"schema": 2, "future": 1}, 1)
    assert (second.alarms, len(second.alarm_times), second.saved_bytes) == (MARKS + 5, MARKS, 900)
    assert first.saved_at is None
    assert second.saved_at is not None
