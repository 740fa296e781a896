"""What `bench recovery` streams: events and labels that overtake, repeat, come late or never, and records that are bad.

All of it is drawn from a seed; only the wall clock that event times begin at differs from run to run.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from kafka import KafkaProducer

from streamcl.protocols import ConnectorError
from streamcl.records import EVENTS, LABELS

WINDOW_S = 20.0
STEP_S = 0.01
BAD: tuple[tuple[str, bytes], ...] = (("bad", b"1"),)
"""The header of what was made bad. The worker does not look at it; the verifier does."""

_BAD_EVENTS = (b"{", b"", b"[1, 2]", b'{"id": "b", "ts": "soon", "x": 1}', b'{"id": "b", "ts": 1, "x": "many"}')
_BAD_LABELS = (b"nope", b'{"id": "b"}', b'{"id": "b", "label": 7}')


@dataclass(frozen=True, slots=True)
class Sent:
    """One record to produce."""

    time_s: float
    input: str
    partition: int
    value: bytes
    bad: bool = False


def traffic(seed: int, events: int, partitions: int, start_s: float, bad_ratio: float = 0.005) -> list[Sent]:
    """`events` good events and their labels, with bad records among them, in the order of their timestamps."""
    rng = np.random.default_rng(seed)
    return sorted(_records(rng, 0, events, partitions, start_s, STEP_S, bad_ratio), key=_when)


def endless(seed: int, partitions: int, start_s: float, step_s: float) -> Iterator[Sent]:
    """The same without an end, in bounded memory; an event every `step_s` of event time."""
    rng, late, size = np.random.default_rng(seed), list[Sent](), 10_000
    for first in itertools.count(0, size):
        found = sorted([*late, *_records(rng, first, size, partitions, start_s, step_s, 0.005)], key=_when)
        end_s = start_s + step_s * (first + size)
        late = [record for record in found if record.time_s >= end_s]
        yield from found[: len(found) - len(late)]


def _when(record: Sent) -> float:
    return record.time_s


def _records(
    rng: np.random.Generator,
    first: int,
    events: int,
    partitions: int,
    start_s: float,
    step_s: float,
    bad_ratio: float,
) -> Iterator[Sent]:
    x, user, part = rng.normal(size=events), rng.integers(0, 500, events), rng.integers(0, partitions, events)
    luck, delay, bad = rng.random(events), rng.exponential(WINDOW_S / 4, events), rng.random(events) < bad_ratio
    clicked = rng.random(events) < 1 / (1 + np.exp(-2 * x - 0.5))
    for i in range(events):
        id, partition = first + i, int(part[i])
        time_s = start_s + step_s * id
        body = {"id": str(id), "ts": time_s, "user": int(user[i]), "x": float(x[i])}
        yield Sent(time_s, EVENTS, partition, orjson.dumps(body))
        yield from _labels(str(id), int(clicked[i]), time_s, float(delay[i]), float(luck[i]), partition)
        if bad[i]:
            yield Sent(time_s, EVENTS, partition, _BAD_EVENTS[id % len(_BAD_EVENTS)], bad=True)
            if id % 4 == 0:
                yield Sent(time_s, LABELS, partition, _BAD_LABELS[id % len(_BAD_LABELS)], bad=True)


def inline(seed: int, events: int, partitions: int, start_s: float) -> list[Sent]:
    """`events` events that carry their label, so that each good one is learned from, wherever it is; 1 % are bad."""
    rng = np.random.default_rng(seed)
    part, x, bad = rng.integers(0, partitions, events), rng.normal(size=events), rng.random(events) < 0.01
    clicked = rng.random(events) < 1 / (1 + np.exp(-2 * x))
    found = []
    for i in range(events):
        time_s = start_s + STEP_S * i
        body = {"id": str(i), "ts": time_s, "user": i % 500, "x": float(x[i]), "clicked": int(clicked[i])}
        found.append(Sent(time_s, EVENTS, int(part[i]), orjson.dumps(body)))
        if bad[i]:
            found.append(Sent(time_s, EVENTS, int(part[i]), _BAD_EVENTS[i % len(_BAD_EVENTS)], bad=True))
    return found


def _labels(id: str, value: int, time_s: float, delay_s: float, luck: float, partition: int) -> Iterator[Sent]:
    """None, one or two, by `luck`; with this mean delay one in fifty comes after its window."""
    if luck < 0.15:
        return
    due = time_s - 1.0 if luck > 0.99 else time_s + delay_s
    label = Sent(due, LABELS, partition, orjson.dumps({"id": id, "label": value, "ts": due}))
    yield label
    if luck > 0.97:
        yield label
    if 0.15 <= luck < 0.16:
        yield Sent(due, LABELS, partition, orjson.dumps({"id": f"unknown-{id}", "label": value, "ts": due}))


class Feed:
    """Produces records to their topics: a part at once, the rest from a thread while others are killed.

    Args:
        topics: By input.
        records: In the order to be sent.
    """

    def __init__(self, bootstrap: Sequence[str], topics: Mapping[str, str], records: Iterable[Sent]) -> None:
        self._topics, self._records = topics, iter(records)
        self._producer = KafkaProducer(bootstrap_servers=list(bootstrap), linger_ms=5, compression_type="lz4")
        self._failed: list[BaseException] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self.sent = 0

    def send(self, count: int | None = None) -> int:
        """The next `count` records, or all; returns how many there were, when they are acknowledged."""
        before = self.sent
        for record in itertools.islice(self._records, count):
            future = self._producer.send(
                self._topics[record.input],
                record.value,
                headers=list(BAD) if record.bad else [],
                partition=record.partition,
                timestamp_ms=round(record.time_s * 1000),
            )
            future.add_errback(self._failed.append)
            self.sent += 1
        self._producer.flush(timeout=120)
        if self._failed:
            raise ConnectorError(f"the traffic could not be produced: {self._failed[0]}")
        return self.sent - before

    def trickle(self, records_per_s: float) -> None:
        """Go on in the background."""
        self._thread = threading.Thread(target=self._trickle, args=(records_per_s,), name="traffic", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Send what is left."""
        self.stop()
        self.send()

    def close(self) -> None:
        self.stop()
        self._producer.close(timeout=5)

    def stop(self) -> None:
        """Send no more by itself."""
        self._end.set()
        if self._thread:
            self._thread.join()

    def _trickle(self, records_per_s: float) -> None:
        pause_s = 0.2
        while not self._end.wait(pause_s):
            try:
                if not self.send(max(1, round(records_per_s * pause_s))):
                    return
            except Exception as error:  # noqa: BLE001 - whatever it is, `finish` raises it
                self._failed.append(error)
                return


def config(url: str, topics: Mapping[str, str], folder: str, name: str, **tables: Any) -> dict[str, Any]:
    """A worker on this traffic; `tables` go over it."""
    settings: dict[str, Any] = {
        "name": name,
        "predictions": f"{url}/{topics['predictions']}",
        "dead_letters": f"{url}/{topics['dead_letters']}",
        "control": f"{url}/{topics['control']}" if "control" in topics else None,
        "features": {"user": {"kind": "categorical", "buckets": 1024}, "x": "numeric"},
        "model": {"kind": "logistic"},
        "join": {"attribution_window_s": WINDOW_S},
        "checkpoint": {"folder": f"{folder}/checkpoints", "every_events": 2000},
        "worker": {"max_records": 100},
        "telemetry": {"port": 0},
        "events": {"url": f"{url}/{topics[EVENTS]}", "id": "id", "key": "user", "time": "ts"}
        | ({} if LABELS in topics else {"label": "clicked"}),
        "labels": {"url": f"{url}/{topics[LABELS]}", "time": "ts"} if LABELS in topics else None,
    }
    return settings | tables
