"""`bench worker --task telemetry`: what metrics cost a worker at its full pace, and how long a scrape takes.

The worker of `--task clicks` runs in its host, as `streamcl run` does, with everything on that has something to tell.
All that telemetry does beside the loop goes through one call of the host, which is timed by the processor; the rest is
the worker without it. Readings are taken once a second, so they cost an event the less the more come.

Within the loop metrics cost what the worker takes to measure a turn's outcomes, and to read the fields by which they
are told apart; the latter is timed by itself, for a clock around each event's share would take longer than that.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import orjson
import prometheus_client

from streamcl import connect, garbage
from streamcl.bench.report import Bar, Row, progress
from streamcl.bench.step_feed import ON
from streamcl.bench.worker_clicks import Clicks, Drain
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.host import FixedShards, Host
from streamcl.records import Outcome
from streamcl.telemetry import Telemetry
from streamcl.worker import Worker, build

FULL, QUICK = (120_000, 3), (20_000, 2)
WARM = 5_000
SCRAPES = 20
SHOWN = 20
FEW = 200
MOST_US, MOST_SCRAPE_MS = 1.0, 50.0
NOTES = (
    "telemetry: processor time of all that tells metrics (turns, samples, frozen weights, readings each second) over"
    " events, at full pace; metrics: of the worker's loop, to measure what was served; scrape: processor time of the"
    " whole text, median of 20",
    f"all metrics on: gAUC by key, two segments of a thousand values, lists of {SHOWN}; its bar is of both together",
)
MEASURED = "all metrics on"


def measure(quick: bool) -> tuple[list[Row], list[Bar]]:
    """Rows and bars; medians over rounds."""
    count, rounds = QUICK if quick else FULL
    taken: dict[str, list[dict[str, float]]] = {}
    passes: list[tuple[str, dict[str, Any], int]] = [("no replay", {}, count)]
    passes += [("replay, cbp and error memory", everything(), count // 3), (MEASURED, measured(), count)]
    for name, settings, events in passes:
        stage = Clicks(events, shown=SHOWN)
        for number in range(rounds):
            progress(f"telemetry, {name}, round {number + 1} of {rounds}")
            taken.setdefault(name, []).append(_pass(stage, settings))
    rows, bars = [], []
    for name, rounds_ in taken.items():
        found = {figure: statistics.median(each[figure] for each in rounds_) for figure in rounds_[0]}
        rows.append(Row(f"telemetry, {name}", found, table="telemetry"))
        us = found["telemetry_us_per_event"] + (found["metrics_us_per_event"] if name == MEASURED else 0.0)
        bars.append(Bar(f"telemetry, {name}: us an event", us, MOST_US, False))
        bars.append(Bar(f"telemetry, {name}: ms a scrape", found["scrape_ms"], MOST_SCRAPE_MS, False))
    return rows, bars


def everything() -> dict[str, Any]:
    return {**ON, "error_memory": [{"kind": "key", "key": "c00"}]}


def measured() -> dict[str, Any]:
    ranking = {"group_by": "request"}
    return {"metrics": {"group_by": "user", "segments": ["c01", "c02"], "ranking": ranking}}


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
                    began, events, host.told_s, host.measured_s = time.thread_time(), 0.0, 0.0, 0.0
                if began and events + WARM >= len(stage.messages):
                    break
            whole_s = time.thread_time() - began
            scrape_ms = 1e3 * statistics.median(_scrape(telemetry) for _ in range(SCRAPES))
            lines = len(prometheus_client.generate_latest(telemetry.registry).splitlines())
            host.stop()
    metrics_us = 1e6 * host.measured_s / events + _fields_us(config, stage.messages[:FEW])
    telemetry_us = 1e6 * host.told_s / events
    return {
        "with_us_per_event": 1e6 * whole_s / events,
        "without_us_per_event": 1e6 * whole_s / events - telemetry_us - metrics_us,
        "telemetry_us_per_event": telemetry_us,
        "metrics_us_per_event": metrics_us,
        "scrape_ms": scrape_ms,
        "lines": float(lines),
    }


def _scrape(telemetry: Telemetry) -> float:
    began = time.thread_time()
    prometheus_client.generate_latest(telemetry.registry)
    return time.thread_time() - began


def _fields_us(config: Config, messages: Sequence[bytes]) -> float:
    """What it takes to read an event's fields for its metrics (us), median of many."""
    decoder = Decoder(config, connect.codecs(config).events)
    payloads, taken = [orjson.loads(message) for message in messages] if decoder.traits else [], []
    for _ in range(100):
        began = time.thread_time()
        for payload in payloads:
            decoder.told(payload)
        taken.append(time.thread_time() - began)
    return 1e6 * statistics.median(taken) / len(messages)


class _Timed(Host):
    """Books the processor's time that telling and measuring take."""

    def __init__(self, config: Config, telemetry: Telemetry) -> None:
        super().__init__(config, FixedShards(config), telemetry, build=self._drained)
        self.told_s = self.measured_s = 0.0

    def _tell(self, *told: Any) -> None:
        began = time.thread_time()
        super()._tell(*told)
        self.told_s += time.thread_time() - began

    def _drained(self, config: Config) -> Worker:
        worker = build(config)
        if worker.outlets.predictions:
            worker.outlets.predictions.close()
            worker.outlets.predictions = Drain()
        measure = worker.measure

        def timed(outcomes: Sequence[Outcome]) -> Sequence[float]:
            began = time.thread_time()
            losses = measure(outcomes)
            self.measured_s += time.thread_time() - began
            return losses

        worker.measure = timed  # type: ignore[method-assign]
        return worker
