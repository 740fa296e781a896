"""How long a pass over a topic took, by wall clock and by processor."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from streamcl.bench.drive import Incomplete
from streamcl.worker import Worker

WARM = 500
"""Events before the clock starts: what is made or compiled once is none of an event's cost."""


class Taken(NamedTuple):
    """Seconds. Those of the processor count all threads of the process."""

    wall_s: float
    cpu_s: float


class Clock:
    """Runs since it was made."""

    def __init__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def read(self, share: float = 1.0) -> Taken:
        """What was taken so far, times `share`."""
        return Taken(share * (time.perf_counter() - self._wall_s), share * (time.process_time() - self._cpu_s))


def timed(worker: Worker, count: int) -> Taken:
    """What `count` events take: of those behind the first `WARM`, until the last answer is acknowledged.

    Args:
        count: Above `WARM` by a turn's `worker.max_records` at least.

    Raises Incomplete when an event was refused or not learned from.
    """
    clock, first = Clock(), 0
    for turn in worker.run():
        if not first and worker.progress.records >= WARM:
            clock, first = Clock(), worker.progress.records
        if turn.records and worker.progress.records >= count:
            worker.stop()
    worker.flush()
    taken = clock.read(count / (worker.progress.records - first))
    if worker.counts["learned"] != worker.progress.records:
        raise Incomplete(f"{worker.progress.records} events, but the worker counted {dict(worker.counts)}")
    return taken


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This thread, and the threads and processes it starts, on one core, where the system can be told so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
