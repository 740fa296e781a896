"""`bench continual`: methods against forgetting, on streams that forget and streams that drift, paired over seeds."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamcl.bench import continual_sequences
from streamcl.bench.continual_anchors import ANCHORS
from streamcl.bench.continual_avalanche import AVALANCHE, MISSING, avalanche_er
from streamcl.bench.continual_course import Course
from streamcl.bench.continual_plain import PLAIN
from streamcl.bench.continual_recipes import FIELDS, PROMISES, Field, Promise, recipes
from streamcl.bench.continual_run import DEFINITIONS, Ours, Run, measure
from streamcl.bench.continual_streams import STREAMS
from streamcl.bench.options import Options
from streamcl.bench.peer_python import interpreter
from streamcl.bench.quality import Floats, paired_p
from streamcl.bench.report import Bar, Curve, Report, Row, Value, progress
from streamcl.bench.streams import DataError
from streamcl.protocols import StreamclError

READS = {"data", "stream", "task", "method", "seeds"}

QUICK_SEEDS = 2
ONCE = {"river adaptive forest"}
"""So slow that one seed has to do."""

RECIPES = recipes()
ENTRANTS = (*RECIPES, *ANCHORS, *PLAIN, *AVALANCHE)
"""Everybody who may take part, by name."""


def pass_over(name: str, course: Course, seed: int) -> Run:
    """What the entrant's one pass over the stream comes to."""
    if name in AVALANCHE:
        return avalanche_er(name, course, seed)
    if name in RECIPES:
        return measure(course, Ours(course, RECIPES[name], seed))
    return measure(course, PLAIN[name](course, seed) if name in PLAIN else ANCHORS[name](course, seed))


