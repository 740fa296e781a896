"""Rows of the joiner on disk: immutable files, each named by the SHA-256 of what it holds, read row by row.

A file is a safetensors file of four arrays: `rows`, one row's bytes behind the other's; `starts`, where each begins;
`hashes` of their ids; `times`, in whose order they lie. Its metadata say what arrays a row is made of. Rows are read
with a system call each instead of through a mapping: what was read counts for the page cache, not for the process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from streamcl.records import Encoded, Origin, Recalled, Scores, Ticket

MOST_ROWS = 1 << 16
"""Of a segment: a row's place in it has 16 bits."""

_HEAD = struct.Struct("<ddqqqqHHHH")
"""Event time, weight, owner, partition, offset, version of the weights (of a closed id: whether it was joined), input,
bytes of id, key and segment."""

Signature = tuple[Any, ...]
"""Kind and shape of every array of a ticket, by name; () of a closed id, which has none."""


class Closed(NamedTuple):
    """An id that is not waited for any more. It says of whom and when, to be forgotten by."""

    joined: bool
    owner: int  # as a mark
    time_s: float  # of the event
    origin: Origin | None  # None only while an old snapshot is being read


class Entry(NamedTuple):
    """What becomes a row. Entries sort by event time, then by where they stood in the log."""

    time_s: float
    origin: Origin
    id: str
    what: Ticket | Closed


def hash_of(id: str) -> int:
    return xxhash.xxh3_64_intdigest(id.encode())


def sealed(entries: Sequence[Entry]) -> Iterator[tuple[list[int], bytes]]:
    """Files of at most `MOST_ROWS` rows that hold these entries, and which ones each holds, in its order.

    Rows of one file are made of the same arrays: a batch of tickets that differ in what plug-ins noted makes several.
    """
    groups: dict[Signature, list[int]] = {}
    for place, entry in enumerate(entries):
        groups.setdefault(_signature(entry.what), []).append(place)
    for signature, places in groups.items():
        places.sort(key=lambda place: entries[place][:2])
        for start in range(0, len(places), MOST_ROWS):
            part = places[start : start + MOST_ROWS]
            yield part, _file([entries[place] for place in part], signature)


def _file(entries: Sequence[Entry], signature: Signature) -> bytes:
    inputs = sorted({entry.origin.input for entry in entries})
    number = {name: place for place, name in enumerate(inputs)}
    rows = [_row(entry, number[entry.origin.input]) for entry in entries]
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=starts[1:])
    arrays: dict[str, NDArray[Any]] = {
        "rows": np.frombuffer(b"".join(rows), np.uint8),
        "starts": starts,
        "hashes": np.fromiter((hash_of(entry.id) for entry in entries), np.uint64, len(rows)),
        "times": np.fromiter((entry.time_s for entry in entries), np.float64, len(rows)),
    }
    told = {"inputs": inputs, "arrays": [list(each) for each in signature]}
    return save(arrays, {"row": orjson.dumps(told, option=orjson.OPT_SORT_KEYS).decode()})


def _signature(what: Ticket | Closed) -> Signature:
    if isinstance(what, Closed):
        return ()
    return tuple((name, value.dtype.str, value.shape) for name, value in _arrays(what))


def _arrays(ticket: Ticket) -> Iterator[tuple[str, NDArray[Any]]]:
    features, scores = ticket.features, ticket.scores
    yield "ids", features.ids
    yield "weights", features.weights
    yield "dense", features.dense
    yield "output", scores.output
    yield "served", scores.served
    for stage, recalled in enumerate(scores.recalled):
        for name, value in zip(Recalled._fields, recalled, strict=True):
            yield f"recalled.{stage}.{name}", np.asarray(value)
    for name, value in scores.notes.items():
        yield f"notes.{name}", value


def _row(entry: Entry, number: int) -> bytes:
    id, what, origin = entry.id.encode(), entry.what, entry.origin
    if isinstance(what, Closed):
        head = (entry.time_s, 1.0, what.owner, *origin[1:], what.joined, number, len(id), 0, 0)
        return _HEAD.pack(*head) + id
    key, segment = what.key.encode(), what.segment.encode()
    head = (entry.time_s, 1.0, 0, *origin[1:], what.scores.version, number, len(id), len(key), len(segment))
    parts = [_HEAD.pack(*head), *(value.tobytes() for _, value in _arrays(what)), id, key, segment]
    return b"".join(parts)


class _Array(NamedTuple):
    name: str
    kind: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    at: int


