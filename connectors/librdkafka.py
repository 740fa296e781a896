"""The client library librdkafka (by confluent-kafka) behind the seam of `connectors.kafka_client`: C, an extra."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import confluent_kafka
import orjson
from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from connectors import librdkafka_connection as connection
from connectors.kafka_client import Bounds, Fault, Kind, within
from connectors.librdkafka_faults import fault_of, faults
from streamcl.config import Config
from streamcl.records import Message, Origin, Position, Record, Stream

log = logging.getLogger(__name__)

_EOF = KafkaError._PARTITION_EOF
_EARLIEST, _LATEST = -2, -1  # times that stand for the ends of a log
_NO_LIMIT_KIB = (1 << 31) - 1
_CLOSE_S = 2.0
_LOOK_S = 5.0


class Consumer:
    """See `kafka_client.Consumer`."""

    def __init__(
        self, servers: str, topics: Mapping[str, str], config: Config, *, group: str = "", max_wait_s: float = 0.0
    ) -> None:
        self._topics, self._config = dict(topics), config
        self._names = {topic: name for name, topic in topics.items()}
        self._known: dict[str, int] = {}
        self._up = True
        self._failed: Callable[[str], None] = log.warning
        wanted = consumer_settings(servers, config, group, max_wait_s) | {
            "on_commit": self._committed,
            "stats_cb": self._counted,
            "statistics.interval.ms": round(min(_LOOK_S, config.kafka.metadata_max_age_s) * 1000),
        }
        self._consumer = connection.connect(confluent_kafka.Consumer, wanted, config)
        self._most = max(500, config.worker.max_records)
        self._partitions: dict[Stream, TopicPartition] = {}
        self._streams: dict[tuple[str, int], Stream] = {}
        self._at: dict[Stream, int] = {}
        self._fault: Fault | None = None

    def assign(self, position: Position) -> None:
        self._partitions = {stream: self._named(stream, offset) for stream, offset in position.items()}
        self._streams = {(self._topics[stream.input], stream.partition): stream for stream in position}
        self._at, self._fault = dict(position), None
        with faults():
            self._consumer.assign(list(self._partitions.values()))
            self._consumer.resume(list(self._partitions.values()))

    def poll(self, timeout_s: float) -> Mapping[Stream, list[Record]]:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        with faults():
            # `consume` with a time-out would wait for as many as it may give.
            messages = self._consumer.consume(self._most, 0)
            if not messages and timeout_s > 0:
                first = self._consumer.poll(timeout_s)
                messages = [] if first is None else [first, *self._consumer.consume(self._most - 1, 0)]
        found: dict[Stream, list[Record]] = {}
        for each in messages:
            self._take(each, found)
        if not found and self._fault is not None:
            return self.poll(0.0)
        return found

    def pause(self, stream: Stream) -> None:
        with faults():
            self._consumer.pause([self._partitions[stream]])

    def resume(self, stream: Stream) -> None:
        with faults():
            self._consumer.resume([self._partitions[stream]])

    def position(self, stream: Stream) -> int:
        return self._at.get(stream, 0)

    def highwater(self, stream: Stream) -> int | None:
        if stream not in self._partitions:
            return None
        with faults():
            _, high = self._consumer.get_watermark_offsets(self._partitions[stream], cached=True)
        return high if high >= 0 else None

    def asked(self, streams: Sequence[Stream]) -> dict[Stream, Bounds]:
        """Not by the library's watermarks: when one of their two requests fails, both are the other's answer."""
        deadline = time.monotonic() + self._config.kafka.request_timeout_s
        while True:
            try:
                starts, ends = (self._listed(streams, which) for which in (_EARLIEST, _LATEST))
                return {stream: Bounds(starts[stream], ends[stream]) for stream in streams}
            except Fault as fault:
                if fault.kind is not Kind.PASSING or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def partitions(self, name: str) -> int:
        return _count(self._consumer, self._topics[name], self._config)

    def known_partitions(self, name: str) -> int:
        return self._known.get(self._topics[name], 0)

    def reachable(self) -> bool:
        return self._up

    def commit(self, position: Position, failed: Callable[[str], None]) -> None:
        self._failed = failed
        try:
            self._consumer.commit(offsets=[self._named(*each) for each in position.items()], asynchronous=True)
        except KafkaException as error:
            failed(str(error))

    def close(self) -> None:
        _give_up(self._consumer.close)

    def _take(self, message: Any, found: dict[Stream, list[Record]]) -> None:
        error = message.error()
        stream = self._streams.get((message.topic(), message.partition()))
        if error is not None:
            if stream is not None and error.code() == _EOF:
                self._at[stream] = message.offset()
            elif error.code() != _EOF:
                fault = fault_of(error)
                self._fault = Fault(fault.kind, fault.name, str(fault), stream, self._at.get(stream, -1))  # type: ignore[arg-type] # None has no offset
            return
        if stream is None:
            return
        offset = message.offset()
        self._at[stream] = offset + 1
        origin = Origin(stream.input, stream.partition, offset)
        given = message.headers()
        headers = tuple((name, value or b"") for name, value in given) if given else ()
        time_s = max(message.timestamp()[1], 0) / 1000
        record = Record(origin, message.topic(), time_s, message.value(), message.key(), headers)
        found.setdefault(stream, []).append(record)

    def _listed(self, streams: Sequence[Stream], which: int) -> dict[Stream, int]:
        wanted = [self._named(stream, which) for stream in streams]
        with faults():
            told = self._consumer.offsets_for_times(wanted, self._config.kafka.request_timeout_s)
        offsets = {(each.topic, each.partition): each for each in told}
        found = {stream: offsets[self._topics[stream.input], stream.partition] for stream in streams}
        for each in found.values():
            if each.error is not None:
                raise fault_of(each.error)
            if each.offset < 0:
                raise Fault(Kind.PASSING, "NoOffsets", f"brokers tell no offset of {each.topic} {each.partition}")
        return {stream: int(each.offset) for stream, each in found.items()}

    def _named(self, stream: Stream, offset: int = -1001) -> TopicPartition:
        return TopicPartition(self._topics[stream.input], stream.partition, offset)

    def _committed(self, error: Any, partitions: Any) -> None:
        for each in [error, *(partition.error for partition in partitions or ())]:
            if each is not None:
                self._failed(each.str())
                return

    def _counted(self, statistics: str) -> None:
        found = orjson.loads(statistics)
        self._up = any(broker["state"] == "UP" for broker in found["brokers"].values())
        for topic, told in found["topics"].items():
            self._known[topic] = sum(1 for number in told["partitions"] if number != "-1")


class Delivery:
    """See `kafka_client.Delivery`."""

    __slots__ = ("exception", "is_done", "offset")

    def __init__(self) -> None:
        self.is_done = False
        self.exception: Any = None
        self.offset = -1

    def settle(self, error: Any, message: Any) -> None:
        self.exception = error
        if error is None:
            self.offset = -1 if message.offset() is None else message.offset()
        self.is_done = True


class Producer:
    """See `kafka_client.Producer`. F2: with idempotence it would not recover from a long outage."""

    def __init__(self, servers: str, topic: str, config: Config) -> None:
        kafka = config.kafka
        self._topic = topic
        wanted = _producer_settings(servers, config) | {
            "enable.idempotence": False,
            "acks": "all",
            "max.in.flight.requests.per.connection": 1,
            "message.timeout.ms": round(kafka.delivery_timeout_s * 1000),
            "linger.ms": kafka.linger_s * 1000,
            "batch.size": 128 << 10,
        }
        self._producer = connection.connect(confluent_kafka.Producer, wanted, config)
        if not _count(self._producer, topic, config):
            raise Fault(Kind.DENIED, "UnknownTopicOrPartition", "no such topic, or no right to see it")

    def send(self, message: Message) -> Delivery:
        where = {} if message.partition is None else {"partition": message.partition}
        delivery = _produce(self._producer, self._topic, message, where)
        self._producer.poll(0)
        return delivery

    def wait(self, delivery: Delivery, timeout_s: float) -> None:
        _wait(self._producer, delivery, timeout_s)

    def fault(self, delivery: Delivery) -> Fault | None:
        return None if delivery.exception is None else fault_of(delivery.exception)

    def discard(self) -> None:
        producer, self._producer = self._producer, None
        _discard(producer)


class Transactions:
    """See `kafka_client.Transactions`."""

    def __init__(self, servers: str, config: Config) -> None:
        timeout_ms = round(config.kafka.transaction_timeout_s * 1000)
        wanted = _producer_settings(servers, config) | {
            "transactional.id": f"{config.name}-{config.shard.index}",
            "transaction.timeout.ms": timeout_ms,
            "message.timeout.ms": timeout_ms,
            "socket.timeout.ms": min(timeout_ms, round(config.kafka.request_timeout_s * 1000)),
            "linger.ms": 0,
        }
        self._producer = connection.connect(confluent_kafka.Producer, wanted, config)
        self._timeout_s = 2 * config.kafka.transaction_timeout_s  # the watchdog comes first

    def init(self) -> None:
        with faults():
            self._producer.init_transactions(self._timeout_s)

    def begin(self) -> None:
        with faults():
            self._producer.begin_transaction()

    def send(self, topic: str, message: Message, partition: int | None = None) -> Delivery:
        try:
            return _produce(self._producer, topic, message, {} if partition is None else {"partition": partition})
        except Fault as fault:
            if fault.name == "FATAL":  # some answer of a broker's came before this call: a commit says which
                self.commit()
            raise

    def commit(self) -> None:
        with faults():
            self._producer.commit_transaction(self._timeout_s)

    def offset(self, delivery: Delivery) -> int:
        _wait(self._producer, delivery, self._timeout_s)
        if delivery.exception is not None:
            raise fault_of(delivery.exception)
        return delivery.offset

    def discard(self) -> None:
        producer, self._producer = self._producer, None
        _discard(producer)


open_consumer, open_producer, open_transactions = Consumer, Producer, Transactions


def ensure_topic(servers: str, topic: str, config: Config, partitions: int, configs: Mapping[str, str]) -> int:
    admin = connection.connect(AdminClient, connection.settings(servers, config), config)
    count = _count(admin, topic, config)
    if count:
        return count
    timeout_s = config.kafka.request_timeout_s
    made = admin.create_topics([NewTopic(topic, partitions, config=dict(configs))], request_timeout=timeout_s)
    try:
        made[topic].result(timeout_s)
    except KafkaException as error:
        if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:  # another shard was faster
            raise fault_of(error.args[0]) from error
    else:
        log.info("topic %s made", topic)
    deadline = time.monotonic() + timeout_s
    while not (count := _count(admin, topic, config)):
        if time.monotonic() > deadline:
            raise Fault(Kind.PASSING, "timeout", f"made, but not to be seen within {timeout_s:g} s")
        time.sleep(0.05)
    return count


def check() -> str:
    """See `kafka_client.Library`."""
    return f"confluent-kafka {confluent_kafka.version()} on librdkafka {confluent_kafka.libversion()[0]}"


def consumer_settings(servers: str, config: Config, group: str = "", max_wait_s: float = 0.0) -> dict[str, Any]:
    return connection.settings(servers, config) | {
        "group.id": group or config.name,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "error",
        "allow.auto.create.topics": False,
        "check.crcs": True,
        # Where a partition ends, with the markers of transactions passed: the library's position stops before them.
        "enable.partition.eof": True,
        "fetch.wait.max.ms": max(1, round((max_wait_s or config.kafka.fetch_max_wait_s) * 1000)),
        "fetch.queue.backoff.ms": 10,
        "queued.max.messages.kbytes": max(1, config.kafka.fetch_queue_bytes >> 10),
    }


def _producer_settings(servers: str, config: Config) -> dict[str, Any]:
    return connection.settings(servers, config) | {
        "message.max.bytes": config.kafka.max_request_bytes,
        "compression.type": config.kafka.compression,
        "partitioner": "murmur2_random",  # as every other client of Kafka chooses
        # The bounds are ours.
        "queue.buffering.max.messages": 0,
        "queue.buffering.max.kbytes": _NO_LIMIT_KIB,
        "allow.auto.create.topics": False,
    }


def _count(client: Any, topic: str, config: Config) -> int:
    """Of partitions; 0: no such topic, or no right to see it. Asking for one topic alone would make a missing one."""
    with faults():
        told = client.list_topics(timeout=config.kafka.request_timeout_s).topics.get(topic)
    return 0 if told is None else len(told.partitions)


def _produce(producer: Any, topic: str, message: Message, where: dict[str, int]) -> Delivery:
    delivery = Delivery()
    time_ms = 0 if message.time_s is None else round(message.time_s * 1000)
    value = b"" if message.value is None and message.key is None else message.value
    with faults():
        producer.produce(
            topic,
            value,
            message.key,
            on_delivery=delivery.settle,
            timestamp=time_ms,
            headers=list(message.headers),
            **where,
        )
    return delivery


def _wait(producer: Any, delivery: Delivery, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    producer.poll(0)
    while not delivery.is_done and (left_s := deadline - time.monotonic()) > 0:
        producer.poll(left_s)


def _discard(producer: Any) -> None:
    if producer is not None:
        producer.purge(blocking=False)
        held = [producer]
        del producer
        _give_up(held.clear)  # the last reference goes there: taking a client down may wait for its threads


def _give_up(close: Callable[[], Any]) -> None:
    try:
        within(_CLOSE_S, close, "closing")
    except (Fault, KafkaException, RuntimeError) as error:
        log.debug("closing a client: %s", error)
