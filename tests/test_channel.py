"""Every carrier gives back the bytes it was given, whatever was torn, repeated or sent by somebody else."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.channel import FolderReader, Parts, is_topic, open_publisher, open_reader, parts, records_of
from streamcl.config import Config, ConfigError
from streamcl.protocols import ConnectorError
from streamcl.records import Delta, Origin, Record
from tests.journey import settings

SOME = effort(max_examples=100, deadline=None)


def config_for(url: str, folder: Path, **deltas: Any) -> Config:
    return settings(folder, deltas={"url": url, **deltas}, kafka={"max_request_bytes": 9000})


@pytest.fixture(params=["folder", "store", "topic"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on disk, a store that fsspec alone knows, and a topic."""
    name = uuid.uuid4().hex
    memory.reset("journey")
    return {
        "folder": (tmp_path / "deltas").as_uri(),
        "store": f"local://{tmp_path}/store/{name}",
        "topic": "memory://journey/deltas",
    }[str(request.param)]


DELTAS = [Delta(n, bytes([n]) * n * 1000) for n in (2, 4, 6, 8)]


def read(url: str, config: Config, records: int) -> list[bytes]:
    reader = open_reader(url, config)
    try:
        return list(reader.read(records))
    finally:
        reader.close()


def test_what_was_sent_is_read_from_any_point_on(url: str, tmp_path: Path) -> None:
    config = config_for(url, tmp_path)
    publisher = open_publisher(url, config)
    publisher.send(DELTAS[:1])
    publisher.send(DELTAS[1:])
    publisher.flush()
    for records in range(9):
        assert read(url, config, records) == [each.data for each in DELTAS if each.records > records]
    assert publisher.read()["deltas_sent"] == 4
    assert publisher.read()["deltas_sent_bytes"] == 20_000
    publisher.close()


def test_a_reader_goes_on_where_it_stopped_even_in_the_middle(url: str, tmp_path: Path) -> None:
    config = config_for(url, tmp_path)
    publisher, reader = open_publisher(url, config), None
    publisher.send(DELTAS[:3])
    publisher.flush()
    reader = open_reader(url, config)
    assert next(iter(reader.read(0))) == DELTAS[0].data
    assert next(iter(reader.read(2))) == DELTAS[1].data
    publisher.send(DELTAS[3:])
    publisher.flush()
    assert list(reader.read(4)) == [each.data for each in DELTAS[2:]]
    assert list(reader.read(8)) == []
    reader.close()
    publisher.close()


def test_what_a_recovered_worker_sends_again_is_read_as_often_or_once(url: str, tmp_path: Path) -> None:
    config = config_for(url, tmp_path)
    for sent in (DELTAS[:3], DELTAS[1:]):
        publisher = open_publisher(url, config)
        publisher.send(sent)
        publisher.flush()
        publisher.close()
    found = read(url, config, 2)
    assert [each for n, each in enumerate(found) if each not in found[:n]] == [each.data for each in DELTAS[1:]]


def test_before_anything_was_sent_a_folder_holds_nothing(tmp_path: Path) -> None:
    assert list(FolderReader((tmp_path / "none").as_uri()).read(0)) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_folder_keeps_what_a_snapshot_needs_and_no_more_than_it_may(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}/deltas"
    publisher = open_publisher(url, config_for(url, tmp_path, retain=3))
    publisher.send(DELTAS)
    publisher.flush()
    assert [int(path.stem) for path in sorted((tmp_path / "deltas").iterdir())] == [4, 6, 8]
    publisher.retain(6)
    publisher.flush()
    assert [int(path.stem) for path in sorted((tmp_path / "deltas").iterdir())] == [8]
    publisher.close()


def test_a_folder_that_cannot_be_written_costs_deltas_and_nothing_else(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "deltas").write_text("in the way")
    url = (tmp_path / "deltas").as_uri()
    publisher = open_publisher(url, config_for(url, tmp_path))
    publisher.send(DELTAS)
    publisher.retain(1)
    publisher.flush()
    assert publisher.read()["deltas_lost"] == 4
    assert [each.levelname for each in caplog.records if "no delta" in each.message] == ["WARNING"]
    publisher.close()


