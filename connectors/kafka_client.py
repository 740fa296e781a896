"""The seam below source, sink and control log: what a client library must do, and nothing that we decide ourselves.

`connectors.kafka_python` is the default library, `connectors.librdkafka` the other one; `library` picks. Streams and
records are ours on this side, faults come in the terms that we act on, so every decision above stands once.

The traps named `F1` to `F11` in these modules are faults of a client that we found by running it; each comment says
what is done about one.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from enum import StrEnum
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import urlsplit

from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Fenced, Unavailable
from streamcl.records import Message, Position, Record, Stream

T = TypeVar("T")

LONGEST_BACKOFF_S = 5.0
_FIRST_BACKOFF_S = 0.1
_JITTER = random.SystemRandom()  # never the state's generator: a restart must not change what is learned
_RECORD_OVERHEAD_BYTES, _HEADER_OVERHEAD_BYTES = 128, 10  # above what a library adds for batch, record and lengths
_LIBRARIES = {
    "kafka-python": ("connectors.kafka_python", "kafka-python[crc32c,lz4,zstd]"),
    "librdkafka": ("connectors.librdkafka", "streamcl[librdkafka]"),
}


class Bounds(NamedTuple):
    """The offsets that a partition holds: `start` <= offset < `end`."""

    start: int
    end: int


class Kind(StrEnum):
    """What can be done about a fault."""

    PASSING = "passing"  # it goes by itself: brokers away, a time-out
    DENIED = "denied"  # the broker's rules: no such topic, not authorised, wrong password
    RECORD = "record"  # this record is refused, whenever and by whomever it is sent
    RANGE = "range"  # what was to be read next is not there
    FENCED = "fenced"  # another writer has taken over
    BROKEN = "broken"  # everything else


class Fault(Exception):
    """What a library said.

    Attributes:
        name: The class of the error, for metrics: few values, no addresses.
        stream, offset: Where, for `Kind.RANGE`.
    """

    def __init__(self, kind: Kind, name: str, text: str, stream: Stream | None = None, offset: int = -1) -> None:
        super().__init__(text)
        self.kind, self.name, self.stream, self.offset = kind, name, stream, offset

    def at(self, where: str) -> ConnectorError:
        """As an error for a person, beginning with `where`."""
        error = {Kind.PASSING: Unavailable, Kind.FENCED: Fenced}.get(self.kind, ConnectorError)
        return error(f"{where}: {self}")


class Consumer(Protocol):
    """Reads committed records of partitions assigned by hand. One thread. Every method may raise Fault."""

    def assign(self, position: Position) -> None:
        """Read these streams from these offsets, and no others. None is paused."""
        ...

    def poll(self, timeout_s: float) -> Mapping[Stream, list[Record]]:
        """What has arrived; waits when that is nothing."""
        ...

    def pause(self, stream: Stream) -> None: ...

    def resume(self, stream: Stream) -> None: ...

    def position(self, stream: Stream) -> int:
        """The next offset to fetch; it steps over the markers of transactions. 0 when nothing is assigned yet."""
        ...

    def highwater(self, stream: Stream) -> int | None:
        """The offset of the next append, as the last fetch told; None before the first."""
        ...

    def asked(self, streams: Sequence[Stream]) -> dict[Stream, Bounds]:
        """Start and end as brokers answer; see `bounds`."""
        ...

    def partitions(self, name: str) -> int:
        """How many the topic of an input has; 0: no such topic, or no right to see it."""
        ...

    def known_partitions(self, name: str) -> int:
        """The same from what has been heard, without asking; 0: nothing heard yet."""
        ...

    def reachable(self) -> bool:
        """Whether a broker is connected, as the library knows it, some seconds late. Polls say nothing of it."""
        ...

    def commit(self, position: Position, failed: Callable[[str], None]) -> None:
        """Returns at once; `failed` may be called later, from any thread."""
        ...

    def close(self) -> None: ...


class Delivery(Protocol):
    """What becomes of one message. `exception` is the library's own; see `Producer.fault`."""

    is_done: bool
    exception: Any


