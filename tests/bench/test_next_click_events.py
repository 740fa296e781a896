from pathlib import Path

import numpy as np
import pytest

from streamcl.bench.next_click_events import (
    CUTOFF,
    FOLLOWERS,
    LATELY,
    OTHERS,
    POPULAR,
    RECENT,
    Clicks,
    Examples,
    examples_of,
    payloads,
    ranked,
    ranking_of,
    read_clicks,
)
from streamcl.bench.streams import NEGATIVES, DataError
from tests.bench.next_click_data import made, write
from tests.bench.recorded import DATA

needs_clicks = pytest.mark.skipif(
    not (DATA / "yoochoose/period_1.txt.gz").is_file(),
    reason="no YOOCHOOSE: set STREAMCL_DATA to the folder that holds it",
)


def test_examples_are_the_clicks_that_could_have_been_foreseen() -> None:
    clicks = made(3000)
    examples = examples_of(clicks, history=300)
    expected = []
    seen: dict[int, list[int]] = {}
    items: set[int] = set()
    for step, (session, item) in enumerate(zip(clicks.sessions.tolist(), clicks.items.tolist(), strict=True)):
        before = seen.setdefault(session, [])
        if before and item in items and step >= 300:
            expected.append((step, session, before[::-1][:RECENT]))
        before.append(item)
        items.add(item)
    found = [
        (step, session, [each for each in recent if each])
        for step, session, recent in zip(
            examples.step.tolist(), examples.session.tolist(), examples.recent.tolist(), strict=True
        )
    ]
    assert found == expected
    assert (examples.clicked == clicks.items[examples.step]).all()


def test_the_five_are_different_clicked_before_and_the_same_whatever_comes_after() -> None:
    clicks = made(3000)
    examples = examples_of(clicks, history=300)
    for step, shown in zip(examples.step.tolist(), examples.shown.tolist(), strict=True):
        assert len(set(shown)) == 1 + NEGATIVES
        assert set(shown) <= set(clicks.items[:step].tolist())
    longer = examples_of(made(4000), history=300)  # begins with the same clicks
    assert (longer.shown[: len(examples)] == examples.shown).all()
    assert (longer.place[: len(examples)] == examples.place).all()


def test_the_clicked_one_stands_anywhere_and_negatives_are_drawn_by_popularity() -> None:
    clicks = made(40_000, items=50)
    examples = examples_of(clicks, history=20_000)
    place = np.bincount(examples.place, minlength=5) / len(examples)
    assert np.abs(place - 0.2).max() < 5 * np.sqrt(0.16 / len(examples))
    others = examples.shown[examples.labels.reshape(-1, 5) == 0]
    drawn = np.bincount(others, minlength=51) / len(others)
    popular = np.bincount(clicks.items, minlength=51) / len(clicks.items)
    # That the five differ flattens it a little: hence a correlation, not equality.
    assert np.corrcoef(drawn, popular)[0, 1] > 0.98


def test_too_few_items_to_draw_from_are_refused() -> None:
    with pytest.raises(DataError, match="too few items"):
        examples_of(Clicks(np.ones(9, np.int64), np.tile([1, 2, 3], 3), [0]), history=3)


def test_candidates_are_made_of_what_came_before_and_differ() -> None:
    clicks = made(4000)
    examples = examples_of(clicks, history=2000)
    ranking = ranking_of(clicks, examples, every=7)
    assert len(examples) / 7 * 0.7 < len(ranking.example) < len(examples) / 7 * 1.4
    again = ranking_of(clicks, examples, every=7)
    assert (again.candidates == ranking.candidates).all()
    for n, candidates, often in zip(ranking.example.tolist(), ranking.candidates, ranking.clicks, strict=True):
        step = int(examples.step[n])
        assert candidates[0] == clicks.items[step]
        assert len(set(candidates.tolist())) == 1 + OTHERS
        before = clicks.items[:step]
        assert often.tolist() == [int((before == each).sum()) for each in candidates]
        assert set(examples.recent[n][examples.recent[n] > 0].tolist()) <= set(candidates.tolist())


def test_followers_and_popular_items_are_among_the_candidates() -> None:
    clicks = made(4000)
    examples = examples_of(clicks, history=2000)
    ranking = ranking_of(clicks, examples, every=40)
    for n, candidates in zip(ranking.example.tolist(), ranking.candidates.tolist(), strict=True):
        step = int(examples.step[n])
        last: dict[int, int] = {}
        behind: dict[int, int] = {}
        for session, item in zip(clicks.sessions[:step].tolist(), clicks.items[:step].tolist(), strict=True):
            if last.get(session) == examples.recent[n, 0]:
                behind[item] = behind.get(item, 0) + 1
            last[session] = item
        most = sorted(behind, key=lambda each: (-behind[each], each))[:FOLLOWERS]
        assert set(most) <= set(candidates)
        counts = np.bincount(clicks.items[max(0, step - LATELY) : step])
        popular = sorted(np.flatnonzero(counts), key=lambda each: (-counts[each], each))[:POPULAR]
        assert set(popular) <= set(candidates)


def test_a_payload_says_what_the_session_did_before() -> None:
    recent = np.zeros((1, RECENT), np.int32)
    recent[0, :3] = 7, 5, 7
    shown = np.array([[5, 9, 7, 1, 2]], np.int32)
    examples = Examples(np.array([40]), np.array([3]), recent, shown, np.array([0]))
    five, nine = payloads(examples, 0, np.array([5, 9], np.int32))
    context = {"session": 3, "time": 40.0, "prev": 7, "seen": [7, 5, 7]}
    assert five == {**context, "item": 5, "again": 2, "pair": "5~7", "pairs": ["5~7", "5~5"]}
    assert nine == {**context, "item": 9, "again": 0, "pair": "7~9", "pairs": ["7~9", "5~9"]}


def test_ranks_count_ties_and_nothing_against_the_item_clicked() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, (200, 60)).astype(float)
    ranks = [1 + sum(other >= row[0] for other in row[1:]) for row in scores.tolist()]
    expected = {
        f"recall_{CUTOFF}": np.mean([rank <= CUTOFF for rank in ranks]),
        f"mrr_{CUTOFF}": np.mean([1 / rank if rank <= CUTOFF else 0.0 for rank in ranks]),
    }
    assert ranked(scores) == pytest.approx(expected)
    assert ranked(np.full((3, 60), np.nan)) == {f"recall_{CUTOFF}": 0.0, f"mrr_{CUTOFF}": 0.0}


def test_clicks_are_read_in_the_order_of_the_periods(tmp_path: Path) -> None:
    clicks = made(100)
    write(clicks, tmp_path)
    read = read_clicks(tmp_path, 70)
    assert (read.items == clicks.items[:70]).all()
    assert (read.sessions == clicks.sessions[:70]).all()
    assert list(read.starts) == [0, 50]
    assert list(read_clicks(tmp_path, 50).starts) == [0]
    with pytest.raises(DataError, match="period_2"):
        read_clicks(tmp_path, 101)


@needs_clicks
def test_the_recorded_clicks_come_in_the_periods_that_are_known() -> None:
    clicks = read_clicks(DATA, 300_000)
    assert list(clicks.starts) == [0, 219_389]
    assert clicks.items[: clicks.starts[1]].max() == 12_885
