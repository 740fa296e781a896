"""`bench step`: what one learning step costs, in the compiled engine and beside it; and whether both engines agree."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streamcl.bench import step_device, step_plain
from streamcl.bench.options import OptionError, Options
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.bench.step_feed import CHUNK, ON, REPLAYED, SERVED, Stream, clicks, config_of, feed, outcome, prequential
from streamcl.bench.step_plain import DIM, FIELDS, HIDDEN, Floats
from streamcl.learner import Learner
from streamcl.records import EVENTS, Encoded, Event, Origin

READS = {"task", "device"}
TASKS = ("speed", "agreement", "start")

NOTES = (
    f"clicks: {FIELDS} categories x {DIM} -> {' -> '.join(map(str, HIDDEN))} -> 1, Adagrad, 1,000 rows a field;"
    " us_per_step: processor time of one learned event, memory writes and packing included, median of the rounds;"
    " ratios: median over rounds of the quotient within a round, in which all take turns",
    "plain torch: an nn.Module and autograd, rows gathered, torch.optim.Adagrad; bench/step_plain.py",
    "share of peak: 6 x weights x rows FLOP a step, over those of torch.mm of 1,024 x 1,024 on one thread just now",
    "digits: 64 numbers -> 64 -> 2, SGD, no replay; plain NumPy by hand; deep-river's pattern (dict -> tensor, autograd"
    " and torch.optim.SGD); ours: a dense vector, running norms off",
    "agreement: both engines on one stream with replay, resets and an error memory; float64 free-running; float32 from"
    " equal states step by step, and free-running by log-loss over the stream, median of five streams",
    "start: seconds from the import to the first learned event, in a process of its own; cold: not compiled yet",
)


def run(options: Options) -> Report:
    """Speed and agreement and start; or one of them. On a GPU see `step_device`."""
    if options.choice("device", ("cpu", "cuda"), "cpu") == "cuda":
        if options.task:
            raise OptionError("--task: on a GPU all is run at once; leave it out")
        return step_device.run(options.quick)
    began = time.perf_counter()
    chosen = (options.choice("task", TASKS, "speed"),) if options.task else TASKS
    rows: list[Row] = []
    bars: list[Bar] = []
    if "speed" in chosen:
        speed = Speed(3 if options.quick else 7, options.quick)
        rows += speed.rows
        bars += speed.bars
    if "agreement" in chosen:
        found = agreement(*((2_000, 100, 1) if options.quick else (20_000, 1_000, 5)))
        rows.append(Row("agreement", found, table="agreement"))
        bars += _agreement_bars(found)
    if "start" in chosen:
        rows += [Row(f"start, {name}", {"seconds": seconds}, table="start") for name, seconds in starts().items()]
    settings = {"quick": options.quick, "fields": FIELDS, "dim": DIM, "hidden": list(HIDDEN), "chunk": CHUNK}
    return Report("step", settings, [0], time.perf_counter() - began, rows, bars, notes=NOTES)


# speed


class Speed:
    """All contenders, in turns. Each runs a while first, so that memories are filled and units have fallen silent."""

    def __init__(self, rounds: int, quick: bool) -> None:
        self.rounds = rounds
        n = 1_024 if quick else 4_096
        self.stream = Stream(n)
        self.outcomes = [outcome(self.stream.event(i), SERVED) for i in range(n)]
        self.times: dict[str, list[float]] = {}
        self.rows: list[Row] = []
        self.bars: list[Bar] = []
        self._clicks("no replay", {}, 25.0)
        self._clicks(f"{REPLAYED} rows and cbp", ON, 8.0)
        self._digits(n)

    def _clicks(self, name: str, settings: dict[str, Any], limit: float) -> None:
        fused, eager = clicks("fused", **settings), clicks("eager", **settings)
        plain = step_plain.Torch(REPLAYED if settings else 0, renewing=bool(settings))
        few = len(self.outcomes) // 8

        def plain_steps() -> None:
            for i in range(few):
                plain.learn(self.stream.plain[i], self.stream.y[i])

        def plain_answers() -> None:
            for i in range(few):
                plain.predict(self.stream.plain[i])

        self._take_turns(
            {
                f"clicks, {name}: plain torch": (plain_steps, few),
                f"clicks, {name}: streamcl eager": (lambda: feed(eager, self.outcomes[:few]), few),
                f"clicks, {name}: streamcl fused": (lambda: feed(fused, self.outcomes), len(self.outcomes)),
                f"clicks, {name}: plain torch, an answer": (plain_answers, few),
                f"clicks, {name}: streamcl fused, an answer": (
                    lambda: fused.predict_many(self.stream.features),
                    len(self.outcomes),
                ),
            }
        )
        ours = f"clicks, {name}: streamcl fused"
        self.bars.append(Bar(f"{ours} / plain torch", self._times(ours, f"clicks, {name}: plain torch"), limit))
        weights = sum(a * b for a, b in zip((FIELDS * DIM, *HIDDEN), (*HIDDEN, 1), strict=True))
        flops = 6 * weights * (1 + (REPLAYED if settings else 0))
        rate, peak = flops / statistics.median(self.times[ours]), peak_flops()
        told = {"gflops": rate / 1e9, "peak_gflops": peak / 1e9, "share_of_peak": rate / peak}
        self.rows += [Row(f"clicks, {name}: arithmetic", told, table="arithmetic")]

    def _digits(self, n: int) -> None:
        rng = np.random.default_rng(0)
        x: Floats = rng.normal(size=(n, 64)).astype(np.float32)
        y = (x[:, :8].sum(1) > 0.0).astype(np.int64)
        model = {"kind": "mlp", "hidden": [64], "classes": 2}
        numbers = {f"x{i:02}": {"kind": "numeric", "scale": "none"} for i in range(64)}
        learner = Learner(config_of(numbers, model, {"kind": "sgd", "learning_rate": 0.01}, "fused", task="multiclass"))
        none = np.zeros(0, np.int64), np.zeros(0, np.float32)
        place = Origin(EVENTS, 0, 0)
        events = [Event("", "", 0.0, Encoded(*none, x[i]), place, float(y[i])) for i in range(n)]
        outcomes = [outcome(event, SERVED) for event in events]
        hand, river = step_plain.NumPy(64, 64, 2), step_plain.DeepRiver(64, 64, 2)
        dicts = [dict(zip(numbers, row, strict=True)) for row in x[: n // 8].tolist()]

        def by_hand() -> None:
            for row, label in zip(x, y.tolist(), strict=True):
                hand.learn(row, label)

        def by_river() -> None:
            for row, label in zip(dicts, y.tolist(), strict=False):
                river.learn_one(row, label)

        ours = "digits: streamcl fused"
        self._take_turns(
            {
                "digits: plain numpy": (by_hand, n),
                "digits: deep-river's pattern": (by_river, len(dicts)),
                ours: (lambda: feed(learner, outcomes), n),
            }
        )
        self.bars += [
            Bar(f"{ours} / plain numpy", self._times(ours, "digits: plain numpy"), 1.5),
            Bar(f"{ours} / deep-river's pattern", self._times(ours, "digits: deep-river's pattern"), 15.0),
        ]

    def _take_turns(self, contenders: dict[str, tuple[Callable[[], object], int]]) -> None:
        for name, (work, _) in contenders.items():
            progress(f"warming up: {name}")
            for _ in range(2):
                work()
        for _ in range(self.rounds):
            for name, (work, count) in contenders.items():
                start = time.process_time()
                work()
                self.times.setdefault(name, []).append((time.process_time() - start) / count)
        self.rows += [
            Row(name, {"us_per_step": 1e6 * (s := statistics.median(self.times[name])), "steps_per_s": 1.0 / s})
            for name in contenders
        ]

    def _times(self, ours: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(self.times[ours], self.times[other], strict=True))


def peak_flops() -> float:
    """Floating-point operations a second of one thread, in the largest product at hand."""
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    torch.mm(a, a)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        took.append(time.perf_counter() - start)
    return float(2 * 1024**3 / min(took))


# agreement


def agreement(n: int, steps: int, streams: int) -> dict[str, Any]:
    """How far the engines are apart."""
    progress(f"agreement: {n:,} events in float64")
    stream, more = Stream(n, 1), {**ON, "error_memory": [{"kind": "knn"}]}
    eager, fused = (clicks(engine, "float64", **more) for engine in ("eager", "fused"))
    draws: list[list[int]] = []
    uniform = eager.memory.uniform

    def watched(count: int, step: int) -> Any:
        found = uniform(count, step)
        draws.append(found[0].tolist())
        return found

    eager.memory.uniform = watched  # type: ignore[method-assign, assignment]
    assert fused.fused is not None  # noqa: S101 - it was asked for
    fused.fused.drawn = []
    served = [prequential(learner, stream) for learner in (eager, fused)]
    also = [rows.tolist() for rows in fused.fused.drawn if len(rows) and rows[0] >= 0]
    resets = [learner.rules["continual_backprop"] for learner in (eager, fused)]
    found: dict[str, Any] = {
        "events": n,
        "largest_difference_of_weights": float((eager.engine.dense.flat - fused.engine.dense.flat).abs().max()),
        "largest_difference_of_rows": float((eager.engine.table - fused.engine.table).abs().max()),
        "largest_difference_of_scores": float(np.abs(served[0] - served[1]).max()),
        "replayed_alike": draws == also,
        "units_reset": sum(resets[0].replaced),  # type: ignore[attr-defined]
        "reset_alike": all(bool(torch.equal(getattr(resets[0], name), getattr(resets[1], name))) for name in ("born",)),
    }
    progress(f"agreement: {steps:,} steps in float32")
    eager, fused = (clicks(engine, "float32", **more) for engine in ("eager", "fused"))
    for learner in (eager, fused):
        prequential(learner, stream)
    apart = 0.0
    for i in range(steps):
        eager.load_state_dict(fused.state_dict())
        each = outcome(stream.event(i), fused.predict(stream.features[i]))
        eager.learn(each)
        fused.learn(each)
        differences = eager.engine.dense.flat - fused.engine.dense.flat, eager.engine.table - fused.engine.table
        apart = max(apart, *(float(difference.abs().max()) for difference in differences))
    losses = [_losses_apart(n, seed, more) for seed in range(1, 1 + streams)]
    median = {"float32_log_loss": statistics.median(losses), "float32_log_loss_most": max(losses)}
    return {**found, "float32_steps": steps, "float32_step": apart, "float32_streams": streams, **median}


def _losses_apart(n: int, seed: int, more: Any) -> float:
    """Prequential log-loss of both engines on one stream in float32."""
    progress(f"agreement: {n:,} events in float32, stream {seed}")
    stream = Stream(n, seed)
    learners = [clicks(engine, "float32", **more) for engine in ("eager", "fused")]
    eager, fused = (_log_loss(prequential(learner, stream), stream.y) for learner in learners)
    return abs(float(eager - fused))


def _agreement_bars(found: dict[str, Any]) -> list[Bar]:
    limits = {
        "largest_difference_of_weights": 1e-9,
        "largest_difference_of_rows": 1e-9,
        "float32_step": 1e-5,
        "float32_log_loss": 1e-3,
    }
    return [
        *(Bar(f"agreement: {name}", found[name], limit, at_least=False) for name, limit in limits.items()),
        *(Bar(f"agreement: {name}", float(found[name]), 1.0) for name in ("replayed_alike", "reset_alike")),
    ]


def _log_loss(scores: Floats, y: Any) -> Any:
    p = np.clip(scores.astype(np.float64), 1e-12, 1.0 - 1e-12)
    return -np.mean(y * np.log(p) + (1.0 - y) * np.log1p(-p))


# start

START = """
import time
from streamcl.bench import step_feed as step
began = time.perf_counter()
learner = step.clicks("fused")
stream = step.Stream(1)
learner.learn(step.outcome(stream.event(0), learner.predict(stream.features[0])))
print(time.perf_counter() - began)
"""


def starts() -> dict[str, float]:
    """Seconds by name."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        found = {}
        for name in ("cold", "warm"):
            progress(f"start: {name}")
            done = subprocess.run(  # noqa: S603 - our own
                [sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True
            )
            found[name] = float(done.stdout.split()[-1])
        return found
