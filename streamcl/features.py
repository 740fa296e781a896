"""Event to arrays of fixed size: hashed categories, bags and numerics.

Every category of every field is one row of a single table. Field f owns `buckets + 1` rows from `base` on: the first
stands for a missing value, the others for hash buckets. Fields lie in the order of their names, so the order of a
config file means nothing.

A field with a dynamic table owns the first of these alone. Its other categories are ids: negative numbers of 63 random
bits, the hash of the category under the field's name, that the engine looks rows up by (`streamcl.engine.tables`).
Among a hundred million of them one pair is alike once in two thousand tables: for all practical purposes, none is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.derived import Count, Covisits, Cross, Elapsed, Feature, History, Rate, Time, bins_of
from streamcl.protocols import BadInput, State
from streamcl.records import Encoded
from streamcl.stations import Bag, Categorical, Numeric

ABSENT = object()
MOST_KNOWN = 16_384
"""Values of a field whose rows are kept at hand (count)."""
EXACT = {str, int}
"""Types of theirs."""
LONGEST_KNOWN = 64
"""Of those (characters)."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
ID = 1 << 63
"""Ids of dynamic tables lie from -ID on, below 0."""


def lookup(payload: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a dotted path, or ABSENT."""
    value: Any = payload
    for name in path:
        if type(value) is not dict and not isinstance(value, Mapping):  # the question about a protocol is slow
            return ABSENT
        value = value.get(name, ABSENT)
    return value


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words, for error messages that must not show it."""
    if value is None or value is ABSENT:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    names: dict[type, str] = {str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def category(field: str, value: Any) -> str:
    """The text that is hashed: `7` and `"7"` are one category, `true` and `1` are two."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise BadInput("schema", f"field {field!r}: a category must be a string, integer or boolean, not {_kind(value)}")


def number(field: str, value: Any) -> float:
    """A finite number that fits float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput("schema", f"field {field!r}: expected a number, not {kind_of(value)}")
    if not -FLOAT32_MAX <= value <= FLOAT32_MAX:  # false for NaN; exact for integers too large for a float
        raise BadInput("non_finite", f"field {field!r}: not a finite 32-bit number")
    return float(value)


def _number_at(payload: Mapping[str, Any], name: str, path: tuple[str, ...] | None) -> float:
    """NaN where there is none, or none in the payload (no path)."""
    if path is None:
        return math.nan
    value = payload.get(name) if len(path) == 1 else lookup(payload, path)
    if type(value) is float and -FLOAT32_MAX <= value <= FLOAT32_MAX:
        return value
    return math.nan if value is None or value is ABSENT else number(name, value)


def _kind(value: Any) -> str:
    return "a fraction" if isinstance(value, float) else kind_of(value)


@dataclass(frozen=True, slots=True)
class Field:
    """One field of rows, and the rows and slots that it owns (or shares: a history those of the field it lists)."""

    name: str
    path: tuple[str, ...]
    base: int
    buckets: int
    slot: int
    slots: int
    pooling: str

    known: dict[str | int, int]
    """Rows of values that have come lately: half the time of an event would go into hashing them again."""
    salt: int | None = None
    """Of the ids of a dynamic table; None: the field's table is hashed."""

    def row(self, text: str) -> int:
        """Its row, or of a dynamic table its id, which is negative."""
        if self.salt is not None:
            return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), self.salt) % ID - ID
        # The field's name is no part of the hash: it has rows of its own.
        return self.base + 1 + xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) % self.buckets

    def row_of(self, value: Any) -> int:
        """Raises BadInput for what is no category."""
        exactly = type(value) is int or (type(value) is str and len(value) <= LONGEST_KNOWN)
        row = self.known.get(value) if exactly else None
        if row is None:
            row = self.row(category(self.name, value))
            if exactly:
                if len(self.known) >= MOST_KNOWN:
                    self.known.clear()
                self.known[value] = row
        return row


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where: S slots, F fields, R rows, N numerics."""

    slot_field: NDArray[np.int64]  # (S,) field of each slot
    slot_base: NDArray[np.int64]  # (S,) the row an empty slot points to, with weight 0
    fields: tuple[str, ...]
    numerics: tuple[str, ...]
    unscaled: NDArray[np.bool_]  # (N,) numerics that are taken as they come
    rows: int  # that are always there; behind them lie those of dynamic tables
    dynamic: tuple[str, ...]  # fields with a dynamic table
    slot_table: NDArray[np.int64]  # (S,) which of these a slot's ids may come into; -1: none, it is hashed or a history
    slot_dynamic: NDArray[np.bool_]  # (S,) whether its ids are of a dynamic table

    def known(self, slots: NDArray[np.int64], ids: NDArray[np.int64]) -> bool:
        """Whether all of these, (n,) both, may stand in an event's features."""
        return bool(((ids < self.rows) & ((ids >= 0) | self.slot_dynamic[slots])).all())


