"""The joiner: every label's fate, bounded memory, and the same outcomes whatever the interleaving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from msgspec.structs import replace

from streamcl.join import Joiner, Watermark
from streamcl.records import EVENTS, LABELS, Encoded, Fate, Label, Origin, Outcome, Scores, Selector, Stream, Ticket
from streamcl.state import digest
from streamcl.stations import Join

VIEWS, CLICKS = Stream(EVENTS, 0), Stream(LABELS, 0)


def ticket(id: str, time_s: float, offset: int = 0) -> Ticket:
    features = Encoded(np.array([offset], np.int64), np.ones(1, np.float32), np.zeros(0, np.float32))
    scores = Scores(np.zeros(1, np.float32), np.full(1, 0.5, np.float32), offset)
    return Ticket(id, time_s, features, scores, Origin(EVENTS, 0, offset))


def label(id: str, time_s: float, offset: int = 0, value: float = 1.0) -> Label:
    return Label(id, value, time_s, Origin(LABELS, 0, offset))


def joiner(**changes: Any) -> Joiner:
    config = {"attribution_window_s": 10.0, "orphan_s": 5.0, "idle_s": 1000.0}
    return Joiner(Join(**(config | changes)), Counter())


def at(join: Joiner, time_s: float, stream: Stream = VIEWS) -> list[Outcome]:
    return list(join.advance(stream, time_s))


def test_a_label_inside_the_window_joins_with_its_delay() -> None:
    join = joiner()
    join.add(ticket("a", 100.0))
    outcome = join.label(label("a", 107.0))
    assert outcome is not None
    assert (outcome.label, outcome.fate, outcome.delay_s) == (1.0, Fate.JOINED, 7.0)
    assert join.counts == {"joined": 1}


def test_a_label_on_the_deadline_is_in_time_and_one_after_it_is_late() -> None:
    join = joiner()
    join.add(ticket("a", 0.0, 0))
    join.add(ticket("b", 0.0, 1))
    assert join.label(label("a", 10.0)) is not None
    assert join.label(label("b", 10.1)) is None
    assert join.counts == {"joined": 1, "late": 1}


@pytest.mark.parametrize(("on_close", "outcomes", "counted"), [("negative", 1, "expired"), ("drop", 0, "dropped")])
def test_a_window_that_closes_without_a_label_means_what_the_config_says(
    on_close: str, outcomes: int, counted: str
) -> None:
    join = joiner(on_close=on_close)
    join.add(ticket("a", 0.0))
    assert at(join, 10.0) == []
    closed = at(join, 10.1)
    assert len(closed) == outcomes
    assert join.counts == {counted: 1}
    assert all((o.label, o.fate, o.delay_s) == (0.0, Fate.EXPIRED, 10.0) for o in closed)


def test_a_label_for_a_closed_ticket_is_late_or_duplicate_and_later_forgotten() -> None:
    join = joiner()
    join.add(ticket("a", 0.0, 0))
    join.add(ticket("b", 0.0, 1))
    join.label(label("a", 1.0))
    at(join, 11.0)  # b expires
    assert join.label(label("a", 2.0)) is None
    assert join.label(label("b", 2.0)) is None
    assert join.counts == {"joined": 1, "expired": 1, "duplicate": 1, "late": 1}
    assert join.knows("a")
    at(join, 20.1)  # one more window
    assert not join.knows("a")
    assert not join.closed
    assert not join.alarms


def test_a_label_may_overtake_its_event_for_orphan_s() -> None:
    join = joiner()
    join.label(label("a", 1.0, 0))
    join.label(label("a", 1.0, 1))
    join.label(label("b", 1.0, 2))
    outcome = join.add(ticket("a", 2.0))
    assert outcome is not None
    assert outcome.delay_s == 0.0
    at(join, 6.1)
    assert join.add(ticket("b", 5.0, 1)) is None
    assert join.counts == {"joined": 1, "duplicate": 1, "orphaned": 1}


def test_expiries_come_in_order_of_deadline_and_position_at_most_so_many_per_record() -> None:
    join = joiner(max_expiries_per_event=2)
    for offset, time_s in enumerate([3.0, 1.0, 2.0, 1.0]):
        join.add(ticket(str(offset), time_s, offset))
    assert [o.ticket.id for o in at(join, 50.0)] == ["1", "3"]
    assert [o.ticket.id for o in at(join, 50.0)] == ["2", "0"]  # the debt is state, paid by the next record


def test_the_watermark_is_the_slowest_active_stream_and_never_goes_back() -> None:
    mark = Watermark(Join(idle_s=60.0, allowed_lateness_s=2.0))
    mark.advance(VIEWS, 100.0)
    assert mark.value == 98.0  # the other has not spoken yet
    mark.advance(CLICKS, 90.0)
    assert mark.value == 98.0
    mark.advance(VIEWS, 140.0)
    assert mark.value == 98.0  # held back by the clicks at 90
    mark.advance(VIEWS, 151.0)
    assert mark.value == 149.0  # 61 s behind: idle
    mark.advance(VIEWS, 5.0)
    assert mark.value == 149.0


def test_more_tickets_than_allowed_drop_the_one_that_came_first() -> None:
    join = joiner(max_tickets=2)
    for offset in range(4):
        join.add(ticket(str(offset), float(offset), offset))
    assert list(join.tickets) == ["2", "3"]
    assert join.counts == {"overflowed": 2}
    assert join.label(label("0", 1.0)) is None  # its ticket is gone: an orphan
    assert [o.ticket.id for o in at(join, 50.0)] == ["2", "3"]


def test_the_hit_ratio_is_the_share_of_ended_windows_that_a_label_came_for() -> None:
    join = joiner()
    assert "join_hit_ratio" not in join.read()
    for offset in range(5):
        join.add(ticket(str(offset), 0.0, offset))
    join.label(label("0", 1.0))
    assert join.read()["join_hit_ratio"] == 1.0
    list(at(join, 100.0))
    assert join.counts["expired"] == 4
    assert join.read()["join_hit_ratio"] == 0.2


def test_an_id_that_comes_back_after_overflow_keeps_its_own_deadline() -> None:
    join = joiner(max_tickets=1)
    join.add(ticket("a", 0.0, 0))
    join.add(ticket("b", 0.0, 1))
    join.add(ticket("a", 5.0, 2))
    assert at(join, 11.0) == []
    assert [o.ticket.origin.offset for o in at(join, 15.1)] == [2]


def test_event_time_that_stands_still_holds_no_more_than_max_tickets() -> None:
    join = joiner(max_tickets=50)
    for offset in range(20_000):
        at(join, 0.0)
        join.add(ticket(str(offset), 0.0, offset))
        join.label(label(f"orphan {offset}", 0.0, offset))
        if offset % 2:
            join.label(label(str(offset), 0.0, offset))
    assert max(len(join.tickets), len(join.orphans), len(join.closed)) <= 50
    assert len(join.alarms) < 2 * 150 + 1026


Action = tuple[str, int, float]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["view", "click"]), st.integers(0, 9), st.sampled_from([0.0, 1.0, 4.0, 11.0, -3.0])),
    max_size=40,
)


def play(join: Joiner, actions: Sequence[tuple[int, Action]], start: float = 0.0) -> list[tuple[str, float, str]]:
    """Feed actions as the worker does; returns (id, label, fate) of each outcome."""
    outcomes: list[Outcome] = []
    now = start
    for offset, (kind, number, step) in actions:
        now += step
        id = str(number)
        outcomes += at(join, now, VIEWS if kind == "view" else CLICKS)
        if kind == "click":
            outcomes += [o for o in [join.label(label(id, now, offset))] if o]
        elif not join.knows(id):
            outcomes += [o for o in [join.add(ticket(id, now, offset))] if o]
    return [(o.ticket.id, o.label, o.fate) for o in outcomes]


@effort(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(0, 40))
def test_a_joiner_restored_at_any_point_goes_on_bit_for_bit(actions: list[Action], cut: int) -> None:
    numbered = list(enumerate(actions))
    whole = joiner()
    everything = play(whole, numbered)
    first, second = joiner(), joiner()
    before = play(first, numbered[:cut])
    play(second, [(7, ("view", 3, 500.0))])  # dirt that must not survive
    second.load_state_dict(first.state_dict())
    second.counts = first.counts
    after = play(second, numbered[cut:], sum(step for _, (_, _, step) in numbered[:cut]))
    assert before + after == everything
    assert digest(second.state_dict()) == digest(whole.state_dict())
    assert second.counts == whole.counts


@pytest.mark.parametrize("segments", [("", ""), ("a", ""), ("a", "b")])
def test_a_waiting_ticket_keeps_its_segment_and_an_old_snapshot_knows_of_none(segments: tuple[str, ...]) -> None:
    first, second = joiner(), joiner()
    for offset, segment in enumerate(segments):
        first.add(replace(ticket(str(offset), 0.0, offset), segment=segment))
    state = first.state_dict()
    second.load_state_dict(state)
    assert tuple(t.segment for t in second.tickets.values()) == segments
    assert digest(second.state_dict()) == digest(state)
    assert ("segment" in state["tickets"]) == any(segments)


def test_a_waiting_ticket_keeps_what_metrics_tell_it_apart_by() -> None:
    """Each its own: which fields are kept may have changed while it waited."""
    first, second = joiner(), joiner()
    told = [{}, {"device": "ios"}, {"device": "web", "request.id": "r"}]
    for offset, traits in enumerate(told):
        first.add(replace(ticket(str(offset), 0.0, offset), traits=traits))
    second.load_state_dict(first.state_dict())
    assert [t.traits for t in second.tickets.values()] == told
    assert digest(second.state_dict()) == digest(first.state_dict())


@effort(max_examples=150, deadline=None)
@given(ACTIONS)
def test_every_ticket_has_exactly_one_fate(actions: list[Action]) -> None:
    join = joiner(max_expiries_per_event=1)
    outcomes = play(join, list(enumerate(actions)))
    fates = Counter(fate for _, _, fate in outcomes)
    assert fates[Fate.JOINED] == join.counts["joined"]
    assert fates[Fate.EXPIRED] == join.counts["expired"]
    waiting = set(join.tickets)
    assert not waiting & set(join.closed)
    assert not waiting & set(join.orphans)


@effort(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 25)), max_size=12), st.randoms(use_true_random=False))
def test_any_interleaving_that_respects_event_time_yields_the_same_outcomes(
    pairs: list[tuple[int, int]], random: Any
) -> None:
    """Oracle: a ticket of time t with a label at t + d joins if d <= window, else it expires."""
    records = [(float(t), 0, i) for i, (t, _) in enumerate(pairs)]
    records += [(float(t + d), 1, i) for i, (t, d) in enumerate(pairs)]
    random.shuffle(records)
    records.sort(key=lambda r: r[0])  # ties stay shuffled
    join, outcomes = joiner(orphan_s=0.0, max_expiries_per_event=1000), []
    for offset, (now, kind, i) in enumerate(records):
        outcomes += at(join, now, CLICKS if kind else VIEWS)
        made = join.label(label(str(i), now, offset)) if kind else join.add(ticket(str(i), now, offset))
        outcomes += [made] if made else []
    outcomes += at(join, 1000.0, VIEWS) + at(join, 1000.0, CLICKS) + at(join, 1000.0)
    assert {(o.ticket.id, o.label) for o in outcomes} == {(str(i), float(d <= 10)) for i, (_, d) in enumerate(pairs)}
    assert len(outcomes) == len(pairs)


def known(join: Joiner) -> tuple[list[str], dict[str, Label], dict[str, Any], list[Any]]:
    """What is known of ids, less alarms that ring for nothing."""
    return list(join.tickets), join.orphans, join.closed, sorted(entry for entry in join.alarms if join._alive(entry))


@effort(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ela"), st.integers(0, 11), st.integers(0, 4)), max_size=60), st.booleans())
def test_forgetting_events_is_never_to_have_known_them(steps: list[tuple[str, int, int]], by_key: bool) -> None:
    """Events, labels and time in any order; of user id % 3. By key, no label waits: it has no owner."""
    join, oracle, now = joiner(), joiner(), 0.0
    mine = {str(id) for id in range(12) if id % 3 == 0}
    for offset, (step, id, wait) in enumerate(steps):
        now += wait
        for each in (join, oracle):
            at(each, now)
            if each is oracle and str(id) in mine:
                continue
            if step == "e" and not each.knows(str(id)):
                each.add(replace(ticket(str(id), now, offset), key=f"u{id % 3}"))
            elif step == "l" and (not by_key or each.knows(str(id))):
                each.label(label(str(id), now, offset))
    erased = join.forget(Selector(key="u0") if by_key else Selector(ids=frozenset(mine)))
    assert known(join) == known(oracle)
    assert len(join.alarms) == len(known(join)[3])
    assert sum(erased.values()) >= 0
    state = join.state_dict()
    assert not mine & {*state["alarms"]["id"], *state["tickets"]["id"], *state["closed"]["ids"]}


def test_a_forget_by_key_erases_every_label_that_waits_and_one_by_id_its_own() -> None:
    join = joiner()
    join.label(label("a", 1.0))
    join.label(label("b", 1.0))
    assert join.forget(Selector(ids=frozenset({"a"})))["orphans"] == 1
    assert list(join.orphans) == ["b"]
    assert join.forget(Selector(key="u"))["orphans"] == 1


def test_what_an_old_snapshot_knows_is_nobodys_and_so_everybodys() -> None:
    join = joiner()
    join.add(replace(ticket("a", 1.0), key="u1"))
    join.add(replace(ticket("b", 1.0, 1), key="u1"))
    join.label(label("a", 2.0))
    state = join.state_dict()
    del state["tickets"]["key"], state["closed"]["owner_key"], state["closed"]["time_s"]
    restored = joiner()
    restored.load_state_dict(state)
    assert join.forget(Selector(key="u2")) == {"orphans": 0, "tickets": 0, "closed_ids": 0}
    assert restored.forget(Selector(key="u2")) == {"orphans": 0, "tickets": 1, "closed_ids": 1}
