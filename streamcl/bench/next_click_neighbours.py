"""The peers without weights: popularity by recency, and item-kNN on decayed co-clicks.

Both see every click, a session's first too, and score an example by what was clicked before it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamcl.bench.next_click_events import RECENT, Clicks, Examples, Ranking
from streamcl.bench.quality import Floats

TINY = 1e-9
"""Of popularity beside co-clicks: it decides among items that were never clicked together with these."""
LARGEST = 1e200
LEAST = 1e-300


@dataclass(frozen=True, slots=True)
class Said:
    """What a contender said: scores of all items shown (E, 1 + NEGATIVES), logarithms of odds or scores of candidates
    (S, C), and what it took (s).

    `rankings_s` are processor seconds of the candidates alone; `cpu_s` those of predicting and learning.
    """

    name: str
    scores: Floats
    ranks: Floats
    cpu_s: float
    probabilities: bool = True
    rankings_s: float = 0.0


@dataclass(slots=True)
class Popularity:
    """Clicks on an item so far, each half as much `half_life` clicks later: what is added grows, nothing shrinks.

    `power` divides by all clicks on it so far, to that power: with 1 it says how much more often than ever before,
    which tells a click from an item drawn by its popularity.
    """

    half_life: float
    power: float = 0.0
    recent: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    ever: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    weight: float = 1.0

    def score(self, _before: Sequence[int], items: Sequence[int]) -> list[float]:
        recent, ever, power, weight = self.recent, self.ever, self.power, self.weight
        return [recent[i] / weight / (1.0 + ever[i]) ** power for i in items]

    def learn(self, _before: Sequence[int], item: int) -> None:
        self.recent[item] += self.weight
        self.ever[item] += 1.0
        self.weight *= 2.0 ** (1.0 / self.half_life)
        if self.weight > LARGEST:
            for i in self.recent:
                self.recent[i] /= self.weight
            self.weight = 1.0


@dataclass(slots=True)
class Neighbours:
    """How often an item was clicked in a session together with its last ones: sum over the last `depth` items a of

        w(a, i) / (n(a)^(1 - power) n(i)^power) / how many clicks ago,

    w and n being sums of clicks that halve every `half_life` clicks, and w falling with the distance of the two clicks
    alike. `power` 1/2 is the cosine, 0 the rate of i behind a. `directed`: i came behind a, not before it.

    Source: Linden et al. 2003 (IEEE Internet Computing 7) for item-to-item cosine; Ludewig and Jannach 2018,
    arXiv 1803.09587, section 3.1, for rules with a distance, directed and not.
    """

    half_life: float
    depth: int = 3
    power: float = 0.5
    directed: bool = False
    together: dict[int, dict[int, float]] = field(default_factory=dict)
    clicks: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    ever: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    weight: float = 1.0

    def score(self, before: Sequence[int], items: Sequence[int]) -> list[float]:
        power, clicks, weight = self.power, self.clicks, self.weight
        sums = [TINY * clicks[i] / weight / (1.0 + self.ever[i]) ** (2.0 * power) for i in items]
        for back, a in enumerate(before[: self.depth], 1):
            behind = self.together.get(a)
            if behind:
                share = 1.0 / back / (clicks[a] / weight) ** (1.0 - power)
                for at, i in enumerate(items):
                    w = behind.get(i)
                    if w:
                        sums[at] += share * w / weight / (clicks[i] / weight) ** power
        return sums

    def learn(self, before: Sequence[int], item: int) -> None:
        weight = self.weight
        for back, a in enumerate(before[: self.depth], 1):
            self._add(a, item, weight / back)
            if not self.directed and a != item:
                self._add(item, a, weight / back)
        self.clicks[item] += weight
        self.ever[item] += 1.0
        self.weight = weight * 2.0 ** (1.0 / self.half_life)
        if self.weight > LARGEST:
            self._shrink()

    def _add(self, a: int, b: int, weight: float) -> None:
        behind = self.together.setdefault(a, {})
        behind[b] = behind.get(b, 0.0) + weight

    def _shrink(self) -> None:
        for behind in (self.clicks, *self.together.values()):
            for i in behind:
                behind[i] /= self.weight
        self.weight = 1.0


def follow(name: str, clicks: Clicks, examples: Examples, ranking: Ranking, model: Neighbours | Popularity) -> Said:
    """Score, then learn, click by click."""
    scores, ranks = np.empty(examples.shown.shape), np.empty(ranking.candidates.shape)
    at = {int(step): n for n, step in enumerate(examples.step)}
    chosen = {int(n): s for s, n in enumerate(ranking.example)}
    last: dict[int, list[int]] = {}
    began, apart = time.process_time(), 0.0
    for step, (session, item) in enumerate(zip(clicks.sessions.tolist(), clicks.items.tolist(), strict=True)):
        before = last.setdefault(session, [])
        if (n := at.get(step)) is not None:
            scores[n] = model.score(before, examples.shown[n].tolist())
            if (s := chosen.get(n)) is not None:
                asked = time.process_time()
                ranks[s] = model.score(before, ranking.candidates[s].tolist())
                apart += time.process_time() - asked
        model.learn(before, item)
        before.insert(0, item)
        del before[RECENT:]
    cpu_s = time.process_time() - began - apart
    ranks = np.log(np.maximum(ranks, LEAST))
    return Said(name, scores, ranks, cpu_s, probabilities=False, rankings_s=apart)
