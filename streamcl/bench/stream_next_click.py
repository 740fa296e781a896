"""`bench stream --task next-click`: YOOCHOOSE's next click, ours beside everybody who is known to be good at it.

Each click is to be told from four items drawn by their popularity; one in a hundred is ranked among two hundred others
too. All five are scored before their labels are known to anybody, and nothing is learned from being asked to rank.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from streamcl.bench import next_click_learners as learners
from streamcl.bench.next_click_events import (
    CUTOFF,
    EVERY,
    OTHERS,
    Clicks,
    Examples,
    Ranking,
    examples_of,
    payloads,
    ranked,
    ranking_of,
    read_clicks,
)
from streamcl.bench.next_click_neighbours import Neighbours, Popularity, Said, follow
from streamcl.bench.options import Options
from streamcl.bench.peers import vowpal_wabbit_installed
from streamcl.bench.quality import Floats, auc, quality
from streamcl.bench.report import Bar, Report, Row, Value, progress
from streamcl.bench.streams import LABEL, TIME
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.past import past_of
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket

CHUNK = 100
"""Clicks learned at once; never changes a score."""


KEYS = 4_000_000
"""What is kept of so many pairs; a session's pair that is clicked is one of 3 million on the whole stream."""
ROWS = {"max_rows": 1 << 20, "admission": "all"}
COVISITS = {"power": 0.25, "half_life_events": 1e6, "keys": KEYS}
"""Labels: as many as 200,000 clicks have, which is also the item-kNN's."""
FEATURES: dict[str, Any] = {
    "item": {"kind": "categorical", "buckets": 1 << 20},
    "prev": {"kind": "categorical", "buckets": 1 << 20},
    "seen": {"kind": "bag", "buckets": 1 << 20, "max_items": 10},
    "again": {"kind": "categorical", "buckets": 64},
    "pair": {"kind": "categorical", "table": ROWS},
    "pairs": {"kind": "bag", "max_items": 10, "pooling": "sqrtn", "table": ROWS},
    **{
        f"{of}_rate": {"kind": "rate", "of": of, "form": "logit", "weight": 5, "prior": 0.2, "keys": KEYS}
        for of in ("item", "pair", "pairs")
    },
    **{f"{of}_count": {"kind": "count", "of": of, "keys": KEYS} for of in ("item", "prev", "pair", "pairs")},
    "together": {"kind": "covisits", "of": "item", "beside": "seen", **COVISITS},
}
"""The fields, and what the engine keeps of them: how often a value was clicked to how often it was shown, and
which items were clicked together.
"""
SETTINGS: dict[str, Any] = {
    "features": FEATURES,
    "model": {"kind": "deepfm"},
    "optimizer": {"learning_rate": 0.03, "embedding_learning_rate": 0.05},
}


