"""Avro records become plain values by their writer's schema, and what is no such record has a reason."""

from __future__ import annotations

import base64
import io
import json
import math
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.avro import Avro, predictions_schema
from connectors.registry import Registry, framed
from streamcl.protocols import BadInput, ConnectorError, Seconds
from streamcl.records import EVENTS
from streamcl.services import Registry as Settings
from tests.connectors.binary_codec import configured, prediction, refusal
from tests.connectors.registry_server import SchemaRegistry

Schema = Any
config = partial(configured, "avro")


def record(**fields: Schema) -> dict[str, Schema]:
    return {"type": "record", "name": "R", "fields": [{"name": name, "type": kind} for name, kind in fields.items()]}


def written(schema: Schema, value: Any) -> bytes:
    """By fastavro, from raw values: what a logical type does is left to the reader."""
    body = io.BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(_bare(schema)), value)
    return body.getvalue()


def _bare(schema: Schema) -> Schema:
    if isinstance(schema, list):
        return [_bare(each) for each in schema]
    if isinstance(schema, dict):
        return {name: _bare(each) for name, each in schema.items() if name != "logicalType"}
    return schema


def reads(schema: Schema, value: Any) -> Any:
    return Avro(schema=json.dumps(record(x=schema))).decode(written(record(x=schema), {"x": value}))["x"]


def logical(kind: str, logical_type: str, **more: Any) -> Schema:
    return {"type": kind, "logicalType": logical_type, **more}


FIXED = {"type": "fixed", "name": "F", "size": 2}


@pytest.mark.parametrize(
    ("schema", "raw", "plain"),
    [
        ("null", None, None),
        ("boolean", True, True),
        ("int", -5, -5),
        ("long", 2**62, 2**62),
        ("double", 0.1, 0.1),
        ("string", "é\u0000", "é\u0000"),
        ("bytes", b"\xff\x00", "/wA="),
        ({"type": "bytes"}, b"\xff\x00", "/wA="),
        (FIXED, b"\x01\x02", "AQI="),
        ({"type": "enum", "name": "E", "symbols": ["RED", "BLUE"]}, "BLUE", "BLUE"),
        ({"type": "array", "items": "bytes"}, [b"a", b""], ["YQ==", ""]),
        ({"type": "map", "values": ["null", "int"]}, {"a": 1, "b": None}, {"a": 1, "b": None}),
        (["null", "string", "bytes"], b"a", "YQ=="),
        ({"type": "record", "name": "I", "fields": [{"name": "n", "type": "int"}]}, {"n": 1}, {"n": 1}),
        (logical("int", "date"), 19_000, 19_000),
        (logical("int", "time-millis"), 1500, 1.5),
        (logical("long", "time-micros"), 1_500_000, 1.5),
        (logical("long", "timestamp-millis"), 1_700_000_000_123, Seconds(1_700_000_000.123)),
        (logical("long", "timestamp-micros"), 1_700_000_000_123_456, Seconds(1_700_000_000.123456)),
        (logical("long", "timestamp-nanos"), 1_500_000_000, Seconds(1.5)),
        (logical("long", "local-timestamp-millis"), -1500, Seconds(-1.5)),
        (logical("long", "timestamp-millis"), 2**63 - 1, Seconds((2**63 - 1) / 1000)),
        (["null", logical("long", "timestamp-millis")], 1500, Seconds(1.5)),
        (logical("string", "uuid"), "not checked", "not checked"),
        (logical("fixed", "uuid", name="F", size=16), bytes(range(16)), str(UUID(bytes=bytes(range(16))))),
        (logical("bytes", "decimal", precision=9, scale=2), b"\xfb\x2e", -12.34),
        (logical("bytes", "decimal", precision=9), b"\x07", 7.0),
        (logical("bytes", "decimal", precision=9, scale=2), b"", 0.0),
        (logical("fixed", "decimal", precision=4, scale=1, name="F", size=2), b"\x00\x0f", 1.5),
        (logical("fixed", "duration", name="F", size=12), bytes(12), "AAAAAAAAAAAAAAAA"),
        (logical("string", "made-up"), "x", "x"),
    ],
)
def test_every_type_has_a_plain_value(schema: Schema, raw: Any, plain: Any) -> None:
    found = reads(schema, raw)
    assert found == plain
    assert type(found) is type(plain)
    json.dumps(found)


