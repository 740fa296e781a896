"""Topics in this process: for tests, for embedding, and as the smallest example of a connector.

A URL is `memory://BROKER/TOPIC`. Brokers live as long as the process; `reset` forgets one.

    events = memory.broker("shop")
    events.create("clicks")
    events.produce("clicks", b'{"id": "a"}', time_s=1.0)
    events.finish()  # a worker on it ends when it has read everything
"""

from __future__ import annotations

import threading
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal
from urllib.parse import urlsplit

import orjson

from streamcl.config import Config
from streamcl.protocols import ConnectorError, Fenced, Gap, Unavailable
from streamcl.records import LABELS, Headers, Message, Order, Origin, Position, Record, Stream
from streamcl.stations import Shard

Choice = Literal["time", "input"] | Callable[[Sequence[Record]], Record]
"""Which record comes next, given the next one of each stream (at least one, streams sorted)."""


class Crash(BaseException):
    """The death of the process, in a test. Not an `Exception`, so that no error handling survives it."""


class MemoryBroker:
    """Named topics of append-only partitions, and the faults that a test wants from them.

    Every method may be called from any thread.

    Args:
        name: The host part of its URLs.

    Attributes:
        order: How sources opened by URL interleave their streams; see `MemorySource`.
        away: Asked at every call of what is open on this broker, with its topic (a source: that of its first stream,
            and the partition: "clicks/1"); True makes the call raise `Unavailable`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.order: Choice = "time"
        self.away: Callable[[str], bool] = lambda _: False
        self.changed = threading.Condition(threading.RLock())
        self.finished = False
        self.life = 0  # counts crashes; what was opened in an earlier life is dead
        self.epochs: dict[str, int] = {}
        self._topics: dict[str, list[list[Message]]] = {}
        self._committed: dict[str, dict[int, int]] = {}
        self._starts: dict[tuple[str, int], int] = {}
        self._sinks: list[MemorySink] = []
        self._fuse: tuple[int, bool] | None = None

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make an empty topic. Raises ConnectorError when it exists with another number of partitions."""
        with self.changed:
            made = self._topics.setdefault(topic, [[] for _ in range(partitions)])
            if len(made) != partitions:
                raise ConnectorError(f"memory://{self.name}/{topic} exists with {len(made)} partitions")

    def grow(self, topic: str, partitions: int) -> None:
        """Give a topic more partitions, empty ones."""
        with self.changed:
            self._topics[topic] += [[] for _ in range(partitions - len(self._topics[topic]))]

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        partition: int = 0,
        key: bytes | None = None,
        time_s: float = 0.0,
        headers: Headers = (),
    ) -> int:
        """Append from outside and return the offset; makes a missing topic with one partition. No fault hits it."""
        with self.changed:
            self._topics.setdefault(topic, [[]])
            self._put(topic, partition, Message(value, key, headers, time_s))
            return self.end(topic, partition) - 1

    def messages(self, topic: str) -> list[Message]:
        """Everything in the topic, by partition and offset; nothing when it does not exist."""
        with self.changed:
            return [message for log in self._topics.get(topic, []) for message in log]

    def topics(self) -> dict[str, int]:
        """Number of partitions by topic."""
        with self.changed:
            return {topic: len(logs) for topic, logs in sorted(self._topics.items())}

    def committed(self, topic: str) -> dict[int, int]:
        """By partition the offset last committed by a source."""
        with self.changed:
            return dict(self._committed.get(topic, {}))

    def trim(self, topic: str, partition: int, start: int) -> None:
        """Retention: what stands before offset `start` can't be read any more."""
        with self.changed:
            self._starts[topic, partition] = start

    def start(self, topic: str, partition: int) -> int:
        """The first offset that can be read."""
        with self.changed:
            return self._starts.get((topic, partition), 0)

    def finish(self) -> None:
        """Promise that nothing more is produced: a source that has read everything is exhausted."""
        with self.changed:
            self.finished = True
            self.changed.notify_all()

    def fail_after(self, appends: int, *, keep: bool = False) -> None:
        """Die at the next append once `appends` more have been made by sinks and control logs.

        The append raises `Crash`, and so does every later call to what had been opened by then, except `close`: a
        `finally` can't write what a dead process could not. What is opened afterwards works.

        Args:
            keep: What becomes of what was on its way, which is the failing append and all that sinks were sent and
                had not flushed: False loses it, True makes it durable without anyone having been told.
        """
        with self.changed:
            self._fuse = (appends, keep)

    def die(self, *, keep: bool = False) -> None:
        """The process dies here: raises `Crash`, as `fail_after` describes."""
        with self.changed:
            self._burn((), keep)

    def append(self, *appended: tuple[str, int, Message]) -> int:
        """Append from a sink or control log, all or nothing, and return the offset after the last (topic, partition,
        message); `fail_after` strikes here, and counts a call as one append.
        """
        with self.changed:
            if self._fuse is not None:
                left, keep = self._fuse
                self._fuse = (left - 1, keep)
                if left <= 0:
                    self._burn(appended, keep)
            for topic, partition, message in appended:
                self._put(topic, partition, message)
            return self.end(topic, partition)

    def read(self, topic: str, partition: int, start: int, limit: int | None = None) -> list[Message]:
        with self.changed:
            return self._log(topic, partition)[start : None if limit is None else start + limit]

    def end(self, topic: str, partition: int) -> int:
        """The offset of the next append."""
        with self.changed:
            return len(self._log(topic, partition))

    def commit(self, topic: str, partition: int, offset: int) -> None:
        with self.changed:
            self._committed.setdefault(topic, {})[partition] = offset

    def alive(self, life: int, place: str) -> None:
        """Raises Crash for what was opened before the last one, and Unavailable when `away` says so."""
        if life != self.life:
            raise Crash(f"memory://{self.name}: opened before the crash")
        if self.away(place):
            raise Unavailable(f"memory://{self.name}/{place}: away, as asked")

    def enlist(self, sink: MemorySink) -> None:
        self._sinks.append(sink)

    def _log(self, topic: str, partition: int) -> list[Message]:
        logs = self._topics.get(topic)
        if logs is None or not 0 <= partition < len(logs):
            raise ConnectorError(f"memory://{self.name}/{topic}: no partition {partition}")
        return logs[partition]

    def _put(self, topic: str, partition: int, message: Message) -> None:
        self._log(topic, partition).append(message)
        self.changed.notify_all()

    def _burn(self, appended: Sequence[tuple[str, int, Message]], keep: bool) -> None:
        self._fuse, self.life = None, self.life + 1
        if keep:
            for topic, partition, message in appended:
                self._put(topic, partition, message)
            for sink in self._sinks:
                sink.spill()
        self._sinks.clear()
        raise Crash(f"memory://{self.name}: died here, as asked")


