"""How well the scores order what was shown together: NDCG, recall and reciprocal rank of the first k of a list."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import NamedTuple

import numpy as np

from streamcl.config import Config
from streamcl.metrics.losses import finite
from streamcl.metrics.window import Window
from streamcl.protocols import State
from streamcl.records import Outcome, Selector, mark
from streamcl.traits import trait


def ranks_of_positives(labels: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Ascending, counted from 1, which is the highest score's.

    Among equal scores negatives come first: a model that tells nothing apart is told so, and the order in which the
    events came, often that in which they were shown, can't leak in.

    Args:
        labels, scores: (n,) each, 0 or 1, and finite.
    """
    ranked = sorted(zip([-score for score in scores], labels, strict=True))
    return [rank for rank, (_, label) in enumerate(ranked, 1) if label]


def first_of_list(ranks: Sequence[int], k: int) -> tuple[float, float, float]:
    """NDCG, recall and reciprocal rank of the first k of one list, by the ranks of its positives; each from 0 to 1.

    With y_i the label at rank i, and P positives in all, which are one or more:

        NDCG@k     sum(y_i / log2(i + 1), i <= k) / sum(1 / log2(i + 1), i <= min(k, P))
        recall@k   sum(y_i, i <= k) / P
        MRR@k      1 / rank of the first positive, or 0 where that is beyond k

    Source:
        Jarvelin and Kekalainen 2002, doi 10.1145/582415.582418, for NDCG, here with log2(i + 1) as the discount.
    """
    found = ranks[: bisect_right(ranks, k)]
    gain = sum(1.0 / math.log2(rank + 1) for rank in found)
    return gain / _most_gain(min(k, len(ranks))), len(found) / len(ranks), 1.0 / found[0] if found else 0.0


@lru_cache(maxsize=4096)
def _most_gain(count: int) -> float:
    """Of so many positives, when they come first."""
    return sum(1.0 / math.log2(rank + 1) for rank in range(1, count + 1))


class Open(NamedTuple):
    """A list that is not complete: of each event label, score, and a mark of whose it is."""

    labels: list[float]
    scores: list[float]
    owners: list[int]


class Lists:
    """Means of `first_of_list` over the last `metrics.ranking.window` closed lists, each list weighing the same.

    A list is what has been labelled of one value of `metrics.ranking.group_by`. It is closed once it holds `max_items`
    examples, or once `max_open` other lists have begun behind it; of one value that comes again then, another list
    begins. Only what is closed is judged, so the figures lag by the lists that are open. Lists of one class only can't
    be ranked right or wrong: they are left out, their share is told. An event without a value is in no list.

    Labels that come late make a list in pieces, its positives before its negatives; `max_open` must be at least the
    number of lists that begin within an attribution window, or the pieces are judged apart: `ranking_list_events` then
    is less than the lists are long, and `ranking_left_out` nearly 1. Off, and without a state, unless configured.
    """

    def __init__(self, config: Config) -> None:
        self._config = config.metrics.ranking
        name = self._config.group_by
        self._read = trait(name, config.events, config.features) if name else None
        self._names = [f"{what}_at_{k}" for k in self._config.k for what in ("ndcg", "recall", "mrr")]
        self._settings = self._config.model_dump(mode="json")
        self._settings |= {"key": config.events.key, "segment": config.events.segment}
        self._begin()

    def _begin(self) -> None:
        self._open: dict[str, Open] = {}  # in the order of beginning
        # Events, 1 if it has both classes, then the metrics, 0 where it has not.
        self._closed = Window(self._config.window if self._read else 1, 2 + len(self._names))
        self._count = 0

    def update(self, outcomes: Sequence[Outcome], losses: Sequence[float]) -> None:
        """Take examples in, with what `Prequential.add` said of them: one without a finite loss is left out."""
        if not self._read:
            return
        for outcome in compress(outcomes, map(math.isfinite, losses)):
            if name := self._read(outcome.ticket):
                self._add(name, outcome)

    def _add(self, name: str, outcome: Outcome) -> None:
        held = self._open.get(name)
        if held is None:
            if len(self._open) == self._config.max_open:
                self._close(next(iter(self._open)))
            held = self._open[name] = Open([], [], [])
        held.labels.append(outcome.label)
        held.scores.append(outcome.ticket.scores.served.item())
        held.owners.append(mark(outcome.ticket.key))
        if len(held.labels) == self._config.max_items:
            self._close(name)

    def _close(self, name: str) -> None:
        labels, scores, _ = self._open.pop(name)
        told = [0.0] * len(self._names)
        if both := 0.0 < sum(labels) < len(labels):
            ranks = ranks_of_positives(labels, scores)
            told = [value for k in self._config.k for value in first_of_list(ranks, k)]
        self._closed.append((float(len(labels)), float(both), *told))
        self._count += 1

    def read(self) -> dict[str, float]:
        """`ranking_ndcg_at_5` and so on; of how many closed lists so far, how long they are, how many are left out."""
        if not self._read:
            return {}
        found = {"ranking_open": float(len(self._open)), "ranking_lists": float(self._count)}
        events, both, *columns = self._closed.columns()
        if len(events):
            found |= {"ranking_list_events": float(events.mean()), "ranking_left_out": 1.0 - float(both.mean())}
        if both.any():
            found |= {
                f"ranking_{name}": float(column.sum() / both.sum())
                for name, column in zip(self._names, columns, strict=True)
            }
        return finite(found)

    def forget(self, who: Selector) -> dict[str, int]:
        """Drop open lists that one of the events meant may be in; returns of how many examples."""
        if not self._read:
            return {}
        owners = who.owners
        meant = [name for name, held in self._open.items() if owners is None or not owners.isdisjoint(held.owners)]
        return {"listed": sum(len(self._open.pop(name).labels) for name in meant)}

    def state_dict(self) -> State:
        if not self._read:
            return {}
        held = self._open.values()
        return {
            "settings": dict(self._settings),
            "names": list(self._open),
            "sizes": np.array([len(each.labels) for each in held], np.int64),
            "labels": np.array([label for each in held for label in each.labels], np.float64),
            "scores": np.array([score for each in held for score in each.scores], np.float64),
            "owners": np.array([owner for each in held for owner in each.owners], np.int64),
            "closed": self._closed.state_dict(),
            "count": self._count,
        }

    def load_state_dict(self, state: State) -> None:
        """Under other settings, or of a snapshot that knows nothing of it, it begins anew."""
        self._begin()
        if not self._read or state.get("settings") != self._settings:
            return
        at = 0
        for name, size in zip(state["names"], state["sizes"].tolist(), strict=True):
            part = slice(at, at + size)
            self._open[name] = Open(*(state[each][part].tolist() for each in ("labels", "scores", "owners")))
            at += size
        self._closed.load_state_dict(state["closed"])
        self._count = int(state["count"])
