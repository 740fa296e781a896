"""Protobuf payloads: in the frame of a schema registry, or raw with a descriptor set from a file.

Behind the frame's schema id stands which message of the schema it is: the path of indexes through its nested messages,
as zigzag varints behind their number; a single 0 byte is short for the first message.

A message becomes an object of plain values, under the names of the .proto file:

- integers of any width are integers, bytes are base64, an enum is the name of its value (its number where it has none);
- a field that knows presence (optional, oneof, a message) and is not set is absent; any other has its default;
- repeated fields are lists, maps are objects whose keys are strings;
- Timestamp and Duration are numbers of seconds, whatever `time_unit` says; wrappers are what they wrap, Struct, Value
  and ListValue what they stand for; any other message is an object.

Not supported: schemas that a registry gives as .proto text only (it must know `?format=serialized`, as Confluent's
does), imports that are neither references nor part of Protobuf itself, indexes that are no zigzag varints (the format
of old Python clients), extensions. Protobuf has no end mark: a payload that is cut between two fields, or followed by
bytes that read as fields the schema lacks, can't be told from a good one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from google.protobuf import (
    any_pb2,
    api_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    message_factory,
    source_context_pb2,
    struct_pb2,
    timestamp_pb2,
    type_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError

from connectors import registry
from connectors.registry import Registry, Schema
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Seconds

KIND = "PROTOBUF"
_DATA = (any_pb2, duration_pb2, empty_pb2, field_mask_pb2, struct_pb2, timestamp_pb2, wrappers_pb2)
_ABOUT = (api_pb2, descriptor_pb2, source_context_pb2, type_pb2)
_WELL_KNOWN = {module.DESCRIPTOR.name: module.DESCRIPTOR for module in (*_DATA, *_ABOUT)}
_UNUSABLE = (TypeError, ValueError, KeyError, DecodeError)


class Protobuf:
    """Reads messages by schema id, or one message of a descriptor set; writes predictions.

    Args:
        source: Where schemas are; without it payloads are raw, of `message`.
        message: The class of what is written, and of raw payloads.
        schema_id: Of its schema in the registry; None for raw payloads.

    Raises:
        BadInput: `undecodable`; the text names the fault, never what stands in the payload.
        ConnectorError: the registry is away or refuses us, or can't give a schema that we can read.
    """

    def __init__(self, source: Registry | None = None, message: Any = None, schema_id: int | None = None) -> None:
        self._source = source
        self._message = message
        self._schema_id = schema_id
        self._files: dict[int, Any] = {}
        self._classes: dict[tuple[int, tuple[int, ...]], Any] = {}

    @classmethod
    def open(cls, config: Config, place: str) -> Self:
        if place == "predictions":
            return cls(
                Registry(config.registry, serialized=True),
                predictions_message(config),
                registry.enrol(config, predictions_schema(config)),
            )
        payload = registry.payload_of(config, place)
        if payload.schema_file is None:
            return cls(Registry(config.registry, serialized=True))
        if payload.message is None:
            raise ConnectorError(f"{place}.codec.message: which message of {payload.schema_file}?")
        try:
            return cls(message=_from_set(payload.schema_file.read_bytes(), payload.message))
        except (OSError, *_UNUSABLE) as error:
            raise ConnectorError(f"{place}.codec.schema_file: {payload.schema_file}: {_text(error)}") from error

    @classmethod
    def check(cls, config: Config, place: str) -> Sequence[str]:
        payload = registry.payload_of(config, place)
        if payload.schema_file is not None:
            cls.open(config, place)
            return [f"protobuf, raw, {payload.message} by {payload.schema_file}"]
        return registry.check(config, KIND, predictions_schema(config) if place == "predictions" else None)

    def decode(self, value: bytes) -> Mapping[str, Any]:
        if self._source is None:
            return _read(self._message, value)
        number = registry.schema_id(value)
        indexes, start = _indexes(value, registry.HEADER)
        key = (number, indexes)
        if key not in self._classes:
            if number not in self._files:
                self._files[number] = self._file(self._source, number)
            self._classes[key] = _class_at(self._files[number], number, indexes)
        return _read(self._classes[key], value[start:])

    @staticmethod
    def _file(source: Registry, number: int) -> Any:
        schema = source.by_id(number)
        if schema.kind != KIND:
            raise BadInput("undecodable", f"schema id {number} is of kind {schema.kind}, expected {KIND}")
        parts = {**source.references(schema), f"schema-{number}": schema}
        files = []
        for name, each in parts.items():
            try:
                file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(each.text, validate=True))
            except (binascii.Error, ValueError, DecodeError):
                raise ConnectorError(
                    f"registry {source.url}: schema id {number}: {name} comes as text; it must know ?format=serialized"
                ) from None
            file.name = name  # what imports it, calls it so
            files.append(file)
        try:
            return _pool(files).FindFileByName(f"schema-{number}")
        except _UNUSABLE as error:
            raise BadInput("undecodable", f"schema id {number} can't be used: {_text(error)}") from None

    def encode(self, value: Mapping[str, Any]) -> bytes:
        """Raises ValueError or TypeError when `value` doesn't fit the message."""
        body = self._message(**value).SerializeToString(deterministic=True)
        return body if self._schema_id is None else registry.framed(self._schema_id, b"\x00" + body)


def _indexes(value: bytes, at: int) -> tuple[tuple[int, ...], int]:
    """The path of indexes, and where the message begins."""
    count, at = _zigzag(value, at)
    if count == 0:
        return (0,), at
    if not 0 < count <= len(value) - at:  # each takes a byte
        raise BadInput("undecodable", "the payload ends within the message indexes")
    indexes = []
    for _ in range(count):
        index, at = _zigzag(value, at)
        indexes.append(index)
    return tuple(indexes), at


