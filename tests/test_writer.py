"""Snapshots are written beside learning, and a disk that fails costs a worker nothing but a longer re-run."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from connectors import memory
from streamcl.checkpoint import Store
from streamcl.lease import Lease
from streamcl.protocols import State
from streamcl.records import Turn
from streamcl.recovery import Keeper, store_of
from streamcl.snapshot import CheckpointError, Snapshot
from streamcl.state import digest, private
from streamcl.worker import build
from streamcl.writer import Writer
from tests.journey import BROKER, click, fill, finish, repeat, settings, view

STREAM = [item for id in range(90) for item in (view(id, float(id)), *([click(id, id + 2.0)] if id % 3 == 0 else []))]


class SlowStore(Store):
    """Writes when it is let go."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.let_go = threading.Event()

    def save(self, state: State, manifest: Mapping[str, Any]) -> Snapshot:
        assert self.let_go.wait(20)
        return super().save(state, manifest)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library can't give memory back")
def test_the_memory_of_a_copy_goes_back_to_the_system(tmp_path: Path) -> None:
    writer = Writer(Store(tmp_path), Lease(str(tmp_path), 0))
    process, mib = psutil.Process(), 1 << 20
    small = {str(i): np.full(2000, i, np.float32) for i in range(8000)}  # 61 MiB, too small for mappings of their own
    before = process.memory_info().rss
    writer.begin(lambda: small, {}, {})
    assert writer.taken(wait=True)
    writer.close()
    assert process.memory_info().rss - before < 30 * mib


def test_what_is_written_is_the_state_of_the_cut_whatever_is_learned_meanwhile(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    writer = Writer(store, Lease(str(tmp_path), 0))
    state: State = {"t": torch.zeros(3), "n": np.zeros(3), "list": [1, 2], "deep": [{"a": [torch.ones(1)]}]}
    before = digest(state)
    writer.begin(lambda: state, {}, {})
    assert writer.busy
    assert writer.taken() is None
    state["t"] += 1
    state["n"] += 1
    state["list"].append(3)
    state["deep"][0]["a"][0] += 1
    store.let_go.set()
    written = writer.taken(wait=True)
    assert written is not None
    assert written.snapshot.digest == before
    assert writer.taken() is None
    writer.close()


@given(st.lists(st.floats(allow_nan=False), max_size=4), st.lists(st.integers(), max_size=4))
def test_a_private_copy_is_equal_and_shares_nothing(floats: list[float], integers: list[int]) -> None:
    state: State = {
        "a": torch.tensor(floats),
        "b": np.array(integers, np.object_).astype(np.float64),
        "c": [integers, floats],
    }
    copy = private(state)
    assert digest(copy) == digest(state)
    assert copy["a"].data_ptr() != state["a"].data_ptr() or not floats
    assert copy["c"][0] is not state["c"][0]


def test_while_one_is_being_written_the_next_is_put_off_and_counted(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    worker = build(config)
    store = SlowStore(store_of(config).folder)
    store.let_go.set()
    keeper = Keeper(worker, store)
    keeper.restore()
    store.let_go.clear()
    turns = keeper.run()
    for _ in range(12):
        next(turns)
    assert keeper.deferred > 0
    store.let_go.set()
    for _ in turns:
        pass
    assert digest(worker.state_dict()) == repeat(config).digest
    assert memory.broker(BROKER).committed("views") == {0: 90}


def test_a_write_in_the_callers_thread_that_fails_leaves_the_writer_free(tmp_path: Path) -> None:
    (tmp_path / "shard").write_text("no folder")
    writer = Writer(Store(tmp_path / "shard"), Lease(str(tmp_path / "claims"), 0), beside=False)
    with pytest.raises(CheckpointError, match="shard"):
        writer.begin(lambda: {"n": 1}, {}, {})
    assert not writer.busy
    (tmp_path / "shard").unlink()
    writer.begin(lambda: {"n": 1}, {}, {})
    assert writer.taken() is not None


def test_killed_with_real_threads_at_work_it_equals_one_that_was_not(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    for turns in (5, 9, 2, 7):
        keeper = Keeper(build(config), store_of(config))
        keeper.restore()
        for _, _turn in zip(range(turns), keeper.run(), strict=False):
            pass
        keeper.close()
    assert finish(config).digest == repeat(config).digest


def drive(keeper: Keeper, turns: Iterator[Turn], count: int) -> None:
    """Some turns; whatever is being written is written by their end."""
    for _, _turn in zip(range(count), turns, strict=False):
        while keeper.writer.busy:
            threading.Event().wait(0.001)
        keeper._retry_at = 0.0  # the back-off is for a clock that runs


def test_a_vanished_folder_is_made_anew(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path / "checkpoints")
    keeper = Keeper(build(config), store_of(config))
    keeper.restore()
    turns = keeper.run()
    drive(keeper, turns, 4)
    shutil.rmtree(tmp_path / "checkpoints")
    drive(keeper, turns, 6)
    assert store_of(config).ls()
    for _ in turns:
        pass
    assert digest(keeper.worker.state_dict()) == repeat(config).digest


def test_a_file_in_the_folder_s_place_stops_no_worker(tmp_path: Path) -> None:
    fill(STREAM)
    place = tmp_path / "checkpoints"
    config = settings(place)
    keeper = Keeper(build(config), store_of(config))
    keeper.restore()
    turns = keeper.run()
    drive(keeper, turns, 4)
    shutil.rmtree(place)
    place.write_text("no folder")
    drive(keeper, turns, 4)
    assert keeper.failures["other"] > 0
    place.unlink()
    for _ in turns:
        pass
    assert digest(keeper.worker.state_dict()) == repeat(config).digest


def test_a_disk_that_fails_is_counted_and_warned_of_once_and_the_worker_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    keeper = Keeper(build(config), store_of(config))
    keeper.restore()
    turns = keeper.run()

    def full(_state: State, _manifest: Mapping[str, Any]) -> Snapshot:
        raise CheckpointError("no space left") from OSError(28, "No space left on device")

    with monkeypatch.context() as broken, caplog.at_level(logging.INFO):
        broken.setattr(keeper.store, "save", full)
        drive(keeper, turns, 8)
    assert keeper.failures["disk_full"] > 1
    assert [r.levelname for r in caplog.records if "going on without" in r.getMessage()].count("WARNING") == 1
    saved = len(store_of(config).ls())
    drive(keeper, turns, 4)
    assert len(store_of(config).ls()) > saved or keeper.last is not None
    for _ in turns:
        pass
    assert "written again" in caplog.text
    assert digest(keeper.worker.state_dict()) == repeat(config).digest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("no mount")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"may not mount a small file system: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_stops_no_worker_and_room_lets_it_save_again(tmp_path: Path, small_disk: Path) -> None:
    fill(STREAM)
    config = settings(small_disk)
    keeper = Keeper(build(config), store_of(config))
    keeper.restore()
    turns = keeper.run()
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    drive(keeper, turns, 6)
    assert keeper.failures["disk_full"] >= 1
    assert keeper.worker.counts["predicted"] > 0
    stood = store_of(config).newest()
    assert stood is not None  # the one from before is whole
    ballast.write_bytes(b"")
    for _ in turns:
        pass
    newest = store_of(config).newest()
    assert newest is not None
    assert newest.manifest["clean"]
    assert newest.snapshot.digest == repeat(config).digest
