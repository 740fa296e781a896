"""Protobuf messages become plain values by their writer's schema, and what is no such message has a reason."""

from __future__ import annotations

import base64
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.codec import JSON
from connectors.protobuf import Protobuf, predictions_message, predictions_schema
from connectors.registry import Registry, framed
from streamcl.messages import prediction_message
from streamcl.protocols import BadInput, ConnectorError, Seconds
from streamcl.records import EVENTS
from streamcl.services import Registry as Settings
from tests.connectors.binary_codec import configured, prediction, refusal
from tests.connectors.registry_server import SchemaRegistry, descriptors

MONEY = """syntax = "proto3"; package shop;
message Money { int64 units = 1; sint32 nanos = 2; }
"""
VIEW = """syntax = "proto3"; package shop;
import "shop/money.proto";
import "google/protobuf/timestamp.proto";
import "google/protobuf/duration.proto";
import "google/protobuf/wrappers.proto";
import "google/protobuf/struct.proto";
enum Colour { NONE = 0; RED = 1; }
message Other { int32 n = 1; }
message View {
  message Place { message Deep { string name = 1; } Deep deep = 1; }
  string id = 1;
  uint64 big = 2;
  optional int32 maybe = 3;
  repeated string tags = 4;
  map<string, int64> counts = 5;
  map<int32, Money> by_number = 6;
  map<bool, bytes> by_flag = 7;
  oneof which { string text = 8; double amount = 9; }
  Colour colour = 10;
  bytes raw = 11;
  Money price = 12;
  bool flag = 13;
  float small = 14;
  google.protobuf.Timestamp at = 15;
  google.protobuf.Duration lasts = 16;
  google.protobuf.Int64Value wrapped = 17;
  google.protobuf.Struct free = 18;
  View inner = 19;
  repeated Colour colours = 20;
  google.protobuf.BytesValue wrapped_raw = 21;
}
"""
FILES = {"shop/money.proto": MONEY, "main.proto": VIEW}
EMPTY = {"id": "", "big": 0, "tags": [], "counts": {}, "by_number": {}, "by_flag": {}, "colour": "NONE", "raw": ""}
EMPTY |= {"flag": False, "small": 0.0, "colours": []}


def compiled(files: dict[str, str], message: str) -> Any:
    pool = descriptor_pool.DescriptorPool()
    for file in descriptors(files).file:
        pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(message))


View = compiled(FILES, "shop.View")
config = partial(configured, "protobuf")


def views(server: SchemaRegistry) -> int:
    """The id of VIEW, registered with its reference."""
    server.add("money", MONEY, "PROTOBUF")
    reference = {"name": "shop/money.proto", "subject": "money", "version": 1}
    return server.add("views-value", VIEW, "PROTOBUF", [reference])


def reads(**fields: Any) -> dict[str, Any]:
    """What is not as in an empty message."""
    found = Protobuf(message=View).decode(View(**fields).SerializeToString())
    json.dumps(found)
    return {name: value for name, value in found.items() if name not in EMPTY or EMPTY[name] != value}


