"""`bench worker --task telemetry`: what metrics cost a worker at its full pace, and how long a scrape takes.

The worker of `--task clicks` runs in its host, as `streamcl run` does, with everything on that has something to tell.
All that telemetry does beside the loop goes through one call of the host, which is timed by the processor; the rest is
the worker without it. Readings are taken once a second, so they cost an event the less the more come.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from typing import Any

import prometheus_client

from streamcl import garbage
from streamcl.bench.report import Bar, Row, progress
from streamcl.bench.step_feed import ON
from streamcl.bench.worker_clicks import Clicks, Drain
from streamcl.config import Config
from streamcl.host import FixedShards, Host
from streamcl.telemetry import Telemetry
from streamcl.worker import Worker, build

FULL, QUICK = (120_000, 3), (20_000, 2)
WARM = 5_000
SCRAPES = 20
MOST_US, MOST_SCRAPE_MS = 1.0, 50.0
NOTES = (
    "telemetry: processor time of all that tells metrics (turns, samples, frozen weights, readings each second) over"
    " events, at full pace; scrape: processor time of the whole text, median of 20",
)


def measure(quick: bool) -> tuple[list[Row], list[Bar]]:
    """Rows and bars; medians over rounds."""
    count, rounds = QUICK if quick else FULL
    taken: dict[str, list[dict[str, float]]] = {}
    for name, settings in (("no replay", {}), ("replay, cbp and error memory", everything())):
        stage = Clicks(count if not settings else count // 3)
        for number in range(rounds):
            progress(f"telemetry, {name}, round {number + 1} of {rounds}")
            taken.setdefault(name, []).append(_pass(stage, settings))
    rows, bars = [], []
    for name, rounds_ in taken.items():
        found = {figure: statistics.median(each[figure] for each in rounds_) for figure in rounds_[0]}
        rows.append(Row(f"telemetry, {name}", found, table="telemetry"))
        bars.append(Bar(f"telemetry, {name}: us an event", found["telemetry_us_per_event"], MOST_US, False))
        bars.append(Bar(f"telemetry, {name}: ms a scrape", found["scrape_ms"], MOST_SCRAPE_MS, False))
    return rows, bars


def everything() -> dict[str, Any]:
    return {**ON, "error_memory": [{"kind": "key", "key": "c00"}]}


def _pass(stage: Clicks, settings: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = {"folder": folder, "every_events": 10**9}
        config = stage.config({**settings, "predictions": stage.new_topic(), "checkpoint": checkpoint})
        config = config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"port": 1})})
        with contextlib.closing(Telemetry(config)) as telemetry:
            host = _Timed(config, telemetry)
            garbage.spare()
            events = began = 0.0
            for turn in host.run():
                events += turn.records
                if not began and events >= WARM:
                    began, events, host.told_s = time.thread_time(), 0.0, 0.0
                if began and events + WARM >= len(stage.messages):
                    break
            whole_s = time.thread_time() - began
            scrape_ms = 1e3 * statistics.median(_scrape(telemetry) for _ in range(SCRAPES))
            lines = len(prometheus_client.generate_latest(telemetry.registry).splitlines())
            host.stop()
    return {
        "with_us_per_event": 1e6 * whole_s / events,
        "without_us_per_event": 1e6 * (whole_s - host.told_s) / events,
        "telemetry_us_per_event": 1e6 * host.told_s / events,
        "scrape_ms": scrape_ms,
        "lines": float(lines),
    }


def _scrape(telemetry: Telemetry) -> float:
    began = time.thread_time()
    prometheus_client.generate_latest(telemetry.registry)
    return time.thread_time() - began


class _Timed(Host):
    """Books the processor's time that telling takes."""

    def __init__(self, config: Config, telemetry: Telemetry) -> None:
        super().__init__(config, FixedShards(config), telemetry, build=_drained)
        self.told_s = 0.0

    def _tell(self, *told: Any) -> None:
        began = time.thread_time()
        super()._tell(*told)
        self.told_s += time.thread_time() - began


def _drained(config: Config) -> Worker:
    worker = build(config)
    if worker.outlets.predictions:
        worker.outlets.predictions.close()
        worker.outlets.predictions = Drain()
    return worker
