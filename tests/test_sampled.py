"""Features against those of the beginning, and frozen weights against live ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.recovery import Keeper, store_of
from streamcl.sampled import FIRST, LABELS, ROWS, FeatureDrift, Sampled, psi
from streamcl.state import digest
from streamcl.worker import Worker, build
from tests.journey import Item, click, fill, settings, view


def drift(**features: object) -> tuple[FeatureDrift, Featurizer]:
    config = Config.parse(
        {"name": "x", "events": {"url": "memory://x/y", "label": "y"}, "features": features or {"n": "numeric"}}
    )
    featurizer = Featurizer(config)
    return FeatureDrift(featurizer.layout), featurizer


def test_psi_is_that_of_the_definition() -> None:
    first, last = np.repeat([0.0, 1.0], [30, 70]), np.repeat([0.0, 1.0], [70, 30])
    shares = [np.array(counts) + 0.5 for counts in ([30, 70] + [0] * 14, [70, 30] + [0] * 14)]
    p, q = (each / each.sum() for each in shares)
    assert psi(first, last, None) == pytest.approx(float(((q - p) * np.log(q / p)).sum()))


def test_psi_of_the_same_distribution_is_its_noise() -> None:
    rng = np.random.default_rng(0)
    found = psi(rng.normal(size=ROWS), rng.normal(size=ROWS), 10)
    expected = 9 * 2 / ROWS  # (cells - 1)(1/n + 1/m), a chi-square of 9 degrees over its own scale
    assert found is not None
    assert 0.0 < found < 4 * expected


def test_a_feature_that_moves_or_goes_missing_is_told_by_name() -> None:
    watched, featurizer = drift(still="numeric", moved="numeric", gone="categorical", swapped="categorical")
    rng = np.random.default_rng(1)
    for step in range(2 * ROWS):
        late = step >= ROWS
        payload = {"still": rng.normal(), "moved": rng.normal() + 2.0 * late, "swapped": f"{late}{rng.integers(4)}"}
        watched.add([featurizer.encode(payload | ({} if late and step % 2 else {"gone": "a"}))])
    told = watched.read()
    assert told["feature:still:psi"] < 0.1 < 0.25 < min(told["feature:moved:psi"], told["feature:swapped:psi"])
    assert told["feature:gone:missing_ratio"] == 0.5
    assert told["feature:still:missing_ratio"] == 0.0


def test_nothing_is_said_of_too_few_events() -> None:
    watched, featurizer = drift()
    for _ in range(100):
        watched.add([featurizer.encode({"n": 1.0})])
    assert watched.read() == {}


def test_a_wide_configuration_is_watched_in_part() -> None:
    watched, featurizer = drift(**{f"f{n}": "categorical" for n in range(100)})
    watched.add([featurizer.encode({"f0": "a"})])
    assert len(watched.names) == 64


def clicks(count: int = 400) -> list[Item]:
    """Users below 2 always click."""
    items: list[Item] = []
    for id in range(count):
        items += [view(id, float(id))] + ([click(id, id + 0.5)] if id % 5 < 2 else [])
    return items


def sampled_run(folder: Path, every: int, count: int = 400) -> tuple[Worker, Sampled]:
    fill(clicks(count))
    worker = build(settings(folder, telemetry={"port": 0, "sample_every": every}))
    keeper = Keeper(worker, store_of(worker.config), beside=False)
    keeper.restore()
    sampled = Sampled(worker)
    for turn in keeper.run():
        sampled.add(turn)
    return worker, sampled


def test_live_weights_beat_those_frozen_at_the_start_on_the_same_labels(tmp_path: Path) -> None:
    worker, sampled = sampled_run(tmp_path, 1, FIRST + LABELS + 100)
    told = sampled.read()
    assert worker.readings()["examples"] >= FIRST + LABELS
    assert told["sampled:live:base_rate"] == told["sampled:frozen:base_rate"]
    assert told["sampled:live:log_loss"] < told["sampled:frozen:log_loss"]


def test_nothing_is_said_of_a_model_that_has_just_begun(tmp_path: Path) -> None:
    _, sampled = sampled_run(tmp_path, 1)
    assert not any(name.startswith("sampled:") for name in sampled.read())


def test_the_share_asked_for_is_taken_however_turns_are_cut(tmp_path: Path) -> None:
    worker, sampled = sampled_run(tmp_path, 7)
    sampled.read()
    assert sampled.frozen
    held = sampled.frozen.metrics["live"].read()["examples"]
    assert held == -(-worker.readings()["examples"] // 7)


def test_watching_changes_nothing_of_the_state(tmp_path: Path) -> None:
    watched, _ = sampled_run(tmp_path / "a", 1)
    alone, _ = sampled_run(tmp_path / "b", 0)
    assert digest(watched.state_dict()) == digest(alone.state_dict())