_brokers: dict[str, MemoryBroker] = {}
_guard = threading.Lock()


def broker(name: str) -> MemoryBroker:
    """The broker of that name, made when it is first asked for."""
    with _guard:
        return _brokers.setdefault(name, MemoryBroker(name))


def reset(name: str) -> None:
    """Forget a broker. What is open on it goes on undisturbed, alone."""
    with _guard:
        _brokers.pop(name, None)


def _by_time(heads: Sequence[Record]) -> Record:
    return min(heads, key=lambda record: (record.time_s, record.origin))


def _by_input(heads: Sequence[Record]) -> Record:
    return min(heads, key=lambda record: record.origin)


class MemorySource:
    """Partitions p of each topic with p % count == index, like any sharded source.

    Args:
        inputs: URL by input name, all on one broker; their topics exist.
        shard: Which partitions.
        order: How streams interleave in `poll` without `only`. "time" merges what is there by (time, input,
            partition, offset); "input" reads all that is there of one stream before the next; a function picks.

    Raises:
        ConnectorError: a topic or partition that does not exist, a position outside the log.
    """

    def __init__(self, inputs: Mapping[str, str], shard: Shard | None = None, order: Choice = "time") -> None:
        shard = shard or Shard()
        self._broker, _ = _locate(next(iter(inputs.values())))
        self._topics = {name: _locate(url)[1] for name, url in inputs.items()}
        counts = self._broker.topics()
        for topic in self._topics.values():
            if topic not in counts:
                raise ConnectorError(f"memory://{self._broker.name}/{topic}: no such topic")
        self._next = {
            Stream(name, partition): 0
            for name, topic in sorted(self._topics.items())
            for partition in range(shard.index, counts[topic], shard.count)
        }
        if not self._next:
            raise ConnectorError(f"shard {shard.index} of {shard.count} has no partition in {sorted(counts)}")
        first = next(iter(self._next))
        self._place = f"{self._topics[first.input]}/{first.partition}"
        self._pick = {"time": _by_time, "input": _by_input}[order] if isinstance(order, str) else order
        self._life = self._broker.life

    def streams(self) -> Sequence[Stream]:
        return list(self._next)

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        if only is not None and only not in self._next:
            raise ConnectorError(f"{only} is not in this shard")
        wanted = self.streams() if only is None else [only]
        with self._broker.changed:
            self._broker.alive(self._life, self._place)
            if not self._waiting(wanted) and not self._broker.finished:
                self._broker.changed.wait_for(lambda: self._waiting(wanted) or self._broker.finished, timeout_s)
            return self._take(wanted, limit)

    def seek(self, position: Position) -> Position:
        for stream, offset in position.items():
            if stream not in self._next:
                raise ConnectorError(f"{stream} is not in this shard")
            if not 0 <= offset <= self._end(stream):
                raise ConnectorError(f"{self._url(stream)}: offset {offset} is outside 0 .. {self._end(stream)}")
        self._next = {stream: position.get(stream, self._start(stream)) for stream in self._next}
        self._refuse_gap()
        return dict(self._next)

    def commit(self, position: Position) -> None:
        self._broker.alive(self._life, self._place)
        for stream, offset in position.items():
            self._broker.commit(self._topics[stream.input], stream.partition, offset)

    def lag(self) -> Mapping[Stream, int]:
        return {stream: self._end(stream) - offset for stream, offset in self._next.items()}

    def exhausted(self) -> bool:
        return self._broker.finished and not self._waiting(self.streams())

    def close(self) -> None:
        pass

    def _url(self, stream: Stream) -> str:
        return f"memory://{self._broker.name}/{self._topics[stream.input]}, partition {stream.partition}"

    def _refuse_gap(self) -> None:
        wanted = {stream: offset for stream, offset in self._next.items() if offset < self._start(stream)}
        if wanted:
            where = ", ".join(f"{self._url(stream)}: offset {offset}" for stream, offset in wanted.items())
            raise Gap(f"gone before it was read: {where}", wanted, {stream: self._start(stream) for stream in wanted})

    def _start(self, stream: Stream) -> int:
        return self._broker.start(self._topics[stream.input], stream.partition)

    def _end(self, stream: Stream) -> int:
        return self._broker.end(self._topics[stream.input], stream.partition)

    def _waiting(self, streams: Sequence[Stream]) -> bool:
        return any(self._next[stream] < self._end(stream) for stream in streams)

    def _head(self, stream: Stream) -> Record | None:
        topic, offset = self._topics[stream.input], self._next[stream]
        for message in self._broker.read(topic, stream.partition, offset, 1):
            origin = Origin(stream.input, stream.partition, offset)
            return Record(origin, topic, message.time_s or 0.0, message.value, message.key, message.headers)
        return None

    def _take(self, streams: Sequence[Stream], limit: int) -> list[Record]:
        heads = {stream: head for stream in streams if (head := self._head(stream)) is not None}
        taken: list[Record] = []
        while heads and len(taken) < limit:
            taken.append(self._pick(list(heads.values())))
            stream = taken[-1].origin.stream
            self._next[stream] += 1
            if (head := self._head(stream)) is not None:
                heads[stream] = head
            else:
                del heads[stream]
        return taken


