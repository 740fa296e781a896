import logging
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl import drift
from streamcl.drift import DriftDetector
from streamcl.records import Origin, Signal
from streamcl.stations import Drift

Name = Literal["adwin", "page_hinkley"]
DETECTORS: list[Name] = ["adwin", "page_hinkley"]
STABLE = 100_000


def bernoulli(seed: int, *phases: tuple[float, int]) -> NDArray[np.float64]:
    draws = np.random.default_rng(seed)
    return np.concatenate([(draws.random(count) < rate).astype(np.float64) for rate, count in phases])


def alarms(detector: DriftDetector, losses: Iterable[float], start: int = 0) -> list[int]:
    """Where in the stream it signalled."""
    return [i for i, loss in enumerate(losses, start) if detector.update(loss, Origin("events", 0, i))]


def adwin(**settings: Any) -> DriftDetector:
    return DriftDetector(Drift(detector="adwin", **settings))


def plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return (tree.dtype.str, tree.tobytes()) if isinstance(tree, np.ndarray) else tree


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_adwin_sees_a_step_within_500_and_raises_nothing_false_in_100_000(seed: int) -> None:
    (alarm,) = alarms(adwin(), bernoulli(seed, (0.2, STABLE), (0.35, 5000)).tolist())
    assert STABLE <= alarm < STABLE + 500


@pytest.mark.parametrize("seed", [0, 1])
def test_adwin_holds_still_on_the_log_loss_of_a_calibrated_model(seed: int) -> None:
    draws = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-draws.normal(-3, 1.2, STABLE)))
    losses = -np.log(np.where(draws.random(STABLE) < scores, scores, 1 - scores))
    assert alarms(adwin(), losses.tolist()) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_page_hinkley_sees_a_step_within_1_000_at_under_one_false_alarm_in_10_000(seed: int) -> None:
    losses = bernoulli(seed, (0.2, STABLE), (0.35, 5000)).tolist()
    found = alarms(DriftDetector(Drift(detector="page_hinkley")), losses)
    assert sum(i < STABLE for i in found) < 10
    assert any(STABLE <= i < STABLE + 1000 for i in found)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_improvement_is_no_alarm_and_the_rise_after_it_is_one(name: Name, seed: int) -> None:
    detector, noise = DriftDetector(Drift(detector=name)), np.random.default_rng(seed).normal(0, 0.1, 10_000)
    assert alarms(detector, (0.6 + noise[:3000]).tolist() + (0.2 + noise[3000:8000]).tolist()) == []
    assert detector.read()["drift_improvements"] == 1
    assert len(alarms(detector, (0.4 + noise[8000:]).tolist())) == 1


def test_the_signal_names_its_source_and_the_record_that_raised_it() -> None:
    detector = DriftDetector(Drift(), name="loss of men")
    losses = bernoulli(0, (0.1, 2000), (0.9, 500)).tolist()
    raised = [(i, s) for i, x in enumerate(losses) for s in detector.update(x, Origin("labels", 3, i))]
    assert raised == [(raised[0][0], Signal("drift", "loss of men", Origin("labels", 3, raised[0][0])))]


@pytest.mark.parametrize("refractory", [0, 1000, 3000])
def test_no_second_alarm_within_the_refractory_period(refractory: int) -> None:
    stairs = bernoulli(0, *[(rate, 600) for rate in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]).tolist()
    detector = adwin(refractory_events=refractory)
    found = alarms(detector, stairs)
    counts = detector.read()
    assert all(later - earlier > refractory for earlier, later in pairwise(found))
    assert counts["drift_alarms"] == len(found)
    assert counts["drift_alarms"] + counts["drift_suppressed"] == len(alarms(adwin(refractory_events=0), stairs)) >= 4
    assert (counts["drift_suppressed"] > 0) == (refractory > 0)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_smaller_sensitivity_waits_longer(name: Name) -> None:
    losses = bernoulli(1, (0.2, 3000), (0.35, 3000)).tolist()
    delta = 1e-30 if name == "adwin" else 1.0
    assert alarms(DriftDetector(Drift(detector=name)), losses)
    assert not alarms(DriftDetector(Drift(detector=name, delta=delta)), losses)


