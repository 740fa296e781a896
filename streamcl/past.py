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
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.derived import Count, Cross, Elapsed, Feature, History, Rate, Remembering, Time, bins_of
from streamcl.features import FLOAT32_MAX, Featurizer, Field, pooled
from streamcl.protocols import State
from streamcl.random import below, key_of
from streamcl.records import Encoded, Outcome, Selector, mark

SHARED = -1
"""Owner of what events of several keys have made: it stays when one of them is forgotten, as what is learned does."""

LN2 = math.log(2.0)
MOST_ODDS = 16.0
"""Of a rate's logit."""


class Place:
    """Where a feature's value stands in the rows of an event: 0 is a missing one."""

    __slots__ = ("base", "slot")

    def __init__(self, field: Field) -> None:
        self.slot, self.base = field.slot, field.base

    def of(self, ids: Any) -> int:
        return int(ids[self.slot]) - self.base

    def all(self, ids: Any) -> list[int]:
        """Of those that are there."""
        row = int(ids[self.slot]) - self.base
        return [row] if row else []


class Places(Place):
    """Of a bag, whose empty slots hold missing values."""

    __slots__ = ("end",)

    def __init__(self, field: Field) -> None:
        super().__init__(field)
        self.end = field.slot + field.slots

    def all(self, ids: Any) -> list[int]:
        base = self.base
        return [id - base for id in ids[self.slot : self.end].tolist() if id != base]


class Kept(Protocol):
    """What one feature keeps."""

    def forget(self, who: Selector) -> int: ...

    def __len__(self) -> int: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


T = TypeVar("T")
Sum = tuple[float, float, float, int]
"""(sum, weight, clock, owner)"""
Entry = tuple[int, float, int]
"""(row, time, owner)"""


class Round(Generic[T]):
    """What was kept of the values that a round of a group has touched, as it stood before; see `streamcl.group.past`.

    Attributes:
        before: By value, None where there was nothing.
        lost: Values that had to go meanwhile, whether or not they have come back.
    """

    def __init__(self) -> None:
        self.before: dict[int, T | None] = {}
        self.lost: set[int] = set()

    def lose(self, value: int, was: T) -> None:
        self.before.setdefault(value, was)
        self.lost.add(value)


class Sums:
    """Decayed (sum, weight, clock, owner) of each of the last `keys` values that were written.

    Args:
        half_life: Of what was added, by a clock that the caller reads; None: for ever.
    """

    def __init__(self, keys: int, half_life: float | None) -> None:
        self.keys = keys
        self.rate = LN2 / half_life if half_life else 0.0
        self.rows: dict[int, Sum] = {}  # in the order of writing
        self.round: Round[Sum] | None = None

    def read(self, row: int, now: float) -> tuple[float, float]:
        """(sum, weight) as they have decayed."""
        found = self.rows.get(row)
        return (0.0, 0.0) if found is None else self.decayed(found, now)

    def decayed(self, entry: Sum, now: float) -> tuple[float, float]:
        """Its (sum, weight) by then."""
        if not self.rate:
            return entry[0], entry[1]
        left = math.exp(-self.rate * max(now - entry[2], 0.0))
        return entry[0] * left, entry[1] * left

    def add(self, row: int, value: float, now: float, owner: int) -> None:
        total, weight = self.read(row, now)
        before = self.rows.pop(row, None)
        if self.round is not None:
            self.round.before.setdefault(row, before)
        if before is None:
            if len(self.rows) >= self.keys:
                self.drop(next(iter(self.rows)))
        else:
            owner = owner if before[3] == owner else SHARED
            now = max(now, before[2])
        self.rows[row] = total + value, weight + 1.0, now, owner

    def forget(self, who: Selector) -> int:
        """What one key alone has made begins anew, for events can't be taken out of a sum; what several have, stays."""
        owners = who.owners
        meant = [row for row, each in self.rows.items() if each[3] != SHARED and (owners is None or each[3] in owners)]
        for row in meant:
            self.drop(row)
        return len(meant)

    def drop(self, row: int) -> None:
        was = self.rows.pop(row)
        if self.round is not None:
            self.round.lose(row, was)

    def __len__(self) -> int:
        return len(self.rows)

    def state_dict(self) -> State:
        numbers = np.array([each[:3] for each in self.rows.values()], np.float64).reshape(-1, 3)
        owners = np.array([each[3] for each in self.rows.values()], np.int64)
        return {"rows": np.array(list(self.rows), np.int64), "numbers": numbers, "owners": owners}

    def load_state_dict(self, state: State) -> None:
        if not state:
            self.rows = {}
            return
        columns = state["rows"].tolist(), state["numbers"].tolist(), state["owners"].tolist()
        self.rows = {row: (*numbers, owner) for row, numbers, owner in zip(*columns, strict=True)}


