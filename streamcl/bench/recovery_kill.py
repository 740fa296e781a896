"""kill -9 of a worker at instants drawn from a seed, and inside checkpoints and commits, against an undisturbed replay.

Events and labels come on two topics of four partitions, a part of them while the worker dies. At the end one more life
runs to the end of the input. Its state must be, bit for bit, that of one `streamcl replay` in the logged order.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.bench import recovery_traffic, recovery_verifier
from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import (
    PHASES,
    Life,
    judge,
    live_and_die,
    methods,
    phase,
    plans,
    scratch,
    topics,
    worst,
    write_config,
)
from streamcl.bench.recovery_traffic import Feed, traffic
from streamcl.bench.recovery_verifier import Findings, Logged
from streamcl.bench.report import Bar, Report, Row, progress

PARTITIONS = 4
ROLES = {"events": PARTITIONS, "labels": PARTITIONS, "predictions": PARTITIONS, "dead_letters": 1, "control": 1}
AT_ONCE = 0.6
"""Share of the input that is there when the first life begins."""

LONGEST_S = 4.0
"""No life runs longer once it stands, unless a call is aimed at."""

LIFE_S = 5.0
"""What a life takes about, start included; the rest of the input comes within so many times the kills."""

FULL, QUICK = (200, 200_000), (3, 1_500)
LAST_LIFE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One stream, worked through by processes that were killed. `ran` and `replayed` are what the last two printed."""

    lives: Sequence[Life]
    last: Life
    ran: Mapping[str, Any]
    replayed: Mapping[str, Any]
    found: Findings
    orders: Sequence[Logged]
    seconds: float


def run(options: Options) -> Report:
    """Methods: `at_least_once`, `exactly_once`; without one, both."""
    began = time.perf_counter()
    least = QUICK if options.quick else FULL
    kills, events = options.count("kills", least[0]), options.count("events", least[1])
    seeds, rows, bars = options.seed_list(1), [], []
    with chosen(options.via) as broker:
        for method, seed in itertools.product(methods(options), seeds):
            with scratch("kill") as folder:
                outcome = _outcome(broker, folder, method, seed, (kills, events), options.quick)
                rows.append(_row(method, seed, outcome))
                mine = list(_bars(method, outcome, broker, least))
                bars += mine
                judge(folder, mine)
    config = {"task": "kill", "broker": broker.kind, "kills": kills, "events": events, "partitions": PARTITIONS}
    return Report("recovery", config, seeds, time.perf_counter() - began, rows, worst(bars), notes=_notes(broker))


def _outcome(broker: Broker, folder: Path, method: str, seed: int, wanted: tuple[int, int], quick: bool) -> Outcome:
    began, (kills, events) = time.perf_counter(), wanted
    name = f"recovery-{uuid.uuid4().hex[:8]}"
    with topics(broker, name, ROLES) as names:
        settings = recovery_traffic.config(broker.url, names, str(folder), name, delivery={"mode": method})
        config = write_config(folder, settings)
        records = traffic(seed, events, PARTITIONS, time.time())
        progress(f"{method}, seed {seed}: {kills} kills, {events} events")
        with contextlib.closing(Feed(broker.bootstrap, names, records)) as feed:
            feed.send(round(AT_ONCE * len(records)))
            feed.trickle((1 - AT_ONCE) * len(records) / (LIFE_S * kills))
            lives = _kill(folder, config, seed, kills, 1.0 if quick else LONGEST_S)
            feed.finish()
        progress(f"{method}, seed {seed}: the last life, to the end")
        with Life(folder, "last", "run", str(config), "--idle-exit-s", "2" if quick else "10", "--json") as last:
            ran = last.answer(LAST_LIFE_S)
        progress(f"{method}, seed {seed}: the replay")
        with Life(folder, "replay", "replay", str(config), "--json") as replay:
            replayed = replay.answer(LAST_LIFE_S)
        progress(f"{method}, seed {seed}: the verdict")
        found = recovery_verifier.findings(broker.bootstrap, names)
        orders = recovery_verifier.orders(broker.bootstrap, names["control"])
        return Outcome(lives, last, ran, replayed, found, orders, time.perf_counter() - began)


