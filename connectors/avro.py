"""Avro payloads: in the frame of a schema registry, or raw with a schema from a file.

A record becomes an object of plain values, by the schema that its writer used:

- timestamps (millis, micros, nanos; local ones too) and times of day are numbers of seconds, whatever `time_unit` says;
  a date is its number of days since 1970;
- a decimal is the nearest float, a uuid and an enum are strings, bytes and fixed are base64;
- a union is the value of its branch, a map an object; NaN and infinity pass, to be refused where a feature reads them.

Not supported: records that contain themselves (a few kilobytes of them overflow the stack of fastavro's compiled
reader, which kills the process), arrays of items that take no bytes (ten bytes can claim 2^62 of them), a top level
that is no record, and reading by another schema than the writer's.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast
from uuid import UUID

import fastavro
from fastavro.read import LOGICAL_READERS
from fastavro.schema import SchemaParseException

from connectors import registry
from connectors.registry import Registry, Schema
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Seconds

KIND = "AVRO"
_UNUSABLE = (SchemaParseException, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_FAULTS = (ValueError, IndexError, KeyError, TypeError, OverflowError, ArithmeticError, MemoryError, AttributeError)


class Avro:
    """Reads records by schema id, or by one schema from a file; writes predictions.

    Args:
        source: Where schemas are; without it payloads are raw, of `schema`.
        schema: What is written, and what raw payloads are read with.
        schema_id: Of `schema` in the registry; None for raw payloads.

    Raises:
        BadInput: `undecodable`; the text names the fault, never what stands in the payload.
        ConnectorError: the registry is away or refuses us.
    """

    def __init__(self, source: Registry | None = None, schema: str = "", schema_id: int | None = None) -> None:
        self._source = source
        self._raw: Any = _reader(Schema(KIND, schema), {}) if schema and source is None else None
        self._writer: Any = fastavro.parse_schema(json.loads(schema)) if schema else None
        self._schema_id = schema_id
        self._readers: dict[int, Any] = {}

    @classmethod
    def open(cls, config: Config, place: str) -> Self:
        if place == "predictions":
            schema = predictions_schema(config)
            return cls(Registry(config.registry), schema.text, registry.enrol(config, schema))
        path = registry.payload_of(config, place).schema_file
        if path is None:
            return cls(Registry(config.registry))
        try:
            return cls(schema=path.read_text(encoding="utf-8"))
        except (OSError, *_UNUSABLE) as error:
            raise ConnectorError(f"{place}.codec.schema_file: {path}: {error}") from error

    @classmethod
    def check(cls, config: Config, place: str) -> Sequence[str]:
        path = registry.payload_of(config, place).schema_file
        if path is not None:
            cls.open(config, place)
            return [f"avro, raw, by {path}"]
        return registry.check(config, KIND, predictions_schema(config) if place == "predictions" else None)

    def decode(self, value: bytes) -> Mapping[str, Any]:
        if self._source is None:
            return _read(self._raw, value, 0)
        number = registry.schema_id(value)
        if number not in self._readers:
            self._readers[number] = self._by_id(self._source, number)
        return _read(self._readers[number], value, registry.HEADER)

    @staticmethod
    def _by_id(source: Registry, number: int) -> Any:
        schema = source.by_id(number)
        if schema.kind != KIND:
            raise BadInput("undecodable", f"schema id {number} is of kind {schema.kind}, expected {KIND}")
        try:
            return _reader(schema, source.references(schema))
        except _UNUSABLE as error:
            raise BadInput("undecodable", f"schema id {number} can't be used: {error}") from None

    def encode(self, value: Mapping[str, Any]) -> bytes:
        """The fields of the schema, which all must be there. Raises ValueError when `value` doesn't fit it."""
        body = io.BytesIO()
        fastavro.schemaless_writer(body, self._writer, value, strict=True)
        return body.getvalue() if self._schema_id is None else registry.framed(self._schema_id, body.getvalue())


def _read(schema: Any, value: bytes, start: int) -> Mapping[str, Any]:
    body = io.BytesIO(value)
    body.seek(start)
    try:
        found = fastavro.schemaless_reader(body, schema, None)
    except EOFError:
        raise BadInput("undecodable", "the payload ends before its record does") from None
    except _FAULTS as error:
        # Its text may hold the payload.
        raise BadInput("undecodable", f"not a record of its schema: {type(error).__name__}") from None
    if left := len(value) - body.tell():
        raise BadInput("undecodable", f"{left} bytes behind the end of the record")
    return cast(dict[str, Any], found)  # the top level is a record


def _reader(schema: Schema, references: Mapping[str, Schema]) -> Any:
    """What fastavro reads with. Raises one of _UNUSABLE."""
    named: dict[str, Any] = {}
    for each in references.values():
        fastavro.parse_schema(_plain(json.loads(each.text)), named)
    parsed: Any = fastavro.parse_schema(_plain(json.loads(schema.text)), named)
    if not (isinstance(parsed, dict) and parsed.get("type") in ("record", "error")):
        raise ValueError("the top level is no record")
    _least_bytes(parsed, named, {})
    return parsed