class Producer(Protocol):
    """Sends at least once, in order, all replicas' acknowledgement. One thread. Sending raises Fault."""

    def send(self, message: Message) -> Delivery: ...

    def wait(self, delivery: Delivery, timeout_s: float) -> None:
        """Until it is done, or the time is over. Serves what is under way meanwhile."""
        ...

    def fault(self, delivery: Delivery) -> Fault | None:
        """Why a delivery that is done has failed."""
        ...

    def discard(self) -> None:
        """Close a producer of unknown state. Never raises; waits about 2 s at most."""
        ...


class Transactions(Protocol):
    """A fenced producer. Calls may block for ever: run them under `within`. Every method may raise Fault."""

    def init(self) -> None:
        """Fence predecessors and settle what they left."""
        ...

    def begin(self) -> None: ...

    def send(self, topic: str, message: Message, partition: int | None = None) -> Delivery: ...

    def commit(self) -> None: ...

    def offset(self, delivery: Delivery) -> int:
        """Of a message whose transaction is committed."""
        ...

    def discard(self) -> None: ...


class Library(Protocol):
    """A module that wraps a client library.

    Raises (all of them): ConnectorError: refused; Unavailable: no broker within kafka.connect_timeout_s.
    """

    def open_consumer(
        self, servers: str, topics: Mapping[str, str], config: Config, *, group: str = "", max_wait_s: float = 0.0
    ) -> Consumer:
        """`topics` by input name. With `group` it can `commit`. `max_wait_s` instead of kafka.fetch_max_wait_s."""
        ...

    def open_producer(self, servers: str, topic: str, config: Config) -> Producer: ...

    def open_transactions(self, servers: str, config: Config) -> Transactions: ...

    def ensure_topic(
        self, servers: str, topic: str, config: Config, partitions: int, configs: Mapping[str, str]
    ) -> int:
        """Make a missing topic (-1: as many partitions as the broker likes); the number of its partitions."""
        ...

    def check(self) -> str:
        """One line about the library. Raises ConnectorError when a part of it is missing."""
        ...


def library(config: Config) -> Library:
    """The one that `kafka.client` names. Raises ConnectorError when it is not installed."""
    module, package = _LIBRARIES[config.kafka.client]
    try:
        found: Library = cast("Library", import_module(module))
    except ImportError as error:
        raise ConnectorError(f"kafka.client is {config.kafka.client}: pip install '{package}': {error}") from error
    return found


