"""`bench step --device cuda`: every check and every figure of a GPU in one go, within ten minutes.

Widths W stand for hidden layers W -> W / 2 behind 12 categories x 16; replay for rows beside each event. Engines are
fed by hand, as in `bench.step`, and take turns with the CPU's own. What there is no time for is left out, and said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from streamcl.bench.options import OptionError
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.bench.step_feed import CHUNK, ON, SERVED, Stream, config_of, feed, outcome, prequential
from streamcl.bench.step_plain import DIM, FIELDS, RATE
from streamcl.config import ConfigError
from streamcl.learner import Learner

ENGINES = ("eager", "graph", "fused")
REPLAYS = (0, 8, 64, 512)
WIDTHS = (64, 128, 256, 1024, 4096)
CTR = 128
"""The width of the click model: 192 -> 128 -> 64 -> 1."""
SCANNED = ((0, CTR), (8, CTR), (0, 64), (64, CTR))
"""Replay and width that the Triton program is timed at: each is compiled anew, which takes half a minute."""
SECONDS = 540.0
"""What all of it may take."""
LIMIT = 1e-6
"""Of float64 weights and scores after 20,000 events; engines of the CPU are within 1e-9 of each other."""

NOTES = (
    "steps_per_s: learned events a second of wall time, memory writes, packing and copies to the device included",
    "share_of_flops: 6 x weights x rows FLOP a step, over those of a product of 8,192 x 8,192 in float32 just now;"
    " share_of_bandwidth: 24 bytes a weight and step (read twice; read and written with its slot), over a copy's",
    "agreement: float64, replay of 8, resets and an error memory; the oracle is the CPU's fused engine, which"
    " `bench step` holds to the eager one",
)


def require() -> torch.device:
    """Raises OptionError where there is no GPU."""
    if not torch.cuda.is_available():
        raise OptionError(f"--device: cuda, and torch {torch.__version__} finds no CUDA device")
    return torch.device("cuda")


def run(quick: bool) -> Report:
    """Raises OptionError where there is no GPU."""
    began, device = time.perf_counter(), require()
    rows = [Row("limits", limits(device), table="limits")]
    found = {engine: agreement(engine, 1_000 if quick else 20_000, "cuda") for engine in ENGINES}
    rows += [Row(f"agreement, {engine}", each, table="agreement") for engine, each in found.items()]
    bars = [
        Bar(f"agreement, {engine}: {name}", each[name], LIMIT, at_least=False)
        for engine, each in found.items()
        for name in ("weights", "rows", "scores")
    ]
    rates: dict[tuple[str, int, int], float] = {}
    for key, told in speeds("cuda", began + SECONDS, 0.3 if quick else 1.0, rows[0].values):
        rates[key] = told.get("steps_per_s", float("nan"))
        rows.append(Row(f"{key[0]}, replay {key[1]}, width {key[2]}", told))
    graph, eager, fused = (rates.get((engine, 0, CTR), float("nan")) for engine in ("graph", "eager", "fused"))
    aims = [Bar("graph / eager, no replay", graph / eager, 8.0), Bar("fused, no replay: steps/s", fused, 100_000.0)]
    settings = {"quick": quick, "device": "cuda", "replays": list(REPLAYS), "widths": list(WIDTHS)}
    return Report("step", settings, [0], time.perf_counter() - began, rows, bars, aims, notes=NOTES)


def limits(device: torch.device) -> dict[str, Any]:
    """What the device does at most, in the largest product and the largest copy at hand."""
    progress("limits of the device")
    a, column = torch.randn(8192, 8192, device=device), torch.zeros(1 << 28, device=device)
    product = _fastest(lambda: torch.mm(a, a))
    copy = _fastest(lambda: column.clone())
    return {"tflops": 2 * 8192**3 / product / 1e12, "gb_per_s": 2 * column.nbytes / copy / 1e9}


def _fastest(work: Any) -> float:
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return min(took)


def clicks(engine: str, device: str, replay: int, width: int, precision: str = "float32", **more: Any) -> Learner:
    """The click model of `bench.step`, of another width, anywhere."""
    names = {f"c{field:02}": {"kind": "categorical", "buckets": 1000} for field in range(FIELDS)}
    model = {"kind": "mlp", "hidden": [width, width // 2], "embedding_dim": DIM, "dtype": precision}
    kept = {"retention": "reservoir", "per_event": replay} if replay else {"retention": "none", "per_event": 0}
    rule, worker = {"kind": "adagrad", "learning_rate": RATE}, {"engine": engine, "device": device}
    return Learner(config_of(names, model, rule, engine, worker=worker, replay=kept, **more))


# agreement


def agreement(engine: str, n: int, device: str) -> dict[str, Any]:
    """How far an engine is from the CPU's after n events, all that it knows switched on."""
    progress(f"agreement: {n:,} events, {engine}")
    more = {"plasticity": ON["plasticity"], "error_memory": [{"kind": "knn"}]}
    stream = Stream(n, 1)
    mine, oracle = (
        clicks(how, where, 8, CTR, "float64", **more) for how, where in ((engine, device), ("fused", "cpu"))
    )
    said, truth = prequential(mine, stream), prequential(oracle, stream)
    resets = [learner.rules["continual_backprop"].replaced for learner in (mine, oracle)]  # type: ignore[attr-defined]
    return {
        "events": n,
        "weights": float((mine.engine.dense.flat.cpu() - oracle.engine.dense.flat).abs().max()),
        "rows": float((mine.engine.table.cpu() - oracle.engine.table).abs().max()),
        "scores": float(np.abs(said - truth).max()),
        "units_reset": sum(resets[0]),
        "reset_alike": resets[0] == resets[1],
    }


