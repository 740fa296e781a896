"""Brokers die, freeze and come back, and the network between them and the workers breaks: nothing is lost.

Three brokers of Apache Kafka, a proxy before each. A worker for each delivery method suffers the same faults at the
same time, under traffic of its own, which does not go through the proxies.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.proxy import Proxy
from streamcl.bench.recovery_chaos import keep, methods, scratch
from streamcl.bench.recovery_kill import judged
from streamcl.bench.recovery_traffic import traffic
from streamcl.bench.recovery_watch import PARTITIONS, Subject, free_port, subject
from streamcl.bench.report import Bar, Report, Row, progress

BROKERS = 3
PATIENCE_S = 180.0
CALM_S = 3.0  # between two faults
MIB = 1 << 20
GROWTH_MIB = 64.0  # the bound of what waits to be sent, kafka.max_inflight_bytes
TIMES = {"request_timeout_s": 5.0, "connect_timeout_s": 10.0, "delivery_timeout_s": 15.0, "transaction_timeout_s": 10.0}


@dataclass(frozen=True, slots=True)
class Length:
    """How long the faults last (s; 0: left out), and within which time a worker must recover from each.

    Attributes:
        per_s: Records a second; `events` must suffice for it.
    """

    network_s: float
    dead_s: float
    frozen_s: float
    outage_s: float
    recover_s: float
    per_s: float
    events: int


FULL = Length(20.0, 20.0, 60.0, 10.0, 60.0, 150.0, 100_000)
QUICK = Length(2.0, 2.0, 6.0, 0.0, 45.0, 50.0, 8_000)


def _nothing() -> None:
    """There is nothing to do."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done: begin, wait `lasting_s`, end. `survived`: two brokers of three should go on meanwhile."""

    name: str
    begin: Callable[[], None]
    end: Callable[[], None]
    lasting_s: float
    survived: bool = False


def run(options: Options) -> Report:
    """Raises ConnectorError where Apache Kafka can't be had: no other broker dies and comes back with its data."""
    began = time.perf_counter()
    length = QUICK if options.quick else FULL
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # every lost connection, and that is what this is about
    with scratch("broker") as folder, _cluster() as (broker, url, proxies), ExitStack() as stack:
        subjects = {m: stack.enter_context(_subject(broker, folder / m, m, url, length)) for m in methods(options)}
        calm = {method: each.watch.peak_bytes() for method, each in subjects.items()}
        topic = next(iter(subjects.values())).names["events"]
        faults = _faults(broker.handle, proxies, topic, length)
        rows = [row for fault in faults for row in _suffer(fault, subjects)]
        bars = []
        for method, each in subjects.items():
            progress(f"{method}: the end, and the replay")
            settled = each.judge(each.settle())
            peak_mib = (each.watch.peak_bytes() - calm[method]) / MIB
            rows.append(Row(f"{method}: in all", {"events": len(settled.found.good), "memory_growth_mib": peak_mib}))
            bars += [
                *judged(method, broker, settled.ran, settled.replayed, settled.found),
                Bar(f"{method}: most seconds to recover", _slowest(rows, method), length.recover_s, False),
                Bar(f"{method}: growth of memory (MiB)", peak_mib, GROWTH_MIB, False),
            ]
        if not all(bar.ok for bar in bars):
            keep(folder)
    config = {"task": "broker", "broker": "apache", "brokers": BROKERS, "records_per_s": length.per_s, "kafka": TIMES}
    return Report("recovery", config, [0], time.perf_counter() - began, rows, bars, notes=_NOTES)


_NOTES = (
    "still_s: the longest time without progress; stands_s: from the end of the fault to progress",
    "recovers_s: stands_s, and no less than still_s where two brokers of three should go on by themselves",
    "lasting_s: with the restart of what was killed; looked at five times a second",
    "memory: the process's resident peak, above that before the first fault",
)


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[Broker, str, list[Proxy]]]:
    """Three brokers; the URL through the proxies; the proxies."""
    ports = [free_port() for _ in range(BROKERS)]
    with chosen(None, brokers=BROKERS, proxies=ports) as broker, ExitStack() as stack:
        behind = [int(each.rpartition(":")[2]) for each in broker.handle.listener("PROXY").split(",")]
        proxies = [stack.enter_context(Proxy(a, b)) for a, b in zip(ports, behind, strict=True)]
        yield broker, "kafka://" + ",".join(f"127.0.0.1:{port}" for port in ports), proxies


def _subject(
    broker: Broker, folder: Path, method: str, url: str, length: Length
) -> contextlib.AbstractContextManager[Subject]:
    records = traffic(0, length.events, PARTITIONS, time.time())
    tables = {"delivery": {"mode": method}, "kafka": TIMES}
    return subject(broker, folder, records, per_s=length.per_s, url=url, tables=tables)


def _faults(kafka: Any, proxies: Sequence[Proxy], topic: str, length: Length) -> Iterator[Fault]:
    """In order. A broker that leads is chosen when its turn comes."""

    def each(does: Callable[[Proxy], None]) -> Callable[[], None]:
        def all_of_them() -> None:
            for proxy in proxies:
                does(proxy)

        return all_of_them

    fine = each(lambda proxy: proxy.set("ok"))
    yield Fault("network reset", each(Proxy.reset), _nothing, 0.0)
    yield Fault("network 200 ms slower", each(lambda proxy: proxy.set("delay")), fine, length.network_s, survived=True)
    yield Fault("network cut", each(lambda proxy: proxy.set("stall")), fine, length.network_s)
    yield Fault("network refuses", each(lambda proxy: proxy.set("refuse")), fine, length.network_s)
    leader = kafka.leader(topic)
    yield Fault("leader killed", _of(kafka.kill, leader), _of(kafka.restart, leader), length.dead_s, survived=True)
    leader = kafka.leader(topic)
    yield Fault("leader frozen", _of(kafka.freeze, leader), _of(kafka.thaw, leader), length.frozen_s, survived=True)
    if length.outage_s:
        yield Fault("two of three killed", _of(kafka.kill, 0, 1), _of(kafka.restart, 0), length.outage_s)
        kafka.restart(1)


def _of(does: Callable[[int], None], *brokers: int) -> Callable[[], None]:
    def all_of_them() -> None:
        for broker in brokers:
            does(broker)

    return all_of_them


def _suffer(fault: Fault, subjects: Mapping[str, Subject]) -> Iterator[Row]:
    """Bring it about, end it, and wait until every worker stands."""
    progress(fault.name)
    began_s = time.monotonic()
    fault.begin()
    time.sleep(fault.lasting_s)
    fault.end()
    ended_s = time.monotonic()
    for method, each in subjects.items():
        stands_s = _stands(each, ended_s)
        still_s = each.watch.still_s(began_s, ended_s + stands_s)
        recovers_s = max(still_s, stands_s) if fault.survived else stands_s
        values = {"lasting_s": ended_s - began_s, "still_s": still_s, "stands_s": stands_s, "recovers_s": recovers_s}
        yield Row(f"{method}: {fault.name}", values)
    time.sleep(CALM_S)


def _stands(worker: Subject, since_s: float) -> float:
    """How long it took from then until it came further than it ever was (s)."""
    found = worker.passes(worker.watch.furthest(since_s), PATIENCE_S, since_s)
    return found - since_s if found else math.inf


def _slowest(rows: Sequence[Row], method: str) -> float:
    return max(float(row.values.get("recovers_s") or 0.0) for row in rows if row.name.startswith(f"{method}:"))
