"""What `bench continual` compares: recipes, each a piece of configuration, and which of them on which stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamcl import plugin

Recipe = Mapping[str, Any]

BALANCED: Recipe = {"replay": {"retention": "class_balanced"}}
RESERVOIR: Recipe = {"replay": {"retention": "reservoir"}}
RECENCY: Recipe = {"replay": {"retention": "recency"}}

EMA: Recipe = {"kind": "ema", "decay": 0.995}


def served(*sets: str) -> list[Recipe]:
    """An average of the weights beside the live ones, and which of the two answers: the one of lower recent loss."""
    return [EMA, {"kind": "served", "sets": list(sets)}]


RECIPES: dict[str, Recipe] = {
    "no memory": {},
    "reservoir": RESERVOIR,
    "balanced": BALANCED,
    "recency": RECENCY,
    "recency 300": {"replay": {"retention": "recency", "capacity": 300}},
    "balanced, rows weigh alike": {
        "replay": {"retention": "class_balanced", "weight": 10.0},
        "optimizer": {"learning_rate": 0.05 / 11},
    },
    "balanced + ema served": {**BALANCED, "plugins": served("ema")},
    "balanced + ema or live served": {**BALANCED, "plugins": served("live", "ema")},
    "reservoir + ema served": {**RESERVOIR, "plugins": served("ema")},
    "recency + ema or live served": {**RECENCY, "plugins": served("live", "ema")},
    "recency + ema or live served + error memory": {
        **RECENCY,
        "plugins": served("live", "ema"),
        "error_memory": [{"kind": "knn"}],
    },
    "balanced + cbp": {**BALANCED, "plasticity": [{"kind": "continual_backprop"}]},
    "recency + cbp": {**RECENCY, "plasticity": [{"kind": "continual_backprop"}]},
    "recency + error memory": {**RECENCY, "error_memory": [{"kind": "knn"}]},
    "recency + user error memory": {**RECENCY, "error_memory": [{"kind": "key", "key": "user"}]},
    "recency + item error memory": {**RECENCY, "error_memory": [{"kind": "key", "key": "item"}]},
    "reservoir + error memory": {**RESERVOIR, "error_memory": [{"kind": "knn"}]},
    "balanced, by loss": {**BALANCED, "plugins": ["by_loss"]},
    "balanced, by flips": {**BALANCED, "plugins": ["flips", "by_flips"]},
    "recency, by loss": {**RECENCY, "plugins": ["by_loss"]},
    "forgetting curve": {"replay": {"retention": "plugin"}, "plugins": ["forgetting_curve"]},
    "recency, reloop loss": {**RECENCY, "loss": {"kind": "reloop"}},
}
"""By name. `replay` without capacity and per_event takes the stream's; the configuration has no other default here."""


TOLD = ", told"
"""Ends the name of a recipe whose method hears of each new task, from the segment that an event names."""


def recipes() -> dict[str, Recipe]:
    """The table's, and each preset of the product: by its name if it replays, else on top of each retention too."""
    found = dict(RECIPES)
    for name, preset in plugin.presets().items():
        on_top = {} if "replay" in preset else {f"{base} + {name}": RECIPES[base] for base in RETENTIONS}
        for each, base in {name: {}, **on_top}.items():
            found[each] = {**base, **preset}
            found[each + TOLD] = {**base, **preset, "boundaries": [{"kind": "segment"}]}
    return found


RETENTIONS = ("reservoir", "balanced", "recency")

GRADIENTS = ("ewc", "agem", "gem", "der", "er_ace", "mer", "tag", "cuber", "l2_anchor")


@dataclass(frozen=True, slots=True)
class Field:
    """Who takes part on a stream, by name: recipes, of which --quick runs some, and anchors and peers beside them.

    `compared`: the figures that are told apart from the control's; `shown`: what the plot shows.
    """

    control: str
    recipes: tuple[str, ...]
    quick: tuple[str, ...]
    anchors: tuple[str, ...] = ()
    quick_anchors: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()  # who needs a Python of their own, and takes part where that is
    presets: tuple[str, ...] | None = ()  # of the product's, as far as it has them; None: all
    compared: tuple[str, ...] = ("final", "min_acc")
    shown: str = "accuracy (%) on what was seen"
    seeds: int = 5

    def names(self, quick: bool) -> tuple[str, ...]:
        """The control first, each once."""
        presets = () if quick else self.of_presets()
        return tuple(dict.fromkeys((self.control, *(self.quick if quick else self.recipes), *presets)))

    def of_presets(self) -> list[str]:
        """Told of new tasks; those that do not replay on top of the control, and by themselves."""
        chosen = {n: of for n, of in plugin.presets().items() if self.presets is None or n in self.presets}
        by_itself = [name + TOLD for name in chosen]
        return by_itself + [f"{self.control} + {name}{TOLD}" for name, of in chosen.items() if "replay" not in of]

    def others(self, quick: bool) -> tuple[str, ...]:
        return self.quick_anchors if quick else self.anchors


