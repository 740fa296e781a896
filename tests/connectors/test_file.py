"""Files keep the connectors' contracts through torn lines, broken archives, full disks and a second writer."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from connectors import file
from connectors.codec import opened
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Fenced
from streamcl.records import Message, Order, Record, Run, Stream
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.testing import check_control_log, check_sink, check_source
from streamcl.worker import build

EVENTS = Stream("events", 0)
ORDER = Order((Run(EVENTS, 3),), {EVENTS: 3})


def config(events: Path, labels: Path | None = None, /, **changes: Any) -> Config:
    data: dict[str, Any] = {
        "name": "app",
        "events": {"url": events.as_uri(), "id": "id", "time": "t", "label": "y"},
        "features": {"a": "categorical"},
        "checkpoint": {"folder": str(events.parent / "state")},
    }
    if labels:
        data["labels"] = {"url": labels.as_uri(), "time": "at", "time_unit": "ms"}
    return Config.parse({**data, **changes})


def source(events: Path, labels: Path | None = None, /, **changes: Any) -> file.FileSource:
    settings = config(events, labels, **changes)
    return file.open_source(settings.inputs, settings)


def lines(path: Path, *rows: object) -> Path:
    content = b"".join((row if isinstance(row, bytes) else orjson.dumps(row)) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def events_and_labels(folder: Path) -> tuple[Path, Path]:
    events = lines(folder / "events.jsonl", *({"id": str(n), "t": n} for n in range(6)))
    labels = folder / "labels.csv.gz"
    labels.write_bytes(gzip.compress(b"id,at\n0,1500\n1,1000\n2,9000\n"))
    return events, labels


def places(records: Sequence[Record]) -> list[str]:
    return [str(record.origin) for record in records]


def test_a_source_of_two_files_keeps_the_contract(tmp_path: Path) -> None:
    events, labels = events_and_labels(tmp_path)
    check_source(lambda: source(events, labels), count=9)


def test_a_sink_keeps_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "made" / "out.jsonl"
    check_sink(lambda: file.FileSink(path), lambda: path.read_bytes().splitlines() if path.exists() else [])


def test_a_control_log_keeps_the_contract(tmp_path: Path) -> None:
    check_control_log(lambda: file.FileControlLog(tmp_path / "made" / "control.jsonl"))


def test_inputs_merge_by_the_times_that_the_config_names(tmp_path: Path) -> None:
    records = source(*events_and_labels(tmp_path)).poll(99, 0.0)
    assert places(records) == [
        *("events:0:0", "events:0:1", "labels:0:0", "labels:0:1"),
        *("events:0:2", "events:0:3", "events:0:4", "events:0:5", "labels:0:2"),
    ]
    assert [record.time_s for record in records[1:5]] == [1.0, 1.5, 1.0, 2.0]


def test_the_limit_never_changes_the_order(tmp_path: Path) -> None:
    events, labels = events_and_labels(tmp_path)
    whole = source(events, labels).poll(99, 0.0)
    for limit in (1, 2, 5):
        again = source(events, labels)
        found: list[Record] = []
        while polled := again.poll(limit, 0.0):
            found += polled
        assert found == whole


@pytest.mark.parametrize(
    "row", [b"{", b"", b"[1]", b'{"t": null}', b'{"t": "5"}', b'{"t": true}', b'{"x": 1}', b"\xff"]
)
def test_a_row_without_a_time_has_its_number_as_time_and_its_bytes_as_value(tmp_path: Path, row: bytes) -> None:
    records = source(lines(tmp_path / "e.jsonl", {"t": 100}, row)).poll(9, 0.0)
    assert [record.time_s for record in records] == [100.0, 1.0]
    assert records[1].value == row


def test_time_stands_where_a_dotted_path_leads(tmp_path: Path) -> None:
    path = lines(tmp_path / "e.jsonl", {"meta": {"t": 2500}})
    events = {"url": path.as_uri(), "time": "meta.t", "time_unit": "ms", "label": "y"}
    assert source(path, events=events).poll(1, 0.0)[0].time_s == 2.5


def test_a_csv_row_is_a_json_object_and_a_ragged_one_keeps_its_number(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes(b"id,t,a\nx,5,007\ny,6\nz,7,\n")
    records = source(path).poll(9, 0.0)
    assert [record.value for record in records] == [
        b'{"id":"x","t":5,"a":"007"}',
        b'["y","6"]',
        b'{"id":"z","t":7,"a":null}',
    ]
    assert places(records)[1] == "events:0:1"


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match=r"gone.jsonl: row 0: No such file"):
        source(tmp_path / "gone.jsonl")


def test_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").mkdir()
    with pytest.raises(ConnectorError, match=r"e.jsonl: row 0: Is a directory"):
        source(tmp_path / "e.jsonl")


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_a_broken_archive_delivers_what_is_before_the_fault_and_then_only_the_error(
    tmp_path: Path, damage: str
) -> None:
    path = lines(tmp_path / "e.jsonl.gz", *({"id": os.urandom(40).hex(), "t": n} for n in range(2000)))
    whole = bytearray(path.read_bytes())
    if damage == "truncated":
        del whole[len(whole) // 2 :]
    else:
        whole[-6] ^= 1  # the checksum behind the data
    path.write_bytes(whole)
    reading, found = source(path), 0
    with pytest.raises(ConnectorError, match=r"e.jsonl.gz: row \d+: ") as caught:
        while polled := reading.poll(300, 0.0):
            found += len(polled)
    assert f"row {found}:" in str(caught.value)
    assert found > 500
    for call in (lambda: reading.poll(1, 0.0), reading.exhausted, reading.lag):
        with pytest.raises(ConnectorError, match=f"row {found}"):
            call()
    reading.seek({})
    assert len(reading.poll(5, 0.0)) == 5


def test_what_is_no_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl.gz"
    path.write_bytes(b'{"t":1}\n')
    with pytest.raises(ConnectorError, match=r"e.jsonl.gz: row 0: Not a gzipped file"):
        source(path).poll(1, 0.0)


@pytest.mark.parametrize("offset", [3, -1])
def test_a_position_outside_the_file_is_an_error_and_no_silent_end(tmp_path: Path, offset: int) -> None:
    reading = source(lines(tmp_path / "e.jsonl", {}, {}))
    for call in (lambda: reading.seek({EVENTS: offset}), lambda: reading.poll(1, 0.0), reading.exhausted):
        with pytest.raises(ConnectorError, match=rf"e.jsonl: position {offset} is"):
            call()


def test_a_file_is_partition_zero_alone(tmp_path: Path) -> None:
    path = lines(tmp_path / "e.jsonl", {})
    with pytest.raises(ConnectorError, match="not in this shard"):
        source(path).poll(1, 0.0, Stream("events", 1))
    with pytest.raises(ConnectorError, match="shard 1 of 2 has none"):
        source(path, shard={"index": 1, "count": 2})


def test_a_star_stands_for_the_partitions_and_each_shard_reads_its_own(tmp_path: Path) -> None:
    for partition in (0, 1, 2, 10):
        lines(tmp_path / f"e-{partition}.jsonl", {"id": f"{partition}-0", "t": 5 - partition}, {"t": 20})
    lines(tmp_path / "other-3.jsonl", {})
    pattern = tmp_path / "e-*.jsonl"
    reading = source(pattern, shard={"index": 0, "count": 2})
    assert [*reading.streams()] == [Stream("events", each) for each in (0, 2, 10)]
    taken = [record.origin for record in reading.poll(9, 0.0)]
    assert [(each.partition, each.offset) for each in taken] == [(10, 0), (2, 0), (0, 0), (0, 1), (2, 1), (10, 1)]
    assert [*source(pattern, shard={"index": 1, "count": 2}).streams()] == [Stream("events", 1)]
    check_source(lambda: source(pattern), 8)


@pytest.mark.parametrize(
    ("name", "said"),
    [("e-x.jsonl", "'x' is no number of a partition"), ("e-01.jsonl", "there twice"), ("e-².jsonl", "no number")],
)
def test_what_stands_for_a_star_is_one_number(tmp_path: Path, name: str, said: str) -> None:
    lines(tmp_path / "e-1.jsonl", {})
    lines(tmp_path / name, {})
    with pytest.raises(ConnectorError, match=said):
        source(tmp_path / "e-*.jsonl")


def test_a_star_without_files_or_two_of_them_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match="there is no such file"):
        source(tmp_path / "e-*.jsonl")
    with pytest.raises(ConnectorError, match=r"one \* in the name"):
        source(tmp_path / "*-*.jsonl")


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    settings = config(tmp_path / "e-*.jsonl", shard={"index": 1, "count": 2})
    with pytest.raises(ConnectorError, match="a file has one writer"):
        file.open_sink((tmp_path / "out.jsonl").as_uri(), settings)
    sink = file.open_sink((tmp_path / "out-*.jsonl").as_uri(), settings)
    assert sink.path == tmp_path / "out-1.jsonl"
    assert settings.dead_letters_url.endswith("app-dead-letters-1.jsonl")
    assert file.open_sink(settings.dead_letters_url, settings).path.name == "app-dead-letters-1.jsonl"


def test_what_has_the_shard_in_its_name_needs_no_other_and_what_shards_share_does(tmp_path: Path) -> None:
    shared = {name: (tmp_path / f"{name}.jsonl").as_uri() for name in ("outcomes", "dead_letters")}
    settings = config(tmp_path / "e-*.jsonl", shard={"index": 1, "count": 2}, **shared)
    assert file.open_sink(settings.outcomes_url or "", settings).path.name == "outcomes.jsonl-1"
    with pytest.raises(ConnectorError, match="a file has one writer"):
        file.open_sink(settings.dead_letters_url, settings)


def test_reading_does_not_hold_the_file_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        for _ in range(64):
            out.write((b'{"t":1,"pad":"' + b"x" * 1000 + b'"}\n') * 1000)
    process = multiprocessing.get_context("spawn").Process(target=_read_within, args=(path, 32 << 20))
    process.start()
    process.join()
    assert process.exitcode == 0


def _read_within(path: Path, most: int) -> None:
    import resource

    reading = source(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while reading.poll(500, 0.0):
        pass
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///data/e.jsonl", "/data/e.jsonl"),
        ("file://localhost/data/e.jsonl", "/data/e.jsonl"),
        ("file://data/e.jsonl", "data/e.jsonl"),
        ("file:data/e.jsonl", "data/e.jsonl"),
        ("file://e.jsonl", "e.jsonl"),
        ("file:///a%20b/%C3%BC.jsonl", "/a b/ü.jsonl"),
    ],
)
def test_a_url_may_be_absolute_or_relative(url: str, path: str) -> None:
    assert file.path_of(url) == Path(path)


@pytest.mark.parametrize("url", ["file://", "file:///", "memory://a/b", "e.jsonl"])
def test_a_url_of_another_form_is_an_error(url: str) -> None:
    with pytest.raises(ConnectorError, match="file:///path/to/file"):
        file.path_of(url)


def test_predictions_are_plain_and_what_is_no_object_is_enveloped(tmp_path: Path) -> None:
    sink = file.FileSink(tmp_path / "out.jsonl")
    strange = [Message(value, b"k", (("h", b"\xff"),), 2.0) for value in (b"\xff", b"[1]", None, b"")]
    sink.send([Message(b'{"score": 0.5}', key=b"k"), *strange])
    sink.flush()
    plain, *rest = (tmp_path / "out.jsonl").read_bytes().splitlines()
    assert plain == b'{"score": 0.5}'
    assert [opened(line) for line in rest] == strange


def test_dead_letters_are_enveloped_even_when_they_are_objects(tmp_path: Path) -> None:
    settings = config(lines(tmp_path / "e.jsonl", {}))
    sink = file.open_sink(settings.dead_letters_url, settings)
    letter = Message(b'{"id": "x"}', None, (("reason", b"schema"),), 1.0)
    sink.send([letter])
    sink.flush()
    assert [opened(line) for line in (tmp_path / "state" / "app-dead-letters.jsonl").read_bytes().splitlines()] == [
        letter
    ]


def test_nothing_is_written_before_the_flush_and_a_close_without_one_loses_it(tmp_path: Path) -> None:
    sink = file.FileSink(tmp_path / "out.jsonl")
    sink.send([Message(b"{}")])
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    sink.close()
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"score"', b"x" * 200_000, b'{"a":1}'])
@pytest.mark.parametrize("before", [b"", b'{"n":1}\n'])
def test_a_torn_last_line_is_cut_off_when_the_sink_opens_again(tmp_path: Path, before: bytes, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(before + torn)
    sink = file.FileSink(path)
    sink.send([Message(b'{"n":2}')])
    sink.flush()
    assert path.read_bytes() == before + b'{"n":2}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_keeps_what_was_sent() -> None:
    sink = file.FileSink(Path("/dev/full"))
    sink.send([Message(b"{}")])
    for _ in range(2):
        with pytest.raises(ConnectorError, match=r"/dev/full: No space left"):
            sink.flush()


def test_a_write_that_fails_in_the_middle_leaves_whole_lines_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    sink = file.FileSink(path)
    sink.send([Message(b'{"n":1}')])
    sink.flush()
    sink.send([Message(b'{"n":2}')])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _no_space)
        with pytest.raises(ConnectorError, match=r"out.jsonl: No space left"):
            sink.flush()
        assert path.read_bytes() == b'{"n":1}\n'
    sink.flush()
    assert path.read_bytes() == b'{"n":1}\n{"n":2}\n'


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    for opening in (file.FileSink, lambda path: file.FileControlLog(path).open()):
        with pytest.raises(ConnectorError, match=r"taken/out.jsonl: (Not a directory|File exists)"):
            opening(tmp_path / "taken" / "out.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConnectorError, match=r"out.jsonl: Permission denied"):
        file.FileSink(tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["out.jsonl.gz", "out.csv"])
def test_outputs_are_json_lines_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConnectorError, match="outputs are JSON lines"):
        file.FileSink(tmp_path / name)


@pytest.mark.parametrize("torn", [b'{"runs":[["ev', b'{"runs":[],"position":{}}'])
def test_a_torn_last_order_is_neither_read_nor_kept(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "control.jsonl"
    first = file.FileControlLog(path)
    first.open()
    end = first.append(ORDER)
    first.close()
    with path.open("ab") as out:
        out.write(torn)
    second = file.FileControlLog(path)
    assert list(second.read(0)) == [(end, ORDER)]
    second.open()
    second.append(ORDER)
    assert [order for _, order in second.read(0)] == [ORDER, ORDER]


def test_an_order_in_the_middle_that_is_none_is_an_error_at_its_byte(tmp_path: Path) -> None:
    path = lines(tmp_path / "control.jsonl", ORDER.to_json(), b"x", ORDER.to_json())
    read = file.FileControlLog(path).read(0)
    next(read)
    with pytest.raises(ConnectorError, match=r"control.jsonl: no control record ends at byte \d+"):
        next(read)


def test_an_offset_behind_the_log_is_an_error(tmp_path: Path) -> None:
    log = file.FileControlLog(tmp_path / "control.jsonl")
    with pytest.raises(ConnectorError, match="no offset 5 in the control log"):
        log.read(5)
    assert list(log.read(0)) == []
    with pytest.raises(ConnectorError, match="append before open"):
        log.append(ORDER)


def test_reading_ends_where_the_log_ended_when_it_was_asked_for(tmp_path: Path) -> None:
    log = file.FileControlLog(tmp_path / "control.jsonl")
    log.open()
    log.append(ORDER)
    read = log.read(0)
    log.append(ORDER)
    assert len(list(read)) == 1


def test_another_process_fences_this_one(tmp_path: Path) -> None:
    log = file.FileControlLog(tmp_path / "control.jsonl")
    log.open()
    log.append(ORDER)
    process = multiprocessing.get_context("spawn").Process(target=_take_over, args=(log.path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    with pytest.raises(Fenced, match=r"control.jsonl: another worker"):
        log.append(ORDER)
    assert len(list(log.read(0))) == 2


def _take_over(path: Path) -> None:
    log = file.FileControlLog(path)
    log.open()
    log.append(ORDER)


def test_a_failed_append_leaves_the_log_whole_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = file.FileControlLog(tmp_path / "control.jsonl")
    log.open()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _no_space)
        with pytest.raises(ConnectorError, match=r"control.jsonl: No space left"):
            log.append(ORDER)
    assert list(log.read(0)) == []
    log.append(ORDER)
    assert len(list(log.read(0))) == 1


def test_check_reads_inputs_and_makes_nothing(tmp_path: Path) -> None:
    settings = config(*events_and_labels(tmp_path))
    found = file.check([settings.events.url, settings.dead_letters_url], settings)
    assert found[0].endswith("its first row can be read")
    assert found[1].endswith("app-dead-letters.jsonl: will be made")
    assert not (tmp_path / "state").exists()


def test_check_says_when_row_numbers_would_be_merged_with_times(tmp_path: Path) -> None:
    events, labels = events_and_labels(tmp_path)
    settings = config(events, labels, labels={"url": labels.as_uri()})
    assert "row numbers will be merged with times" in file.check([], settings)[-1]


def test_check_refuses_an_empty_csv_and_an_output_below_a_file(tmp_path: Path) -> None:
    empty = tmp_path / "e.csv"
    empty.write_bytes(b"")
    with pytest.raises(ConnectorError, match="must name the columns"):
        file.check([], config(empty))
    path = lines(tmp_path / "e.jsonl", {})
    with pytest.raises(ConnectorError, match="read-only or no folder"):
        file.check([path.as_uri() + "/out.jsonl"], config(path))


def test_a_worker_on_files_that_is_killed_comes_to_the_same_state_and_answers(tmp_path: Path) -> None:
    rows: list[object] = [{"id": str(n), "t": n, "a": n % 5} for n in range(60)]
    rows[7] = b'{"torn'
    events = lines(tmp_path / "e.jsonl.gz", *rows)
    labels = tmp_path / "l.csv"
    labels.write_text("id,at,label\n" + "".join(f"{n},{1000 * n + 2500},1\n" for n in range(0, 60, 3)) + "9,ragged\n")
    whole = run_to_the_end(tmp_path / "a", events, labels, kills=[])
    assert (len(whole[1]), whole[2]) == (59, 2)
    assert run_to_the_end(tmp_path / "b", events, labels, kills=[3, 1, 8]) == whole


def run_to_the_end(folder: Path, events: Path, labels: Path, kills: Sequence[int]) -> tuple[str, set[bytes], int]:
    """The end state's digest, the answers, and the number of different dead letters, after dying as often as asked."""
    out = folder / "scores.jsonl"
    settings = config(
        events,
        labels,
        events={"url": events.as_uri(), "id": "id", "time": "t"},
        predictions=out.as_uri(),
        checkpoint={"folder": str(folder), "every_events": 20},
        worker={"max_records": 4},
    )
    for turns in [*kills, 1000]:
        worker = build(settings)
        keeper = Keeper(worker, store_of(settings))
        keeper.restore()
        for _, _turn in zip(range(turns), keeper.run(), strict=False):
            pass
        reached = digest(worker.state_dict())
        with out.open("ab") as torn:
            torn.write(b'{"torn')
    letters = set((folder / "app-dead-letters.jsonl").read_bytes().splitlines())
    return reached, set(out.read_bytes().splitlines()[:-1]), len(letters)
