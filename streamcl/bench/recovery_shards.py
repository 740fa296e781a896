"""Eight shards on two to four workers that are killed, stopped and frozen: each event is learned exactly once.

Shards are handed out by hand (`--shards K/N`) or by a consumer group. A frozen worker stays so until another one has
its shards; awake again it must give way. Events carry their labels, so every good one is learned, and what all shards
together must say they learned is known from the topic alone: a sum of hashes, which a lost or repeated event changes.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from streamcl.bench import recovery_traffic, recovery_verifier
from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken, Life, judge, methods, scratch, topics, worst, write_config
from streamcl.bench.recovery_traffic import Feed, inline
from streamcl.bench.recovery_verifier import Findings, learned_hash
from streamcl.bench.report import Bar, Report, Row, progress

SHARDS = 8
ROLES = {"events": SHARDS, "predictions": SHARDS, "dead_letters": 1}
ASSIGNMENTS = ("static", "group")
KINDS = ("kill", "term", "freeze")
SESSION_S = 6.0
LEASE_S = 1.0
PATIENCE_S = 120.0
TROUBLE_S = 10.0
"""What one trouble takes about; the input comes in over so many times their number."""

FOR_THE_WOKEN = 0.2
"""Share of the input that comes when a frozen worker wakes: one in a group sees by its work that it is fenced."""

LONGEST_S, QUICK_LONGEST_S = 4.0, 0.5
"""No trouble waits longer for a worker that stands."""

FULL, QUICK = (30, 40_000), (3, 2_000)
_GAVE_WAY = re.compile(r"another worker has|dropped: ")
_DROPPED = re.compile(r"dropped: ")


@dataclass(frozen=True, slots=True)
class Outcome:
    """`troubles` by kind; `gave_way` counts frozen workers that did once they woke; `ran` is what the last one said."""

    troubles: Mapping[str, int]
    gave_way: int
    ran: Mapping[str, Any]
    found: Findings
    seconds: float


def run(options: Options) -> Report:
    """Each assignment by each method; `--quick` has one method for each. `--kills` is the number of troubles."""
    began = time.perf_counter()
    least = QUICK if options.quick else FULL
    wanted = options.count("kills", least[0]), options.count("events", least[1])
    seeds, rows, bars = options.seed_list(1), [], []
    with chosen(options.via) as broker:
        for assignment, method, seed in _runs(options, seeds):
            with scratch("shards") as folder:
                progress(f"{assignment}, {method}, seed {seed}: {wanted[0]} troubles, {wanted[1]} events")
                outcome = _outcome(broker, folder, assignment, method, seed, wanted, options.quick)
                rows.append(_row(f"{assignment}, {method}, seed {seed}", outcome))
                mine = list(_bars(assignment, method, broker, outcome, least))
                bars += mine
                judge(folder, mine)
    config = {"task": "shards", "broker": broker.kind, "kills": wanted[0], "events": wanted[1], "shards": SHARDS}
    notes = [
        "learned: the sum of the shards' hashes, beside the verifier's own of all good events",
        "gave way: frozen workers that left or dropped their shards, once awake, as another one had them",
    ]
    return Report("recovery", config, seeds, time.perf_counter() - began, rows, worst(bars), notes=notes)


def _runs(options: Options, seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    for assignment, quick in zip(ASSIGNMENTS, ("exactly_once", "at_least_once"), strict=True):
        for method in (quick,) if options.quick and options.method is None else methods(options):
            yield from ((assignment, method, seed) for seed in seeds)


def _outcome(
    broker: Broker, folder: Path, assignment: str, method: str, seed: int, wanted: tuple[int, int], quick: bool
) -> Outcome:
    began, (count, events) = time.perf_counter(), wanted
    name = f"recovery-{uuid.uuid4().hex[:8]}"
    with topics(broker, name, ROLES) as names:
        config, last = _configs(broker, folder, names, name, assignment, method)
        records = inline(seed, events, SHARDS, time.time())
        drawn = troubles(seed, count, QUICK_LONGEST_S if quick else LONGEST_S)
        cut = round((1 - FOR_THE_WOKEN) * len(records))
        freezes = sum(trouble.kind == "freeze" for _, piece in drawn for trouble in piece)
        with (
            contextlib.closing(Feed(broker.bootstrap, names, records[:cut])) as feed,
            contextlib.closing(Feed(broker.bootstrap, names, records[cut:])) as reserve,
        ):
            feed.send(cut // 3)
            feed.trickle(cut / (TROUBLE_S * count))
            portion = -(-(len(records) - cut) // max(1, freezes))
            counts = _trouble(folder, config, assignment == "group", drawn, lambda: reserve.send(portion))
            feed.finish()
            reserve.finish()
        progress("one worker for all shards, to the end")
        idle_s = "2" if quick else "10"
        with Life(folder, "last", "run", str(last), "--shards", "0/1", "--idle-exit-s", idle_s, "--json") as life:
            ran = life.answer(3600.0)
        found = recovery_verifier.findings(broker.bootstrap, names)
    gave_way = counts.pop("gave way", 0)
    return Outcome(counts, gave_way, ran, found, time.perf_counter() - began)


def _configs(
    broker: Broker, folder: Path, names: Mapping[str, str], name: str, assignment: str, method: str
) -> tuple[Path, Path]:
    """The team's, and that of the last worker, which takes all shards by itself."""
    shard = {"count": SHARDS, "session_timeout_s": SESSION_S, "max_poll_interval_s": 60.0}
    tables = {
        "delivery": {"mode": method},
        "checkpoint": {"folder": f"{folder}/checkpoints", "every_events": 500, "lease_s": LEASE_S},
    }
    found = []
    for each in (assignment, "static"):
        place = folder / each
        place.mkdir(exist_ok=True)
        mine = tables | {"shard": shard | {"assignment": each}}
        found.append(write_config(place, recovery_traffic.config(broker.url, names, str(folder), name, **mine)))
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to the worker in `slot`, `pause_s` after it stands (`patient`), or wherever it is by then."""

    kind: str
    slot: int
    pause_s: float
    patient: bool


def troubles(seed: int, count: int, longest_s: float = LONGEST_S) -> list[tuple[int, list[Trouble]]]:
    """(workers, what happens to them): teams of two, three and four, one after the other; few troubles have one team.

    All kinds come equally often.
    """
    rng = np.random.default_rng([seed, 2])
    kinds = [str(kind) for _ in range(-(-count // len(KINDS))) for kind in rng.permutation(KINDS)][:count]
    sizes = [int(size) for size in rng.permutation([2, 3, 4])] if count > len(KINDS) else [2]
    return [
        (size, [_draw(rng, str(kind), size, longest_s) for kind in piece])
        for size, piece in zip(sizes, np.array_split(np.array(kinds), len(sizes)), strict=True)
    ]


def _draw(rng: np.random.Generator, kind: str, size: int, longest_s: float) -> Trouble:
    return Trouble(kind, int(rng.integers(size)), float(rng.uniform(0.0, longest_s)), bool(rng.random() < 0.7))


def _trouble(
    folder: Path, config: Path, group: bool, drawn: Sequence[tuple[int, list[Trouble]]], more: Callable[[], object]
) -> Counter[str]:
    """How often what happened, and how many frozen workers gave way."""
    counts: Counter[str] = Counter()
    total = sum(len(piece) for _, piece in drawn)
    for size, piece in drawn:
        with Team(folder, config, group, size, more) as team:
            for trouble in piece:
                counts["gave way"] += team.suffer(trouble)
                counts[trouble.kind] += 1
                progress(f"{sum(counts[kind] for kind in KINDS)} of {total} troubles, {size} workers")
    return counts


class Team:
    """So many workers, each in a slot; all are killed at the end of the context.

    Args:
        more: Sends some input.
    """

    def __init__(self, folder: Path, config: Path, group: bool, size: int, more: Callable[[], object]) -> None:
        self.folder, self.config, self.group, self.size, self.more = folder, config, group, size, more
        self.lives: dict[int, Life] = {}
        self._all: list[Life] = []

    def __enter__(self) -> Self:
        for slot in range(self.size):
            self.start(slot)
        return self

    def __exit__(self, *_: object) -> None:
        for life in self._all:
            life.__exit__()

    def start(self, slot: int) -> Life:
        """Another worker for the slot."""
        arguments = [] if self.group else ["--shards", f"{slot}/{self.size}"]
        number = f"{self.size}-{slot}-{len(self._all)}"
        self.lives[slot] = Life(self.folder, number, "run", str(self.config), *arguments)
        self._all.append(self.lives[slot])
        return self.lives[slot]

    def suffer(self, trouble: Trouble) -> int:
        """Returns how many gave way.

        Raises:
            Broken: a worker left by itself, or did not when it had to.
        """
        life = self.lives[trouble.slot]
        patient = trouble.patient or trouble.kind == "freeze"
        if patient and not life.await_standing(PATIENCE_S, self._share(trouble.slot)):
            raise Broken(f"{life.log}: holds no shard: {life.said()[-1500:]}")
        time.sleep(trouble.pause_s)
        self._all_live()
        if trouble.kind == "freeze":
            return self._freeze_in_group(life) if self.group else self._freeze(life, trouble.slot)
        if trouble.kind == "kill":
            life.kill()
        else:
            self._terminate(life)
        self.start(trouble.slot)
        return 0

    def _share(self, slot: int) -> int:
        """How many shards a worker must have taken up before it is said to stand."""
        return 1 if self.group else len(range(slot, SHARDS, self.size))

    def _all_live(self) -> None:
        for life in self.lives.values():
            if life.process.poll() is not None:
                raise Broken(f"{life.log}: left with {life.process.returncode}: {life.said()[-1500:]}")

    def _terminate(self, life: Life) -> None:
        stood = life.standing() > 0
        life.signal(signal.SIGTERM)
        if not life.wait(PATIENCE_S):
            raise Broken(f"{life.log}: SIGTERM did not end it within {PATIENCE_S:.0f} s: {life.said()[-1500:]}")
        # Before it runs a shard, nothing catches the signal.
        if life.process.returncode and (stood or life.process.returncode != -signal.SIGTERM):
            raise Broken(f"{life.log}: left with {life.process.returncode}: {life.said()[-1500:]}")

    def _freeze(self, life: Life, slot: int) -> int:
        """Another worker takes its shards; then it wakes."""
        life.signal(signal.SIGSTOP)
        try:
            deputy = self.start(slot)
            if not deputy.await_standing(PATIENCE_S, self._share(slot)):
                raise Broken(f"{deputy.log}: does not take over: {deputy.said()[-1500:]}")
        finally:
            life.signal(signal.SIGCONT)
        self.more()
        return int(life.wait(PATIENCE_S) and life.process.returncode != 0 and bool(_GAVE_WAY.search(life.said())))

    def _freeze_in_group(self, life: Life) -> int:
        """Its session ends, the group hands its shards to others; then it wakes."""
        dropped = len(_DROPPED.findall(life.said()))
        life.signal(signal.SIGSTOP)
        try:
            time.sleep(2 * SESSION_S)
        finally:
            life.signal(signal.SIGCONT)
        self.more()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and life.process.poll() is None:
            if len(_DROPPED.findall(life.said())) > dropped:
                return 1
            time.sleep(0.1)
        return 0


def _row(name: str, outcome: Outcome) -> Row:
    found = outcome.found
    values: dict[str, Any] = {
        "troubles": sum(outcome.troubles.values()),
        **{kind: outcome.troubles.get(kind, 0) for kind in KINDS},
        "gave_way": outcome.gave_way,
        "events": len(found.good),
        "learned": int(outcome.ran["counts"].get("learned", 0)),
        "missing": found.missing,
        "repeats": found.repeated,
        "different": found.different,
        "dead_letters": len(found.letters),
        "seconds": outcome.seconds,
    }
    return Row(name, values)


def _bars(assignment: str, method: str, broker: Broker, outcome: Outcome, least: tuple[int, int]) -> Iterator[Bar]:
    found, frozen = outcome.found, outcome.troubles.get("freeze", 0)
    yield Bar(f"{assignment}: troubles", sum(outcome.troubles.values()), least[0])
    yield Bar(f"{assignment}: events", len(found.good), least[1])
    yield Bar(f"{assignment}: learned", float(outcome.ran["learned_hash"] == learned_hash(found.good)), 1.0)
    yield Bar(f"{assignment}: events without an answer", found.missing, 0, False)
    yield Bar(f"{assignment}: answers to no event", found.invented, 0, False)
    repeats: float = found.repeated if method == "exactly_once" else found.different
    if method == "exactly_once" and broker.kind == "embedded":
        repeats = math.nan  # it shows aborted transactions
    yield Bar(f"{assignment}: repeats that break the promise", repeats, 0, False)
    yield Bar(f"{assignment}: bad records without a dead letter, or the reverse", found.letters_wrong, 0, False)
    yield Bar(f"{assignment}: frozen workers that gave way", outcome.gave_way / frozen if frozen else math.nan, 1.0)
