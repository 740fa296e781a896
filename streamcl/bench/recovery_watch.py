"""A worker under traffic while something is done to it: what its `/metrics` say, and what came of it in the end."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcl.bench import recovery_traffic, recovery_verifier
from streamcl.bench.brokers import Broker
from streamcl.bench.recovery_chaos import Broken, Life, topics, write_config
from streamcl.bench.recovery_traffic import Feed, Sent
from streamcl.bench.recovery_verifier import Findings

PARTITIONS = 4
ROLES = {"events": PARTITIONS, "labels": PARTITIONS, "predictions": PARTITIONS, "dead_letters": 1, "control": 1}
EVERY_S = 0.2
REPLAY_S = 3600.0
POSITION, RESIDENT, LAG = "streamcl_position", "process_resident_memory_bytes", "streamcl_lag_records"


def scrape(port: int, timeout_s: float = 5.0) -> dict[str, float]:
    """Every series of `/metrics`, by its name with labels; empty when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout_s) as answer:
            text = answer.read().decode()
    except (OSError, urllib.error.URLError):
        return {}
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the metrics; `at_s` of the monotonic clock."""

    at_s: float
    metrics: Mapping[str, float]

    def total(self, name: str) -> float:
        """The sum over the labels of a metric; 0 when there is none."""
        return sum(value for series, value in self.metrics.items() if series.partition("{")[0] == name)


class Watch:
    """Looks at a worker's metrics from a thread, again when the worker is another process on the same port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.samples: list[Sample] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def furthest(self, before_s: float = float("inf")) -> float:
        """The sum of all positions (offsets) that the worker stood at, at most."""
        return max((s.total(POSITION) for s in self.samples if s.at_s <= before_s), default=0.0)

    def peak_bytes(self) -> float:
        return max((sample.total(RESIDENT) for sample in self.samples), default=0.0)

    def latest(self) -> Sample:
        return self.samples[-1] if self.samples else Sample(0.0, {})

    def still_s(self, since_s: float, until_s: float) -> float:
        """The longest time between two advances of the position; advances are seen to within a look."""
        best, moves = self.furthest(since_s), [since_s]
        for sample in [s for s in self.samples if since_s < s.at_s <= until_s]:
            if sample.total(POSITION) > best:
                best = sample.total(POSITION)
                moves.append(sample.at_s)
        return max(b - a for a, b in zip(moves, [*moves[1:], until_s], strict=True))

    def _look(self) -> None:
        while not self._end.wait(EVERY_S):
            at_s, metrics = time.monotonic(), scrape(self.port)
            if metrics:
                self.samples.append(Sample(at_s, metrics))


@dataclass(frozen=True, slots=True)
class Settled:
    """What stood at the end: printed by the worker and by the replay, and found by the verifier."""

    ran: Mapping[str, Any]
    replayed: Mapping[str, Any]
    found: Findings


class Subject:
    """A worker with topics, traffic and telemetry of its own."""

    def __init__(self, broker: Broker, folder: Path, config: Path, names: Mapping[str, str], feed: Feed, port: int):
        self.broker, self.folder, self.config, self.names, self.feed = broker, folder, config, names, feed
        self.watch = Watch(port)
        self.lives = 0
        self.life = self.start()

    def start(self) -> Life:
        """Another process, after the last one has ended."""
        self.lives += 1
        self.life = Life(self.folder, self.lives, "run", str(self.config), "--json")
        return self.life

    def passes(self, position: float, timeout_s: float, since_s: float = 0.0) -> float | None:
        """When it was first seen beyond `position` (s, monotonic), not before `since_s`; None: not in time."""
        found = self.sees(lambda sample: sample.at_s >= since_s and sample.total(POSITION) > position, timeout_s)
        return found.at_s if found else None

    def sees(self, wanted: Any, timeout_s: float) -> Sample | None:
        """The first sample that `wanted` holds for, waiting for it. Raises Broken when the worker leaves."""
        deadline, seen = time.monotonic() + timeout_s, 0
        while True:
            samples = self.watch.samples[seen:]
            seen += len(samples)
            if found := next((sample for sample in samples if wanted(sample)), None):
                return found
            if self.life.process.poll() is not None:
                raise Broken(f"{self.life.log}: left with {self.life.process.returncode}: {self.life.said()[-1500:]}")
            if time.monotonic() > deadline:
                return None
            time.sleep(EVERY_S / 2)

    def settle(self, timeout_s: float = 300.0) -> Mapping[str, Any]:
        """No more traffic; wait until all is read and let it stop cleanly; what it prints. Raises Broken."""
        self.feed.stop()
        self.feed.send(0)  # raises what went wrong with the traffic
        since_s = time.monotonic() + 2 * EVERY_S
        if not self.sees(lambda each: each.at_s > since_s and LAG in _names(each) and each.total(LAG) == 0, timeout_s):
            raise Broken(f"{self.life.log}: not all was read within {timeout_s:.0f} s: {self.life.said()[-1500:]}")
        self.life.signal(signal.SIGTERM)
        ran: Mapping[str, Any] = self.life.answer(60.0)
        return ran

    def judge(self, ran: Mapping[str, Any]) -> Settled:
        """Replay, and let the verifier read."""
        with Life(self.folder, "replay", "replay", str(self.config), "--json") as replay:
            replayed = replay.answer(REPLAY_S)
        return Settled(ran, replayed, recovery_verifier.findings(self.broker.bootstrap, self.names))


def free_port() -> int:
    """One of loopback, below those that outgoing connections are given: it stays free between two lives."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _names(sample: Sample) -> set[str]:
    return {series.partition("{")[0] for series in sample.metrics}


@contextlib.contextmanager
def subject(
    broker: Broker,
    folder: Path,
    records: Sequence[Sent],
    *,
    per_s: float = 0.0,
    url: str | None = None,
    first: int = 100,
    labels: bool = True,
    tables: Mapping[str, Any],
) -> Iterator[Subject]:
    """A worker at work on the `first` records, with `per_s` more a second coming in by themselves; gone at the end.

    Args:
        labels: They have a topic of their own.
        url: How the worker reaches the broker, when not as everyone does.
        tables: Of its configuration.
    """
    name, port = f"recovery-{uuid.uuid4().hex[:8]}", free_port()
    folder.mkdir(parents=True, exist_ok=True)
    roles = {role: count for role, count in ROLES.items() if labels or role != "labels"}
    with topics(broker, name, roles) as names:
        mine = {"telemetry": {"port": port}, **tables}
        settings = recovery_traffic.config(url or broker.url, names, str(folder), name, **mine)
        with contextlib.closing(Feed(broker.bootstrap, names, records)) as feed:
            feed.send(first)
            if per_s:
                feed.trickle(per_s)
            found = Subject(broker, folder, write_config(folder, settings), names, feed, port)
            try:
                if found.passes(0, 120.0) is None:
                    raise Broken(f"{found.life.log}: does not come up: {found.life.said()[-1500:]}")
                yield found
            finally:
                found.watch.close()
                found.life.__exit__()
