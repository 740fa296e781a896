"""Rows of the joiner on disk: immutable files, each named by the SHA-256 of what it holds, read row by row.

A file is a safetensors file of three arrays: `rows` (n, bytes of a row), `hashes` of their ids and `times`, in whose
order they lie. Its metadata say what a row is made of. Rows are read with a system call each instead of through a
mapping: what was read counts for the page cache, not for the process.
"""

from __future__ import annotations

import itertools
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

_HEAD = np.dtype(
    [("time_s", "<f8"), ("weight", "<f8"), *((name, "<i8") for name in ("owner", "partition", "offset", "version"))]
    + [(name, "<u2") for name in ("input", "id", "key", "segment")]
)
"""How a row begins. `version` is that of the weights, of a closed id whether it was joined; the last three are lengths
of texts in bytes.
"""
_READ = struct.Struct("<ddqqqqHHHH")
PLAIN = ("ids", "weights", "dense", "output", "served")
SHORT = 256
"""Bytes of texts that a row may be wide for, whatever the others' are."""
BLOCK = 512


class Closed(NamedTuple):
    """An id that is not waited for any more. It says of whom and when, to be forgotten by."""

    joined: bool
    owner: int  # as a mark
    time_s: float  # of the event
    origin: Origin


Held = Ticket | Closed
Named = tuple[str, Held]
"""An id, and what is known of it."""


def hash_of(id: bytes) -> int:
    """Of an id in UTF-8."""
    return xxhash.xxh3_64_intdigest(id)


class _Unlike(Exception):
    """Rows that are not made of the same arrays, or whose texts differ much in length."""


def sealed(entries: Sequence[Named]) -> Iterator[tuple[list[int], bytes]]:
    """Files of at most `MOST_ROWS` rows that hold these entries, and which ones each holds, in its order.

    The order is that of event time, then of places in the log. Rows of one file are made of the same arrays: tickets
    that differ in what plug-ins noted, or closed ids among them, make several, as texts of very different lengths do.
    """
    order = list(range(len(entries)))
    times = [what.time_s for _, what in entries]
    if any(map(float.__ge__, times, times[1:])):
        order.sort(key=lambda place: (times[place], entries[place][1].origin))
    for start in range(0, len(order), MOST_ROWS):
        part = order[start : start + MOST_ROWS]
        try:
            yield part, _file([entries[place] for place in part])
        except _Unlike:
            for group in _groups(entries, part):
                yield group, _file([entries[place] for place in group], any_length=True)


def _groups(entries: Sequence[Named], order: Sequence[int]) -> list[list[int]]:
    """Places of entries whose rows are alike."""
    groups: dict[Any, list[int]] = {}
    for place in order:
        id, what = entries[place]
        size = (len(_text(id, what)) - 1) // SHORT
        groups.setdefault((size.bit_length(), *_signature(what)), []).append(place)
    return list(groups.values())


def _signature(what: Held) -> tuple[Any, ...]:
    """Equal for rows that are made of the same arrays."""
    if isinstance(what, Closed):
        return ()
    plain = (*what.features, what.scores.output, what.scores.served)
    return (*((value.dtype, value.shape) for value in plain), *((n, v.dtype, v.shape) for n, v in _told_of(what)))


def _told_of(ticket: Ticket) -> Iterator[tuple[str, NDArray[Any]]]:
    """What the error memory and plug-ins knew of it."""
    for stage, recalled in enumerate(ticket.scores.recalled):
        for name, value in zip(Recalled._fields, recalled, strict=True):
            yield f"recalled.{stage}.{name}", np.asarray(value)
    for name, value in ticket.scores.notes.items():
        yield f"notes.{name}", value


def _text(id: str, what: Held) -> bytes:
    """What follows the segment, where it ends, is JSON: a file is as it was before tickets had traits."""
    if isinstance(what, Closed):
        return id.encode()
    told = f"{id}{what.key}{what.segment}".encode()
    return told + orjson.dumps(what.traits) if what.traits else told


class _Block(NamedTuple):
    """Some rows: what is of fixed width (n, bytes), their texts (n,), hashes (n,) and times (n,)."""

    fixed: NDArray[np.uint8]
    texts: NDArray[np.bytes_]
    hashes: NDArray[np.uint64]
    times: NDArray[np.float64]
    arrays: list[tuple[str, str, list[int]]]


