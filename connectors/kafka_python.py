"""The client library kafka-python behind the seam of `connectors.kafka_client`; pure Python, the default."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from connectors import kafka_python_connection as connection
from connectors.kafka_client import Bounds, Fault, Kind
from connectors.kafka_python_faults import fault_of, faults
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Message, Origin, Position, Record, Stream

log = logging.getLogger(__name__)

_UNKNOWN_TOPIC = 3


class Consumer:
    """See `kafka_client.Consumer`."""

    def __init__(
        self, servers: str, topics: Mapping[str, str], config: Config, *, group: str = "", max_wait_s: float = 0.0
    ) -> None:
        self._servers, self._topics, self._config, self._group = servers, dict(topics), config, group
        self._consumer = connection.connect(KafkaConsumer, consumer_settings(servers, config, max_wait_s), config)
        self._committer = self._open_committer() if group else None
        self._partitions: dict[Stream, TopicPartition] = {}
        self._streams: dict[TopicPartition, Stream] = {}

    def assign(self, position: Position) -> None:
        self._streams = {self._named(stream): stream for stream in position}
        self._partitions = {stream: partition for partition, stream in self._streams.items()}
        with faults():
            self._consumer.assign(list(self._streams))
            for stream, offset in position.items():
                self._consumer.resume(self._partitions[stream])
                self._consumer.seek(self._partitions[stream], offset)

    def poll(self, timeout_s: float) -> Mapping[Stream, list[Record]]:
        try:
            # Everything it holds: a partition that is paused with a part of a fetch still inside the client can stay
            # silent for ever after it is resumed.
            fetched = self._consumer.poll(timeout_ms=timeout_s * 1000, max_records=sys.maxsize)
        except kafka_errors.OffsetOutOfRangeError as error:
            partition, offset = next(iter(error.args[0].items()))
            raise Fault(Kind.RANGE, "OffsetOutOfRange", str(error), self._streams[partition], offset) from error
        except kafka_errors.KafkaError as error:
            raise fault_of(error) from error
        found = {}
        for partition, records in fetched.items():
            stream = self._streams[partition]
            found[stream] = [_record(stream, each) for each in records]
        return found

    def pause(self, stream: Stream) -> None:
        self._consumer.pause(self._partitions[stream])

    def resume(self, stream: Stream) -> None:
        self._consumer.resume(self._partitions[stream])

    def position(self, stream: Stream) -> int:
        if stream not in self._partitions:
            return 0
        # The library's own `position` looks at every partition for one: with 600 the lag of all took .7 s, each turn.
        found = self._consumer._subscription.assignment[self._partitions[stream]].position
        return int(found.offset) if found else 0

    def highwater(self, stream: Stream) -> int | None:
        if stream not in self._partitions:
            return None
        mark: int | None = self._consumer.highwater(self._partitions[stream])
        return mark

    def asked(self, streams: Sequence[Stream]) -> dict[Stream, Bounds]:
        partitions = [self._named(stream) for stream in streams]
        timeout_ms = self._config.kafka.request_timeout_s * 1000
        try:
            with faults():
                starts = self._consumer.beginning_offsets(partitions, timeout_ms=timeout_ms)
                ends = self._consumer.end_offsets(partitions, timeout_ms=timeout_ms)
        except KeyError as error:  # the library drops a partition whose log is from before 0.10
            raise Fault(Kind.BROKEN, "UnsupportedForMessageFormat", f"no offsets are known of {error}") from error
        return {s: Bounds(starts[p], ends[p]) for s, p in zip(streams, partitions, strict=True)}

    def partitions(self, name: str) -> int:
        topic = self._topics[name]
        with faults():
            found = self._consumer.partitions_for_topic(topic)
        # The library does not tell why it knows none.
        return len(found) if found else _told_partitions(self._servers, topic, self._config)

    def known_partitions(self, name: str) -> int:
        return len(self._consumer._cluster.partitions_for_topic(self._topics[name]) or ())

    def reachable(self) -> bool:
        client = self._consumer._client
        return any(client.connected(broker.node_id) for broker in client.cluster.brokers())

    def commit(self, position: Position, failed: Callable[[str], None]) -> None:
        """By a client of its own: with a group, `poll` would wait for a coordinator and could fail for lack of one."""
        assert self._committer is not None  # noqa: S101 - opened with a group

        def answered(_: Any, answer: Any) -> None:
            if isinstance(answer, Exception):
                failed(str(answer))

        offsets = {self._named(each): OffsetAndMetadata(offset, "", -1) for each, offset in position.items()}
        try:
            self._committer.commit_async(offsets, callback=answered)
        except kafka_errors.KafkaError as error:
            failed(str(error))

    def close(self) -> None:
        for each in filter(None, (self._consumer, self._committer)):
            each.close(timeout_ms=1000)

    def _open_committer(self) -> Any:
        wanted = connection.settings(self._servers, self._config) | {"group_id": self._group}
        wanted |= {"enable_auto_commit": False, "metrics_enabled": False}
        return connection.connect(KafkaConsumer, wanted, self._config)

    def _named(self, stream: Stream) -> TopicPartition:
        return TopicPartition(self._topics[stream.input], stream.partition)


def _record(stream: Stream, found: Any) -> Record:
    """A record of the client as ours. A header without value reads as an empty one, a missing time as 0."""
    headers = tuple((name, value or b"") for name, value in found.headers) if found.headers else ()
    origin = Origin(stream.input, stream.partition, found.offset)
    return Record(origin, found.topic, max(found.timestamp, 0) / 1000, found.value, found.key, headers)


class Producer:
    """See `kafka_client.Producer`.

    F1, F2: the library's default, an idempotent producer, never sends again after one refused record or a long outage,
    so idempotence is off and order is kept by one request in flight.
    """

    def __init__(self, servers: str, topic: str, config: Config) -> None:
        self._topic = topic
        self._producer = connection.connect(KafkaProducer, _producer_settings(servers, config), config)
        with faults():
            self._producer.partitions_for(topic)  # now, so that no `send` has to wait for it

    def send(self, message: Message) -> Any:
        return _send(self._producer, self._topic, message, message.partition)

    def wait(self, delivery: Any, timeout_s: float) -> None:
        _wait(delivery, timeout_s)

    def fault(self, delivery: Any) -> Fault | None:
        return None if delivery.exception is None else fault_of(delivery.exception)

    def discard(self) -> None:
        discard(self._producer)


class Transactions:
    """See `kafka_client.Transactions`. F4: its calls have no time-out of their own."""

    def __init__(self, servers: str, config: Config) -> None:
        kafka = config.kafka
        wanted = connection.settings(servers, config) | {
            "transactional_id": f"{config.name}-{config.shard.index}",
            "transaction_timeout_ms": round(kafka.transaction_timeout_s * 1000),
            "max_block_ms": round(kafka.transaction_timeout_s * 1000),
            "compression_type": None if kafka.compression == "none" else kafka.compression,
            "max_request_size": kafka.max_request_bytes,
            # Waits in steps of this are what a transaction's slowest percentile consists of.
            "retry_backoff_ms": 20,
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
        }
        self._producer = connection.connect(KafkaProducer, wanted, config)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Once the client has heard that it is fenced, its calls say no more than that they can't go on."""
        try:
            yield
        except (kafka_errors.KafkaError, Fault) as error:
            cause = self._producer._transaction_manager.last_error or error
            raise (cause if isinstance(cause, Fault) else fault_of(cause)) from error

    def init(self) -> None:
        with self._faults():
            self._producer.init_transactions()

    def begin(self) -> None:
        with self._faults():
            self._producer.begin_transaction()

    def send(self, topic: str, message: Message, partition: int | None = None) -> Any:
        with self._faults():
            return _send(self._producer, topic, message, partition)

    def commit(self) -> None:
        with self._faults():
            self._producer.commit_transaction()

    def offset(self, delivery: Any) -> int:
        with self._faults():
            return int(delivery.get(0).offset)

    def discard(self) -> None:
        discard(self._producer)


