"""What the joiner has no room for in memory: tickets and closed ids in segments on disk, found by id, rung in order.

In memory stay, for each row, a slot of the index (17 to 34 bytes), a place in its file (4) and a status (1). Segments
lie among the chunks of the shard's checkpoints: a snapshot names them, and one that no retained snapshot names, and
that is not in use, is swept as other chunks are. They are durable by the time that a snapshot names them.

State is what the rows say and each row's status; index, order of ringing and counts follow from that.
"""

from __future__ import annotations

import heapq
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from streamcl.chunks import Chunks
from streamcl.places import Places
from streamcl.protocols import State, StreamclError
from streamcl.records import Origin, Selector, Ticket
from streamcl.segments import Named, Row, Segment, hash_of, sealed

WAITING, OPEN, EXPIRED, JOINED, GONE = range(5)
"""Nothing has been said of it; a provisional negative has; its window has closed; a label came; not known any more."""

EARLY, DEADLINE = 3, 0
"""Alarms, as the joiner numbers its own."""

OPEN_FILES = 256
NEVER = float("inf")

Restated = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Shelf:
    """A segment, and what has become of its rows."""

    def __init__(self, segment: Segment, slot: int, number: int, status: bytearray) -> None:
        self.segment, self.slot, self.number, self.status = segment, slot, number, status
        self.waiting = status.count(WAITING) + status.count(OPEN)
        self.closed = status.count(EXPIRED) + status.count(JOINED)
        self.early = self.late = 0  # rows before it are past that alarm

    def candidate(self, alarm: int, staged: bool) -> int:
        """The next row that the alarm may ring for; -1: none."""
        status = self.status
        if alarm == EARLY or not staged:
            found = status.find(WAITING, self.early)
            self.early = len(status) if found < 0 else found
            return found
        found = status.find(OPEN, self.late, self.early)
        self.late = self.early if found < 0 else found
        return found if found >= 0 else status.find(WAITING, self.early)


class Found(NamedTuple):
    """A row that is known, and where."""

    shelf: Shelf
    place: int
    row: Row

    @property
    def status(self) -> int:
        return self.shelf.status[self.place]


class Head(NamedTuple):
    """The next alarm of a shelf; compares as the joiner's own."""

    due: float
    origin: Origin
    alarm: int
    number: int
    place: int
    row: Row