class Rings:
    """The last (row, time, owner) of each of the last `keys` values that were written, oldest first."""

    def __init__(self, keys: int, last: int) -> None:
        self.keys, self.last = keys, last
        self.rings: dict[int, deque[Entry]] = {}  # in the order of writing
        self.round: Round[tuple[Entry, ...]] | None = None
        self.news: list[tuple[int, Entry]] = []  # of the round, by value

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
        self.rings = {}
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
        erased, self.sample = len(self.sample), []
        return erased

    def state_dict(self) -> State:
        return {"count": self.count, "sample": np.array(self.sample), "edges": np.array(self.edges)}

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            self.count, self.sample, self.edges = int(state["count"]), state["sample"].tolist(), state["edges"].tolist()


class Past:
    """Completes events by what was kept of those before; see above for who calls what, and when.

    Memory: for each feature at most `keys` values, of 100 bytes or so for a sum, 100 for each entry of a history.
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
        for name, feature in features.items():
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
        if rows := self.place.all(ids):
            clock = self.past.events if self.by_event else now
            dense[self.number] = math.log1p(sum(self.kept.read(row, clock)[1] for row in rows))

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        for row in self.place.all(features.ids):
            self.kept.add(row, 0.0, self.past.events if self.by_event else time_s, owner)


class _Rated(Part):
    def __init__(self, past: Past, feature: Rate, place: Place, number: int) -> None:
        self.past, self.place, self.number = past, place, number
        self.weight, self.prior, self.logit = feature.weight, feature.prior, feature.form == "logit"
        self.by_event = feature.half_life_s is None
        # Row 0 is of all values together: the prior.
        self.kept: Sums = Sums(feature.keys + 1, feature.half_life_events or feature.half_life_s)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        rows = self.place.all(ids)
        if not rows:
            return
        clock = self.past.labels if self.by_event else now
        prior = self.prior
        if prior is None:
            total, weight = self.kept.read(0, clock)
            prior = total / weight if weight else 0.0
        total, weight = self.kept.read(rows[0], clock)
        for row in rows[1:]:
            more = self.kept.read(row, clock)
            total, weight = total + more[0], weight + more[1]
        rate = (total + self.weight * prior) / (weight + self.weight)
        dense[self.number] = _logit(rate) if self.logit else rate

    def heard(self, features: Encoded, label: float, _time_s: float, now: float, owner: int) -> None:
        clock = self.past.labels if self.by_event else now
        self.kept.add(0, label, clock, SHARED)
        for row in self.place.all(features.ids):
            self.kept.add(row, label, clock, owner)


class _Since(Part):
    def __init__(self, feature: Elapsed, place: Place, number: int) -> None:
        self.place, self.number = place, number
        self.kept: Sums = Sums(feature.keys, None)

    def fill(self, ids: NDArray[Any], _weights: NDArray[Any], dense: NDArray[Any], now: float) -> None:
        found = self.kept.rows.get(self.place.of(ids))
        if found is not None and math.isfinite(now):
            dense[self.number] = math.log1p(max(now - found[2], 0.0))

    def saw(self, features: Encoded, time_s: float, owner: int) -> None:
        if row := self.place.of(features.ids):
            self.kept.add(row, 0.0, time_s, owner)


def _remembering(
    past: Past, name: str, feature: Feature, fields: Mapping[str, Field], numbers: Mapping[str, int]
) -> Part:
    if isinstance(feature, History):
        return _Listed(feature, fields, fields[name])
    if isinstance(feature, Elapsed):
        return _Since(feature, Place(fields[feature.by]), numbers[name])
    assert isinstance(feature, Count | Rate)  # noqa: S101 - these are all
    field = fields[feature.of]
    place = Places(field) if field.slots > 1 else Place(field)
    if isinstance(feature, Count):
        return _Counted(past, feature, place, numbers[name])
    return _Rated(past, feature, place, numbers[name])


def _logit(rate: float) -> float:
    if not 0.0 < rate < 1.0:
        return MOST_ODDS if rate >= 1.0 else -MOST_ODDS
    return min(max(math.log(rate / (1.0 - rate)), -MOST_ODDS), MOST_ODDS)
