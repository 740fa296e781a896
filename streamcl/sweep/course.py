"""A sweep from its first round to its results."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from streamcl.config import ConfigError
from streamcl.sweep.halving import Cut, cuts, ranked
from streamcl.sweep.log import Log, scan
from streamcl.sweep.pool import Pool, cores
from streamcl.sweep.results import Judge, Results, Stretch, gathered
from streamcl.sweep.space import BASE, Candidates, Sweep
from streamcl.sweep.trial import Kept, Task, folder_of

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Who looks on."""

    def round(self, text: str, events: Mapping[str, tuple[int, int]]) -> None:
        """A round begins: of each run where it stands and where it shall come to, in events."""

    def told(self, name: str, events: int) -> None:
        """A run has come so far."""

    def ended(self, name: str, failure: str | None) -> None: ...


class _Nobody:
    def round(self, text: str, events: Mapping[str, tuple[int, int]]) -> None: ...

    def told(self, name: str, events: int) -> None: ...

    def ended(self, name: str, failure: str | None) -> None: ...


def run(
    sweep: Sweep | Path | str | Mapping[str, Any],
    base: Path | str | None = None,
    *,
    inputs: Mapping[str, str] | None = None,
    order: str | None = None,
    out: Path | str | None = None,
    jobs: int | None = None,
    watcher: Watcher | None = None,
) -> Results:
    """Run the configurations of a sweep over one log and compare them. Ctrl-C ends it with what is finished.

    Processes are spawned: in a script, call it under `if __name__ == "__main__":`.

    Args:
        sweep: The content of `sweep.toml`, or its path.
        base: Configuration to start from, instead of the sweep's own.
        inputs: By name (`events`, `labels`) the URL that is read instead.
        order: URL of a control log to follow; default for Kafka inputs: their own.
        out: Folder in which finished runs are kept and found again; default: nowhere.
        jobs: Processes side by side; default: as many as there are cores.

    Raises:
        ConfigError: names the path of what is wrong.
        ConnectorError: the log can't be read. What a single configuration can't do stands in the results.
    """
    where = str(sweep) if isinstance(sweep, Path | str) else "sweep"
    if not isinstance(sweep, Sweep):
        sweep = Sweep.load(Path(sweep)) if isinstance(sweep, Path | str) else Sweep.parse(sweep)
    found = sweep.candidates(where, Path(base) if base else None, inputs)
    jobs = cores() if jobs is None else jobs
    if jobs < 1:
        raise ConfigError(f"jobs: {jobs} is below 1")
    with ExitStack() as stack:
        root = Path(out) if out else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamcl-sweep-")))
        read = scan(found.base, order)
        events = min(sweep.events or read.events, read.events)
        if not events:
            raise ConfigError(f"{where}: the log holds no event")
        plan = cuts(len(found.all), events, sweep.halving, sweep.choose_on, where)
        return _Course(found, read, plan, root.absolute(), jobs, watcher or _Nobody()).run(sweep, where)


class _Course:
    """Rounds of one sweep. What is finished stands on disk; `failures` by candidate."""

    def __init__(
        self, found: Candidates, read: Log, plan: Sequence[Cut], root: Path, jobs: int, watcher: Watcher
    ) -> None:
        self.found, self.log, self.plan, self.root, self.jobs, self.watcher = found, read, plan, root, jobs, watcher
        self.by_name = {candidate.name: candidate for candidate in found.all}
        self.failures: dict[str, str] = {}
        self.stretches: list[Stretch] = []

    def run(self, sweep: Sweep, where: str) -> Results:
        start, interrupted = time.monotonic(), False
        try:
            with Pool(self.jobs) as pool:
                self._rounds(pool)
        except KeyboardInterrupt:
            interrupted = True
        return gathered(
            sweep, where, self.found, self.log, self.plan, self.stretches, self.failures, self.folders(),
            interrupted=interrupted, seconds=time.monotonic() - start, jobs=self.jobs,
        )  # fmt: skip

    def folders(self) -> dict[str, list[Path]]:
        """By candidate, one for each seed."""
        each = self.found.all
        return {c.name: [folder_of(self.root, config, self.log) for config in c.configs] for c in each}

    def _rounds(self, pool: Pool) -> None:
        left = [candidate.name for candidate in self.found.all]
        for number, cut in enumerate(self.plan, 1):
            stretch = Stretch(cut, tuple(left))
            self.stretches.append(stretch)
            self._carry_on(pool, stretch, f"round {number} of {len(self.plan)}")
            if cut.keep is None:
                return
            values = {name: self._objective(name, cut.events) for name in left if name not in self.failures}
            best = ranked(self.found.objective, values)[: cut.keep]
            kept = [name for name in left if name in best or (name == BASE and name in values)]
            for name in set(left) - set(kept):
                for folder in self.folders()[name]:
                    Kept(folder).drop_state()
            left = kept

    def _carry_on(self, pool: Pool, stretch: Stretch, text: str) -> None:
        tasks: dict[str, Task] = {}
        owner: dict[str, str] = {}
        spans: dict[str, tuple[int, int]] = {}
        until = stretch.cut.events
        for name in stretch.names:
            candidate = self.by_name[name]
            for seed, config, folder in zip(self.found.seeds, candidate.configs, self.folders()[name], strict=True):
                kept = Kept(folder)
                if kept.reached(until):
                    continue
                label = name if len(self.found.seeds) == 1 else f"{name}, seed {seed}"
                data = config.model_dump(mode="json")
                tasks[label] = Task(folder, data, self.log, until, stretch.cut is not self.plan[-1])
                owner[label] = name
                done = max((end for _, end, _ in kept.parts()), default=0)
                spans[label] = (done if done < until else 0, until)
        self.watcher.round(f"{text}: {len(stretch.names)} configurations to {until:,} events", spans)
        for label, failure in pool.run(tasks, self.watcher.told):
            self.watcher.ended(label, failure)
            if failure is not None:
                self.failures.setdefault(owner[label], failure)
                log.error("%s: %s", label, failure)

    def _objective(self, name: str, events: int) -> float | None:
        """Over the prefix of so many events, mean over the seeds; None where it is undefined."""
        judge = Judge(self.found, self.folders())
        return judge.figures(judge.answers(name, events)[0])[0].get(self.found.objective)
