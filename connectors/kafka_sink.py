"""A sink that loses nothing: an ordered ledger of what is not acknowledged, over a producer that may be thrown away.

    ready ── a failed delivery ──▶ broken ── discarded, a back-off ──▶ rebuilt ── the ledger again, from its head


What breaks the rebuilt producer again may be a record's fault. Then the ledger is sent in ever smaller parts, until one
record is left: that is the poison. It goes to `rejected`, the rest goes on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from connectors import kafka_client as client
from connectors.kafka_client import Delivery, Fault, Kind
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Unavailable
from streamcl.records import Message

log = logging.getLogger(__name__)

_RECORD_FAULTS = (Kind.RECORD, Kind.BROKEN)
# How often a record must fail alone to be the poison. A broker that does not say why may be sick itself.
_VERDICT = {Kind.RECORD: 1, Kind.BROKEN: 3}


class _Refused:
    """The delivery of a message that the producer did not even take."""

    is_done = True

    def __init__(self, fault: Fault) -> None:
        self.exception: Any = fault


@dataclass(slots=True)
class _Entry:
    """A message that was taken over. `deadline` is when it must have been acknowledged, on the monotonic clock.

    `delivery` is None while it waits to be sent again.
    """

    message: Message
    size: int
    deadline: float
    delivery: Delivery | None


class KafkaSink:
    """Sends to one topic, made when it is missing; partition by key.

    At least once: an outage shorter than kafka.delivery_timeout_s loses nothing and may repeat what was on its way.
    F5: a library queues without bound, so the bound is ours: `send` blocks while kafka.max_inflight_records or _bytes
    are unacknowledged.

    A message whose value and key are both None is sent with an empty value.

    Attributes:
        rejected: Told of each message that brokers refuse whenever it is sent, and why. None: that is an error.
        blocked: `send` waits for room.
        ready: The producer works; False from a failed delivery until it is replaced.
        rebuilds: How often the producer was replaced (count).
        rejections: How many messages went to `rejected` (count).
        errors: How often deliveries failed, by the class of the error (counts).

    Raises:
        Unavailable: no broker; later: brokers were away for longer than kafka.delivery_timeout_s.
        ConnectorError: a topic that can't be made, a refusal that has lasted for kafka.delivery_timeout_s.
    """

    def __init__(self, url: str, config: Config) -> None:
        self._url, self._config = url, config
        self._servers, self._topic = client.locate(url)
        self.rejected: Callable[[Message, str], None] | None = None
        self.blocked, self.ready = False, True
        self.inflight_bytes = self.rebuilds = self.rejections = 0
        self.errors: Counter[str] = Counter()
        self._ledger: deque[_Entry] = deque()
        self._part = 0  # how many may be under way at a time; 0: no limit, nobody is suspected
        self._alone = 0  # how often the head has failed while nothing else was under way
        self._failures = self._accusations = 0  # since something was last acknowledged; of them, those of a record
        self._producer = self._open()

    @property
    def inflight_records(self) -> int:
        return len(self._ledger)

    def send(self, messages: Sequence[Message]) -> None:
        """See `Sink.send`.

        Raises:
            BadInput: `too_large`: one of them is over kafka.max_request_bytes; none has been taken over.
            ConnectorError: see the class.
        """
        sizes = client.sizes_within(messages, self._config.kafka.max_request_bytes, self._url)
        deadline = time.monotonic() + self._config.kafka.delivery_timeout_s
        for message, size in zip(messages, sizes, strict=True):
            if self._full(size):
                self._make_room(size)
                deadline = time.monotonic() + self._config.kafka.delivery_timeout_s
            delivery = None if self._part else self._produce(message)
            self._ledger.append(_Entry(message, size, deadline, delivery))
            self.inflight_bytes += size
        self._settle()

    def flush(self) -> None:
        """See `Sink.flush`. Raises ConnectorError, see the class."""
        while self._ledger:
            self._wait()

    def close(self) -> None:
        """Give up what is not acknowledged; call `flush` before to keep it."""
        self._ledger.clear()
        self.inflight_bytes = 0
        self._producer.discard()

    def _open(self) -> client.Producer:
        client.ensure_outputs(self._url, self._config)
        try:
            return client.library(self._config).open_producer(self._servers, self._topic, self._config)
        except Fault as fault:
            raise fault.at(self._url) from fault

    def _produce(self, message: Message) -> Delivery:
        try:
            return self._producer.send(message)
        except Fault as fault:
            return _Refused(fault)

    def _fault(self, entry: _Entry) -> Fault | None:
        assert entry.delivery is not None  # noqa: S101 - only what was sent is asked for
        if isinstance(entry.delivery, _Refused):
            return entry.delivery.exception  # type: ignore[no-any-return]  # of our own making
        return self._producer.fault(entry.delivery)

    def _full(self, size: int) -> bool:
        kafka = self._config.kafka
        return bool(self._ledger) and (
            len(self._ledger) >= kafka.max_inflight_records or self.inflight_bytes + size > kafka.max_inflight_bytes
        )

    def _make_room(self, size: int) -> None:
        self._settle()
        self.blocked = self._full(size)
        try:
            while self._full(size):
                self._wait()
        finally:
            self.blocked = False

    def _wait(self) -> None:
        """Until the head of the ledger is settled, and whatever else is settled by then."""
        head = self._ledger[0]
        assert head.delivery is not None  # noqa: S101 - the head is always sent, see _resend
        self._producer.wait(head.delivery, max(head.deadline - time.monotonic(), 0.0))
        if not head.delivery.is_done:
            raise self._undelivered(Fault(Kind.PASSING, "timeout", "no broker could be reached"))
        self._settle()

    def _settle(self) -> None:
        """Strike acknowledged messages off the head of the ledger; a failed one breaks the producer."""
        ledger = self._ledger
        while ledger and ledger[0].delivery is not None and ledger[0].delivery.is_done:
            if ledger[0].delivery.exception is not None:
                self._broken(self._fault(ledger[0]) or Fault(Kind.BROKEN, "unknown", "failed, not known why"))
            else:
                self.inflight_bytes -= ledger.popleft().size
                self._alone = self._failures = self._accusations = 0
        if self._part:
            self._resend()

    def _broken(self, fault: Fault) -> None:
        """The head of the ledger has failed. Find out who is to blame; then another producer, and the ledger again."""
        self.errors[fault.name] += 1
        self.ready = False
        under_way = sum(not _acknowledged(entry) for entry in self._ledger if entry.delivery is not None)
        guilty = False
        if fault.kind in _RECORD_FAULTS:
            if self._accusations or self._part:
                self._alone += under_way == 1
                guilty = self._alone >= _VERDICT[fault.kind]
                self._part = max(1, under_way // 2)
            self._accusations += 1
        self._failures += 1
        if guilty:
            self._reject(fault)
        elif time.monotonic() >= self._ledger[0].deadline:
            raise self._undelivered(fault) from fault
        self._rebuild(fault)
        if self._ledger:
            self._resend()

    def _reject(self, fault: Fault) -> None:
        entry = self._ledger[0]
        if self.rejected is None:
            raise ConnectorError(f"{self._url}: a message is refused whenever it is sent: {fault}") from fault
        log.error("%s: a message of %d bytes is refused whenever it is sent: %s", self._url, entry.size, fault)
        self.rejected(entry.message, f"{fault.name}: {fault}")
        self.rejections += 1
        self._ledger.popleft()
        self.inflight_bytes -= entry.size
        self._part = self._alone = self._failures = self._accusations = 0
        deadline = time.monotonic() + self._config.kafka.delivery_timeout_s
        for each in self._ledger:  # what stood behind it has waited through no fault of its own
            each.deadline = deadline

    def _rebuild(self, fault: Fault) -> None:
        log.warning("%s: %s; sending %d messages again", self._url, fault, len(self._ledger))
        for entry in self._ledger:
            if not _acknowledged(entry):
                entry.delivery = None
        self._producer.discard()
        later = time.monotonic() + self._config.kafka.delivery_timeout_s
        deadline = self._ledger[0].deadline if self._ledger else later
        wait_s = 0.0 if fault.kind is Kind.RECORD else client.backoff_s(self._failures)
        while True:
            time.sleep(max(0.0, min(wait_s, deadline - time.monotonic())))
            try:
                self._producer = self._open()
                break
            except ConnectorError:
                self._failures += 1
                wait_s = client.backoff_s(self._failures)
                if time.monotonic() >= deadline:
                    raise
        self.rebuilds += 1
        self.ready = True

    def _resend(self) -> None:
        """What waits, from the head of the ledger, as much of it as may be under way."""
        under_way = 0
        for entry in self._ledger:
            if self._part and under_way >= self._part:
                return
            if entry.delivery is None:
                entry.delivery = self._produce(entry.message)
            under_way += not entry.delivery.is_done
        self._part = 0  # everything is under way again

    def _undelivered(self, fault: Fault) -> ConnectorError:
        error = Unavailable if fault.kind is Kind.PASSING else ConnectorError
        count, limit = len(self._ledger), self._config.kafka.delivery_timeout_s
        return error(
            f"{self._url}: {count} messages are not acknowledged (kafka.delivery_timeout_s is {limit:g}): {fault}"
        )


def _acknowledged(entry: _Entry) -> bool:
    return entry.delivery is not None and entry.delivery.is_done and entry.delivery.exception is None