def _plain(schema: Any) -> Any:
    """The schema, its logical types replaced by ours; a type that fastavro doesn't know is left alone by it."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return _plain({"type": "bytes"}) if schema == "bytes" else schema
    kind = schema.get("type")
    made = {name: each for name, each in schema.items() if name not in ("logicalType", "default")}
    if isinstance(kind, (dict, list)):
        return _plain(kind)
    if kind in ("record", "error"):
        fields = [{"name": f["name"], "type": _plain(f["type"])} for f in schema.get("fields", ())]
        return made | {"fields": fields}
    for inner in ("items", "values"):
        if inner in schema:
            made[inner] = _plain(schema[inner])
    logical = schema.get("logicalType")
    if f"{kind}-streamcl-{logical}" in _READERS:
        return made | {"logicalType": f"streamcl-{logical}"}
    return made | {"logicalType": "streamcl-plain"} if kind in ("bytes", "fixed") else made


def _least_bytes(schema: Any, named: Mapping[str, Any], known: dict[str, int | None]) -> int:
    """Of a value. Raises ValueError for what a short payload could kill or hang the process with.

    `known` holds the named types met so far; None is one that we are within.
    """
    if isinstance(schema, list):
        return 1 + min((_least_bytes(each, named, known) for each in schema), default=0)
    if isinstance(schema, str):
        if schema not in named:
            return int(schema != "null")
        schema = named[schema]
    kind = schema["type"]
    if kind in ("record", "error"):
        return _least_bytes_of_record(schema, named, known)
    if kind == "array" and not _least_bytes(schema["items"], named, known):
        raise ValueError("an array of items that take no bytes")
    if kind == "map":
        _least_bytes(schema["values"], named, known)
    return int(schema["size"]) if kind == "fixed" else int(kind != "null")


def _least_bytes_of_record(schema: Mapping[str, Any], named: Mapping[str, Any], known: dict[str, int | None]) -> int:
    name = schema["name"]
    if name not in known:
        known[name] = None
        known[name] = sum(_least_bytes(field["type"], named, known) for field in schema["fields"])
    if (found := known[name]) is None:
        raise ValueError(f"record {name} contains itself")
    return found


def _seconds(per_second: int) -> Callable[..., float]:
    def read(value: int, *_: Any) -> float:
        return value / per_second

    return read


def _timestamp(per_second: int) -> Callable[..., Seconds]:
    def read(value: int, *_: Any) -> Seconds:
        return Seconds(value / per_second)

    return read


def _decimal(value: bytes, schema: Mapping[str, Any], *_: Any) -> float:
    return float(int.from_bytes(value, "big", signed=True) / 10 ** int(schema.get("scale", 0)))


def _base64(value: bytes, *_: Any) -> str:
    return base64.b64encode(value).decode()


def _uuid(value: bytes, *_: Any) -> str:
    return str(UUID(bytes=value))


# fastavro's own way to add logical types: found by name, for the whole process, so the names are ours alone.
_READERS: dict[str, Callable[..., Any]] = {
    "int-streamcl-time-millis": _seconds(10**3),
    "long-streamcl-time-micros": _seconds(10**6),
    "bytes-streamcl-decimal": _decimal,
    "fixed-streamcl-decimal": _decimal,
    "fixed-streamcl-uuid": _uuid,
    "bytes-streamcl-plain": _base64,
    "fixed-streamcl-plain": _base64,
}
for _unit, _per_second in (("millis", 10**3), ("micros", 10**6), ("nanos", 10**9)):
    _READERS[f"long-streamcl-timestamp-{_unit}"] = _timestamp(_per_second)
    _READERS[f"long-streamcl-local-timestamp-{_unit}"] = _timestamp(_per_second)
LOGICAL_READERS.update(_READERS)


def predictions_schema(config: Config) -> Schema:
    """Of what `streamcl.messages.prediction_message` sends: the same fields as its JSON."""
    several = config.task == "multiclass"
    fields = [
        {"name": "id", "type": "string", "doc": "of the event"},
        {"name": "score", "type": {"type": "array", "items": "double"} if several else "double"},
        *([{"name": "class", "type": "int", "doc": "that leads"}] if several else []),
        {"name": "version", "type": "long", "doc": "of the weights: how many examples they have learned from"},
        {"name": "time", "type": "double", "doc": "of the event, in seconds"},
        {"name": "input", "type": "string", "doc": "origin of the event, input:partition:offset; unique"},
    ]
    return Schema(KIND, json.dumps({"type": "record", "name": "Prediction", "namespace": "streamcl", "fields": fields}))
