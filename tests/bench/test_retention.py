import numpy as np
import pytest

from streamcl.bench import retention, run
from streamcl.bench.options import Options
from streamcl.bench.retention import Size, clearly_worse
from tests.bench.test_report import assert_contract


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "QUICK", Size(("drifting", "recurring"), 60, 20, 2))


@pytest.mark.usefixtures("tiny")
def test_every_policy_stands_beside_no_memory_and_the_best_possible() -> None:
    report = run("retention", Options(quick=True))
    assert_contract(report.to_json())
    policies = ("none", "recency", "reservoir", "class_balanced")
    expected = [f"{kind}: {policy}" for kind in ("drifting", "recurring") for policy in policies]
    assert [row.name for row in report.rows] == expected
    assert all(isinstance(row.values["best_possible"], float) for row in report.rows)
    none, recency = (float(str(row.values["log_loss"])) for row in report.rows[:2])
    assert report.rows[1].values["minus_none"] == pytest.approx(recency - none)
    assert "minus_none" not in report.rows[0].values
    assert sum(": keep " in note for note in report.notes) == 2


@pytest.mark.usefixtures("tiny")
def test_one_kind_can_be_asked_for_and_only_drift_has_bars() -> None:
    report = run("retention", Options(quick=True, stream="sparse", seeds=1))
    assert len(report.rows) == 4
    assert report.bars == []
    assert report.seeds == [0]


@pytest.mark.usefixtures("tiny")
def test_the_curves_have_a_panel_for_each_kind() -> None:
    report = run("retention", Options(quick=True, seeds=1))
    assert {curve.panel for curve in report.curves} == {"drifting", "recurring"}


def test_no_memory_replays_nothing() -> None:
    size = Size(("sparse",), 20, 10, 1)
    settings = retention.settings(size, "light")
    assert settings["replay"] == {"capacity": 10, "per_event": 8, "weight": 0.25}
    assert retention.settings(size, "default")["optimizer"] == {}


def test_worse_means_two_standard_errors_above_zero() -> None:
    assert clearly_worse(np.array([0.1, 0.1, 0.11]))
    assert not clearly_worse(np.array([0.1, -0.1, 0.05]))
    assert not clearly_worse(np.array([-0.1, -0.1]))
    assert clearly_worse(np.array([0.1]))
