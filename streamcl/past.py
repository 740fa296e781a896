"""What the engine keeps of the past stream, and the features that are read from it.

An event is completed at its place in the stream: what was kept before it fills the slots and numbers of the features
of kind `history`, `count`, `rate` and `elapsed`, and then those of `cross`, `time` and bins. Then, in that order:

    complete    reads; changes nothing, so that predicting alone never does
    saw         the event has been answered: histories of all events, counts and times take it in
    heard       its label is known, whether or not it could be learned from: rates and histories by label take it in

All three are called in the order of the stream, and labels do not hang on weights: what is kept is a function of the
records alone, however they were cut into chunks. A ticket holds what its event was completed by.

Values are known by their row within their field, so two that share a bucket share what is kept of them too.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Mapping
from itertools import islice
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.covisits import LEAST, Together
from streamcl.derived import Count, Covisits, Cross, Elapsed, Feature, History, Rate, Remembering, Time, bins_of
from streamcl.features import FLOAT32_MAX, Featurizer, Field, pooled
from streamcl.protocols import State
from streamcl.random import below, key_of
from streamcl.records import Encoded, Outcome, Selector, mark
from streamcl.sums import Place, Round, Sums

MOST_ODDS = 16.0
"""Of a rate's logit."""


class Kept(Protocol):
    """What one feature keeps."""

    def forget(self, who: Selector) -> int: ...

    def __len__(self) -> int: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


Entry = tuple[int, float, int]
"""(row, time, owner)"""


class Rings:
    """The last (row, time, owner) of each of the last `keys` values that were written, oldest first."""

    def __init__(self, keys: int, last: int) -> None:
        self.keys, self.last = keys, last
        self.round: Round[tuple[Entry, ...]] | None = None
        self.news: list[tuple[int, Entry]] = []  # of the round, by value
        self._begin()

    def _begin(self) -> None:
        # In the order of writing; a plain dict would look for its first behind all that have left.
        self.rings: OrderedDict[int, deque[Entry]] = OrderedDict()

    def add(self, key: int, row: int, time_s: float, owner: int) -> None:
        ring = self.rings.pop(key, None)
        if self.round is not None:
            if key not in self.round.before:
                self.round.before[key] = None if ring is None else tuple(ring)
            self.news.append((key, (row, time_s, owner)))
        if ring is None:
            if len(self.rings) >= self.keys:
                self.drop(next(iter(self.rings)))
            ring = deque(maxlen=self.last)
        ring.append((row, time_s, owner))
        self.rings[key] = ring

    def forget(self, who: Selector) -> int:
        owners, erased = who.owners, 0

        def stays(entry: Entry) -> bool:
            return not ((owners is None or entry[2] in owners) and who.in_time(entry[1]))

        self.news = [(key, entry) for key, entry in self.news if stays(entry)]
        before = self.round.before if self.round is not None else {}
        for key, was in before.items():
            before[key] = None if was is None else tuple(filter(stays, was))
        for key, ring in list(self.rings.items()):
            left = [each for each in ring if stays(each)]
            erased += len(ring) - len(left)
            if not left:
                self.drop(key)
            elif len(left) < len(ring):
                self.rings[key] = deque(left, self.last)
                if self.round is not None:  # or the others would tell of what is erased here
                    self.round.lose(key, tuple(left))
        return erased

    def drop(self, key: int) -> None:
        was = self.rings.pop(key)
        if self.round is not None:
            self.round.lose(key, tuple(was))

    def __len__(self) -> int:
        return len(self.rings)

    def state_dict(self) -> State:
        entries = [each for ring in self.rings.values() for each in ring]
        return {
            "keys": np.array(list(self.rings), np.int64),
            "lengths": np.array([len(ring) for ring in self.rings.values()], np.int64),
            "rows": np.array([row for row, _, _ in entries], np.int64),
            "times": np.array([time_s for _, time_s, _ in entries], np.float64),
            "owners": np.array([owner for _, _, owner in entries], np.int64),
        }

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            entries = zip(state["rows"].tolist(), state["times"].tolist(), state["owners"].tolist(), strict=True)
            for key, length in zip(state["keys"].tolist(), state["lengths"].tolist(), strict=True):
                self.rings[key] = deque(islice(entries, length), self.last)


