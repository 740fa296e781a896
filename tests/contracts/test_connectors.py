"""Every connector that streamcl registers keeps the contracts, found by its scheme and opened as a worker opens it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient

from connectors import memory
from connectors.codec import opened
from streamcl.config import Config
from streamcl.connect import CONNECTORS, connector, open_control, open_sink, open_source
from streamcl.testing import check_control_log, check_sink, check_source
from tests.kafka.conftest import CLIENTS, Cluster

SCHEMES = sorted(point.name for point in entry_points(group=CONNECTORS) if point.dist and point.dist.name == "streamcl")
ROWS: list[dict[str, Any]] = [{"id": str(n), "t": n % 4, "y": 1} for n in range(6)]


class Place:
    """Topics of one scheme: events and labels with six records each, and an empty one for what is sent."""

    def __init__(
        self, base: str, values: Callable[[str], Sequence[bytes | None]], name: str = "contract", **settings: Any
    ) -> None:
        self.values = values
        data = {
            "name": name,
            "events": {"url": f"{base}events.jsonl", "id": "id"},
            "labels": {"url": f"{base}labels.jsonl"},
            "features": {"t": "numeric"},
            **settings,
        }
        self.config = Config.parse(data)
        self.out = f"{base}out.jsonl"


def of_files(folder: Path) -> Place:
    for name in ("events", "labels"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def values(name: str) -> list[bytes | None]:
        path = folder / name
        return [_payload(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    return Place(f"{folder.as_uri()}/", values, checkpoint={"folder": str(folder / "state")})


def _payload(line: bytes) -> bytes | None:
    """A line is the payload itself, where that was JSON on one line; else an envelope."""
    try:
        return opened(line).value
    except (ValueError, KeyError, TypeError):
        return line


def of_memory() -> Place:
    memory.reset("contract")
    broker = memory.broker("contract")
    for name in ("events", "labels"):
        for row in ROWS:
            broker.produce(f"{name}.jsonl", json.dumps(row).encode(), time_s=row["t"])
    broker.create("out.jsonl", 1)
    broker.finish()
    return Place("memory://contract/", lambda name: [message.value for message in broker.messages(name)])


def of_kafka(cluster: Cluster) -> Place:
    admin = KafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    prefix = cluster.name()
    for name in ("events", "labels", "out"):
        topic = f"{prefix}-{name}.jsonl"
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
        if name in ("events", "labels"):
            cluster.produce(topic, [(0, json.dumps(row).encode(), 1000 * row["t"]) for row in ROWS])
    admin.close()
    return Place(
        f"{cluster.url}/{prefix}-",
        lambda name: [message.value for message in cluster.read(name)],
        name=prefix,
        kafka={"client": cluster.client},
    )


@pytest.fixture(params=[*(scheme for scheme in SCHEMES if scheme != "kafka"), *CLIENTS])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Of each scheme; of Kafka's with each client library, on Apache's broker, which hides what is aborted."""
    if request.param in CLIENTS:
        if request.param == "librdkafka":
            pytest.importorskip("confluent_kafka", reason="streamcl[librdkafka] is not installed")
        apache = request.getfixturevalue("apache_kafka")
        yield of_kafka(Cluster(apache.kind, apache.bootstrap, apache.pid, request.param))
        return
    yield of_files(tmp_path) if request.param == "file" else of_memory()
    memory.reset("contract")


def test_every_scheme_is_tried() -> None:
    assert set(SCHEMES) == {"file", "memory", "kafka"}


def test_a_source_keeps_the_contract(place: Place) -> None:
    finite = not place.config.events.url.startswith("kafka")
    check_source(lambda: open_source(place.config), count=12, finite=finite, timeout_s=0.1)


def test_a_sink_keeps_the_contract(place: Place) -> None:
    check_sink(lambda: open_sink(place.out, place.config), lambda: place.values(place.out.rpartition("/")[2]))


def test_a_control_log_keeps_the_contract(place: Place) -> None:
    check_control_log(lambda: open_control(place.config))


def test_a_check_says_what_it_finds(place: Place) -> None:
    findings = connector(place.config.events.url).check(place.config.inputs.values(), place.config)
    assert findings
    assert all(isinstance(line, str) for line in findings)