def test_a_folder_that_cannot_be_read_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = FolderReader((tmp_path / "deltas").as_uri())

    def away(*_: Any, **__: Any) -> Any:
        raise PermissionError("not yours")

    monkeypatch.setattr(reader._folder.files, "ls", away)
    with pytest.raises(ConnectorError, match="deltas: not yours"):
        list(reader.read(0))


def test_a_scheme_that_nobody_knows_is_the_config_s_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deltas\.url: nosuch://x/y"):
        open_publisher("nosuch://x/y", config_for("nosuch://x/y", tmp_path))
    assert is_topic("kafka://a:1/t") and not is_topic("file:///x") and not is_topic("s3://a/b")


def test_a_topic_of_several_partitions_is_refused(tmp_path: Path) -> None:
    memory.reset("journey")
    memory.broker("journey").create("deltas", 2)
    url = "memory://journey/deltas"
    with pytest.raises(ConnectorError, match="1 partition, not 2"):
        read(url, config_for(url, tmp_path), 0)


def test_a_topic_that_is_away_is_read_later_from_the_same_place(tmp_path: Path) -> None:
    url = "memory://journey/deltas"
    memory.reset("journey")
    config, broker = config_for(url, tmp_path), memory.broker("journey")
    publisher, reader = open_publisher(url, config), open_reader(url, config)
    publisher.send(DELTAS)
    publisher.flush()
    assert next(iter(reader.read(0))) == DELTAS[0].data
    broker.away = lambda _: True
    with pytest.raises(ConnectorError):
        while True:
            next(iter(reader.read(2)))
    broker.away = lambda _: False
    assert list(reader.read(4))[-1] == DELTAS[-1].data


def records(delta: Delta, most: int) -> list[Record]:
    return [
        Record(Origin("deltas", 0, n), "deltas", 0.0, message.value, message.key, message.headers)
        for n, message in enumerate(parts(delta, most))
    ]


@SOME
@given(st.binary(min_size=1, max_size=60), st.integers(1, 20), st.data())
def test_parts_are_put_together_whatever_was_torn_or_repeated(value: bytes, most: int, data: st.DataObject) -> None:
    """A worker dies behind some parts, as often as it likes; its producer may send some of them again."""
    whole = records(Delta(8, value), most)
    assert all(len(each.value or b"") <= most and records_of(each) == 8 for each in whole)
    gathered = Parts()
    for _ in range(data.draw(st.integers(0, 3))):
        for part in whole[: data.draw(st.integers(0, len(whole) - 1))]:
            assert gathered.add(part) is None
    found = []
    for at, part in enumerate(whole):
        back = data.draw(st.integers(max(at - 2, 1), at)) if at else at
        found += [gathered.add(each) for each in (*whole[back:at], part)]
    assert found.count(value) >= 1
    assert {each for each in found if each is not None} == {value}


def test_torn_deltas_take_no_more_room_than_a_few() -> None:
    gathered = Parts()
    for n in range(50):
        gathered.add(records(Delta(n, b"12345"), 2)[0])
    assert len(gathered._open) == 4


@pytest.mark.parametrize("headers", [(), (("streamcl-part", b"0/1"),), (("streamcl-records", b"x"),)])
def test_messages_of_something_else_are_passed_over(headers: Any) -> None:
    assert Parts().add(Record(Origin("deltas", 0, 0), "deltas", 0.0, b"", None, headers)) is None


def test_requests_too_small_for_a_part_are_refused(tmp_path: Path) -> None:
    url = "memory://journey/deltas"
    config = settings(tmp_path, deltas={"url": url}, kafka={"max_request_bytes": 5000})
    with pytest.raises(ConfigError, match="max_request_bytes"):
        open_publisher(url, config)
