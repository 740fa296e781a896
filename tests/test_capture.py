"""A capture is the state as it stood when it was made, to the bit, whatever its owner does at once."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from streamcl import capture
from streamcl.capture import FORK_BYTES, LARGE_BYTES, Capture
from streamcl.checkpoint import Store
from streamcl.lease import Lease
from streamcl.protocols import State
from streamcl.recovery import Keeper, store_of
from streamcl.snapshot import CheckpointError
from streamcl.state import cut, digest, private, sharing
from streamcl.worker import build
from streamcl.writer import Writer
from tests.journey import fill, repeat, settings, view

forked = pytest.mark.skipif(not capture.FORKS, reason="no child process copies here")
ROOM = FORK_BYTES // 4


def large(seed: int) -> State:
    """Five quarters of what is worth a child, of several kinds, and small things beside it."""
    draw = np.random.default_rng(seed)
    floats = draw.random(ROOM // 4, np.float32)
    floats[:3] = np.nan, -0.0, np.inf
    return {
        "table": torch.from_numpy(floats.reshape(-1, 4)),
        "half": torch.from_numpy(draw.random(ROOM // 2, np.float32)).to(torch.bfloat16),
        "ids": draw.integers(0, 1 << 62, ROOM // 8),
        "flags": {"live": draw.random(ROOM, np.float32) < 0.5},
        "transposed": torch.from_numpy(draw.random((64, LARGE_BYTES // 256))).T,
        "strided": draw.random(LARGE_BYTES)[::2],
        "small": [np.arange(3), {"n": seed, "name": "x", "list": [1, 2.0, None]}],
        "parameter": torch.nn.Parameter(torch.from_numpy(draw.random(ROOM // 4, np.float32))),
    }


def arrays(state: Any) -> Iterator[Any]:
    for each in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        yield from (each,) if isinstance(each, torch.Tensor | np.ndarray) else arrays(each)


def spoil(state: State) -> None:
    """Change every byte."""
    for each in arrays(state):
        whole = each.detach().numpy() if isinstance(each, torch.Tensor) and each.dtype != torch.bfloat16 else each
        if isinstance(whole, torch.Tensor):
            whole.add_(1.0)
        elif whole.dtype == np.bool_:
            np.logical_not(whole, out=whole)
        else:
            whole += 1


def absent_in_a_child(size: int) -> Any:
    """(size,) bytes that the system gives to no child."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(memory, np.uint8)


