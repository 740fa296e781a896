"""A sink that loses nothing: an ordered ledger of what is not acknowledged, over a producer that may be thrown away."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka import errors as kafka_errors

from connectors import kafka_client as client
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError
from streamcl.records import Message

log = logging.getLogger(__name__)

_RECORD_OVERHEAD_BYTES, _HEADER_OVERHEAD_BYTES = 128, 10  # above what the client adds for batch, record and lengths
_BACKOFF_S = 0.1


@dataclass(slots=True)
class _Entry:
    """A message that was taken over. `deadline` is when it must have been acknowledged, on the monotonic clock."""

    message: Message
    size: int
    deadline: float
    future: Any


class KafkaSink:
    """Sends to one topic, made when it is missing; partition by key.

    At least once: an outage shorter than kafka.delivery_timeout_s loses nothing and may repeat what was on its way.
    F1, F2: the client's default, an idempotent producer, never sends again after one refused record or a long outage,
    so idempotence is off and order is kept by one request in flight. F5: the client queues without bound, so the
    bound is ours: `send` blocks while kafka.max_inflight_records or _bytes are unacknowledged.

    A message whose value and key are both None is sent with an empty value; the client can't send it otherwise.

    Attributes:
        rebuilds: How often the producer was replaced (count).

    Raises:
        ConnectorError: unreachable or refusing broker, a topic that can't be made; later: not acknowledged in time.
    """

    def __init__(self, url: str, config: Config) -> None:
        self._url, self._config = url, config
        self._servers, self._topic = client.locate(url)
        client.ensure_topic(self._servers, self._topic, config)
        self._ledger: deque[_Entry] = deque()
        self.inflight_bytes = self.rebuilds = 0
        self._producer = self._open()

    @property
    def inflight_records(self) -> int:
        return len(self._ledger)

    def send(self, messages: Sequence[Message]) -> None:
        """See `Sink.send`.

        Raises:
            BadInput: `too_large`: one of them is over kafka.max_request_bytes; none has been taken over.
            ConnectorError: not acknowledged within kafka.delivery_timeout_s, or refused.
        """
        sizes = [_size(message) for message in messages]
        limit = self._config.kafka.max_request_bytes
        largest = max(sizes, default=0)
        if largest > limit:
            raise BadInput(
                "too_large", f"{self._url}: a message of {largest} bytes, kafka.max_request_bytes is {limit}"
            )
        for message, size in zip(messages, sizes, strict=True):
            self._wait_for_room(size)
            deadline = time.monotonic() + self._config.kafka.delivery_timeout_s
            self._ledger.append(_Entry(message, size, deadline, self._produce(message)))
            self.inflight_bytes += size
        self._settle()

    def flush(self) -> None:
        """See `Sink.flush`. Raises ConnectorError after kafka.delivery_timeout_s at most."""
        while self._ledger:
            self._wait()

    def close(self) -> None:
        """Give up what is not acknowledged; call `flush` before to keep it."""
        self._ledger.clear()
        self.inflight_bytes = 0
        client.discard(self._producer)

    def _open(self) -> Any:
        kafka = self._config.kafka
        wanted = client.settings(self._servers, self._config) | {
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
        producer = client.connect(KafkaProducer, wanted, self._config)
        with client.plain_errors(self._url):
            producer.partitions_for(self._topic)  # now, so that no `send` has to wait for it
        return producer

    def _produce(self, message: Message) -> Any:
        value = b"" if message.value is None and message.key is None else message.value
        time_ms = None if message.time_s is None else round(message.time_s * 1000)
        try:
            return self._producer.send(self._topic, value, message.key, list(message.headers), timestamp_ms=time_ms)
        except kafka_errors.KafkaError as error:
            raise ConnectorError(f"{self._url}: {client.explain(error)}") from error

    def _wait_for_room(self, size: int) -> None:
        kafka = self._config.kafka
        if len(self._ledger) >= kafka.max_inflight_records or self.inflight_bytes + size > kafka.max_inflight_bytes:
            self._settle()
        while self._ledger and (
            len(self._ledger) >= kafka.max_inflight_records or self.inflight_bytes + size > kafka.max_inflight_bytes
        ):
            self._wait()

    def _wait(self) -> None:
        """Until the head of the ledger is settled, and whatever else is settled by then."""
        head = self._ledger[0]
        try:
            head.future.get(max(head.deadline - time.monotonic(), 0.0))
        except kafka_errors.KafkaError as error:
            if not head.future.is_done:
                raise self._undelivered(error) from error
        self._settle()

    def _settle(self) -> None:
        """Strike acknowledged messages off the head of the ledger; a failed one breaks the producer."""
        while self._ledger and self._ledger[0].future.is_done:
            if self._ledger[0].future.failed():
                self._rebuild(self._ledger[0].future.exception)
                return
            self.inflight_bytes -= self._ledger.popleft().size

    def _rebuild(self, error: Exception) -> None:
        """Another producer, and the ledger again from its head: order is kept, nothing is lost."""
        late = time.monotonic() >= self._ledger[0].deadline
        if late or not (client.transient(error) or isinstance(error, kafka_errors.UnknownError)):
            raise self._undelivered(error) from error
        log.warning("%s: %s; sending %d messages again", self._url, client.explain(error), len(self._ledger))
        client.discard(self._producer)
        time.sleep(_BACKOFF_S)
        self._producer = self._open()
        self.rebuilds += 1
        for entry in self._ledger:
            if not (entry.future.is_done and entry.future.succeeded()):
                entry.future = self._produce(entry.message)

    def _undelivered(self, error: Exception) -> ConnectorError:
        count, limit = len(self._ledger), self._config.kafka.delivery_timeout_s
        return ConnectorError(
            f"{self._url}: {count} messages are not acknowledged (kafka.delivery_timeout_s is {limit:g}):"
            f" {client.explain(error)}"
        )


def _size(message: Message) -> int:
    """Bytes of the message on the wire before compression; an upper bound."""
    headers = sum(len(name.encode()) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in message.headers)
    return _RECORD_OVERHEAD_BYTES + len(message.value or b"") + len(message.key or b"") + headers
