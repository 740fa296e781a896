"""What of an event its metrics are told apart by: a field's text, which a ticket keeps until the label comes.

Features are no use for that: a row of a hashed table has no name, two categories may share it, and a request's id, by
which a list is known, is no feature at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamcl.records import Ticket
from streamcl.stations import Categorical, Events, Metrics

KEY = "key"
"""Stands for an event's key, unless a feature has that name: without `events.key` it is the record's."""

Features = Mapping[str, Any]
Trait = Callable[[Sequence[Ticket]], list[str]]
"""The texts of tickets; "" where an event said none."""


def keys(tickets: Sequence[Ticket]) -> list[str]:
    return [ticket.key for ticket in tickets]


def trait(name: str, events: Events, features: Features) -> Trait:
    """What reads it from tickets."""
    if _is_key(name, events, features):
        return keys
    if name == events.segment:
        return lambda tickets: [ticket.segment for ticket in tickets]
    return lambda tickets: [ticket.traits.get(name, "") for ticket in tickets]


def kept(metrics: Metrics, events: Events, features: Features) -> tuple[str, ...]:
    """Names of the fields that a ticket must keep for it; key and segment it has anyway."""
    named = {*metrics.segments, *filter(None, (metrics.group_by, metrics.ranking.group_by))}
    return tuple(sorted(name for name in named if name != events.segment and not _is_key(name, events, features)))


def fault(metrics: Metrics, events: Events, features: Features, task: str, negatives: float) -> str | None:
    """What does not fit together, with the path of the setting; None when all does."""
    ranking = metrics.ranking.group_by
    given = {"group_by": metrics.group_by, "segments": metrics.segments, "ranking.group_by": ranking}
    for name, value in given.items() if task != "binary" else ():
        if value:
            return f"metrics.{name}: for binary labels, not {task}"
    for name in metrics.segments:
        if _is_key(name, events, features) or name == events.id:
            return f"metrics.segments: {name!r} is whose or which an event is, and would make a series for each"
    if len(set(metrics.segments)) < len(metrics.segments):
        return "metrics.segments: each field once"
    for setting, names in (("segments", metrics.segments), ("group_by", (metrics.group_by,))):
        for each in filter(None, names):
            known = _is_key(each, events, features) or each == events.segment
            if not known and not isinstance(features.get(each), Categorical):
                return f"metrics.{setting}: {each!r} is no categorical feature, nor events.key or events.segment"
    if ranking and negatives < 1.0:
        return "metrics.ranking.group_by: lists would lack the negatives that sample.negatives leaves out"
    return None


def _is_key(name: str, events: Events, features: Features) -> bool:
    return name == events.key or (name == KEY and KEY not in features)
