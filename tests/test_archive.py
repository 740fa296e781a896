"""What waits on disk joins, expires and is forgotten as in memory, and comes back from a snapshot to the bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from msgspec.structs import replace

from streamcl.chunks import Chunks
from streamcl.join import Joiner, tickets_to_state
from streamcl.protocols import State, StreamclError
from streamcl.records import EVENTS, Encoded, Origin, Recalled, Scores, Selector, Ticket
from streamcl.segments import Closed, Named, Segment, sealed
from streamcl.state import digest, flatten, to_json, unflatten
from streamcl.stations import Join
from tests.test_join import ACTIONS, Action, at, label, play, ticket

MODES: list[dict[str, Any]] = [
    {},
    {"on_close": "drop"},
    {"wait_s": 2.0},
    {"wait_s": 0.0, "late": "reemit"},
    {"late": "reemit"},
    {"aggregate": "sum"},
    {"aggregate": "last"},
]


def joiner(memory_tickets: int, **changes: Any) -> Joiner:
    config = {"attribution_window_s": 10.0, "orphan_s": 5.0, "idle_s": 1000.0, "max_expiries_per_event": 1000}
    return Joiner(Join(**(config | {"memory_tickets": memory_tickets} | changes)), Counter())


def saved(join: Joiner) -> State:
    """As it comes back from a snapshot."""
    rest, arrays = flatten(join.state_dict())
    to_json(rest)
    return unflatten(rest, arrays)


@effort(max_examples=200, deadline=None)
@given(ACTIONS, st.sampled_from(MODES), st.integers(2, 5))
def test_how_many_tickets_are_held_in_memory_changes_no_outcome(
    actions: list[Action], mode: dict[str, Any], memory: int
) -> None:
    here, there = joiner(1000, **mode), joiner(memory, **mode)
    numbered = list(enumerate(actions))
    assert play(here, numbered) == play(there, numbered)
    assert here.counts == there.counts
    assert here.waiting == there.waiting
    assert all(here.knows(str(id)) == there.knows(str(id)) for id in range(10))


@effort(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(0, 40), st.sampled_from(MODES))
def test_a_joiner_restored_at_any_point_goes_on_bit_for_bit(
    actions: list[Action], cut: int, mode: dict[str, Any]
) -> None:
    numbered = list(enumerate(actions))
    whole, first, second = (joiner(2, **mode) for _ in range(3))
    everything = play(whole, numbered)
    before = play(first, numbered[:cut])
    second.keep_in(first.archive._folder())
    second.load_state_dict(saved(first))
    assert digest(second.state_dict()) == digest(first.state_dict())
    second.counts = first.counts
    after = play(second, numbered[cut:], sum(step for _, (_, _, step) in numbered[:cut]))
    assert before + after == everything
    assert digest(second.state_dict()) == digest(whole.state_dict())
    assert second.counts == whole.counts


def test_more_tickets_than_allowed_drop_those_that_came_first_wherever_they_wait() -> None:
    join = joiner(4, max_tickets=6)
    for offset in range(20):
        join.add(ticket(str(offset), float(offset), offset))
    assert join.waiting == 6
    assert join.counts == {"overflowed": 14}
    assert [o.ticket.id for o in at(join, 100.0)] == [str(id) for id in range(14, 20)]


def test_event_time_that_stands_still_holds_no_more_than_max_tickets() -> None:
    join = joiner(10, max_tickets=50)
    for offset in range(2_000):
        at(join, 0.0)
        join.add(ticket(str(offset), 0.0, offset))
        if offset % 2:
            join.label(label(str(offset), 0.0, offset))
            join.label(label(str(offset - 5), 0.0, offset))
    assert join.waiting <= 50
    assert join.archive.closed <= 50
    assert len(join.archive.in_order()) < 50
    assert join.archive.places.count <= 150


def test_a_segment_is_let_go_when_none_of_its_ids_is_known_any_more(tmp_path: Path) -> None:
    join = joiner(2)
    chunks = Chunks(tmp_path / "chunks")
    join.keep_in(chunks)
    for offset in range(40):
        at(join, float(offset))
        join.add(ticket(str(offset), float(offset), offset))
    assert chunks.held
    at(join, 200.0)
    at(join, 200.0)
    assert len(join.archive) == 0
    assert chunks.held == set()
    assert join.archive.places.count == 0
    chunks.keep(())
    assert list(chunks.folder.iterdir()) == []


def test_files_in_use_are_not_swept(tmp_path: Path) -> None:
    join = joiner(2)
    chunks = Chunks(tmp_path / "chunks")
    join.keep_in(chunks)
    for offset in range(10):
        join.add(ticket(str(offset), 0.0, offset))
    chunks.keep(())
    assert join.label(label("0", 1.0)) is not None


def test_a_segment_that_is_gone_is_named(tmp_path: Path) -> None:
    join = joiner(2)
    join.keep_in(Chunks(tmp_path / "chunks"))
    for offset in range(10):
        join.add(ticket(str(offset), 0.0, offset))
    join.archive.close_files()
    for path in (tmp_path / "chunks").iterdir():
        path.unlink()
    with pytest.raises(StreamclError, match="tickets that wait are gone"):
        join.label(label("0", 1.0))


@effort(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ela"), st.integers(0, 11), st.integers(0, 4)), max_size=60), st.booleans())
def test_forgetting_events_is_never_to_have_known_them(steps: list[tuple[str, int, int]], by_key: bool) -> None:
    """Of user id % 3; what the two say from then on is the same."""
    join, oracle, now = joiner(2), joiner(2), 0.0
    mine = {str(id) for id in range(12) if id % 3 == 0}
    for offset, (step, id, wait) in enumerate(steps):
        now += wait
        for each in (join, oracle):
            at(each, now)
            if each is oracle and str(id) in mine:
                continue
            if step == "e" and not each.knows(str(id)):
                each.add(replace(ticket(str(id), now, offset), key=f"u{id % 3}"))
            elif step == "l" and each.knows(str(id)):
                each.label(label(str(id), now, offset))
    join.forget(Selector(key="u0") if by_key else Selector(ids=frozenset(mine)))
    assert not any(join.knows(id) for id in mine)
    assert join.waiting == oracle.waiting
    for shelf in join.archive.in_order():
        assert not mine & {row.id for _, row in join.archive.rows(shelf)}
        assert not any(id.encode() in shelf.segment.path.read_bytes() for id in mine if len(id) > 1)
    assert [(o.ticket.id, o.fate) for o in at(join, now + 50.0)] == [
        (o.ticket.id, o.fate) for o in at(oracle, now + 50.0)
    ]


TEXTS = st.text(max_size=6) | st.text("aß€𝄞", min_size=60, max_size=400)


@st.composite
def tickets(draw: st.DrawFn) -> Ticket:
    def floats(size: int) -> Any:
        return np.array(draw(st.lists(st.floats(width=32), min_size=size, max_size=size)), np.float32)

    slots, numbers, classes = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
    features = Encoded(np.arange(slots, dtype=np.int64), floats(slots), floats(numbers))
    output = floats(classes).astype(draw(st.sampled_from([np.float32, np.float64])))
    given, labels, scores_ = (floats(classes) for _ in range(3))
    recalled = [Recalled(floats(3), given, labels, scores_, 0.5, 7)] * draw(st.integers(0, 2))
    notes = {name: floats(2).astype(np.float64) for name in draw(st.sets(st.sampled_from("ab")))}
    scores = Scores(output, floats(classes), draw(st.integers(0, 1 << 62)), tuple(recalled), notes)
    origin = Origin(draw(st.sampled_from([EVENTS, "past"])), draw(st.integers(-3, 3)), draw(st.integers(0, 1 << 62)))
    time_s = draw(st.floats(-1e15, 1e15))
    traits = draw(st.dictionaries(st.sampled_from(["device", "a.ß"]), TEXTS.filter(bool), max_size=2))
    texts = draw(TEXTS), draw(TEXTS)
    return Ticket(draw(st.text(min_size=1)), time_s, features, scores, origin, *texts, traits=traits)


def flat(entries: Sequence[Named]) -> list[Any]:
    """To be compared to the bit."""
    return [digest(tickets_to_state([what])) if isinstance(what, Ticket) else [id, *what] for id, what in entries]


@effort(max_examples=150, deadline=None)
@given(st.lists(tickets() | st.builds(Closed, st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(-1e15, 1e15), st.just(Origin(EVENTS, 0, 3))), min_size=1, max_size=12))  # fmt: skip
def test_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, whats: list[Ticket | Closed]) -> None:
    entries: list[Named] = [(what.id if isinstance(what, Ticket) else f"{n}ß", what) for n, what in enumerate(whats)]
    folder = tmp_path_factory.mktemp("segments")
    found: list[int] = []
    for order, data in sealed(entries):
        path = folder / str(len(found))
        path.write_bytes(data)
        segment = Segment(path)
        with path.open("rb") as file:
            rows = [segment.row(file.fileno(), place) for place in range(len(segment))]
        assert flat([row.entry() for row in rows]) == flat([entries[place] for place in order])
        assert segment.times().tolist() == sorted(row.time_s for row in rows)
        found += order
    assert sorted(found) == list(range(len(entries)))
