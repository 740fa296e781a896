"""Connectors and codecs are found by scheme and name, and what is missing is explained."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path

import pytest

import connectors.memory
from connectors.avro import Avro
from connectors.codec import JSON
from connectors.file import FileControlLog, FileSink
from connectors.protobuf import Protobuf
from streamcl import connect
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Format


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    connectors.memory.reset("connect")
    yield
    connectors.memory.reset("connect")


def config(**changes: object) -> Config:
    data: dict[str, object] = {
        "name": "app",
        "events": {"url": "memory://connect/events", "label": "y"},
        "features": {"a": "categorical"},
    }
    return Config.parse({**data, **changes})


def register(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    made = EntryPoints(EntryPoint(name, value, connect.CONNECTORS) for name, value in points.items())
    monkeypatch.setattr(connect, "entry_points", lambda **wanted: made.select(**wanted))


def test_a_connector_is_found_by_the_scheme() -> None:
    assert connect.connector("memory://a/b") is connectors.memory


def test_json_is_the_codec_unless_another_is_named() -> None:
    assert all(isinstance(codec, JSON) for codec in connect.codecs(config()))
    assert connect.check_codecs(config()) == ["events: json", "labels: json", "predictions: json"]
    for codecs in (("thrift", "json"), ("json", "thrift")):
        stations = {
            name: {"url": f"memory://connect/{name}", "id": "id", "label": "y", "codec": codec}
            for name, codec in zip(("events", "labels"), codecs, strict=True)
        }
        for ask in (connect.codecs, connect.check_codecs):
            with pytest.raises(ConnectorError, match=r"no codec 'thrift'; known: avro, json"):
                ask(config(**stations))


def test_the_codecs_that_are_registered_are_of_one_form() -> None:
    formats: dict[str, Format] = {"avro": Avro, "json": JSON, "protobuf": Protobuf}
    assert {point.name: point.load() for point in entry_points(group=connect.CODECS)} == formats


def test_the_predictions_codec_is_looked_for_only_where_there_are_predictions() -> None:
    assert connect.codecs(config(predictions_codec="thrift"))
    with pytest.raises(ConnectorError, match="no codec 'thrift'"):
        connect.codecs(config(predictions_codec="thrift", predictions="memory://connect/scores"))


@pytest.mark.parametrize("url", ["nope://a/b", "file2:///a"])
def test_an_unknown_scheme_lists_the_known_ones(url: str) -> None:
    with pytest.raises(ConnectorError, match=r"no connector for the scheme '\w+'; known: file, kafka, memory"):
        connect.connector(url)


def test_a_path_is_no_url() -> None:
    with pytest.raises(ConnectorError, match=r"'events.jsonl' is no URL: it needs a scheme, one of file, "):
        connect.connector("events.jsonl")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, pulsar="no_such_package.pulsar")
    with pytest.raises(ConnectorError, match=r"'pulsar' \(no_such_package.pulsar\) can't be imported: .*installed\?"):
        connect.connector("pulsar://a/b")


def test_without_any_registration_the_installation_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    with pytest.raises(ConnectorError, match="none: streamcl is not installed"):
        connect.connector("kafka://a/b")


def test_a_config_opens_its_source_sink_and_control_log() -> None:
    broker = connectors.memory.broker("connect")
    broker.produce("events", b"{}")
    settings = config(predictions="memory://connect/scores")
    assert len(connect.open_source(settings).poll(9, 0.0)) == 1
    connect.open_sink("memory://connect/scores", settings)
    connect.open_control(settings).open()
    assert broker.topics() == {"app-control": 1, "events": 1, "scores": 1}


def test_outputs_may_go_elsewhere_than_inputs_come_from(tmp_path: Path) -> None:
    settings = config(control=(tmp_path / "control.jsonl").as_uri())
    assert isinstance(connect.open_control(settings), FileControlLog)
    assert isinstance(connect.open_sink((tmp_path / "out.jsonl").as_uri(), settings), FileSink)
