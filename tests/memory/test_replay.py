import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.memory import Replay
from streamcl.records import EVENTS, Encoded, Origin, Scores, Selector, Ticket
from streamcl.state import digest, flatten, unflatten
from streamcl.stations import Replay as ReplayConfig

RETENTIONS = ["none", "recency", "reservoir", "class_balanced"]


def replay(retention: str = "recency", capacity: int = 5, seed: int = 0) -> Replay:
    return Replay(ReplayConfig.model_validate({"retention": retention, "capacity": capacity}), seed, 3, 2)


def example(i: int) -> Encoded:
    ids = np.array([i, i + 1, i + 2], np.int64)
    return Encoded(ids, (ids / 4).astype(np.float32), np.array([np.nan if i % 2 else i, -i], np.float32))


def ticket(i: int) -> Ticket:
    """Of user i % 3."""
    nothing = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
    return Ticket(f"e{i}", float(i), example(i), nothing, Origin("events", 0, i), key=f"user-{i % 3}")
    nothing = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
    return Ticket(str(i), float(i), example(i), nothing, Origin(EVENTS, 0, i))


def fill(memory: Replay, numbers: Any) -> Replay:
    for i in numbers:
        memory.write(ticket(i), float(i % 2))
    return memory


def test_rows_come_back_as_they_were_written() -> None:
    memory = fill(replay(), range(9))
    ids, weights, dense, y = memory.draw(20, step=0)
    assert (ids.shape, weights.shape, dense.shape, y.shape) == ((20, 3), (20, 3), (20, 2), (20,))
    for row in range(20):
        i = int(ids[row, 0])
        assert 4 <= i < 9
        for got, written in zip((ids, weights, dense), example(i), strict=True):
            np.testing.assert_array_equal(got[row].numpy(), written, strict=True)
        assert y[row] == i % 2


def test_draws_are_uniform_over_what_is_held() -> None:
    memory = fill(replay(capacity=16), range(11))
    counts = np.bincount(np.concatenate([memory.draw(4, step)[0][:, 0].numpy() for step in range(2500)]), minlength=11)
    assert len(counts) == 11
    expected = 10_000 / 11
    assert ((counts - expected) ** 2 / expected).sum() < 10 + 5 * math.sqrt(20)


def test_draws_depend_on_seed_and_step_and_not_on_draws_before() -> None:
    def ids(memory: Replay, step: int) -> list[int]:
        return [int(i) for i in memory.draw(6, step)[0][:, 0]]

    fresh, used = (fill(replay(capacity=50), range(50)) for _ in range(2))
    for step in range(10):
        used.draw(3, step)
    assert ids(used, 7) == ids(fresh, 7)
    assert ids(fresh, 7)[:3] == [int(i) for i in fresh.draw(3, 7)[0][:, 0]]
    assert ids(fresh, 8) != ids(fresh, 7)
    assert ids(fill(replay(capacity=50, seed=1), range(50)), 7) != ids(fresh, 7)


def test_a_draw_is_a_copy() -> None:
    memory = fill(replay(), range(5))
    before = digest(memory.state_dict())
    for column in memory.draw(5, 0):
        column.zero_()
    assert digest(memory.state_dict()) == before


def test_drawing_changes_nothing() -> None:
    memory = fill(replay(), range(5))
    before = digest(memory.state_dict())
    memory.draw(9, 3)
    assert digest(memory.state_dict()) == before


def test_without_retention_nothing_is_held() -> None:
    memory = fill(replay("none", capacity=10**9), range(5))
    assert len(memory) == 0
    restored = replay("none")
    restored.load_state_dict(memory.state_dict())
    assert digest(restored.state_dict()) == digest(memory.state_dict())


def test_an_empty_memory_can_not_be_drawn_from() -> None:
    for retention in RETENTIONS:
        with pytest.raises(IndexError, match="nothing is held"):
            replay(retention).draw(1, 0)


def test_a_state_holds_only_what_is_held() -> None:
    assert fill(replay(capacity=1000), range(3)).state_dict()["ids"].shape == (3, 3)


