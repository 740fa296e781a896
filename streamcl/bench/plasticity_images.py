"""`bench plasticity --task permuted-mnist|label-permuted`: the accuracy of one task after another, each seen once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from streamcl.bench.options import Options
from streamcl.bench.plasticity_learner import Learner, Method
from streamcl.bench.plasticity_methods import (
    BACKPROP,
    CONTINUAL,
    by_name,
    chosen,
    compared,
    side_by_side,
    standard_error,
)
from streamcl.bench.plasticity_tasks import Images, Task
from streamcl.bench.quality import Floats
from streamcl.bench.report import Bar, Curve, Report, Row, Value, progress

HIDDEN = (100, 100, 100)
LOOKED_AT = 2000  # a unit is dead if it did not fire at the last so many examples of a task

THREE = [Method(BACKPROP), Method(CONTINUAL, replacement_rate=1e-4, maturity=100), Method("l2 .001", l2=1e-3)]
METHODS = by_name(
    [
        *THREE,
        Method("l2_init .001", l2_init=1e-3),
        Method("shrink_and_perturb", l2=1e-4, noise=1e-5),
        Method("weight_clipping", clipping=2.0),
        Method("redo", redo_every=1000),
        Method("self_normalized_resets", silence=True),
        Method("layer_norm", layer_norm=True),
    ]
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is learned, and what is promised: `falls` of backpropagation at least, `stays` of continual
    backpropagation at most, `gap` between the two at least, in points of accuracy, mean of `window` tasks.
    """

    tasks: int
    per_task: int
    seeds: int
    learning_rate: float = 0.01
    window: int = 10
    falls: float = 10.0
    stays: float = 1.0
    gap: float = 10.0
    methods: tuple[str, ...] | None = None  # all, unless said


PERMUTED = {
    "small": (
        Size(200, 10_000, 3),
        Size(30, 10_000, 2, window=5, falls=2.0, gap=2.0, methods=tuple(m.name for m in THREE)),
    ),
    "full-size": (
        Size(150, 60_000, 3, learning_rate=0.003, falls=4.0, gap=4.0, methods=tuple(m.name for m in THREE)),
        Size(2, 60_000, 2, learning_rate=0.003, window=1, falls=-3.0, gap=-3.0, methods=(BACKPROP, CONTINUAL)),
    ),
}
"""By preset, full and quick. `full-size`: as many examples a task as the paper has; the net stays small. Its quick run
is too short to see anything fall: it says that both learn.
"""

LABELS = Size(400, 2500, 3, gap=0.0), Size(60, 2500, 2, gap=-1.0, methods=tuple(m.name for m in THREE))

