import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamcl.bench import main, peers, run, stream
from streamcl.bench.options import OptionError, Options
from streamcl.bench.quality import Trace
from streamcl.bench.reproduced import VW, VW_FTRL, reproductions
from streamcl.bench.streams import Dataset, synthetic
from tests.bench.recorded import DATA, needs_recorded
from tests.bench.test_report import assert_contract

HEADLINE = {"auc", "ne", "log_loss", "events", "events_per_s"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A few synthetic events in the place of a recorded stream."""
    data = synthetic("stationary", 120, 0)
    monkeypatch.setattr(stream, "recorded", lambda *_: data)
    return data


def test_ours_and_every_peer_are_judged_on_the_same_events(small: Dataset) -> None:
    report = run("stream", Options(quick=True, method="mlp"))
    names = [row.name for row in report.rows]
    assert names[:2] == ["streamcl mlp, seed 0", "streamcl logistic, seed 0"]
    assert {"constant rate", "no-change", "river logistic sgd .1", "river logistic ftrl"} <= set(names)
    assert all(row.values["events"] == 120 for row in report.rows if "events" in row.values)
    assert report.headline.keys() == HEADLINE
    assert report.headline["auc"] == report.rows[0].values["auc"]


def test_the_headline_is_the_mean_over_seeds(small: Dataset) -> None:
    report = run("stream", Options(quick=True, method="logistic", seeds=2))
    both = [float(str(row.values["auc"])) for row in report.rows if row.name.startswith("streamcl logistic")]
    assert len(both) == 2
    assert report.headline["auc"] == pytest.approx(np.mean(both))


def test_no_change_is_not_judged_by_probabilities(small: Dataset) -> None:
    report = run("stream", Options(quick=True, method="logistic"))
    row = next(row for row in report.rows if row.name == "no-change")
    assert "log_loss" not in row.values
    assert "accuracy" in row.values


def test_a_peer_that_is_missing_has_not_reproduced_its_figure() -> None:
    known = stream.KNOWN["ml-100k", True]
    bars = reproductions({}, np.array([0.0, 1.0]), known)
    assert len(bars) == 4
    assert not any(bar.ok for bar in bars)
    assert all(math.isnan(bar.value) for bar in bars)


def test_a_peer_off_its_figure_fails_the_run() -> None:
    labels = np.array([0.0, 1.0, 0.0, 1.0])
    traces = {name: Trace(name, labels.copy()) for name in (VW, VW_FTRL)}
    assert not any(bar.ok for bar in reproductions(traces, labels, stream.KNOWN["ml-100k", True]))


def test_without_vowpal_wabbit_its_rows_say_so_and_the_exit_code_is_one(
    small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "vowpal_wabbit_installed", lambda: False)
    report = run("stream", Options(quick=True, method="logistic"))
    missing = [row for row in report.rows if row.name in (VW, VW_FTRL)]
    assert ["not installed" in str(row.values["note"]) for row in missing] == [True, True]
    assert report.exit_code == 1


def test_quick_and_full_name_the_same_bars(small: Dataset) -> None:
    names = [[bar.name for bar in run("stream", Options(quick=q, method="logistic")).bars] for q in (True, False)]
    assert names[0][:2] == names[1][:2] == ["auc >= vw default", "ne <= vw default"]
    assert len(names[0]) == len(names[1])


def test_a_tuned_preset_says_on_which_slice(small: Dataset) -> None:
    report = run("stream", Options(quick=True, method="logistic", preset="tuned"))
    assert any("first 20,000 events of ml-100k" in note for note in report.notes)


def test_an_unknown_stream_is_an_error() -> None:
    with pytest.raises(OptionError, match="--stream: 'x' is none of ml-100k, elec"):
        main("stream", Options(stream="x"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "streamcl.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_missing_data_is_said_on_stderr_with_exit_code_two(tmp_path: Path) -> None:
    done = command("stream", "--data", str(tmp_path), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "ml-100k.inter.gz: no such file" in done.stderr
    assert "Traceback" not in done.stderr


@needs_recorded
@pytest.mark.skipif(not peers.vowpal_wabbit_installed(), reason="vowpalwabbit comes with the extra bench")
def test_the_quick_run_meets_its_bars() -> None:
    done = command("stream", "--quick", "--json", "--data", str(DATA))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert_contract(found)
    assert found.keys() >= HEADLINE
    assert found["events"] == 10_000
    assert all(bar["ok"] for bar in found["bars"])