def test_fields_that_are_not_set_are_absent_or_have_their_default() -> None:
    assert Protobuf(message=View).decode(b"") == EMPTY
    assert reads(maybe=0, text="", price={}) == {"maybe": 0, "text": "", "price": {"units": 0, "nanos": 0}}


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({"id": "é"}, {"id": "é"}),
        ({"big": 2**64 - 1}, {"big": 2**64 - 1}),
        ({"price": {"units": -(2**63), "nanos": -1}}, {"price": {"units": -(2**63), "nanos": -1}}),
        ({"tags": ["a", ""]}, {"tags": ["a", ""]}),
        ({"counts": {"a": 2**40}}, {"counts": {"a": 2**40}}),
        ({"by_flag": {True: b"\xff", False: b""}}, {"by_flag": {"true": "/w==", "false": ""}}),
        ({"amount": 0.1}, {"amount": 0.1}),
        ({"colour": 1, "colours": [0, 1]}, {"colour": "RED", "colours": ["NONE", "RED"]}),
        ({"colour": 7}, {"colour": 7}),
        ({"raw": b"\xff\x00"}, {"raw": "/wA="}),
        ({"small": 0.5, "flag": True}, {"small": 0.5, "flag": True}),
        ({"at": {"seconds": 1_700_000_000, "nanos": 123_000_000}}, {"at": 1_700_000_000.123}),
        ({"lasts": {"seconds": -1, "nanos": -500_000_000}}, {"lasts": -1.5}),
        ({"wrapped": {"value": 2**60}}, {"wrapped": 2**60}),
        ({"wrapped_raw": {"value": b"z"}}, {"wrapped_raw": "eg=="}),
        ({"inner": {"inner": {"id": "x"}}}, {"inner": {**EMPTY, "inner": {**EMPTY, "id": "x"}}}),
    ],
)
def test_every_type_has_a_plain_value(fields: Any, plain: Any) -> None:
    assert reads(**fields) == plain


def test_keys_of_maps_are_strings_and_structs_are_what_they_stand_for() -> None:
    message = View()
    message.by_number[-3].units = 9
    free = {"a": [1.5, "x", True, None, {"b": []}]}
    json_format.ParseDict(free, message.free)
    found = Protobuf(message=View).decode(message.SerializeToString())
    assert found["by_number"] == {"-3": {"units": 9, "nanos": 0}}
    assert found["free"] == free


def test_a_timestamp_knows_its_unit_and_a_duration_is_a_number() -> None:
    found = reads(at={"seconds": 1, "nanos": 500_000_000}, lasts={"seconds": 1})
    assert (type(found["at"]), type(found["lasts"])) == (Seconds, float)


def test_nan_passes_to_where_features_are_read() -> None:
    assert math.isnan(reads(amount=math.nan)["amount"])


_int64 = st.integers(-(2**63), 2**63 - 1)
_fields = st.fixed_dictionaries(
    {},
    optional={
        "id": st.text(),
        "big": st.integers(0, 2**64 - 1),
        "maybe": st.integers(-(2**31), 2**31 - 1),
        "tags": st.lists(st.text(), max_size=3),
        "counts": st.dictionaries(st.text(), _int64, max_size=3),
        "text": st.text(),
        "colour": st.integers(0, 1),
        "raw": st.binary(),
        "price": st.fixed_dictionaries({"units": _int64}),
        "flag": st.booleans(),
        "small": st.floats(width=32, allow_nan=False, allow_infinity=False),
        "colours": st.lists(st.integers(0, 1), max_size=3),
    },
)


@settings(max_examples=150, deadline=None)
@given(fields=_fields)
def test_plain_values_are_those_of_protobufs_own_json(fields: dict[str, Any]) -> None:
    """Protobuf's JSON differs in two ways: it writes 64 bits as strings, and rounds 32-bit floats to be short."""
    message = View(**fields)
    oracle = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    oracle |= {"big": int(oracle["big"]), "small": message.small}
    oracle["counts"] = {name: int(value) for name, value in oracle["counts"].items()}
    if "price" in oracle:
        oracle["price"]["units"] = int(oracle["price"]["units"])
    assert Protobuf(message=View).decode(message.SerializeToString()) == oracle


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_bad_input(payload: bytes) -> None:
    try:
        json.dumps(Protobuf(message=View).decode(payload))
    except BadInput as error:
        assert error.reason == "undecodable"


def test_a_fault_names_itself_and_never_what_stands_there() -> None:
    codec, good = Protobuf(message=View), View(id="hunter2").SerializeToString()
    for payload in (good[:-1], good + b"\x00", good.replace(b"hunter2", b"hunter\xff"), b"\x0a\xff\xff\xff\xff\x07"):
        assert refusal(codec, payload) == "not a shop.View, or cut short"


def test_messages_within_messages_without_end_are_bad_input() -> None:
    payload = b""
    for _ in range(3000):
        payload = b"\x9a\x01" + _varint(len(payload)) + payload  # field 19, a message
    assert "cut short" in refusal(Protobuf(message=View), payload)


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*made, number])


