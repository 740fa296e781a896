"""`bench scale`: what an event costs as streams, tables, memories and waiting tickets grow a thousandfold."""

from __future__ import annotations

import cProfile
import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.bench import scale_stalls, scale_tickets
from streamcl.bench.options import Options
from streamcl.bench.report import Bar, Curve, Report, Row, progress
from streamcl.bench.step_feed import ON, SERVED, Stream, clicks, feed, outcome
from streamcl.bench.step_plain import FIELDS
from streamcl.join import Joiner
from streamcl.learner import Learner
from streamcl.records import EVENTS, LABELS, Encoded, Event, Label, Origin, Outcome, Scores, Ticket
from streamcl.records import Stream as Partition
from streamcl.stations import Join

READS = {"task"}
TASKS = ("events", "rows", "replay", "tickets", "spill", "stalls")

FULL: dict[str, tuple[int, ...]] = {
    "events": (10_000, 100_000, 1_000_000, 10_000_000),
    "rows": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "replay": (1_000, 10_000, 100_000, 1_000_000),
    "tickets": (1_000, 10_000, 100_000, 1_000_000),
}
QUICK = {name: sizes[:2] for name, sizes in FULL.items()}
LIMIT = 1.5
"""Caches and address translation, no more."""
MEASURED, REPEATS = 16_384, 5

NOTES = (
    "us_per_event: processor time of one thread, best of five repeats of 16,384 events; resident_mb: of the process",
    "events: the click model with replay and continual backpropagation, behind so many learned events",
    "rows: of the table, drawn uniformly, so that ever fewer are in a cache; replay: rows of a full reservoir, eight"
    " drawn beside each event; tickets: waiting in the joiner's memory, one more and one joined per event, without any"
    " model",
    "touched: rows of the table that a step reads, and replayed rows; calls: Python functions called, by cProfile",
    scale_tickets.NOTE,
    scale_stalls.NOTE,
)


def run(options: Options) -> Report:
    """Every kind of growth, or one."""
    began = time.perf_counter()
    tasks = (options.choice("task", TASKS, "events"),) if options.task else TASKS
    sizes = QUICK if options.quick else FULL
    rows: list[Row] = []
    bars: list[Bar] = []
    curves: list[Curve] = []
    if "stalls" in tasks:
        rows, bars = scale_stalls.measure(options.quick)
    if "spill" in tasks:
        more = scale_tickets.measure(options.quick, Waiting, _resident_mb)
        rows, bars = [*rows, *more[0]], [*bars, *more[1]]
    for task in (each for each in tasks if each in KINDS):
        cost = []
        for size, found in KINDS[task](sizes[task]):
            progress(f"{task}: {size:,}: {found['us_per_event']:.2f} us")
            rows.append(Row(f"{task}: {size:,}", {**found, "resident_mb": _resident_mb()}, table=task))
            cost.append(float(found["us_per_event"]))
            gc.collect()
        bars.append(Bar(f"{task}: most / least cost of an event", max(cost) / min(cost), LIMIT, at_least=False))
        curves.append(Curve(task, list(map(float, sizes[task])), cost))
    settings = {"quick": options.quick, "sizes": {task: list(sizes[task]) for task in tasks if task in KINDS}}
    seconds = time.perf_counter() - began
    return Report(
        "scale", settings, [0], seconds, rows, bars, notes=NOTES, curves=curves, axes=("size", "us per event")
    )


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _best(work: Callable[[], object], count: int) -> float:
    """Microseconds of one of so many."""
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return 1e6 * min(taken) / count


Found = Iterator[tuple[int, dict[str, Any]]]