PAPERS = (
    "published figures, not measured here: GEM .83, permuted MNIST, 20 x 1,000 (Lopez-Paz & Ranzato 2017); ER .92,"
    " split MNIST, one pass, 1,000 remembered (ContinualAI's baselines); Elec2: adaptive random forest 89.3 % (CapyMOA)"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One entrant on one seed of a stream: what a process of its own can do."""

    stream: str
    name: str
    seed: int
    quick: bool
    data: Path | None

    def __call__(self) -> Run | str:
        """What it comes to, or why it could not be: one entrant that fails is a finding, and no end of the others."""
        progress(f"{self.stream}, seed {self.seed}: {self.name}")
        course = _course(self.stream, self.data, self.seed, self.quick)
        try:
            return pass_over(self.name, course, self.seed)
        except StreamclError as error:
            return str(error)


@functools.lru_cache(maxsize=1)
def _course(stream: str, data: Path | None, seed: int, quick: bool) -> Course:
    return STREAMS[stream](data, seed, quick)


def run(options: Options) -> Report:
    """All streams whose data is there, or the one that is asked for; all entrants, or the control and `--method`.

    `--task sequences`: recurrent backbones and their credit instead.
    """
    start = time.perf_counter()
    if options.choice("task", ("methods", "sequences"), "methods") == "sequences":
        return _sequences(options, start)
    courses, missing = _courses(options)
    missing += [] if interpreter() else [f"left out: {MISSING}"]
    names = {stream: _names(options, FIELDS[stream]) for stream in courses}
    seeds = {stream: options.seed_list(QUICK_SEEDS if options.quick else FIELDS[stream].seeds) for stream in courses}
    jobs = [
        Job(stream, name, seed, options.quick, options.data)
        for stream in courses
        for seed in seeds[stream]
        for name in names[stream]
        if seed == 0 or name not in ONCE
    ]
    found = Findings(dict(zip(jobs, _side_by_side(jobs), strict=True)))
    return Report(
        bench="continual",
        config={
            "quick": options.quick,
            "streams": {stream: _described(course) for stream, course in courses.items()},
            "recipes": {name: RECIPES[name] for stream in courses for name in names[stream] if name in RECIPES},
        },
        seeds=max(seeds.values(), key=len),
        seconds=time.perf_counter() - start,
        rows=[found.row(stream, name) for stream, name in found.runs],
        bars=found.bars(options.quick),
        headline={f"best_{stream}": found.best(stream) for stream in courses},
        notes=[*DEFINITIONS, *_chosen(courses), PAPERS, *missing, *found.failures],
        curves=[found.curve(stream, name) for stream, name in found.runs],
        axes=("events", "figure named above"),
    )


def _sequences(options: Options, start: float) -> Report:
    seeds = options.seed_list(1 if options.quick else 5)
    rows, bars = continual_sequences.measure(options.quick, seeds)
    return Report(
        bench="continual",
        config={"quick": options.quick, "task": "sequences"},
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=rows,
        bars=bars,
        notes=[continual_sequences.DEFINITION],
    )


def _courses(options: Options) -> tuple[dict[str, Course], list[str]]:
    """Seed 0 of each stream; and what is left out, with the reason. Raises DataError if that was asked for by name."""
    if options.stream:
        stream = options.choice("stream", STREAMS, "split-digits")
        return {stream: _course(stream, options.data, 0, options.quick)}, []
    courses, missing = {}, []
    for stream in STREAMS:
        try:
            courses[stream] = STREAMS[stream](options.data, 0, options.quick)
        except DataError as error:
            missing.append(f"left out: {stream}: {error}")
    return courses, missing


def _names(options: Options, field: Field) -> list[str]:
    if options.method:
        wanted = options.choice("method", ENTRANTS, field.control)
        return list(dict.fromkeys((field.control, wanted)))
    peers = field.peers if interpreter() and not options.quick else ()
    return [*field.names(options.quick), *field.others(options.quick), *peers]


def _described(course: Course) -> dict[str, object]:
    settings = {name: value for name, value in course.settings.items() if name != "features"}
    sizes = {"events": len(course.rows), "held_out": sum(map(len, course.held_out)), "delay": course.delay}
    return {"source": course.source, **sizes, **settings, "memory": dict(course.memory)}


def _chosen(courses: Mapping[str, Course]) -> list[str]:
    return [f"{stream}: {course.source}; {course.chosen}" for stream, course in courses.items() if course.chosen]


def _side_by_side(jobs: Sequence[Job]) -> list[Run | str]:
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers == 1:
        return [job() for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(Job.__call__, jobs))


class Findings:
    """All runs, by stream and entrant; and those that failed, with the reason."""

    def __init__(self, runs: Mapping[Job, Run | str]) -> None:
        self.asked = {(job.stream, job.name) for job in runs}
        self.runs: dict[tuple[str, str], dict[int, Run]] = {}
        self.failures: list[str] = []
        for job, found in runs.items():
            if isinstance(found, Run):
                self.runs.setdefault((job.stream, job.name), {})[job.seed] = found
            else:
                self.failures.append(f"failed: {job.stream}: {job.name}, seed {job.seed}: {found}")

    def values(self, stream: str, name: str, figure: str) -> Floats:
        """(seeds,)"""
        return np.array([run_.figures[figure] for run_ in self.runs[stream, name].values()])

    def pairs(self, stream: str, name: str, other: str, figure: str) -> tuple[Floats, Floats]:
        """(n,) each, of the seeds that both were run with."""
        ours, theirs = (self.runs.get((stream, each), {}) for each in (name, other))
        seeds = [seed for seed in ours if seed in theirs and figure in ours[seed].figures]
        values = [[runs[seed].figures[figure] for seed in seeds] for runs in (ours, theirs)]
        return np.array(values[0]), np.array(values[1])

    def row(self, stream: str, name: str) -> Row:
        """Means over seeds; of the main figures also the deviation, and what is added to the stream's control."""
        runs, field = self.runs[stream, name], FIELDS[stream]
        found: dict[str, Value] = {"seeds": len(runs)}
        for figure in next(iter(runs.values())).figures:
            values = self.values(stream, name, figure)
            found[figure] = float(values.mean())
            if figure in field.compared:
                found[f"{figure}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        for figure in field.compared if name != field.control else ():
            ours, theirs = self.pairs(stream, name, field.control, figure)
            if len(ours):
                found[f"d_{figure}"] = float((ours - theirs).mean())
                found[f"p_{figure}"] = paired_p(ours, theirs)
        return Row(f"{stream}: {name}", found, table=stream)

    def best(self, stream: str) -> str:
        """The recipe whose main figure is best, mean over seeds."""
        figure = FIELDS[stream].compared[0]
        sign = -1.0 if "regret" in figure else 1.0
        names = [name for of, name in self.runs if of == stream and name in RECIPES]
        return max(names, key=lambda name: sign * float(self.values(stream, name, figure).mean()), default="none")

    def bars(self, quick: bool) -> list[Bar]:
        """Of the promises whose stream and recipes were asked for; NaN, which meets none, where one has failed."""
        held = [p for p in PROMISES if {(p.stream, p.recipe), (p.stream, p.minus or p.recipe)} <= self.asked]
        return [Bar(str(p), self.promised(p), p.quick_limit if quick else p.limit) for p in held]

    def promised(self, promise: Promise) -> float:
        ours, theirs = self.pairs(promise.stream, promise.recipe, promise.minus or promise.recipe, promise.figure)
        if not len(ours):
            return math.nan
        return float((ours - theirs).mean() if promise.minus else ours.mean())

    def curve(self, stream: str, name: str) -> Curve:
        """The mean over seeds."""
        curves = [run_.curve for run_ in self.runs[stream, name].values()]
        length = min(len(y) for _, y in curves)
        x = curves[0][0][:length]
        y = np.mean([y[:length] for _, y in curves], axis=0)
        return Curve(name, x.tolist(), y.tolist(), panel=f"{stream}: {FIELDS[stream].shown}")