def zigzag(*numbers: int) -> bytes:
    return b"".join(_varint(number * 2 if number >= 0 else -number * 2 - 1) for number in numbers)


DEEP = compiled(FILES, "shop.View.Place.Deep")
OTHER = compiled(FILES, "shop.Other")


@pytest.mark.parametrize(
    ("indexes", "body", "plain"),
    [
        (b"\x00", OTHER(n=300), {"n": 300}),
        (zigzag(1, 0), OTHER(n=300), {"n": 300}),
        (zigzag(1, 1), View(id="x"), {**EMPTY, "id": "x"}),
        (zigzag(3, 1, 0, 0), DEEP(name="x"), {"name": "x"}),
    ],
)
def test_the_indexes_lead_to_the_message(server: SchemaRegistry, indexes: bytes, body: Any, plain: Any) -> None:
    number = views(server)
    codec = Protobuf.open(config(server.url), EVENTS)
    for _ in range(2):
        assert codec.decode(framed(number, indexes + body.SerializeToString())) == plain
    assert len(server.asked) == 3  # the schema, the version of its reference, and that


@pytest.mark.parametrize(
    ("indexes", "fault"),
    [
        (b"", "ends within the message indexes"),
        (b"\x80", "ends within the message indexes"),
        (b"\xff" * 12, "ends within the message indexes"),
        (zigzag(2, 1), "ends within the message indexes"),
        (zigzag(-1), "ends within the message indexes"),
        (zigzag(2**60), "ends within the message indexes"),
        (zigzag(1, 2), "no message at these indexes"),
        (zigzag(1, -1), "no message at these indexes"),
        (zigzag(2, 0, 0), "no message at these indexes"),
        (zigzag(2, 1, 1), "no message at these indexes"),  # an entry of a map
        (zigzag(1, 2**40), "no message at these indexes"),
    ],
)
def test_indexes_that_lead_nowhere_are_bad_input(server: SchemaRegistry, indexes: bytes, fault: str) -> None:
    assert fault in refusal(Protobuf.open(config(server.url), EVENTS), framed(views(server), indexes))


def test_a_schema_of_another_kind_is_bad_input(server: SchemaRegistry) -> None:
    number = server.add("s", "{}")
    text = refusal(Protobuf.open(config(server.url), EVENTS), framed(number, b"\x00"))
    assert text == f"schema id {number} is of kind AVRO, expected PROTOBUF"


def test_a_schema_that_lacks_what_it_imports_is_bad_input(server: SchemaRegistry) -> None:
    file = descriptors(FILES).file[-1]
    number = server.add("s", base64.b64encode(file.SerializeToString()).decode(), "PROTOBUF")
    text = refusal(Protobuf.open(config(server.url), EVENTS), framed(number, b"\x00"))
    assert f"schema id {number} can't be used: " in text
    assert "shop/money.proto" in text


def test_a_registry_that_gives_text_alone_is_not_the_payloads_fault(server: SchemaRegistry) -> None:
    number = views(server)
    server.text_only = True
    with pytest.raises(ConnectorError, match=rf"schema id {number}: .* comes as text.*format=serialized"):
        Protobuf(Registry(Settings(url=server.url), serialized=True)).decode(framed(number, b"\x00"))


