"""What a group's ranks keep of the past stream: sums that each has added to, and histories that each has written.

By the key that events are sharded by every value has one rank, which alone reads what is kept of it: it stays there.
Of other values (an item's rate, where users are the key) each rank sees a share: what each has added since they last
met is merged by value, as the round's news.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config
from streamcl.covisits import Together
from streamcl.derived import Count, Elapsed, History, Rate
from streamcl.group.weights import Said
from streamcl.past import Edges, Entry, Past, Rings
from streamcl.sums import SHARED, Round, Sum, Sums

Told = dict[str, NDArray[Any]]


class PastSums:
    """Rates, counts and times of values that several ranks see; histories of the same; edges of bins.

    A sum becomes what all had, decayed to the latest clock of any rank that has added, and what each has added, decayed
    likewise. An entry of a history goes where its time puts it, those of one time in the order of ranks. A value that
    one rank has lost, for want of room or because it was forgotten, begins anew with what the others have added. Of
    bins the edges of the rank that has seen most numbers hold for all (of equal ones the lowest's), or a bin would mean
    another thing on every rank; where numbers were forgotten on one, the sample that they are renewed from begins anew.
    """

    def __init__(self, config: Config, past: Past) -> None:
        self.past = past
        self.kept: dict[str, Any] = {}
        for name, kept in past.kept.items():
            if isinstance(kept, Together):
                self.kept |= {f"{name}.pairs": kept.pairs, f"{name}.values": kept.values}
            elif _split(config, name):
                self.kept[name] = kept
        self.begin()

    def begin(self) -> None:
        self.events, self.labels = self.past.events, self.past.labels
        for kept in self.kept.values():
            if isinstance(kept, Sums | Rings):
                kept.round = Round()
            if isinstance(kept, Rings):
                kept.news = []
            if isinstance(kept, Edges):
                kept.erased = False

    def say(self) -> dict[str, Tensor]:
        past = self.past
        said = {"clocks": torch.tensor([past.events, past.labels, past.newest_s], dtype=torch.float64)}
        for name, kept in self.kept.items():
            said |= {f"{name}/{part}": torch.from_numpy(each) for part, each in _news(kept).items()}
        return said

    def hear(self, said: Sequence[Said], _examples: Sequence[int]) -> None:
        past, clocks = self.past, [each["clocks"].tolist() for each in said]
        past.events = self.events + sum(int(each[0]) - self.events for each in clocks)
        past.labels = self.labels + sum(int(each[1]) - self.labels for each in clocks)
        past.newest_s = max(each[2] for each in clocks)
        for name, kept in self.kept.items():
            told = [
                {part[len(name) + 1 :]: each[part].numpy() for part in each if part.startswith(f"{name}/")}
                for each in said
            ]
            if isinstance(kept, Sums):
                _sum_up(kept, told)
            elif isinstance(kept, Rings):
                _write(kept, told)
            elif isinstance(kept, Edges):
                _take_most(kept, told)
        self.begin()


def _split(config: Config, name: str) -> bool:
    """Whether several ranks see what is kept under this name."""
    feature = config.features.get(name)
    if isinstance(feature, History | Elapsed):
        return feature.by != config.events.key
    return not isinstance(feature, Count | Rate) or feature.of != config.events.key


def _news(kept: Any) -> Told:
    if isinstance(kept, Sums):
        return _additions(kept)
    if isinstance(kept, Rings):
        return _entries(kept)
    state = kept.state_dict()
    numbers = {"count": np.array([state["count"]], np.int64), "erased": np.array([kept.erased])}
    return {**numbers, "sample": state["sample"], "edges": state["edges"]}


def _additions(sums: Sums) -> Told:
    round_ = sums.round
    assert round_ is not None  # noqa: S101 - one has begun
    rows, numbers, owners = [], [], []
    for row, was in round_.before.items():
        entry = sums.entry(row)
        if entry is None:
            continue
        total, weight = entry[:2]
        if was is not None and row not in round_.lost:
            before = sums.decayed(was, entry[2])
            total, weight = total - before[0], weight - before[1]
        rows.append(row)
        numbers.append((total, weight, entry[2]))
        owners.append(entry[3])
    return {
        "rows": np.array(rows, np.int64),
        "numbers": np.array(numbers, np.float64).reshape(-1, 3),
        "owners": np.array(owners, np.int64),
        "lost": np.array(sorted(round_.lost), np.int64),
    }


def _sum_up(sums: Sums, told: Sequence[Told]) -> None:
    round_ = sums.round
    assert round_ is not None  # noqa: S101
    lost = {row for each in told for row in each["lost"].tolist()}
    added: dict[int, list[Sum]] = {}
    for each in told:
        for row, numbers, owner in zip(*(each[c].tolist() for c in ("rows", "numbers", "owners")), strict=True):
            added.setdefault(row, []).append((*numbers, owner))
    new: dict[int, Sum] = {}
    for row, news in added.items():
        mine = sums.entry(row)
        was = None if row in lost else round_.before.get(row, mine)
        parts = [*([was] if was is not None else []), *news]
        clock = max(part[2] for part in parts)
        total, weight = 0.0, 0.0
        for part in parts:
            more = sums.decayed(part, clock)
            total, weight = total + more[0], weight + more[1]
        owners = {part[3] for part in parts}
        new[row] = total, weight, clock, owners.pop() if len(owners) == 1 else SHARED
    for row in (*added, *lost):
        sums.drop(row)
    for row, entry in sorted(new.items(), key=lambda each: (each[1][2], each[0])):
        sums.put(row, entry)


def _entries(rings: Rings) -> Told:
    assert rings.round is not None  # noqa: S101
    return {
        "keys": np.array([key for key, _ in rings.news], np.int64),
        "rows": np.array([entry[0] for _, entry in rings.news], np.int64),
        "times": np.array([entry[1] for _, entry in rings.news], np.float64),
        "owners": np.array([entry[2] for _, entry in rings.news], np.int64),
        "lost": np.array(sorted(rings.round.lost), np.int64),
    }


def _write(rings: Rings, told: Sequence[Told]) -> None:
    round_ = rings.round
    assert round_ is not None  # noqa: S101
    lost = {key for each in told for key in each["lost"].tolist()}
    added: dict[int, list[Entry]] = {}
    for each in told:
        for key, *entry in zip(*(each[c].tolist() for c in ("keys", "rows", "times", "owners")), strict=True):
            added.setdefault(key, []).append((entry[0], entry[1], entry[2]))
    new: dict[int, deque[Entry]] = {}
    for key, entries in added.items():
        was = () if key in lost else round_.before.get(key, tuple(rings.rings.get(key, ()))) or ()
        new[key] = deque((*was, *sorted(entries, key=lambda each: each[1])), rings.last)
    for key in (*added, *lost):
        rings.rings.pop(key, None)
    rings.rings |= dict(sorted(new.items(), key=lambda each: (max(entry[1] for entry in each[1]), each[0])))
    while len(rings.rings) > rings.keys:
        rings.rings.popitem(last=False)


def _take_most(edges: Edges, told: Sequence[Told]) -> None:
    counts = [int(each["count"][0]) for each in told]
    best = told[counts.index(max(counts))]
    if any(each["erased"][0] for each in told):
        best = {**best, "sample": best["sample"][:0]}
    if max(counts):
        edges.load_state_dict({**best, "count": max(counts)})
