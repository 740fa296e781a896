"""Ranks of a group in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamcl.config import Config
from streamcl.delta import served
from streamcl.features import Featurizer
from streamcl.group.merge import Met, merge_of
from streamcl.group.ranks import Ranks
from streamcl.learner import Learner
from streamcl.past import past_of
from streamcl.protocols import State
from streamcl.records import EVENTS, Fate, Origin, Outcome, Ticket
from streamcl.state import digest

Click = tuple[str, str, int]
"""User, item, label."""

FEATURES: dict[str, Any] = {
    "user": {"kind": "categorical", "buckets": 64},
    "item": {"kind": "categorical", "buckets": 64},
    "price": "numeric",
}


def config(**said: Any) -> Config:
    shape: dict[str, Any] = {
        "name": "crew",
        "events": {"url": "memory://crew/events", "time": "time", "label": "label", "key": "user"},
        "features": FEATURES,
        "model": {"kind": "deepfm", "embedding_dim": 3, "hidden": [6, 4]},
    }
    return Config.parse({**shape, **said}, "crew")


class Member:
    """One rank, and what it has learned in the round."""

    def __init__(self, config: Config, rank: int, world: int) -> None:
        self.featurizer, self.learner = Featurizer(config), Learner(config)
        self.past = past_of(config, self.featurizer)
        self.merge = merge_of(config, self.learner, Ranks(rank, world), self.past)
        self.time = 0.0
        self.seen: dict[str, list[str]] = {}  # a user's last items
        self.examples = 0

    def learn(self, *clicks: Click) -> None:
        for user, item, label in clicks:
            self.time += 1.0
            near = self.seen.get(user, [])
            payload = {"user": user, "item": item, "price": len(user + item) * 0.5 + self.time % 3.0, "near": near}
            self.seen[user] = [item, *near][:2]
            features = self.featurizer.encode(payload)
            if self.past:
                features = self.past.complete(features, self.time)
                self.past.saw(features, self.time, user)
            scores = self.learner.predict(features)
            ticket = Ticket("e", self.time, features, scores, Origin(EVENTS, 0, 0), "", user)
            outcome = Outcome(ticket, float(label), Fate.INLINE, 0.0)
            if self.past:
                self.past.heard(outcome)
            self.examples += self.learner.learn(outcome)

    def common(self) -> State:
        """What ranks that have just met have in common."""
        engine, kept = self.learner.engine, self.past.state_dict() if self.past else {}
        if "mine" in kept.get("kept", {}):
            del kept["kept"]["mine"]  # by the shard key
        slots = {str(i): slot for i, slot in enumerate((*engine.row_slots, *engine.dense.slots))}
        tables = engine.tables
        books = {} if tables is None else {n: getattr(tables.of, n) for n in ("keys", "count", "last_seen", "older")}
        rules = {kind: rule.state_dict() for kind, rule in self.learner.rules.items()}
        return {**served(self.learner), "slots": slots, "books": books, "rules": rules, "past": kept}


def crew(config: Config, world: int) -> list[Member]:
    return [Member(config, rank, world) for rank in range(world)]


def meet(members: Sequence[Member]) -> list[Met]:
    said = [member.merge.say(member.examples) for member in members]
    for member in members:
        member.examples = 0
    return [member.merge.hear(said) for member in members]


def alike(members: Sequence[Member]) -> bool:
    return len({digest(member.common()) for member in members}) == 1
