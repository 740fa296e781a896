"""A shadow beside a live worker on a broker, and a promotion that is killed wherever it can be: nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamcl.config import Config
from streamcl.recovery import store_of
from streamcl.shadow import beside, history
from streamcl.state import digest
from tests.journey import repeat
from tests.kafka.conftest import Cluster
from tests.kafka.test_journey import CONFIG, EVENTS, LABELS

DYING = """
import os, pathlib, shutil, signal, sys
from streamcl import promotion
from streamcl.checkpoint import Store
from streamcl.cli import main

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def behind(work):
    def wrapped(*given, **named):
        work(*given, **named)
        die()
    return wrapped

def half(folder):
    shutil.rmtree(sorted(path for path in pathlib.Path(folder).iterdir() if path.is_dir())[0])
    die()

place = sys.argv.pop(1)
if place == "before its snapshot":
    Store.save = die
elif place == "behind its snapshot":
    Store.save = behind(Store.save)
elif place == "behind the order":
    promotion.drop = die
elif place == "in deleting":
    promotion.shutil = type("Half", (), {"rmtree": staticmethod(half)})
main(sys.argv[1:])
"""
PLACES = ("before its snapshot", "behind its snapshot", "behind the order", "in deleting")


def start(*arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "streamcl.cli", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen[str]) -> Any:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


def produce(cluster: Cluster, topics: Mapping[str, str], first: int, last: int) -> None:
    events = [{"id": i, "ts": i, "user": i % 7, "price": i % 3} for i in range(first, last)]
    clicks = sorted(({"id": i, "ts": i + i % 90} for i in range(first, last, 3)), key=lambda click: click["ts"])
    for role, rows in {"events": events, "labels": clicks}.items():
        cluster.produce(topics[role], [(0, json.dumps(row).encode(), 1000 * int(row["ts"])) for row in rows])


def until(claim: Any, what: str) -> None:
    end = time.monotonic() + 90.0
    while not claim():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("cluster", "mode"),
    [(("broker", "kafka-python"), "at_least_once"), (("apache_kafka", "kafka-python"), "exactly_once")],
    indirect=["cluster"],
    ids=["embedded, at least once", "apache, exactly once"],
)
def test_a_promotion_that_is_killed_everywhere_loses_nothing_and_answers_each_event(
    cluster: Cluster, tmp_path: Path, mode: str
) -> None:
    topics = {role: cluster.topic() for role in ("events", "labels", "predictions", "dead")}
    told = {"name": cluster.name(), "url": cluster.url, "client": cluster.client, "mode": mode, **topics}
    text = (CONFIG + LABELS).format(**told, folder=tmp_path)
    live, other = tmp_path / "live.toml", tmp_path / "other.toml"
    live.write_text(text)
    other.write_text(text.replace("hidden = [4]", "hidden = [6, 3]"))
    settings, theirs = Config.load(live), Config.load(other)
    shadows = beside(settings, theirs)
    both = str(live), str(other)

    produce(cluster, topics, 0, EVENTS // 2)
    worker, shadow = start("run", str(live)), None
    try:
        until(lambda: store_of(settings).ls(), "the live worker has not begun")
        shadow = start("shadow", "run", *both, "--from-start")
        until(lambda: history(shadows), "no live checkpoint has been compared")
        shadow.send_signal(signal.SIGKILL)
        shadow.communicate()
        shadow = start("shadow", "run", *both)
        refused = start("shadow", "promote", *both)
        _, said = refused.communicate(timeout=120)
        assert (refused.returncode, "another worker has this shard" in said) == (1, True), said
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        stood = store_of(settings).ls()[-1].manifest
        until(lambda: history(shadows)[-1]["records"] == stood["records"], "the shadow has not come along")
        shadow.send_signal(signal.SIGTERM)
        assert shadow.wait(60) == 0
    finally:
        for process in (worker, shadow):
            if process and process.poll() is None:
                process.kill()
                process.communicate()

    for place in PLACES:
        program = [sys.executable, "-c", DYING, place, "shadow", "promote", *both]
        killed = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if place == "before its snapshot":  # the live worker may still go on instead; here it finds nothing new
            assert done(start("run", str(live), "--idle-exit-s", "1", "--json"))["records"] == stood["records"]
    [promoted] = done(start("shadow", "promote", *both, "--install", "--json"))["promoted"]
    assert promoted["records"] == stood["records"]
    assert promoted["position"] == stood["position"]
    assert not store_of(shadows).folder.exists()
    assert live.read_text() == other.read_text()

    produce(cluster, topics, EVENTS // 2, EVENTS)
    worker = start("run", str(live))
    until(lambda: store_of(settings).ls()[-1].manifest["records"] > stood["records"], "the promoted one stands still")
    worker.kill()
    worker.communicate()
    ran = done(start("run", str(live), "--idle-exit-s", "3", "--json"))
    assert ran["counts"]["predicted"] == EVENTS

    state = store_of(settings).load(store_of(settings).ls()[-1].name).state
    assert [fact["kind"] for fact in state["lineage"]["facts"]] == ["shadow", "promoted"]
    assert digest({**state, "lineage": {"facts": []}}) == repeat(theirs).digest  # as if it had always been there
    answers = defaultdict(list)
    messages: list[Any] = []
    for _ in range(5):
        messages = cluster.read(topics["predictions"])
        if len(messages) >= EVENTS:
            break
    for message in messages:
        answers[dict(message.headers)["streamcl-input"]].append((message.key, message.value))
    assert set(answers) == {f"events:0:{i}".encode() for i in range(EVENTS)}
    assert all(len(set(values)) == 1 for values in answers.values())  # what was sent twice was the same twice
    assert mode == "at_least_once" or all(len(values) == 1 for values in answers.values())
