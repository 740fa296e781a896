"""The joiner: tickets wait for their labels, in event time, in bounded memory."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from streamcl import archive
from streamcl.archive import Archive
from streamcl.chunks import Chunks
from streamcl.observations import Observation, aggregate
from streamcl.protocols import State
from streamcl.records import (
    Encoded,
    Fate,
    Label,
    Notes,
    Origin,
    Outcome,
    Recalled,
    Scores,
    Selector,
    Stream,
    Ticket,
    mark,
)
from streamcl.segments import MOST_ROWS, Closed
from streamcl.stations import Join

Restated = Callable[[NDArray[np.float32]], NDArray[np.float32]]
What = TypeVar("What", bound=Ticket | Closed)


class Watermark:
    """The event time before which nothing more is expected.

    The least, over the streams that are not idle, of the newest event time seen, less the allowed lateness; it never
    goes back. A stream is idle when it lies more than `idle_s` behind the newest of all, measured in their event time:
    no clock is read, so poll size and restarts change nothing. A stream that has not spoken yet doesn't count.
    """

    def __init__(self, config: Join) -> None:
        self.config = config
        self.newest: dict[Stream, float] = {}
        self.value = float("-inf")

    def advance(self, stream: Stream, time_s: float) -> None:
        newest = self.newest[stream] = max(time_s, self.newest.get(stream, time_s))
        if len(self.newest) == 1:  # as below, in a quarter of the time
            self.value = max(self.value, newest - self.config.allowed_lateness_s)
            return
        active = max(self.newest.values()) - self.config.idle_s
        least = min(time for time in self.newest.values() if time >= active)
        self.value = max(self.value, least - self.config.allowed_lateness_s)

    def leave(self, streams: Iterable[Stream]) -> None:
        """These have ended and hold the watermark no longer."""
        for stream in streams:
            self.newest.pop(stream, None)


class Alarm(IntEnum):
    """What is due at a time."""

    DEADLINE = archive.DEADLINE  # of a waiting ticket
    ORPHAN = 1  # a label has waited long enough for its event
    FORGET = 2  # a closed id need not be told apart from an unknown one any more
    EARLY = archive.EARLY  # a ticket is a negative for now


UNKNOWN = Origin("", 0, 0)

Entry = tuple[float, Origin, int, str]  # (due time, position, alarm, id): the order of expiry


class Joiner:
    """Joins labels to tickets by event id. What is known of an id lives here and nowhere else.

    | case | fate | counted as |
    |---|---|---|
    | label within the window of its ticket | outcome, at the label's place in the stream | `joined` |
    | the same, and its ticket was a negative for now | outcome, a second one | `late_joined` |
    | several labels, and they are aggregated | one outcome, when the window closes | `joined` |
    | `wait_s` passes without one | outcome with the default label, and the ticket waits on | `provisional` |
    | window closes without one | outcome with the default label (`negative`), or nothing | `expired`, `dropped` |
    | label after the window | ignored, or a second outcome (`late = "reemit"`) | `late`, `late_joined` |
    | another label of an id that had one | ignored | `duplicate` |
    | label before its event | waits `orphan_s`, then ignored | `orphaned` |
    | more than `max_tickets` wait | the one that came first is dropped | `overflowed` |

    A label is judged by its own event time: it is late when that lies after its ticket's deadline. A closed id is
    remembered for one more window, after which a label for it counts as orphaned.

    Beyond `memory_tickets` tickets and closed ids go to disk (see `streamcl.archive`), a batch of those that came first
    at a time. Nothing else changes, but for who overflows: of those on disk the first to close among the oldest batch.

    Args:
        counts: Where fates are counted; the worker's, who saves it.

    Attributes:
        settle: Called before tickets are written to disk: scores that were promised (see `Learner.answer`) must be
            there by then.
    """

    def __init__(self, config: Join, counts: Counter[str]) -> None:
        self.config = config
        self.counts = counts
        self.watermark = Watermark(config)
        # The first of a plain dict stands behind all that have left it: 30 us away among 100,000.
        self.tickets: OrderedDict[str, Ticket] = OrderedDict()
        self.orphans: OrderedDict[str, Label] = OrderedDict()
        self.closed: OrderedDict[str, Closed] = OrderedDict()
        self.alarms: list[Entry] = []
        self.early: set[str] = set()  # of those that wait: negatives for now
        self.kept: dict[str, Ticket] = {}  # of closed ids, for a late label
        self.observed: dict[str, list[Observation]] = {}  # of those that wait, to be aggregated
        self.archive = Archive(config.wait_s, config.attribution_window_s, config.max_tickets)
        self.settle: Callable[[], object] = lambda: None
        self._waits_for_all = config.aggregate != "first"
        self._reemits = config.late == "reemit"

    def keep_in(self, chunks: Chunks) -> None:
        """Where what goes to disk lies: with the checkpoints that are to name it."""
        self.archive.keep_in(chunks)

    @property
    def waiting(self) -> int:
        """Tickets (count)."""
        return len(self.tickets) + self.archive.waiting

    def origins(self) -> Iterator[Origin]:
        """Of the events that wait."""
        yield from (ticket.origin for ticket in self.tickets.values())
        for shelf in self.archive.in_order():
            rows = self.archive.rows(shelf)
            yield from (row.origin for status, row in rows if status in (archive.WAITING, archive.OPEN))

    def knows(self, id: str) -> bool:
        """True for an event that waits, or has been closed a short time ago."""
        if id in self.tickets or id in self.closed:
            return True
        return bool(self.archive.places.count) and self.archive.find(id, self.watermark.value) is not None

    def advance(self, stream: Stream, time_s: float) -> Iterable[Outcome]:
        """Move the watermark by one record; gives what expires before it, in (deadline, position) order.

        At most `max_expiries_per_event` alarms ring; the rest, being state, ring at the next records.
        """
        self.watermark.advance(stream, time_s)
        mark = self.watermark.value
        if (self.alarms and self.alarms[0][0] < mark) or self.archive.due < mark:
            return self._expired()
        return ()

    def _expired(self) -> Iterator[Outcome]:
        mark = self.watermark.value
        for _ in range(self.config.max_expiries_per_event):
            head = self.archive.head()
            here = self.alarms[0] if self.alarms and self.alarms[0][0] < mark else None
            if head is not None and head.due < mark and (here is None or head[:3] < here[:3]):
                yield from self._ring_archived(head)
            elif here is not None:
                yield from self._ring(heapq.heappop(self.alarms))
            else:
                break
        self.archive.sweep(mark)

    def add(self, ticket: Ticket) -> Outcome | None:
        """Let a ticket wait; an outcome when its label is here already."""
        self.tickets[ticket.id] = ticket
        if self.config.wait_s is not None:
            self._set(ticket.time_s + self.config.wait_s, ticket.origin, Alarm.EARLY, ticket.id)
        self._set(self._deadline(ticket.time_s), ticket.origin, Alarm.DEADLINE, ticket.id)
        self._make_room()
        label = self.orphans.pop(ticket.id, None)
        if label is None or self._waits_for_all:  # then it is among those observed
            return None
        return self.label(label) if ticket.id in self.tickets else None  # it may have overflowed as it came

    def label(self, label: Label) -> Outcome | None:
        """Take a label; an outcome when its ticket waits and the window is open."""
        id = label.id
        if id in self.tickets:
            return self._join(label)
        if id in self.closed:
            return self._after(label)
        found = self.archive.find(id, self.watermark.value) if self.archive.places.count else None
        if found is not None:
            return self._join_archived(label, found)
        if id not in self.orphans:
            self._adopt(label)
        elif self._waits_for_all:
            self._observe(label)
        else:
            self.counts["duplicate"] += 1
        return None

    def forget(self, who: Selector, restated: Restated | None = None) -> dict[str, int]:
        """Erase every trace of some events; returns of how many, by kind.

        A label that waits says nothing but its id: without event ids in the selector every one of them is erased. An
        id that has been forgotten is not known any more: an event of that id is a new one, its label an orphan. What
        `restated` says becomes of the numbers of the tickets that stay.
        """
        orphans = [id for id in self.orphans if who.of_id(id)]
        tickets = [t.id for t in self.tickets.values() if who.meets(t.key, t.id, t.time_s)]
        owners = who.owners
        of_owner = [
            (id, closed.time_s) for id, closed in self.closed.items() if owners is None or closed.owner in owners
        ]
        closed = [id for id, time_s in of_owner if who.of_id(id) and who.in_time(time_s)]
        for id in orphans:
            del self.orphans[id]
        for id in tickets:
            del self.tickets[id]
            self.early.discard(id)
        for id in closed:
            del self.closed[id]
            self.kept.pop(id, None)
        if restated:
            for held in (self.tickets, self.kept):
                held.update({id: archive.restate(ticket, restated) for id, ticket in held.items()})
        archived = self.archive.forget(who, restated)
        for id in [id for id in self.observed if not self._waits(id)]:
            del self.observed[id]
        self._sort_out()  # an alarm that rings for nothing has an id too
        return {
            "orphans": len(orphans),
            "tickets": len(tickets) + archived[0],
            "closed_ids": len(closed) + archived[1],
        }

    def _waits(self, id: str) -> bool:
        return id in self.tickets or id in self.orphans or self.archive.find(id, self.watermark.value) is not None

    def _join(self, label: Label) -> Outcome | None:
        ticket = self.tickets[label.id]
        if label.time_s > self._deadline(ticket.time_s):
            self.counts["late"] += 1
            return None
        if self._waits_for_all:
            self._observe(label)
            return None
        del self.tickets[label.id]
        self._close(ticket, joined=True)
        if label.id in self.early:
            self.early.discard(label.id)
            return self._late(ticket, label)
        return self._joined(ticket, label.value, label.time_s, label.also)

    def _join_archived(self, label: Label, found: archive.Found) -> Outcome | None:
        """As `_join` and `_after` do it."""
        status, time_s = found.status, found.row.time_s
        if status == archive.JOINED:
            self.counts["duplicate"] += 1
        elif status == archive.EXPIRED:
            if self._comes_after_all(label, time_s) and not found.shelf.segment.bare:
                self.archive.turn(found, archive.JOINED)
                return self._late(found.row.ticket(), label)
            self.counts["late"] += 1
        elif label.time_s > self._deadline(time_s):
            self.counts["late"] += 1
        elif self._waits_for_all:
            self._observe(label)
        else:
            self.archive.turn(found, archive.JOINED)
            ticket = found.row.ticket()
            if status == archive.OPEN:
                return self._late(ticket, label)
            return self._joined(ticket, label.value, label.time_s, label.also)
        return None

    def _after(self, label: Label) -> Outcome | None:
        """A label of an id that is closed."""
        closed = self.closed[label.id]
        if closed.joined:
            self.counts["duplicate"] += 1
        elif label.id in self.kept and self._comes_after_all(label, closed.time_s):
            self.closed[label.id] = closed._replace(joined=True)
            return self._late(self.kept.pop(label.id), label)
        else:
            self.counts["late"] += 1
        return None

    def _comes_after_all(self, label: Label, time_s: float) -> bool:
        """Whether it says something else than what was said when the window closed."""
        in_time = label.time_s <= self._deadline(time_s) + self.config.attribution_window_s
        return self._reemits and in_time and label.value != self.config.default

    def _joined(self, ticket: Ticket, value: float, time_s: float, also: tuple[float, ...] = ()) -> Outcome:
        self.counts["joined"] += 1
        return Outcome(ticket, value, Fate.JOINED, max(0.0, time_s - ticket.time_s), also)

    def _late(self, ticket: Ticket, label: Label) -> Outcome:
        self.counts["late_joined"] += 1
        return Outcome(ticket, label.value, Fate.LATE, max(0.0, label.time_s - ticket.time_s), label.also)

    def _observe(self, label: Label) -> None:
        self.observed.setdefault(label.id, []).append(Observation(label.time_s, label.origin, label.value))

    def _adopt(self, label: Label) -> None:
        self.orphans[label.id] = label
        if self._waits_for_all:
            self._observe(label)
        self._set(label.time_s + self.config.orphan_s, label.origin, Alarm.ORPHAN, label.id)
        if len(self.orphans) > self.config.max_tickets:
            self._orphaned(next(iter(self.orphans)))

    def _orphaned(self, id: str) -> None:
        del self.orphans[id]
        self.observed.pop(id, None)
        self.counts["orphaned"] += 1

    def _ring(self, entry: Entry) -> Iterator[Outcome]:
        due, origin, alarm, id = entry
        if alarm == Alarm.ORPHAN:
            if id in self.orphans and self.orphans[id].origin == origin:
                self._orphaned(id)
        elif alarm == Alarm.FORGET:
            self.closed.pop(id, None)
            self.kept.pop(id, None)
        elif alarm == Alarm.EARLY:
            if id in self.tickets and self.tickets[id].origin == origin:
                self.early.add(id)
                yield self._provisional(self.tickets[id])
        else:
            if id in self.tickets and self.tickets[id].origin == origin:
                yield from self._expire(self.tickets.pop(id))
            if id in self.closed:
                self._set(due + self.config.attribution_window_s, origin, Alarm.FORGET, id)

    def _ring_archived(self, head: archive.Head) -> Iterator[Outcome]:
        found = self.archive.ring(head)
        if head.alarm == Alarm.EARLY:
            self.archive.turn(found, archive.OPEN)
            yield self._provisional(found.row.ticket())
            return
        observed = found.row.id in self.observed
        self.archive.turn(found, archive.JOINED if observed else archive.EXPIRED)
        yield from self._verdict(found.row.ticket())

    def _provisional(self, ticket: Ticket) -> Outcome:
        self.counts["provisional"] += 1
        return Outcome(ticket, self.config.default, Fate.PROVISIONAL, self.config.wait_s or 0.0)

    def _expire(self, ticket: Ticket) -> Iterator[Outcome]:
        self.early.discard(ticket.id)
        observed = ticket.id in self.observed
        self._close(ticket, joined=observed)
        if self._reemits and not observed:
            self.kept[ticket.id] = ticket
        yield from self._verdict(ticket)

    def _verdict(self, ticket: Ticket) -> Iterator[Outcome]:
        """What the window has come to."""
        observed = self.observed.pop(ticket.id, None)
        if observed:
            value = aggregate(self.config.aggregate, observed, self.config.default)
            yield self._joined(ticket, value, max(observed).time_s)
        elif self.config.on_close == "drop":
            self.counts["dropped"] += 1
        else:
            self.counts["expired"] += 1
            yield Outcome(ticket, self.config.default, Fate.EXPIRED, self.config.attribution_window_s)

    def _close(self, ticket: Ticket, joined: bool) -> None:
        self.closed[ticket.id] = Closed(joined, mark(ticket.key), ticket.time_s, ticket.origin)
        if len(self.closed) > min(self.config.max_tickets, self.config.memory_tickets):
            self._spill_closed()

    def _spill_closed(self) -> None:
        if self.config.max_tickets <= self.config.memory_tickets:
            oldest, _ = self.closed.popitem(last=False)
            self.kept.pop(oldest, None)
            return
        self.settle()
        batch = self._batch(self.closed)
        joined = [self.closed.pop(id).joined for id, _ in batch]
        self._silence([id for id, _ in batch])
        self.archive.add(
            [(id, self.kept.pop(id, closed)) for id, closed in batch],
            [archive.JOINED if each else archive.EXPIRED for each in joined],
        )

    def _make_room(self) -> None:
        if len(self.tickets) > self.config.memory_tickets:
            self.settle()
            batch = self._batch(self.tickets)
            for id, _ in batch:
                del self.tickets[id]
            self._silence([id for id, _ in batch])
            early = [archive.WAITING] * len(batch)
            if self.early:
                early = [archive.OPEN if id in self.early else archive.WAITING for id, _ in batch]
                self.early.difference_update([id for id, _ in batch])
            self.archive.add(batch, early)
        if len(self.tickets) + self.archive.waiting > self.config.max_tickets:
            self._overflow()

    def _batch(self, held: Mapping[str, What]) -> list[tuple[str, What]]:
        """Those that came first."""
        return list(itertools.islice(held.items(), min(self.config.memory_tickets // 2, MOST_ROWS // 4)))

    def _overflow(self) -> None:
        found = self.archive.first() if self.archive.waiting else None
        if found is not None:
            id = found.row.id
            self.archive.turn(found, archive.GONE)
        else:
            id, _ = self.tickets.popitem(last=False)
        self.early.discard(id)
        self.observed.pop(id, None)
        self.counts["overflowed"] += 1

    def _deadline(self, time_s: float) -> float:
        return time_s + self.config.attribution_window_s

    def _set(self, due: float, origin: Origin, alarm: Alarm, id: str) -> None:
        heapq.heappush(self.alarms, (due, origin, int(alarm), id))
        alive = len(self.tickets) + len(self.orphans) + len(self.closed)
        if len(self.alarms) > 2 * alive + 1024:
            # Event time that stands still rings no alarm: what is stale goes now, or the heap would grow for ever.
            self._sort_out()

    def _silence(self, ids: Sequence[str]) -> None:
        """The archive has alarms of its own."""
        gone = set(ids)
        self.alarms = [entry for entry in self.alarms if entry[3] not in gone]
        heapq.heapify(self.alarms)

    def _sort_out(self) -> None:
        self.alarms = [entry for entry in self.alarms if self._alive(entry)]
        heapq.heapify(self.alarms)

    def _alive(self, entry: Entry) -> bool:
        _, origin, alarm, id = entry
        if alarm == Alarm.ORPHAN:
            return id in self.orphans and self.orphans[id].origin == origin
        waits = id in self.tickets and self.tickets[id].origin == origin
        return waits or (id in self.closed and alarm != Alarm.EARLY)

    def read(self) -> dict[str, float]:
        waiting = {"tickets": float(self.waiting), "orphans": float(len(self.orphans))}
        waiting |= self.archive.read() if self.archive.places.count else {}
        hits = self.counts["joined"] + self.counts["late_joined"]
        ended = hits + self.counts["expired"] + self.counts["dropped"]
        waiting |= {"join_hit_ratio": hits / ended} if ended else {}
        return waiting | ({"watermark_s": self.watermark.value} if np.isfinite(self.watermark.value) else {})

    def state_dict(self) -> State:
        observed = [[id, o.time_s, o.value, *o.origin] for id, seen in self.observed.items() for o in seen]
        return {
            "watermark": self.watermark.value,
            "newest": [[s.input, s.partition, t] for s, t in sorted(self.watermark.newest.items())],
            "tickets": tickets_to_state(list(self.tickets.values())),
            "orphans": [[o.id, o.value, o.time_s, *o.origin, *o.also] for o in self.orphans.values()],
            "closed": _closed_to_state(self.closed),
            "alarms": _alarms_to_state(sorted(self.alarms)),
            **({"early": [id for id in self.tickets if id in self.early]} if self.early else {}),
            **({"kept": tickets_to_state(list(self.kept.values()))} if self.kept else {}),
            **({"observed": observed} if observed else {}),
            **({"archive": self.archive.state_dict()} if len(self.archive) else {}),
        }

    def load_state_dict(self, state: State) -> None:
        self.watermark.value = state["watermark"]
        self.watermark.newest = {Stream(i, p): t for i, p, t in state["newest"]}
        self.tickets = OrderedDict((ticket.id, ticket) for ticket in tickets_from_state(state["tickets"]))
        self.orphans = OrderedDict(
            (o[0], Label(o[0], o[1], o[2], Origin(*o[3:6]), tuple(o[6:]))) for o in state["orphans"]
        )
        self.alarms = _alarms_from_state(state["alarms"])
        self.closed = _closed_from_state(state["closed"], {id: origin for _, origin, _, id in self.alarms})
        self.early = set(state.get("early", ()))
        self.kept = {ticket.id: ticket for ticket in tickets_from_state(state["kept"])} if "kept" in state else {}
        self.observed = {}
        for id, time_s, value, *origin in state.get("observed", ()):
            self.observed.setdefault(id, []).append(Observation(time_s, Origin(*origin), value))
        self.archive.load_state_dict(state.get("archive", {}))


def _closed_to_state(closed: Mapping[str, Closed]) -> State:
    columns = list(closed.values())
    return {
        "ids": list(closed),
        "joined": np.array([each.joined for each in columns], np.bool_),
        "owner_key": np.array([each.owner for each in columns], np.int64),
        "time_s": np.array([each.time_s for each in columns], np.float64),
    }


def _closed_from_state(state: State, origins: Mapping[str, Origin]) -> OrderedDict[str, Closed]:
    """Of nobody knows whom, in an old snapshot. Where its event stood, an id's alarm says."""
    count = len(state["ids"])
    owners, times = state.get("owner_key", np.zeros(count, np.int64)), state.get("time_s", np.full(count, np.nan))
    columns = (column.tolist() for column in (state["joined"], owners, times))
    found = zip(state["ids"], *columns, strict=True)
    return OrderedDict((id, Closed(joined, owner, at, origins.get(id, UNKNOWN))) for id, joined, owner, at in found)