PLAIN = ("plain torch er", "plain torch er, batch 10", "plain torch er-ace, batch 10")

FIELDS: dict[str, Field] = {
    "split-digits": Field(
        control="balanced",
        recipes=(
            "no memory",
            "reservoir",
            "balanced, rows weigh alike",
            "balanced + ema served",
            "balanced + ema or live served",
            "balanced + cbp",
        ),
        quick=("no memory", "reservoir", "balanced + ema served"),
        anchors=PLAIN,
        quick_anchors=PLAIN[:1],
        peers=("avalanche er", "avalanche er, batch 10"),
        presets=None,
        seeds=10,
    ),
    "split-mnist": Field(
        control="reservoir",
        recipes=("no memory", "balanced", "reservoir + ema served"),
        quick=(),
        anchors=PLAIN,
        peers=("avalanche er, batch 10",),
        seeds=3,
    ),
    "permuted-mnist": Field(
        control="reservoir",
        recipes=("no memory", "reservoir + ema served"),
        quick=(),
        anchors=("plain torch er", "plain torch er, batch 10", "plain torch gem, batch 10"),
        presets=GRADIENTS,
        compared=("acc", "bwt"),
    ),
    "recommender": Field(
        control="recency",
        recipes=(
            "no memory",
            "reservoir",
            "recency 300",
            "recency + cbp",
            "recency + ema or live served",
            "recency + ema or live served + error memory",
            "recency + error memory",
            "recency + user error memory",
            "recency + item error memory",
            "reservoir + error memory",
            "recency, reloop loss",
        ),
        quick=("no memory", "reservoir"),
        anchors=("constant", "item click rate"),
        quick_anchors=("constant", "item click rate"),
        compared=("regret", "regret_after_drift"),
        shown="regret (nats)",
    ),
    "recurring-sea": Field(
        control="reservoir",
        recipes=("no memory", "recency", "recency + ema or live served", "recency + error memory"),
        quick=("recency",),
        anchors=("river adaptive tree",),
        compared=("accuracy", "accuracy_after_drift"),
        shown="accuracy (%)",
    ),
    "recurring-agrawal": Field(
        control="reservoir",
        recipes=("no memory", "recency", "recency + ema or live served", "recency + error memory"),
        quick=(),
        anchors=("river adaptive tree",),
        compared=("accuracy", "accuracy_after_drift"),
        shown="accuracy (%)",
    ),
    "elec2": Field(
        control="recency",
        recipes=("no memory", "reservoir", "recency + ema or live served", "recency + error memory", "recency + cbp"),
        quick=("no memory",),
        anchors=("no-change", "river adaptive tree", "river adaptive forest"),
        quick_anchors=("no-change",),
        compared=("accuracy",),
        shown="accuracy (%)",
        seeds=3,
    ),
}


@dataclass(frozen=True, slots=True)
class Promise:
    """A bar: the mean figure of a recipe on a stream, or how far it lies above `minus`'s, paired over seeds."""

    stream: str
    recipe: str
    figure: str
    limit: float
    quick_limit: float
    minus: str | None = None

    def __str__(self) -> str:
        return f"{self.stream}: {self.figure} of {self.recipe}" + (f" - {self.minus}" if self.minus else "")


PROMISES = (
    Promise("split-digits", "reservoir", "final", 82.0, 75.0),
    Promise("split-digits", "balanced + ema served", "min_acc", 25.0, 15.0, minus="balanced"),
    Promise("split-digits", "balanced + ema served", "final", 0.0, -2.0, minus="balanced"),
    Promise("split-mnist", "reservoir", "final", 92.0, 75.0),
    Promise("permuted-mnist", "reservoir", "acc", 82.0, 40.0),
    Promise("permuted-mnist", "plain torch gem, batch 10", "acc", 82.0, 40.0),
)