def locate(url: str) -> tuple[str, str]:
    """(bootstrap servers, topic) of `kafka://host:port[,host:port]/topic`. Raises ConnectorError."""
    parts = urlsplit(url)
    topic = parts.path.strip("/")
    if "@" in parts.netloc:
        raise ConnectorError(f"kafka URL of topic {topic!r}: credentials belong in [kafka], not in the URL")
    if parts.scheme != "kafka" or not parts.netloc or not topic or "/" in topic:
        raise ConnectorError(f"{url!r} is not of the form kafka://host:port[,host:port]/topic")
    return parts.netloc, topic


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row: doubling, and half of it random, so that many workers don't
    come back all at once.
    """
    longest = min(LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures, 16))
    return float(longest * _JITTER.uniform(0.5, 1.0))


def within(timeout_s: float, work: Callable[[], T], what: str) -> T:
    """Run what may block for ever on a thread of its own. Raises Fault when the time is over; the thread is left."""
    future: Future[T] = Future()
    threading.Thread(target=_run, args=(work, future), name="streamcl-kafka", daemon=True).start()
    try:
        return future.result(timeout_s)
    except TimeoutError:
        raise Fault(Kind.PASSING, "timeout", f"{what}: no answer within {timeout_s:g} s") from None


def _run(work: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - it is raised again where the result is awaited
        future.set_exception(error)


def partition_counts(consumer: Consumer, topics: Mapping[str, str], servers: str, config: Config) -> dict[str, int]:
    """Number of partitions by topic. Raises ConnectorError for a topic that does not exist or may not be seen."""
    counts: dict[str, int] = {}
    for name, topic in sorted(topics.items(), key=lambda item: item[1]):
        counts[topic] = partition_count(consumer, name, f"kafka://{servers}/{topic}", config)
        if not counts[topic]:
            raise ConnectorError(f"kafka://{servers}/{topic}: no such topic, or no right to see it")
    return counts


def partition_count(consumer: Consumer, name: str, where: str, config: Config) -> int:
    """0: no such topic, or no right to see it."""
    try:
        return within(2 * config.kafka.request_timeout_s, lambda: consumer.partitions(name), "asking for partitions")
    except Fault as fault:
        raise fault.at(where) from fault


def bounds(
    servers: str, topics: Mapping[str, str], streams: Collection[Stream], config: Config
) -> dict[Stream, Bounds]:
    """What each stream holds now, by asking and then by fetching once, with a consumer of its own.

    The fetch is for the end: under read_committed the answer to the question is the last stable offset, and a broker
    was seen to answer with the base of its last batch. The high watermark that comes with a fetch is right on both.
    """
    timeout_s = config.kafka.request_timeout_s
    wanted = sorted(streams)
    consumer = library(config).open_consumer(servers, topics, config, max_wait_s=0.001)
    try:
        asked = consumer.asked(wanted)
        consumer.assign({stream: asked[stream].end for stream in wanted})
        _fetch_once(consumer, wanted, timeout_s)
        return {s: Bounds(asked[s].start, max(asked[s].end, consumer.highwater(s) or 0)) for s in wanted}
    except Fault as fault:
        raise fault.at(f"kafka://{servers}: bounds of {', '.join(sorted(set(topics.values())))}") from fault
    finally:
        consumer.close()


def _fetch_once(consumer: Consumer, streams: Sequence[Stream], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(consumer.highwater(stream) is None for stream in streams):
        if time.monotonic() > deadline:
            raise Fault(Kind.PASSING, "timeout", f"no fetch was answered within {timeout_s:g} s")
        for stream in consumer.poll(0.01):
            consumer.pause(stream)


def ensure_outputs(url: str, config: Config) -> str:
    """Make the topic of an output when it is missing; its name.

    Raises:
        ConnectorError: it can't be made, or outcomes or deltas have a topic of several partitions.
    """
    servers, topic = locate(url)
    compact = config.kafka.compact_predictions and url == config.predictions
    ordered = url in (config.outcomes_url, config.deltas_url)
    configs = {"cleanup.policy": "compact"} if compact else {}
    wanted = 1 if ordered else config.shard.count if url == config.commands else -1
    count = ensure_topic(servers, topic, config, wanted, configs)
    if ordered and count != 1:
        raise ConnectorError(f"{url}: has one order: it needs 1 partition, this topic has {count}")
    return topic


def ensure_topic(
    servers: str, topic: str, config: Config, partitions: int = -1, configs: Mapping[str, str] | None = None
) -> int:
    """Make a missing topic (-1: as many partitions as the broker likes); the number of its partitions.

    Raises:
        ConnectorError: it is missing and can't be made.
    """
    timeout_s = config.kafka.connect_timeout_s + config.kafka.request_timeout_s
    made = library(config).ensure_topic
    try:
        return within(timeout_s, lambda: made(servers, topic, config, partitions, configs or {}), "asking for it")
    except Fault as fault:
        raise fault.at(f"kafka://{servers}/{topic}: can't be made") from fault


def sizes_within(messages: Sequence[Message], limit: int, url: str) -> list[int]:
    """Bytes of each message on the wire before compression, an upper bound.

    Raises:
        BadInput: `too_large`: one is over the limit. It would break the producer for all the others (F1).
    """
    sizes = [_size(message) for message in messages]
    largest = max(sizes, default=0)
    if largest > limit:
        raise BadInput("too_large", f"{url}: a message of {largest} bytes, kafka.max_request_bytes is {limit}")
    return sizes


def _size(message: Message) -> int:
    """Bytes of the message on the wire before compression; an upper bound."""
    headers = sum(len(name.encode()) + len(value) + _HEADER_OVERHEAD_BYTES for name, value in message.headers)
    return _RECORD_OVERHEAD_BYTES + len(message.value or b"") + len(message.key or b"") + headers