open_consumer, open_producer, open_transactions = Consumer, Producer, Transactions


def check() -> str:
    """Raises ConnectorError when the C library for checksums is missing; without it consuming is five times slower."""
    if find_spec("crc32c") is None:
        raise ConnectorError("the package crc32c is missing: pip install 'kafka-python[crc32c]'")
    return "crc32c is installed"


def _send(producer: Any, topic: str, message: Message, partition: int | None) -> Any:
    # The library can't send a message that has neither value nor key.
    value = b"" if message.value is None and message.key is None else message.value
    time_ms = None if message.time_s is None else round(message.time_s * 1000)
    with faults():
        return producer.send(topic, value, message.key, list(message.headers), partition, time_ms)


def _wait(delivery: Any, timeout_s: float) -> None:
    try:
        delivery.get(max(timeout_s, 0.0))
    except kafka_errors.KafkaError:
        return


def _producer_settings(servers: str, config: Config) -> dict[str, Any]:
    kafka = config.kafka
    return connection.settings(servers, config) | {
        "enable_idempotence": False,
        "acks": "all",
        "max_in_flight_requests_per_connection": 1,
        "delivery_timeout_ms": round(kafka.delivery_timeout_s * 1000),
        "max_block_ms": round(kafka.delivery_timeout_s * 1000),
        "linger_ms": round(kafka.linger_s * 1000),
        "batch_size": 128 << 10,
        "compression_type": None if kafka.compression == "none" else kafka.compression,
        "max_request_size": kafka.max_request_bytes,
        "allow_auto_create_topics": False,
        "metrics_enabled": False,
    }