def _zigzag(value: bytes, at: int) -> tuple[int, int]:
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(value):
            break
        byte = value[at]
        at += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (found >> 1) ^ -(found & 1), at
    raise BadInput("undecodable", "the payload ends within the message indexes")


def _class_at(file: Any, number: int, indexes: tuple[int, ...]) -> Any:
    within, found = list(file.message_types_by_name.values()), None
    for index in indexes:
        if not 0 <= index < len(within) or within[index].GetOptions().map_entry:
            raise BadInput("undecodable", f"schema id {number} has no message at these indexes")
        found = within[index]
        within = list(found.nested_types)
    return message_factory.GetMessageClass(found)


def _pool(files: Iterable[Any]) -> Any:
    """A pool of these files and what they import of Protobuf's own. Raises one of _UNUSABLE."""
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: Any) -> None:
        for name in file.dependency:
            if name not in added and name in _WELL_KNOWN:
                own = descriptor_pb2.FileDescriptorProto()
                _WELL_KNOWN[name].CopyToProto(own)
                add(own)
        if file.name not in added:
            added.add(file.name)
            pool.AddSerializedFile(file.SerializeToString())

    for file in files:
        add(file)
    return pool


def _from_set(raw: bytes, message: str) -> Any:
    pool = _pool(descriptor_pb2.FileDescriptorSet.FromString(raw).file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(message))


def _text(error: BaseException) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _read(message: Any, value: bytes) -> Mapping[str, Any]:
    try:
        return _plain(message.FromString(value))
    except DecodeError:
        raise BadInput("undecodable", f"not a {message.DESCRIPTOR.full_name}, or cut short") from None


def _plain(message: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            made[field.name] = _several(field, getattr(message, field.name))
        elif not field.has_presence or message.HasField(field.name):
            made[field.name] = _one(field, getattr(message, field.name))
    return made


def _several(field: Any, values: Any) -> Any:
    if field.message_type is None or not field.message_type.GetOptions().map_entry:
        return [_one(field, value) for value in values]
    inner = field.message_type.fields_by_name["value"]
    return {_key(key): _one(inner, values[key]) for key in values}


def _key(key: Any) -> str:
    return ("true" if key else "false") if isinstance(key, bool) else str(key)


def _one(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _message(field.message_type.full_name, value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return named.name if named else value
    return base64.b64encode(value).decode() if field.type == FieldDescriptor.TYPE_BYTES else value


def _message(name: str, value: Any) -> Any:
    if not name.startswith("google.protobuf."):
        return _plain(value)
    if name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
        seconds = (value.seconds * 10**9 + value.nanos) / 10**9
        return Seconds(seconds) if name.endswith("Timestamp") else seconds
    if name in ("google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue"):
        return _json(value)
    if value.DESCRIPTOR.file.name == "google/protobuf/wrappers.proto":
        return _one(value.DESCRIPTOR.fields_by_name["value"], value.value)
    return _plain(value)


def _json(value: Any) -> Any:
    """What a Struct, Value or ListValue stands for; NaN and infinity pass, as in any other number."""
    if value.DESCRIPTOR.name == "Struct":
        return {key: _json(value.fields[key]) for key in value.fields}
    if value.DESCRIPTOR.name == "ListValue":
        return [_json(each) for each in value.values]
    kind = value.WhichOneof("kind")
    if kind in (None, "null_value"):
        return None
    inner = getattr(value, kind)
    return _json(inner) if kind in ("struct_value", "list_value") else inner


_FIELDS = {
    "id": ("string", 1, "of the event"),
    "score": ("double", 2, "a probability or a value; repeated for multiclass: one for each class"),
    "version": ("int64", 3, "of the weights: how many examples they have learned from"),
    "time": ("double", 4, "of the event, in seconds"),
    "input": ("string", 5, "origin of the event, input:partition:offset; unique"),
    "class": ("int32", 6, "multiclass: the class that leads"),
}


def predictions_schema(config: Config) -> Schema:
    """Of what `streamcl.messages.prediction_message` sends: the same fields as its JSON."""
    lines = ['syntax = "proto3";', "package streamcl;", "", "message Prediction {"]
    for name, kind, number, repeated in _fields(config):
        lines.append(f"  {'repeated ' if repeated else ''}{kind} {name} = {number}; // {_FIELDS[name][2]}")
    return Schema(KIND, "\n".join([*lines, "}", ""]))


def predictions_message(config: Config) -> Any:
    """The class of that message."""
    file = descriptor_pb2.FileDescriptorProto(name="streamcl/prediction.proto", package="streamcl", syntax="proto3")
    message = file.message_type.add(name="Prediction")
    for name, kind, number, repeated in _fields(config):
        field = message.field.add(name=name, json_name=name, number=number)
        field.type = getattr(FieldDescriptor, f"TYPE_{kind.upper()}")
        field.label = FieldDescriptor.LABEL_REPEATED if repeated else FieldDescriptor.LABEL_OPTIONAL
    return message_factory.GetMessageClass(_pool([file]).FindMessageTypeByName("streamcl.Prediction"))


def _fields(config: Config) -> list[tuple[str, str, int, bool]]:
    several = config.task == "multiclass"
    return [
        (name, kind, number, several and name == "score")
        for name, (kind, number, _) in _FIELDS.items()
        if several or name != "class"
    ]