class Edges:
    """Quantiles of the numbers seen so far, from a uniform sample of them: renewed whenever their count has doubled.

    So what a bin means settles: in a stream that doesn't drift it hardly moves after the first thousand.

    Source: Vitter 1985, doi 10.1145/3147.3165, algorithm R.

    Args:
        key: Of the draws.
    """

    SAMPLE, FIRST = 1024, 64

    def __init__(self, bins: int, key: int) -> None:
        self.bins, self.key = bins, key
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self.erased = False  # in this round of a group
        self.sample: list[float] = []
        self.edges: list[float] = []

    def bin(self, value: float) -> int:
        """From 1 on; 0 while nothing is known, and for NaN."""
        return bisect_right(self.edges, value) + 1 if self.edges and value == value else 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self.count += 1
        if len(self.sample) < self.SAMPLE:
            self.sample.append(value)
        elif (at := below(self.count, self.key, self.count)) < self.SAMPLE:
            self.sample[at] = value
        if self.count >= self.FIRST and self.count & (self.count - 1) == 0:
            self.edges = np.quantile(self.sample, np.arange(1, self.bins) / self.bins).tolist()

    def __len__(self) -> int:
        return len(self.sample)

    def forget(self, who: Selector) -> int:
        """A number in the sample does not say whose it is: all begin anew but the edges, which go on until renewed."""
        erased, self.sample, self.erased = len(self.sample), [], True
        return erased

    def state_dict(self) -> State:
        return {"count": self.count, "sample": np.array(self.sample), "edges": np.array(self.edges)}

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            self.count, self.sample, self.edges = int(state["count"]), state["sample"].tolist(), state["edges"].tolist()


class Past:
    """Completes events by what was kept of those before; see above for who calls what, and when.

    Memory: for each feature at most `keys` values, of 60 bytes or so for a sum, 100 for each entry of a history.
    """

    def __init__(self, config: Config, featurizer: Featurizer) -> None:
        self.featurizer = featurizer
        self.events = 0  # seen, and labels heard: the clocks of half-lives in events
        self.labels = 0
        self.newest_s = -math.inf
        self.kept: dict[str, Kept] = {}
        fields, numbers = featurizer.fields, {name: i for i, name in enumerate(featurizer.layout.numerics)}
        features = dict(sorted(config.features.items()))
        self.parts: list[Part] = []
        for name, feature in features.items():
            if isinstance(feature, Time):
                self.parts.append(_Clock(feature, fields.get(name), numbers.get(f"{name}.sin", -1)))
        crosses = [(name, f) for name, f in features.items() if isinstance(f, Cross)]
        late = {name for name, f in crosses if any(bins_of(features[part]) for part in f.of)}
        self.parts += [_Crossed(f, fields, fields[name]) for name, f in crosses if name not in late]
        # Histories first: a co-visit is of what they list.
        for name, feature in sorted(features.items(), key=lambda each: (not isinstance(each[1], History), each[0])):
            if isinstance(feature, Remembering):
                part = _remembering(self, name, feature, fields, numbers)
                self.parts.append(part)
                self.kept[name] = part.kept
        for name, feature in features.items():
            if bins := bins_of(feature):
                edges = Edges(bins, key_of(config.seed, f"past.{name}"))
                self.parts.append(_Binned(edges, fields[name], numbers[name]))
                self.kept[f"{name}.bins"] = edges
        self.parts += [_Crossed(f, fields, fields[name]) for name, f in crosses if name in late]

    def complete(self, features: Encoded, time_s: float | None = None) -> Encoded:
        """What an event is answered by. Changes nothing. Without a time: as if it came with the newest event."""
        ids, weights, dense = features.ids.copy(), features.weights.copy(), features.dense.copy()
        now = self.newest_s if time_s is None else time_s
        for part in self.parts:
            part.fill(ids, weights, dense, now)
        return Encoded(ids, weights, dense)

    def saw(self, features: Encoded, time_s: float, key: str) -> None:
        """An event, completed, that has been answered."""
        self.events += 1
        self.newest_s = max(self.newest_s, time_s)
        owner = mark(key)
        for part in self.parts:
            part.saw(features, time_s, owner)

    def heard(self, outcome: Outcome) -> None:
        """Its label, at the label's own place in the stream."""
        if not abs(outcome.label) <= FLOAT32_MAX:
            return
        self.labels += 1
        ticket = outcome.ticket
        now, owner = ticket.time_s + outcome.delay_s, mark(ticket.key)
        for part in self.parts:
            part.heard(ticket.features, outcome.label, ticket.time_s, now, owner)

    def forget(self, who: Selector) -> int:
        """Erase what is kept of these events; returns how many entries. See `Sums.forget` for what stays."""
        return sum(each.forget(who) for each in self.kept.values())

    def read(self) -> dict[str, float]:
        return {"past_values": float(sum(map(len, self.kept.values())))}

    def state_dict(self) -> State:
        kept = {name: each.state_dict() for name, each in self.kept.items()}
        return {"events": self.events, "labels": self.labels, "newest_s": self.newest_s, "kept": kept}

    def load_state_dict(self, state: State) -> None:
        """What it doesn't name begins here; of what no feature reads any more nothing is left."""
        self.events, self.labels = int(state.get("events", 0)), int(state.get("labels", 0))
        self.newest_s = float(state.get("newest_s", -math.inf))
        kept = state.get("kept", {})
        for name, each in self.kept.items():
            each.load_state_dict(kept.get(name, {}))