class MemorySink:
    """Holds what it is sent until `flush` appends it; the partition is a hash of the key, 0 without one."""

    def __init__(self, url: str) -> None:
        self._broker, self._topic = _locate(url)
        if self._topic not in self._broker.topics():
            self._broker.create(self._topic)
        self._partitions = self._broker.topics()[self._topic]
        self._pending: deque[Message] = deque()
        self.rejected: Callable[[Message, str], None] | None = None  # memory takes everything
        self._life = self._broker.life
        self._broker.enlist(self)

    def send(self, messages: Sequence[Message]) -> None:
        with self._broker.changed:
            self._broker.alive(self._life, self._topic)
            self._pending.extend(messages)

    def flush(self) -> None:
        with self._broker.changed:
            self._broker.alive(self._life, self._topic)
            self.spill()

    def spill(self) -> None:
        """Append what is pending. A crash in the middle leaves the rest pending, for the broker to keep or lose."""
        while self._pending:
            message = self._pending.popleft()
            self._broker.append((self._topic, _partition(message, self._partitions), message))

    def close(self) -> None:
        self._pending.clear()


class MemoryControlLog:
    """A control log on partition 0 of a topic; `open` takes the next epoch, and only the newest may append.

    Args:
        outputs: URL that the outputs of `append` go to, on the same broker.
    """

    def __init__(self, url: str, outputs: str | None = None) -> None:
        self._broker, self._topic = _locate(url)
        self._outputs = _locate(outputs)[1] if outputs else ""
        for topic in filter(None, (self._topic, self._outputs)):
            if topic not in self._broker.topics():
                self._broker.create(topic)
        self._life = self._broker.life
        self._epoch = 0

    def open(self) -> None:
        with self._broker.changed:
            self._broker.alive(self._life, self._topic)
            self._epoch = self._broker.epochs[self._topic] = self._broker.epochs.get(self._topic, 0) + 1

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        self._broker.alive(self._life, self._topic)
        if not 0 <= start <= self._broker.end(self._topic, 0):
            raise ConnectorError(f"memory://{self._broker.name}/{self._topic}: no offset {start} in the control log")
        found = self._broker.read(self._topic, 0, start)
        return iter([(at, _order(message)) for at, message in enumerate(found, start + 1)])

    def append(self, order: Order, outputs: Sequence[Message] = ()) -> int:
        with self._broker.changed:
            self._broker.alive(self._life, self._topic)
            if not self._epoch:
                raise ConnectorError(f"memory://{self._broker.name}/{self._topic}: append before open")
            if self._epoch != self._broker.epochs[self._topic]:
                raise Fenced(f"memory://{self._broker.name}/{self._topic}: another worker has opened this control log")
            width = self._broker.topics().get(self._outputs, 1)
            answers = [(self._outputs, _partition(message, width), message) for message in outputs]
            return self._broker.append(*answers, (self._topic, 0, Message(orjson.dumps(order.to_json()))))

    def close(self) -> None:
        pass