class Ours:
    """A configuration, run as the worker runs it: completed by the past, answered, seen, heard of, learned from."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        shape = {"name": "b", "events": {"url": "memory://b/e", "time": TIME, "label": LABEL, "key": "session"}}
        config = Config.parse({**shape, "seed": seed, **settings}, "bench")
        self.featurizer, self.learner = Featurizer(config), Learner(config)
        self.past = past_of(config, self.featurizer)
        assert self.learner.fused is not None  # noqa: S101 - the model has a compiled form
        self.fused = self.learner.fused

    def encode(self, payload: Mapping[str, Any]) -> Encoded:
        encoded = self.featurizer.encode(payload)
        return self.past.complete(encoded, payload[TIME]) if self.past else encoded

    def rank(self, asked: Sequence[Mapping[str, Any]]) -> list[float]:
        """Logits of events that are only asked about: no state hears of them."""
        self.fused.settle()
        said = self.learner.predict_many([self.encode(payload) for payload in asked])
        return [float(each.output[0]) for each in said]

    def click(self, number: int, shown: Sequence[Mapping[str, Any]], place: int) -> list[Scores]:
        """Score all that was shown, then learn which was clicked; the scores are there once work is settled."""
        encoded = [self.encode(payload) for payload in shown]
        said = [self.fused.answer(each) for each in encoded]
        time_s, key = shown[0][TIME], str(shown[0]["session"])
        if self.past:
            for each in encoded:
                self.past.saw(each, time_s, key)
        for at, (features, scores) in enumerate(zip(encoded, said, strict=True)):
            origin = Origin(EVENTS, 0, number * len(shown) + at)
            ticket = Ticket(str(origin.offset), time_s, features, scores, origin, "", key)
            outcome = Outcome(ticket, float(at == place), Fate.INLINE, 0.0)
            if self.past:
                self.past.heard(outcome)
            self.fused.learn(outcome)
        return said


def ours(name: str, settings: Mapping[str, Any], examples: Examples, ranking: Ranking, seed: int) -> Said:
    model = Ours(settings, seed)
    scores, ranks = array("f"), np.empty(ranking.candidates.shape)
    chosen = {int(n): s for s, n in enumerate(ranking.example)}
    waiting: list[Scores] = []
    began, apart = time.process_time(), 0.0
    for n in range(len(examples)):
        if (s := chosen.get(n)) is not None:
            asked = time.process_time()
            model.fused.settle()
            apart -= time.process_time() - asked  # what had to be done anyway
            ranks[s] = model.rank(payloads(examples, n, ranking.candidates[s]))
            apart += time.process_time() - asked
        waiting += model.click(n, payloads(examples, n, examples.shown[n]), int(examples.place[n]))
        if n % CHUNK == CHUNK - 1 or n == len(examples) - 1:
            model.fused.settle()
            scores.extend(float(each.served[0]) for each in waiting)
            waiting = []
    cpu_s = time.process_time() - began - apart
    return Said(name, np.array(scores, np.float64).reshape(examples.shown.shape), ranks, cpu_s, rankings_s=apart)


OURS, VW, RETRAINED = "streamcl", "vw", "deepfm retrained"
POWERS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Candidates are ranked by ln(odds or score) + power x ln(1 + clicks so far). Negatives are drawn by popularity, so
odds say how much likelier a click is than popularity has it; 1 would undo that if it held far from what was learned.
"""
POPULARITY = Popularity(half_life=500.0, power=1.0)
NEIGHBOURS: list[dict[str, Any]] = [{"half_life": 200_000.0, "depth": 10, "power": power} for power in (0.25, 1.0)]
VW_ARGUMENTS = "--ftrl -q ip"
DEEPFM: dict[str, Any] = {"periods": 1, "warm": True, "rate": 0.01}
CHOSEN = (
    "chosen on the first fifth of the stream alone, one seed: ours on 30,000 to 60,000 examples (logistic, deepfm,"
    " dcnv2; rates .015 to .1 and of rows .05 to .2; pairs hashed or with rows of their own; pairs with the last three"
    " items in fields apart or with the last ten in a bag; more counts, bags of items), and on the whole fifth"
    " (half-lives of rates and counts; the highest rate of a pair; 2^20 buckets, not 2^16; co-visitation); popularity:"
    " half-lives of 500 to 50,000 clicks, over all clicks so far or not; item-kNN: half-lives of 50,000 to none, depth"
    " 1 3 10, power 0 to 1, directed or not; vw on 60,000: its default, --ftrl, --ftrl_alpha; the DeepFM on the second"
    " period: rate .001 to .04, 1 or 2 epochs"
)
Contender = Callable[[], Said]

METRICS = ("auc", f"recall_{CUTOFF}", f"mrr_{CUTOFF}")
HEAD = (*METRICS, "ne", "log_loss", "events_per_s")
BLOCKS = 50
QUICK_CLICKS, QUICK_EVERY = 20_000, 20
SURE = 2.0
"""Standard errors that a difference must be above 0."""

