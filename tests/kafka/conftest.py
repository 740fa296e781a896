"""Brokers for the tests: the embedded one, Apache Kafka fetched by Maven, or any other by STREAMCL_TEST_BOOTSTRAP."""

from __future__ import annotations

import base64
import fcntl
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from connectors.embedded import EmbeddedBroker
from streamcl.config import Config
from streamcl.protocols import ConnectorError

HERE = Path(__file__).parent
JARS = HERE.parents[1] / "build" / "kafka" / "4.3.1"
USER, PASSWORD = "worker", "right-Horse-battery"

_numbers = itertools.count()


@dataclass(frozen=True)
class Cluster:
    """A broker under test, and what a test does to it from outside, with plain kafka-python."""

    kind: str
    bootstrap: str
    sasl: str = ""
    pid: int | None = None

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}"

    def topic(self, partitions: int = 1) -> str:
        """A new topic; its name has never been used before."""
        name = self.name()
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        admin.create_topics({name: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
        admin.close()
        return name

    def name(self) -> str:
        return f"t{next(_numbers)}-{uuid.uuid4().hex[:8]}"

    def produce(self, topic: str, records: Sequence[tuple[int, bytes, int]]) -> None:
        """Append (partition, value, timestamp in ms)."""
        producer = KafkaProducer(bootstrap_servers=self.bootstrap, enable_idempotence=False, acks="all")
        for partition, value, time_ms in records:
            producer.send(topic, value, partition=partition, timestamp_ms=time_ms)
        producer.flush(20)
        producer.close()

    def read(self, topic: str) -> list[Any]:
        """Everything in the topic, as another program sees it."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.bootstrap,
            isolation_level="read_committed",
            enable_auto_commit=False,
            consumer_timeout_ms=700,
        )
        consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)])
        consumer.seek_to_beginning()
        found = list(consumer)
        consumer.close()
        return found

    def config(self, events: str, labels: str | None = None, /, **tables: Any) -> Config:
        """A configuration on the topics `events` and `labels`, with time-outs for tests; `tables` go over it."""
        kafka = {"connect_timeout_s": 8.0, "request_timeout_s": 8.0, "delivery_timeout_s": 20.0}
        data: dict[str, Any] = {
            "name": self.name(),
            "events": {"url": f"{self.url}/{events}", "id": "id", "label": None if labels else "y"},
            "features": {"x": "numeric"},
        }
        if labels:
            data["labels"] = {"url": f"{self.url}/{labels}"}
        return Config.parse(data | tables | {"kafka": kafka | tables.get("kafka", {})})

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The broker neither answers nor closes its connections."""
        if self.pid is None:
            pytest.skip("a broker that is not ours can't be frozen")
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def broker() -> Iterator[Cluster]:
    """The embedded broker, or the one that STREAMCL_TEST_BOOTSTRAP names."""
    given = os.environ.get("STREAMCL_TEST_BOOTSTRAP")
    if given:
        yield Cluster("given", given)
        return
    try:
        embedded = EmbeddedBroker().__enter__()
    except ConnectorError as error:
        _lack(str(error))
    yield Cluster("embedded", embedded.bootstrap, pid=embedded.pid)
    embedded.__exit__(None, None, None)


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker of Apache Kafka with a plain listener and one that wants a password (PLAIN)."""
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            _lack(f"Apache Kafka needs {tool} (Java 17 or newer, Maven)")
    _fetch()
    folder = tmp_path_factory.mktemp("kafka")
    ports = dict(zip(("plain", "sasl", "controller"), _free_ports(3), strict=True))
    properties = (HERE / "server.properties").read_text()
    filled = {"folder": str(folder), "user": USER, "password": PASSWORD} | {k: str(v) for k, v in ports.items()}
    for word, value in filled.items():
        properties = properties.replace("{" + word + "}", value)
    (folder / "server.properties").write_text(properties)
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    java = ["java", "-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto"]
    java += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-cp", f"{JARS}/*"]
    storage = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", "server.properties"]
    subprocess.run([*java, *storage], cwd=folder, check=True, capture_output=True)
    with (folder / "log").open("wb") as log:
        command = [*java, "kafka.Kafka", "server.properties"]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        _await(process, f"127.0.0.1:{ports['plain']}", folder / "log")
        yield Cluster("apache", f"127.0.0.1:{ports['plain']}", f"127.0.0.1:{ports['sasl']}", process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["embedded", "apache"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each broker in turn, for what must hold on both."""
    found: Cluster = request.getfixturevalue("broker" if request.param == "embedded" else "apache_kafka")
    return found


def _lack(reason: str) -> None:
    if "kafka" in os.environ.get("STREAMCL_REQUIRE", "").split(","):
        pytest.fail(f"STREAMCL_REQUIRE names kafka, but: {reason}")
    pytest.skip(reason)


def _fetch() -> None:
    """The jars by Maven, once; several test processes may ask at the same time."""
    JARS.parent.mkdir(parents=True, exist_ok=True)
    with (JARS.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if JARS.exists():
            return
        partial = JARS.with_suffix(".partial")
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={partial}"]
        done = subprocess.run(
            ["mvn", "-q", "-B", "-f", str(HERE / "pom.xml"), *goal], capture_output=True, text=True, check=False
        )
        if done.returncode:
            _lack(f"Maven can't fetch Apache Kafka: {(done.stdout + done.stderr).strip()[-300:]}")
        partial.rename(JARS)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _await(process: subprocess.Popen[bytes], bootstrap: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=1000).close()
            return
        except kafka_errors.KafkaError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Apache Kafka did not start: {log.read_text()[-2000:]}") from None
