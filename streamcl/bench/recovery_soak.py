"""A day's worth of event time in an hour: nothing that a worker holds may grow.

A real worker on two inputs, traffic beside it at a bounded backlog. Resident memory, threads and file handles of its
process are sampled, and its `/metrics` is scraped. Threads, handles and series are judged over the second half; memory
from the third minute on, for until then things fill that fill once (windows, tickets, allocator).

A leak goes with time. Resident memory also creeps with the logarithm of time in a process that leaks nothing, because
it is the high-water mark of a load that fluctuates: a maximum over twice the time is a little higher. So memory is read
as constant + creep x ln(hours) + leak x hours, fitted to the medians of ten blocks, for samples that follow each other
depend on each other for minutes (snapshots come and go, the allocator gives back and takes). `no leak` holds when the
95 % interval of the leak (Student's t, seven degrees of freedom) reaches zero or below; and, lest mere noise pass, what
a day would add to the hour must be little at the interval's upper end.
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
BLOCKS = 10
"""5.7 minutes each in a full run."""
SETTLED = 0.05
"""Share of a run before which memory is not judged."""

MIB = 1 << 20
CONSUMED = "streamcl_events_consumed_total"
PREDICTED = 'streamcl_events_total{fate="predicted"}'
PYTHON_BLOCKS = "streamcl_python_blocks"
"""Python's own allocations: flat while memory creeps, it is the C library's heap that does."""


@dataclass(frozen=True, slots=True)
class Length:
    """How long, how often it is looked at, and what memory may do.

    `leak` limits the lower end of its interval (MiB/h), `growth` what a day adds at most (share).
    """

    minutes: float
    every_s: float
    leak: float
    growth: float


FULL = Length(60.0, 10.0, 0.0, 0.02)
QUICK = Length(0.4, 0.5, 1200.0, 100.0)
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
            f"memory from {SETTLED * minutes:.1f} min on: constant + creep x ln(hours) + leak x hours, by the medians"
            f" of {BLOCKS} blocks; interval: 95 %; creep is that of a high-water mark. A day: what 24 hours add to what"
            " stood when it was first judged. Threads, handles, series: second half",
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
    found = memory_of(samples)
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
            "creep_mib": found.creep,
            "leak_mib_per_h": found.leak,
            "leak_low": found.low,
            "leak_high": found.high,
            "python_blocks_half": samples[len(samples) // 2].blocks,
            "python_blocks_last": last.blocks,
            "threads": last.threads,
            "handles": last.handles,
            "series": last.series,
        },
    )


def _bars(samples: Sequence[Sample], length: Length) -> Iterator[Bar]:
    found, half = memory_of(samples), samples[len(samples) // 2 :]
    # A negative leak says that the creep ends sooner than the logarithm has it: not to be counted on.
    day = (found.creep * math.log(DAY_S / 3600 / found.began) + max(found.high, 0.0) * DAY_S / 3600) / found.mib
    yield Bar("soak: minutes", samples[-1].at_s / 60, length.minutes)
    yield Bar("soak: leak of memory, least in its interval (MiB/h)", found.low, length.leak, False)
    yield Bar("soak: growth of memory in a day, most in its interval (share)", day, length.growth, False)
    for name in ("threads", "handles", "series"):
        yield Bar(f"soak: growth of {name} over half", grown([getattr(each, name) for each in half]), 0.0, False)


def grown(values: Sequence[float]) -> float:
    """By how much the typical value of the last half exceeds that of the first; a peak is no growth."""
    middle = len(values) // 2
    return float(np.median(values[middle:]) - np.median(values[:middle]))


@dataclass(frozen=True, slots=True)
class Memory:
    """What the samples say: creep (MiB per e-fold of time), leak (MiB/h), its interval; at `began` (h) it had `mib`."""

    creep: float
    leak: float
    low: float
    high: float
    began: float
    mib: float


def memory_of(samples: Sequence[Sample]) -> Memory:
    """Of all that is judged. NaN with fewer than two samples in a block."""
    settled = [each for each in samples if each.at_s > SETTLED * samples[-1].at_s]
    if len(settled) < 2 * BLOCKS:
        return Memory(*[math.nan] * 6)
    hours = np.array([each.at_s / 3600 for each in settled])
    mib = np.array([each.rss_bytes / MIB for each in settled])
    return Memory(*fit(hours, mib), float(hours[0]), float(np.median(mib[: len(mib) // BLOCKS])))


def fit(hours: NDArray[np.float64], mib: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """(creep, leak, both ends of the leak's interval) by least squares through block medians.

    With noise of a correlation time of up to 3 minutes, in an hour, less than a tenth of series without a leak are
    said to leak, however they creep.
    """
    centres = np.array([np.mean(part) for part in np.array_split(hours, BLOCKS)])
    medians = np.array([np.median(part) for part in np.array_split(mib, BLOCKS)])
    columns = np.column_stack((np.ones(BLOCKS), np.log(centres), centres))
    found = np.linalg.lstsq(columns, medians, rcond=None)[0]
    creep, leak, rest = float(found[1]), float(found[2]), medians - columns @ found
    free = BLOCKS - columns.shape[1]
    error = math.sqrt(float(rest @ rest) / free * float(np.linalg.inv(columns.T @ columns)[2, 2]))
    reach = float(stats.t.ppf(0.975, free)) * error
    return creep, leak, leak - reach, leak + reach
