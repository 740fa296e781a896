"""Files: recorded streams to read, JSON lines to write, a control log for one machine.

A URL is `file:///absolute/path` or `file://relative/path` (`file:relative/path` too), percent-encoded where it must be.
As `labels.url` must have the host of `events.url`, two relative inputs begin with the same folder.

Inputs end in `.jsonl` or `.csv`, either with `.gz` behind it. A file is one stream, partition 0, and the offset is the
row number, from 0. With a `*` in its name a URL means several files (`events-*.jsonl`): what stands in its place is the
number of a partition, and a shard reads those that are its own. A record's time is the time field that the config names
for that input; the row number where there is none or it is no number. Several streams are merged by (time, input,
partition, offset).

- JSON lines: a row is a line, and its bytes are the value. A blank line is a row too, so that none is skipped silently.
- CSV: the first row names the columns, and a row becomes a JSON object; a dot in a name goes into a nested object, as
  the config's paths read it. An empty cell is null. A cell is a number where JSON would write it as one: `1`, `-0.50`,
  `1e-05` are, `007`, `+1`, `12e4` and integers beyond 64 bits stay strings, for they may be codes. A row that is ragged
  or badly quoted becomes a JSON list of its text, which no codec takes for an event: it ends in the dead letters.
- A line or row above `events.max_bytes` is cut behind that length, which keeps memory constant and its fate the same.

Commands are JSON lines too; their file must be there from the start, if empty.

Outputs are JSON lines, and a file has one writer: with several shards `predictions` needs a `*`, which becomes the
shard's number. See `connectors.codec.envelope` for what is not a JSON object, and for dead letters.
"""

from __future__ import annotations

import fcntl
import io
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import orjson

from connectors.codec import as_line, envelope
from connectors.rows import Row, kind_of, open_rows
from streamcl.commands import TIME
from streamcl.config import Config
from streamcl.features import lookup
from streamcl.protocols import NOTHING, ConnectorError, Fenced, Outputs
from streamcl.records import COMMANDS, LABELS, Message, Order, Origin, Position, Record, Stream
from streamcl.stations import Events, Labels

_FENCE = b'{"fence":true}\n'
_BLOCK = 1 << 16
_UNREADABLE = (OSError, EOFError, zlib.error, ConnectorError)


class FileSource:
    """The inputs of a config, read row by row in constant memory; `seek` reads the file again up to the row.

    Raises:
        ConnectorError: no such file, a broken `.gz`, a CSV file without usable names, a position behind the end. The
            text names the file and the row. Rows before the fault are delivered first; then every call raises it.
    """

    def __init__(self, inputs: Mapping[str, str], config: Config) -> None:
        shard, self._cursors = config.shard, dict[Stream, _Cursor]()
        for name, url in sorted(inputs.items()):
            found = partitions_of(url)
            mine = [partition for partition in found if partition % shard.count == shard.index]
            if not mine:
                raise ConnectorError(f"{url} has partitions {[*found]}: shard {shard.index} of {shard.count} has none")
            self._cursors |= {Stream(name, each): _Cursor(name, each, found[each], config) for each in mine}
        try:
            self.seek({})
        except ConnectorError:
            self.close()
            raise

    def streams(self) -> Sequence[Stream]:
        return list(self._cursors)

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        cursors = list(self._cursors.values()) if only is None else [self._cursor(only)]
        taken: list[Record] = []
        try:
            while len(taken) < limit and (heads := [head for cursor in cursors if (head := cursor.peek())]):
                first = min(heads, key=_moment) if len(heads) > 1 else heads[0]
                taken.append(self._cursors[first.origin.stream].take())
        except ConnectorError:
            if not taken:
                raise  # otherwise the next poll does
        return taken

    def seek(self, position: Position) -> Position:
        for stream in position:
            self._cursor(stream)
        for stream, cursor in self._cursors.items():
            cursor.seek(position.get(stream, 0))
        return {stream: cursor.row for stream, cursor in self._cursors.items()}

    def commit(self, position: Position) -> None:
        """Nobody looks at a file's lag."""

    def lag(self) -> Mapping[Stream, int]:
        """1 where another row waits: how many do is known only at the end."""
        return {stream: int(cursor.peek() is not None) for stream, cursor in self._cursors.items()}

    def exhausted(self) -> bool:
        return all(cursor.peek() is None for cursor in self._cursors.values())

    def close(self) -> None:
        for cursor in self._cursors.values():
            cursor.close()

    def _cursor(self, stream: Stream) -> _Cursor:
        if stream not in self._cursors:
            raise ConnectorError(f"{stream} is not in this shard: it has {[*self._cursors]}")
        return self._cursors[stream]


def _moment(record: Record) -> tuple[float, Origin]:
    return record.time_s, record.origin


