"""Writes cuts of a state beside learning: one at a time, on a thread of its own, which touches nothing that lives."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from streamcl.capture import Capture, prepare
from streamcl.checkpoint import Store
from streamcl.lease import Lease
from streamcl.protocols import Fenced, State, StreamclError
from streamcl.records import Position
from streamcl.snapshot import CheckpointError, Snapshot


@dataclass(frozen=True, slots=True)
class Written:
    """A snapshot that was written, where it stands, and how long its writing took (s)."""

    snapshot: Snapshot
    position: Position
    seconds: float


class Writer:
    """At most one write is under way, and none by a worker whose shard another one has claimed.

    Args:
        beside: False writes at once, in the caller's thread: tests that die in the middle of it want that.
    """

    def __init__(self, store: Store, lease: Lease, beside: bool = True) -> None:
        self.store = store
        self.lease = lease
        self.beside = beside
        store.permit = self._may_write
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Written] | None = None
        self._forks = True
        if beside:
            prepare()

    @property
    def busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def begin(
        self, take: Callable[[], State], manifest: Mapping[str, Any], position: Position, at_once: bool = False
    ) -> None:
        """Write the state that `take` returns now; `taken` tells of it. The pause is that of a `Capture`: some ms.

        at_once: Make no child for it, as where the caller waits anyway.
        """
        if not self.beside:
            written = self._write(take, manifest, position)
            self._future = Future()
            self._future.set_result(written)
            return
        self._pool = self._pool or ThreadPoolExecutor(1, "streamcl-checkpoint")
        taken = Capture(take, self._forks and not at_once)
        self._future = self._pool.submit(self._write, taken.state, manifest, position)
        self._pool.submit(_give_back)  # a job of its own: only then has the pool let go of the copy

    def taken(self, wait: bool = False) -> Written | None:
        """What has been written since the last call, if anything was. Raises what went wrong with it."""
        if self._future is None or not (wait or self._future.done()):
            return None
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Let a write under way come to its end, and forget what became of it."""
        if self._pool:
            self._pool.shutdown()
        self._pool = self._future = None

    def _write(self, state: Callable[[], State], manifest: Mapping[str, Any], position: Position) -> Written:
        began = time.perf_counter()
        self._forks = False  # what has failed is not tried twice running
        whole = state()
        self._forks = True
        self._may_write()
        snapshot = self.store.save(whole, manifest)
        return Written(snapshot, position, time.perf_counter() - began)

    def _may_write(self) -> None:
        """A place that can't be asked is a place that can't be written to: the worker goes on without."""
        try:
            self.lease.check()
        except Fenced:
            raise
        except StreamclError as error:
            raise CheckpointError(str(error)) from error.__cause__


def _give_back() -> None:
    """Return what the copies took to the system: else the allocator keeps the most that any moment needed, and a
    worker's memory creeps up for days towards it. Elsewhere than in glibc there is no such call, and nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