def _kill(folder: Path, config: Path, seed: int, kills: int, longest_s: float) -> list[Life]:
    lives: list[Life] = []
    startups = [3.0]
    for number, plan in enumerate(plans(seed, kills, longest_s)):
        with Life(folder, number, "run", str(config), aim=plan.aim) as life:
            took = live_and_die(life, plan, statistics.median(startups[-9:]))
        lives.append(life)
        startups += [] if took is None else [took]
        if (number + 1) % 10 == 0 or number + 1 == kills:
            progress(f"{number + 1} of {kills} kills")
    return lives


def _row(name: str, seed: int, outcome: Outcome) -> Row:
    found, lives = outcome.found, [*outcome.lives, outcome.last]
    firsts = [_first_order(life, outcome.orders) for life in lives]
    phases = Counter(phase(life, first) for life, first in zip(lives[:-1], firsts, strict=False))
    restarts = [first - life.began_s for life, first in zip(lives, firsts, strict=True) if first is not None]
    reruns = [_rerun(life, outcome.orders) for life in lives if life.restored_at() is not None]
    values: dict[str, Any] = {
        "kills": sum(phases.values()),
        "events": len(found.good),
        "records": int(outcome.ran["records"]),
        "missing": found.missing,
        "repeats": found.repeated,
        "different": found.different,
        "dead_letters": len(found.letters),
        "restart_median_s": statistics.median(restarts) if restarts else math.nan,
        "restart_p99_s": float(np.percentile(restarts, 99)) if restarts else math.nan,
        "rerun_median": statistics.median(reruns) if reruns else math.nan,
        "rerun_most": max(reruns, default=0),
        "seconds": outcome.seconds,
    }
    return Row(f"{name}, seed {seed}", values | {f"in_{each.replace('-', '_')}": phases[each] for each in PHASES})


def _first_order(life: Life, orders: Sequence[Logged]) -> float | None:
    """When this life logged its first order (system clock), if it did."""
    return next((each.time_s for each in orders if life.began_s <= each.time_s <= life.ended_s), None)


def _rerun(life: Life, orders: Sequence[Logged]) -> int:
    """How many records it had to take again: from its snapshot to what its predecessors had logged."""
    logged = max((each.records for each in orders if each.time_s < life.began_s), default=0)
    return max(0, logged - (life.restored_at() or 0))


def _bars(method: str, outcome: Outcome, broker: Broker, least: tuple[int, int]) -> Iterator[Bar]:
    yield Bar(f"{method}: kills", sum(life.process.returncode == -9 for life in outcome.lives), least[0])
    yield Bar(f"{method}: events", len(outcome.found.good), least[1])
    yield from judged(method, broker, outcome.ran, outcome.replayed, outcome.found)


def judged(
    method: str, broker: Broker, ran: Mapping[str, Any], replayed: Mapping[str, Any], found: Findings
) -> Iterator[Bar]:
    """What must hold whatever was done to the worker."""
    for what, key in (("state equals replay", "state_digest"), ("learned hash equals replay", "learned_hash")):
        yield Bar(f"{method}: {what}", float(ran[key] == replayed[key]), 1.0)
    yield Bar(f"{method}: events without an answer", found.missing, 0, False)
    yield Bar(f"{method}: answers to no event", found.invented, 0, False)
    if method == "exactly_once":
        repeats = math.nan if broker.kind == "embedded" else found.repeated
        yield Bar(f"{method}: duplicates under read_committed", repeats, 0, False)
    else:
        yield Bar(f"{method}: repeats that are not the same bytes", found.different, 0, False)
    yield Bar(f"{method}: bad records without a dead letter, or the reverse", found.letters_wrong, 0, False)


def _notes(broker: Broker) -> list[str]:
    notes = [
        "restart: from the start of a process to its first order in the control log; most of it is torch's import",
        "in_...: how many lives died in which phase; checkpoint and commit: inside a call of fsync, rename or commit",
    ]
    if broker.kind == "embedded":
        notes.append("the embedded broker shows aborted transactions, so exactly-once can't be proven on it")
    return notes
