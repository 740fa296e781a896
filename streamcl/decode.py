"""Record to event or label: everything that a payload must satisfy before it may touch state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streamcl import traits
from streamcl.config import Config
from streamcl.derived import Read
from streamcl.features import ABSENT, FLOAT32_MAX, Featurizer, category, kind_of, lookup, number
from streamcl.protocols import BadInput, Codec, Seconds
from streamcl.records import EVENTS, LABELS, Event, Label, Origin, Record
from streamcl.stations import Bag

Path = tuple[str, ...] | None

MOST_CHARACTERS = 4096
"""Of an id or a key: they stand in the prediction, several times, and what is too large could never be answered."""


def _path(dotted: str | None) -> Path:
    return tuple(dotted.split(".")) if dotted else None


class Decoder:
    """Decodes and validates records by the config's `[events]` and `[labels]`. Pure: it holds no state.

    Raises:
        ConnectorError: what it takes to read the payload can't be had now.
        BadInput: with a dead-letter reason (`undecodable | schema | non_finite | unknown_feature | too_large |
            future`) and a text that names the field and never shows the value.
    """

    def __init__(self, config: Config, codec: Codec, labels_codec: Codec | None = None) -> None:
        self.config = config
        self.codecs = {EVENTS: codec, LABELS: labels_codec or codec}
        self.featurizer = Featurizer(config)
        events, labels = config.events, config.labels
        self.event_paths = {
            name: _path(getattr(events, name)) for name in ("id", "key", "time", "label", "weight", "segment")
        }
        self.label_paths = {name: _path(getattr(labels, name)) for name in ("id", "time", "label")} if labels else {}
        self.tasks = [(_path(task.label), task.default) for _, task in sorted(config.tasks.items())]
        read = [name for name, feature in config.features.items() if isinstance(feature, Read)]
        read += [f.weights for f in config.features.values() if isinstance(f, Bag) and f.weights]
        named = [p for p in self.event_paths.values() if p] + [tuple(name.split(".")) for name in read]
        named += [path for path, _ in self.tasks if path and labels is None]
        self.traits = {n: tuple(n.split(".")) for n in traits.kept(config.metrics, events, config.features)}
        named += self.traits.values()
        self.known = frozenset(path[0] for path in named)
        # Names of what isn't nested: nearly every event has a short text or a plain number there, which takes no
        # function to see. Whatever is otherwise goes the long way.
        self._id, self._key, self._time_at, self._label_at = (
            path[0] if (path := self.event_paths[name]) and len(path) == 1 else None
            for name in ("id", "key", "time", "label")
        )
        self._traits_at = [(name, path[0] if len(path) == 1 else None, path) for name, path in self.traits.items()]
        self._strict = events.unknown_fields == "dead_letter"
        self._zero_or_one, self._seconds = config.task == "binary", events.time_unit == "s"

    def decode(self, record: Record) -> Event | Label:
        payload = self._payload(record)
        return self._label(record, payload) if record.origin.input == LABELS else self._event(record, payload)

    def unknown_fields(self, payload: Mapping[str, Any]) -> set[str]:
        return payload.keys() - self.known

    def time_of(self, payload: Mapping[str, Any]) -> float | None:
        """The event time of a payload that is no record; None where it has none. Raises BadInput."""
        path = self.event_paths["time"]
        if path is None or (value := lookup(payload, path)) is None or value is ABSENT:
            return None
        return _seconds(".".join(path), value, self.config.events.time_unit)

    def _payload(self, record: Record) -> Mapping[str, Any]:
        if record.value is None:
            raise BadInput("undecodable", "no payload (a tombstone)")
        if len(record.value) > self.config.events.max_bytes:
            most = self.config.events.max_bytes
            raise BadInput("too_large", f"{len(record.value)} bytes; events.max_bytes is {most}")
        return self.codecs[record.origin.input].decode(record.value)

    def _event(self, record: Record, payload: Mapping[str, Any]) -> Event:
        events, paths = self.config.events, self.event_paths
        if self._strict and (unknown := self.unknown_fields(payload)):
            raise BadInput("unknown_feature", f"unknown field {min(unknown)[:100]!r}")
        identity: Any = payload.get(self._id) if self._id else None
        if not (type(identity) is str and 0 < len(identity) <= MOST_CHARACTERS):
            identity = _identity(payload, paths["id"], record.origin)
        key: Any = payload.get(self._key) if self._key else None
        if not (type(key) is str and len(key) <= MOST_CHARACTERS):
            key = _key(payload, paths["key"], record, identity)
        time_s: Any = payload.get(self._time_at) if self._time_at else None
        latest = record.time_s + events.max_future_s
        if not (type(time_s) is float and self._seconds and -1e15 <= time_s <= min(latest, 1e15)):
            time_s = self._time(payload, paths["time"], events.time_unit, record)
        label: Any = payload.get(self._label_at) if self._label_at else None
        if type(label) is int and self._zero_or_one and 0 <= label <= 1:
            label = float(label)
        else:
            label = self._value(payload, paths["label"], None) if paths["label"] else None
        segment = (_text(payload, paths["segment"], "the segment") or "") if paths["segment"] else ""
        also = self._also(payload) if self.tasks and label is not None else ()
        weight = self._weight(payload) if paths["weight"] else 1.0
        features = self.featurizer.encode(payload)
        told = self.told(payload) if self.traits else {}
        return Event(identity, key, time_s, features, record.origin, label, segment, also, weight, told)

    def told(self, payload: Mapping[str, Any]) -> dict[str, str]:
        """Of those fields that are there."""
        told = {}
        for name, at, path in self._traits_at:
            text: Any = payload.get(at) if at else None
            if type(text) is not str or len(text) > MOST_CHARACTERS:
                text = _text(payload, path, "the value")
            if text:
                told[name] = text
        return told

    def _weight(self, payload: Mapping[str, Any]) -> float:
        path = self.event_paths["weight"]
        assert path is not None  # noqa: S101 - the caller has looked
        name, value = ".".join(path), lookup(payload, path)
        if value is ABSENT or value is None:
            return 1.0
        weight = number(name, value)
        if not 0.0 <= weight <= FLOAT32_MAX:
            raise BadInput("schema", f"field {name!r}: a weight is 0 or more")
        return weight

    def _label(self, record: Record, payload: Mapping[str, Any]) -> Label:
        labels, paths = self.config.labels, self.label_paths
        assert labels is not None  # noqa: S101 - the source delivers labels only when they are configured
        value = self._value(payload, paths["label"], labels.default)
        if value is None:
            raise BadInput("schema", f"field {labels.label!r}: the label is missing")
        return Label(
            id=_identity(payload, paths["id"], record.origin),
            value=value,
            time_s=self._time(payload, paths["time"], labels.time_unit, record),
            origin=record.origin,
            also=self._also(payload) if self.tasks else (),
        )

    def _time(self, payload: Mapping[str, Any], path: Path, unit: str, record: Record) -> float:
        if path is None:
            return record.time_s
        name = ".".join(path)
        value = lookup(payload, path)
        if value is ABSENT or value is None:
            raise BadInput("schema", f"field {name!r}: the event time is missing")
        seconds = _seconds(name, value, unit)
        if seconds > record.time_s + self.config.events.max_future_s:
            # One event dated 2099 would close every attribution window.
            raise BadInput("future", f"field {name!r}: more than events.max_future_s ahead of the record's timestamp")
        return seconds

    def _value(self, payload: Mapping[str, Any], path: Path, default: float | None) -> float | None:
        assert path is not None  # noqa: S101 - callers look first
        name, value = ".".join(path), lookup(payload, path)
        if value is ABSENT or value is None:
            return default
        if isinstance(value, bool) and self.config.task == "binary":
            return float(value)
        return self._in_range(name, number(name, value))

    def _also(self, payload: Mapping[str, Any]) -> tuple[float, ...]:
        found = (self._value(payload, path, default) for path, default in self.tasks)
        return tuple(math.nan if value is None else value for value in found)

    def _in_range(self, name: str, value: float) -> float:
        if not self.config.allows(value):
            most = 1 if self.config.task == "binary" else self.config.model.classes - 1
            raise BadInput("schema", f"field {name!r}: the label must be an integer from 0 to {most}")
        return value


def _seconds(name: str, value: Any, unit: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput("schema", f"field {name!r}: expected a number, not {kind_of(value)}")
    if not -1e15 <= value <= 1e15:  # false for NaN
        raise BadInput("non_finite", f"field {name!r}: not a time")
    return value / 1000.0 if unit == "ms" and not isinstance(value, Seconds) else float(value)


def _identity(payload: Mapping[str, Any], path: Path, origin: Origin) -> str:
    if path is None:
        return str(origin)
    name, value = ".".join(path), lookup(payload, path)
    if value is ABSENT or value is None or value == "":
        raise BadInput("schema", f"field {name!r}: the id is missing")
    return _short(f"field {name!r}: the id", category(name, value))


def _key(payload: Mapping[str, Any], path: Path, record: Record, identity: str) -> str:
    named = _text(payload, path, "the key")
    if named is not None:
        return named
    return _short("the record's key", record.key.decode("utf-8", "replace")) if record.key is not None else identity


def _text(payload: Mapping[str, Any], path: Path, what: str) -> str | None:
    """Of a field that may be absent."""
    if path is None:
        return None
    name, value = ".".join(path), lookup(payload, path)
    return None if value is ABSENT or value is None else _short(f"field {name!r}: {what}", category(name, value))


def _short(what: str, text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise BadInput("too_large", f"{what} has {len(text)} characters, at most are {MOST_CHARACTERS}")
    return text
