"""`bench plasticity --task overhead`: what a rule adds to a learning step of the product's eager engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.bench.options import Options
from streamcl.bench.plasticity_learner import Examples, Learner, Method
from streamcl.bench.report import Bar, Report, Row, Value, progress
from streamcl.config import Config
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer, Layout
from streamcl.methods import PLASTICITY
from streamcl.plasticity import build_diagnostics
from streamcl.plugin import Plan, Rows, Step

INPUTS, HIDDEN, CLASSES = 784, (100, 100, 100), 10
OFF, LIMIT = "off", 1.15
DIAGNOSTICS = "diagnostics"
PLAN = Plan()
CONTINUAL = "continual_backprop"


@dataclass(frozen=True, slots=True)
class Size:
    rounds: int
    steps: int  # of each case in a round, in turns of `TURN`


FULL, QUICK = Size(15, 600), Size(5, 100)
TURN = 20  # steps
SLOW = 1e-4  # a learning rate at which no unit dies of noise: the compiled learner is quicker with dead ones

NOTES = (
    "us_per_step: one `Eager.step` (gradient, optimiser, rules) on one example, processor time of one thread, median of"
    " the rounds; ratio: to `off` of the same optimiser, median over rounds of the quotient within a round, in"
    " which the two take turns of a few steps; low, high: the least and the greatest quotient",
    f"model mlp {INPUTS}-{'-'.join(map(str, HIDDEN))}-{CLASSES}, numeric features, SGD unless said; every rule with its"
    " default configuration unless said",
    "diagnostics: as a Learner has them by default; ranks and weights, reckoned once in 10,000 steps, are timed by"
    " themselves: median of 15, per step",
    "compiled: the learner of this bench's other tasks, which is no part of the product",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration of the product, beside its base, which it differs from by `settings` alone."""

    name: str
    settings: Mapping[str, Any]
    base: str = OFF
    base_settings: Mapping[str, Any] = field(default_factory=dict)


def cases() -> list[Case]:
    adam = {"optimizer": {"kind": "adam", "learning_rate": 1e-4}}
    return [
        *(Case(kind, {"plasticity": [{"kind": kind}]}) for kind in PLASTICITY),
        Case(f"{CONTINUAL}, exact", {"plasticity": [{"kind": CONTINUAL, "exact": True}]}),
        Case(DIAGNOSTICS, {DIAGNOSTICS: {}}),
        Case("layer_norm", {"model": {"layer_norm": True}}),
        Case(f"{CONTINUAL}, adam", {"plasticity": [{"kind": CONTINUAL}]}, f"{OFF}, adam", adam),
    ]


def run(options: Options) -> Report:
    start = time.perf_counter()
    size = QUICK if options.quick else FULL
    rows: dict[str, Row] = {}
    for case in cases():
        progress(f"overhead: {case.name}")
        base, mine = beside_its_base(case, size)
        rows.setdefault(case.base, _row(case.base, base))
        rows[case.name] = _row(case.name, mine, base)
    ratio = rows[CONTINUAL].values["ratio"]
    return Report(
        bench="plasticity",
        config={"task": "overhead", "quick": options.quick, "rounds": size.rounds, "steps": size.steps, "threads": 1},
        seeds=[0],
        seconds=time.perf_counter() - start,
        rows=[*rows.values(), reckoning(), *compiled(size)],
        bars=[Bar(f"a step with {CONTINUAL}, by one without", float(str(ratio)), LIMIT, at_least=False)],
        notes=NOTES,
    )


def beside_its_base(case: Case, size: Size) -> tuple[list[float], list[float]]:
    """Microseconds of a step without the rule and with it, one of each for each round."""
    engines = engine(case.base_settings), engine({**case.base_settings, **case.settings})
    turns = [[_example(step) for step in range(start, start + TURN)] for start in range(0, size.steps, TURN)]
    spent: tuple[list[float], list[float]] = ([], [])
    for place in range(size.rounds + 1):
        total = [0.0, 0.0]
        for turn in turns:  # short ones: what slows the machine down for a while slows both
            for which, made in enumerate(engines):
                total[which] += _time(made, turn)
        for which in (0, 1) if place else ():  # in the first, caches are cold and units not mature
            spent[which].append(total[which] / size.steps * 1e6)
    return spent


