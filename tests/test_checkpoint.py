"""A snapshot is whole or passed over: kill -9, full disks, retention, readers."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from streamcl import checkpoint, chunks, snapshot
from streamcl.checkpoint import Store
from streamcl.protocols import State
from streamcl.snapshot import ARRAYS, REST, CheckpointError, Damaged, Vanished
from streamcl.state import digest


def state(step: int) -> State:
    return {"w": torch.arange(3.0) + step, "ids": np.arange(4), "norm": {"mean": float("nan")}, "version": step}


def saved(folder: Path, count: int, retain: int = 3) -> Store:
    store = Store(folder, retain)
    for step in range(count):
        store.save(state(step), {"records": 100 * step, "position": {"events": {"0": step}}})
    return store


def newest_version(folder: Path) -> int | None:
    loaded = Store(folder).newest()
    return None if loaded is None else int(loaded.state["version"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_snapshot_comes_back_with_its_manifest_and_digest(tmp_path: Path) -> None:
    saved(tmp_path / "deep" / "shard-0", 2)
    loaded = Store(tmp_path / "deep" / "shard-0").newest()
    assert loaded is not None
    assert loaded.manifest == {"records": 100, "position": {"events": {"0": 1}}}
    assert digest(loaded.state) == digest(state(1)) == loaded.snapshot.digest
    assert loaded.snapshot.name == "0000000002-100"
    assert loaded.snapshot.size_bytes == sum(f.stat().st_size for f in loaded.snapshot.path.iterdir())


def test_an_absent_or_empty_folder_has_no_checkpoint_and_is_not_made_by_reading(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.newest() is None
    assert store.ls() == []
    assert names(tmp_path) == []


def test_a_snapshot_saved_later_is_newer_whatever_its_count_of_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(state(1), {"records": 1_000_000})
    store.save(state(2), {"records": 5})
    assert newest_version(tmp_path) == 2


def test_retention_keeps_the_newest_and_only_those(tmp_path: Path) -> None:
    store = saved(tmp_path, 5, retain=2)
    assert [s.name for s in store.ls()] == ["0000000004-300", "0000000005-400"] == names(tmp_path)


def test_retention_counts_valid_snapshots_and_never_deletes_damaged_ones(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    (tmp_path / "0000000003-200" / REST).write_bytes(b"{}")
    Store(tmp_path, retain=2).save(state(9), {"records": 900})
    assert names(tmp_path) == ["0000000002-100", "0000000003-200", "0000000004-900"]


def test_a_retention_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Store(tmp_path, retain=0)


def test_a_foreign_folder_is_passed_over_and_other_names_are_ignored(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "0000000007-12").mkdir()
    (tmp_path / "0000000008-12").write_text("a file")
    (tmp_path / "0000000009-12").symlink_to(tmp_path / "nowhere")
    (tmp_path / "lost+found").mkdir()
    store = Store(tmp_path)
    assert [s.name for s in store.ls()] == ["0000000001-0"]
    assert [name for name, _ in store.damaged] == ["0000000007-12", "0000000008-12", "0000000009-12"]
    assert newest_version(tmp_path) == 0


def test_all_damaged_is_none_and_not_a_crash(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for path in tmp_path.glob(f"*/{ARRAYS}"):
        path.write_bytes(b"")
    assert newest_version(tmp_path) is None


def test_verify_reads_every_byte_and_load_names_what_is_wrong(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    assert store.verify("0000000001-0") == store.ls()[0]
    (tmp_path / "0000000001-0" / REST).write_bytes(b"{}")
    for read in (store.verify, store.load):
        with pytest.raises(Damaged, match=r"0000000001-0: state\.json does not have"):
            read("0000000001-0")
    assert [name for name, _ in store.damaged] == ["0000000001-0"]
    with pytest.raises(Vanished, match="no such checkpoint"):
        store.load("0000000002-0")


def crash(after: int, work: Callable[[], object], *modules: ModuleType) -> bool:
    """Run `work` in a process that is killed at its n-th line inside these modules; True if it lived to the end."""
    places = {module.__file__ for module in modules}
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename not in places:
                return None
            seen += event == "line"
            if seen == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_kill_9_at_any_line_of_a_save_leaves_a_whole_snapshot_and_the_next_save_sweeps(tmp_path: Path) -> None:
    survived, line, versions = False, 0, set()
    while not survived:
        line += 1
        folder = tmp_path / str(line)
        store = saved(folder, 2, retain=1)
        survived = crash(line, lambda store=store: store.save(state(7), {}), checkpoint, snapshot, chunks)  # type: ignore[misc]
        reader = Store(folder, retain=1)
        loaded = reader.newest()
        assert loaded is not None
        assert reader.damaged == []
        versions.add(loaded.state["version"])
        assert digest(loaded.state) == digest(state(loaded.state["version"]))
        reader.save(state(8), {})
        assert len(names(folder)) == 1
    assert versions == {1, 7}
    assert line > 50


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, nth: int) -> Iterator[list[int]]:
    """The n-th call that reaches the disk fails as on a full one."""
    calls = [0]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for owner, name in [(os, "fsync"), (os, "mkdir"), (os, "rename"), (Path, "write_bytes"), (Path, "chmod")]:
            patch.setattr(owner, name, wrap(getattr(owner, name)))
        patch.setattr(snapshot, "serialize_file", wrap(safetensors.serialize_file))
        yield calls


def test_a_disk_that_fails_at_any_call_loses_no_snapshot_and_leaves_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nth, failures, calls = 0, 0, [0]
    while calls[0] >= nth:
        nth += 1
        folder = tmp_path / str(nth)
        store = saved(folder, 1, retain=1)
        with failing(monkeypatch, nth) as calls:
            try:
                store.save(state(7), {})
            except CheckpointError as error:
                failures += 1
                assert str(folder) in str(error)
                assert "No space left" in str(error)
        reader = Store(folder)
        assert newest_version(folder) in (0, 7)
        assert [s.name for s in reader.ls()] == names(folder)
        assert reader.damaged == []
    assert failures >= 9


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            store.save({"w": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["0000000001-0"]


@pytest.mark.parametrize("use", [lambda s: s.save({}, {}), Store.probe, Store.newest, Store.ls])
def test_a_folder_that_is_a_file_is_an_error_that_names_it(tmp_path: Path, use: Callable[[Store], Any]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        use(Store(tmp_path / "file"))


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it() -> None:
    with pytest.raises(CheckpointError, match="/proc/none"):
        Store(Path("/proc/none")).probe()


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    Store(tmp_path / "new").probe()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == []


def test_a_state_that_cannot_be_saved_is_an_error_that_names_its_path(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"state/join/x: tuple"):
        store.save({"join": {"x": (1, 2)}}, {})
    with pytest.raises(CheckpointError, match="not JSON"):
        store.save({}, {"folder": tmp_path})
    assert names(tmp_path) == ["0000000001-0"]


def test_what_a_living_writer_has_not_finished_is_not_swept(tmp_path: Path) -> None:
    store, unfinished = saved(tmp_path, 1), tmp_path / ".unfinished-other"
    unfinished.mkdir()
    handle = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    store.save(state(1), {})
    assert unfinished.exists()
    os.close(handle)
    store.save(state(2), {})
    assert not unfinished.exists()


def test_a_reader_beside_a_writer_always_finds_a_whole_snapshot(tmp_path: Path) -> None:
    store, found, done = saved(tmp_path, 1, retain=1), [0], threading.Event()
    reader = Store(tmp_path)

    def read() -> None:
        while not done.is_set():
            loaded = reader.newest()
            reader.ls()
            found.append(-1 if loaded is None else loaded.state["version"])

    thread = threading.Thread(target=read)
    thread.start()
    for step in range(1, 40):
        store.save(state(step), {"records": step})
    done.set()
    thread.join()
    assert found == sorted(found)
    assert len(found) > 2
    assert reader.damaged == []
