"""One bad record in a hundred: all of them in the dead letters, every good event learned, and at what price in speed.

One worker; batches come one after the other, each when the one before is done, clean and poisoned in turn. The rate of
a batch is that of its answers, by their timestamps, less its first fifth, in which the producer is busy too. Beside it
stands the processor time of the worker, which does not depend on what else the machine does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from streamcl.bench import recovery_verifier
from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken, keep, methods, scratch, worst
from streamcl.bench.recovery_kill import judged
from streamcl.bench.recovery_traffic import Sent, inline
from streamcl.bench.recovery_verifier import learned_hash
from streamcl.bench.recovery_watch import PARTITIONS, Sample, Settled, Subject, scrape, subject
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.records import EVENTS

BATCH_S = 600.0


@dataclass(frozen=True, slots=True)
class Length:
    """Pairs of a clean and a poisoned batch, good events in each, and what is left of the clean rate at least."""

    pairs: int
    batch: int
    least: float


FULL, QUICK = Length(15, 5_000, 0.95), Length(2, 1_500, 0.7)


def run(options: Options) -> Report:
    """`--events`: good events in all."""
    began = time.perf_counter()
    length = QUICK if options.quick else FULL
    if options.events:
        length = Length(length.pairs, max(10, options.events // (2 * length.pairs)), length.least)
    seeds, rows, bars = options.seed_list(1), [], []
    with chosen(options.via) as broker:
        for method, seed in [(method, seed) for method in methods(options) for seed in seeds]:
            with scratch("poison") as folder:
                progress(f"{method}, seed {seed}: {length.pairs} pairs of {length.batch} events")
                settled, pairs = _measure(broker, folder, method, seed, length)
                rows.append(_row(f"{method}, seed {seed}", settled, pairs))
                mine = list(_bars(method, broker, settled, pairs, length))
                bars += mine
                if not all(bar.ok or math.isnan(bar.value) for bar in mine):
                    keep(folder)
    config = {"task": "poison", "broker": broker.kind, "pairs": length.pairs, "batch": length.batch}
    notes = ["rates: medians over the batches of good events answered a second; bad records don't count"]
    return Report("recovery", config, seeds, time.perf_counter() - began, rows, worst(bars), notes=notes)


@dataclass(frozen=True, slots=True)
class Pair:
    """A clean batch and a poisoned one: good events a second, and seconds of processor time."""

    clean_per_s: float
    poisoned_per_s: float
    clean_cpu_s: float
    poisoned_cpu_s: float


def _measure(broker: Broker, folder: Path, method: str, seed: int, length: Length) -> tuple[Settled, list[Pair]]:
    """What stood in the end, and the batches behind the first, which warms up."""
    records = inline(seed, length.batch * (2 * length.pairs + 1), PARTITIONS, time.time())
    batches = list(_batches(records, length.batch))
    tables = {
        "delivery": {"mode": method},
        "checkpoint": {"folder": f"{folder}/checkpoints", "every_events": 50_000},
        "worker": {"max_records": 500},
    }
    in_order = [record for batch in batches for record in batch]
    with subject(broker, folder, in_order, first=len(batches[0]), labels=False, tables=tables) as worker:
        _await_all(worker)
        cpu_s = [_cpu_s(worker)]
        for batch in batches[1:]:
            worker.feed.send(len(batch))
            _await_all(worker)
            cpu_s.append(_cpu_s(worker))
        settled = worker.judge(worker.settle())
        rates = list(_rates(worker, length.batch))[1:]
    spent = [after - before for before, after in pairwise(cpu_s)]
    return settled, [Pair(*each) for each in zip(rates[::2], rates[1::2], spent[::2], spent[1::2], strict=True)]


def _cpu_s(worker: Subject) -> float:
    return Sample(0.0, scrape(worker.watch.port)).total("process_cpu_seconds_total")


def _batches(records: Sequence[Sent], size: int) -> Iterator[list[Sent]]:
    """Of `size` good records each: a poisoned one to begin with, then a clean and a poisoned one in turn."""
    batch: list[Sent] = []
    good, number = 0, 0
    for record in records:
        if good == size and not record.bad:
            yield batch
            batch, good, number = [], 0, number + 1
        good += not record.bad
        if not record.bad or number % 2 == 0:
            batch.append(record)
    yield batch


def _await_all(worker: Subject) -> None:
    if worker.passes(worker.feed.sent - 1, BATCH_S) is None:
        raise Broken(f"{worker.life.log}: a batch was not read within {BATCH_S:.0f} s: {worker.life.said()[-1500:]}")


def _rates(worker: Subject, size: int) -> Iterator[float]:
    topic = worker.names["predictions"]
    times = sorted(record.timestamp / 1000 for record in recovery_verifier.read(worker.broker.bootstrap, topic))
    for start in range(0, len(times) - size + 1, size):
        first, last = times[start + size // 5], times[start + size - 1]
        yield (size - 1 - size // 5) / max(last - first, 1e-3)


def _row(name: str, settled: Settled, pairs: Sequence[Pair]) -> Row:
    bad, good = len(settled.found.bad), len(settled.found.good)
    clean_s = statistics.median(pair.clean_cpu_s for pair in pairs)
    poisoned_s = statistics.median(pair.poisoned_cpu_s for pair in pairs)
    values = {
        "events": good,
        "bad": bad,
        "dead_letters": len(settled.found.letters),
        "learned": int(settled.ran["counts"]["learned"]),
        "clean_per_s": statistics.median(pair.clean_per_s for pair in pairs),
        "poisoned_per_s": statistics.median(pair.poisoned_per_s for pair in pairs),
        "rate_ratio": _ratio(pairs),
        "cpu_ratio": clean_s / poisoned_s,
    }
    return Row(name, values)


def _ratio(pairs: Sequence[Pair]) -> float:
    return statistics.median(p.poisoned_per_s for p in pairs) / statistics.median(p.clean_per_s for p in pairs)


def _bars(method: str, broker: Broker, settled: Settled, pairs: Sequence[Pair], length: Length) -> Iterator[Bar]:
    found, ran = settled.found, settled.ran
    events = {origin for origin in found.good if origin.startswith(f"{EVENTS}:")}
    yield Bar(f"{method}: rate of good events, poisoned to clean", _ratio(pairs), length.least)
    yield Bar(f"{method}: bad records", len(found.bad), length.pairs * length.batch // 200)
    yield Bar(f"{method}: good events learned once", float(ran["learned_hash"] == learned_hash(events)), 1.0)
    yield from judged(method, broker, ran, settled.replayed, found)