def test_raw_payloads_are_read_by_a_local_descriptor_set(tmp_path: Path) -> None:
    path = tmp_path / "shop.desc"
    path.write_bytes(descriptors(FILES).SerializeToString())
    codec = {"kind": "protobuf", "schema_file": path, "message": "shop.Other"}
    assert Protobuf.open(config(codec=codec), EVENTS).decode(b"\x08\x05") == {"n": 5}
    assert Protobuf.check(config(codec=codec), EVENTS) == [f"protobuf, raw, shop.Other by {path}"]
    codec["message"] = "shop.Nothing"
    with pytest.raises(ConnectorError, match=r"events\.codec\.schema_file: .*shop\.desc: .*shop\.Nothing"):
        Protobuf.open(config(codec=codec), EVENTS)
    with pytest.raises(ConnectorError, match=r"events\.codec\.message: which message of .*shop\.desc"):
        Protobuf.open(config(codec={"kind": "protobuf", "schema_file": path}), EVENTS)
    for content in (b"\xff", b"", None):
        path.write_bytes(content) if content is not None else path.unlink()
        with pytest.raises(ConnectorError, match=r"events\.codec\.schema_file: .*shop\.desc"):
            Protobuf.open(config(codec=codec), EVENTS)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_the_predictions_class_is_what_protoc_makes_of_their_schema(task: str) -> None:
    ours = predictions_message(config(task=task)).DESCRIPTOR
    theirs = compiled({"main.proto": predictions_schema(config(task=task)).text}, "streamcl.Prediction").DESCRIPTOR

    def shape(descriptor: Any) -> list[tuple[Any, ...]]:
        return [(f.name, f.number, f.type, f.is_repeated, f.has_presence, f.is_packed) for f in descriptor.fields]

    assert shape(ours) == shape(theirs)


@pytest.mark.parametrize(
    ("task", "served"), [("binary", [0.1]), ("regression", [-7.5]), ("multiclass", [0.1, 0.7, 0.2])]
)
def test_predictions_hold_the_fields_of_their_json(server: SchemaRegistry, task: str, served: list[float]) -> None:
    codec = Protobuf.open(config(server.url, task), "predictions")
    plain = json.loads(prediction_message(prediction(*served), JSON()).value or b"")
    value = prediction_message(prediction(*served), codec).value or b""
    [number] = server.subjects["scores-value"]
    assert value[:6] == framed(number, b"\x00")
    theirs = compiled({"main.proto": server.schemas[number]["schema"]}, "streamcl.Prediction").FromString(value[6:])
    assert theirs.score == plain["score"]
    assert codec.decode(value) == plain
    assert prediction_message(prediction(*served), codec).value == value


@settings(max_examples=50, deadline=None)
@given(id=st.text(), time_s=st.floats(-1e15, 1e15), score=st.floats(0, 1, width=32))
def test_every_prediction_makes_the_round_trip(id: str, time_s: float, score: float) -> None:
    codec = Protobuf(message=predictions_message(config()))
    body = {"id": id, "score": score, "version": 2**40, "time": time_s, "input": "events:0:1"}
    assert codec.decode(codec.encode(body)) == body


def test_confluents_own_client_writes_what_we_read_and_reads_what_we_write(server: SchemaRegistry) -> None:
    why = "confluent-kafka's schema registry client is not installed: pip install 'confluent-kafka[protobuf]'"
    theirs = pytest.importorskip("confluent_kafka.schema_registry.protobuf", reason=why, exc_type=ImportError)
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.serialization import MessageField, SerializationContext

    client, settings_ = SchemaRegistryClient({"url": server.url}), config(server.url)
    codec, context = Protobuf.open(settings_, EVENTS), SerializationContext("views", MessageField.VALUE)
    sent: list[tuple[Any, dict[str, Any]]] = [(View, {"id": "x"}), (OTHER, {"n": 3}), (DEEP, {"name": "z"})]
    for message, fields in sent:
        found = codec.decode(theirs.ProtobufSerializer(message, client)(message(**fields), context))
        assert {name: found[name] for name in fields} == fields
    assert sorted(server.subjects)[-1] == "views-value"

    body = {"id": "e", "score": 0.25, "version": 3, "time": 1.5, "input": "events:0:1"}
    answer = Protobuf.open(settings_, "predictions").encode(body)
    [number] = server.subjects["scores-value"]
    ours = compiled({"main.proto": server.schemas[number]["schema"]}, "streamcl.Prediction")
    read = theirs.ProtobufDeserializer(ours, {}, client)(answer, SerializationContext("scores", MessageField.VALUE))
    assert {name: getattr(read, name) for name in body} == body