def engine(settings: Mapping[str, Any]) -> Eager:
    """The product's engine on numeric features alone."""
    made = Config.parse(
        {
            "name": "bench",
            "task": "multiclass",
            "events": {"url": "memory://bench/overhead", "label": "y"},
            "features": {f"x{place}": "numeric" for place in range(INPUTS)},
            **settings,
            "model": {"kind": "mlp", "hidden": list(HIDDEN), "classes": CLASSES, **settings.get("model", {})},
            "optimizer": {"kind": "sgd", "learning_rate": 0.01, **settings.get("optimizer", {})},
        },
        "bench",
    )
    return (Watched if DIAGNOSTICS in settings else Eager)(made, Featurizer(made).layout)


class Watched(Eager):
    """Its steps are looked at, as a Learner's are."""

    def __init__(self, config: Config, layout: Layout) -> None:
        super().__init__(config, layout)
        self.diagnostics = build_diagnostics(config, self.dense, self.model, self.layers)

    def step(self, step: Step) -> bool:
        done = super().step(step)
        if done and self.diagnostics:
            self.diagnostics.observe(self.gradient_norm)
        return done


def reckoning() -> Row:
    """What the diagnostics do once in so many steps, per step."""
    made = engine({DIAGNOSTICS: {"sample_every_steps": 1}})
    diagnostics = made.diagnostics if isinstance(made, Watched) else None
    if diagnostics is None:
        raise ValueError("diagnostics: the model has no hidden layers")
    for step in range(diagnostics.window):
        _time(made, [_example(step)])
    spent = []
    for _ in range(15):
        start = time.thread_time()
        diagnostics.reckon()
        spent.append((time.thread_time() - start) / diagnostics.report_every * 1e6)
    return Row(f"{DIAGNOSTICS}, ranks and weights", {"us_per_step": statistics.median(spent)})


def _example(step: int) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(step)
    none = torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0)
    dense = torch.from_numpy(rng.random((1, INPUTS), np.float32))
    return *none, dense, torch.tensor([float(rng.integers(CLASSES))]), torch.ones(1)


def _time(made: Eager, examples: Sequence[tuple[Tensor, ...]]) -> float:
    start = time.thread_time()
    for ids, weights, dense, y, share in examples:
        made.step(Step(0, PLAN, Rows(ids, weights, dense, y), None, share))
    return time.thread_time() - start


def _row(name: str, spent: Sequence[float], base: Sequence[float] | None = None) -> Row:
    values: dict[str, Value] = {"us_per_step": statistics.median(spent)}
    if base is not None:
        ratios = [mine / other for mine, other in zip(spent, base, strict=True)]
        values |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return Row(name, values)


def compiled(size: Size) -> list[Row]:
    """The same of the bench's own learner."""
    rng = np.random.default_rng(0)
    count = 10 * size.steps
    pixels = rng.integers(0, 256, (count, INPUTS)) * (rng.random((count, INPUTS)) < 0.2)
    examples = Examples(pixels.astype(np.uint8), rng.integers(0, CLASSES, count).astype(np.float64), 1 / 255)
    widths = INPUTS, *HIDDEN, CLASSES
    pair = {
        f"compiled: {method.name}": Learner(widths, method, 0, classes=True)
        for method in (Method(OFF, SLOW), Method(CONTINUAL, SLOW, replacement_rate=1e-4))
    }
    turns = np.split(np.arange(count), count // 100)
    spent: dict[str, list[float]] = {name: [] for name in pair}
    for place in range(size.rounds + 1):
        total = dict.fromkeys(pair, 0.0)
        for turn in turns:
            for name, learner in pair.items():
                start = time.thread_time()
                learner.learn(examples, turn)
                total[name] += time.thread_time() - start
        for name in pair if place else ():  # the first compiles
            spent[name].append(total[name] / count * 1e6)
    base, other = pair
    return [_row(base, spent[base]), _row(other, spent[other], spent[base])]
