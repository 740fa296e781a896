"""Topics in this process: for tests, for embedding, and as the smallest example of a connector.

A URL is `memory://BROKER/TOPIC`. Brokers live as long as the process; `reset` forgets one.

    events = memory.broker("shop")
    events.create("clicks")
    events.produce("clicks", b'{"id": "a"}', time_s=1.0)
    events.finish()  # a worker on it ends when it has read everything
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import orjson

from connectors.memory_broker import Choice, Crash, MemoryBroker, broker, locate, reset
from streamcl.config import Config
from streamcl.protocols import NOTHING, ConnectorError, Fenced, Gap, Outputs
from streamcl.records import COMMANDS, Message, Order, Origin, Position, Record, Stream
from streamcl.stations import Shard

__all__ = [
    "Choice",
    "Crash",
    "MemoryBroker",
    "MemoryControlLog",
    "MemorySink",
    "MemorySource",
    "broker",
    "check",
    "open_control",
    "open_sink",
    "open_source",
    "reset",
]


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
        self._broker, _ = locate(next(iter(inputs.values())))
        self._topics = {name: locate(url)[1] for name, url in inputs.items()}
        counts = self._broker.topics()
        for topic in self._topics.values():
            if topic not in counts:
                raise ConnectorError(f"memory://{self._broker.name}/{topic}: no such topic")
            if topic == self._topics.get(COMMANDS) and counts[topic] < shard.count:
                where = f"memory://{self._broker.name}/{topic}"
                raise ConnectorError(
                    f"{where}: {shard.count} shards need as many partitions, there are {counts[topic]}"
                )
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
        if len(streams) == 1:
            return self._take_from(streams[0], limit)
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

    def _take_from(self, stream: Stream, limit: int) -> list[Record]:
        topic, first = self._topics[stream.input], self._next[stream]
        messages = self._broker.read(topic, stream.partition, first, limit)
        self._next[stream] = first + len(messages)
        return [
            Record(Origin(*stream, offset), topic, message.time_s or 0.0, message.value, message.key, message.headers)
            for offset, message in enumerate(messages, first)
        ]


class MemorySink:
    """Holds what it is sent until `flush` appends it; the partition is its own, a hash of the key, or 0."""

    def __init__(self, url: str) -> None:
        self._broker, self._topic = locate(url)
        if self._topic not in self._broker.topics():
            self._broker.create(self._topic)
        self._partitions = self._broker.topics()[self._topic]
        self._pending: deque[Message] = deque()
        self.rejected: Callable[[Message, str], None] | None = None  # memory takes everything
        self._life = self._broker.life
        self._broker.enlist(self.spill)

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
            # One by one where a death is near, and may come between any two.
            count = 1 if self._broker.doomed else len(self._pending)
            messages = [self._pending.popleft() for _ in range(count)]
            self._broker.append(*((self._topic, _partition(each, self._partitions), each) for each in messages))

    def close(self) -> None:
        self._pending.clear()


class MemoryControlLog:
    """A control log on partition 0 of a topic; `open` takes the next epoch, and only the newest may append.

    Args:
        published: URLs that outputs of `append` will go to, on the same broker; missing topics are made.
    """

    def __init__(self, url: str, published: Collection[str] = ()) -> None:
        self._broker, self._topic = locate(url)
        for topic in (self._topic, *(locate(each)[1] for each in published)):
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

    def append(self, order: Order, outputs: Outputs = NOTHING) -> int:
        with self._broker.changed:
            self._broker.alive(self._life, self._topic)
            if not self._epoch:
                raise ConnectorError(f"memory://{self._broker.name}/{self._topic}: append before open")
            if self._epoch != self._broker.epochs[self._topic]:
                raise Fenced(f"memory://{self._broker.name}/{self._topic}: another worker has opened this control log")
            widths = self._broker.topics()
            sent = [
                (topic, _partition(message, widths[topic]), message)
                for topic, messages in ((locate(url)[1], messages) for url, messages in outputs.items())
                for message in messages
            ]
            return self._broker.append(*sent, (self._topic, 0, Message(orjson.dumps(order.to_json()))))

    def close(self) -> None:
        pass


def _partition(message: Message, count: int) -> int:
    if message.partition is not None:
        return message.partition
    return zlib.crc32(message.key) % count if message.key else 0


def open_source(inputs: Mapping[str, str], config: Config) -> MemorySource:
    return MemorySource(inputs, config.shard, locate(config.events.url)[0].order)


def open_sink(url: str, config: Config) -> MemorySink:  # noqa: ARG001 - the connector protocol's signature
    return MemorySink(url)


def open_control(url: str, config: Config) -> MemoryControlLog:
    return MemoryControlLog(url, config.published if config.exactly_once else ())


def check(urls: Collection[str], config: Config) -> Sequence[str]:
    """See `Connector.check`: inputs exist and are co-partitioned."""
    source = open_source(config.inputs, config)
    source.close()
    found = [_describe(url) for url in urls]
    if len({_partitions(url) for name, url in config.inputs.items() if name != COMMANDS}) > 1:
        raise ConnectorError(f"events and labels differ in partitions: {'; '.join(found)}")
    return found


def _partitions(url: str) -> int:
    where, topic = locate(url)
    return where.topics().get(topic, 0)


def _describe(url: str) -> str:
    return f"{url}: {_partitions(url) or 'will be made with 1'} partition(s)"


def _order(message: Message) -> Order:
    return Order.from_json(orjson.loads(message.value or b""))