NOTES = (
    "an example is a click, behind the first 1,000, that is not its session's first and not the first ever on its item;"
    " the four others are items of uniformly drawn earlier clicks. All five are scored before any is learned from",
    f"{OTHERS} others are ranked beside one in {EVERY} of the clicked items (quick: {QUICK_EVERY}), for all the same:"
    " what the session clicked before, up to 80 items that followed its last one most often, the 60 most clicked of"
    " the last 20,000 clicks, and items of uniformly drawn earlier clicks. A tie counts against the item; a place"
    f" behind {CUTOFF} counts 0",
    "fields, for everybody: item, prev (the session's last item), again (how many clicks ago the session had the item),"
    " pair (item and prev, unordered), and of the session's last ten items seen and pairs. Ours has besides what the"
    " engine keeps of the past stream of these; VW crosses item and prev, in their order; the retrained"
    " DeepFM reads again, item, the last three items and their pairs",
    "later_auc: of the second period on, where the retrained DeepFM has something to say: all its figures, and how far"
    " ahead of it ours is, are of that part",
    "everybody ranks by ln(odds or score) + power x ln(1 + clicks so far); power is what was best for each, by recall"
    " and MRR together, on the first fifth of what is ranked",
    "ahead: ours, mean of seeds, less the peer's; se: of the mean of that over 50 blocks of the stream, one behind"
    f" the other. Bars ask for more than {SURE:g} of it",
    "events_per_s: of one thread's processor seconds, scoring and learning from fields at hand (VW: with parsing), the"
    " ranking apart; an item-kNN's event is one of the five as well",
)


@dataclass(frozen=True, slots=True)
class Judged:
    """What was said, whole, and block by block (BLOCKS,), by metric."""

    power: float
    whole: Mapping[str, float]
    blocks: Mapping[str, Floats]


def judge(said: Said, examples: Examples, ranking: Ranking, start: int = 0) -> Judged:
    """Examples from `start` on."""
    power = power_of(said, ranking, start)
    ranks = said.ranks + power * np.log1p(ranking.clicks)
    labels = examples.labels.reshape(examples.shown.shape)
    edges = np.linspace(start, len(examples), BLOCKS + 1).astype(int)
    places = np.searchsorted(ranking.example, edges)
    blocks: dict[str, list[float]] = {name: [] for name in METRICS}
    for (a, b), (c, d) in zip(pairwise(edges), pairwise(places), strict=True):
        blocks["auc"].append(auc(labels[a:b].ravel(), said.scores[a:b].ravel()))
        for name, value in ranked(ranks[c:d]).items() if d > c else ():
            blocks[name].append(value)
    whole = {"auc": auc(labels[start:].ravel(), said.scores[start:].ravel()), **ranked(ranks[places[0] :])}
    return Judged(power, whole, {name: np.array(values) for name, values in blocks.items()})