def _file(entries: Sequence[Named], any_length: bool = False) -> bytes:
    """Raises _Unlike."""
    inputs = sorted({what.origin.input for _, what in entries})
    blocks = [_block(entries[start : start + BLOCK], inputs) for start in range(0, len(entries), BLOCK)]
    if any(block.arrays != blocks[0].arrays for block in blocks):
        raise _Unlike
    width = max(block.texts.dtype.itemsize for block in blocks)
    if width > SHORT and not any_length:
        raise _Unlike
    texts = np.concatenate([block.texts.astype(f"S{width}") for block in blocks])
    fixed = np.concatenate([block.fixed for block in blocks])
    held: dict[str, NDArray[Any]] = {
        "rows": np.concatenate((fixed, texts.view(np.uint8).reshape(len(fixed), width)), 1),
        "hashes": np.concatenate([block.hashes for block in blocks]),
        "times": np.concatenate([block.times for block in blocks]),
    }
    told = {"inputs": inputs, "arrays": blocks[0].arrays}
    return save(held, {"row": orjson.dumps(told).decode()})


def _block(entries: Sequence[Named], inputs: Sequence[str]) -> _Block:
    """Raises _Unlike. A block fits a cache: to go through all entries for each column would meet each one cold."""
    ids, whats = zip(*entries, strict=True)
    texts = np.array(list(map(_text, ids, whats)), np.bytes_)
    head = np.zeros(len(ids), _HEAD)
    origins = [what.origin for what in whats]
    _, head["partition"], head["offset"] = zip(*origins, strict=True)
    head["input"] = 0 if len(inputs) == 1 else [inputs.index(origin.input) for origin in origins]
    head["time_s"] = [what.time_s for what in whats]
    head["id"] = _lengths(ids)
    kinds = set(map(type, whats))
    if len(kinds) > 1:
        raise _Unlike
    arrays: dict[str, NDArray[Any]] = {}
    if kinds == {Closed}:
        head["version"] = [closed.joined for closed in whats]
        head["owner"] = [closed.owner for closed in whats]
    else:
        scores = [ticket.scores for ticket in whats]
        head["version"] = [each.version for each in scores]
        head["weight"] = [ticket.weight for ticket in whats]
        head["key"] = _lengths([ticket.key for ticket in whats])
        head["segment"] = _lengths([ticket.segment for ticket in whats])
        arrays = _columns(whats, [ticket.features for ticket in whats], scores)
    parts = [head, *(column.reshape(len(ids), -1) for column in arrays.values() if column.size)]
    fixed = np.concatenate([part.view(np.uint8).reshape(len(ids), -1) for part in parts], 1)
    hashes = np.fromiter((hash_of(id.encode()) for id in ids), np.uint64, len(ids))
    shapes = [(name, column.dtype.str, list(column.shape[1:])) for name, column in arrays.items()]
    return _Block(fixed, texts, hashes, head["time_s"], shapes)


def _lengths(texts: Sequence[str]) -> list[int]:
    """In bytes."""
    if "".join(texts).isascii():
        return list(map(len, texts))
    return [len(text.encode()) for text in texts]


def _columns(tickets: Sequence[Ticket], features: Sequence[Encoded], scores: Sequence[Scores]) -> dict[str, Any]:
    """(n, ...) by name."""
    outputs = [each.output for each in scores]
    columns = (*zip(*features, strict=True), outputs, [each.served for each in scores])
    found = {name: _column(column) for name, column in zip(PLAIN, columns, strict=True)}
    if len({output.dtype for output in outputs}) > 1:
        raise _Unlike
    if any(each.recalled or each.notes for each in scores):
        told = [dict(_told_of(ticket)) for ticket in tickets]
        if any(each.keys() != told[0].keys() for each in told):
            raise _Unlike
        found |= {name: _stacked([each[name] for each in told]) for name in told[0]}
    return found


