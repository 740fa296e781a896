"""The control log on Kafka: a topic of one partition, written by a fenced producer, one transaction per order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import orjson
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from connectors import kafka_client as client
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Fenced
from streamcl.records import Message, Order

T = TypeVar("T")

_FENCED = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.TransactionCoordinatorFencedError,
)


class KafkaControlLog:
    """One shard's orders. `transactional.id` is `{name}-{shard.index}`: who opens last is the only one that can append.

    After any failed append the outcome of its transaction is unknown, so the log is shut until it is opened again and
    read to its end: the same path as after a crash.

    Raises:
        ConnectorError: an unreachable or refusing broker, a topic with more than one partition.
    """

    def __init__(self, url: str, config: Config) -> None:
        self._url, self._config = url, config
        self._servers, self._topic = client.locate(url)
        self._outputs = client.locate(config.predictions)[1] if config.predictions else ""
        self._producer: Any = None

    def open(self) -> None:
        """See `ControlLog.open`. Makes a missing topic, one that keeps its records for ever."""
        self.close()
        count = client.ensure_topic(self._servers, self._topic, self._config, 1, retention_ms="-1")
        if count != 1:
            raise ConnectorError(f"{self._url}: a control log needs 1 partition, this topic has {count}")
        self._producer = client.connect(KafkaProducer, self._settings(), self._config)
        self._guarded(self._producer.init_transactions)

    def append(self, order: Order, outputs: Sequence[Message] = ()) -> int:
        """See `ControlLog.append`. About 2.5 ms; gives up after kafka.transaction_timeout_s.

        Raises:
            Fenced: another worker has opened this log.
            ConnectorError: not opened, or the outcome is unknown.
        """
        if self._producer is None:
            raise ConnectorError(f"{self._url}: append to a control log that is not open")
        value = orjson.dumps({"shard": self._config.shard.index} | order.to_json())
        return self._guarded(lambda: self._transaction(value, outputs)) + 1

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        """See `ControlLog.read`.

        Raises:
            ConnectorError: `start` is outside the log, its end does not come within kafka.connect_timeout_s, or a
                record is no order; names the offset.
        """
        partition = TopicPartition(self._topic, 0)
        limit = client.bounds(self._servers, [partition], self._config)[partition]
        if not limit.start <= start <= limit.end:
            raise ConnectorError(
                f"{self._url} partition 0: offset {start} is wanted, available are {limit.start} to {limit.end}"
            )
        return self._orders(partition, start, limit.end)

    def close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            client.discard(producer)

    def _transaction(self, value: bytes, outputs: Sequence[Message]) -> int:
        """The offset of the control record, once its transaction is committed."""
        producer = self._producer
        producer.begin_transaction()
        for message in outputs:
            producer.send(self._outputs, message.value, message.key, list(message.headers))
        sent = producer.send(self._topic, value=value, partition=0)
        producer.commit_transaction()
        return int(sent.get(0).offset)

    def _settings(self) -> dict[str, Any]:
        kafka = self._config.kafka
        return client.settings(self._servers, self._config) | {
            "transactional_id": f"{self._config.name}-{self._config.shard.index}",
            "transaction_timeout_ms": round(kafka.transaction_timeout_s * 1000),
            "max_block_ms": round(kafka.transaction_timeout_s * 1000),
            # Waits in steps of this are what a transaction's slowest percentile consists of.
            "retry_backoff_ms": 20,
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
        }

    def _guarded(self, work: Callable[[], T]) -> T:
        """Run on a thread of its own, for commits have no time-out (F4); any failure shuts the log (F3)."""
        future: Future[T] = Future()
        threading.Thread(target=_run, args=(work, future), name="streamcl-control", daemon=True).start()
        try:
            return future.result(self._config.kafka.transaction_timeout_s)
        except _FENCED as error:
            self.close()
            raise Fenced(f"{self._url}: another worker has opened the control log of this shard") from error
        except (kafka_errors.KafkaError, TimeoutError) as error:
            self.close()
            cause = client.explain(error) or f"no answer within {self._config.kafka.transaction_timeout_s:g} s"
            raise ConnectorError(f"{self._url}: {cause}; what became of the transaction is unknown") from error

    def _orders(self, partition: TopicPartition, start: int, end: int) -> Iterator[tuple[int, Order]]:
        consumer = client.connect(KafkaConsumer, client.consumer_settings(self._servers, self._config), self._config)
        try:
            consumer.assign([partition])
            consumer.seek(partition, start)
            deadline = time.monotonic() + self._config.kafka.connect_timeout_s
            # The position steps over the markers of transactions; the last record's offset would stop short of the end.
            while consumer.position(partition, timeout_ms=0) < end:
                with client.plain_errors(self._url):
                    fetched = consumer.poll(timeout_ms=100).get(partition, [])
                if fetched:
                    deadline = time.monotonic() + self._config.kafka.connect_timeout_s
                elif time.monotonic() > deadline:
                    at = consumer.position(partition, timeout_ms=0)
                    raise ConnectorError(f"{self._url}: can't be read to its end: at offset {at} of {end}")
                for record in fetched:
                    if record.offset < end:
                        yield record.offset + 1, self._order(record)
        finally:
            consumer.close(timeout_ms=1000)

    def _order(self, record: Any) -> Order:
        try:
            found = orjson.loads(record.value or b"")
            shard, order = found["shard"], Order.from_json(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConnectorError(f"{self._url} partition 0, offset {record.offset}: not an order: {error}") from error
        if shard != self._config.shard.index:
            raise ConnectorError(
                f"{self._url} partition 0, offset {record.offset}: written by shard {shard},"
                f" this is shard {self._config.shard.index}"
            )
        return order


def _run(work: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised again where the result is awaited
        future.set_exception(error)