NOTES = (
    "accuracy in per cent of the examples of a task, each predicted before it was learned from; first, last: means of"
    " the first and last tasks, as many as `window` in the configuration; sd: over seeds; fall: first - last, paired"
    " within a seed; gain: this method - backprop in the last tasks, paired over seeds (same tasks, same initial"
    " weights), with its standard error and p; tasks differ by 1 to 2 points in difficulty",
    f"dead: share of hidden units that did not fire at the last {LOOKED_AT:,} examples; weight: mean absolute weight;"
    " both after the last task",
    "learner: 784-100-100-100-10 ReLU, Kaiming uniform, biases 0, pixels in [0, 1], softmax cross-entropy, SGD, batch"
    " 1, nothing says when a task begins; single precision; decay inside the gradient, of biases too; continual"
    " backpropagation: rate 1e-4, maturity 100, decay .99, contribution utility with today's weights, bias transfer",
    "the paper's net has 3 x 2,000 units and its stream 800 tasks of 60,000; L2 .001 and the rate of continual"
    " backpropagation were chosen on tasks of this kind, so no forecast; the others' numbers are the product's"
    " defaults, untuned, but for L2-init's .001; UPGD is left out: its compiled step takes a hundred times as long",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one seed: accuracy in per cent by task (tasks,); dead units and mean absolute weight at the end."""

    accuracy: Floats
    dead: float
    weight: float


def permuted(options: Options) -> Report:
    preset = options.choice("preset", PERMUTED, "small")
    images = Images(options.data)
    size = PERMUTED[preset][options.quick]
    report = _run(options, size, lambda seed: images.permuted(seed, size.per_task), images)
    return replace(report, config={"task": "permuted-mnist", "preset": preset, **report.config})


def label_permuted(options: Options) -> Report:
    images = Images(options.data)
    size = LABELS[options.quick]
    report = _run(options, size, lambda seed: images.label_permuted(seed, size.per_task), images)
    note = "labels are MNIST's ten, renamed at random every task; the source has EMNIST's 47"
    notes, config = [*report.notes, note], {"task": "label-permuted", **report.config}
    return replace(report, config=config, notes=notes, bars=[], aims=report.bars[-1:])


def _run(options: Options, size: Size, tasks: Callable[[int], Iterator[Task]], images: Images) -> Report:
    start = time.perf_counter()
    names = [name for name in METHODS if options.method or size.methods is None or name in size.methods]
    methods = [m.at(size.learning_rate) for m in chosen(options, {name: METHODS[name] for name in names})]
    seeds = options.seed_list(size.seeds)
    jobs = list(itertools.product(seeds, methods))
    runs = side_by_side(lambda job: measure(*job, tasks(job[0]), size.tasks, images), jobs)
    found = Findings(dict(zip(jobs, runs, strict=True)), size)
    return Report(
        bench="plasticity",
        config={
            "quick": options.quick,
            "tasks": size.tasks,
            "per_task": size.per_task,
            "window": size.window,
            "widths": [images.examples.inputs.shape[1], *HIDDEN, images.classes],
            "learning_rate": size.learning_rate,
            "replacement_rate": METHODS[CONTINUAL].replacement_rate,
            "maturity": METHODS[CONTINUAL].maturity,
            "dtype": "float32",
        },
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=[found.row(method.name) for method in methods],
        bars=found.bars(),
        notes=NOTES,
        curves=found.curves(),
        axes=("tasks", "accuracy (%), mean over seeds"),
    )


def measure(seed: int, method: Method, tasks: Iterator[Task], count: int, images: Images) -> Run:
    learner = Learner((images.examples.inputs.shape[1], *HIDDEN, images.classes), method, seed, classes=True)
    accuracy = np.zeros(count)
    for place, task in enumerate(itertools.islice(tasks, count)):
        examples = replace(images.examples, targets=task.targets)
        cut = max(len(task.order) - LOOKED_AT, 0)
        hits = learner.learn(examples, task.order[:cut], task.columns)[1].sum()
        learner.units.fired[:] = 0
        hits += learner.learn(examples, task.order[cut:], task.columns)[1].sum()
        accuracy[place] = 100.0 * hits / len(task.order)
        if (place + 1) % 50 == 0 or place + 1 == count:
            progress(f"{method.name}, seed {seed}, task {place + 1}: {accuracy[place]:.1f} %")
    weights = np.concatenate([weight.ravel() for weight, _ in learner.parameters()])
    return Run(accuracy, learner.dead(), float(np.abs(weights).mean()))


class Findings:
    """All seeds together."""

    def __init__(self, runs: Mapping[tuple[int, Method], Run], size: Size) -> None:
        self.size = size
        self.runs: dict[str, list[Run]] = {}
        for (_, method), run in runs.items():
            self.runs.setdefault(method.name, []).append(run)
        self.accuracy = {name: np.array([run.accuracy for run in found]) for name, found in self.runs.items()}

    def first(self, name: str) -> Floats:
        """(seeds,)"""
        return np.asarray(self.accuracy[name][:, : self.size.window].mean(axis=1))

    def last(self, name: str) -> Floats:
        """(seeds,)"""
        return np.asarray(self.accuracy[name][:, -self.size.window :].mean(axis=1))

    def fall(self, name: str) -> float:
        return float((self.first(name) - self.last(name)).mean())

    def row(self, name: str) -> Row:
        first, last = self.first(name), self.last(name)
        values: dict[str, Value] = {"task_1": float(self.accuracy[name][:, 0].mean())}
        for part, of in (("first", first), ("last", last)):
            values[part] = float(of.mean())
            values[f"{part}_sd"] = standard_error(of) * len(of) ** 0.5
        values |= {"fall": self.fall(name), "fall_se": standard_error(first - last)}
        values["least"] = float(last.min())
        if name != BACKPROP:
            values |= compared("gain", last, self.last(BACKPROP))
        values["dead"] = float(np.mean([run.dead for run in self.runs[name]]))
        values["weight"] = float(np.mean([run.weight for run in self.runs[name]]))
        return Row(name, values)

    def bars(self) -> list[Bar]:
        gap = float((self.last(CONTINUAL) - self.last(BACKPROP)).mean())
        return [
            Bar(f"{BACKPROP} falls, points", self.fall(BACKPROP), self.size.falls),
            Bar(f"{CONTINUAL} falls, points", self.fall(CONTINUAL), self.size.stays, at_least=False),
            Bar(f"last tasks: {CONTINUAL} - {BACKPROP}, points", gap, self.size.gap),
        ]

    def curves(self) -> list[Curve]:
        return [
            Curve(name, [float(i + 1) for i in range(found.shape[1])], [float(v) for v in found.mean(axis=0)])
            for name, found in self.accuracy.items()
        ]
