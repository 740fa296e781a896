"""`bench plasticity --task slowly-changing-regression`: does the error stay low for a million examples?"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
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
from streamcl.bench.plasticity_tasks import BETA, BITS, CHANGE_EVERY, SLOW_BITS, TARGET_UNITS, SlowlyChanging
from streamcl.bench.quality import Floats
from streamcl.bench.report import Bar, Curve, Report, Row, Value, progress

HIDDEN = 5
BIN = 100_000

METHODS = by_name(
    [
        Method("linear", linear=True),
        Method(BACKPROP),
        Method("backprop, lr .001", learning_rate=0.001),
        Method(CONTINUAL, replacement_rate=1e-4, maturity=100),
        Method("l2 .001", l2=1e-3),
        Method("l2 .01", l2=1e-2),
        Method("l2_init .01", l2_init=1e-2),
        Method("shrink_and_perturb", l2=1e-2, noise=1e-3),
        Method("weight_clipping", clipping=2.0),
        Method("upgd", upgd=True),
        Method("redo", redo_every=1000),
        Method("self_normalized_resets", silence=True),
        Method("layer_norm", layer_norm=True),
    ]
)


@dataclass(frozen=True, slots=True)
class Size:
    """`gap`, `rise` and `worst` are limits."""

    examples: int
    seeds: int
    gap: float
    rise: float
    worst: float


FULL = Size(1_000_000, 30, gap=0.4, rise=0.1, worst=0.87)
QUICK = Size(200_000, 10, gap=0.15, rise=0.2, worst=0.87)

NOTES = (
    "mse_N: squared error of the N-th 100,000 examples, each predicted before it was learned from, mean over seeds; se:"
    " standard error over seeds; rise: last - first; gain: backprop - this method in the last 100,000, paired over"
    " seeds (same stream, same initial weights), with its standard error and the p of a two-sided paired t-test;"
    " silent: share of hidden values that were 0 in the first and the last 100,000",
    f"stream: {BITS} bits, the first {SLOW_BITS} redrawn at once every {CHANGE_EVERY:,} examples, the others at each;"
    f" target: {TARGET_UNITS} threshold units, beta {BETA}; thresholds as in the authors' code, with"
    " (20 - sum w + b) / 2 where the paper's text has the number of weights at -1",
    f"learner: {BITS}-{HIDDEN}-1 ReLU, Kaiming uniform, biases 0, batch 1, gradient 2e, SGD .01 unless said; single"
    " precision; decay inside the gradient, of biases too; continual backpropagation: rate 1e-4, maturity 100, decay"
    " .99, contribution utility with today's weights, bias transfer",
    "L2, L2-init, shrink-and-perturb, and the rate of continual backpropagation: the best of a few tried on this very"
    " task, other seeds, so no forecast; weight"
    " clipping (zeta 2), UPGD (beta .9999, sigma .1, decay .01), ReDo (tau .025, every 1,000), self-normalised resets"
    " (percentile .99, first 1,000, 100 to 10,000, revisited every 10,000): the product's defaults, untuned here",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One seed: squared error and share of zero activations by method and bin. # (bins,)"""

    errors: Mapping[str, Floats]
    silent: Mapping[str, Floats]


def run(options: Options) -> Report:
    """Every method on the same stream, seed by seed."""
    start = time.perf_counter()
    size = QUICK if options.quick else FULL
    if options.events is not None:
        size = replace(size, examples=max(2, options.events // BIN) * BIN)
    seeds, methods = options.seed_list(size.seeds), chosen(options, METHODS)
    runs = side_by_side(lambda seed: measure(seed, methods, size.examples // BIN), seeds)
    found = Findings(methods, runs, size)
    return Report(
        bench="plasticity",
        config={
            "task": "slowly-changing-regression",
            "quick": options.quick,
            "examples": size.examples,
            "change_every": CHANGE_EVERY,
            "widths": [BITS, HIDDEN, 1],
            "learning_rate": METHODS[BACKPROP].learning_rate,
            "replacement_rate": METHODS[CONTINUAL].replacement_rate,
            "maturity": METHODS[CONTINUAL].maturity,
            "dtype": "float32",
        },
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=[found.row(method) for method in methods],
        bars=found.bars(),
        notes=NOTES,
        curves=found.curves(),
        axes=("examples", "squared error, mean over seeds"),
    )


def measure(seed: int, methods: Sequence[Method], bins: int) -> Run:
    """`bins` bins; one is a multiple of the stretch between two changes."""
    learners = {method.name: Learner((BITS, HIDDEN, 1), method, seed) for method in methods}
    errors = {name: np.zeros(bins) for name in learners}
    silent = {name: np.zeros(bins) for name in learners}
    regions = SlowlyChanging(seed).regions()
    each = BIN // CHANGE_EVERY
    for place in range(bins):
        for learner in learners.values():
            learner.units.fired[:] = 0
        for examples in itertools.islice(regions, each):
            for name, learner in learners.items():
                errors[name][place] += learner.learn(examples)[0].mean() / each
        for name, learner in learners.items():
            silent[name][place] = learner.silent(BIN).mean() if len(learner.widths) > 2 else np.nan
    progress(f"slowly-changing-regression: seed {seed} done")
    return Run(errors, silent)


class Findings:
    """All seeds together."""

    def __init__(self, methods: Sequence[Method], runs: Sequence[Run], size: Size) -> None:
        self.size = size
        self.errors = {m.name: np.array([run.errors[m.name] for run in runs]) for m in methods}  # (seeds, bins)
        self.silent = {m.name: np.array([run.silent[m.name] for run in runs]) for m in methods}

    def row(self, method: Method) -> Row:
        errors, silent = self.errors[method.name], self.silent[method.name]
        values: dict[str, Value] = {f"mse_{i + 1}": float(errors[:, i].mean()) for i in range(errors.shape[1])}
        values |= {"se_first": standard_error(errors[:, 0]), "se_last": standard_error(errors[:, -1])}
        values["rise"] = float((errors[:, -1] - errors[:, 0]).mean())
        values["rise_se"] = standard_error(errors[:, -1] - errors[:, 0])
        if method.name != BACKPROP:
            values |= compared("gain", self.errors[BACKPROP][:, -1], errors[:, -1])
        if not method.linear:
            values |= {"silent_first": float(silent[:, 0].mean()), "silent_last": float(silent[:, -1].mean())}
        return Row(method.name, values)

    def bars(self) -> list[Bar]:
        """Continual backpropagation keeps what backpropagation loses."""
        ours, theirs = self.errors[CONTINUAL], self.errors[BACKPROP]
        gap, rise = float((theirs - ours)[:, -1].mean()), float((ours[:, -1] - ours[:, 0]).mean())
        return [
            Bar(f"last 100,000: {BACKPROP} - {CONTINUAL}", gap, self.size.gap),
            Bar(f"{CONTINUAL}: last 100,000 - first", rise, self.size.rise, at_least=False),
            Bar(f"{CONTINUAL}: last 100,000, worst seed", float(ours[:, -1].max()), self.size.worst, at_least=False),
        ]

    def curves(self) -> list[Curve]:
        ends = [float(BIN * (i + 1)) for i in range(self.size.examples // BIN)]
        return [Curve(name, ends, [float(v) for v in e.mean(axis=0)]) for name, e in self.errors.items()]