@pytest.mark.parametrize("retention", RETENTIONS)
@settings(deadline=None)
@given(capacity=st.integers(1, 9), cut=st.integers(0, 25), end=st.integers(0, 25), stale=st.integers(0, 30))
def test_a_restored_memory_goes_on_to_the_bit(retention: str, capacity: int, cut: int, end: int, stale: int) -> None:
    whole, restored = replay(retention, capacity), replay(retention, capacity)
    fill(restored, range(100, 100 + stale))
    fill(whole, range(cut))
    restored.load_state_dict(unflatten(*flatten(whole.state_dict())))
    assert digest(restored.state_dict()) == digest(whole.state_dict())
    for memory in (whole, restored):
        fill(memory, range(cut, end))
    assert digest(restored.state_dict()) == digest(whole.state_dict())
    if len(whole):
        for one, two in zip(whole.draw(5, 1), restored.draw(5, 1), strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_row_weighs_as_its_event_did() -> None:
    memory = replay()
    for i in range(9):
        memory.write(msgspec.structs.replace(ticket(i), weight=i / 2), 1.0)
    index = memory.pick(20, step=0)[0]
    weights = memory.columns_of(index)["sample_weight"]
    assert weights.tolist() == [int(id) / 2 for id in memory.examples(index)[0][:, 0]]
    restored = replay()
    old = {name: column for name, column in memory.state_dict().items() if name != "sample_weights"}
    restored.load_state_dict(old)  # of a snapshot from before it was kept
    assert restored.columns_of(index)["sample_weight"].tolist() == [1.0] * 20


def test_a_state_stays_what_it_was_while_the_memory_moves_on() -> None:
    memory = fill(replay(), range(5))
    state, before = memory.state_dict(), digest(memory.state_dict())
    fill(memory, range(5, 9))
    assert digest(state) == before


def numbers(memory: Replay) -> list[int]:
    """Which examples are held, by slot; every column agrees on it."""
    held: list[int] = memory.ids[: len(memory), 0].tolist()
    for slot, i in enumerate(held):
        for name, column in zip(("ids", "weights", "dense"), example(i), strict=True):
            np.testing.assert_array_equal(getattr(memory, name)[slot], column, strict=True)
        assert (memory.y[slot], memory.owners.times[slot]) == (i % 2, i)
    return held


def selectors() -> Any:
    keys, ids = st.none() | st.integers(0, 4).map("user-{}".format), st.lists(st.integers(0, 30), max_size=4)
    bound = st.none() | st.integers(0, 30).map(float)
    return st.builds(lambda k, i, a, b: Selector(k, frozenset(map("e{}".format, i)), a, b), keys, ids, bound, bound)


@pytest.mark.parametrize("retention", RETENTIONS)
@settings(deadline=None)
@given(capacity=st.integers(1, 9), end=st.integers(0, 25), who=selectors(), after=st.integers(0, 25))
def test_a_forget_takes_out_what_is_meant_and_nothing_else(
    retention: str, capacity: int, end: int, who: Selector, after: int
) -> None:
    memory = fill(replay(retention, capacity), range(end))
    before = numbers(memory)
    kept = {i for i in before if not who.meets(f"user-{i % 3}", f"e{i}", float(i))}
    assert memory.forget(who) == len(before) - len(kept)
    assert set(numbers(memory)) == kept
    columns: list[Any] = [memory.ids, memory.weights, memory.dense, memory.y, *memory.owners.columns()]
    assert not any(column[len(kept) : len(before)].any() for column in columns)
    fill(memory, range(100, 100 + after))
    held = numbers(memory)
    assert len(set(held)) == len(held) <= capacity


@given(capacity=st.integers(1, 9), end=st.integers(0, 25), who=selectors(), after=st.integers(0, 25))
def test_recency_goes_on_as_if_it_had_been_given_the_others_only(
    capacity: int, end: int, who: Selector, after: int
) -> None:
    memory, oracle = fill(replay("recency", capacity), range(end)), replay("recency", capacity)
    memory.forget(who)
    held = [i for i in range(max(0, end - capacity), end) if not who.meets(f"user-{i % 3}", f"e{i}", float(i))]
    fill(memory, range(100, 100 + after))
    fill(oracle, [*held, *range(100, 100 + after)])
    assert sorted(numbers(memory)) == sorted(numbers(oracle))


@pytest.mark.parametrize("retention", RETENTIONS)
@given(end=st.integers(0, 9), who=selectors(), after=st.integers(0, 25))
def test_before_a_memory_is_full_forgetting_undoes_writing(retention: str, end: int, who: Selector, after: int) -> None:
    """To the bit, whatever comes afterwards."""
    memory, oracle = (replay(retention, 10) for _ in range(2))
    fill(memory, range(end)).forget(who)
    fill(oracle, [i for i in range(end) if not who.meets(f"user-{i % 3}", f"e{i}", float(i))])
    for each in (memory, oracle):
        fill(each, range(100, 100 + after))
    assert digest(memory.state_dict()) == digest(oracle.state_dict())


def test_rows_of_nobody_knows_whom_are_erased_by_every_forget() -> None:
    memory = fill(replay(capacity=9), range(6))
    state = {name: value for name, value in memory.state_dict().items() if not name.startswith("owner_")}
    memory.load_state_dict(state)
    fill(memory, range(6, 9))
    assert memory.forget(Selector(key="user-0")) == 6 + 1
    assert numbers(memory) == [7, 8]
