"""YOOCHOOSE's next clicks: each among four items that were not clicked, and some of them among two hundred.

Everything is a function of the clicks: draws are counter-based, and read earlier clicks alone.
"""

from __future__ import annotations

import gzip
import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.quality import Floats
from streamcl.bench.streams import HISTORY, NEGATIVES, TIME, YOOCHOOSE, DataError
from streamcl.random import key_of, uniform_array

Ints = NDArray[np.int64]

PERIODS = 17
RECENT = 10
"""Earlier clicks of a session that an example knows."""
EVERY = 100
"""One of so many clicks is ranked too."""
OTHERS = 200
FOLLOWERS, POPULAR, LATELY = 80, 60, 20_000
"""Of the others: items that followed the session's last one most often; clicked most often; among so many clicks."""
CUTOFF = 20
"""Of recall and MRR."""


@dataclass(frozen=True, slots=True)
class Clicks:
    """In order: whose, on what (N,), both from 1 on; `starts` says where each period begins."""

    sessions: Ints
    items: Ints
    starts: Sequence[int]


@dataclass(frozen=True, slots=True)
class Examples:
    """Clicks to be told from others: of each its number, its session, what that clicked before, and the items shown.

    Shape:
        step, session, place (E,); recent (E, RECENT), newest first, 0 for none; shown (E, 1 + NEGATIVES), the item
        clicked among them at `place`.
    """

    step: Ints
    session: Ints
    recent: NDArray[np.int32]
    shown: NDArray[np.int32]
    place: Ints

    def __len__(self) -> int:
        return len(self.step)

    @property
    def clicked(self) -> Ints:
        return np.asarray(self.shown[np.arange(len(self)), self.place], np.int64)

    @property
    def labels(self) -> Floats:
        """(E * (1 + NEGATIVES),)"""
        return np.asarray(np.arange(self.shown.shape[1]) == self.place[:, None], np.float64).ravel()

    def first(self, count: int) -> Examples:
        ids = self.step[:count], self.session[:count]
        return Examples(*ids, self.recent[:count], self.shown[:count], self.place[:count])


@dataclass(frozen=True, slots=True)
class Ranking:
    """Which examples are ranked (S,), among what: candidates (S, 1 + OTHERS), the item clicked first; and how often
    each was clicked before: `clicks`, like candidates.
    """

    example: Ints
    candidates: NDArray[np.int32]
    clicks: Ints

    def first(self, count: int) -> Ranking:
        """Of so many examples."""
        many = int(np.searchsorted(self.example, count))
        return Ranking(self.example[:many], self.candidates[:many], self.clicks[:many])