class Segment:
    """One file. It holds no place open: whoever reads rows hands over a descriptor.

    Attributes:
        bare: Its rows are closed ids without a ticket.
        starts: (n + 1,) where rows begin, in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = orjson.loads(file.read(length))
        told = orjson.loads(header.pop("__metadata__")["row"])
        self._spans: Mapping[str, list[int]] = {name: each["data_offsets"] for name, each in header.items()}
        self._base = 8 + length
        self.inputs: list[str] = told["inputs"]
        self.bare = not told["arrays"]
        self.starts = (self._read("starts", np.int64) + self._base + self._spans["rows"][0]).astype(np.uint32)
        self._arrays, at = [], _HEAD.size
        for name, kind, shape in told["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            self._arrays.append(_Array(name, np.dtype(kind), tuple(shape), count, at))
            at += count * self._arrays[-1].kind.itemsize
        self._text = at
        first, last = self.times()[[0, -1]].tolist()
        self.first_s, self.last_s = float(first), float(last)

    @property
    def name(self) -> str:
        return self.path.name

    def __len__(self) -> int:
        return len(self.starts) - 1

    def hashes(self) -> NDArray[np.uint64]:
        """(n,) of their ids."""
        return self._read("hashes", np.uint64)

    def times(self) -> NDArray[np.float64]:
        """(n,) of the events, ascending."""
        return self._read("times", np.float64)

    def _read(self, name: str, kind: Any) -> NDArray[Any]:
        first, end = self._spans[name]
        with self.path.open("rb") as file:
            file.seek(self._base + first)
            return np.frombuffer(file.read(end - first), kind)

    def row(self, handle: int, row: int) -> Row:
        first = int(self.starts[row])
        return Row(self, bytearray(os.pread(handle, int(self.starts[row + 1]) - first, first)))


class Row:
    """A row that was read: its head at once, its ticket when asked for."""

    __slots__ = ("_buffer", "_head", "_segment", "id", "origin", "time_s")

    def __init__(self, segment: Segment, buffer: bytearray) -> None:
        self._segment, self._buffer = segment, buffer
        head = self._head = _HEAD.unpack_from(buffer)
        self.time_s: float = head[0]
        self.origin = Origin(segment.inputs[head[6]], head[3], head[4])
        at = segment._text
        self.id = buffer[at : at + head[7]].decode()

    @property
    def key(self) -> str:
        at = self._segment._text + self._head[7]
        return self._buffer[at : at + self._head[8]].decode()

    @property
    def owner(self) -> int:
        """A mark; of a closed id alone, for a ticket knows its key."""
        return int(self._head[2])

    def ticket(self) -> Ticket:
        """Raises ValueError: the row is of a closed id."""
        if self._segment.bare:
            raise ValueError(f"{self._segment.path}: {self.id!r} has no ticket any more")
        buffer, found = self._buffer, {}
        for name, kind, shape, count, at in self._segment._arrays:
            value = np.frombuffer(buffer, kind, count, at)
            if at % kind.itemsize:  # torch wants it where the processor does
                value = value.copy()
            found[name] = value if len(shape) == 1 else value.reshape(shape)
        features = Encoded(found.pop("ids"), found.pop("weights"), found.pop("dense"))
        version, output, served = int(self._head[5]), found.pop("output"), found.pop("served")
        scores = Scores(output, served, version, *_told(found)) if found else Scores(output, served, version)
        at = self._segment._text + self._head[7] + self._head[8]
        segment = buffer[at : at + self._head[9]].decode()
        return Ticket(self.id, self.time_s, features, scores, self.origin, segment, self.key)

    def entry(self) -> Entry:
        """As it was given to be sealed."""
        head = self._head
        bare = Closed(bool(head[5]), self.owner, self.time_s, self.origin) if self._segment.bare else None
        return Entry(self.time_s, self.origin, self.id, bare or self.ticket())


def _told(found: dict[str, NDArray[Any]]) -> tuple[tuple[Recalled, ...], dict[str, NDArray[Any]]]:
    """What the error memory and plug-ins knew."""
    stages: dict[str, dict[str, Any]] = {}
    notes = {}
    for name, value in found.items():
        kind, rest = name.split(".", 1)
        if kind == "notes":
            notes[rest] = value
        else:
            stage, field = rest.split(".")
            stages.setdefault(stage, {})[field] = value
    recalled = []
    for each in stages.values():
        numbers = {"support": float(each.pop("support")[()]), "version": int(each.pop("version")[()])}
        recalled.append(Recalled(**each, **numbers))
    return tuple(recalled), notes
