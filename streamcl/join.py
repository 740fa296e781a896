"""The joiner: tickets wait for their labels, in event time, in bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

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
from streamcl.stations import Join

Restated = Callable[[NDArray[np.float32]], NDArray[np.float32]]


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

    DEADLINE = 0  # of a waiting ticket
    ORPHAN = 1  # a label has waited long enough for its event
    FORGET = 2  # a closed id need not be told apart from an unknown one any more


Closed = tuple[bool, int, float]  # was it joined; whose it was, as a mark; event time
Entry = tuple[float, Origin, int, str]  # (due time, position, alarm, id): the order of expiry


class Joiner:
    """Joins labels to tickets by event id. What is known of an id lives here and nowhere else.

    | case | fate | counted as |
    |---|---|---|
    | label within the window of its ticket | outcome, at the label's place in the stream | `joined` |
    | window closes without one | outcome with label 0 (`negative`), or nothing (`drop`) | `expired`, `dropped` |
    | label after the window | ignored | `late` |
    | another label of an id that had one | ignored | `duplicate` |
    | label before its event | waits `orphan_s`, then ignored | `orphaned` |
    | more than `max_tickets` wait | the one that came first is dropped | `overflowed` |

    A label is judged by its own event time: it is late when that lies after its ticket's deadline. A closed id is
    remembered for one more window, after which a label for it counts as orphaned.

    Args:
        counts: Where fates are counted; the worker's, who saves it.
    """

    def __init__(self, config: Join, counts: Counter[str]) -> None:
        self.config = config
        self.counts = counts
        self.watermark = Watermark(config)
        self.tickets: dict[str, Ticket] = {}
        self.orphans: dict[str, Label] = {}
        self.closed: dict[str, Closed] = {}
        self.alarms: list[Entry] = []

    def knows(self, id: str) -> bool:
        """True for an event that waits, or has been closed a short time ago."""
        return id in self.tickets or id in self.closed

    def advance(self, stream: Stream, time_s: float) -> Iterable[Outcome]:
        """Move the watermark by one record; gives what expires before it, in (deadline, position) order.

        At most `max_expiries_per_event` alarms ring; the rest, being state, ring at the next records.
        """
        self.watermark.advance(stream, time_s)
        if not self.alarms or self.alarms[0][0] >= self.watermark.value:
            return ()
        return self._expired()

    def _expired(self) -> Iterator[Outcome]:
        for _ in range(self.config.max_expiries_per_event):
            if not self.alarms or self.alarms[0][0] >= self.watermark.value:
                return
            yield from self._ring(heapq.heappop(self.alarms))

    def add(self, ticket: Ticket) -> Outcome | None:
        """Let a ticket wait; an outcome when its label is here already."""
        self.tickets[ticket.id] = ticket
        self._set(self._deadline(ticket), ticket.origin, Alarm.DEADLINE, ticket.id)
        self._make_room()
        label = self.orphans.pop(ticket.id, None)
        return self._join(label) if label else None

    def label(self, label: Label) -> Outcome | None:
        """Take a label; an outcome when its ticket waits and the window is open."""
        if label.id in self.tickets:
            return self._join(label)
        if label.id in self.closed:
            self.counts["duplicate" if self.closed[label.id][0] else "late"] += 1
        elif label.id in self.orphans:
            self.counts["duplicate"] += 1
        else:
            self._adopt(label)
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
        of_owner = [(id, t) for id, (_, owner, t) in self.closed.items() if owners is None or owner in owners]
        closed = [id for id, time_s in of_owner if who.of_id(id) and who.in_time(time_s)]
        for id in orphans:
            del self.orphans[id]
        for id in tickets:
            del self.tickets[id]
        for id in closed:
            del self.closed[id]
        for id, ticket in self.tickets.items() if restated else ():
            features = ticket.features._replace(dense=restated(ticket.features.dense)) if restated else ticket.features
            self.tickets[id] = replace(ticket, features=features)
        self._sort_out()  # an alarm that rings for nothing has an id too
        return {"orphans": len(orphans), "tickets": len(tickets), "closed_ids": len(closed)}

    def _join(self, label: Label) -> Outcome | None:
        ticket = self.tickets.get(label.id)
        if ticket is None:  # it overflowed as it came
            return None
        if label.time_s > self._deadline(ticket):
            self.counts["late"] += 1
            return None
        del self.tickets[label.id]
        self._close(ticket, joined=True)
        self.counts["joined"] += 1
        return Outcome(ticket, label.value, Fate.JOINED, max(0.0, label.time_s - ticket.time_s), label.also)

    def _adopt(self, label: Label) -> None:
        self.orphans[label.id] = label
        self._set(label.time_s + self.config.orphan_s, label.origin, Alarm.ORPHAN, label.id)
        if len(self.orphans) > self.config.max_tickets:
            del self.orphans[next(iter(self.orphans))]
            self.counts["orphaned"] += 1

    def _ring(self, entry: Entry) -> Iterator[Outcome]:
        due, origin, alarm, id = entry
        if alarm == Alarm.ORPHAN:
            if id in self.orphans and self.orphans[id].origin == origin:
                del self.orphans[id]
                self.counts["orphaned"] += 1
        elif alarm == Alarm.FORGET:
            self.closed.pop(id, None)
        else:
            if id in self.tickets and self.tickets[id].origin == origin:
                yield from self._expire(self.tickets.pop(id))
            if id in self.closed:
                self._set(due + self.config.attribution_window_s, origin, Alarm.FORGET, id)

    def _expire(self, ticket: Ticket) -> Iterator[Outcome]:
        self._close(ticket, joined=False)
        if self.config.on_close == "drop":
            self.counts["dropped"] += 1
            return
        self.counts["expired"] += 1
        yield Outcome(ticket, 0.0, Fate.EXPIRED, self.config.attribution_window_s)

    def _close(self, ticket: Ticket, joined: bool) -> None:
        self.closed[ticket.id] = joined, mark(ticket.key), ticket.time_s
        if len(self.closed) > self.config.max_tickets:
            del self.closed[next(iter(self.closed))]

    def _make_room(self) -> None:
        if len(self.tickets) > self.config.max_tickets:
            del self.tickets[next(iter(self.tickets))]
            self.counts["overflowed"] += 1

    def _deadline(self, ticket: Ticket) -> float:
        return ticket.time_s + self.config.attribution_window_s

    def _set(self, due: float, origin: Origin, alarm: Alarm, id: str) -> None:
        heapq.heappush(self.alarms, (due, origin, int(alarm), id))
        alive = len(self.tickets) + len(self.orphans) + len(self.closed)
        if len(self.alarms) > 2 * alive + 1024:
            # Event time that stands still rings no alarm: what is stale goes now, or the heap would grow for ever.
            self._sort_out()

    def _sort_out(self) -> None:
        self.alarms = [entry for entry in self.alarms if self._alive(entry)]
        heapq.heapify(self.alarms)

    def _alive(self, entry: Entry) -> bool:
        _, origin, alarm, id = entry
        if alarm == Alarm.ORPHAN:
            return id in self.orphans and self.orphans[id].origin == origin
        return id in self.closed or (id in self.tickets and self.tickets[id].origin == origin)

    def read(self) -> dict[str, float]:
        waiting = {"tickets": float(len(self.tickets)), "orphans": float(len(self.orphans))}
        return waiting | ({"watermark_s": self.watermark.value} if np.isfinite(self.watermark.value) else {})

    def state_dict(self) -> State:
        return {
            "watermark": self.watermark.value,
            "newest": [[s.input, s.partition, t] for s, t in sorted(self.watermark.newest.items())],
            "tickets": tickets_to_state(list(self.tickets.values())),
            "orphans": [[o.id, o.value, o.time_s, *o.origin, *o.also] for o in self.orphans.values()],
            "closed": _closed_to_state(self.closed),
            "alarms": _alarms_to_state(sorted(self.alarms)),
        }

    def load_state_dict(self, state: State) -> None:
        self.watermark.value = state["watermark"]
        self.watermark.newest = {Stream(i, p): t for i, p, t in state["newest"]}
        self.tickets = {ticket.id: ticket for ticket in tickets_from_state(state["tickets"])}
        self.orphans = {o[0]: Label(o[0], o[1], o[2], Origin(*o[3:6]), tuple(o[6:])) for o in state["orphans"]}
        self.closed = _closed_from_state(state["closed"])
        self.alarms = _alarms_from_state(state["alarms"])


def _closed_to_state(closed: Mapping[str, Closed]) -> State:
    columns = list(closed.values())
    return {
        "ids": list(closed),
        "joined": np.array([joined for joined, _, _ in columns], np.bool_),
        "owner_key": np.array([owner for _, owner, _ in columns], np.int64),
        "time_s": np.array([time_s for _, _, time_s in columns], np.float64),
    }


def _closed_from_state(state: State) -> dict[str, Closed]:
    """Of nobody knows whom, in an old snapshot."""
    count = len(state["ids"])
    owners, times = state.get("owner_key", np.zeros(count, np.int64)), state.get("time_s", np.full(count, np.nan))
    columns = (column.tolist() for column in (state["joined"], owners, times))
    return dict(zip(state["ids"], zip(*columns, strict=True), strict=True))


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
    return {
        "id": [t.id for t in tickets],
        "key": [t.key for t in tickets],
        "input": [t.origin.input for t in tickets],
        "time_s": np.array([t.time_s for t in tickets], np.float64),
        "origin": np.array([t.origin[1:] for t in tickets], np.int64).reshape(len(tickets), 2),
        "version": np.array([t.scores.version for t in tickets], np.int64),
        **{name: np.stack(column) if column else np.zeros((0, 0)) for name, column in columns.items()},
        **({"segment": [t.segment for t in tickets]} if any(t.segment for t in tickets) else {}),
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
        )