@pytest.mark.parametrize("name", DETECTORS)
@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 3000), seed=st.integers(0, 5))
def test_a_restore_at_any_point_equals_the_uninterrupted_run(name: Name, cut: int, seed: int) -> None:
    losses = bernoulli(seed, (0.2, 1000), (0.9, 700), (0.1, 600), (0.8, 700))
    losses = (losses + np.random.default_rng(seed).random(losses.size)).tolist()
    whole, first, second = (DriftDetector(Drift(detector=name, refractory_events=100)) for _ in range(3))
    before = alarms(first, losses[:cut])
    second.load_state_dict(first.state_dict())
    assert plain(second.state_dict()) == plain(first.state_dict())
    assert before + alarms(second, losses[cut:], cut) == alarms(whole, losses)
    assert plain(second.state_dict()) == plain(whole.state_dict())
    assert second.read() == whole.read()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_restore_right_after_an_alarm_starts_anew_as_the_original_does(name: Name) -> None:
    losses = bernoulli(0, (0.1, 2000), (0.9, 1500)).tolist()
    whole, restored = DriftDetector(Drift(detector=name)), DriftDetector(Drift(detector=name))
    cut = alarms(DriftDetector(Drift(detector=name)), losses)[-1] + 1
    alarms(whole, losses[:cut])
    restored.load_state_dict(whole.state_dict())
    assert alarms(whole, losses[cut:]) == alarms(restored, losses[cut:])
    assert plain(restored.state_dict()) == plain(whole.state_dict())


@pytest.mark.parametrize("name", DETECTORS)
def test_a_state_of_another_river_starts_afresh_and_says_so(
    name: Name, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = DriftDetector(Drift(detector=name)), DriftDetector(Drift(detector=name))
    alarms(old, bernoulli(0, (0.1, 2000), (0.9, 500)).tolist())
    state = old.state_dict()
    monkeypatch.setattr(drift, "_VERSION", "99.1")
    with caplog.at_level(logging.WARNING):
        new.load_state_dict(state)
    assert "loss starts afresh" in caplog.text
    assert state["river"] in caplog.text
    assert "99.1" in caplog.text
    assert new.read() == old.read() | {"drift_restarts": 1, "drift_mean_loss": 0}
    assert plain(new.state_dict()["detector"]) == plain(DriftDetector(Drift(detector=name)).state_dict()["detector"])


@pytest.mark.parametrize("name", DETECTORS)
def test_a_loss_that_is_not_finite_is_passed_over(name: Name) -> None:
    clean, dirty = DriftDetector(Drift(detector=name)), DriftDetector(Drift(detector=name))
    losses = bernoulli(0, (0.1, 500), (0.9, 200)).tolist()
    for i, loss in enumerate(losses):
        origin = Origin("events", 0, i)
        assert dirty.update(float("nan" if i % 2 else "inf"), origin) == ()
        assert clean.update(loss, origin) == dirty.update(loss, origin)
    assert plain(clean.state_dict()) == plain(dirty.state_dict())


def test_none_yields_nothing_and_is_saved_all_the_same() -> None:
    detector = DriftDetector(Drift(detector="none"))
    assert alarms(detector, bernoulli(0, (0.1, 1000), (0.9, 1000)).tolist()) == []
    assert detector.read() == {}
    other = DriftDetector(Drift(detector="none"))
    other.load_state_dict(detector.state_dict())
    assert other.state_dict() == detector.state_dict()


def test_the_saved_window_stays_as_it_was() -> None:
    detector = adwin()
    alarms(detector, bernoulli(0, (0.2, 500)).tolist())
    state = detector.state_dict()
    kept = plain(state)
    alarms(detector, bernoulli(1, (0.9, 500)).tolist())
    assert plain(state) == kept
