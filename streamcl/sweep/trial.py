"""One configuration on the log, from where it stood up to the next cut, in whatever process; and what is kept of it.

A run's folder is named by the digest of its configuration and of the log. It holds `answers-FROM-TO.npz` (events) for
each stretch that is done, and the state behind the last of them while somebody may want to go on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamcl import __version__, backtest
from streamcl.checkpoint import Store
from streamcl.config import Config, fingerprint
from streamcl.sweep.answers import Answers
from streamcl.sweep.log import Log, begin, follow
from streamcl.worker import Worker

_PART = re.compile(r"answers-(\d+)-(\d+)\.npz")


@dataclass(frozen=True, slots=True)
class Task:
    """A stretch of one run: up to `until` events. `config` is its JSON; `goes_on`: a longer one may follow."""

    folder: Path
    config: dict[str, Any]
    log: Log
    until: int
    goes_on: bool


@dataclass(frozen=True, slots=True)
class Speed:
    """Events and the processor seconds that they took, but for each stretch's first turn, in which code is compiled."""

    events: int = 0
    cpu_s: float = 0.0

    @property
    def events_per_s(self) -> float | None:
        return self.events / self.cpu_s if self.cpu_s > 0 else None


class Kept:
    """A run's folder."""

    def __init__(self, folder: Path, trust_pickle: bool = False) -> None:
        self.folder = folder
        self.store = Store(folder / "state", retain=2, trust_pickle=trust_pickle)

    def parts(self) -> list[tuple[int, int, Path]]:
        """(from, to, file) of each stretch that is done, in order; what does not follow upon another is not there."""
        there = sorted(
            (int(match[1]), int(match[2]), path)
            for path in self.folder.glob("answers-*.npz")
            if (match := _PART.fullmatch(path.name))
        )
        found: list[tuple[int, int, Path]] = []
        for part in there:
            if part[0] == (found[-1][1] if found else 0):
                found.append(part)
        return found

    def reached(self, until: int) -> bool:
        """Whether the answers up to `until` events are here, and end there."""
        return any(end == until for _, end, _ in self.parts())

    def answers(self, until: int, start: int = 0) -> Answers:
        """From one end of a stretch to another."""
        parts = [path for begin, end, path in self.parts() if start <= begin and end <= until]
        return Answers.joined(_read(path) for path in parts).once()

    def speed(self) -> Speed:
        told = [np.load(path)["speed"] for _, _, path in self.parts()]
        return Speed(int(sum(each[0] for each in told)), float(sum(each[1] for each in told)))

    def save(self, start: int, end: int, answers: Answers, speed: Speed) -> None:
        """Whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / ".partial.npz"
        columns = {name: getattr(answers, name) for name in Answers.__slots__}
        np.savez(partial, speed=np.array([speed.events, speed.cpu_s]), **columns)
        partial.rename(self.folder / f"answers-{start}-{end}.npz")

    def restore(self, worker: Worker, events: int) -> bool:
        """Bring a worker to where the run stood after `events`. False: that is not kept."""
        for snapshot in reversed(self.store.ls()):
            if snapshot.manifest["events"] == events:
                loaded = self.store.load(snapshot.name)
                worker.load_state_dict(loaded.state)
                worker.control_offset = int(loaded.manifest["control_offset"])
                worker.source.seek(worker.progress.position)
                return True
        return False

    def drop_state(self) -> None:
        shutil.rmtree(self.folder / "state", ignore_errors=True)


def _read(path: Path) -> Answers:
    with np.load(path) as data:
        return Answers(*(data[name] for name in Answers.__slots__))


def folder_of(root: Path, config: Config, log: Log) -> Path:
    """Where a run is kept. Code is not part of the name but for the version: another plug-in needs another `root`."""
    name = hashlib.sha256(f"{fingerprint(config)} {log.digest} {__version__}".encode()).hexdigest()[:16]
    return root / "runs" / name


def advance(task: Task, tell: Callable[[int], None]) -> None:
    """Carry the run on and keep what it said. `tell` hears how many events are done.

    A run that is to stop where none of its stretches ends, or whose state is gone, begins anew.
    """
    config = Config.parse(task.config, "sweep")
    torch.set_num_threads(config.worker.threads)
    kept = Kept(task.folder, config.trust_pickle)
    done = max((end for _, end, _ in kept.parts()), default=0)
    with contextlib.closing(backtest.build(config)) as worker:
        if not (0 < done < task.until and kept.restore(worker, done)):
            done = 0
            shutil.rmtree(task.folder, ignore_errors=True)
            begin(worker, task.log)
        answers, speed = _follow(worker, task, done, tell)
        if task.goes_on:
            kept.store.save(worker.state_dict(), {"events": task.until, "control_offset": worker.control_offset})
        kept.save(done, task.until, answers, speed)
    if not task.goes_on:
        kept.drop_state()


def _follow(worker: Worker, task: Task, done: int, tell: Callable[[int], None]) -> tuple[Answers, Speed]:
    parts, first, start, taken = [], done, time.process_time(), done
    for at, (turn, now) in enumerate(follow(worker, task.log, done, task.until)):
        parts.append(Answers.of(turn.outcomes))
        tell(now)
        taken = now
        if at == 0:
            first, start = now, time.process_time()
    return Answers.joined(parts), Speed(taken - first, time.process_time() - start if taken > first else 0.0)