class Archive:
    """Rows on disk.

    Args:
        early_s, window_s: When a row's alarms ring, behind its event time; `early_s` None: there is no early one.
        most: Closed ids that are remembered (count); beyond it those of the oldest segment go.
    """

    def __init__(self, early_s: float | None, window_s: float, most: int) -> None:
        self.staged = early_s is not None
        self.after = {EARLY: early_s or 0.0, DEADLINE: window_s}
        self.known_s = 2.0 * window_s  # closed ids are known for one more window
        self.most = most
        self.chunks: Chunks | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._clear()

    due: float
    """When there is something to do next; never too late."""

    def _clear(self) -> None:
        self.places = Places()
        self.shelves: list[Shelf | None] = []  # by slot
        self._in_order: dict[int, Shelf] = {}  # by number, oldest first
        self.waiting = self.closed = self.bytes = 0
        self._number = 0
        self._heads: list[Head] = []
        self._ends: list[tuple[float, int, Shelf]] = []  # when the last row of a shelf may be forgotten
        self._handles: dict[str, int] = {}
        self.due = NEVER

    def keep_in(self, chunks: Chunks) -> None:
        """Where segments lie. Without it, in a folder that goes with the process."""
        if self._number:
            raise ValueError("there are segments elsewhere already")
        self.chunks = chunks

    def _folder(self) -> Chunks:
        if self.chunks is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="streamcl-tickets-", ignore_cleanup_errors=True)
            self.chunks = Chunks(Path(self._temporary.name))
        return self.chunks

    def __len__(self) -> int:
        return self.waiting + self.closed

    def in_order(self) -> list[Shelf]:
        """Oldest first."""
        return list(self._in_order.values())

    def add(self, entries: Sequence[Named], statuses: Sequence[int]) -> None:
        """Take rows over; none of their ids is here."""
        chunks = self._folder()
        for order, file in sealed(entries):
            try:
                name = chunks.hold(file)
            except OSError as error:
                raise StreamclError(f"{chunks.folder}: can't write tickets that wait: {error.strerror}") from error
            self._shelve(Segment(chunks.folder / name), bytearray(statuses[place] for place in order))
        self._forget_too_many()

    def _shelve(self, segment: Segment, status: bytearray) -> None:
        slot = next((slot for slot, shelf in enumerate(self.shelves) if shelf is None), len(self.shelves))
        shelf = Shelf(segment, slot, self._number, status)
        self._number += 1
        if slot == len(self.shelves):
            self.shelves.append(shelf)
        else:
            self.shelves[slot] = shelf
        self._in_order[shelf.number] = shelf
        alive = np.frombuffer(status, np.uint8) != GONE
        self.places.put(segment.hashes()[alive], _places(slot, np.flatnonzero(alive)))
        self.waiting += shelf.waiting
        self.closed += shelf.closed
        self.bytes += segment.path.stat().st_size
        heapq.heappush(self._ends, (segment.last_s + self.known_s, shelf.number, shelf))
        for alarm in (EARLY, DEADLINE) if self.staged else (DEADLINE,):
            self._push(shelf, alarm)
        self._note_due()

    def _push(self, shelf: Shelf, alarm: int) -> None:
        place = shelf.candidate(alarm, self.staged)
        if place >= 0:
            row = self._row(shelf, place)
            head = Head(row.time_s + self.after[alarm], row.origin, alarm, shelf.number, place, row)
            heapq.heappush(self._heads, head)

    def _row(self, shelf: Shelf, place: int) -> Row:
        segment = shelf.segment
        handle = self._handles.get(segment.name)
        return segment.row(self._opened(segment) if handle is None else handle, place)

    def _opened(self, segment: Segment) -> int:
        if len(self._handles) >= OPEN_FILES:
            os.close(self._handles.pop(next(iter(self._handles))))
        try:
            handle = self._handles[segment.name] = os.open(segment.path, os.O_RDONLY)
        except OSError as error:
            raise StreamclError(f"{segment.path}: tickets that wait are gone: {error.strerror}") from error
        return handle

    def find(self, id: str, watermark: float) -> Found | None:
        """A row that is waiting, or was closed so short a time before the watermark that it is still known."""
        name = id.encode()
        for slot in self.places.find(hash_of(name)):
            shelf, place = self.shelves[slot >> 16], slot & 0xFFFF
            assert shelf is not None  # noqa: S101 - what goes takes its places along
            row = self._row(shelf, place)
            if row.of(name):
                known = shelf.status[place] <= OPEN or row.time_s + self.known_s >= watermark
                return Found(shelf, place, row) if known else None
        return None

    def turn(self, found: Found, status: int) -> None:
        """What has become of a row that is known."""
        shelf, place = found.shelf, found.place
        waited, waits = shelf.status[place] <= OPEN, status <= OPEN
        shelf.waiting += waits - waited
        self.waiting += waits - waited
        more = (not waits and status != GONE) - (not waited)  # of the closed; nothing that is gone comes back
        shelf.closed += more
        self.closed += more
        shelf.status[place] = status
        if status == GONE:
            self.places.remove(
                np.array([hash_of(found.row.id.encode())], np.uint64), _places(shelf.slot, np.array([place]))
            )
            self._drop_if_done(shelf)
        if self.closed > self.most:
            self._forget_too_many()

    def head(self) -> Head | None:
        """The alarm that rings next."""
        while self._heads:
            head = self._heads[0]
            shelf = self._in_order.get(head.number)
            if shelf is not None and shelf.candidate(head.alarm, self.staged) == head.place:
                return head
            heapq.heappop(self._heads)
            if shelf is not None:
                self._push(shelf, head.alarm)
        return None

    def ring(self, head: Head) -> Found:
        """Its row, which whoever takes it turns to another status; then the shelf's next alarm is set."""
        return Found(self._in_order[head.number], head.place, head.row)

    def first(self) -> Found | None:
        """Of those that wait in the oldest segment, the one whose window closes first."""
        for shelf in self._in_order.values():
            if shelf.waiting:
                place = shelf.candidate(DEADLINE, self.staged)
                return Found(shelf, place, self._row(shelf, place))
        return None

    def sweep(self, watermark: float) -> None:
        """Let go of segments whose ids are all to be forgotten."""
        while self._ends and self._ends[0][0] < watermark and not self._ends[0][2].waiting:
            self._drop(heapq.heappop(self._ends)[2])
        self._note_due()

    def _forget_too_many(self) -> None:
        for shelf in self.in_order() if self.closed > self.most else ():
            if self.closed <= self.most:
                return
            gone = [place for place, status in enumerate(shelf.status) if status in (EXPIRED, JOINED)]
            self.places.remove(shelf.segment.hashes()[gone], _places(shelf.slot, np.array(gone, np.int64)))
            for place in gone:
                shelf.status[place] = GONE
            self.closed -= shelf.closed
            shelf.closed = 0
            self._drop_if_done(shelf)

    def _drop_if_done(self, shelf: Shelf) -> None:
        if not shelf.waiting and not shelf.closed:
            self._drop(shelf)

    def _drop(self, shelf: Shelf) -> None:
        if self.shelves[shelf.slot] is not shelf:
            return
        segment = shelf.segment
        self.places.remove(segment.hashes(), _places(shelf.slot, np.arange(len(segment))))
        self.closed -= shelf.closed
        self.waiting -= shelf.waiting
        self.bytes -= segment.path.stat().st_size
        self.shelves[shelf.slot] = None
        del self._in_order[shelf.number]
        shelf.waiting = shelf.closed = 0
        handle = self._handles.pop(segment.name, None)
        if handle is not None:
            os.close(handle)
        self._folder().let_go(segment.name)
        if self._temporary:  # nobody else sweeps there
            segment.path.unlink(missing_ok=True)

    def rows(self, shelf: Shelf) -> Iterator[tuple[int, Row]]:
        """(status, row) of those that are not gone."""
        for place, status in enumerate(bytes(shelf.status)):
            if status != GONE:
                yield status, self._row(shelf, place)

    def forget(self, who: Selector, restated: Restated | None) -> tuple[int, int]:
        """Erase rows, by writing anew each segment that holds some; (tickets that waited, closed ids)."""
        tickets = closed = 0
        for shelf in self.in_order():
            kept: list[tuple[int, Named]] = []
            for status, row in self.rows(shelf):
                if not _meant(who, row, shelf.segment.bare):
                    kept.append((status, row.entry()))
                elif status in (WAITING, OPEN):
                    tickets += 1
                else:
                    closed += 1
            if len(kept) == len(shelf.segment) and (restated is None or shelf.segment.bare):
                continue
            if restated:
                kept = [(status, _restate(entry, restated)) for status, entry in kept]
            self._replace(shelf, kept)
        return tickets, closed

    def _replace(self, shelf: Shelf, kept: Sequence[tuple[int, Named]]) -> None:
        """By segments that are the younger ones then; all others are looked at as well, so the order stays."""
        self._drop(shelf)
        if kept:
            self.add([entry for _, entry in kept], [status for status, _ in kept])

    def _note_due(self) -> None:
        ring = self._heads[0].due if self._heads else NEVER
        self.due = min(ring, self._ends[0][0] if self._ends else NEVER)

    def read(self) -> dict[str, float]:
        return {"tickets_on_disk": float(self.waiting), "tickets_bytes": float(self.bytes)}

    def state_dict(self) -> State:
        shelves = self.in_order()
        status = np.frombuffer(b"".join(bytes(shelf.status) for shelf in shelves), np.uint8)
        return {"segment_files": [shelf.segment.name for shelf in shelves], "status": status.copy()}

    def load_state_dict(self, state: State) -> None:
        """Raises OSError: a segment is not there."""
        self.close_files()
        self._clear()
        names, at = state.get("segment_files", []), 0
        chunks = self._folder() if names else self.chunks
        if chunks is not None:
            chunks.held = set(names)
        for name in names:
            assert chunks is not None  # noqa: S101
            segment = Segment(chunks.folder / name)
            self._shelve(segment, bytearray(state["status"][at : at + len(segment)].tobytes()))
            at += len(segment)

    def close_files(self) -> None:
        """They are opened again as they are needed."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def _places(slot: int, rows: NDArray[Any]) -> NDArray[np.uint32]:
    return ((slot << 16) | rows).astype(np.uint32)


def _meant(who: Selector, row: Row, bare: bool) -> bool:
    if not bare:
        return who.meets(row.key, row.id, row.time_s)
    return (who.owners is None or row.owner in who.owners) and who.of_id(row.id) and who.in_time(row.time_s)


def restate(ticket: Ticket, restated: Restated) -> Ticket:
    """With what `restated` makes of its numbers."""
    return replace(ticket, features=ticket.features._replace(dense=restated(ticket.features.dense)))


def _restate(entry: Named, restated: Restated) -> Named:
    id, what = entry
    return id, restate(what, restated) if isinstance(what, Ticket) else what