def read_clicks(folder: Path | None, count: int | None = None) -> Clicks:
    """The first clicks; None: all. Raises DataError naming the file that is missing."""
    if folder is None:
        raise DataError(f"task next-click is recorded: --data DIR must name the folder that holds {YOOCHOOSE}")
    parts: list[Ints] = []
    starts: list[int] = []
    left = count
    for period in range(PERIODS):
        if left == 0:
            break
        path = folder / YOOCHOOSE.replace("_0", f"_{period}")
        try:
            text = gzip.decompress(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: {error}; --data DIR must name the folder that holds {YOOCHOOSE}") from error
        rows = np.array(text.split(), np.int64).reshape(-1, 2)[:left]
        starts.append(sum(map(len, parts)))
        parts.append(rows)
        left = None if left is None else left - len(rows)
    both = np.concatenate(parts)
    return Clicks(both[:, 0], both[:, 1], starts)


def examples_of(clicks: Clicks, history: int = HISTORY) -> Examples:
    """Every click behind the first `history` but a session's first, and but those on items that nobody has clicked
    before: negatives are items of earlier clicks, so that novelty alone would tell.

    A negative is the item of a uniformly drawn earlier click, so popularity so far is what draws it; all five differ.
    """
    recent = _recent(clicks)
    fresh = np.zeros(len(clicks.items), bool)
    fresh[np.unique(clicks.items, return_index=True)[1]] = True
    step = np.flatnonzero((recent[:, 0] > 0) & ~fresh)
    step = step[step >= history]
    shown = np.empty((len(step), 1 + NEGATIVES), np.int32)
    shown[:, 0] = clicks.items[step]
    if len(step) and len(set(clicks.items[: step[0]].tolist())) <= NEGATIVES:
        raise DataError(f"the first {step[0]} clicks are on too few items to draw {NEGATIVES} others from")
    todo, turn = np.ones((len(step), NEGATIVES), bool), 0
    while todo.any():
        u = uniform_array(key_of(0, f"bench.next_click.negatives.{turn}"), NEGATIVES * len(clicks.items))
        drawn = clicks.items[(u.reshape(-1, NEGATIVES)[step] * step[:, None]).astype(np.int64)]
        shown[:, 1:][todo] = drawn[todo]
        for column in range(1, 1 + NEGATIVES):
            todo[:, column - 1] = (shown[:, :column] == shown[:, column, None]).any(1)
        turn += 1
    place = (uniform_array(key_of(0, "bench.next_click.place"), len(clicks.items))[step] * (1 + NEGATIVES)).astype(int)
    rows = np.arange(len(step))
    shown[rows, 0], shown[rows, place] = shown[rows, place], shown[rows, 0].copy()
    return Examples(step, clicks.sessions[step], recent[step], shown, place)


def _recent(clicks: Clicks) -> NDArray[np.int32]:
    """(N, RECENT) what each click's session clicked before, newest first."""
    order = np.argsort(clicks.sessions, kind="stable")
    sessions, items = clicks.sessions[order], clicks.items[order]
    found = np.zeros((len(order), RECENT), np.int32)
    for back in range(1, min(RECENT, len(order) - 1) + 1):
        same = sessions[back:] == sessions[:-back]
        found[order[back:][same], back - 1] = items[:-back][same]
    return found


def payloads(examples: Examples, n: int, items: NDArray[np.int32]) -> list[dict[str, Any]]:
    """What contenders are told of example n when `items` (k,) are in question.

    session, time; item; prev, the session's last item; seen, its last ten; again, how many clicks ago it had the item,
    0 for not among these; pair, the item and prev, whichever comes first; pairs, the item and each of seen.
    """
    seen = [each for each in examples.recent[n].tolist() if each]
    context = {"session": int(examples.session[n]), TIME: float(examples.step[n]), "prev": seen[0], "seen": seen}
    found = []
    for item in items.tolist():
        ago = seen.index(item) + 1 if item in seen else 0
        pairs = [f"{min(each, item)}~{max(each, item)}" for each in seen]
        told = {"item": item, "again": ago, "pair": pairs[0], "pairs": list(dict.fromkeys(pairs))}
        found.append({**context, **told})
    return found


def ranking_of(clicks: Clicks, examples: Examples, every: int = EVERY) -> Ranking:
    """One of `every` examples, drawn, each with `OTHERS` items beside the one clicked, all different.

    They are, until they are enough: what the session clicked before; what followed its last item most often; what was
    clicked most often lately; and items of uniformly drawn earlier clicks. All but the last by earlier clicks alone,
    ties to the smaller number.
    """
    drawn = uniform_array(key_of(0, "bench.next_click.ranked"), len(clicks.items))[examples.step] < 1.0 / every
    chosen = np.flatnonzero(drawn)
    wanted = dict(zip(examples.step[chosen].tolist(), chosen.tolist(), strict=True))
    followers: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    lately, ever = np.zeros((2, int(clicks.items.max()) + 1), np.int64)
    last: dict[int, int] = {}
    rows: list[list[int]] = []
    often: list[Ints] = []
    for step, (session, item) in enumerate(zip(clicks.sessions.tolist(), clicks.items.tolist(), strict=True)):
        before = last.get(session)
        if (at := wanted.get(step)) is not None:
            seen = [each for each in examples.recent[at].tolist() if each]
            behind = followers[before or 0]
            behind_most = heapq.nsmallest(FOLLOWERS, behind, key=lambda each: (-behind[each], each))
            others = chain(seen, behind_most, _most(lately, POPULAR), _earlier(clicks, step))
            rows.append(_distinct(item, others))
            often.append(ever[rows[-1]])
        if before is not None:
            followers[before][item] += 1
        last[session] = item
        lately[item] += 1
        ever[item] += 1
        if step >= LATELY:
            lately[clicks.items[step - LATELY]] -= 1
    shape = len(rows), 1 + OTHERS
    return Ranking(chosen, np.array(rows, np.int32).reshape(shape), np.array(often, np.int64).reshape(shape))


def _most(counts: Ints, many: int) -> list[int]:
    """Places of the highest counts."""
    score = counts * len(counts) + np.arange(len(counts))[::-1]
    top = np.argpartition(-score, many)[:many] if many < len(counts) else np.arange(len(counts))
    return [int(each) for each in top[np.argsort(-score[top])] if counts[each]]


def _earlier(clicks: Clicks, step: int) -> Iterator[int]:
    """Items of earlier clicks; every item clicked before, at last, where draws find too few."""
    u = uniform_array(key_of(step, "bench.next_click.candidates"), 20 * OTHERS)
    yield from clicks.items[(u * step).astype(np.int64)].tolist()
    yield from dict.fromkeys(clicks.items[:step].tolist())


def _distinct(item: int, others: Iterator[int]) -> list[int]:
    found = {item: None}
    for other in others:
        found[other] = None
        if len(found) > OTHERS:
            return list(found)
    raise DataError(f"there are not {OTHERS} other items to rank yet")


def ranked(scores: Floats) -> dict[str, float]:
    """recall@20 and MRR@20 of scores (S, C), the clicked item's first. A tie, or a NaN, counts against it."""
    rank = 1 + (~(scores[:, :1] > scores[:, 1:])).sum(1)
    found = rank <= CUTOFF
    return {f"recall_{CUTOFF}": float(found.mean()), f"mrr_{CUTOFF}": float((found / rank).mean())}