def past_of(config: Config, featurizer: Featurizer) -> Past | None:
    """None where no feature needs one."""
    past = Past(config, featurizer)
    return past if past.parts else None


class Part:
    """One derived feature. `ids`, `weights`, `dense` are filled in place."""

    kept: Kept

    def fill(self, ids: NDArray[Any], weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        raise NotImplementedError

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        """Nothing, unless it says otherwise."""

    def heard(self, features: Encoded, label: float, time_s: float, now: float, owner: int) -> None:
        """Likewise. `now`: when the label came."""


class _Clock(Part):
    def __init__(self, feature: Time, field: Field | None, number: int) -> None:
        self.part, self.values, self.field, self.number = feature.part, feature.values, field, number

    def fill(self, ids: NDArray[Any], weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        if self.field is not None:
            ids[self.field.slot] = self.field.base + (1 + int(self._at(now)) if math.isfinite(now) else 0)
            weights[self.field.slot] = 1.0
        elif math.isfinite(now):
            angle = 2.0 * math.pi * self._at(now) / self.values
            # Sorted by name, cos comes first.
            dense[self.number - 1], dense[self.number] = math.cos(angle), math.sin(angle)

    def _at(self, now: float) -> float:
        hours = now / 3600.0
        if self.part == "hour":
            return hours % 24.0
        weekday = (hours / 24.0 + 3.0) % 7.0  # the epoch began on a Thursday
        return weekday if self.part == "weekday" else weekday * 24.0


class _Crossed(Part):
    """Of rows within their fields, so that other rows of the table don't move it when a field comes or goes."""

    def __init__(self, feature: Cross, fields: Mapping[str, Field], field: Field) -> None:
        self.places, self.field = [Place(fields[name]) for name in sorted(feature.of)], field

    def fill(self, ids: NDArray[Any], weights: NDArray[Any], _dense: NDArray[Any], _now: float) -> None:
        values = [place.of(ids) for place in self.places]
        field = self.field
        # Negative: of a dynamic table.
        text = b"".join(v.to_bytes(4, "little") if v >= 0 else v.to_bytes(8, "little", signed=True) for v in values)
        row = 1 + xxhash.xxh3_64_intdigest(text) % field.buckets if all(values) else 0
        ids[field.slot], weights[field.slot] = field.base + row, 1.0


class _Binned(Part):
    def __init__(self, edges: Edges, field: Field, number: int) -> None:
        self.edges, self.field, self.number = edges, field, number

    def fill(self, ids: NDArray[Any], weights: NDArray[Any], dense: NDArray[Any], _now: float) -> None:
        slot = self.field.slot
        ids[slot], weights[slot] = self.field.base + self.edges.bin(float(dense[self.number])), 1.0

    def saw(self, features: Encoded, _time_s: float, _owner: int) -> None:
        self.edges.add(float(features.dense[self.number]))


class _Listed(Part):
    def __init__(self, feature: History, fields: Mapping[str, Field], field: Field) -> None:
        self.kept: Rings = Rings(feature.keys, feature.last)
        self.by, self.item, self.field = Place(fields[feature.by]), Place(fields[feature.of]), field
        self.wanted = {"any": None, "positive": 1.0, "negative": 0.0}[feature.when]
        self.max_age_s = feature.max_age_s or math.inf

    def fill(self, ids: NDArray[Any], weights: NDArray[Any], _dense: NDArray[Any], now: float) -> None:
        ring = self.kept.rings.get(self.by.of(ids))
        if not ring:
            return
        field = self.field
        oldest = now - self.max_age_s if self.max_age_s < math.inf else -math.inf
        rows = [field.base + row for row, time_s, _ in ring if time_s >= oldest]
        rows.reverse()  # newest first
        end = field.slot + len(rows)
        ids[field.slot : end] = rows
        weights[field.slot : end] = pooled(field.pooling, len(rows))

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        if self.wanted is None:
            self._add(features, time_s, owner)

    def heard(self, features: Encoded, label: float, time_s: float, _now: float, owner: int) -> None:
        if label == self.wanted:
            self._add(features, time_s, owner)

    def _add(self, features: Encoded, time_s: float, owner: int) -> None:
        key, row = self.by.of(features.ids), self.item.of(features.ids)
        if key and row:
            self.kept.add(key, row, time_s, owner)


class _Counted(Part):
    def __init__(self, past: Past, feature: Count, place: Place, number: int) -> None:
        self.past, self.place, self.number = past, place, number
        self.by_event = feature.half_life_s is None
        self.kept: Sums = Sums(feature.keys, feature.half_life_events or feature.half_life_s)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        _, weight, _, values = self.kept.read(ids, self.place, self.past.events if self.by_event else now)
        if values:
            dense[self.number] = math.log1p(weight)

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        self.kept.add(features.ids, self.place, 0.0, self.past.events if self.by_event else time_s, owner)


class _Rated(Part):
    def __init__(self, past: Past, feature: Rate, place: Place, number: int) -> None:
        self.past, self.place, self.number = past, place, number
        self.weight, self.prior, self.logit = feature.weight, feature.prior, feature.form == "logit"
        self.by_event = feature.half_life_s is None
        # Row 0 is of all values together: the prior.
        self.kept: Sums = Sums(feature.keys + 1, feature.half_life_events or feature.half_life_s)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        clock = self.past.labels if self.by_event else now
        total, weight, _, values = self.kept.read(ids, self.place, clock)
        if not values:
            return
        prior = self.prior
        if prior is None:
            of_all, count = self.kept.read_row(0, clock)
            prior = of_all / count if count else 0.0
        rate = (total + self.weight * prior) / (weight + self.weight)
        dense[self.number] = _logit(rate) if self.logit else rate

    def heard(self, features: Encoded, label: float, _time_s: float, now: float, owner: int) -> None:
        clock = self.past.labels if self.by_event else now
        self.kept.add(features.ids, self.place, label, clock, owner, of_all=True)


class _Covisited(Part):
    def __init__(self, past: Past, feature: Covisits, one: Place, bag: Place, number: int) -> None:
        self.past, self.one, self.bag, self.number = past, one, bag, number
        self.by_event = feature.half_life_s is None
        half_life = feature.half_life_events or feature.half_life_s
        self.kept: Together = Together(feature.keys, half_life, feature.power)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        total, values = self.kept.read(ids, self.one, self.bag, self.past.labels if self.by_event else now)
        if values:
            dense[self.number] = math.log(LEAST + total)

    def heard(self, features: Encoded, label: float, _time_s: float, now: float, owner: int) -> None:
        if label == 1.0:
            self.kept.add(features.ids, self.one, self.bag, self.past.labels if self.by_event else now, owner)


class _Since(Part):
    def __init__(self, feature: Elapsed, place: Place, number: int) -> None:
        self.place, self.number = place, number
        self.kept: Sums = Sums(feature.keys, None)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        since = self.kept.read(ids, self.place, now)[2]
        if math.isfinite(since) and math.isfinite(now):
            dense[self.number] = math.log1p(max(now - since, 0.0))

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        self.kept.add(features.ids, self.place, 0.0, time_s, owner)


def _remembering(
    past: Past, name: str, feature: Feature, fields: Mapping[str, Field], numbers: Mapping[str, int]
) -> Part:
    if isinstance(feature, History):
        return _Listed(feature, fields, fields[name])
    if isinstance(feature, Elapsed):
        return _Since(feature, Place(fields[feature.by]), numbers[name])
    if isinstance(feature, Covisits):
        return _Covisited(past, feature, Place(fields[feature.of]), Place(fields[feature.beside]), numbers[name])
    assert isinstance(feature, Count | Rate)  # noqa: S101 - these are all
    field = fields[feature.of]
    if isinstance(feature, Count):
        return _Counted(past, feature, Place(field), numbers[name])
    return _Rated(past, feature, Place(field), numbers[name])


def _logit(rate: float) -> float:
    if not 0.0 < rate < 1.0:
        return MOST_ODDS if rate >= 1.0 else -MOST_ODDS
    return min(max(math.log(rate / (1.0 - rate)), -MOST_ODDS), MOST_ODDS)
