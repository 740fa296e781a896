"""Shards assigned by hand, as processes on a broker: killed, fenced, resharded, on topics that grow."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kafka import KafkaAdminClient

from streamcl.records import EVENTS, Origin
from streamcl.testing import learned_hash
from tests.kafka.conftest import Cluster

CONFIG = """
name = "{name}"
dead_letters = "{url}/{dead}"
features = {{user = {{kind = "categorical", buckets = 31}}, price = "numeric"}}
model = {{embedding_dim = 2, hidden = [4]}}
checkpoint = {{folder = "{folder}/checkpoints", every_events = 100, lease_s = 2.0}}
worker = {{max_records = 20}}
telemetry = {{port = 0}}
shard = {{count = {count}}}
kafka = {{client = "{client}", transaction_timeout_s = 20.0}}
[events]
url = "{url}/{events}"
id = "id"
label = "clicked"
"""


def produce(cluster: Cluster, topic: str, partitions: range, numbers: range) -> None:
    rows = [(p, n) for n in numbers for p in partitions]
    values = [{"id": f"{p}-{n}", "user": n % 7, "price": n % 3, "clicked": n % 2} for p, n in rows]
    cluster.produce(topic, [(p, json.dumps(v).encode(), 1000 * n) for (p, n), v in zip(rows, values, strict=True)])


def everything(partitions: range, numbers: range) -> str:
    return f"{learned_hash(Origin(EVENTS, p, n) for p in partitions for n in numbers):032x}"


class Shop:
    """A config of `count` shards on topics of four partitions."""

    def __init__(self, cluster: Cluster, folder: Path, count: int) -> None:
        self.folder = folder
        self.topics = {"events": cluster.topic(4), "dead": cluster.topic()}
        self.values = {
            "name": cluster.name(),
            "url": cluster.url,
            "folder": folder,
            "client": cluster.client,
            **self.topics,
        }
        self.reconfigure(count)

    def reconfigure(self, count: int) -> None:
        (self.folder / "config.toml").write_text(CONFIG.format(count=count, **self.values))

    def start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "streamcl.cli", command, str(self.folder / "config.toml"), *arguments]
        return subprocess.Popen([*program, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def saved(self, *shards: int, records: str = "1[0-9][0-9]") -> Callable[[], bool]:
        """Whether each of these shards of four has written a snapshot at so many records."""
        folders = [self.folder / "checkpoints" / f"{self.values['name']}-{shard}-of-4" for shard in shards]
        return lambda: all(any(folder.glob(f"*-{records}")) for folder in folders)


def until(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answer(process: subprocess.Popen[str]) -> Any:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return json.loads(stdout)


def total(answers: list[Any]) -> str:
    return f"{sum(int(each['learned_hash'], 16) for each in answers) % (1 << 128):032x}"


def test_shards_are_killed_resharded_and_grown_and_every_event_is_learned_once(
    apache_kafka: Cluster, tmp_path: Path
) -> None:
    shop = Shop(apache_kafka, tmp_path, count=4)
    produce(apache_kafka, shop.topics["events"], range(4), range(600))
    halves = [shop.start("run", "--shards", f"{half}/2", "--idle-exit-s", "4") for half in (0, 1)]
    until(shop.saved(0, 2))
    halves[0].send_signal(signal.SIGKILL)
    halves[0].communicate(timeout=20)
    halves[0] = shop.start("run", "--shards", "0,2", "--idle-exit-s", "4")
    answers = [answer(half) for half in halves]
    assert [[shard["shard"] for shard in each["shards"]] for each in answers] == [[0, 2], [1, 3]]
    assert total(answers) == everything(range(4), range(600))

    admin = KafkaAdminClient(bootstrap_servers=apache_kafka.bootstrap)
    admin.create_partitions({shop.topics["events"]: 6})
    admin.close()
    produce(apache_kafka, shop.topics["events"], range(6), range(600, 900))
    refused = shop.start("run", "--shards", "0")
    assert "events partition 4 came after the snapshot was written" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 1

    planned = answer(shop.start("reshard", "--from", "4", "--to", "3"))
    assert planned["learned_hash"] == everything(range(4), range(600))
    shop.reconfigure(count=3)
    grown = answer(shop.start("run", "--shards", "0,1,2", "--idle-exit-s", "4"))
    first, second = everything(range(4), range(900)), everything(range(4, 6), range(300))
    assert int(grown["learned_hash"], 16) == (int(first, 16) + int(second, 16)) % (1 << 128)
    assert grown["counts"]["learned"] == 4 * 900 + 2 * 300


def test_a_frozen_worker_is_taken_over_and_leaves_with_3_its_other_shards_cleanly(
    cluster: Cluster, tmp_path: Path
) -> None:
    shop = Shop(cluster, tmp_path, count=4)
    produce(cluster, shop.topics["events"], range(4), range(150))
    first = shop.start("run", "--shards", "0/2")
    until(shop.saved(0, 2))
    first.send_signal(signal.SIGSTOP)
    produce(cluster, shop.topics["events"], range(4), range(150, 200))
    second = shop.start("run", "--shards", "2")
    until(shop.saved(2, records="2[0-9][0-9]"))
    first.send_signal(signal.SIGCONT)
    # Its connections are gone, and one of its transactions may be too: it finds the log fenced, or the lease taken.
    # Were its successor gone as well, it might take the shard up again.
    stderr = first.communicate(timeout=120)[1]
    assert first.returncode == 3, stderr
    assert "another worker has" in stderr
    second.send_signal(signal.SIGTERM)
    answer(second)
    rest = answer(shop.start("run", "--shards", "0,1,2,3", "--idle-exit-s", "4"))
    assert rest["learned_hash"] == everything(range(4), range(200))


def test_a_worker_that_lives_is_not_taken_over(cluster: Cluster, tmp_path: Path) -> None:
    shop = Shop(cluster, tmp_path, count=4)
    produce(cluster, shop.topics["events"], range(4), range(150))
    first = shop.start("run", "--shards", "0/2")
    until(shop.saved(0, 2))
    for second in (shop.start("run", "--shards", "2"), shop.start("reshard", "--from", "4", "--to", "2")):
        assert second.wait(60) == 1
        second.communicate()
    first.send_signal(signal.SIGTERM)
    answer(first)