class Featurizer:
    """Turns a payload into `Encoded`, by the `[features]` of the config. Pure: it holds no state.

    Args:
        config: Its `features` are read.

    Shape:
        `encode` returns new ids (S,) int64, weights (S,) float32, dense (N,) float32 with NaN where missing. A bag has
        `max_items` slots, weighted 1 (sum) or 1/n (mean); an empty slot has weight 0.

    Raises:
        BadInput: `schema` for a wrong type, `non_finite` for NaN, infinity or what overflows float32.
    """

    def __init__(self, config: Config) -> None:
        features = config.features
        self.fields, rows = _fields(features)
        fields = list(self.fields.values())
        self.categoricals = [f for f in fields if isinstance(features[f.name], Categorical)]
        self.bags = [f for f in fields if isinstance(features[f.name], Bag)]
        self._beside = {  # where the weights of a bag's items are
            name: tuple(f.weights.split(".")) for name, f in features.items() if isinstance(f, Bag) and f.weights
        }
        scales = {number: scale for name, f in features.items() for number, scale in _numbers(name, f)}
        numerics = sorted(scales)
        self.numerics = [
            (name, tuple(name.split(".")) if isinstance(features.get(name), Numeric) else None) for name in numerics
        ]
        self._logs = np.array([scales[name] == "log" for name in numerics], np.bool_)
        slots = [f.slots for f in fields]
        owners = [name for name in self.fields if _dynamic(features[name])]
        of_table = [owners.index(f.name) if f.name in owners else -1 for f in fields]
        self.layout = Layout(
            slot_field=np.repeat(np.arange(len(fields), dtype=np.int64), slots),
            slot_base=np.repeat(np.array([f.base for f in fields], np.int64), slots),
            fields=tuple(self.fields),
            numerics=tuple(numerics),
            unscaled=np.array([scales[name] == "none" for name in numerics], np.bool_),
            rows=rows,
            dynamic=tuple(owners),
            slot_table=np.repeat(np.array(of_table, np.int64), slots),
            slot_dynamic=np.repeat(np.array([f.salt is not None for f in fields], np.bool_), slots),
        )

        # What the loop over an event's fields needs, at hand; the name of one that isn't nested.
        self._places = [(f.slot, f.name if len(f.path) == 1 else None, f.known, f) for f in self.categoricals]
        flat = len(self.categoricals) == sum(slots) and all(len(f.path) == 1 for f in self.categoricals)
        self._all_at_once = (
            itemgetter(*(f.name for f in self.categoricals)) if flat and len(self.categoricals) > 1 else None
        )
        self._known = [f.known for f in self.categoricals]
        self._none = np.zeros(0, np.float32)
        self._base = self.layout.slot_base.tolist()
        self._weights = np.zeros(sum(slots), np.float32)
        self._weights[[field.slot for field in self.categoricals]] = 1.0

    def encode(self, payload: Mapping[str, Any]) -> Encoded:
        numbers = (
            np.array([_number_at(payload, name, path) for name, path in self.numerics], np.float32)
            if self.numerics
            else self._none
        )
        if self._logs.any():
            numbers[self._logs] = np.copysign(np.log1p(np.abs(numbers[self._logs])), numbers[self._logs])
        if self._all_at_once and (at_hand := self._rows_at_hand(payload)):
            return Encoded(np.array(at_hand, np.int64), self._weights, numbers)
        rows = self._base.copy()  # setting a list's elements is faster than an array's
        for slot, name, known, field in self._places:
            value: Any = payload.get(name) if name is not None else lookup(payload, field.path)
            kind = type(value)
            if kind is str or kind is int:  # True and 1.0 would be found under 1
                rows[slot] = known.get(value) or field.row_of(value)
            elif value is not None and value is not ABSENT:
                rows[slot] = field.row_of(value)
        ids, weights = np.array(rows, np.int64), self._weights.copy() if self.bags else self._weights
        for field in self.bags:
            self._fill(field, payload, ids, weights)
        return Encoded(ids, weights, numbers)

    def _rows_at_hand(self, payload: Mapping[str, Any]) -> list[int] | None:
        """The rows of all fields when each has a text or a whole number: without a Python loop over those known."""
        try:
            values = self._all_at_once(payload)  # type: ignore[misc]
        except KeyError:
            return None
        if not EXACT.issuperset(map(type, values)):  # True and 1.0 would be found under 1
            return None
        rows: list[Any] = list(map(dict.get, self._known, values))
        if None in rows:
            for i, field in enumerate(self.categoricals):
                if rows[i] is None:
                    rows[i] = field.row_of(values[i])
        return rows

    def _fill(
        self, field: Field, payload: Mapping[str, Any], ids: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> None:
        value = lookup(payload, field.path)
        if value is None or value is ABSENT:
            return
        if isinstance(value, Mapping):
            items = list(value)
            given: list[float] | None = [number(field.name, weight) for weight in value.values()]
        elif isinstance(value, list):
            items, given = value, self._weights_beside(field, payload, len(value))
        else:
            raise BadInput("schema", f"field {field.name!r}: expected a list, not {kind_of(value)}")
        rows = [field.row_of(item) for item in items[: field.slots]]
        end = field.slot + len(rows)
        ids[field.slot : end] = rows
        weights[field.slot : end] = pooled(field.pooling, len(rows), given)

    def _weights_beside(self, field: Field, payload: Mapping[str, Any], count: int) -> list[float] | None:
        path = self._beside.get(field.name)
        value = lookup(payload, path) if path else None
        if path is None or value is None or value is ABSENT:
            return None
        name = ".".join(path)
        if not isinstance(value, list) or len(value) != count:
            raise BadInput("schema", f"field {name!r}: expected a list of a number for each of {field.name!r}")
        return [number(name, weight) for weight in value]


def pooled(pooling: str, count: int, given: list[float] | None = None) -> float | NDArray[np.float32]:
    """What the rows of `count` items are multiplied by: (count,), or the same for all where none has a weight."""
    if given is None:
        return 1.0 if pooling == "sum" or not count else 1.0 / (count if pooling == "mean" else math.sqrt(count))
    w = np.array(given[:count], np.float64)
    size = np.abs(w).sum() if pooling == "mean" else np.sqrt((w * w).sum()) if pooling == "sqrtn" else 1.0
    return (w / size if size > 0.0 else w).astype(np.float32)


def _fields(features: Mapping[str, Feature]) -> tuple[dict[str, Field], int]:
    """By name, in the order of the names; and the rows of the table."""
    base, bases = 0, {}
    for name, feature in sorted(features.items()):
        if (buckets := _buckets(feature, features)) and _owner(features, name) == name:
            bases[name], base = base, base + 1 + (0 if _dynamic(feature) else buckets)
    fields: dict[str, Field] = {}
    slot = 0
    for name, feature in sorted(features.items()):
        if buckets := _buckets(feature, features):
            slots = (
                feature.max_items if isinstance(feature, Bag) else feature.last if isinstance(feature, History) else 1
            )
            owner, pooling = _owner(features, name), getattr(feature, "pooling", "sum")
            salt = xxhash.xxh3_64_intdigest(owner.encode()) if _dynamic(features[owner]) else None
            place = bases[owner], 0 if salt is not None else buckets
            fields[name] = Field(name, tuple(name.split(".")), *place, slot, slots, pooling, {}, salt)
            slot += slots
    return fields, base


def _owner(features: Mapping[str, Feature], name: str) -> str:
    """The field whose rows it reads: its own, or those of the field that it lists."""
    feature = features[name]
    return feature.of if isinstance(feature, History) and feature.rows == "shared" else name


def _dynamic(feature: Feature) -> bool:
    return isinstance(feature, Categorical | Bag) and feature.table is not None


def _buckets(feature: Feature, features: Mapping[str, Feature]) -> int:
    """Rows that a feature reads, but for the missing value's; 0: it is a number alone."""
    if isinstance(feature, Categorical | Bag | Cross):
        return feature.buckets
    if isinstance(feature, History):
        listed = features[feature.of]
        return listed.buckets if isinstance(listed, Categorical) else 0
    if isinstance(feature, Time):
        return 0 if feature.cyclic else feature.values
    return bins_of(feature)


def _numbers(name: str, feature: Feature) -> list[tuple[str, str]]:
    """Names and scales of the numbers that a feature is."""
    if isinstance(feature, Numeric):
        return [(name, feature.scale)]
    if isinstance(feature, Count | Rate | Covisits | Elapsed):
        return [(name, "standard")]
    return (
        [(f"{name}.{part}", "none") for part in ("sin", "cos")] if isinstance(feature, Time) and feature.cyclic else []
    )


class RunningNorm:
    """Standardises numbers by the mean and deviation of what has been learned from so far.

    It belongs to the learner, not to the featurizer: predicting never moves it, and a ticket or a replayed row, which
    hold raw numbers, are read with today's statistics.

    Shape:
        `update` takes one row (N,); `apply` takes (N,) or (B, N) and returns float32 of that shape.

    Source:
        Welford 1962, doi 10.1080/00401706.1962.10490022.

    Differs from the source:
        Missing values (NaN) are skipped, and read as the mean; results are clipped to +-`clip` deviations, so that one
        wild number can't blow up a gradient. Infinity moves nothing and reads as the clip. What is `unscaled` (N,)
        moves nothing either: its mean stays 0, its deviation 1, and no clip holds it.
    """

    def __init__(self, width: int, clip: float = 10.0, unscaled: NDArray[np.bool_] | None = None) -> None:
        self.scaled = None if unscaled is None or not unscaled.any() else ~unscaled
        self.count = np.zeros(width, np.float64)
        self.mean = np.zeros(width, np.float64)
        self.m2 = np.zeros(width, np.float64)
        self.clip = clip if self.scaled is None else np.where(self.scaled, clip, FLOAT32_MAX)

    def update(self, row: NDArray[np.float32]) -> None:
        if not len(row):
            return
        seen = np.isfinite(row)
        if self.scaled is not None:
            seen &= self.scaled
        value = np.where(seen, row, self.mean)  # float64; what is missing stands at the mean, and so adds nothing
        delta = value - self.mean
        # New arrays, never changed in place: whoever holds a state holds it for good.
        self.count = self.count + seen
        self.mean = self.mean + delta / np.maximum(self.count, 1.0)
        self.m2 = self.m2 + delta * (value - self.mean)

    def deviation(self) -> NDArray[np.float64]:
        """Standard deviation (N,); 1 until two different values have been seen."""
        variance = self.m2 / np.maximum(self.count, 1.0)
        return np.where(variance > 0.0, np.sqrt(variance), 1.0)

    def apply(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if not rows.size:
            return rows
        scaled = (rows - self.mean) / self.deviation()
        scaled[np.isnan(scaled)] = 0.0
        return scaled.clip(-self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> State:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: State) -> None:
        self.count, self.mean, self.m2 = (np.array(state[name], np.float64) for name in ("count", "mean", "m2"))