def _alarms_to_state(alarms: Sequence[Entry]) -> State:
    """Columns, for the same reason as the tickets'."""
    return {
        "due": np.array([due for due, _, _, _ in alarms], np.float64),
        "input": [origin.input for _, origin, _, _ in alarms],
        "numbers": np.array([(*origin[1:], alarm) for _, origin, alarm, _ in alarms], np.int64).reshape(-1, 3),
        "id": [id for _, _, _, id in alarms],
    }


def _alarms_from_state(state: State) -> list[Entry]:
    columns = zip(state["due"].tolist(), state["input"], state["numbers"].tolist(), state["id"], strict=True)
    return [(due, Origin(input, p, o), alarm, id) for due, input, (p, o, alarm), id in columns]


def tickets_to_state(tickets: Sequence[Ticket]) -> State:
    """Tickets as columns: a million of them must not become a million small arrays."""
    columns: dict[str, list[NDArray[Any]]] = {
        "ids": [t.features.ids for t in tickets],
        "weights": [t.features.weights for t in tickets],
        "dense": [t.features.dense for t in tickets],
        "output": [t.scores.output for t in tickets],
        "served": [t.scores.served for t in tickets],
    }
    recalled = _recalled_to_state([t.scores for t in tickets])
    notes = _notes_to_state([t.scores.notes for t in tickets])
    names = sorted({name for t in tickets if t.traits for name in t.traits})
    traits = [{"name": name, "texts": [t.traits.get(name, "") for t in tickets]} for name in names]
    return {
        "id": [t.id for t in tickets],
        "key": [t.key for t in tickets],
        "input": [t.origin.input for t in tickets],
        "time_s": np.array([t.time_s for t in tickets], np.float64),
        "origin": np.array([t.origin[1:] for t in tickets], np.int64).reshape(len(tickets), 2),
        "version": np.array([t.scores.version for t in tickets], np.int64),
        **{name: np.stack(column) if column else np.zeros((0, 0)) for name, column in columns.items()},
        **({"segment": [t.segment for t in tickets]} if any(t.segment for t in tickets) else {}),
        **({"weight": np.array([t.weight for t in tickets])} if any(t.weight != 1.0 for t in tickets) else {}),
        **({"traits": traits} if traits else {}),
        **({"recalled": recalled} if recalled else {}),
        **({"notes": notes} if notes else {}),
    }


