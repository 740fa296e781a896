"""The chaos run: what it draws, what the judge sees, and that a run with everything in it is told from a broken one."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kafka import KafkaProducer

from streamcl.bench.brokers import Broker
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken, Life, judge, phase, plans, scratch, topics, worst, write_config
from streamcl.bench.recovery_kill import ROLES, run
from streamcl.bench.recovery_traffic import Feed, config, traffic
from streamcl.bench.recovery_verifier import findings
from streamcl.bench.report import Bar
from streamcl.config import Config
from streamcl.records import EVENTS, LABELS


def test_traffic_is_drawn_from_its_seed_and_holds_every_trouble() -> None:
    records = traffic(0, 2000, 4, 1000.0)
    assert records == traffic(0, 2000, 4, 1000.0)
    assert records != traffic(1, 2000, 4, 1000.0)
    good = Counter(record.input for record in records if not record.bad)
    assert good[EVENTS] == 2000
    labels = [record.value for record in records if record.input == LABELS and not record.bad]
    assert 1500 < len(set(labels)) < len(labels) < 2000  # some are missing, some come twice
    assert any(b"unknown" in value for value in labels)
    assert {record.input for record in records if record.bad} == {EVENTS, LABELS}
    assert [record.time_s for record in records] == sorted(record.time_s for record in records)


def test_the_configuration_of_the_chaos_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    names = {role: role for role in ("events", "labels", "predictions", "dead_letters", "control")}
    settings = config("kafka://localhost:1", names, "folder", "name", delivery={"mode": "exactly_once"})
    found = Config.load(write_config(tmp_path, settings))
    assert found.exactly_once
    assert found.control_url == "kafka://localhost:1/control"
    assert found.model.kind == "logistic"


def test_kills_are_spread_over_the_whole_life_and_aimed_at_checkpoints_and_commits() -> None:
    drawn = list(plans(0, 200, 4.0))
    assert drawn == list(plans(0, 200, 4.0))
    calls = Counter(plan.aim.split(":")[0] for plan in drawn)
    assert min(calls["commit"], calls["fsync"], calls["rename"]) > 5
    assert sum(plan.startup_share is not None for plan in drawn) > 40
    assert {plan.aim.split(":")[2] for plan in drawn if plan.aim != "-"} == {"before", "within", "behind"}


def test_of_several_seeds_the_worst_bar_is_shown() -> None:
    bars = [Bar("a", 3, 1), Bar("b", 0, 0, False), Bar("a", 2, 1), Bar("b", 4, 0, False), Bar("c", 1, 1)]
    assert [(bar.name, bar.value) for bar in worst(bars)] == [("a", 2), ("b", 4), ("c", 1)]
    assert not worst([Bar("a", float("nan"), 1), Bar("a", 2, 1)])[0].ok
    assert not worst([Bar("a", 2, 1), Bar("a", float("nan"), 1)])[0].ok


def test_a_folder_stays_only_when_something_went_wrong() -> None:
    with scratch("test") as folder:
        pass
    assert not folder.exists()
    with pytest.raises(Broken), scratch("test") as folder:
        raise Broken("x")
    assert folder.exists()
    shutil.rmtree(folder)


def test_a_missed_bar_is_told_and_its_evidence_stays_but_not_for_too_few_kills(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with scratch("test") as folder:
        judge(folder, [Bar("x: kills", 1, 200), Bar("x: duplicates", float("nan"), 0, False)])
    assert not folder.exists()
    with scratch("test") as folder:
        judge(folder, [Bar("x: duplicates", 3, 0, False)])
    assert "missed: x: duplicates: 3" in capsys.readouterr().err
    assert folder.exists()
    shutil.rmtree(folder)


def test_the_judge_sees_what_is_missing_repeated_different_invented_and_unexplained(broker: Broker) -> None:
    with topics(broker, f"judge-{os.getpid()}", ROLES) as names:
        feed = Feed(broker.bootstrap, names, records := traffic(3, 60, 2, 1000.0, bad_ratio=0.2))
        feed.finish()
        feed.close()
        clean = findings(broker.bootstrap, names)
        assert len(clean.good) == 60
        assert len(clean.bad) == sum(record.bad for record in records)
        assert clean.missing == 60
        producer = KafkaProducer(bootstrap_servers=broker.bootstrap)
        once, twice, changed, *rest = sorted(clean.good)
        said = [(o, b"1") for o in (once, twice, twice, changed, *rest[:-1])] + [(changed, b"2"), ("events:0:999", b"")]
        for origin, value in said:
            producer.send(names["predictions"], value, headers=[("streamcl-input", origin.encode())])
        for number, origin in enumerate(sorted(clean.bad)[1:]):
            place = zip(("input", "partition", "offset"), origin.split(":"), strict=True)
            headers = [(f"streamcl-{name}", text.encode()) for name, text in place]
            producer.send(names["dead_letters"], b"", headers=[*headers, *[("streamcl-reason", b"x")][: number and 1]])
        producer.flush()
        producer.close()
        found = findings(broker.bootstrap, names)
    assert (found.missing, found.repeated, found.different, found.invented) == (1, 2, 1, 1)
    assert found.letters_wrong == 2  # one lacks, one has no reason


@pytest.mark.parametrize(("aim", "expected"), [("fsync:0:before", "checkpoint"), ("-", "start-up")])
def test_a_life_ends_where_it_is_told_to(tmp_path: Path, aim: str, expected: str) -> None:
    settings = {
        "name": "n",
        "events": {"url": (tmp_path / "events.jsonl").as_uri(), "label": "y"},
        "features": {"x": "numeric"},
        "checkpoint": {"folder": str(tmp_path / "checkpoints")},
        "telemetry": {"port": 0},
    }
    (tmp_path / "events.jsonl").write_text('{"x": 1, "y": 1}\n')
    with Life(tmp_path, 0, "run", str(write_config(tmp_path, settings)), aim=aim) as life:
        if aim == "-":
            life.kill()
        assert life.wait(120.0)
        assert life.process.returncode == -signal.SIGKILL
        assert phase(life, None) == expected


def test_a_life_that_leaves_by_itself_is_a_fault_that_shows_its_words(tmp_path: Path) -> None:
    with Life(tmp_path, 0, "run", "no-such-file") as life, pytest.raises(Broken, match="no-such-file"):
        life.answer(120.0)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_life_dies_with_the_bench() -> None:
    lives = "from streamcl.bench.recovery_life import die_with; import os, time; die_with(os.getppid())"
    starts = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {lives!r} + "; print(os.getpid(), flush=True); time.sleep(600)"],
                         stdout=subprocess.PIPE)
print(child.stdout.readline().decode().strip(), flush=True)
sys.stdin.read()
"""
    bench = subprocess.Popen([sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert bench.stdout is not None
    child = int(bench.stdout.readline())
    ended = os.pidfd_open(child)
    bench.kill()
    bench.communicate()
    assert select.select([ended], [], [], 60.0)[0]
    os.close(ended)


def test_the_chaos_run_meets_its_bars_on_a_real_broker(broker: Broker) -> None:
    report = run(Options(quick=True, via=broker.url, method="at_least_once", kills=3, events=1500))
    assert {bar.name: bar.ok for bar in report.bars} == dict.fromkeys((bar.name for bar in report.bars), True)
    assert report.rows[0].values["kills"] == 3
