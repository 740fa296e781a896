import math
from dataclasses import replace

import numpy as np
import orjson
import pytest

from streamcl.demo.simulator import Settings, Simulation, simulate
from streamcl.metrics.losses import log_loss, normalized_entropy
from streamcl.records import EVENTS, LABELS

SETTINGS = Settings(events=20_000, seed=7)


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(SETTINGS)


def test_the_same_settings_give_the_same_stream() -> None:
    settings = Settings(events=300, seed=3)
    assert list(simulate(settings).traffic()) == list(simulate(settings).traffic())


def test_another_seed_gives_another_stream() -> None:
    first, second = (list(simulate(Settings(events=300, seed=seed)).traffic()) for seed in (3, 4))
    assert first != second


def test_the_click_rate_is_the_mean_probability_within_four_standard_errors(simulation: Simulation) -> None:
    p = simulation.bayes
    error = math.sqrt((p * (1 - p)).sum()) / len(p)  # of a mean of independent coins with these probabilities
    assert abs(simulation.label.mean() - p.mean()) < 4 * error


def test_the_intercept_makes_the_mean_probability_the_rate_asked_for(simulation: Simulation) -> None:
    assert simulation.probability.mean() == pytest.approx(SETTINGS.ctr, abs=1e-9)


def test_probabilities_are_calibrated_in_every_decile(simulation: Simulation) -> None:
    for rows in np.array_split(np.argsort(simulation.bayes), 10):
        p = simulation.bayes[rows]
        assert abs(simulation.label[rows].sum() - p.sum()) < 4 * math.sqrt((p * (1 - p)).sum())


def test_click_delays_are_exponential(simulation: Simulation) -> None:
    delay, mean = simulation.delay_s[simulation.clicked], SETTINGS.click_delay_s
    error = mean / math.sqrt(len(delay))  # an exponential's deviation is its mean
    assert abs(delay.mean() - mean) < 4 * error
    late = math.exp(-2)
    assert abs((delay > 2 * mean).mean() - late) < 4 * math.sqrt(late * (1 - late) / len(delay))


def test_a_click_after_the_window_is_no_label() -> None:
    simulation = simulate(replace(SETTINGS, window_s=SETTINGS.click_delay_s))  # 1 of e clicks comes too late
    late = simulation.clicked & (simulation.delay_s > SETTINGS.click_delay_s)
    assert late.any()
    assert not simulation.label[late].any()
    assert simulation.bayes == pytest.approx(simulation.probability * (1 - math.exp(-1)))


def test_the_best_possible_loss_lies_clearly_below_the_base_rate(simulation: Simulation) -> None:
    assert normalized_entropy(simulation.label, simulation.bayes) < 0.8


def test_no_other_answer_beats_the_best_possible_one(simulation: Simulation) -> None:
    best = log_loss(simulation.label, simulation.bayes)
    constant = np.full(len(simulation.label), simulation.label.mean())
    for other in (constant, np.sqrt(simulation.bayes), simulation.bayes**1.2, np.roll(simulation.bayes, 1)):
        assert log_loss(simulation.label, other) > best


@pytest.mark.parametrize("which", [0, 1])
def test_an_abrupt_drift_moves_the_truth_of_what_was_there_before(which: int) -> None:
    settings = replace(SETTINGS, slow_turn_rad=0.0, users=20, items=30)
    simulation = simulate(settings)
    point = simulation.drift_points[which].impression
    before, across = (_change(simulation, at) for at in (point - 1500, point))
    assert across > 4 * before


def _change(simulation: Simulation, at: int) -> float:
    """Mean change of an item's mean probability over 1,500 impressions before and after `at`."""
    means = [
        np.bincount(simulation.item[rows], simulation.probability[rows], 30)
        / np.bincount(simulation.item[rows], None, 30)
        for rows in (slice(at - 1500, at), slice(at, at + 1500))
    ]
    return float(((means[1] - means[0]) ** 2).mean())


def test_drift_points_stand_where_the_settings_say(simulation: Simulation) -> None:
    assert [point.impression for point in simulation.drift_points] == [9_000, 15_000]
    for point in simulation.drift_points:
        assert point.time_s == simulation.time_s[point.impression]


def test_traffic_comes_in_the_order_of_event_time_and_a_click_after_its_impression(simulation: Simulation) -> None:
    shown: set[str] = set()
    last: float = 0.0
    for name, message in simulation.traffic():
        payload = orjson.loads(message.value or b"")
        assert message.time_s == payload["time"] >= last
        last = payload["time"]
        if name == EVENTS:
            shown.add(payload["id"])
        else:
            assert name == LABELS
            assert payload["id"] in shown
    assert len(shown) == SETTINGS.events


def test_records_says_how_much_traffic_there_is() -> None:
    simulation = simulate(Settings(events=400, seed=1))
    assert simulation.records == len(list(simulation.traffic()))


def test_no_payload_tells_the_truth(simulation: Simulation) -> None:
    assert set(simulation.impression(0)) == {
        "id", "time", "user", "item", "category", "device", "placement", "price", "tags",
    }  # fmt: skip
    assert set(simulation.click(0)) == {"id", "time"}


def test_the_truth_is_found_by_event_id(simulation: Simulation) -> None:
    assert simulation.bayes_of(simulation.impression(41)["id"]) == simulation.bayes[41]
    with pytest.raises(KeyError):
        simulation.bayes_of("imp-of-another-stream")


def test_too_few_impressions_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="events: 9"):
        simulate(Settings(events=9))
