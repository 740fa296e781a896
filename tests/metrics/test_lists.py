from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.lists import Lists, first_of_lists
from streamcl.records import Outcome, Selector
from streamcl.state import digest
from streamcl.testing import check_stateful
from tests.metrics.sliced import outcome, settings, take

Items = list[tuple[int, float]]
ITEM = st.tuples(st.integers(0, 1), st.sampled_from([0.125, 0.25, 0.5]))
ON: dict[str, Any] = {"group_by": "request", "k": [1, 3], "max_items": 5, "max_open": 2, "window": 4}


def lists(**changes: Any) -> Lists:
    return Lists(settings(ranking=ON | changes))


def shown(request: str, items: Items, key: str = "u") -> list[Outcome]:
    return [outcome(y, p, key, request=request) for y, p in items]


def by_hand(items: Items, k: int) -> tuple[float, float, float]:
    """Whoever has the same score as a positive, and is none, stands before it."""
    ranked = sorted(items, key=lambda item: (-item[1], item[0]))
    positives = sum(y for y, _ in items)
    dcg = sum(y / math.log2(rank + 1) for rank, (y, _) in enumerate(ranked[:k], 1))
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, positives) + 1))
    ranks = [rank for rank, (y, _) in enumerate(ranked[:k], 1) if y]
    return dcg / ideal, len(ranks) / positives, 1 / ranks[0] if ranks else 0.0


BOTH = st.lists(ITEM, min_size=2, max_size=12).filter(lambda items: len({y for y, _ in items}) == 2)


@given(st.lists(BOTH, min_size=1, max_size=5), st.integers(1, 15), st.integers(1, 15))
def test_lists_are_judged_by_definition(several: list[Items], first: int, second: int) -> None:
    labels, scores = zip(*[item for items in several for item in items], strict=True)
    found = first_of_lists(labels, scores, [len(items) for items in several], [first, second])
    for items, row in zip(several, found, strict=True):
        expected = len(items), 1, *by_hand(items, first), *by_hand(items, second)
        assert row == pytest.approx(expected, rel=1e-12)


def test_a_list_of_one_class_says_no_more_than_its_length() -> None:
    assert first_of_lists([1, 1, 0], [0.5, 0.25, 0.5], [2, 1], [1]).tolist() == [[2, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=9))
def test_any_finite_scores_can_be_ranked(scores: list[float]) -> None:
    """The last is that of the positive."""
    labels = [*[0] * (len(scores) - 1), 1]
    rank = 1 + sum(each >= scores[-1] for each in scores[:-1])
    assert first_of_lists(labels, scores, [len(scores)], [20])[0, 4] == pytest.approx(1 / rank)


def test_a_model_that_tells_nothing_apart_ranks_positives_last() -> None:
    found = first_of_lists([1, 0, 0], [0.5, 0.5, 0.5], [3], [2, 3])
    assert found[0, 2:].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0, 1 / 3])


Steps = list[tuple[str, int, float]]
STEP = st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.integers(0, 1), st.sampled_from([0.125, 0.25, 0.5]))


def slowly(steps: Steps, size: int, most: int, window: int, ks: list[int]) -> dict[str, float]:
    """Lists as plain lists."""
    waiting: list[tuple[str, Items]] = []
    closed: list[Items] = []
    for name, y, p in steps:
        if not name:
            continue
        if name not in [each for each, _ in waiting]:
            if len(waiting) == most:
                closed.append(waiting.pop(0)[1])
            waiting.append((name, []))
        [mine] = [place for place, (each, _) in enumerate(waiting) if each == name]
        waiting[mine][1].append((y, p))
        if len(waiting[mine][1]) == size:
            closed.append(waiting.pop(mine)[1])
    found: dict[str, float] = {"ranking_open": len(waiting), "ranking_lists": len(closed)}
    last = closed[-window:]
    judged = [items for items in last if len({y for y, _ in items}) == 2]
    if last:
        found["ranking_list_events"] = sum(map(len, last)) / len(last)
        found["ranking_left_out"] = 1 - len(judged) / len(last)
    for k in ks if judged else ():
        for place, what in enumerate(("ndcg", "recall", "mrr")):
            found[f"ranking_{what}_at_{k}"] = sum(by_hand(items, k)[place] for items in judged) / len(judged)
    return found


