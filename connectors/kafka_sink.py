"""A sink that loses nothing: an ordered ledger of what is not acknowledged, over a producer that may be thrown away."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from connectors import kafka_client as client
from connectors.kafka_client import Delivery, Fault, Kind
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Unavailable
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
    delivery: Delivery


class KafkaSink:
    """Sends to one topic, made when it is missing; partition by key.

    At least once: an outage shorter than kafka.delivery_timeout_s loses nothing and may repeat what was on its way.
    F5: a library queues without bound, so the bound is ours: `send` blocks while kafka.max_inflight_records or _bytes
    are unacknowledged.

    A message whose value and key are both None is sent with an empty value.

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
        self._producer.discard()

    def _open(self) -> client.Producer:
        return client.library(self._config).open_producer(self._servers, self._topic, self._config)

    def _produce(self, message: Message) -> Delivery:
        try:
            return self._producer.send(message)
        except Fault as fault:
            raise fault.at(self._url) from fault

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
        left_s = head.deadline - time.monotonic()
        self._producer.wait(head.delivery, max(left_s, 0.0))
        if not head.delivery.is_done:
            raise self._undelivered(Fault(Kind.PASSING, "timeout", "no broker could be reached"))
        self._settle()

    def _settle(self) -> None:
        """Strike acknowledged messages off the head of the ledger; a failed one breaks the producer."""
        while self._ledger and self._ledger[0].delivery.is_done:
            fault = self._producer.fault(self._ledger[0].delivery)
            if fault is not None:
                self._rebuild(fault)
                return
            self.inflight_bytes -= self._ledger.popleft().size

    def _rebuild(self, fault: Fault) -> None:
        """Another producer, and the ledger again from its head: order is kept, nothing is lost."""
        late = time.monotonic() >= self._ledger[0].deadline
        if late or fault.kind not in (Kind.PASSING, Kind.RECORD):
            raise self._undelivered(fault) from fault
        log.warning("%s: %s; sending %d messages again", self._url, fault, len(self._ledger))
        settled = [entry.delivery.is_done and self._producer.fault(entry.delivery) is None for entry in self._ledger]
        self._producer.discard()
        time.sleep(_BACKOFF_S)
        self._producer = self._open()
        self.rebuilds += 1
        for entry, done in zip(self._ledger, settled, strict=True):
            if not done:
                entry.delivery = self._produce(entry.message)

    def _undelivered(self, fault: Fault) -> ConnectorError:
        error = Unavailable if fault.kind is Kind.PASSING else ConnectorError
        count, limit = len(self._ledger), self._config.kafka.delivery_timeout_s
        return error(
            f"{self._url}: {count} messages are not acknowledged (kafka.delivery_timeout_s is {limit:g}): {fault}"
        )


def _size(message: Message) -> int:
    """Bytes of the message on the wire before compression; an upper bound."""
    headers = sum(len(name.encode()) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in message.headers)
    return _RECORD_OVERHEAD_BYTES + len(message.value or b"") + len(message.key or b"") + headers