# speed


def speeds(
    device: str,
    until: float,
    seconds: float,
    most: Any,
    replays: Sequence[int] = REPLAYS,
    widths: Sequence[int] = WIDTHS,
    engines: Sequence[str] = ENGINES,
) -> Iterator[tuple[tuple[str, int, int], dict[str, Any]]]:
    """What each engine does at each shape, and the CPU's fused one beside it; (engine, replay, width) first."""
    scanned = [(replay, width) for replay, width in SCANNED if replay in replays and width in widths]
    shapes = [
        (engine, replay, width) for width in widths for replay in replays for engine in engines if engine != "fused"
    ]
    shapes += [("fused", *shape) for shape in scanned if "fused" in engines]
    shapes += [("cpu", replay, width) for width in widths for replay in replays]
    for engine, replay, width in shapes:
        key = engine, replay, width
        if time.perf_counter() > until:
            yield key, {"left_out": "no time"}
            continue
        progress(f"speed: {engine}, replay {replay}, width {width}")
        try:
            learner = clicks(
                "fused" if engine == "cpu" else engine, "cpu" if engine == "cpu" else device, replay, width
            )
            rate = steps_per_s(learner, seconds)
        except (ConfigError, RuntimeError) as error:  # what has no form there; a kernel that asks for too much
            yield key, {"left_out": str(error).split("\n")[0][:120]}
            continue
        weights = FIELDS * DIM * width + width * (width // 2) + width // 2
        told = {"steps_per_s": rate, "us_per_step": 1e6 / rate}
        if engine != "cpu" and most:
            told["share_of_flops"] = rate * 6 * weights * (1 + replay) / (most["tflops"] * 1e12)
            told["share_of_bandwidth"] = rate * 24 * weights / (most["gb_per_s"] * 1e9)
        yield key, told


def steps_per_s(learner: Learner, seconds: float) -> float:
    """Learned events a second, after a chunk that isn't counted; of at least one chunk."""
    stream = Stream(CHUNK)
    outcomes = [outcome(stream.event(i), SERVED) for i in range(CHUNK)]
    few = 8 if learner.fused is None else CHUNK
    for size in (2, few):  # kernels are loaded, or compiled; a graph is captured
        feed(learner, outcomes[:size])
    _wait(learner)
    done, start = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - start < seconds:
        feed(learner, outcomes[:few])
        _wait(learner)
        done += few
    return done / (time.perf_counter() - start)


def _wait(learner: Learner) -> None:
    if learner.engine.device.type == "cuda":
        torch.cuda.synchronize()
