"""What a sweep has come to: a row for each configuration, compared with the base on the events of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.stations import Task
from streamcl.sweep.answers import Answers, Floats, figures, losses
from streamcl.sweep.halving import Cut, ranked
from streamcl.sweep.log import Log
from streamcl.sweep.significance import Difference, difference, holm
from streamcl.sweep.space import BASE, Candidate, Candidates, Sweep
from streamcl.sweep.trial import Kept, Speed

BLOCKS = 50
"""Points of a curve over all events."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One round, and who took part in it."""

    cut: Cut
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """By answered events `x`: the mean loss of the block that ends there, and the sum of what was lost more than the
    base has lost (None: no base to compare with).
    """

    x: tuple[int, ...]
    loss: tuple[float, ...]
    ahead: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration over the `events` that it was given; figures are means over the seeds, `sd` their deviation.

    `status` is finished, dropped (by a round), failed (`failure` says why) or interrupted. `unlike` counts events whose
    label the base came to know otherwise: the base's holds. `p_holm`: see `significance.holm`, over all rows.
    """

    name: str
    settings: Mapping[str, Any]
    status: str
    events: int
    figures: Mapping[str, float] = field(default_factory=dict)
    sd: Mapping[str, float] = field(default_factory=dict)
    difference: Difference | None = None
    p_holm: float = math.nan
    unlike: int = 0
    events_per_s: float | None = None
    failure: str | None = None
    curve: Curve | None = None

    def to_json(self) -> dict[str, Any]:
        told = asdict(self)
        del told["curve"], told["p_holm"]
        if self.difference:
            told["difference"] |= {"p_holm": self.p_holm}
        return {name: value for name, value in told.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Rest:
    """How the chosen one did behind the events on which it was chosen, beside the base there."""

    begins_at: int
    figures: Mapping[str, float]
    base: Mapping[str, float]
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Results:
    """`rows`: the best first, by the longest prefix and then by the objective."""

    name: str
    objective: str
    task: Task
    window: int
    seeds: tuple[int, ...]
    log: Log
    events: int
    plan: tuple[Cut, ...]
    rows: tuple[Row, ...]
    chosen: str | None
    chosen_on: int
    rest: Rest | None
    interrupted: bool
    seconds: float
    jobs: int

    @property
    def exit_code(self) -> int:
        """130 interrupted, 1 where a configuration has failed, else 0."""
        return 130 if self.interrupted else int(any(row.status == "failed" for row in self.rows))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep": self.name,
            "objective": self.objective,
            "task": self.task,
            "window": self.window,
            "seeds": list(self.seeds),
            "log": {"records": self.log.records, "events": self.log.events, "digest": self.log.digest},
            "events": self.events,
            "rounds": [asdict(cut) for cut in self.plan],
            "chosen": self.chosen,
            "chosen_settings": dict(self.row(self.chosen).settings) if self.chosen else None,
            "chosen_on": self.chosen_on,
            "rest": asdict(self.rest) if self.rest else None,
            "rows": [row.to_json() for row in self.rows],
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 3),
            "jobs": self.jobs,
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What a reader needs to judge the figures."""
        unit = "squared error" if self.task == "regression" else "log-loss in nats"
        told = [
            "Every answer was given before its label was learned from; figures are the worker's, over all events of a"
            f" row, under _window over the last {self.window:,}.",
            f"Difference: mean {unit} less the base's on the same events (below 0: better), with its 95 % interval and"
            " two-sided p by batch means (30 batches of consecutive events, Student t; Schmeiser 1982);"
            " p (Holm) holds for all rows together.",
            "events/s counts processor seconds of one thread, without each run's first turn.",
        ]
        if self.rest:
            told.append(
                f"The choice was made on the first {self.chosen_on:,} events; what stands under 'the rest' had no part"
                " in it, so its p needs no correction."
            )
        elif self.chosen:
            told.append("The best of many was chosen in hindsight, on the very events of its figures: see choose_on.")
        if any(row.unlike for row in self.rows):
            told.append("Some configurations came to know other labels than the base; all are judged by the base's.")
        return told


def gathered(
    sweep: Sweep,
    name: str,
    found: Candidates,
    log: Log,
    plan: Sequence[Cut],
    stretches: Sequence[Stretch],
    failures: Mapping[str, str],
    folders: Mapping[str, Sequence[Path]],
    *,
    interrupted: bool,
    seconds: float,
    jobs: int,
) -> Results:
    """Of what stands on disk."""
    judge = Judge(found, folders)
    events = plan[-1].events
    rows = {each.name: _row(judge, each, stretches, failures, events) for each in found.all}
    compared = [row.difference.p if row.difference else math.nan for row in rows.values()]
    rows = {
        row.name: Row(**{**_fields(row), "p_holm": p}) for row, p in zip(rows.values(), holm(compared), strict=True)
    }
    decided = plan[-2] if sweep.choose_on and len(plan) > 1 else plan[-1]
    chosen = _chosen(judge, decided, stretches, failures, found.objective)
    rest = _rest(judge, chosen, decided, plan[-1]) if chosen and decided is not plan[-1] else None
    order = ranked(found.objective, {row.name: row.figures.get(found.objective) for row in rows.values()})
    by_events = sorted(order, key=lambda each: -rows[each].events)
    config = found.base
    return Results(
        name=name, objective=found.objective, task=config.task, window=config.metrics.window, seeds=found.seeds,
        log=log, events=events, plan=tuple(plan), rows=tuple(rows[each] for each in by_events), chosen=chosen,
        chosen_on=decided.events, rest=rest, interrupted=interrupted, seconds=seconds, jobs=jobs,
    )  # fmt: skip


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Row.__slots__}


