"""End to end on a broker: `streamcl run` as a process, killed and started again, equals a replay of the files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from streamcl.config import Config
from tests.kafka.conftest import Cluster

EVENTS = 1200
CONFIG = """
name = "{name}"
predictions = "{url}/{predictions}"
dead_letters = "{url}/{dead}"
features = {{user = {{kind = "categorical", buckets = 31}}, price = "numeric"}}
model = {{embedding_dim = 2, hidden = [4]}}
replay = {{retention = "reservoir", capacity = 50, per_event = 2}}
plasticity = [{{kind = "continual_backprop", replacement_rate = 0.01, maturity = 20}}]
diagnostics = {{sample_every_steps = 4, window = 32, report_every_steps = 100}}
checkpoint = {{folder = "{folder}/checkpoints", every_events = 300}}
join = {{attribution_window_s = 60.0}}
worker = {{max_records = 50}}
delivery = {{mode = "{mode}"}}
telemetry = {{port = 0}}
kafka = {{client = "{client}"}}
[events]
url = "{url}/{events}"
id = "id"
time = "ts"
"""
LABELS = '\n[labels]\nurl = "{url}/{labels}"\ndefault = 1\ntime = "ts"\n'


def write(cluster: Cluster, folder: Path, own_topic: bool, mode: str = "at_least_once") -> dict[str, str]:
    """Produce the stream, write the same stream as files, and the config; returns the topics by role."""
    topics = {role: cluster.topic() for role in ("events", "labels", "predictions", "dead")}
    events = [{"id": i, "ts": i, "user": i % 7, "price": i % 3} for i in range(EVENTS)]
    clicks = [{"id": i, "ts": i + i % 90} for i in range(0, EVENTS, 3)]  # a third of them after the window
    clicks.sort(key=lambda click: click["ts"])
    if not own_topic:
        events = [{**event, "clicked": int(event["id"] % 3 == 0)} for event in events]
    for role, rows in {"events": events, "labels": clicks}.items():
        lines = [json.dumps(row).encode() for row in rows]
        cluster.produce(topics[role], [(0, v, 1000 * int(row["ts"])) for v, row in zip(lines, rows, strict=True)])
        (folder / f"{role}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    told = {"name": cluster.name(), "url": cluster.url, "client": cluster.client, "mode": mode}
    text = CONFIG.format(**told, folder=folder, **topics)
    text += LABELS.format(url=cluster.url, **topics) if own_topic else 'label = "clicked"\n'
    (folder / "config.toml").write_text(text)
    return topics


def streamcl(folder: Path, command: str, *arguments: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "streamcl.cli", command, str(folder / "config.toml"), *arguments, "--json"]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


def await_a_checkpoint(process: subprocess.Popen[str]) -> None:
    """Whichever it is: a worker may be past the next one, or all of them, before this process hears of the first."""
    assert process.stderr is not None
    for line in process.stderr:
        if ": saved " in line:
            break


def kill_once_saved(folder: Path) -> None:
    """kill -9 a worker some time after its first checkpoint; one that finds nothing left to do ends by itself."""
    process = streamcl(folder, "run", "--idle-exit-s", "20")
    await_a_checkpoint(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def published(cluster: Cluster, topic: str) -> list[Any]:
    """Everything on the topic; read again while a busy broker still keeps some of it back."""
    messages: list[Any] = []
    for _ in range(5):
        messages = cluster.read(topic)
        if len(messages) >= EVENTS:
            break
    return messages


@pytest.mark.parametrize(
    ("cluster", "own_topic"),
    [
        (("broker", "kafka-python"), False),
        (("apache_kafka", "kafka-python"), True),
        (("apache_kafka", "librdkafka"), True),
    ],
    indirect=["cluster"],
    ids=["embedded, labels inline", "apache, labels on their own topic", "apache, librdkafka"],
)
def test_a_killed_worker_on_kafka_equals_a_replay_of_the_files(
    cluster: Cluster, tmp_path: Path, own_topic: bool
) -> None:
    topics = write(cluster, tmp_path, own_topic)
    kill_once_saved(tmp_path)
    ran = answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))

    inputs = ["--input", f"events=file://{tmp_path}/events.jsonl"]
    if own_topic:
        control = Config.load(tmp_path / "config.toml").control_url
        inputs += ["--input", f"labels=file://{tmp_path}/labels.jsonl", "--order", control]
        assert ran["counts"]["late"] > 0
        assert ran["counts"]["expired"] > 0
    replayed = answer(streamcl(tmp_path, "replay", *inputs))
    assert ran["counts"]["predicted"] == EVENTS
    assert ran["state_digest"] == replayed["state_digest"]
    assert ran["learned_hash"] == replayed["learned_hash"]

    answers = defaultdict(set)
    for message in published(cluster, topics["predictions"]):
        answers[dict(message.headers)["streamcl-input"]].add((message.key, message.value))
    assert set(answers) == {f"events:0:{i}".encode() for i in range(EVENTS)}
    assert all(len(values) == 1 for values in answers.values())  # what was sent twice was the same twice


@pytest.mark.parametrize(
    ("cluster", "own_topic"),
    [(("apache_kafka", "kafka-python"), False), (("apache_kafka", "librdkafka"), True)],
    indirect=["cluster"],
    ids=["kafka-python, labels inline", "librdkafka, labels on their own topic"],
)
def test_exactly_once_a_killed_worker_has_answered_each_event_once(
    cluster: Cluster, tmp_path: Path, own_topic: bool
) -> None:
    topics = write(cluster, tmp_path, own_topic, "exactly_once")
    for _ in range(2):
        kill_once_saved(tmp_path)
    ran = answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))
    replayed = answer(streamcl(tmp_path, "replay", "--order", Config.load(tmp_path / "config.toml").control_url))
    assert ran["state_digest"] == replayed["state_digest"]
    inputs = [dict(m.headers)["streamcl-input"] for m in published(cluster, topics["predictions"])]
    assert sorted(inputs) == sorted(f"events:0:{i}".encode() for i in range(EVENTS))


def test_of_two_workers_with_one_identity_the_second_stops_and_says_why(broker: Cluster, tmp_path: Path) -> None:
    write(broker, tmp_path, own_topic=True)
    first = streamcl(tmp_path, "run")
    await_a_checkpoint(first)
    second = streamcl(tmp_path, "run")
    _, said = second.communicate(timeout=60)
    assert (second.returncode, f"another worker has this shard: process {first.pid}" in said) == (1, True), said
    first.send_signal(signal.SIGTERM)
    assert answer(first)["counts"]["predicted"] > 0  # nobody has fenced it


@pytest.mark.parametrize("cluster", [("apache_kafka", "kafka-python"), ("broker", "librdkafka")], indirect=True)
def test_an_undisturbed_run_sends_exactly_one_prediction_for_each_event(cluster: Cluster, tmp_path: Path) -> None:
    topics = write(cluster, tmp_path, own_topic=False)
    answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))
    assert len(published(cluster, topics["predictions"])) == EVENTS
