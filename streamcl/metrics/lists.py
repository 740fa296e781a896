"""How well the scores order what was shown together: NDCG, recall and reciprocal rank of the first k of a list."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamcl.config import Config
from streamcl.metrics.examples import Examples
from streamcl.metrics.kernels import judge_lists, pack_lists
from streamcl.metrics.losses import finite
from streamcl.metrics.window import Window
from streamcl.protocols import State
from streamcl.records import Selector
from streamcl.traits import trait

Floats = NDArray[np.float64]


def first_of_lists(labels: ArrayLike, scores: ArrayLike, sizes: ArrayLike, ks: Sequence[int]) -> Floats:
    """NDCG, recall and reciprocal rank of the first k of lists that lie one behind the other; each from 0 to 1.

    With y_i the label at rank i, and P positives in all, which are one or more:

        NDCG@k     sum(y_i / log2(i + 1), i <= k) / sum(1 / log2(i + 1), i <= min(k, P))
        recall@k   sum(y_i, i <= k) / P
        MRR@k      1 / rank of the first positive, or 0 where that is beyond k

    Among equal scores negatives come first: a model that tells nothing apart is told so, and the order in which the
    events came, often that in which they were shown, can't leak in.

    Shape:
        labels (N,) 0 or 1, scores (N,) finite and taken as float32, sizes (L,) summing to N; returns (L, 2 + 3 K):
        events, 1 if the list has both classes, then the three for each k, 0 where it has not. O(N log N).

    Source:
        Jarvelin and Kekalainen 2002, doi 10.1145/582415.582418, for NDCG, here with log2(i + 1) as the discount.
    """
    n = np.array(sizes, np.int64)
    bits = (np.asarray(scores, np.float32) + np.float32(0.0)).view(np.int32)  # -0 is 0
    ranked, found = np.empty(len(bits), np.int64), np.zeros((len(n), 2 + 3 * len(ks)))
    pack_lists(np.array(labels, np.float64), bits, n, ranked)
    ranked.sort()
    gains = 1.0 / np.log2(np.arange(2, max(ks) + 2))
    judge_lists(ranked, n, np.array(ks, np.int64), gains, np.cumsum(gains), found)
    return found


class Lists:
    """Means of `first_of_lists` over the last `metrics.ranking.window` closed lists, each list weighing the same.

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
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # places of a list's items, in the order of beginning
        self._items = np.zeros((0, 2))  # label and score at each place; beside it
        self._owners = np.zeros(0, np.int64)  # marks of whose it is
        self._free: list[int] = []  # places
        self._closed = Window(self._config.window if self._read else 1, 2 + len(self._names))  # see `first_of_lists`
        self._count = 0

    def update(self, examples: Examples) -> None:
        """Take examples in, whose losses are finite."""
        if not self._read:
            return
        places = self._put(examples.labels, examples.scores, examples.owners)
        closed: list[list[int]] = []
        nowhere: list[int] = []
        waiting = self._open
        known, most, longest = waiting.get, self._config.max_open, self._config.max_items
        last, held = "", nowhere
        for name, place in zip(self._read(examples.tickets), places, strict=True):
            if name != last:  # what was shown together often comes together
                last, found = name, known(name) if name else nowhere
                if found is None:
                    if len(waiting) == most:
                        closed.append(waiting.popitem(last=False)[1])
                    found = waiting[name] = []
                held = found
            held.append(place)
            if len(held) == longest and name:
                closed.append(waiting.pop(name))
                last, held = "", nowhere
        if closed:
            gone = list(chain.from_iterable(closed))
            labels, scores = self._items[gone].T
            self._closed.extend(first_of_lists(labels, scores, [*map(len, closed)], self._config.k))
            self._count += len(closed)
            self._free += gone
        self._free += nowhere

    def _put(self, labels: Floats, scores: Floats, owners: NDArray[np.int64]) -> list[int]:
        """Where they are now."""
        count = len(labels)
        if count > len(self._free):
            held = len(self._items)
            self._free += range(held, held + max(held, count))
            self._items = np.concatenate((self._items, np.zeros((max(held, count), 2))))
            self._owners = np.concatenate((self._owners, np.zeros(max(held, count), np.int64)))
        places = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        at = np.array(places, np.int64)
        self._items[at, 0], self._items[at, 1], self._owners[at] = labels, scores, owners
        return places

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
        meant = [
            name
            for name, at in self._open.items()
            if owners is None or not owners.isdisjoint(self._owners[at].tolist())
        ]
        gone = [place for name in meant for place in self._open.pop(name)]
        self._free += gone
        return {"listed": len(gone)}

    def state_dict(self) -> State:
        if not self._read:
            return {}
        places = np.fromiter(chain.from_iterable(self._open.values()), np.int64)
        return {
            "settings": dict(self._settings),
            "names": list(self._open),
            "sizes": np.array([len(held) for held in self._open.values()], np.int64),
            "labels": self._items[places, 0],
            "scores": self._items[places, 1],
            "owners": self._owners[places],
            "closed": self._closed.state_dict(),
            "count": self._count,
        }

    def load_state_dict(self, state: State) -> None:
        """Under other settings, or of a snapshot that knows nothing of it, it begins anew."""
        self._begin()
        if not self._read or state.get("settings") != self._settings:
            return
        places = iter(self._put(state["labels"], state["scores"], state["owners"]))
        for name, size in zip(state["names"], state["sizes"].tolist(), strict=True):
            self._open[name] = list(islice(places, size))
        self._closed.load_state_dict(state["closed"])
        self._count = int(state["count"])