def _recalled_to_state(scores: Sequence[Scores]) -> list[State]:
    """Columns by place in `Scores.recalled`, and by width of the key: the error memory may have been set otherwise."""
    groups: dict[tuple[int, str, int], list[int]] = {}
    for ticket, each in enumerate(scores):
        for stage, recalled in enumerate(each.recalled):
            groups.setdefault((stage, str(recalled.key.dtype), len(recalled.key)), []).append(ticket)
    found = []
    for (stage, _, _), having in sorted(groups.items()):
        column = zip(*(scores[ticket].recalled[stage] for ticket in having), strict=True)
        arrays = {name: np.stack(values) for name, values in zip(Recalled._fields, column, strict=True)}
        found.append({"ticket": np.array(having, np.int64), **arrays})
    return found


def _notes_to_state(notes: Sequence[Notes]) -> list[State]:
    """Columns by name and by shape: plug-ins may have come or gone."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for ticket, each in enumerate(notes):
        for name, value in each.items():
            groups.setdefault((name, str(value.dtype), value.shape), []).append(ticket)
    return [
        {"name": name, "ticket": np.array(having, np.int64), "values": np.stack([notes[i][name] for i in having])}
        for (name, _, _), having in sorted(groups.items())
    ]


def tickets_from_state(state: State) -> Iterator[Ticket]:
    recalled: list[tuple[Recalled, ...]] = [()] * len(state["id"])
    for stage in state.get("recalled", ()):
        columns = (stage[name] for name in Recalled._fields)
        for i, key, given, labels, scores, support, version in zip(stage["ticket"].tolist(), *columns, strict=True):
            recalled[i] += (Recalled(key, given, labels, scores, float(support), int(version)),)
    segments = state.get("segment") or [""] * len(state["id"])
    keys = state.get("key", [""] * len(state["id"]))
    traits: list[dict[str, str]] = [{} for _ in state["id"]]
    for column in state.get("traits", ()):
        for held, text in zip(traits, column["texts"], strict=True):
            held.update({column["name"]: text} if text else {})
    shares = state["weight"].tolist() if "weight" in state else [1.0] * len(state["id"])
    notes: list[dict[str, NDArray[Any]]] = [{} for _ in state["id"]]
    for column in state.get("notes", ()):
        for i, value in zip(column["ticket"].tolist(), column["values"], strict=True):
            notes[i][column["name"]] = value
    for i, id in enumerate(state["id"]):
        partition, offset = state["origin"][i].tolist()
        yield Ticket(
            id=id,
            time_s=float(state["time_s"][i]),
            features=Encoded(state["ids"][i], state["weights"][i], state["dense"][i]),
            scores=Scores(state["output"][i], state["served"][i], int(state["version"][i]), recalled[i], notes[i]),
            origin=Origin(state["input"][i], partition, offset),
            segment=segments[i],
            key=keys[i],
            weight=shares[i],
            traits=traits[i],
        )
