"""A day's worth of event time in an hour: nothing that a worker holds may grow.

A real worker on two inputs, traffic beside it at a bounded backlog. Resident memory, threads and file handles of its
process are sampled, and its `/metrics` is scraped. A bar looks at the second half of the samples alone: the first is
for what fills once (windows, tickets, allocator).

Noise: samples that follow each other depend on each other for minutes (snapshots come and go, the allocator gives back
and takes). So the slope is that of a line through the medians of eight blocks, and its 95 % interval that line's, by
Student's t with six degrees of freedom. `no growth` holds when the interval reaches zero or below, and, lest mere noise
pass, its upper end must not amount to much over the second half.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy import stats

from streamcl.bench import recovery_traffic
from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken, Life, judge, methods, scratch, topics, write_config
from streamcl.bench.recovery_traffic import Feed, endless
from streamcl.bench.recovery_watch import free_port, scrape
from streamcl.bench.report import Bar, Curve, Report, Row, progress

PARTITIONS = 4
ROLES = {"events": PARTITIONS, "labels": PARTITIONS, "predictions": PARTITIONS, "dead_letters": 1}
STEP_S = 0.03
BACKLOG = 20_000
"""Records that wait for the worker at most; retention is far behind them."""

RETENTION = {"retention_bytes": str(64 << 20), "segment_bytes": str(16 << 20)}
DAY_S = 86_400.0
BLOCKS = 8
"""Of the second half: 3.75 minutes each in a full run."""

MIB = 1 << 20
CONSUMED = "streamcl_events_consumed_total"
PREDICTED = 'streamcl_events_total{fate="predicted"}'
PYTHON_BLOCKS = "streamcl_python_blocks"
"""Python's own allocations: flat while memory creeps, it is the C library's heap that does."""


@dataclass(frozen=True, slots=True)
class Length:
    """How long, how often it is looked at, and what memory may do over the second half.

    `slope` limits the lower end of its interval (MiB/h), `growth` the upper end over the whole half (share).
    """

    minutes: float
    every_s: float
    slope: float
    growth: float


FULL = Length(60.0, 10.0, 0.0, 0.02)
QUICK = Length(0.4, 0.5, 1200.0, 0.2)
"""A quarter of a minute, right after the start, can only show a leak of megabytes a second."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`at_s` since the worker stood."""

    at_s: float
    rss_bytes: int
    threads: int
    handles: int
    series: int
    records: float
    events: float
    blocks: float


def run(options: Options) -> Report:
    """Methods as in `kill`, default `at_least_once`; `--minutes` says how long."""
    began = time.perf_counter()
    length = QUICK if options.quick else FULL
    minutes = options.minutes or length.minutes
    [method] = methods(options) if options.method else ("at_least_once",)
    with chosen(options.via) as broker, scratch("soak") as folder:
        samples = _soak(broker, folder, method, 60 * minutes, length.every_s)
        bars = list(_bars(samples, length))
        judge(folder, bars)
    curves = [
        Curve("resident memory", [s.at_s / 60 for s in samples], [s.rss_bytes / MIB for s in samples]),
    ]
    config = {"task": "soak", "broker": broker.kind, "method": method, "minutes": minutes, "backlog": BACKLOG}
    return Report(
        "recovery",
        config,
        [0],
        time.perf_counter() - began,
        [_row(samples)],
        bars,
        notes=[
            f"bars look at the second half of the samples; slope: of {BLOCKS} block medians, interval: 95 %",
            f"broker's retention by size ({RETENTION}), backlog at most {BACKLOG} records",
        ],
        curves=curves,
        axes=("minutes", "MiB"),
    )