class _Cursor:
    """One file and the next row in it."""

    def __init__(self, name: str, partition: int, path: Path, config: Config) -> None:
        station: Events | Labels = config.labels if name == LABELS and config.labels else config.events
        self.name, self.partition = name, partition
        self.path = path
        self.row = 0
        kind_of(self.path)  # a wrong name fails before anything is opened
        self._time = tuple(station.time.split(".")) if station.time else ()
        self._unit = 1000.0 if station.time_unit == "ms" else 1.0
        if name == COMMANDS and self._time:
            self._time, self._unit = (TIME,), 1.0
        self._most = config.events.max_bytes
        self._file: IO[bytes] | None = None
        self._rows: Iterator[Row] = iter(())
        self._head: Record | None = None
        self._fault = ""

    def seek(self, row: int) -> None:
        self.close()
        self.row, self._head, self._fault = 0, None, ""
        if row < 0:
            raise self._failed(ConnectorError(f"{self.path}: position {row} is negative"))
        try:
            self._file, self._rows = open_rows(self.path, self._most)
            while self.row < row and next(self._rows, None) is not None:
                self.row += 1
        except _UNREADABLE as error:
            raise self._failed(error) from error
        if self.row < row:
            raise self._failed(ConnectorError(f"{self.path}: position {row} is behind the end, {self.row} rows"))

    def peek(self) -> Record | None:
        if self._head is not None:
            return self._head
        if self._fault:
            raise ConnectorError(self._fault)
        try:
            row = next(self._rows, None)
        except _UNREADABLE as error:
            raise self._failed(error) from error
        self._head = None if row is None else self._record(row)
        return self._head

    def take(self) -> Record:
        record = self.peek()
        assert record is not None  # noqa: S101 - the caller has peeked
        self._head, self.row = None, self.row + 1
        return record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._rows = None, iter(())

    def _record(self, row: Row) -> Record:
        value = row if isinstance(row, bytes) else orjson.dumps(row)
        return Record(Origin(self.name, self.partition, self.row), str(self.path), self._time_of(row), value)

    def _time_of(self, row: Row) -> float:
        payload: Any = row
        if self._time and isinstance(row, bytes):
            with suppress(orjson.JSONDecodeError):
                payload = orjson.loads(row)
        time = lookup(payload, self._time) if self._time and isinstance(payload, dict) else None
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not math.isfinite(time):
            return float(self.row)
        return time / self._unit

    def _failed(self, error: Exception) -> ConnectorError:
        """What broke reading, with the file and the row; it stays broken until a seek."""
        cause = getattr(error, "strerror", None) or error
        self._fault = str(error) if isinstance(error, ConnectorError) else f"{self.path}: row {self.row}: {cause}"
        return ConnectorError(self._fault)


class FileSink:
    """JSON lines, appended and synced by `flush`. What was sent and not flushed is lost by `close` as by a crash.

    A torn last line, which a crash left, is cut off at opening. One writer per file.

    Args:
        enveloped: Every message goes into an envelope (dead letters); else only what is not a JSON object.
    """

    def __init__(self, path: Path, *, enveloped: bool = False) -> None:
        self.path = path
        self.enveloped = enveloped
        self.rejected: Callable[[Message, str], None] | None = None  # a file takes everything
        self._pending = bytearray()
        self._file = _open(path)
        _mend(self._file, path)

    def send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            plain = None if self.enveloped else as_line(message.value)
            self._pending += (plain or envelope(message)) + b"\n"

    def flush(self) -> None:
        if self._pending:
            _append(self._file, self._pending, self.path)
            self._pending.clear()

    def close(self) -> None:
        self._pending.clear()
        self._file.close()