def events(sizes: tuple[int, ...]) -> Found:
    stream = Stream(4_096)
    outcomes = [outcome(stream.event(i), SERVED) for i in range(len(stream.y))]
    learner, turn = clicks("fused", **ON), outcomes * (MEASURED // len(outcomes))
    for size in sizes:
        while learner.version < size:
            feed(learner, outcomes)
        yield size, {"us_per_event": _best(lambda: feed(learner, turn), MEASURED), "replayed": len(learner.memory)}


def rows(sizes: tuple[int, ...]) -> Found:
    for size in sizes:
        buckets = max(size // FIELDS, 2)
        learner = clicks("fused", buckets=buckets)
        outcomes = _uniform(buckets, MEASURED)
        feed(learner, outcomes)
        touched = len(np.unique(outcomes[0].ticket.features.ids))
        yield size, {"us_per_event": _best(lambda: feed(learner, outcomes), MEASURED), "touched": touched}  # noqa: B023


def replay(sizes: tuple[int, ...]) -> Found:
    outcomes = _uniform(1000, MEASURED)
    for size in sizes:
        learner = clicks("fused", replay={**ON["replay"], "capacity": size})
        _fill(learner, size)
        feed(learner, outcomes)
        cost = _best(lambda: feed(learner, outcomes), MEASURED)  # noqa: B023
        yield size, {"us_per_event": cost, "touched": learner.per_event, "replayed": len(learner.memory)}


def _uniform(buckets: int, count: int) -> list[Outcome]:
    """Events whose categories are all as likely."""
    rng = np.random.default_rng(0)
    base = 1 + (buckets + 1) * np.arange(FIELDS)
    ids, labels = rng.integers(0, buckets, (count, FIELDS)) + base, rng.integers(0, 2, count).astype(float)
    one, none = np.ones(FIELDS, np.float32), np.zeros(0, np.float32)
    place = Origin(EVENTS, 0, 0)
    events = [Event("", "", 0.0, Encoded(ids[i], one, none), place, labels[i]) for i in range(count)]
    return [outcome(event, SERVED) for event in events]


def _fill(learner: Learner, size: int) -> None:
    """As if so many events had been learned."""
    rng = np.random.default_rng(1)
    memory, policy = learner.memory, learner.memory.policy
    memory.ids[:] = rng.integers(0, 1000, memory.ids.shape) + 1 + 1001 * np.arange(FIELDS)
    memory.weights[:] = 1.0
    memory.y[:] = rng.integers(0, 2, size)
    if policy is not None:
        policy.load_state_dict({"seen": size, "held": size})


def tickets(sizes: tuple[int, ...]) -> Found:
    for size in sizes:
        config = Join(attribution_window_s=4.0 * size, max_tickets=2 * size, memory_tickets=2 * size)
        joiner = Joiner(config, Counter())
        waiting = Waiting(joiner)
        while waiting.last < size:
            waiting.event()
        profile = cProfile.Profile()
        profile.enable()
        waiting.turn(1000)
        profile.disable()
        calls = sum(entry.callcount for entry in profile.getstats())
        cost = _best(lambda: waiting.turn(MEASURED), MEASURED)  # noqa: B023
        yield size, {"us_per_event": cost, "calls": calls / 1000, "waiting": len(joiner.tickets)}


class Waiting:
    """Events whose labels come once as many later ones wait as did when the first label came."""

    def __init__(self, joiner: Joiner) -> None:
        self.joiner, self.last, self.first = joiner, 0, 0
        self.events, self.labels = Partition(EVENTS, 0), Partition(LABELS, 0)

    def event(self) -> None:
        ids, one = np.arange(FIELDS, dtype=np.int64), np.ones(FIELDS, np.float32)
        scores = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
        features = Encoded(ids, one, np.zeros(0, np.float32))
        now = float(self.last)
        list(self.joiner.advance(self.events, now))
        self.joiner.add(Ticket(str(self.last), now, features, scores, Origin(EVENTS, 0, self.last), "", "k"))
        self.last += 1

    def label(self) -> None:
        now = float(self.last)
        list(self.joiner.advance(self.labels, now))
        joined = self.joiner.label(Label(str(self.first), 1.0, now, Origin(LABELS, 0, self.first)))
        assert joined is not None  # noqa: S101 - it waits
        self.first += 1

    def turn(self, count: int) -> None:
        for _ in range(count):
            self.event()
            self.label()


KINDS: dict[str, Callable[[tuple[int, ...]], Found]] = {
    "events": events,
    "rows": rows,
    "replay": replay,
    "tickets": tickets,
}