def _column(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """(n, width) of arrays of one kind."""
    if len(set(map(len, values))) > 1:
        raise _Unlike
    first = values[0]
    try:  # in half the time that NumPy takes
        data = b"".join(value.data for value in values)
    except (BufferError, TypeError, ValueError):  # a view with gaps
        return np.stack(values)
    if len(data) != len(values) * first.nbytes:
        raise _Unlike
    return np.frombuffer(data, first.dtype).reshape(len(values), len(first))


def _stacked(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if len({(value.dtype, value.shape) for value in values}) > 1:
        raise _Unlike
    return np.stack(values)


class _Array(NamedTuple):
    kind: np.dtype[Any]
    size: int
    at: int
    shape: tuple[int, ...]
    name: str


class Segment:
    """One file. It keeps no place open: whoever reads rows hands over a descriptor.

    Attributes:
        bare: Its rows are closed ids without a ticket.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = orjson.loads(file.read(length))
        told = orjson.loads(header.pop("__metadata__")["row"])
        self._spans: Mapping[str, list[int]] = {name: each["data_offsets"] for name, each in header.items()}
        self._base = 8 + length
        self._count, self._width = header["rows"]["shape"]
        self._first = self._base + self._spans["rows"][0]
        self.inputs: list[str] = told["inputs"]
        self.bare = not told["arrays"]
        self.arrays, at = [], _READ.size
        for name, kind, shape in told["arrays"]:
            count = int(np.prod(shape, dtype=np.int64))
            self.arrays.append(_Array(np.dtype(kind), count, at, tuple(shape), name))
            at += count * self.arrays[-1].kind.itemsize
        self.text = at
        # Weights, numbers and scores lie behind each other: one view, cut four times, is half the time of four views.
        cuts = np.cumsum([0, *(each.size for each in self.arrays[1:5])]).tolist()
        alike = len({each.kind for each in self.arrays[1:5]}) == 1
        self.cuts = [slice(*each) for each in itertools.pairwise(cuts)] if alike else []
        first, last = self.times()[[0, -1]].tolist()
        self.first_s, self.last_s = float(first), float(last)

    def __len__(self) -> int:
        return int(self._count)

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

    def row(self, handle: int, place: int) -> Row:
        return Row(self, os.pread(handle, self._width, self._first + place * self._width))


class Row:
    """A row that was read: its head at once, its ticket when asked for."""

    __slots__ = ("_buffer", "_head", "_segment", "time_s")

    def __init__(self, segment: Segment, buffer: bytes) -> None:
        self._segment, self._buffer = segment, buffer
        head = self._head = _READ.unpack_from(buffer)
        self.time_s: float = head[0]

    def of(self, id: bytes) -> bool:
        """Whether this is its id, in UTF-8."""
        return len(id) == self._head[7] and self._buffer.startswith(id, self._segment.text)

    @property
    def id(self) -> str:
        at = self._segment.text
        return self._buffer[at : at + self._head[7]].decode()

    @property
    def origin(self) -> Origin:
        head = self._head
        return Origin(self._segment.inputs[head[6]], head[3], head[4])

    @property
    def key(self) -> str:
        """Whose it is; of a closed id nobody knows that but by its mark."""
        at = self._segment.text + self._head[7]
        return self._buffer[at : at + self._head[8]].decode()

    @property
    def owner(self) -> int:
        """A mark; of a closed id alone, for a ticket knows its key."""
        return int(self._head[2])

    def ticket(self) -> Ticket:
        """Raises ValueError: the row is of a closed id."""
        arrays, buffer, head = self._segment.arrays, bytearray(self._buffer), self._head  # torch wants to write
        if not arrays:
            raise ValueError(f"{self._segment.path}: {self.id!r} has no ticket any more")
        kind, count, at, _, _ = arrays[0]
        ids = np.frombuffer(buffer, kind, count, at)
        kind, _, at, _, _ = arrays[1]
        if self._segment.cuts:
            a, b, c, d = self._segment.cuts
            floats = np.frombuffer(buffer, kind, d.stop, at)
            weights, dense, output, served = floats[a], floats[b], floats[c], floats[d]
        else:
            weights, dense, output, served = (np.frombuffer(buffer, *each[:3]) for each in arrays[1:5])
        scores = Scores(output, served, head[5], *(_told(arrays[5:], buffer) if len(arrays) > 5 else ()))
        at = self._segment.text + head[7]
        end = at + head[8]
        id, key = buffer[self._segment.text : at].decode(), buffer[at:end].decode()
        segment = buffer[end : end + head[9]].decode() if head[9] else ""
        rest = buffer[end + head[9] :].rstrip(b"\0")
        told = segment, key, head[1], orjson.loads(rest) if rest else {}
        return Ticket(id, self.time_s, Encoded(ids, weights, dense), scores, self.origin, *told)

    def entry(self) -> Named:
        """As it was given to be sealed."""
        if self._segment.bare:
            return self.id, Closed(bool(self._head[5]), self.owner, self.time_s, self.origin)
        return self.id, self.ticket()


def _told(arrays: Sequence[_Array], buffer: bytearray) -> tuple[tuple[Recalled, ...], dict[str, NDArray[Any]]]:
    """What the error memory and plug-ins knew."""
    stages: dict[str, dict[str, Any]] = {}
    notes = {}
    for kind, count, at, shape, name in arrays:
        value = np.frombuffer(buffer, kind, count, at).reshape(shape)
        if at % kind.itemsize:  # torch wants it where the processor does
            value = value.copy()
        what, rest = name.split(".", 1)
        if what == "notes":
            notes[rest] = value
        else:
            stage, field = rest.split(".")
            stages.setdefault(stage, {})[field] = value
    for each in stages.values():
        each |= {"support": float(each["support"]), "version": int(each["version"])}
    return tuple(Recalled(**each) for each in stages.values()), notes
