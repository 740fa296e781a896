"""`bench scale --task stalls`: how long a turn takes while a large state is being saved, and while none is."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamcl import garbage
from streamcl.bench.report import Bar, Row, progress
from streamcl.bench.step_plain import FIELDS
from streamcl.bench.worker_clicks import Clicks
from streamcl.recovery import Keeper, store_of

TURN = 500  # records
STEADY, SAVES = 60, 1
MOST, LONGEST = 2.0, 8.0
NOTE = (
    "stalls: turns of 500 clicks by a worker whose table and optimiser state are saved beside it; steady: with nothing"
    " to save; saving: from the turn in which the state is captured until the snapshot stands. The longest is that"
    " first one: the child that copies is made (40 ms for each gigabyte of the process), and 2 us go to each page that"
    " is first written to; eight steady p99 are allowed for both"
)


@dataclass(frozen=True, slots=True)
class Turns:
    """Wall time of turns (s), while nothing is saved and while something is; and how long each save took."""

    steady: list[float] = field(default_factory=list)
    saving: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    state_bytes: int = 0


def measure(quick: bool) -> tuple[list[Row], list[Bar]]:
    buckets = 40_000 if quick else 660_000  # of each field: 61 MB, 1.01 GB
    found = turns(buckets, 60_000 if quick else 800_000)
    steady, saving = (np.array(each) for each in (found.steady, found.saving))
    p99 = [float(np.percentile(each, 99)) for each in (steady, saving)]
    figures: dict[str, Any] = {
        "state_mb": found.state_bytes / 1e6,
        "save_s": float(np.mean(found.saves)) if found.saves else math.nan,
        "steady_turns": len(steady),
        "steady_p50_ms": 1e3 * float(np.median(steady)),
        "steady_p99_ms": 1e3 * p99[0],
        "saving_turns": len(saving),
        "saving_p50_ms": 1e3 * float(np.median(saving)),
        "saving_p99_ms": 1e3 * p99[1],
        "longest_ms": 1e3 * float(saving.max()),
        "longest_steady_ms": 1e3 * float(steady.max()),
    }
    longest = float(saving.max()) / p99[0]
    bars = [
        Bar("stalls: p99 of a turn while saving / with nothing to save", p99[1] / p99[0], MOST, at_least=False),
        Bar("stalls: longest turn while saving / p99 with nothing to save", longest, LONGEST, at_least=False),
    ]
    return [Row("stalls", figures, table="stalls")], bars


def turns(buckets: int, events: int) -> Turns:
    stage, found = Clicks(events), Turns()
    with tempfile.TemporaryDirectory() as folder:
        features = {name: {"kind": "categorical", "buckets": buckets} for name in stage.names}
        checkpoint = {"folder": folder, "every_events": 10**9, "retain": 1}
        worker = stage.built("fused", {"features": features, "checkpoint": checkpoint})
        keeper = Keeper(worker, store_of(worker.config))
        keeper.restore()
        garbage.spare()
        began, steady, saved = time.perf_counter(), 0, keeper.last
        for _ in keeper.run():
            taken, began = time.perf_counter() - began, time.perf_counter()
            if keeper.last is not saved:  # it stands
                saved, steady = keeper.last, 0
                found.saves.append(keeper.seconds)
                progress(f"stalls: save {len(found.saves)} of {SAVES}: {keeper.seconds:.1f} s")
            (found.saving if keeper.writer.busy else found.steady).append(taken)
            steady += not keeper.writer.busy
            if worker.progress.records >= events or (steady == STEADY and len(found.saves) == SAVES):
                worker.stop()
            elif steady == STEADY:
                keeper.since = worker.config.checkpoint.every_events  # one is due
        keeper.close()
        worker.close()
    table = worker.learner.engine.table  # type: ignore[union-attr]
    found_bytes = 2 * table.numel() * table.element_size()
    return Turns(found.steady[FIELDS:], found.saving, found.saves, found_bytes)