def consumer_settings(servers: str, config: Config, max_wait_s: float = 0.0) -> dict[str, Any]:
    return connection.settings(servers, config) | {
        "enable_auto_commit": False,
        "isolation_level": "read_committed",
        # Never a silent reset; a misspelt policy would act as "none" too, without saying so.
        "auto_offset_reset": "none",
        "allow_auto_create_topics": False,
        "fetch_max_wait_ms": round((max_wait_s or config.kafka.fetch_max_wait_s) * 1000),
        "metrics_enabled": False,
    }


def ensure_topic(servers: str, topic: str, config: Config, partitions: int, configs: Mapping[str, str]) -> int:
    admin = connection.connect(KafkaAdminClient, connection.settings(servers, config), config)
    try:
        with faults():
            [found] = admin.describe_topics([topic])
            if found["error_code"] == _UNKNOWN_TOPIC:
                _create(admin, topic, partitions, configs)
                found = _seen(admin, topic, config.kafka.request_timeout_s)
            if found["error_code"]:
                raise kafka_errors.for_code(found["error_code"])()
        return len(found["partitions"])
    finally:
        admin.close()


def _seen(admin: Any, topic: str, timeout_s: float) -> Any:
    """What is told of a topic that was just made: another broker may not have heard of it."""
    deadline = time.monotonic() + timeout_s
    while True:
        [found] = admin.describe_topics([topic])
        code = found["error_code"]
        passes = code == _UNKNOWN_TOPIC or (code and fault_of(kafka_errors.for_code(code)()).kind is Kind.PASSING)
        if not passes or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _told_partitions(servers: str, topic: str, config: Config) -> int:
    """How many brokers tell when asked once more; 0: they know of none. Raises a Fault that passes by itself."""
    admin = connection.connect(KafkaAdminClient, connection.settings(servers, config), config)
    try:
        with faults():
            [found] = admin.describe_topics([topic])
    finally:
        admin.close()
    fault = fault_of(kafka_errors.for_code(found["error_code"])())
    if found["error_code"] and fault.kind is Kind.PASSING:
        raise fault
    return 0 if found["error_code"] else len(found["partitions"])


def _create(admin: Any, topic: str, partitions: int, configs: Mapping[str, str]) -> None:
    wanted = {"num_partitions": partitions, "configs": dict(configs)}
    try:
        admin.create_topics({topic: wanted}, wait_for_metadata=True)
    except kafka_errors.TopicAlreadyExistsError:
        admin.wait_for_topics([topic])  # another shard was faster
    log.info("topic %s made", topic)


def discard(producer: Any) -> None:
    """Close a producer of unknown state. Never raises; waits about 2 s at most.

    F2: `close` raises while records are unacknowledged, and then leaves the sender running. So the second attempt
    fails them first, for which the client has no public way.
    """
    for timeout_s in (0.0, 2.0):
        try:
            producer.close(timeout=timeout_s)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, this producer is not used again
            log.debug("closing a broken producer: %s", error)
            producer._sender.force_close()
            producer._sender.join(1.0)
    producer._closed = True  # else its __del__ tries again, and prints