def _partition(message: Message, count: int) -> int:
    return zlib.crc32(message.key) % count if message.key else 0


def open_source(inputs: Mapping[str, str], config: Config) -> MemorySource:
    return MemorySource(inputs, config.shard, _locate(config.events.url)[0].order)


def open_sink(url: str, config: Config) -> MemorySink:  # noqa: ARG001 - the connector protocol's signature
    return MemorySink(url)


def open_control(url: str, config: Config) -> MemoryControlLog:
    return MemoryControlLog(url, config.predictions)


def check(urls: Collection[str], config: Config) -> Sequence[str]:
    """See `Connector.check`: inputs exist and are co-partitioned."""
    source = open_source(config.inputs, config)
    source.close()
    found = [_describe(url) for url in urls]
    if LABELS in config.inputs and len({_partitions(url) for url in config.inputs.values()}) > 1:
        raise ConnectorError(f"events and labels differ in partitions: {'; '.join(found)}")
    return found


def _partitions(url: str) -> int:
    where, topic = _locate(url)
    return where.topics().get(topic, 0)


def _describe(url: str) -> str:
    return f"{url}: {_partitions(url) or 'will be made with 1'} partition(s)"


def _locate(url: str) -> tuple[MemoryBroker, str]:
    parts = urlsplit(url)
    topic = parts.path.strip("/")
    if parts.scheme != "memory" or not parts.netloc or not topic:
        raise ConnectorError(f"{url!r} is not of the form memory://BROKER/TOPIC")
    return broker(parts.netloc), topic


def _order(message: Message) -> Order:
    return Order.from_json(orjson.loads(message.value or b""))
