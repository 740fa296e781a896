"""Brokers for the tests: the embedded one, Apache Kafka fetched by Maven, or any other by STREAMCL_TEST_BOOTSTRAP."""

from __future__ import annotations

import itertools
import json
import os
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from connectors.apache import ApacheBroker
from connectors.embedded import EmbeddedBroker
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from tests.components import lack

_numbers = itertools.count()


@dataclass(frozen=True)
class Cluster:
    """A broker under test, and what a test does to it from outside, with plain kafka-python."""

    kind: str
    bootstrap: str
    pid: int | None = None
    client: str = "kafka-python"

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

    def alter(self, topic: str, configs: dict[str, str]) -> None:
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])
        admin.close()

    def changed(self, topic: str) -> dict[str, str]:
        """The topic's settings that are not the broker's."""
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        admin.close()
        return {name: each["value"] for name, each in found["topic"][topic].items()}

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
        kafka = {"client": self.client, "connect_timeout_s": 8.0, "request_timeout_s": 8.0, "delivery_timeout_s": 20.0}
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
        lack("kafka", str(error))
    yield Cluster("embedded", embedded.bootstrap, pid=embedded.pid)
    embedded.__exit__(None, None, None)


@pytest.fixture(scope="session")
def apache_kafka() -> Iterator[Cluster]:
    """One broker of Apache Kafka."""
    with started(ApacheBroker()) as apache:
        yield Cluster("apache", apache.bootstrap, apache.pid)


CLIENTS = ("kafka-python", "librdkafka")


@pytest.fixture(params=[(broker, client) for broker in ("broker", "apache_kafka") for client in CLIENTS], ids="-".join)
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each broker with each client library in turn, for what must hold on all of them."""
    broker, client = request.param
    if client == "librdkafka":
        pytest.importorskip("confluent_kafka", reason="streamcl[librdkafka] is not installed")
    found: Cluster = request.getfixturevalue(broker)
    return replace(found, client=client)


@contextmanager
def started(apache: ApacheBroker) -> Iterator[ApacheBroker]:
    """The broker, running; skips (or fails, see STREAMCL_REQUIRE) where it can't be had."""
    try:
        apache.__enter__()
    except ConnectorError as error:
        lack("kafka", str(error))
    try:
        yield apache
    finally:
        apache.__exit__(None, None, None)


def toml(table: Mapping[str, Any]) -> str:
    """A configuration as a file: one inline value a line."""
    return "".join(f"{name} = {_inline(value)}\n" for name, value in table.items())


def _inline(value: Any) -> str:
    """JSON's strings and numbers are TOML's."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value)
