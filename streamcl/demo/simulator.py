"""Recommender traffic whose truth is known: who clicks on what, how that drifts, and the best loss anyone can reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from streamcl.records import EVENTS, LABELS, Message

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

START_S = 1_767_600_000.0  # 2026-01-05 08:00 UTC, a Monday; event time has nothing to do with the clock on the wall
DEVICES = ("phone", "tablet", "desktop")
PLACEMENTS = ("home", "search", "product", "mail")
ERAS = 3
RANK = 3
TAGS_PER_ITEM = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How large the world is and how it behaves. Times are event time, in seconds.

    The window must be short beside the stream, and no feature may tell the time: a click is learned when it comes, a
    non-click when its window closes, so whatever is new (the model itself, or a new hour's row) has for one window
    only clicks to learn from and predicts far too many.

    Attributes:
        ctr: Mean probability of a click over the whole stream; the intercept is solved for it.
        drift_at: Where the abrupt drifts lie, as shares of the impressions. Between them tastes turn slowly.
        spacing_s: Mean time between impressions, 2.88 for 30,000 a day. Not a duration, so that a short stream is as
            dense as a long one: between topics, order is only as good as the records that are on their way.
        click_delay_s: Mean of the exponential time from an impression to its click.
        window_s: A click later than this after its impression does not count as its label.
    """

    events: int = 30_000
    seed: int = 0
    users: int = 150
    items: int = 200
    categories: int = 12
    tags: int = 24
    ctr: float = 0.18
    spacing_s: float = 2.88
    drift_at: tuple[float, float] = (0.45, 0.75)
    slow_turn_rad: float = 0.5
    click_delay_s: float = 90.0
    window_s: float = 600.0

    @property
    def duration_s(self) -> float:
        return self.events * self.spacing_s


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """The first impression under a new truth."""

    impression: int
    time_s: float
    name: str


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What users and items are like. Era e is the truth between abrupt drift e - 1 and abrupt drift e."""

    category: Ints  # (I,)
    tags: Ints  # (I, TAGS_PER_ITEM)
    price: Floats  # (I,) currency units
    style: Floats  # (I, RANK)
    appeal: Floats  # (ERAS, I) how good an item is, to everyone
    tag_appeal: Floats  # (ERAS, T)
    activity: Floats  # (U,) how readily a user clicks
    taste: Floats  # (2, U, RANK) the plane in which a user's taste turns slowly
    taste_sign: Floats  # (ERAS,) -1 where users like the opposite of before
    by_device: Floats  # (devices, categories)
    by_placement: Floats  # (placements, categories)


def draw_catalogue(settings: Settings) -> Catalogue:
    rng = np.random.default_rng([settings.seed, 1])
    items, users, categories = settings.items, settings.users, settings.categories
    category = rng.integers(categories, size=items)
    appeal = rng.normal(size=(ERAS, items))
    appeal[2] = np.where(rng.random(items) < 0.3, appeal[1], appeal[2])  # the second drift spares three items in ten
    return Catalogue(
        category=category,
        tags=np.argsort(rng.random((items, settings.tags)), axis=1)[:, :TAGS_PER_ITEM],
        price=np.exp(rng.normal(3.0, 0.7, size=items)),
        style=0.8 * rng.normal(size=(categories, RANK))[category] + 0.4 * rng.normal(size=(items, RANK)),
        appeal=appeal,
        tag_appeal=rng.normal(size=(ERAS, settings.tags)),
        activity=rng.normal(size=users),
        taste=rng.normal(size=(2, users, RANK)),
        taste_sign=np.array([1.0, 1.0, -1.0]),
        by_device=rng.normal(size=(len(DEVICES), categories)),
        by_placement=rng.normal(size=(len(PLACEMENTS), categories)),
    )


@dataclass(frozen=True, slots=True)
class Simulation:
    """One drawn stream of N impressions, and on the side what only an oracle knows.

    Attributes:
        probability: (N,) of a click, ever. Never in a payload.
        bayes: (N,) of the label 1, that is of a click within the window: `probability x (1 - exp(-window / delay))`.
            Predicting it gives the lowest log-loss that can be expected.
        clicked, label: (N,) bool; a label is a click within the window.
        delay_s: (N,) from impression to click; meaningless where nobody clicked.
    """

    settings: Settings
    catalogue: Catalogue
    drift_points: tuple[DriftPoint, ...]
    time_s: Floats
    user: Ints
    item: Ints
    device: Ints
    placement: Ints
    price: Floats
    probability: Floats
    bayes: Floats
    clicked: NDArray[np.bool_]
    label: NDArray[np.bool_]
    delay_s: Floats
    index: dict[str, int] = field(repr=False)

    def id(self, impression: int) -> str:
        return f"imp-{impression:07d}"

    def bayes_of(self, event_id: str) -> float:
        """What a perfect model would have said about an event. Raises KeyError for an id that is not of this stream."""
        return float(self.bayes[self.index[event_id]])

    def impression(self, i: int) -> dict[str, Any]:
        """The payload of impression i: what was known when it was shown."""
        item = int(self.item[i])
        return {
            "id": self.id(i),
            "time": round(float(self.time_s[i]), 3),
            "user": f"u{self.user[i]}",
            "item": f"i{item}",
            "category": f"c{self.catalogue.category[item]}",
            "device": DEVICES[self.device[i]],
            "placement": PLACEMENTS[self.placement[i]],
            "price": round(float(self.price[i]), 2),
            "tags": [f"t{tag}" for tag in self.catalogue.tags[item]],
        }

    def click(self, i: int) -> dict[str, Any]:
        return {"id": self.id(i), "time": round(float(self.time_s[i] + self.delay_s[i]), 3)}

    def _clicks(self) -> Ints:
        """Impressions whose click comes before the stream ends."""
        return np.flatnonzero(self.clicked & (self.time_s + self.delay_s <= self.time_s[-1]))

    @property
    def records(self) -> int:
        """How many messages `traffic` yields."""
        return len(self.time_s) + len(self._clicks())

    def traffic(self) -> Iterator[tuple[str, Message]]:
        """(input, message) of every impression and of every click up to the last impression, in event-time order."""
        clicks = self._clicks()
        times = np.concatenate([self.time_s, self.time_s[clicks] + self.delay_s[clicks]])
        who = np.concatenate([np.arange(len(self.time_s)), clicks])
        for at in np.argsort(times, kind="stable"):
            is_click = at >= len(self.time_s)
            i = int(who[at])
            payload = self.click(i) if is_click else self.impression(i)
            key = f"u{self.user[i]}".encode()  # one key for both: an impression and its click share a partition index
            yield LABELS if is_click else EVENTS, Message(orjson.dumps(payload), key, time_s=payload["time"])


def simulate(settings: Settings) -> Simulation:
    """Draw the stream. The same settings give the same stream.

    Items are shown at random (popular ones more often), not by a recommender, so that the oracle stays simple.

    Raises:
        ValueError: fewer than 10 impressions.
    """
    if settings.events < 10:
        raise ValueError(
            f"events: {settings.events} is too few for a stream with {ERAS - 1} drift points; give 10 or more"
        )
    n, rng = settings.events, np.random.default_rng([settings.seed, 2])
    catalogue = draw_catalogue(settings)
    time_s = START_S + np.sort(rng.random(n)) * settings.duration_s  # a Poisson process, given its count
    user, item = _zipf(rng, settings.users, n), _zipf(rng, settings.items, n)
    device = rng.choice(len(DEVICES), size=n, p=(0.6, 0.1, 0.3))
    placement = rng.integers(len(PLACEMENTS), size=n)
    price = catalogue.price[item] * np.exp(rng.normal(0.0, 0.1, size=n))
    starts = np.array([round(share * n) for share in settings.drift_at])
    era = np.searchsorted(starts, np.arange(n), side="right")
    logit = _logit(settings, catalogue, time_s, era, user, item, price)
    logit += 0.3 * catalogue.by_device[device, catalogue.category[item]]
    logit += 0.3 * catalogue.by_placement[placement, catalogue.category[item]]
    probability = _sigmoid(logit + _intercept(logit, settings.ctr))
    clicked = rng.random(n) < probability
    delay_s = rng.exponential(settings.click_delay_s, size=n)
    names = ("what is popular changes", "tastes turn into their opposite")
    return Simulation(
        settings=settings,
        catalogue=catalogue,
        drift_points=tuple(DriftPoint(int(s), float(time_s[s]), name) for s, name in zip(starts, names, strict=True)),
        time_s=time_s,
        user=user,
        item=item,
        device=device,
        placement=placement,
        price=price,
        probability=probability,
        bayes=probability * -np.expm1(-settings.window_s / settings.click_delay_s),
        clicked=clicked,
        label=clicked & (delay_s <= settings.window_s),
        delay_s=delay_s,
        index={f"imp-{i:07d}": i for i in range(n)},
    )


def _zipf(rng: np.random.Generator, kinds: int, n: int) -> Ints:
    """`n` draws where kind k has weight (k + 5)^-0.6: a few are frequent, none is so rare that it can't be learned."""
    weight = (np.arange(kinds) + 5.0) ** -0.6
    return rng.choice(kinds, size=n, p=weight / weight.sum())


def _logit(
    settings: Settings, world: Catalogue, time_s: Floats, era: Ints, user: Ints, item: Ints, price: Floats
) -> Floats:
    """The true log-odds (N,) of user, item and price, up to the intercept."""
    angle = settings.slow_turn_rad * (time_s - START_S) / settings.duration_s  # (N,)
    taste = np.cos(angle)[:, None] * world.taste[0, user] + np.sin(angle)[:, None] * world.taste[1, user]  # (N, RANK)
    match = world.taste_sign[era] * (taste * world.style[item]).sum(axis=1) / np.sqrt(RANK)
    tags = world.tag_appeal[era[:, None], world.tags[item]].mean(axis=1)
    return np.asarray(
        1.4 * world.appeal[era, item]
        + 0.8 * tags
        + 0.8 * world.activity[user]
        + 0.9 * match
        - 0.3 * (np.log(price) - 3.0) / 0.7
    )


def _intercept(logit: Floats, ctr: float) -> float:
    """The number that makes mean(sigmoid(logit + it)) equal `ctr`, by bisection: the mean grows with it."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _sigmoid(logit + middle).mean() > ctr else (middle, high)
    return (low + high) / 2


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
