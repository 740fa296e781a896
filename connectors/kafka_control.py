"""The control log on Kafka: a topic of one partition, written by a fenced producer, one transaction per order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import orjson

from connectors import kafka_client as client
from connectors.kafka_client import Fault, Kind, within
from streamcl.config import Config
from streamcl.protocols import NOTHING, ConnectorError, Fenced, Outputs, Unavailable
from streamcl.records import Message, Order, Record, Stream

T = TypeVar("T")

_LOG = Stream("control", 0)
# After these an append may have come through or not; opening anew tells, and cures. Denials it does not cure.
_OUTCOME_UNKNOWN = (Kind.PASSING, Kind.BROKEN, Kind.RANGE)


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
        self._producer: client.Transactions | None = None
        self._fenced = False

    def open(self) -> None:
        """See `ControlLog.open`. Makes a missing topic, one that keeps its records for ever."""
        self.close()
        self._fenced = False
        count = client.ensure_topic(self._servers, self._topic, self._config, 1, {"retention.ms": "-1"})
        if count != 1:
            raise ConnectorError(f"{self._url}: a control log needs 1 partition, this topic has {count}")
        for url in self._config.published if self._config.exactly_once else ():
            client.ensure_outputs(url, self._config)
        self._producer = client.library(self._config).open_transactions(self._servers, self._config)
        self._guarded(self._producer.init, passing=(Kind.PASSING,))  # nothing is under way yet

    def append(self, order: Order, outputs: Outputs = NOTHING) -> int:
        """See `ControlLog.append`. About 2.5 ms; gives up after kafka.transaction_timeout_s.

        Raises:
            Fenced: another worker has opened this log.
            Unavailable: the outcome is unknown.
            ConnectorError: not opened, or refused for a reason that stays.
            BadInput: `too_large`: something is over kafka.max_request_bytes; nothing has been sent, the log stays open.
        """
        if self._fenced:
            raise self._taken_over()
        if self._producer is None:
            raise ConnectorError(f"{self._url}: append to a control log that is not open")
        record = Message(orjson.dumps({"shard": self._config.shard.index} | order.to_json()))
        sent = [(client.locate(url)[1], message) for url, messages in outputs.items() for message in messages]
        client.sizes_within(
            [record, *(message for _, message in sent)], self._config.kafka.max_request_bytes, self._url
        )
        return self._guarded(lambda: self._transaction(record, sent)) + 1

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        """See `ControlLog.read`.

        Raises:
            ConnectorError: `start` is outside the log, its end does not come within kafka.connect_timeout_s, or a
                record is no order; names the offset.
        """
        limit = client.bounds(self._servers, {"control": self._topic}, [_LOG], self._config)[_LOG]
        if not limit.start <= start <= limit.end:
            raise ConnectorError(
                f"{self._url} partition 0: offset {start} is wanted, available are {limit.start} to {limit.end}"
            )
        return self._orders(start, limit.end)

    def close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            producer.discard()

    def _transaction(self, record: Message, outputs: list[tuple[str, Message]]) -> int:
        """The offset of the control record, once its transaction is committed."""
        producer = self._producer
        assert producer is not None  # noqa: S101 - `append` looks first
        producer.begin()
        for topic, message in outputs:
            producer.send(topic, message)
        sent = producer.send(self._topic, record, 0)
        producer.commit()
        offset = producer.offset(sent)
        if offset < 0:  # brokers have had it before, and forgotten where
            raise Fault(Kind.PASSING, "NoOffset", "the order is written, where is not told")
        return offset

    def _guarded(self, work: Callable[[], T], passing: Collection[Kind] = _OUTCOME_UNKNOWN) -> T:
        """Any failure shuts the log (F3); which ones pass when it is opened anew is the caller's to say."""
        try:
            return within(self._config.kafka.transaction_timeout_s, work, "the transaction")
        except Fault as fault:
            self.close()
            if fault.kind is Kind.FENCED:
                self._fenced = True
                raise self._taken_over() from fault
            if fault.kind not in passing:
                raise fault.at(self._url) from fault
            raise Unavailable(f"{self._url}: {fault}; what became of the transaction is unknown") from fault

    def _taken_over(self) -> Fenced:
        return Fenced(f"{self._url}: another worker has opened the control log of this shard")

    def _orders(self, start: int, end: int) -> Iterator[tuple[int, Order]]:
        topics = {"control": self._topic}
        consumer = client.library(self._config).open_consumer(self._servers, topics, self._config)
        try:
            consumer.assign({_LOG: start})
            deadline = time.monotonic() + self._config.kafka.connect_timeout_s
            # The position steps over the markers of transactions; the last record's offset would stop short of the end.
            while consumer.position(_LOG) < end:
                fetched = consumer.poll(0.1).get(_LOG, [])
                for record in fetched:
                    if record.origin.offset < end:
                        yield record.origin.offset + 1, self._order(record)
                at = consumer.position(_LOG)
                if fetched:  # only now: whoever follows the orders may have taken long
                    deadline = time.monotonic() + self._config.kafka.connect_timeout_s
                elif at < end and time.monotonic() > deadline:
                    raise Unavailable(f"{self._url}: can't be read to its end: at offset {at} of {end}")
        except Fault as fault:
            raise fault.at(self._url) from fault
        finally:
            consumer.close()

    def _order(self, record: Record) -> Order:
        where = f"{self._url} partition 0, offset {record.origin.offset}"
        try:
            found = orjson.loads(record.value or b"")
            shard, order = found["shard"], Order.from_json(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConnectorError(f"{where}: not an order: {error}") from error
        if shard != self._config.shard.index:
            raise ConnectorError(f"{where}: written by shard {shard}, this is shard {self._config.shard.index}")
        return order
