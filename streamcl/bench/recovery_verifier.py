"""The judge of `bench recovery`. It shares no code with the worker: it reads topics with kafka-python and counts."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import xxhash
from kafka import KafkaConsumer, TopicPartition

SILENCE_S = 20.0


def read(bootstrap: Sequence[str], topic: str) -> Iterator[Any]:
    """Every committed record of a topic, to where it ends now; stops early after `SILENCE_S` without one."""
    consumer = KafkaConsumer(
        bootstrap_servers=list(bootstrap), isolation_level="read_committed", enable_auto_commit=False
    )
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        ends = consumer.end_offsets(partitions)
        heard = time.monotonic()
        while time.monotonic() - heard < SILENCE_S and any(consumer.position(p) < ends[p] for p in partitions):
            for records in consumer.poll(timeout_ms=200).values():
                heard = time.monotonic()
                yield from records
    finally:
        consumer.close()


@dataclass
class Findings:
    """What the topics say.

    Attributes:
        good, bad: Origins `input:partition:offset` of the records that were sent.
        answers: A hash of each answer, by the origin that it answers.
        letters: Origins of the dead letters.
    """

    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    answers: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    letters: set[str] = field(default_factory=set)
    unexplained: int = 0  # dead letters without a reason

    @property
    def missing(self) -> int:
        return len(self.good - self.answers.keys())

    @property
    def invented(self) -> int:
        return len(self.answers.keys() - self.good)

    @property
    def repeated(self) -> int:
        return sum(len(each) - 1 for each in self.answers.values())

    @property
    def different(self) -> int:
        """Events with two answers that are not the same."""
        return sum(len(set(each)) > 1 for each in self.answers.values())

    @property
    def letters_wrong(self) -> int:
        """Bad records without a dead letter, and dead letters of good records."""
        return len(self.bad ^ self.letters) + self.unexplained


def findings(bootstrap: Sequence[str], topics: Mapping[str, str]) -> Findings:
    """Read inputs, predictions and dead letters. `topics` by role."""
    found = Findings()
    for name in ("events", "labels"):
        for record in read(bootstrap, topics[name]) if name in topics else ():
            origin = f"{name}:{record.partition}:{record.offset}"
            if any(header == "bad" for header, _ in record.headers):
                found.bad.add(origin)
            elif name == "events":
                found.good.add(origin)
    for record in read(bootstrap, topics["predictions"]):
        answer = hashlib.blake2b(repr((record.key, record.value, record.headers)).encode(), digest_size=16)
        found.answers[dict(record.headers)["streamcl-input"].decode()].append(answer.digest())
    for record in read(bootstrap, topics["dead_letters"]):
        said = {name: value.decode() for name, value in record.headers}
        found.letters.add(f"{said['streamcl-input']}:{said['streamcl-partition']}:{said['streamcl-offset']}")
        found.unexplained += not said.get("streamcl-reason")
    return found


def learned_hash(origins: Iterable[str]) -> str:
    """What a worker must say that has learned from each of these exactly once: a sum of hashes, modulo 2^128."""
    return f"{sum(xxhash.xxh3_128_intdigest(origin.encode()) for origin in origins) % 2**128:032x}"


@dataclass(frozen=True, slots=True)
class Logged:
    """One order of the control log: when it was sent, and how many records all orders up to it took."""

    time_s: float
    records: int


def orders(bootstrap: Sequence[str], topic: str) -> list[Logged]:
    found, total = [], 0
    for record in read(bootstrap, topic):
        total += sum(length for _, _, length in orjson.loads(record.value)["runs"])
        found.append(Logged(record.timestamp / 1000, total))
    return found
