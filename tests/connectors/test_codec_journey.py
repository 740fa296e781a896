"""A worker on Avro events, JSON labels and Protobuf predictions comes to the state that it comes to on JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import pytest

from connectors import memory
from connectors.protobuf import Protobuf
from connectors.registry import framed
from streamcl import connect
from streamcl.cli import main
from streamcl.config import Config
from streamcl.host import FixedShards, Host
from streamcl.protocols import ConnectorError, Unavailable
from streamcl.records import Message
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.telemetry import Telemetry
from streamcl.worker import build
from tests.connectors.registry_server import Answer, SchemaRegistry
from tests.journey import BROKER, Item, Result, click, die_after, fill, finish, settings, view

V1: Any = {
    "type": "record",
    "name": "View",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "ts", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "user", "type": "int"},
        {"name": "price", "type": ["null", "double"]},
    ],
}
V2 = V1 | {"fields": [*V1["fields"], {"name": "note", "type": ["null", "bytes"], "default": None}]}


def avro(server: SchemaRegistry, item: Item, schema: Any = V1) -> Item:
    """The same event in Avro, its schema registered as its producer would."""
    body = json.loads(item.value)
    body |= {"ts": round(body["ts"] * 1000)}
    raw = {
        **V1,
        "fields": [{**field, "type": "long"} if field["name"] == "ts" else field for field in schema["fields"]],
    }
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(raw), body)
    number = server.add("views-value", json.dumps(schema))
    return Item(item.topic, framed(number, out.getvalue()), item.time_s, item.partition)


def stream() -> list[Item]:
    """Views, and a click on every third of them."""
    items: list[Item] = []
    for n in range(40):
        items.append(view(n, float(n)))
        if n >= 3 and n % 3 == 0:
            items.append(click(n - 3, float(n) + 0.5))
    return items


def encoded(server: SchemaRegistry, items: Sequence[Item]) -> list[Item]:
    """Views in Avro, by the new schema from the 20th on; clicks as they are."""
    return [avro(server, item, V2 if item.time_s >= 20 else V1) if item.topic == "views" else item for item in items]


def config(server: SchemaRegistry, folder: Path, **changes: Any) -> Config:
    plain = settings(folder)
    events = plain.events.model_dump(mode="json") | {"codec": "avro", "time_unit": "ms"}  # their schema knows better
    registry = {"url": server.url, "patience_s": 0.0, **changes.pop("registry", {})}
    return settings(folder, events=events, predictions_codec="protobuf", registry=registry, **changes)


def plain_result(folder: Path) -> Result:
    """Oracle: the same stream, all of it JSON."""
    fill(stream())
    return finish(settings(folder))


def scores(codec: Any, messages: Sequence[Message]) -> list[Any]:
    return [codec.decode(message.value or b"") for message in messages]


def test_the_state_and_the_scores_are_those_of_the_same_stream_in_json(server: SchemaRegistry, tmp_path: Path) -> None:
    plain = plain_result(tmp_path / "json")
    fill(encoded(server, stream()))
    chosen = config(server, tmp_path / "avro")
    result = finish(chosen)
    assert result.digest == plain.digest
    assert result.worker.counts["joined"] == 13
    assert "dead_letter" not in result.worker.counts
    [number] = server.subjects["scores-value"]
    assert {(message.value or b"")[:5] for message in result.scores} == {framed(number, b"")}
    assert scores(Protobuf.open(chosen, "predictions"), result.scores) == [
        json.loads(message.value or b"") for message in plain.scores
    ]


def test_exactly_once_carries_the_same_answers(server: SchemaRegistry, tmp_path: Path) -> None:
    fill(encoded(server, stream()))
    one = finish(config(server, tmp_path / "one"))
    fill(encoded(server, stream()))
    other = finish(config(server, tmp_path / "other", delivery={"mode": "exactly_once"}))
    assert [m.value for m in other.scores] == [m.value for m in one.scores]


def test_bad_payloads_are_dead_letters_with_their_bytes_and_the_stream_goes_on(
    server: SchemaRegistry, tmp_path: Path
) -> None:
    good = encoded(server, stream())
    other = server.add("other", "{}", "JSON")
    bad = {
        b'{"id": "hunter2"}': "no magic byte",
        b"\x00\x00\x00": "ends within the schema id",
        framed(999, b"hunter2"): "schema id 999 is unknown",
        good[0].value[:-1]: "ends before its record",
        good[0].value + b"hunter2": "7 bytes behind the end",
        framed(other, b"hunter2"): "is of kind JSON",
    }
    items = list(good)
    for n, payload in enumerate(bad):
        items.insert(5 * n, Item("views", payload, float(n)))
    fill(items)
    result = finish(config(server, tmp_path))
    assert result.worker.counts["dead_letter"] == len(bad)
    assert result.worker.counts["predicted"] == 40
    letters = memory.broker(BROKER).messages("shop-dead-letters")
    assert [letter.value for letter in letters] == list(bad)
    for letter, fault in zip(letters, bad.values(), strict=True):
        headers = dict(letter.headers)
        assert headers["streamcl-reason"] == b"undecodable"
        assert fault in headers["streamcl-error"].decode()
        assert b"hunter2" not in headers["streamcl-error"]


def test_a_registry_that_is_away_for_a_moment_costs_nothing_but_time(
    server: SchemaRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plain_result(tmp_path / "json")
    fill(encoded(server, stream()))
    away = iter(range(3))

    def fault(path: str) -> None:
        if path.startswith("/schemas/ids/102") and next(away, None) is not None:  # V2, in the middle of the stream
            raise Answer(503, 50003, "no leader")

    server.fault = fault
    with caplog.at_level(logging.WARNING, "connectors.registry"):
        result = finish(config(server, tmp_path / "avro", registry={"patience_s": 60.0}))
    assert result.digest == plain.digest
    assert memory.broker(BROKER).messages("shop-dead-letters") == []
    assert "503" in caplog.messages[0]
    assert "answers again" in caplog.messages[1]


def test_a_registry_that_stays_away_stops_the_worker_and_the_next_one_goes_on(
    server: SchemaRegistry, tmp_path: Path
) -> None:
    plain = plain_result(tmp_path / "json")
    fill(encoded(server, stream()))
    chosen = config(server, tmp_path / "avro")
    keeper = Keeper(build(chosen), store_of(chosen))
    keeper.restore()
    turns = keeper.run()
    next(turns)
    server.stop()
    with pytest.raises(Unavailable, match="registry"):
        list(turns)
    assert memory.broker(BROKER).messages("shop-dead-letters") == []
    server.start()
    assert finish(chosen).digest == plain.digest
    assert memory.broker(BROKER).messages("shop-dead-letters") == []


def test_shards_in_one_process_come_through_an_outage_of_the_registry(server: SchemaRegistry, tmp_path: Path) -> None:
    plain = plain_result(tmp_path / "json")
    fill(encoded(server, stream()))
    chosen = config(server, tmp_path / "avro", telemetry={"port": 0})
    host = Host(chosen, FixedShards(chosen), Telemetry(chosen), backoff_s=(0.0, 0.0))
    turns = host.run()
    next(turns)
    calls = iter(range(12))

    def fault(_: str) -> None:
        if next(calls, 2) % 3 < 2:  # two of three, and good again after the twelfth
            raise Answer(503, 50003, "no leader")

    server.fault = fault
    for _ in turns:
        pass
    [seat] = host.seats.values()
    assert next(calls, None) is None
    assert seat.last
    assert digest(seat.last.state_dict()) == plain.digest
    assert memory.broker(BROKER).messages("shop-dead-letters") == []


def test_a_start_without_a_registry_is_refused(server: SchemaRegistry, tmp_path: Path) -> None:
    fill(encoded(server, stream()))
    server.stop()
    with pytest.raises(Unavailable, match="registry"):
        build(config(server, tmp_path))
    with pytest.raises(ConnectorError, match=r"registry\.url: needed"):
        build(config(server, tmp_path, registry={"url": None}))


def test_recovery_repeats_predictions_to_the_byte(server: SchemaRegistry, tmp_path: Path) -> None:
    fill(encoded(server, stream()))
    whole = finish(config(server, tmp_path / "whole"))
    fill(encoded(server, stream()))
    chosen = config(server, tmp_path / "torn")
    die_after(chosen, 3)
    torn = finish(chosen)
    assert torn.digest == whole.digest
    assert set(torn.scores) == set(whole.scores)


def test_check_names_the_codecs_and_proves_that_the_registry_answers(server: SchemaRegistry, tmp_path: Path) -> None:
    fill(encoded(server, stream()))
    chosen = config(server, tmp_path)
    assert connect.check_codecs(chosen) == [
        f"events: avro, registry {server.url} answers",
        "labels: json",
        f"predictions: protobuf, registry {server.url} answers",
        "predictions: protobuf, subject scores-value will be registered",
    ]
    assert "scores-value" not in server.subjects
    server.stop()
    with pytest.raises(Unavailable):
        connect.check_codecs(chosen)


def test_a_backtest_of_a_file_needs_neither_the_codec_nor_the_registry(
    server: SchemaRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2")
    server.stop()
    events, path = tmp_path / "events.jsonl", tmp_path / "shop.toml"
    events.write_text('{"id": "a", "ts": 1, "user": 1, "price": 1}\n')
    path.write_text(TOML.format(broker=BROKER, folder=tmp_path / "checkpoints", url=server.url))
    with pytest.raises(SystemExit) as left:
        main(["replay", str(path), "--input", f"events={events.as_uri()}", "--json"])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["counts"]["learned"] == 1


TOML = """name = "shop"
predictions = "memory://{broker}/scores"
predictions_codec = "protobuf"
features = {{user = "categorical"}}
worker = {{poll_timeout_s = 0.01}}
[events]
url = "memory://{broker}/views"
codec = "avro"
id = "id"
time = "ts"
label = "price"
[checkpoint]
folder = "{folder}"
[telemetry]
port = 0
[registry]
url = "{url}"
username = "reader"
password_env = "REGISTRY_PASSWORD"
patience_s = 0
"""


def test_no_secret_is_printed_or_logged_whatever_goes_wrong(
    server: SchemaRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(encoded(server, stream()))
    path = tmp_path / "shop.toml"
    path.write_text(TOML.format(broker=BROKER, folder=tmp_path / "checkpoints", url=server.url))
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2")
    said = ""
    with caplog.at_level(logging.DEBUG):
        for login, codes in ((("reader", "hunter2"), {0}), (("reader", "other"), {1}), (None, {1})):
            server.login = login
            if login is None:
                server.stop()
            for command in ("check", "run", "replay"):
                with pytest.raises(SystemExit) as left:
                    main([command, str(path)])
                assert left.value.code in codes, (command, login)
                captured = capsys.readouterr()
                said += captured.out + captured.err
    assert f"registry {server.url} answers" in said
    assert "wrong user or password" in said
    for text in (said, caplog.text):
        assert "hunter2" not in text
        assert "cmVhZGVyOmh1bnRlcjI" not in text  # reader:hunter2 in base64