class FileControlLog:
    """A control log in JSON lines; the offset is a byte position, so that neither opening nor reading on scans it.

    The fence: `open` appends a line, under an exclusive lock, and a writer whose file is longer than it left it has a
    successor. A torn last line is not read, and is cut off by the next `open`. Works across the processes of one
    machine, and on network file systems as far as their `flock` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._end = 0

    def open(self) -> None:
        self.close()
        self._file = _open(self.path)
        with _locked(self._file, self.path):
            _mend(self._file, self.path)
            self._end = _append(self._file, _FENCE, self.path)

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        end = 0
        if self.path.exists():
            with _named(self.path), self.path.open("rb", buffering=0) as file:
                end = _whole(file)
        if not 0 <= start <= end:
            raise ConnectorError(f"{self.path}: no offset {start} in the control log: it ends at {end}")
        return self._orders(start, end) if end else iter(())

    def append(self, order: Order, outputs: Outputs = NOTHING) -> int:
        if self._file is None:
            raise ConnectorError(f"{self.path}: append before open")
        if any(outputs.values()):
            raise ConnectorError(f"{self.path}: files know no transactions; exactly-once delivery needs Kafka")
        with _locked(self._file, self.path):
            if os.fstat(self._file.fileno()).st_size != self._end:
                raise Fenced(f"{self.path}: another worker has opened this control log")
            self._end = _append(self._file, orjson.dumps(order.to_json()) + b"\n", self.path)
        return self._end

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _orders(self, start: int, end: int) -> Iterator[tuple[int, Order]]:
        with _named(self.path), self.path.open("rb") as file:
            at = file.seek(start)
            while at < end and (line := file.readline()):
                at += len(line)
                if line == _FENCE:
                    continue
                try:
                    order = Order.from_json(orjson.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ConnectorError(f"{self.path}: no control record ends at byte {at}") from error
                yield at, order


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectorError(f"{path}: {error.strerror or error}") from error


@contextmanager
def _locked(file: io.FileIO, path: Path) -> Iterator[None]:
    with _named(path):
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _open(path: Path) -> io.FileIO:
    """To append and read, unbuffered; made with its folders, durably, when missing."""
    if path.suffix in (".gz", ".csv"):
        raise ConnectorError(f"{path}: outputs are JSON lines; end the name in .jsonl")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return file


def _whole(file: io.FileIO) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - _BLOCK))
        if (at := (file.read(end - start) or b"").rfind(b"\n")) >= 0:
            return start + at + 1
        end = start
    return 0


def _mend(file: io.FileIO, path: Path) -> None:
    """Cut off a torn last line."""
    with _named(path):
        end = _whole(file)
        if end < file.seek(0, os.SEEK_END):
            os.ftruncate(file.fileno(), end)


def _append(file: io.FileIO, data: bytes | bytearray, path: Path) -> int:
    """Append and sync, all or nothing as far as the disk lets us; returns the file's new end."""
    before = os.fstat(file.fileno()).st_size
    try:
        done = 0
        while done < len(data):
            done += file.write(memoryview(data)[done:])
        os.fsync(file.fileno())
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise ConnectorError(f"{path}: {error.strerror or error}") from error
    return before + len(data)


def path_of(url: str) -> Path:
    """The path of a file URL; see the module for its forms."""
    parts = urlsplit(url)
    host = "" if parts.netloc == "localhost" else parts.netloc
    path = unquote(host + parts.path)
    if parts.scheme != "file" or not path.strip("/"):
        raise ConnectorError(f"{url!r} is not of the form file:///path/to/file")
    return Path(path)


def partitions_of(url: str) -> dict[int, Path]:
    """The files of an input by partition, ascending: one, or those that its `*` stands for.

    Raises:
        ConnectorError: there are none, what stands for the `*` is no number or two are one, or there are two `*`.
    """
    path = path_of(url)
    if "*" not in str(path):
        return {0: path}
    before, star, after = path.name.partition("*")
    if not star or "*" in after or "*" in str(path.parent):
        raise ConnectorError(f"{url}: one * in the name of the file, for the number of the partition")
    with _named(path.parent):
        names = [each.name for each in path.parent.iterdir()]
    found: dict[int, Path] = {}
    for name in sorted(names):
        middle = name[len(before) : len(name) - len(after)]
        if name != before + middle + after or len(name) <= len(before) + len(after):
            continue
        if not (middle.isascii() and middle.isdigit()) or int(middle) in found:
            raise ConnectorError(f"{path.parent / name}: {middle!r} is no number of a partition, or there twice")
        found[int(middle)] = path.parent / name
    if not found:
        raise ConnectorError(f"{path}: there is no such file")
    return dict(sorted(found.items()))


def open_source(inputs: Mapping[str, str], config: Config) -> FileSource:
    return FileSource(inputs, config)


def open_sink(url: str, config: Config) -> FileSink:
    path, letters = path_of(url), url == config.dead_letters_url
    own = url == config.outcomes_url or (letters and not config.dead_letters)  # the shard is part of the name
    if config.shard.count > 1 and "*" not in path.name and not own:
        raise ConnectorError(f"{url}: a file has one writer; with several shards put a * into its name")
    return FileSink(path.with_name(path.name.replace("*", str(config.shard.index))), enveloped=letters)


def open_control(url: str, config: Config) -> FileControlLog:  # noqa: ARG001 - the connector protocol's signature
    return FileControlLog(path_of(url))


def check(urls: Collection[str], config: Config) -> Sequence[str]:
    """See `Connector.check`: inputs can be read, the others' folders written to. Nothing is made."""
    source = open_source(config.inputs, config)
    source.exhausted()  # reads each first row
    source.close()
    found = [_describe(url, url in config.inputs.values()) for url in urls]
    if config.labels and (config.labels.time is None) != (config.events.time is None):
        found.append("only one of events.time and labels.time is set: row numbers will be merged with times")
    return found


def _describe(url: str, is_input: bool) -> str:
    path = path_of(url)
    if is_input:
        size = sum(each.stat().st_size for each in partitions_of(url).values())
        return f"{url}: {size} bytes, its first row can be read"
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise ConnectorError(f"{path}: can't write: {there} is read-only or no folder")
    return f"{url}: {'can be appended to' if there == path else 'will be made'}"
