import math

import numpy as np
import pytest

from streamcl.bench import next_click_neighbours
from streamcl.bench.next_click_events import RECENT, examples_of, ranking_of
from streamcl.bench.next_click_neighbours import TINY, Neighbours, Popularity, follow
from tests.bench.next_click_data import made


def slow_neighbours(done: list[tuple[list[int], int]], before: list[int], item: int, model: Neighbours) -> float:
    """By going through every click that was ever made, `done`: (what its session had clicked before, its item)."""

    def left(at: int) -> float:
        return float(0.5 ** ((len(done) - at) / model.half_life))

    def n(which: int) -> float:
        return math.fsum(left(at) for at, (_, i) in enumerate(done) if i == which)

    ever = sum(i == item for _, i in done)
    total = TINY * n(item) / (1 + ever) ** (2 * model.power)
    for back, a in enumerate(before[: model.depth], 1):
        together = sum(
            left(at) / distance
            for at, (earlier, i) in enumerate(done)
            for distance, b in enumerate(earlier[: model.depth], 1)
            if (b, i) == (a, item) or (not model.directed and a != item and (b, i) == (item, a))
        )
        if together:
            total += together / back / (n(a) ** (1 - model.power) * n(item) ** model.power)
    return float(total)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize(("power", "depth"), [(0.0, 1), (0.5, 3), (1.0, 10)])
def test_neighbours_score_as_every_click_gone_through_would(
    power: float, depth: int, directed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_click_neighbours, "LARGEST", 4.0)  # shrink often
    clicks = made(160, items=12)
    model = Neighbours(20.0, depth, power, directed)
    done: list[tuple[list[int], int]] = []
    last: dict[int, list[int]] = {}
    for session, item in zip(clicks.sessions.tolist(), clicks.items.tolist(), strict=True):
        before = last.setdefault(session, [])
        asked = list(range(1, 13))
        slow = [slow_neighbours(done, before, each, model) for each in asked]
        assert model.score(before, asked) == pytest.approx(slow, rel=1e-9, abs=1e-15)
        model.learn(before, item)
        done.append((list(before), item))
        before.insert(0, item)


def test_popularity_halves_every_half_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_click_neighbours, "LARGEST", 4.0)
    model, done = Popularity(7.0, 1.0), list[int]()
    for item in made(100, items=9).items.tolist():
        slow = [
            sum(0.5 ** ((len(done) - at) / 7.0) for at, i in enumerate(done) if i == each) / (1 + done.count(each))
            for each in range(1, 10)
        ]
        assert model.score([], range(1, 10)) == pytest.approx(slow)
        model.learn([], item)
        done.append(item)


def test_a_click_is_scored_before_it_is_learned_and_ranking_changes_nothing() -> None:
    clicks = made(3000)
    examples = examples_of(clicks, history=2000)
    ranking, nothing = ranking_of(clicks, examples, every=5), ranking_of(clicks, examples.first(0), every=5)
    one = follow("a", clicks, examples, ranking, Neighbours(1000.0))
    other = follow("b", clicks, examples, nothing, Neighbours(1000.0))
    assert (one.scores == other.scores).all()
    n = len(examples) - 1
    model, last = Neighbours(1000.0), dict[int, list[int]]()
    for session, item in zip(clicks.sessions[: examples.step[n]], clicks.items[: examples.step[n]], strict=True):
        before = last.setdefault(int(session), [])
        model.learn(before, int(item))
        before.insert(0, int(item))
        del before[RECENT:]
    assert one.scores[n].tolist() == model.score(last[int(examples.session[n])], examples.shown[n].tolist())
    assert np.isfinite(one.ranks).all()
