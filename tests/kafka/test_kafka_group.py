"""Shards handed out by a consumer group on Apache Kafka: processes that die, freeze and come back learn nothing twice.

Not on the embedded broker: there a second member of a cooperative group was seen to wait for ever for the first.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient

from connectors.kafka_group import KafkaGroup
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import EVENTS, Origin
from streamcl.testing import learned_hash
from tests.kafka.conftest import Cluster

SHARDS, PER_PARTITION = 4, 1500
CONFIG = """
name = "{name}"
predictions = "{url}/{scores}"
dead_letters = "{url}/{dead}"
features = {{user = {{kind = "categorical", buckets = 31}}, price = "numeric"}}
model = {{embedding_dim = 2, hidden = [4]}}
checkpoint = {{folder = "{folder}/checkpoints", every_events = 200}}
worker = {{max_records = 20}}
telemetry = {{port = 0}}
[shard]
count = {shards}
assignment = "group"
session_timeout_s = 4.0
[events]
url = "{url}/{events}"
id = "id"
label = "clicked"
"""


class Shop:
    """A config on topics of its own, a producer that takes its time, and workers as processes."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.topics = {role: cluster.topic(SHARDS) for role in ("events", "scores", "dead")}
        text = CONFIG.format(name=cluster.name(), url=cluster.url, folder=folder, shards=SHARDS, **self.topics)
        (folder / "config.toml").write_text(text)
        self.config = Config.load(folder / "config.toml")
        self.workers: list[subprocess.Popen[bytes]] = []
        self.producer = threading.Thread(target=self._produce, daemon=True)

    def _produce(self) -> None:
        for start in range(0, PER_PARTITION, 50):
            rows = [(p, n) for n in range(start, start + 50) for p in range(SHARDS)]
            values = [{"id": f"{p}-{n}", "user": n % 7, "price": n % 3, "clicked": n % 2} for p, n in rows]
            self.cluster.produce(
                self.topics["events"],
                [(p, json.dumps(value).encode(), 1000 * n) for (p, n), value in zip(rows, values, strict=True)],
            )
            time.sleep(0.3)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        number = len(self.workers)
        program = [sys.executable, "-m", "streamcl.cli", "run", str(self.folder / "config.toml"), "--json", *arguments]
        with (self.folder / f"out{number}").open("wb") as out, (self.folder / f"err{number}").open("wb") as err:
            self.workers.append(subprocess.Popen(program, stdout=out, stderr=err))
        return self.workers[-1]

    def said(self, worker: subprocess.Popen[bytes]) -> str:
        return (self.folder / f"err{self.workers.index(worker)}").read_text()

    def answer(self, worker: subprocess.Popen[bytes]) -> Any:
        assert worker.wait(120) == 0, self.said(worker)
        return json.loads((self.folder / f"out{self.workers.index(worker)}").read_text())

    def until(self, claim: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 90
        while not claim():
            assert time.monotonic() < deadline, what + "".join(f"\n--- {self.said(each)}" for each in self.workers)
            time.sleep(0.1)


@contextmanager
def shop_on(cluster: Cluster, folder: Path) -> Iterator[Shop]:
    shop = Shop(cluster, folder)
    try:
        yield shop
    finally:
        for worker in shop.workers:
            worker.kill()
            worker.wait(10)


def everything() -> str:
    return f"{learned_hash(Origin(EVENTS, p, n) for p in range(SHARDS) for n in range(PER_PARTITION)):032x}"


def check_learned(found: Any) -> None:
    assert len(found["shards"]) == SHARDS
    assert found["counts"]["learned"] == found["records"] == SHARDS * PER_PARTITION
    assert found["learned_hash"] == everything()


def holds(shop: Shop, worker: subprocess.Popen[bytes]) -> int:
    """How many shards a worker has begun to run, as its log tells."""
    return shop.said(worker).count("stands at")


def test_a_member_that_is_killed_leaves_its_shards_to_the_other(apache_kafka: Cluster, tmp_path: Path) -> None:
    with shop_on(apache_kafka, tmp_path) as shop:
        first, second = shop.start("--idle-exit-s", "12"), shop.start("--idle-exit-s", "12")
        shop.until(lambda: holds(shop, first) > 0 < holds(shop, second), "both hold shards")
        shop.producer.start()
        shop.until(lambda: "saved" in shop.said(second), "the second learns")
        second.send_signal(signal.SIGKILL)
        shop.producer.join(60)
        check_learned(shop.answer(first))


def test_a_member_that_was_frozen_wakes_without_a_shard_of_its_own(apache_kafka: Cluster, tmp_path: Path) -> None:
    with shop_on(apache_kafka, tmp_path) as shop:
        first, second = shop.start("--idle-exit-s", "15"), shop.start()
        shop.until(lambda: holds(shop, first) > 0 < holds(shop, second), "both hold shards")
        shop.producer.start()
        shop.until(lambda: "saved" in shop.said(second), "the second learns")
        before = holds(shop, first)
        second.send_signal(signal.SIGSTOP)
        shop.until(lambda: holds(shop, first) >= before + SHARDS // 2, "the first takes over")
        second.send_signal(signal.SIGCONT)
        shop.until(lambda: "dropped" in shop.said(second), "the second lets go")
        shop.producer.join(60)
        second.send_signal(signal.SIGTERM)
        shop.answer(second)
        check_learned(shop.answer(first))


def test_a_member_that_leaves_saves_and_hands_over_at_once(apache_kafka: Cluster, tmp_path: Path) -> None:
    with shop_on(apache_kafka, tmp_path) as shop:
        first, second = shop.start("--idle-exit-s", "12"), shop.start()
        shop.until(lambda: holds(shop, first) > 0 < holds(shop, second), "both hold shards")
        shop.producer.start()
        shop.until(lambda: "saved" in shop.said(second), "the second learns")
        second.send_signal(signal.SIGTERM)
        shop.answer(second)
        shop.producer.join(60)
        check_learned(shop.answer(first))


def test_a_topic_with_another_number_of_partitions_is_refused(apache_kafka: Cluster) -> None:
    config = apache_kafka.config(apache_kafka.topic(3), shard={"count": 3, "assignment": "group"})
    with closing(KafkaGroup(config.events.url, config)) as group:
        name = group.topic
    admin = KafkaAdminClient(bootstrap_servers=apache_kafka.bootstrap)
    admin.create_partitions({name: 5})
    admin.close()
    with pytest.raises(ConnectorError, match=r"hands out 3 shards and needs as many partitions, it has 5"):
        KafkaGroup(config.events.url, config)


def test_a_member_beyond_the_number_of_shards_holds_none_and_is_settled(apache_kafka: Cluster) -> None:
    shard = {"count": 1, "assignment": "group", "session_timeout_s": 4.0}
    config = apache_kafka.config(apache_kafka.topic(1), shard=shard)
    with (
        closing(KafkaGroup(config.events.url, config)) as first,
        closing(KafkaGroup(config.events.url, config)) as second,
    ):
        deadline = time.monotonic() + 60
        held: list[set[int]] = []
        while not (first.settled() and second.settled() and sorted(map(len, held)) == [0, 1]):
            assert time.monotonic() < deadline
            held = [set(first.held()), set(second.held())]
            time.sleep(0.02)
        loser = second if held[1] else first
        loser.fenced(0)
        assert loser.held() == {}


def test_a_static_member_is_named_by_the_environment(apache_kafka: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = {"count": 1, "assignment": "group", "session_timeout_s": 6.0, "group_instance_id_env": "POD_NAME"}
    config = apache_kafka.config(apache_kafka.topic(1), shard=shard)
    monkeypatch.delenv("POD_NAME", raising=False)
    with pytest.raises(ConnectorError, match=r"group_instance_id_env: POD_NAME is not set"):
        KafkaGroup(config.events.url, config)
    monkeypatch.setenv("POD_NAME", "pod-0")
    with closing(KafkaGroup(config.events.url, config)) as group:
        deadline = time.monotonic() + 60
        while group.held().keys() != {0}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