def power_of(said: Said, ranking: Ranking, start: int = 0) -> float:
    """What is best on the first fifth of the examples that are ranked from `start` on."""
    first = int(np.searchsorted(ranking.example, start))
    fifth = slice(first, first + (len(ranking.example) - first) // 5)
    popular = np.log1p(ranking.clicks[fifth])
    return max(POWERS, key=lambda power: sum(ranked(said.ranks[fifth] + power * popular).values()))


def ahead(mine: Sequence[Judged], other: Judged) -> dict[str, float]:
    """By metric: our mean over seeds less theirs, whole; and `_se`, of the mean over blocks."""
    found = {}
    for name in METRICS:
        found[name] = float(np.mean([each.whole[name] for each in mine])) - other.whole[name]
        by_block = np.mean([each.blocks[name] for each in mine], 0) - other.blocks[name]
        found[f"{name}_se"] = float(by_block.std(ddof=1) / math.sqrt(len(by_block)))
    return found


def run(options: Options) -> Report:
    """Every contender on the same clicks; `--events` says of how many clicks."""
    start = time.perf_counter()
    seeds = options.seed_list(1 if options.quick else 3)
    count = options.count("events", QUICK_CLICKS) if options.quick or options.events else None
    clicks = read_clicks(options.data, count)
    examples = examples_of(clicks)
    ranking = ranking_of(clicks, examples, QUICK_EVERY if options.quick else EVERY)
    progress(f"{len(clicks.items)} clicks: {len(examples)} examples, {len(ranking.example)} of them ranked")
    later = int(np.searchsorted(examples.step, clicks.starts[1])) if len(clicks.starts) > 1 else len(examples)
    rows: dict[str, Row] = {}

    def told(said: Said) -> Said:
        rows[said.name] = _row(said, examples, ranking, later)
        progress(f"{said.name}: {dict(rows[said.name].values)}")
        return said

    others = [told(contend()) for contend in _peers(clicks, examples, ranking, later)]
    mine = [told(ours(f"{OURS}, seed {seed}", SETTINGS, examples, ranking, seed)) for seed in seeds]
    versus, bars = [], []
    for other in others:
        since = _start(other, later)
        sides = [judge(each, examples, ranking, since) for each in mine]
        difference = ahead(sides, judge(other, examples, ranking, since))
        versus.append(Row(f"ahead of {other.name}", difference, table="ahead"))
        bars += [
            Bar(f"{name} ahead of {other.name}", difference[name] - SURE * difference[f"{name}_se"], 0.0)
            for name in METRICS
        ]
    first = [rows[each.name] for each in mine]
    figures = [{name: float(str(row.values[name])) for name in HEAD} for row in first]
    headline = {name: float(np.mean([each[name] for each in figures])) for name in HEAD}
    return Report(
        bench="stream",
        config={"task": "next-click", "quick": options.quick, "clicks": len(clicks.items), **SETTINGS},
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=[*first, *(rows[each.name] for each in others), *versus],
        bars=[bar for bar in bars if not options.quick or bar.name.startswith("auc")],
        aims=[bar for bar in bars if options.quick and not bar.name.startswith("auc")],
        headline={**headline, "events": examples.shown.size},
        notes=[*NOTES, CHOSEN],
    )


def _start(said: Said, later: int) -> int:
    """The first example that a contender had something to say of."""
    return later if said.name.startswith(RETRAINED) else 0


def _row(said: Said, examples: Examples, ranking: Ranking, later: int) -> Row:
    labels, scores = examples.labels, said.scores.ravel()
    width, start = examples.shown.shape[1], _start(said, later)
    judged = quality(labels[width * start :], scores[width * start :]) if said.probabilities else {}
    found = judge(said, examples, ranking, start)
    whole = found.whole
    second = auc(labels[width * later :], scores[width * later :]) if later < len(examples) else None
    values: dict[str, Value] = {
        "auc": whole["auc"],
        "later_auc": second,
        **{name: whole[name] for name in METRICS[1:]},
        "power": found.power,
        **{name: judged[name] for name in ("ne", "log_loss") if name in judged},
        "events": len(labels),
        "events_per_s": round(len(labels) / said.cpu_s, 1),
        "ranked_per_s": round(ranking.candidates.size / said.rankings_s, 1),
    }
    return Row(said.name, values)


def _peers(clicks: Clicks, examples: Examples, ranking: Ranking, later: int) -> Iterator[Contender]:
    """Each to be run."""
    simple: dict[str, Popularity | Neighbours] = {
        "popularity by recency": replace(POPULARITY),
        **{f"item-kNN, power {each['power']:g}": Neighbours(**each) for each in NEIGHBOURS},
    }
    for name, model in simple.items():
        yield partial(follow, name, clicks, examples, ranking, model)
    if vowpal_wabbit_installed():
        arguments = VW_ARGUMENTS
        yield partial(learners.vowpal_wabbit, f"{VW} {arguments}", examples, ranking, arguments)
    if later < len(examples):
        named = f"{RETRAINED} every period"
        yield partial(learners.retrained, named, clicks, examples, ranking, **DEEPFM)
