"""The seams: what a connector implements and what survives a restart. Each has two implementations or more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from streamcl.records import Message, Order, Position, Record, Stream

if TYPE_CHECKING:
    from streamcl.config import Config

State = dict[str, Any]
"""A tree of dicts with string keys; leaves are torch tensors, NumPy arrays or JSON values. Never a pickle."""


@runtime_checkable
class Stateful(Protocol):
    """A part that remembers. Torch's own names, so every nn.Module is one."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> Any: ...


class Source(Protocol):
    """Ordered streams of records that can be read again from any position. Its reader seeks before the first poll.

    Raises (all of them): `ConnectorError` with the topic, partition and cause; never a silent skip.
    """

    def streams(self) -> Sequence[Stream]:
        """The streams of this shard, sorted."""
        ...

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        """At most `limit` records in the order to be taken, in offset order within a stream; () when none came in time.

        With `only`, records of that stream alone: recovery asks for the logged order.
        """
        ...

    def seek(self, position: Position) -> Position:
        """Continue at `position`; a stream that it does not name starts where the source starts by default.

        Returns the next offset of every stream, so that a first start is as repeatable as any other.
        """
        ...

    def commit(self, position: Position) -> None:
        """Show progress to lag tools. Recovery never reads it."""
        ...

    def lag(self) -> Mapping[Stream, int]:
        """Per stream how many records wait, as far as known; >= 0."""
        ...

    def exhausted(self) -> bool:
        """True when no record can come any more (a file at its end)."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Where messages go: predictions, or dead letters.

    `rejected` is told, during `send` or `flush`, of each message that the destination refuses whenever it is sent, and
    why; while it is None that is a ConnectorError.
    """

    rejected: Callable[[Message, str], None] | None

    def send(self, messages: Sequence[Message]) -> None:
        """Take the messages over; may block as back-pressure."""
        ...

    def flush(self) -> None:
        """Return once everything sent is durable. Raises `ConnectorError` when that can't be."""
        ...

    def close(self) -> None: ...


Outputs = Mapping[str, Sequence[Message]]
"""What one turn publishes, by URL; in this order within one."""

NOTHING: Outputs = MappingProxyType({})


class ControlLog(Protocol):
    """A shard's control topic: the order in which its inputs were taken, by a single, fenced writer.

    In exactly-once delivery it carries what is published too: an order and what it brought about become visible
    together or not at all.
    """

    def open(self) -> None:
        """Fence every predecessor. Afterwards none of them can append."""
        ...

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        """(next offset, order) of everything from `start` to the end at the time of the call."""
        ...

    def append(self, order: Order, outputs: Outputs = NOTHING) -> int:
        """Returns, once durable, the offset after this order. Raises `Fenced` when a successor has opened the log.

        `outputs` go out in the same transaction, to brokers that are the log's own: readers of committed records see
        all of it or nothing.
        """
        ...

    def close(self) -> None: ...


class Membership(Protocol):
    """Which shards this process holds: a fixed set, or what a group of processes agrees on.

    `rebalances` counts how often it was given some or lost some, since it joined.
    """

    @property
    def rebalances(self) -> int: ...

    def held(self) -> Mapping[int, int]:
        """By shard the number of its tenure: another number means that it was lost in between.

        Asked between turns, so it returns at once. Raises `Unavailable`, and `ConnectorError` for what needs a person.
        """
        ...

    def settled(self) -> bool:
        """False while it is not yet known which shards are held."""
        ...

    def fenced(self, shard: int) -> bool:
        """Another worker has written to a shard that `held` names. False: it must not be contested."""
        ...

    def close(self) -> None:
        """Give the shards up to whoever else is there."""
        ...


class Connector(Protocol):
    """A module registered in the entry-point group `streamcl.connectors` under its URL scheme.

    `inputs` maps an input's name to its URL; all of them share scheme and host.
    """

    def open_source(self, inputs: Mapping[str, str], config: Config) -> Source: ...

    def open_sink(self, url: str, config: Config) -> Sink: ...

    def open_control(self, url: str, config: Config) -> ControlLog: ...

    def check(self, urls: Collection[str], config: Config) -> Sequence[str]:
        """Connect and look. Returns one line for each finding; raises ConnectorError for what can't work."""
        ...


class StreamclError(Exception):
    """Base of every error that a user can cause or cure; its text is for them."""


class ConnectorError(StreamclError):
    """The outside world said no: the message names the URL or topic, partition, offset and the cause."""


class Unavailable(ConnectorError):
    """What passes by itself: brokers that are away, a time-out, a transaction whose outcome is unknown.

    The cure is to open everything anew and to recover; a plain ConnectorError needs a person.
    """


class Gap(ConnectorError):
    """Records that were wanted are gone: retention was faster.

    Attributes:
        wanted, available: By stream the offset asked for, and the first one that is still there.
    """

    def __init__(self, text: str, wanted: Position, available: Position) -> None:
        super().__init__(text)
        self.wanted = wanted
        self.available = available


class Fenced(ConnectorError):
    """Another worker has taken over this shard."""


class BadInput(StreamclError):
    """A record that can't be used. `reason` is a dead-letter reason, the text names the field, not the value."""

    def __init__(self, reason: str, error: str) -> None:
        super().__init__(error)
        self.reason = reason


class Seconds(float):
    """A time since 1970 from a codec that knows its unit, whatever `time_unit` says of plain numbers."""


class Codec(Protocol):
    """Bytes to a mapping and back."""

    def decode(self, value: bytes) -> Mapping[str, Any]:
        """Raises BadInput(`undecodable`); ConnectorError when what it takes to read the payload can't be had now."""
        ...

    def encode(self, value: Mapping[str, Any]) -> bytes: ...


class Codecs(NamedTuple):
    """Who reads what comes and writes what goes."""

    events: Codec
    labels: Codec
    predictions: Codec


class Format(Protocol):
    """A class registered in the entry-point group `streamcl.codecs` under its name.

    `place` is where its payloads are: `events`, `labels`, `predictions`, or `requests` (of a read replica).
    """

    def open(self, config: Config, place: str) -> Codec:
        """Ready to work: what predictions need outside (a registered schema) is there afterwards."""
        ...

    def check(self, config: Config, place: str) -> Sequence[str]:
        """Look, and change nothing. One line for each finding; raises ConnectorError for what can't work."""
        ...
