"""Ranks of a group in one process: each learns its part of a stream in turn, and they meet as `torchrun`'s do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from streamcl.bench.quality import Floats, Trace
from streamcl.bench.streams import LABEL, TIME
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.group.merge import Merge, merge_of
from streamcl.group.ranks import Ranks
from streamcl.learner import Learner
from streamcl.past import past_of
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket

CHUNK = 500
"""Events learned at once; never changes a score."""

Shown = Sequence[Mapping[str, Any]]
"""Payloads of events that are answered together, and whose labels come together."""


class Member:
    """One rank: completed by the past, answered, seen, heard of, learned from, as the worker does it."""

    def __init__(self, config: Config, rank: int, world: int, share_past: bool = True) -> None:
        self.key = config.events.key or ""
        self.featurizer, self.learner = Featurizer(config), Learner(config)
        self.past = past_of(config, self.featurizer)
        self.merge: Merge = merge_of(config, self.learner, Ranks(rank, world), self.past if share_past else None)
        self.taken = self.learned = 0

    def take(self, parts: Sequence[Shown]) -> list[float]:
        """Scores of all events, in order; each was given before its label was learned from."""
        said: list[Scores] = []
        fused = self.learner.fused
        for number, shown in enumerate(parts):
            encoded = [self._encoded(payload) for payload in shown]
            answers = [self._answer(each) for each in encoded]
            said += answers
            key = str(shown[0].get(self.key, ""))
            if self.past:
                for each, payload in zip(encoded, shown, strict=True):
                    self.past.saw(each, payload[TIME], key)
            for features, scores, payload in zip(encoded, answers, shown, strict=True):
                self._learn(features, scores, payload, key)
            if fused is not None and (number + 1) % CHUNK == 0:
                fused.settle()
        if fused is not None:
            fused.settle()
        return [float(each.served[0]) for each in said]

    def _encoded(self, payload: Mapping[str, Any]) -> Encoded:
        encoded = self.featurizer.encode(payload)
        return self.past.complete(encoded, payload[TIME]) if self.past else encoded

    def _answer(self, features: Encoded) -> Scores:
        fused = self.learner.fused
        return self.learner.predict(features) if fused is None else fused.answer(features)

    def _learn(self, features: Encoded, scores: Scores, payload: Mapping[str, Any], key: str) -> None:
        self.taken += 1
        origin = Origin(EVENTS, 0, self.taken)
        ticket = Ticket(str(self.taken), payload[TIME], features, scores, origin, "", key)
        outcome = Outcome(ticket, float(payload[LABEL]), Fate.INLINE, 0.0)
        if self.past:
            self.past.heard(outcome)
        if self.learner.fused is not None:
            self.learner.fused.learn(outcome)
        else:
            self.learner.learn(outcome)


@dataclass
class Course:
    """What a group's run came to. `said_bytes`: of all ranks, each round's once, however many hear it."""

    trace: Trace
    world: int = 1
    rounds: int = 0
    said_bytes: int = 0
    merging_s: float = 0.0
    divergences: list[float] = field(default_factory=list)


def parts_of(stream: Sequence[Shown], key: str, world: int) -> list[list[int]]:
    """Which parts of a stream each rank takes: all of one key go to one rank, as those of Kafka's partitions do."""
    found: list[list[int]] = [[] for _ in range(world)]
    for place, shown in enumerate(stream):
        found[xxhash.xxh3_64_intdigest(str(shown[0][key]).encode()) % world].append(place)
    return found


def run(name: str, config: Config, stream: Sequence[Shown], world: int, *, share_past: bool = True) -> Course:
    """Learn a stream by so many ranks, which meet when each has learned `group.round_events` more events.

    A rank whose part has ended goes on meeting, with nothing learned.
    """
    members = [Member(config, rank, world, share_past) for rank in range(world)]
    parts = parts_of(stream, config.events.key or "", world)
    width = len(stream[0])
    step = max(1, (config.group.learned or 1) // width)
    scores: Floats = np.zeros((len(stream), width))
    course = Course(Trace(name, scores.reshape(-1)), world)
    began = time.process_time()
    for start in range(0, max(map(len, parts)), step):
        spans = [part[start : start + step] for part in parts]
        for member, span in zip(members, spans, strict=True):
            if span:
                scores[span] = np.reshape(member.take([stream[place] for place in span]), (-1, width))
        _meet(members, [width * len(span) for span in spans], course)
    course.trace = Trace(name, scores.reshape(-1), time.process_time() - began)
    return course


def _meet(members: Sequence[Member], examples: Sequence[int], course: Course) -> None:
    if len(members) == 1:
        return
    began = time.process_time()
    said = [member.merge.say(count) for member, count in zip(members, examples, strict=True)]
    course.said_bytes += sum(map(len, said))
    met = [member.merge.hear(said) for member in members]
    course.rounds += 1
    course.divergences.append(met[0].divergence)
    course.merging_s += time.process_time() - began