@pytest.fixture(autouse=True)
def _no_zombies() -> Iterator[None]:
    yield
    assert not [each.pid for each in psutil.Process().children() if each.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_state_of_its_making_whatever_changes_at_once(seed: int) -> None:
    state = large(seed)
    plain = private(state)
    taken = Capture(lambda: state)
    spoil(state)
    assert bool(taken.child) == capture.FORKS
    assert digest(taken.state()) == digest(plain)
    assert digest(state) != digest(plain)
    assert {type(each) for each in arrays(taken.state())} == {torch.Tensor, np.ndarray}


@pytest.mark.parametrize("way", ["told", "no such platform", "refused", "no shared memory"])
def test_without_a_child_it_is_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "no such platform":
        monkeypatch.setattr(capture, "FORKS", False)
    if way == "refused":
        monkeypatch.setattr(capture, "_copy_beside", lambda *_: -1)
    if way == "no shared memory":
        monkeypatch.setattr(capture, "_mmap", lambda *_: capture._FAILED)
    state = large(5)
    before = digest(state)
    taken = Capture(lambda: state, forks=way != "told")
    spoil(state)
    assert taken.child == 0
    assert digest(taken.state()) == before


def test_a_small_state_needs_no_child() -> None:
    state: State = {"a": torch.ones(FORK_BYTES // 8 - 1), "b": np.ones(FORK_BYTES // 16 - 1), "c": torch.ones(9)}
    taken = Capture(lambda: state)
    spoil(state)
    assert taken.child == 0
    assert all(bool((each == 1).all()) for each in arrays(taken.state()))


def test_within_it_parts_copy_nothing_and_else_they_do() -> None:
    table = torch.zeros(3)
    assert cut(table).data_ptr() != table.data_ptr()
    with sharing():
        assert cut(table) is table
    column = np.zeros(3)
    assert not np.shares_memory(cut(column), column)


def test_a_part_that_fails_leaves_the_others_copying() -> None:
    def fails() -> State:
        raise ValueError("no state")

    with pytest.raises(ValueError, match="no state"):
        Capture(fails)
    table = torch.zeros(3)
    assert cut(table) is not table


@forked
def test_a_child_that_dies_is_told_of() -> None:
    state: State = {"a": absent_in_a_child(FORK_BYTES)}
    taken = Capture(lambda: state)
    with pytest.raises(CheckpointError, match=f"exit status -{signal.SIGSEGV.value}"):
        taken.state()


@forked
def test_who_lets_the_system_forget_its_children_is_served_all_the_same() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        state = large(1)
        taken = Capture(lambda: state)
        assert digest(taken.state()) == digest(state)
        dies: State = {"a": absent_in_a_child(FORK_BYTES)}
        with pytest.raises(CheckpointError, match="status is not known"):
            Capture(lambda: dies).state()
    finally:
        signal.signal(signal.SIGCHLD, before)


@forked
def test_the_child_holds_no_file_of_its_parent() -> None:
    state: State = {"a": np.zeros(4 * FORK_BYTES, np.uint8)}
    seen = False
    for _ in range(20):  # it may be done before we look
        taken = Capture(lambda: state)
        files = Path(f"/proc/{taken.child}/fd")
        while not taken._done[0]:
            seen |= next(files.iterdir(), None) is None and not taken._done[0]
        taken.state()
        if seen:
            return
    raise AssertionError("no child was seen without files")


@forked
def test_ctrl_c_reaches_the_parent_and_not_the_child() -> None:
    state = large(2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    taken = Capture(lambda: state)
    os.kill(taken.child, signal.SIGINT)
    os.kill(taken.child, signal.SIGTERM)
    assert digest(taken.state()) == digest(state)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@forked
def test_threads_that_hold_locks_all_the_time_stop_no_child() -> None:
    done, log = threading.Event(), logging.getLogger("capture")
    log.addHandler(logging.NullHandler())

    def busy() -> None:
        while not done.is_set():
            log.warning("%d", len(bytes(50_000)))
            torch.ones(1000).sum()
            time.sleep(0.001)

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        state = large(3)
        for _ in range(4):
            plain, taken = digest(state), Capture(lambda: state)
            spoil(state)
            assert digest(taken.state()) == plain
    finally:
        done.set()
        for thread in threads:
            thread.join()


@forked
def test_what_a_child_failed_at_is_copied_at_once_the_next_time(tmp_path: Path) -> None:
    writer = Writer(Store(tmp_path), Lease(str(tmp_path), 0))
    state: State = {"a": absent_in_a_child(FORK_BYTES)}
    for _ in range(2):
        writer.begin(lambda: state, {}, {})
        with pytest.raises(CheckpointError, match="has died"):
            writer.taken(wait=True)
        assert not writer.busy
        writer.begin(lambda: state, {}, {})
        written = writer.taken(wait=True)
        assert written is not None
        assert written.snapshot.digest == digest(state)
    writer.close()


@forked
def test_a_worker_whose_copies_fail_goes_on_and_saves_the_next_time(tmp_path: Path) -> None:
    fill([view(id, float(id)) for id in range(90)])
    config = settings(
        tmp_path,
        features={"user": {"kind": "categorical", "buckets": FORK_BYTES // 16}},  # 24 MiB, and as much of slots
        checkpoint={"folder": str(tmp_path), "every_events": 20},
    )
    worker = build(config)
    keeper = Keeper(worker, store_of(config))
    keeper.restore()
    table = worker.learner.engine.table  # type: ignore[union-attr]
    page = mmap.PAGESIZE
    inside = -(-table.data_ptr() // page) * page, table.nbytes // page * page - page
    libc = ctypes.CDLL(None)
    assert not libc.madvise(ctypes.c_void_p(inside[0]), ctypes.c_size_t(inside[1]), mmap.MADV_DONTFORK)
    for _ in keeper.run():
        while keeper.writer.busy:
            time.sleep(0.001)
        keeper._retry_at = 0.0
    assert keeper.failures["other"] > 0
    assert len(store_of(config).ls()) > 1
    assert digest(worker.state_dict()) == repeat(config).digest