def _soak(broker: Broker, folder: Path, method: str, seconds: float, every_s: float) -> list[Sample]:
    name, port = f"recovery-{uuid.uuid4().hex[:8]}", free_port()
    with topics(broker, name, ROLES, **RETENTION) as names:
        tables = {
            "delivery": {"mode": method},
            "telemetry": {"port": port},
            "checkpoint": {"folder": f"{folder}/checkpoints", "every_events": 10_000},
            "worker": {"max_records": 500},
        }
        config = write_config(folder, recovery_traffic.config(broker.url, names, str(folder), name, **tables))
        # Two days ago: brokers refuse timestamps that lie an hour ahead of their clock.
        records = endless(0, PARTITIONS, time.time() - 2 * DAY_S, STEP_S)
        with contextlib.closing(Feed(broker.bootstrap, names, records)) as feed:
            feed.send(BACKLOG // 2)
            with Life(folder, "soak", "run", str(config), "--json") as life:
                if not life.await_standing(120.0):
                    raise Broken(f"{life.log}: does not come up: {life.said()[-1500:]}")
                return list(_samples(life, feed, port, seconds, every_s))


def _samples(life: Life, feed: Feed, port: int, seconds: float, every_s: float) -> Iterator[Sample]:
    """One every `every_s`, with traffic in between, so much that the backlog is bounded."""
    process, began, due, told = psutil.Process(life.process.pid), time.monotonic(), 0.0, 0.0
    at_s = 0.0
    while at_s < seconds:
        at_s = time.monotonic() - began
        if life.process.poll() is not None:
            raise Broken(f"{life.log}: left with {life.process.returncode}: {life.said()[-1500:]}")
        metrics = scrape(port, timeout_s=30.0)
        records = metrics[CONSUMED]
        if at_s >= due or at_s >= seconds:
            due += every_s
            with process.oneshot():
                rss, threads, handles = process.memory_info().rss, process.num_threads(), process.num_fds()
            yield Sample(at_s, rss, threads, handles, len(metrics), records, metrics[PREDICTED], metrics[PYTHON_BLOCKS])
        if at_s >= told:
            told += 60.0
            now = f"{process.memory_info().rss / MIB:.2f} MiB, {metrics[PYTHON_BLOCKS]:.0f} blocks"
            progress(f"{at_s / 60:.0f} of {seconds / 60:.1f} min, {records:.0f} records, {now}")
        room = BACKLOG - (feed.sent - int(records))
        if room > 0:
            feed.send(min(room, BACKLOG // 4))
        time.sleep(max(0.0, min(0.5, due - (time.monotonic() - began))))


def _row(samples: Sequence[Sample]) -> Row:
    last, rss = samples[-1], [each.rss_bytes / MIB for each in samples]
    slope, low, high = slope_of(samples)
    return Row(
        "soak",
        {
            "minutes": last.at_s / 60,
            "records": int(last.records),
            "events": int(last.events),
            "event_hours": last.events * STEP_S / 3600,
            "records_per_s": last.records / max(last.at_s, 1e-9),
            "rss_first_mib": rss[0],
            "rss_half_mib": rss[len(rss) // 2],
            "rss_last_mib": rss[-1],
            "rss_most_mib": max(rss),
            "slope_mib_per_h": slope,
            "slope_low": low,
            "slope_high": high,
            "python_blocks_half": samples[len(samples) // 2].blocks,
            "python_blocks_last": last.blocks,
            "threads": last.threads,
            "handles": last.handles,
            "series": last.series,
        },
    )


def _bars(samples: Sequence[Sample], length: Length) -> Iterator[Bar]:
    _, low, high = slope_of(samples)
    half = samples[len(samples) // 2 :]
    hours = (half[-1].at_s - half[0].at_s) / 3600
    share = high * hours / (half[0].rss_bytes / MIB)
    yield Bar("soak: minutes", samples[-1].at_s / 60, length.minutes)
    yield Bar("soak: growth of memory, least in its interval (MiB/h)", low, length.slope, False)
    yield Bar("soak: growth of memory over half, most in its interval (share)", share, length.growth, False)
    for name in ("threads", "handles", "series"):
        yield Bar(f"soak: growth of {name} over half", grown([getattr(each, name) for each in half]), 0.0, False)


def grown(values: Sequence[float]) -> float:
    """By how much the typical value of the last half exceeds that of the first; a peak is no growth."""
    middle = len(values) // 2
    return float(np.median(values[middle:]) - np.median(values[:middle]))


def slope_of(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Of memory over the second half (MiB/h), and both ends of its interval. NaN with fewer than two in a block."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2 * BLOCKS:
        return math.nan, math.nan, math.nan
    hours = np.array([each.at_s / 3600 for each in half])
    return interval(hours, np.array([each.rss_bytes / MIB for each in half]))


def interval(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """The slope of a line through block medians, and its 95 % interval.

    With noise of a correlation time of up to 3 minutes, half an hour of it, less than a tenth of flat series are called
    growing; a moving-block bootstrap with blocks of two minutes called three tenths so.
    """
    centres = np.array([np.mean(part) for part in np.array_split(x, BLOCKS)])
    medians = np.array([np.median(part) for part in np.array_split(y, BLOCKS)])
    line = stats.linregress(centres, medians)
    reach = float(stats.t.ppf(0.975, BLOCKS - 2) * line.stderr)
    return float(line.slope), float(line.slope) - reach, float(line.slope) + reach
