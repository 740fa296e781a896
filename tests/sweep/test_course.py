"""Whole sweeps, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from streamcl.config import ConfigError
from streamcl.sweep import Results, run
from streamcl.sweep.command import write
from tests.sweep.logs import shop

RATES = [0.000001, 0.00001, 0.0001, 0.001, 0.3]
BEST = "learning_rate=0.3"
"""On a stream that never changes: the others have hardly moved before it ends."""


def told(results: Results) -> dict[str, Any]:
    """What must not depend on how it was computed."""
    data = results.to_json()
    for row in data["rows"]:
        row.pop("events_per_s", None)
    return {name: value for name, value in data.items() if name not in ("seconds", "jobs", "sweep")}


def grid(**more: Any) -> dict[str, Any]:
    return {"grid": {"optimizer.learning_rate": RATES}, **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop(tmp_path_factory.mktemp("shop"), 600)


@pytest.fixture(scope="module")
def whole(base: Path) -> Results:
    return run(grid(), base, out=base.parent / "whole", jobs=1)


@pytest.fixture(scope="module")
def halved(base: Path) -> Results:
    return run(grid(halving={"eta": 3, "first": 60}), base, out=base.parent / "halved", jobs=2)


def test_every_configuration_is_compared_with_the_base_on_the_same_events(whole: Results) -> None:
    assert [row.status for row in whole.rows] == ["finished"] * 6
    assert {row.figures["examples"] for row in whole.rows} == {600}
    assert (whole.chosen, whole.rows[0].name, whole.exit_code) == (BEST, BEST, 0)
    best, base = whole.row(BEST), whole.row("base")
    assert best.difference is not None
    assert best.difference.mean == pytest.approx(best.figures["log_loss"] - base.figures["log_loss"])
    assert best.difference.high < 0
    assert best.difference.p < best.p_holm < 0.05
    assert base.difference is None


def test_halving_finds_the_best_and_stops_the_others(halved: Results, whole: Results) -> None:
    assert [(cut.events, cut.keep) for cut in halved.plan] == [(60, 2), (180, 1), (600, None)]
    assert halved.chosen == BEST
    assert {row.name: row.events for row in halved.rows if row.status == "finished"} == {BEST: 600, "base": 600}
    dropped = [row for row in halved.rows if row.status == "dropped"]
    assert len(dropped) == 4
    assert {row.events for row in dropped} <= {60, 180}
    assert all(row.figures["examples"] == row.events for row in dropped)
    for name in (BEST, "base"):  # gone on from its state, three times
        assert halved.row(name).figures == whole.row(name).figures


def test_the_number_of_processes_changes_nothing(base: Path, halved: Results) -> None:
    assert told(run(grid(halving={"eta": 3, "first": 60}), base, jobs=1)) == told(halved)


def test_what_is_finished_is_not_run_again(base: Path, whole: Results) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in (base.parent / "whole").rglob("answers-*")}
    assert len(stamps) == 6
    again = run(grid(), base, out=base.parent / "whole", jobs=1)
    assert told(again) == told(whole)
    assert {path: path.stat().st_mtime_ns for path in (base.parent / "whole").rglob("answers-*")} == stamps


def test_a_choice_on_a_share_is_judged_by_the_rest(base: Path, whole: Results) -> None:
    results = run(grid(choose_on=0.25, seeds=[0, 1]), base, jobs=2)
    assert (results.chosen, results.chosen_on) == (BEST, 150)
    assert {row.name: row.events for row in results.rows if row.status == "finished"} == {BEST: 600, "base": 600}
    assert results.rest is not None
    assert results.rest.figures["examples"] == results.rest.base["examples"] == 450
    assert results.rest.difference is not None
    assert results.rest.difference.high < 0
    assert results.row(BEST).figures["ne"] == pytest.approx(whole.row(BEST).figures["ne"], abs=0.01)  # another seed
    assert results.row(BEST).sd.keys() == results.row(BEST).figures.keys()


@pytest.fixture(scope="module")
def broken(base: Path) -> Results:
    """One that raises, one whose process dies, one that is fine."""
    entries = [
        {"name": "raises", "plugins": [{"kind": "tests.sweep.logs:Fails"}]},
        {"name": "dies", "plugins": [{"kind": "tests.sweep.logs:Dies"}]},
        {"name": "fine", "optimizer.learning_rate": 0.3},
    ]
    return run({"list": entries}, base, out=base.parent / "broken", jobs=1)


def test_one_that_fails_ends_no_other(broken: Results) -> None:
    assert {row.name: row.status for row in broken.rows} == {
        "base": "finished", "fine": "finished", "raises": "failed", "dies": "failed",
    }  # fmt: skip
    assert "RuntimeError: no such luck" in str(broken.row("raises").failure)
    assert broken.row("dies").failure == "its process ended with exit code 9"
    assert (broken.chosen, broken.exit_code) == ("fine", 1)


class Reader(HTMLParser):
    """Ids of what is drawn, links to elsewhere, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids |= {value for name, value in attrs if name == "id" and value}
        loads = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.loads += [value for value in loads if not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("which", ["whole", "halved", "broken"])
def test_the_page_holds_every_curve_and_loads_nothing(
    request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    pytest.importorskip("matplotlib")
    results: Results = request.getfixturevalue(which)
    text = write(results, tmp_path).read_text(encoding="utf-8")
    page = Reader()
    page.feed(text)
    curves = {place for place, row in enumerate(results.rows) if row.curve}
    assert curves
    for plot in ("loss", "ahead"):
        assert {f"{plot}-run-{place}" for place in curves} <= page.ids
    assert all(row.name in page.text for row in results.rows)
    assert not page.loads
    assert "@import" not in text
    assert "url(http" not in text
    assert f"<b>{results.chosen}</b>" in text
    assert json.loads((tmp_path / "results.json").read_text())["chosen"] == results.chosen


def test_curves_end_where_their_run_ended(halved: Results) -> None:
    for row in halved.rows:
        assert row.curve is not None
        assert row.curve.x[-1] == row.events
        assert len(row.curve.x) == len(row.curve.loss)
    curve = halved.row(BEST).curve
    assert curve is not None
    assert curve.ahead is not None
    gap = halved.row(BEST).difference
    assert gap is not None
    assert curve.ahead[-1] == pytest.approx(gap.mean * 600)


def test_no_processes_and_no_events_are_errors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs: 0"):
        run(grid(), base, jobs=0)
    empty = shop(tmp_path, 0)
    with pytest.raises(ConfigError, match="the log holds no event"):
        run(grid(), empty, jobs=1)


def test_interrupted_and_resumed_it_comes_to_the_same(base: Path, tmp_path: Path, whole: Results) -> None:
    """Ctrl-C behind the first run that is finished: it stands in the report; the next start does the rest."""
    (tmp_path / "sweep.toml").write_text(
        f"base = '{base}'\n[grid]\noptimizer.learning_rate = {RATES}\n[[list]]\nname = 'slow'\n"
        "plugins = [{kind = 'tests.sweep.logs:Waits'}]\n"
    )
    command = [sys.executable, "-m", "streamcl.cli", "replay", "--sweep", "sweep.toml", "--out", "out", "--json"]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "--jobs", "1"], cwd=tmp_path, env=paths, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").rglob("answers-*"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    first = json.loads(stdout)
    assert first["interrupted"]
    assert {row["name"]: row["status"] for row in first["rows"]}["slow"] == "interrupted"
    assert (tmp_path / "out" / "report.html").exists()
    again = run(grid(), base, out=tmp_path / "out", jobs=1)
    assert told(again) == told(whole)
