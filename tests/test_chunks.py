"""Large arrays are shared between snapshots; nothing that a snapshot names is ever deleted, or rotten unseen."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl import checkpoint, chunks, snapshot
from streamcl.checkpoint import Store
from streamcl.protocols import Fenced
from streamcl.snapshot import CheckpointError, Damaged
from streamcl.state import digest
from tests.test_checkpoint import crash, failing


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, for arrays of 128 or more."""
    monkeypatch.setattr(snapshot, "CHUNKED_BYTES", 128)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)


def state(rows: int = 40) -> dict[str, Any]:
    return {"table": torch.arange(float(rows)), "small": torch.ones(2), "n": 1}


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "chunks").iterdir()}


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    store, learned = Store(tmp_path), state()
    first = store.save(learned, {})
    assert len(files(tmp_path)) == 3  # 160 bytes
    learned["table"][0] = 7.0
    second = store.save(learned, {})
    assert len(files(tmp_path)) == 4
    assert first.size_bytes == pytest.approx(second.size_bytes, abs=20)
    assert first.written_bytes - second.written_bytes == pytest.approx(96, abs=20)
    for name, value in ((first.name, 0.0), (second.name, 7.0)):
        assert store.load(name).state["table"][0] == value


def test_retention_deletes_the_chunks_that_nobody_names(tmp_path: Path) -> None:
    store, learned = Store(tmp_path, retain=1), state()
    for number in range(4):
        learned["table"][0] = float(number)
        store.save(learned, {})
    assert len(files(tmp_path)) == 3
    (tmp_path / "chunks" / ".left-by-a-death").write_bytes(b"half")
    store.save(learned, {})
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_a_damaged_chunk_is_a_damaged_snapshot_and_is_written_anew_by_the_next(tmp_path: Path, damage: str) -> None:
    learned = state()
    snapshot = Store(tmp_path).save(learned, {})
    path = sorted((tmp_path / "chunks").iterdir())[0]
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "torn" else bytes([data[0] ^ 1]) + data[1:])
    store = Store(tmp_path)
    with pytest.raises(Damaged, match="chunk"):
        store.load(snapshot.name)
    again = store.save(learned, {})
    assert digest(store.load(again.name).state) == digest(learned)


def test_chunks_come_back_in_every_dtype_and_shape(tmp_path: Path) -> None:
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    learned: dict[str, Any] = {str(k): (torch.arange(200) % 2).to(k).reshape(2, 50, 2) for k in kinds}
    store = Store(tmp_path)
    name = store.save(learned, {}).name
    assert digest(store.load(name).state) == digest(learned)


CHANGES = st.tuples(st.just("change"), st.integers(0, 39))
STEPS = st.lists(CHANGES | st.tuples(st.sampled_from(["save", "die", "reopen"]), st.just(0)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_after_any_changes_saves_and_deaths_every_snapshot_is_whole(steps: list[tuple[str, int]], retain: int) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store, learned, saved = Store(Path(folder), retain), state(), {}
        for step, row in steps:
            if step == "change":
                learned["table"][row] += 1.0
            elif step == "save":
                saved[store.save(learned, {}).name] = digest(learned)
            elif step == "die":  # behind the chunks, before the manifest
                store.chunks.write({"table": learned["table"]})
                store = Store(Path(folder), retain)
            else:
                store = Store(Path(folder), retain)
        names = [snapshot.name for snapshot in store.ls()]
        assert names == sorted(saved)[-retain:]
        for name in names:
            assert digest(Store(Path(folder)).load(name).state) == saved[name]


def test_a_save_that_fails_leaves_no_chunk_behind_and_takes_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, learned = Store(tmp_path), state()
    name = store.save(learned, {}).name
    before = files(tmp_path)
    learned["table"] += 1.0
    with monkeypatch.context() as broken:
        broken.setattr(snapshot, "serialize_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            store.save(learned, {})
    assert files(tmp_path) == before
    assert store.load(name).state["table"][1] == 1.0
    again = store.save(learned, {})
    assert digest(Store(tmp_path).load(again.name).state) == digest(learned)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fails_at_any_call_leaves_whole_snapshots_and_no_partial_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nth, failures, calls = 0, 0, [0]
    while calls[0] >= nth:
        nth += 1
        folder = tmp_path / str(nth)
        store, learned = Store(folder), state()
        store.save(learned, {})
        learned["table"] += 1.0
        with failing(monkeypatch, nth) as calls:
            try:
                store.save(learned, {})
            except CheckpointError:
                failures += 1
        again = store.save(learned, {})
        reader = Store(folder)
        named = {name for each in reader.ls() for name in reader._names_of_chunks(each.name)}
        assert files(folder) == named
        for each in reader.ls():
            reader.verify(each.name)
        assert digest(reader.load(again.name).state) == digest(learned)
    assert failures >= 15


def test_a_name_that_was_not_synced_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, arrays = chunks.Chunks(tmp_path / "chunks"), {"table": state()["table"]}
    with monkeypatch.context() as broken:
        broken.setattr(chunks, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            pieces.write(arrays)
    assert pieces.write(arrays)[1] == 160
    assert pieces.write(arrays)[1] == 0


def test_kill_9_at_any_line_of_a_save_with_chunks_leaves_a_whole_snapshot_and_the_next_save_sweeps(
    tmp_path: Path,
) -> None:
    survived, line, seen = False, 0, set()
    changed = state()
    changed["table"] += 1.0
    while not survived:
        line += 1
        folder = tmp_path / str(line)
        store = Store(folder, retain=1)
        store.save(state(), {})
        survived = crash(line, lambda store=store: store.save(changed, {}), checkpoint, snapshot, chunks)  # type: ignore[misc]
        reader = Store(folder, retain=1)
        loaded = reader.newest()
        assert loaded is not None
        assert reader.damaged == []
        seen.add(float(loaded.state["table"][0]))
        reader.save(changed, {})
        assert len(files(folder)) == 3
    assert seen == {0.0, 1.0}
    assert line > 100


def test_a_chunk_that_the_disk_can_t_read_is_damage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"n": 1}, {})
    name = store.save(state(), {}).name
    path = sorted((tmp_path / "chunks").iterdir())[0]
    path.unlink()
    path.mkdir()
    loaded = Store(tmp_path).newest()
    assert loaded is not None
    assert loaded.state == {"n": 1}
    with pytest.raises(Damaged, match="a chunk can't be read"):
        store.load(name)


def test_nothing_gets_a_name_that_is_not_permitted(tmp_path: Path) -> None:
    store, learned = Store(tmp_path), state()
    store.save(learned, {})

    def permit() -> None:
        raise Fenced("taken over")

    store.permit = permit
    learned["table"] += 1.0
    with pytest.raises(Fenced):
        store.save(learned, {})
    assert len(store.ls()) == 1
