"""Where deltas go and come from: a folder, an object store (by fsspec), or a topic.

Nothing but a replica's freshness rests on them, for the next snapshot holds all that they hold. So a folder or a store
that is away costs no prediction: what could not be written is counted, and readers see the hole. A topic keeps the
promise of the predictions' one. Both are at least once: a worker that recovers sends the same bytes again.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from typing import Protocol
from urllib.parse import urlsplit

import fsspec

from streamcl import connect
from streamcl.config import Config, ConfigError
from streamcl.messages import OUR_BYTES
from streamcl.outcomes import first_after
from streamcl.protocols import ConnectorError, Source
from streamcl.records import Delta, Message, Record

log = logging.getLogger(__name__)

INPUT = "deltas"
RECORDS, PART = "streamcl-records", "streamcl-part"
_NAME = re.compile(r"(\d{20})\.delta")
_QUEUED = 4  # deltas on their way to a store
_OPEN = 4  # deltas of which some parts have come
_PATIENCE_S = 2.0  # for one reading of a topic


class Publisher(Protocol):
    """`send` and `flush` as a sink's."""

    def send(self, deltas: Sequence[Delta]) -> None: ...

    def flush(self) -> None: ...

    def retain(self, records: int) -> None:
        """No snapshot is left that stands before `records`."""
        ...

    def read(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class Reader(Protocol):
    """Yields the bytes of deltas that end behind `records`, in the order of their ends as far as they have one.

    Raises:
        ConnectorError: from the iteration; the next `read` begins anew.
    """

    def read(self, records: int) -> Iterator[bytes]: ...

    def close(self) -> None: ...


def open_publisher(url: str, config: Config) -> Publisher:
    return TopicPublisher(url, config) if is_topic(url) else FolderPublisher(url, config.deltas.retain)


def open_reader(url: str, config: Config) -> Reader:
    return TopicReader(url, config) if is_topic(url) else FolderReader(url)


def check(config: Config) -> list[str]:
    """What is to be said of the place of deltas, if it is no topic; nothing is changed.

    Raises:
        ConfigError: no file system of that scheme.
        ConnectorError: it can't be listed.
    """
    if not config.deltas_url or is_topic(config.deltas_url):
        return []
    folder = Folder(config.deltas_url)
    try:
        found, taken = len(folder.names()), folder.files.isfile(folder.root)
    except Exception as error:  # each file system has errors of its own
        raise ConnectorError(f"deltas.url: {folder.url}: {error}") from error
    if taken:  # whose list is itself
        raise ConnectorError(f"deltas.url: {folder.url}: is a file")
    return [f"{folder.url}: {found} delta(s)"]


def is_topic(url: str) -> bool:
    """Whether a connector knows the scheme; the files of one are rows, so folders are fsspec's."""
    scheme = urlsplit(url).scheme
    return scheme != "file" and bool(entry_points(group=connect.CONNECTORS, name=scheme))


class Folder:
    """Deltas as files named by their records. Raises ConfigError: no file system of that scheme."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(f"deltas.url: {url}: {error}") from error

    def path(self, records: int) -> str:
        return f"{self.root}/{records:020d}.delta"

    def names(self) -> dict[int, str]:
        """By records, ascending."""
        self.files.invalidate_cache()
        try:
            paths = self.files.ls(self.root, detail=False)
        except FileNotFoundError:
            return {}
        found = {int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.rpartition("/")[2]))}
        return dict(sorted(found.items()))


class FolderPublisher:
    """Writes beside learning, one after the other; a queue of a few, then `send` waits.

    Attributes:
        lost: Deltas that could not be written (count).
    """

    def __init__(self, url: str, most: int) -> None:
        self._folder, self._most = Folder(url), most
        self._thread = ThreadPoolExecutor(1, "deltas")
        self._queue: list[Future[None]] = []
        self.sent = self.sent_bytes = self.lost = 0
        self._away = False
        self._there: set[int] = set()  # by records, as far as known

    def send(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._queue = [each for each in self._queue if not each.done()]
            if len(self._queue) >= _QUEUED:
                self._queue.pop(0).result()
            self._queue.append(self._thread.submit(self._put, delta))

    def flush(self) -> None:
        while self._queue:
            self._queue.pop(0).result()

    def retain(self, records: int) -> None:
        self._queue.append(self._thread.submit(self._retain, records))

    def read(self) -> dict[str, float]:
        told = {"sent": self.sent, "sent_bytes": self.sent_bytes, "lost": self.lost}
        return {f"deltas_{name}": float(value) for name, value in told.items()}

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _put(self, delta: Delta) -> None:
        try:
            self._folder.files.makedirs(self._folder.root, exist_ok=True)
            self._folder.files.pipe_file(self._folder.path(delta.records), delta.data)
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            self.lost += 1
            log.log(logging.INFO if self._away else logging.WARNING, "%s: no delta: %s", self._folder.url, error)
            self._away = True
            return
        self._away = False
        self.sent, self.sent_bytes = self.sent + 1, self.sent_bytes + len(delta.data)
        self._there.add(delta.records)
        self._delete(sorted(self._there)[: -self._most])

    def _retain(self, records: int) -> None:
        """Failing here costs room, nothing else."""
        try:
            self._there = set(self._folder.names())
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("%s: old deltas stay: %s", self._folder.url, error)
        self._delete([each for each in self._there if each <= records])

    def _delete(self, old: Sequence[int]) -> None:
        for each in old:
            try:
                self._folder.files.rm_file(self._folder.path(each))
            except FileNotFoundError:
                pass
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("%s: an old delta stays: %s", self._folder.url, error)
                return
            self._there.discard(each)


class FolderReader:
    """What is not whole yet is read again later."""

    def __init__(self, url: str) -> None:
        self._folder = Folder(url)

    def read(self, records: int) -> Iterator[bytes]:
        try:
            for path in [path for at, path in self._folder.names().items() if at > records]:
                with contextlib.suppress(FileNotFoundError):  # retention was faster
                    yield self._folder.files.cat_file(path)
        except Exception as error:
            raise ConnectorError(f"{self._folder.url}: {error}") from error

    def close(self) -> None:
        """Nothing is open."""


class TopicPublisher:
    """Cuts a delta into messages below `kafka.max_request_bytes`; all of them go to one partition."""

    def __init__(self, url: str, config: Config) -> None:
        self._sink = connect.open_sink(url, config)
        self._most = config.kafka.max_request_bytes - OUR_BYTES
        if self._most < OUR_BYTES:
            raise ConfigError(f"kafka.max_request_bytes: at least {2 * OUR_BYTES} for deltas")
        self.sent = self.sent_bytes = 0

    def send(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._sink.send(parts(delta, self._most))
            self.sent, self.sent_bytes = self.sent + 1, self.sent_bytes + len(delta.data)

    def flush(self) -> None:
        self._sink.flush()

    def retain(self, records: int) -> None:
        """The topic's own retention does it."""

    def read(self) -> dict[str, float]:
        return {"deltas_sent": float(self.sent), "deltas_sent_bytes": float(self.sent_bytes)}

    def close(self) -> None:
        self._sink.close()


def parts(delta: Delta, most: int) -> list[Message]:
    """Keyed alike; the header `streamcl-part` says which of how many, the number of records whose."""
    cuts = range(0, len(delta.data), most)
    return [
        Message(
            delta.data[start : start + most],
            b"delta",
            ((RECORDS, str(delta.records).encode()), (PART, f"{number}/{len(cuts)}".encode())),
        )
        for number, start in enumerate(cuts)
    ]


class Parts:
    """Puts deltas together again. Parts that come twice do no harm, and those of a torn one are let go."""

    def __init__(self) -> None:
        self._open: dict[tuple[bytes, bytes], dict[int, bytes]] = {}

    def add(self, record: Record) -> bytes | None:
        """The whole delta, with its last part."""
        headers = dict(record.headers)
        number, _, count = headers.get(PART, b"").partition(b"/")
        if not (number.isdigit() and count.isdigit() and RECORDS in headers):
            return None
        key = (headers[RECORDS], count)
        if number == b"0":  # sent anew: whatever has come before may be of another history
            self._open.pop(key, None)
        found = self._open.setdefault(key, {})
        found[int(number)] = record.value or b""
        if len(found) == int(count):
            del self._open[key]
            return b"".join(found[n] for n in sorted(found))
        while len(self._open) > _OPEN:
            del self._open[next(iter(self._open))]
        return None


class TopicReader:
    """Reads on where it stopped; after a fault, or when asked for earlier ones, it finds its place by the records."""

    def __init__(self, url: str, config: Config) -> None:
        self._url = url
        kafka = config.kafka.model_copy(update={"start_at": "earliest"})
        self._config = config.of_shard(0, 1).model_copy(update={"kafka": kafka})  # its topic has one partition
        self._source: Source | None = None
        self._parts = Parts()
        self._waiting: deque[Record] = deque()
        self._asked = 0

    def read(self, records: int) -> Iterator[bytes]:
        if records < self._asked:  # an older snapshot: another history
            self.close()
        self._asked = records
        try:
            source = self._source = self._source or self._open(records)
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline:
                taken = source.poll(64, 0.05)
                self._waiting.extend(taken)
                while self._waiting:  # whoever stops in between finds the rest the next time
                    whole = self._parts.add(self._waiting.popleft())
                    if whole is not None:
                        yield whole
                if not taken and not sum(source.lag().values()):
                    return
        except ConnectorError:
            self.close()
            raise

    def close(self) -> None:
        source, self._source, self._parts = self._source, None, Parts()
        self._waiting.clear()
        if source:
            with contextlib.suppress(Exception):  # whatever it is, this source is not used again
                source.close()

    def _open(self, records: int) -> Source:
        source = connect.connector(self._url).open_source({INPUT: self._url}, self._config)
        try:
            if len(source.streams()) != 1:
                raise ConnectorError(f"{self._url}: deltas have one order: 1 partition, not {len(source.streams())}")
            [stream] = source.streams()
            start = first_after(source, stream, records, records_of, near=1)
            source.seek({stream: start})
        except BaseException:
            source.close()
            raise
        log.info("%s: read from offset %d on, behind record %d", self._url, start, records)
        return source


def records_of(record: Record) -> int | None:
    """Of a delta's part, from its header alone; None when it is no such message."""
    try:
        return int(dict(record.headers)[RECORDS])
    except (KeyError, ValueError):
        return None
