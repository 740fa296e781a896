"""`bench plasticity --task drifting-ctr`: the product's worker on a click stream that drifts, its rules on and off."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamcl.bench.drive import Topic
from streamcl.bench.options import Options
from streamcl.bench.plasticity_methods import CONTINUAL, compared, standard_error
from streamcl.bench.quality import Floats, auc, blocks, losses
from streamcl.bench.report import Bar, Curve, Report, Row, Value, progress
from streamcl.bench.streams import synthetic
from streamcl.methods import PLASTICITY

STREAMS = ("drifting", "switching", "recurring")
OFF = "off"
BUCKETS = 4096
HARM = 0.002  # nats; what a rule may cost where nothing asks for it
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adagrad": {"kind": "adagrad"},
    "sgd": {"kind": "sgd", "learning_rate": 0.05, "embedding_learning_rate": 0.05},
}


@dataclass(frozen=True, slots=True)
class Size:
    events: int
    seeds: int


FULL, QUICK = Size(20_000, 5), Size(2000, 2)

NOTES = (
    "the product's worker, deepfm by default settings but for what is said here; log_loss (nats) and auc of the last"
    " half of the stream, every score given before its label was learned from; best_possible: log-loss of the true"
    " probabilities; minus_off: mean over seeds of the difference to no rule on the same events, with its standard"
    " error and the p of a two-sided paired t-test; below 0 is better for log_loss, above 0 for auc",
    "rules with their default configuration; optimisers: " + ", ".join(f"{k} {v}" for k, v in OPTIMIZERS.items()),
    "streams: streamcl.bench.streams.synthetic; the drift is gradual, or a few switches: little is expected of rules"
    " that keep a net plastic (they pay under many abrupt changes), so nothing is promised but that they do no harm",
)


@dataclass(frozen=True, slots=True)
class Job:
    """Every rule with every optimiser on one seed of a stream."""

    stream: str
    events: int
    rules: tuple[str, ...]
    seed: int

    def __call__(self) -> Judged:
        data = synthetic(self.stream, self.events, self.seed)
        topic = Topic(data)
        features = {name: {"kind": "categorical", "buckets": BUCKETS} for name in data.features}
        found = {}
        for optimizer, settings in OPTIMIZERS.items():
            for rule in self.rules:
                progress(f"{self.stream}, seed {self.seed}: {optimizer}, {rule}")
                plasticity = [] if rule == OFF else [{"kind": rule}]
                shape = {"seed": self.seed, "features": features, "optimizer": settings, "plasticity": plasticity}
                found[optimizer, rule] = topic.run(rule, shape).scores
        best = data.best_losses if data.best_losses is not None else np.full(self.events, np.nan)
        return Judged(data.labels(), found, best)


@dataclass(frozen=True, slots=True)
class Judged:
    """Labels (N,), scores (N,) by optimiser and rule, and the best possible losses (N,)."""

    labels: Floats
    scores: Mapping[tuple[str, str], Floats]
    best: Floats

    def log_loss(self, place: tuple[str, str]) -> float:
        half = len(self.labels) // 2
        return float(losses(self.labels[half:], self.scores[place][half:]).mean())

    def auc(self, place: tuple[str, str]) -> float:
        half = len(self.labels) // 2
        return auc(self.labels[half:], self.scores[place][half:])


def run(options: Options) -> Report:
    """Paired over seeds; a process on every core."""
    start = time.perf_counter()
    size = QUICK if options.quick else FULL
    stream = options.choice("stream", STREAMS, "drifting")
    rule = options.choice("method", PLASTICITY, CONTINUAL)
    events, seeds = options.count("events", size.events), options.seed_list(size.seeds)
    rules = tuple(dict.fromkeys((OFF, CONTINUAL, rule)))
    found = _judge([Job(stream, events, rules, seed) for seed in seeds])
    return Report(
        bench="plasticity",
        config={"task": "drifting-ctr", "stream": stream, "quick": options.quick, "events": events, **OPTIMIZERS},
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=[_row(found, optimizer, rule) for optimizer in OPTIMIZERS for rule in rules],
        aims=[_aim(found, optimizer, rule) for optimizer in OPTIMIZERS for rule in rules[1:]],
        notes=NOTES,
        curves=[_curve(found, optimizer, rule) for optimizer in OPTIMIZERS for rule in rules],
        axes=("events", "log-loss (nats), mean over seeds"),
    )


def _judge(jobs: Sequence[Job]) -> list[Judged]:
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers == 1:
        return [job() for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(Job.__call__, jobs))


def _log_losses(found: Sequence[Judged], optimizer: str, rule: str) -> Floats:
    """(seeds,)"""
    return np.array([judged.log_loss((optimizer, rule)) for judged in found])


def _row(found: Sequence[Judged], optimizer: str, rule: str) -> Row:
    loss = _log_losses(found, optimizer, rule)
    area = np.array([judged.auc((optimizer, rule)) for judged in found])
    best = float(np.mean([judged.best[len(judged.best) // 2 :].mean() for judged in found]))
    values: dict[str, Value] = {"log_loss": float(loss.mean()), "log_loss_se": standard_error(loss)}
    values |= {"best_possible": best, "auc": float(area.mean()), "auc_se": standard_error(area)}
    if rule != OFF:
        values |= compared("log_loss_minus_off", loss, _log_losses(found, optimizer, OFF))
        values |= compared("auc_minus_off", area, np.array([judged.auc((optimizer, OFF)) for judged in found]))
    return Row(f"{optimizer}: {rule}", values)


def _aim(found: Sequence[Judged], optimizer: str, rule: str) -> Bar:
    difference = float((_log_losses(found, optimizer, rule) - _log_losses(found, optimizer, OFF)).mean())
    return Bar(f"{optimizer}: log-loss of {rule} - {OFF}", difference, HARM, at_least=False)


def _curve(found: Sequence[Judged], optimizer: str, rule: str) -> Curve:
    every = np.array([losses(judged.labels, judged.scores[optimizer, rule]) for judged in found])
    return Curve(rule, *blocks(np.asarray(every.mean(axis=0))), panel=optimizer)
