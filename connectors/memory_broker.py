"""The brokers behind `connectors.memory`: topics in this process, and the faults that a test wants from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal
from urllib.parse import urlsplit

from streamcl.protocols import ConnectorError, Unavailable
from streamcl.records import Headers, Message, Record

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
        self._spills: list[Callable[[], None]] = []
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

    @property
    def doomed(self) -> bool:
        """It will die at some append to come: see `fail_after`."""
        return self._fuse is not None

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
                self._log(topic, partition).append(message)
            self.changed.notify_all()
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

    def enlist(self, spill: Callable[[], None]) -> None:
        """By a sink: `spill` appends what it was sent, when a crash keeps it."""
        self._spills.append(spill)

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
            for spill in self._spills:
                spill()
        self._spills.clear()
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


def locate(url: str) -> tuple[MemoryBroker, str]:
    """(broker, topic) of `memory://BROKER/TOPIC`. Raises ConnectorError."""
    parts = urlsplit(url)
    topic = parts.path.strip("/")
    if parts.scheme != "memory" or not parts.netloc or not topic:
        raise ConnectorError(f"{url!r} is not of the form memory://BROKER/TOPIC")
    return broker(parts.netloc), topic
