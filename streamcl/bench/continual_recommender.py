"""A recommender that drifts: users whose taste switches, and at times switches back; items whose trend changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.continual_course import Course, Rows
from streamcl.bench.quality import Floats

USERS, ITEMS = 50, 60
LATENT = 3
EVENTS, DRIFT_EVERY, DELAY = 16_000, 2000, 50
TREND, TASTE, BIAS = 1.2, 1.6, -0.6
"""Deviations over items, and over pairs of user and item, of their parts of the logit; its mean."""
ITEM_SHARE, USER_SHARE, BACK = 0.20, 0.25, 0.5
"""At a drift: items with a new trend, users with another taste, and how many of those turn to the one before."""


@dataclass(frozen=True, slots=True)
class World:
    """What is true between two drifts: trends (I,), tastes (U, L) and those before (U, L)."""

    trends: Floats
    tastes: Floats
    before: Floats

    @classmethod
    def first(cls, rng: np.random.Generator) -> World:
        return cls(rng.normal(0, TREND, ITEMS), _tastes(rng, USERS), _tastes(rng, USERS))

    def drifted(self, rng: np.random.Generator) -> World:
        items = rng.choice(ITEMS, round(ITEM_SHARE * ITEMS), replace=False)
        users = rng.choice(USERS, round(USER_SHARE * USERS), replace=False)
        trends, tastes, before = self.trends.copy(), self.tastes.copy(), self.before.copy()
        trends[items] = rng.normal(0, TREND, len(items))
        back = rng.random(len(users)) < BACK
        tastes[users] = np.where(back[:, None], self.before[users], _tastes(rng, len(users)))
        before[users] = self.tastes[users]
        return World(trends, tastes, before)


def _tastes(rng: np.random.Generator, count: int) -> Floats:
    return rng.normal(0, 1, (count, LATENT))


def recommender(folder: Path | None, seed: int, quick: bool) -> Course:  # noqa: ARG001 - the streams' one signature
    """Impressions of a user and an item, both at random; label: clicked or not, known `DELAY` impressions later.

    Logit = bias + trend of the item + taste of the user x properties of the item. Everybody's first taste has another
    "before" it, so that there is something to turn back to at the first drift.
    """
    rng = np.random.default_rng([seed, *b"recommender"])
    events = 3 * DRIFT_EVERY if quick else EVENTS
    properties = rng.normal(0, TASTE / np.sqrt(LATENT), (ITEMS, LATENT))
    users, items = rng.integers(0, USERS, events), rng.integers(0, ITEMS, events)
    world, logit = World.first(rng), np.empty(events)
    for begin in range(0, events, DRIFT_EVERY):
        world = world.drifted(rng) if begin else world
        part = slice(begin, begin + DRIFT_EVERY)
        logit[part] = _logits(world, properties, users[part], items[part])
    chances = 1 / (1 + np.exp(-logit))
    return Course(
        name="recommender",
        settings={
            "task": "binary",
            "features": {
                "item": {"kind": "categorical", "buckets": ITEMS},
                "user": {"kind": "categorical", "buckets": USERS},
            },
            "model": {"kind": "deepfm", "embedding_dim": 8, "hidden": [32], "init_scale": 0.1},
            "optimizer": {"kind": "adam", "learning_rate": 2e-3},
        },
        memory={"capacity": 1000, "per_event": 16},
        rows=Rows.of((rng.random(events) < chances).astype(np.float64), categories=np.stack([items, users], axis=1)),
        segments=np.arange(events) // DRIFT_EVERY,
        delay=DELAY,
        chances=chances,
        drifts=tuple(range(DRIFT_EVERY, events, DRIFT_EVERY)),
        start=DRIFT_EVERY,
    )


def _logits(world: World, properties: Floats, users: NDArray[np.int64], items: NDArray[np.int64]) -> Floats:
    tastes = (world.tastes[users] * properties[items]).sum(axis=1)
    return np.asarray(BIAS + world.trends[items] + tastes, np.float64)