@given(st.lists(STEP, max_size=40), st.integers(2, 4), st.integers(1, 3), st.integers(1, 5))
def test_figures_are_means_over_the_last_closed_lists(steps: Steps, size: int, most: int, window: int) -> None:
    part = lists(max_items=size, max_open=most, window=window)
    take(part, [outcome(y, p, request=name) for name, y, p in steps])
    assert part.read() == pytest.approx(slowly(steps, size, most, window, [1, 3]), rel=1e-9, abs=1e-12)


@given(st.lists(STEP, max_size=40), st.integers(0, 40))
def test_where_the_stream_is_cut_changes_nothing(steps: Steps, cut: int) -> None:
    whole, parts, restored = lists(), lists(), lists()
    stream = [outcome(y, p, request=name) for name, y, p in steps]
    for each in stream:
        take(whole, [each])
    take(parts, stream[:cut])
    restored.load_state_dict(parts.state_dict())
    take(restored, stream[cut:])
    assert digest(restored.state_dict()) == digest(whole.state_dict())
    assert restored.read() == whole.read()


def test_it_resumes_to_the_bit() -> None:
    def exercise(part: Lists, step: int) -> Any:
        take(part, [outcome(step % 2, 0.125 * (step % 7), request="abcd"[step * step % 4])])
        return part.read()

    check_stateful(lists, exercise, steps=30)


def test_a_list_whose_positives_come_early_is_one_list() -> None:
    """As labels do that wait for their window: clicks at once, all others when it closes."""
    part = lists(max_open=10)
    take(part, [*shown("a", [(1, 0.5)]), *shown("b", [(1, 0.125)]), *shown("a", [(0, 0.25)] * 4)])
    assert part.read()["ranking_lists"] == 1
    assert part.read()["ranking_mrr_at_3"] == 1.0


def test_with_one_open_list_a_list_is_a_run_of_one_value() -> None:
    part = lists(max_open=1)
    take(part, [*shown("a", [(1, 0.5), (0, 0.25)]), *shown("b", [(0, 0.5), (1, 0.25)]), *shown("a", [(1, 0.5)])])
    assert part.read()["ranking_mrr_at_3"] == 0.75
    assert part.read()["ranking_lists"] == 2


def test_memory_is_bounded_whatever_comes() -> None:
    part = lists(max_items=5, max_open=3)
    for step in range(300):
        take(part, shown(f"r{step % 7 if step < 150 else step}", [(step % 2, 0.5)]))
        assert len(part.state_dict()["labels"]) <= 3 * 5


def test_what_has_no_finite_loss_or_no_list_enters_nothing() -> None:
    part = lists()
    before = digest(part.state_dict())
    take(part, [outcome(0.0, math.nan, request="a")], math.nan)
    take(part, [outcome(1.0, 0.5)])
    assert digest(part.state_dict()) == before


def test_off_it_has_no_state_and_says_nothing() -> None:
    part = Lists(settings())
    take(part, shown("a", [(1, 0.5)]))
    assert part.state_dict() == {}
    assert part.read() == {}
    assert part.forget(Selector(key="u")) == {}


def test_under_other_settings_it_begins_anew() -> None:
    part = lists(max_items=4)
    part.load_state_dict(lists().state_dict())
    old = lists()
    take(old, shown("a", [(1, 0.5)]))
    part.load_state_dict(old.state_dict())
    assert part.read() == {"ranking_open": 0, "ranking_lists": 0}


def test_a_list_with_somebody_who_is_forgotten_is_dropped() -> None:
    part = lists(max_open=9)
    take(part, [*shown("a", [(1, 0.5)] * 3, "u"), *shown("b", [(1, 0.5)], "v"), *shown("c", [(1, 0.5)], "")])
    assert part.forget(Selector(key="u")) == {"listed": 4}  # nobody's may be theirs
    assert part.state_dict()["names"] == ["b"]
    assert part.forget(Selector(ids=frozenset(["x"]))) == {"listed": 1}
