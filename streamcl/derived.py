"""Kinds of features that no field of the payload holds: made of other fields, of the event's time, and of the past.

What they read of the past is kept by the engine (`streamcl.past`): bounded, in event time, part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from streamcl.stations import Bag, Categorical, FieldPath, NamedKind, New, Numeric, Station

OF = "of an event's fields with one value: categorical, time, or a cross of such"


class Cross(Station):
    """Values that come together, as a category of its own: hashed. Where one of them is missing, so is this."""

    kind: Literal["cross"] = "cross"
    of: tuple[FieldPath, ...] = New(min_length=2, max_length=8, description="names of categorical, time or binned ones")
    buckets: int = New(1 << 16, ge=2, le=1 << 26, description="rows of the table (count)")


class Time(Station):
    """A part of the event time, in UTC: a row for each of its values, or a point on a circle."""

    kind: Literal["time"] = "time"
    part: Literal["hour", "weekday", "hour_of_week"] = New("hour", description="Monday is weekday 0")
    cyclic: bool = New(False, description="two numbers, NAME.sin and NAME.cos, instead of rows")

    @property
    def values(self) -> int:
        return {"hour": 24, "weekday": 7, "hour_of_week": 168}[self.part]


class _Kept(Station):
    """What is kept of each value of a field."""

    keys: int = New(100_000, ge=1, description="values remembered; the one written longest ago gives way (count)")


class _Decayed(_Kept):
    half_life_events: float | None = New(None, gt=0, description="what was counted weighs half after so many events")
    half_life_s: float | None = New(None, gt=0, description="the same in event time (seconds)")

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if self.half_life_events is not None and self.half_life_s is not None:
            raise ValueError("half_life_s: set it, or else half_life_events")
        return self


class History(_Kept):
    """The last values of a field among events with the same value of another, newest first: a bag.

    It shares the rows of the field it lists, so that what was learned of an item is known of a history with it too.
    """

    kind: Literal["history"] = "history"
    of: FieldPath = New(description="name of the categorical feature whose values are listed")
    by: FieldPath = New(description=f"name {OF}: whose history it is")
    last: int = New(20, ge=1, le=4096, description="values kept (count)")
    when: Literal["any", "positive", "negative"] = New(
        "any", description="any: all events, as they come; else those of label 1, or 0, once that is known"
    )
    pooling: Literal["mean", "sum", "sqrtn"] = New("mean", description="of the rows of its values")
    rows: Literal["shared", "own"] = New("shared", description="own: rows apart from the field's, as many")
    max_age_s: float | None = New(None, gt=0, description="what is older than this is not listed (seconds)")


class Count(_Decayed):
    """log(1 + how often a value came before this event), standardised; of a bag: its values together."""

    kind: Literal["count"] = "count"
    of: FieldPath = New(description=f"name {OF}, or a bag")
    bins: int = New(0, ge=0, le=256, description="also a row for each of so many quantiles; 0: none")


class Rate(_Decayed):
    """The mean label of a value, of the labels known before this event: (sum + weight x prior) / (count + weight).

    Of a bag sum and count are those of its values together.

    Source: Micci-Barreca 2001, doi 10.1145/507533.507538, equation 4 with m = `weight`.
    """

    kind: Literal["rate"] = "rate"
    of: FieldPath = New(description=f"name {OF}, or a bag")
    weight: float = New(10.0, gt=0, description="of the prior, in labels")
    prior: float | None = New(None, description="default: the mean of all labels so far, which decays alike")
    form: Literal["rate", "logit"] = New("rate", description="logit: ln(rate / (1 - rate)); binary labels only")
    bins: int = New(0, ge=0, le=256, description="also a row for each of so many quantiles; 0: none")


class Covisits(_Decayed):
    """How often a value was seen, with label 1, beside those of a list: item-to-item co-visitation, standardised.

    ln(1e-4 + sum over the list's j-th value a of w(a, v) / (n(a)^(1 - power) n(v)^power) / j), where w(a, v) adds 1 / j
    for each event of label 1 of v in whose list a came j-th (or the other way round), and n(a) is the sum of all
    w(a, .). A power of 0 is the share of v in what came with a, of 1/2 the cosine.

    Source: Linden et al. 2003 (IEEE Internet Computing 7) for item-to-item cosine; Ludewig and Jannach 2018,
    arXiv 1803.09587, section 3.1, for what fades with the distance in a session.

    Differs from the source:
        n counts pairs, not visits: how often a value comes without another is not seen.
    """

    kind: Literal["covisits"] = "covisits"
    of: FieldPath = New(description="name of a categorical feature: the value in question")
    beside: FieldPath = New(description="name of a history of it, or of a bag of such values, the nearest first")
    power: float = New(0.5, ge=0, le=1, description="of how popular the value in question is")
    bins: int = New(0, ge=0, le=256, description="also a row for each of so many quantiles; 0: none")


class Elapsed(_Kept):
    """log(1 + seconds since the event before with the same value), standardised; missing at the first."""

    kind: Literal["elapsed"] = "elapsed"
    by: FieldPath = New(description=f"name {OF}")
    bins: int = New(0, ge=0, le=256, description="also a row for each of so many quantiles; 0: none")


KINDS: dict[str, type[Station]] = {
    "categorical": Categorical,
    "bag": Bag,
    "numeric": Numeric,
    "cross": Cross,
    "time": Time,
    "history": History,
    "count": Count,
    "rate": Rate,
    "covisits": Covisits,
    "elapsed": Elapsed,
}
Read = Categorical | Bag | Numeric
"""Read from the payload."""
Remembering = History | Count | Rate | Covisits | Elapsed
Derived = Cross | Time | Remembering
Feature = Annotated[Read | Derived, Field(discriminator="kind"), NamedKind]


def bins_of(feature: Any) -> int:
    """Quantiles that a number is also a row for."""
    return int(getattr(feature, "bins", 0))


def fault(features: Mapping[str, Any], task: str) -> str | None:
    """What does not fit together, with the path of the setting; None when all does."""
    for name, feature in features.items():
        where = f"features.{name}"
        if isinstance(feature, Rate) and (task == "multiclass" or (feature.form == "logit" and task != "binary")):
            return f"{where}: no label rate of a {task} task" + (" has a logit" if task == "regression" else "")
        if isinstance(feature, History) and feature.when != "any" and task != "binary":
            return f"{where}.when: {feature.when} is for binary labels"
        if isinstance(feature, History) and not isinstance(features.get(feature.of), Categorical):
            return f"{where}.of: {feature.of!r} is no categorical feature"
        if isinstance(feature, History) and feature.rows == "own" and features[feature.of].table is not None:
            return f"{where}.rows: {feature.of!r} has a dynamic table, whose rows can be shared alone"
        if isinstance(feature, Cross):
            unfit = next((part for part in feature.of if not _crossable(part, features)), None)
            if unfit is not None:
                return f"{where}.of: {unfit!r} is no categorical, time or binned feature"
            if len(set(feature.of)) < len(feature.of):
                return f"{where}.of: each once"
        if isinstance(feature, Covisits):
            if task != "binary":
                return f"{where}: covisits are of binary labels"
            one, listed = features.get(feature.of), features.get(feature.beside)
            of_one = isinstance(listed, History) and listed.of == feature.of
            if not isinstance(one, Categorical) or not (of_one or isinstance(listed, Bag)):
                return f"{where}: {feature.of!r} must be a categorical feature, {feature.beside!r} a bag or its history"
            if isinstance(listed, Bag) and (one.buckets, None, None) != (listed.buckets, one.table, listed.table):
                return f"{where}.beside: {feature.beside!r} and {feature.of!r} need as many buckets, and no table"
            continue
        for setting in ("by",) if isinstance(feature, History) else ("of", "by"):
            at = getattr(feature, setting, None)
            summed = isinstance(feature, Count | Rate) and isinstance(features.get(str(at)), Bag)
            if isinstance(at, str) and not (summed or plain(at, features)):
                either = "categorical, bag" if isinstance(feature, Count | Rate) else "categorical"
                return f"{where}.{setting}: {at!r} is no {either} or time feature, nor a cross of such"
    return None


def plain(name: str, features: Mapping[str, Any]) -> bool:
    """Whether a feature is one row that stands before anything is read of the past."""
    feature = features.get(name)
    if isinstance(feature, Cross):
        return all(isinstance(features.get(part), Categorical) or _in_rows(features.get(part)) for part in feature.of)
    return isinstance(feature, Categorical) or _in_rows(feature)


def _in_rows(feature: Any) -> bool:
    return isinstance(feature, Time) and not feature.cyclic


def _crossable(name: str, features: Mapping[str, Any]) -> bool:
    feature = features.get(name)
    return not isinstance(feature, Cross) and (plain(name, features) or bins_of(feature) > 0)
