"""Processes that carry runs on, side by side. One that dies takes nothing but its own run with it.

`concurrent.futures` gives up all that waits when one process dies; here another takes its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

from streamcl.protocols import StreamclError
from streamcl.sweep.trial import Task, advance

_spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads' locks, and no threads


def cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class Pool:
    """At most `jobs` processes, started when there is something to do. Use as a context: leaving it kills them."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._seats: list[_Seat] = []

    def run(self, tasks: Mapping[str, Task], tell: Callable[[str, int], None]) -> Iterator[tuple[str, str | None]]:
        """(name, None or why it failed) of each task as it ends. `tell` hears of the events that a task has done."""
        waiting = deque(tasks.items())
        while waiting or any(seat.name for seat in self._seats):
            for seat in self._idle(len(waiting)):
                seat.begin(*waiting.popleft())
            busy = [seat for seat in self._seats if seat.name]
            ready = wait([seat.pipe for seat in busy])
            for seat in busy:
                if seat.pipe not in ready:
                    continue
                name, (kind, value) = seat.name, seat.heard()
                if kind == "events":
                    tell(name, value)
                    continue
                seat.name = ""
                if kind == "died":
                    self._seats.remove(seat)
                yield name, None if kind == "done" else value

    def _idle(self, wanted: int) -> list[_Seat]:
        idle = [seat for seat in self._seats if not seat.name]
        while len(idle) < wanted and len(self._seats) < self.jobs:
            idle.append(_Seat())
            self._seats.append(idle[-1])
        return idle[:wanted]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            seat.end()
        self._seats.clear()


class _Seat:
    """A process and what it works on; "" for nothing."""

    def __init__(self) -> None:
        self.name = ""
        self.pipe, theirs = _spawn.Pipe()
        self.process: BaseProcess = _spawn.Process(target=_work, args=(theirs,), daemon=True)
        with _deaf():
            self.process.start()
        theirs.close()

    def begin(self, name: str, task: Task) -> None:
        self.name = name
        with contextlib.suppress(OSError):  # it has died idle: `heard` will tell
            self.pipe.send(task)

    def heard(self) -> tuple[str, Any]:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return "died", f"its process ended with exit code {self.process.exitcode}"
        return kind, value

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C reaches the whole group; what is started here ignores it, for its parent says when it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection) -> None:
    """The other side: until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                advance(task, lambda events: pipe.send(("events", events)))
            except (BrokenPipeError, ConnectionResetError):
                raise  # the parent is gone
            except StreamclError as error:
                pipe.send(("failed", str(error)))
            except Exception as error:  # noqa: BLE001 - one configuration's fault must not end the others
                at = traceback.extract_tb(error.__traceback__)[-1]
                pipe.send(("failed", f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"))
            else:
                pipe.send(("done", None))