def test_nan_and_infinity_pass_to_where_features_are_read() -> None:
    assert math.isnan(reads("double", math.nan))
    assert reads("float", -math.inf) == -math.inf


class Case(NamedTuple):
    """A schema, a raw value to write, and what must come back."""

    schema: Schema
    raw: Any
    plain: Any


def _cases() -> st.SearchStrategy[Case]:
    longs = st.integers(-(2**63), 2**63 - 1)
    unscaled = st.integers(-(2**70), 2**70)
    leaves = st.one_of(
        st.booleans().map(lambda v: Case("boolean", v, v)),
        longs.map(lambda v: Case("long", v, v)),
        st.floats(allow_nan=False).map(lambda v: Case("double", v, v)),
        st.text().map(lambda v: Case("string", v, v)),
        st.binary().map(lambda v: Case("bytes", v, base64.b64encode(v).decode())),
        longs.map(lambda v: Case(logical("long", "timestamp-micros"), v, float(Decimal(v) / 10**6))),
        st.tuples(unscaled, st.integers(0, 20)).map(lambda pair: _decimal(*pair)),
    )
    return st.recursive(leaves, _containers, max_leaves=8) | _optional(leaves) | st.just(Case("null", None, None))


def _optional(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    """Of what is no union itself."""
    return inner.map(lambda case: Case(["null", case.schema], case.raw, case.plain))


def _decimal(unscaled: int, scale: int) -> Case:
    raw = unscaled.to_bytes(10, "big", signed=True)
    schema = logical("bytes", "decimal", precision=40, scale=scale)
    return Case(schema, raw, float(Decimal(unscaled).scaleb(-scale)))


def _containers(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    inner |= _optional(inner)
    return st.one_of(
        st.tuples(inner, st.integers(0, 3)).map(
            lambda p: Case({"type": "array", "items": p[0].schema}, [p[0].raw] * p[1], [p[0].plain] * p[1])
        ),
        st.tuples(inner, st.text(max_size=3)).map(
            lambda p: Case({"type": "map", "values": p[0].schema}, {p[1]: p[0].raw}, {p[1]: p[0].plain})
        ),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(_cases(), min_size=1, max_size=5))
def test_what_another_writer_wrote_reads_as_plain_values(cases: list[Case]) -> None:
    fields = {f"f{n}": case for n, case in enumerate(cases)}
    schema = record(**{name: case.schema for name, case in fields.items()})
    payload = written(schema, {name: case.raw for name, case in fields.items()})
    codec = Avro(schema=json.dumps(schema))
    found = codec.decode(payload)
    assert found == {name: case.plain for name, case in fields.items()}
    json.dumps(found)
    refusal(codec, payload + b"\x00")
    for end in range(len(payload)):
        refusal(codec, payload[:end])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_raise_anything_but_bad_input(payload: bytes) -> None:
    schema = record(
        a=["null", "string", "bytes"],
        b={"type": "array", "items": ["int", logical("long", "timestamp-millis")]},
        c={"type": "map", "values": logical("bytes", "decimal", precision=9, scale=2)},
        d={"type": "enum", "name": "E", "symbols": ["A"]},
    )
    try:
        found = Avro(schema=json.dumps(schema)).decode(payload)
    except BadInput as error:
        assert error.reason == "undecodable"
    else:
        json.dumps(found)


def test_a_fault_names_itself_and_never_what_stands_there() -> None:
    codec = Avro(schema=json.dumps(record(a="string", b=["null", "int"])))
    good = written(record(a="string", b=["null", "int"]), {"a": "hunter2", "b": None})
    assert codec.decode(good) == {"a": "hunter2", "b": None}
    faults = {
        "the payload ends before its record does": good[:-1],
        "3 bytes behind the end of the record": good + b"abc",
        "not a record of its schema: IndexError": good[:-1] + b"\x08",
        "not a record of its schema: UnicodeDecodeError": good.replace(b"hunter2", b"hunter\xff"),
    }
    for fault, payload in faults.items():
        assert refusal(codec, payload) == fault


def test_a_payload_that_claims_to_be_huge_takes_no_memory() -> None:
    for schema in ("bytes", "string", {"type": "array", "items": "int"}, {"type": "map", "values": "int"}):
        codec = Avro(schema=json.dumps(record(x=schema)))
        refusal(codec, b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f")  # a length of 2^62 - 1
        refusal(codec, b"\xff" * 9 + b"\x01")  # of -2^63


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (record(next=["null", "R"]), "record R contains itself"),
        (record(next={"type": "array", "items": {"type": "map", "values": "R"}}), "record R contains itself"),
        (record(x={"type": "array", "items": "null"}), "items that take no bytes"),
        (record(x={"type": "array", "items": {"type": "record", "name": "E", "fields": []}}), "take no bytes"),
        (record(x={"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}), "take no bytes"),
        ("string", "the top level is no record"),
        (["null", record(a="int")], "the top level is no record"),
        (record(x="no.such.Type"), "no.such.Type"),
        ({"type": "record"}, "name"),
        ([1], ""),
    ],
)
def test_a_schema_that_could_kill_or_hang_the_worker_is_refused(
    server: SchemaRegistry, schema: Schema, fault: str, tmp_path: Path
) -> None:
    number = server.add("s", json.dumps(schema))
    text = refusal(Avro(Registry(Settings(url=server.url))), framed(number, bytes(8)))
    assert text.startswith(f"schema id {number} can't be used: ")
    assert fault in text
    (tmp_path / "s.avsc").write_text(json.dumps(schema))
    with pytest.raises(ConnectorError, match=r"events\.codec\.schema_file: .*s\.avsc: "):
        Avro.open(config(codec={"kind": "avro", "schema_file": tmp_path / "s.avsc"}), EVENTS)


def test_a_schema_may_name_one_type_often(server: SchemaRegistry) -> None:
    twice = record(a={"type": "fixed", "name": "F", "size": 1}, b="F", c={"type": "array", "items": "F"})
    nested: Schema = "int"
    for depth in range(40):  # 2^40 paths through 40 types
        first = {"type": "record", "name": f"N{depth}", "fields": [{"name": "x", "type": nested}]}
        nested = {"type": "record", "name": f"M{depth}", "fields": [{"name": "a", "type": first}]}
        nested["fields"].append({"name": "b", "type": f"N{depth}"})
    assert Avro(schema=json.dumps(twice)).decode(b"\x00\x01\x00") == {"a": "AA==", "b": "AQ==", "c": []}
    number = server.add("s", json.dumps(nested))
    assert "ends before" in refusal(Avro(Registry(Settings(url=server.url))), framed(number, b""))


def test_events_are_read_by_the_schema_that_each_names(server: SchemaRegistry) -> None:
    old, new = record(a="int"), record(a="long", b=["null", "string"])
    first, second = server.add("s", json.dumps(old)), server.add("s", json.dumps(new))
    codec = Avro.open(config(server.url), EVENTS)
    for _ in range(2):
        assert codec.decode(framed(first, written(old, {"a": 1}))) == {"a": 1}
        assert codec.decode(framed(second, written(new, {"a": 2, "b": "x"}))) == {"a": 2, "b": "x"}
    assert len(server.asked) == 2


def test_a_schema_may_refer_to_others_that_share_one(server: SchemaRegistry) -> None:
    def refers(*names: str) -> list[dict[str, Any]]:
        return [{"name": name, "subject": name, "version": 1} for name in names]

    def named(name: str, **fields: Schema) -> str:
        return json.dumps({**record(**fields), "name": name, "namespace": "shop"})

    server.add("shop.Money", named("Money", units=logical("bytes", "decimal", precision=9, scale=2)))
    server.add("shop.Item", named("Item", price="Money"), references=refers("shop.Money"))
    top = named("View", item="shop.Item", paid=["null", "shop.Money"], at=logical("long", "timestamp-millis"))
    number = server.add("views", top, references=refers("shop.Item", "shop.Money"))
    codec = Avro.open(config(server.url), EVENTS)
    money = b"\x04\x01\x2c"  # 3.00
    assert codec.decode(framed(number, money + b"\x02" + money + b"\xb8\x17")) == {
        "item": {"price": {"units": 3.0}},
        "paid": {"units": 3.0},
        "at": 1.5,
    }


def test_a_schema_of_another_kind_is_bad_input(server: SchemaRegistry) -> None:
    number = server.add("s", "{}", "JSON")
    text = refusal(Avro.open(config(server.url), EVENTS), framed(number, b"\x00"))
    assert text == f"schema id {number} is of kind JSON, expected AVRO"


def test_raw_payloads_are_read_by_a_local_schema(tmp_path: Path) -> None:
    schema = record(a="int", b="bytes")
    path = tmp_path / "event.avsc"
    path.write_text(json.dumps(schema))
    settings = config(codec={"kind": "avro", "schema_file": path})
    assert Avro.open(settings, EVENTS).decode(written(schema, {"a": 1, "b": b"z"})) == {"a": 1, "b": "eg=="}
    assert Avro.check(settings, EVENTS) == [f"avro, raw, by {path}"]
    path.unlink()
    with pytest.raises(ConnectorError, match=r"events\.codec\.schema_file: .*event\.avsc"):
        Avro.open(settings, EVENTS)


@pytest.mark.parametrize(
    ("task", "served"), [("binary", [0.1]), ("regression", [-7.5]), ("multiclass", [0.1, 0.7, 0.2])]
)
def test_predictions_hold_the_fields_of_their_json(server: SchemaRegistry, task: str, served: list[float]) -> None:
    from connectors.codec import JSON
    from streamcl.messages import prediction_message

    settings = config(server.url, task)
    codec = Avro.open(settings, "predictions")
    plain = json.loads(prediction_message(prediction(*served), JSON()).value or b"")
    value = prediction_message(prediction(*served), codec).value or b""
    [number] = server.subjects["scores-value"]
    assert value[:5] == framed(number, b"")
    assert (
        fastavro.schemaless_reader(io.BytesIO(value[5:]), json.loads(server.schemas[number]["schema"]), None) == plain
    )
    assert codec.decode(value) == plain
    assert prediction_message(prediction(*served), codec).value == value


@settings(max_examples=50, deadline=None)
@given(id=st.text(), time_s=st.floats(-1e15, 1e15), score=st.floats(0, 1, width=32))
def test_every_prediction_makes_the_round_trip(id: str, time_s: float, score: float) -> None:
    codec = Avro(schema=predictions_schema(config()).text)
    body = {"id": id, "score": score, "version": 2**40, "time": time_s, "input": "events:0:1"}
    assert codec.decode(codec.encode(body)) == body


def test_a_body_with_other_fields_than_the_schema_is_refused() -> None:
    codec = Avro(schema=predictions_schema(config()).text)
    body = {"id": "", "score": 0.5, "version": 1, "time": 0.0, "input": ""}
    for wrong in ({**body, "more": 1}, {name: each for name, each in body.items() if name != "time"}):
        with pytest.raises(ValueError, match=r"more|time"):
            codec.encode(wrong)


def test_confluents_own_client_writes_what_we_read_and_reads_what_we_write(server: SchemaRegistry) -> None:
    why = "confluent-kafka's schema registry client is not installed: pip install 'confluent-kafka[avro]'"
    theirs = pytest.importorskip("confluent_kafka.schema_registry.avro", reason=why, exc_type=ImportError)
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.serialization import MessageField, SerializationContext

    client = SchemaRegistryClient({"url": server.url})
    schema = record(a="long", b=["null", "string"], at=logical("long", "timestamp-millis"), raw="bytes")
    context = SerializationContext("views", MessageField.VALUE)
    payload = theirs.AvroSerializer(client, json.dumps(schema))({"a": 1, "b": "x", "at": 1500, "raw": b"z"}, context)
    settings = config(server.url)
    assert Avro.open(settings, EVENTS).decode(payload) == {"a": 1, "b": "x", "at": 1.5, "raw": "eg=="}
    assert list(server.subjects) == ["views-value"]

    body = {"id": "e", "score": 0.25, "version": 3, "time": 1.5, "input": "events:0:1"}
    sent = Avro.open(settings, "predictions").encode(body)
    context = SerializationContext("scores", MessageField.VALUE)
    assert theirs.AvroDeserializer(client)(sent, context) == body