class Judge:
    """Reads what runs have kept, and holds it against what the base has said."""

    def __init__(self, found: Candidates, folders: Mapping[str, Sequence[Path]]) -> None:
        self.task, self.window = found.base.task, found.base.metrics.window
        self.kept = {name: [Kept(folder) for folder in each] for name, each in folders.items()}

    def reached(self, name: str, until: int) -> bool:
        return all(kept.reached(until) for kept in self.kept[name])

    def answers(self, name: str, until: int, start: int = 0) -> tuple[list[Answers], list[Answers] | None, int]:
        """By seed: its own and the base's, of the same events and labels; how many had another label. None: no base."""
        ours = [kept.answers(until, start) for kept in self.kept[name]]
        if not self.reached(BASE, until):
            return ours, None, 0
        theirs = ours if name == BASE else [kept.answers(until, start) for kept in self.kept[BASE]]
        pairs = [one.judged_by(other) for one, other in zip(ours, theirs, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs], max(pair[2] for pair in pairs)

    def figures(self, by_seed: Sequence[Answers]) -> tuple[dict[str, float], dict[str, float]]:
        """(means, deviations) over the seeds; a figure that one of them has not is left out."""
        told = [figures(self.task, each, self.window) for each in by_seed]
        names = [name for name in told[0] if all(name in each for each in told)]
        means = {name: float(np.mean([each[name] for each in told])) for name in names}
        if len(told) == 1:
            return means, {}
        return means, {name: float(np.std([each[name] for each in told], ddof=1)) for name in names}

    def paired(self, ours: Sequence[Answers], theirs: Sequence[Answers]) -> Floats:
        """Loss less the base's of each event, mean over the seeds; events that one could not score are left out."""
        gaps = [losses(self.task, a) - losses(self.task, b) for a, b in zip(ours, theirs, strict=True)]
        known = [each.events[np.isfinite(gap)] for each, gap in zip(ours, gaps, strict=True)]
        common = reduce(lambda a, b: a if np.array_equal(a, b) else np.intersect1d(a, b), known)
        kept = [gap[np.isfinite(gap) & np.isin(each.events, common)] for each, gap in zip(ours, gaps, strict=True)]
        return np.asarray(np.mean(kept, axis=0))

    def speed(self, name: str) -> float | None:
        told = [kept.speed() for kept in self.kept[name]]
        return Speed(sum(each.events for each in told), sum(each.cpu_s for each in told)).events_per_s


def _row(
    judge: Judge, candidate: Candidate, stretches: Sequence[Stretch], failures: Mapping[str, str], events: int
) -> Row:
    name = candidate.name
    mine = [stretch.cut for stretch in stretches if name in stretch.names]
    done = [cut for cut in mine if judge.reached(name, cut.events)]
    status = "finished" if done and done[-1].events == events else "interrupted"
    if name in failures:
        status = "failed"
    elif done and done[-1] is mine[-1] and len(mine) < len(stretches):
        status = "dropped"
    failure = failures.get(name)
    if not done:
        return Row(name, candidate.settings, status, 0, failure=failure)
    ours, theirs, unlike = judge.answers(name, done[-1].events)
    means, sd = judge.figures(ours)
    paired = judge.paired(ours, theirs) if theirs and name != BASE else None
    return Row(
        name, candidate.settings, status, done[-1].events, means, sd,
        difference=None if paired is None else difference(paired), unlike=unlike, events_per_s=judge.speed(name),
        failure=failure, curve=_curve(judge, ours, theirs, events),
    )  # fmt: skip


def _curve(judge: Judge, ours: Sequence[Answers], theirs: Sequence[Answers] | None, events: int) -> Curve:
    mean = np.nanmean([losses(judge.task, each) for each in ours], axis=0) if len(ours[0].events) else np.zeros(0)
    width = max(1, -(-events // BLOCKS))
    ends = [*range(width, len(mean), width), len(mean)] if len(mean) else []
    blocks = np.split(mean, ends[:-1])
    ahead = None
    if theirs and len(mean):
        paired = judge.paired(ours, theirs)
        sums = np.append(0.0, np.cumsum(paired))
        ahead = tuple(float(sums[min(end, len(paired))]) for end in ends)
    return Curve(tuple(ends), tuple(float(block.mean()) for block in blocks), ahead)


def _chosen(
    judge: Judge, decided: Cut, stretches: Sequence[Stretch], failures: Mapping[str, str], objective: str
) -> str | None:
    """None before everybody who is left has come to the cut that decides, or where nothing is defined."""
    stretch = next((each for each in stretches if each.cut is decided), None)
    names = (
        [name for name in stretch.names if name not in failures or judge.reached(name, decided.events)]
        if stretch
        else []
    )
    if not names or not all(judge.reached(name, decided.events) for name in names):
        return None
    values = {name: judge.figures(judge.answers(name, decided.events)[0])[0].get(objective) for name in names}
    best = ranked(objective, values)[0]
    return best if values[best] is not None else None


def _rest(judge: Judge, chosen: str, decided: Cut, last: Cut) -> Rest | None:
    if not (judge.reached(chosen, last.events) and judge.reached(BASE, last.events)):
        return None
    ours, theirs, _ = judge.answers(chosen, last.events, decided.events)
    assert theirs is not None  # noqa: S101 - the base has come there
    gap = difference(judge.paired(ours, theirs)) if chosen != BASE else None
    return Rest(decided.events, judge.figures(ours)[0], judge.figures(theirs)[0], gap)
