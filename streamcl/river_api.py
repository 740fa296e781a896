"""streamcl's learner as River estimators: dicts in, one example at a time, anywhere in a River pipeline.

River's dicts are open-ended, a learner's inputs are not. Names are bound to inputs in the order of their first sight in
`learn_one` (those of one dict: sorted), as part of the state; what finds no room is hashed, so memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from river import base

from streamcl import plugin
from streamcl.boundaries import Boundaries
from streamcl.config import Config, ConfigError
from streamcl.features import FLOAT32_MAX, Featurizer
from streamcl.learner import Learner
from streamcl.protocols import State
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.state import flatten, unflatten
from streamcl.stations import Task

X = Mapping[Any, Any]

REST = "rest"  # the bag's name in the config; a dict's own names never stand there
WEIGHT_MAX = 10.0  # of a hashed number, as `RunningNorm` clips: one wild number can't blow up a gradient
BOUND = "number_at", "category_at"
COUNTED = "count", "squares", "left_out"
SERVED = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)  # only plug-ins may ask what was served


class DictLearner:
    """A `Learner` that reads dicts of any names and values.

    A number has a standardised input of its own, while there are any; a missing one reads as the mean. A string or bool
    is a category of a field of its own, hashed; a missing one is a category too. The names that come too late for an
    input share the rows of a bag: a number as `name`, weighted by its ratio to its root mean square so far; a category
    as `name=value`, weighted 1. There what is missing is zero. None and NaN are missing. Any other kind of value is a
    category by its `repr`, which must be the same in every process. A name may be a number now and a category later.

    A pickle or a deep copy holds config and state, and goes on to the bit.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.learner = Learner(config)
        self.boundaries = Boundaries(config)
        featurizer = Featurizer(config)
        self._layout = featurizer.layout
        self._fields = featurizer.categoricals  # in slots 0 to C - 1: their names come before the bag's
        [self._rest] = featurizer.bags
        self.number_at: dict[Hashable, int] = {}
        self.category_at: dict[Hashable, int] = {}
        self.count = np.zeros(self._rest.buckets)  # of numbers by row of the bag
        self.squares = np.zeros(self._rest.buckets)  # their sum
        self.left_out = 0  # examples that could not be learned from; see `Learner`

    def predict(self, x: X) -> Scores:
        return self.learner.predict(self._encode(*_sorted_out(x)))

    def learn(self, x: X, label: float) -> None:
        numbers, categories = _sorted_out(x)
        _bind(self.number_at, numbers, len(self._layout.numerics))
        _bind(self.category_at, categories, len(self._fields))
        for name in numbers.keys() - self.number_at.keys():
            self.count[self._bucket(name)] += 1.0
            self.squares[self._bucket(name)] += numbers[name] ** 2
        encoded = self._encode(numbers, categories)
        asked = self.learner.plugins or self.boundaries.sources
        scores = self.learner.predict(encoded) if asked else SERVED
        number = self.learner.version + self.left_out
        outcome = Outcome(
            Ticket("", float(number), encoded, scores, Origin(EVENTS, 0, number)), label, Fate.INLINE, 0.0
        )
        signals = self.boundaries.update(outcome) if abs(label) <= FLOAT32_MAX else ()
        self.left_out += not self.learner.learn(outcome, signals)

    def _encode(self, numbers: Mapping[Hashable, float], categories: Mapping[Hashable, str]) -> Encoded:
        ids = self._layout.slot_base.copy()
        weights = np.zeros(len(ids), np.float32)
        weights[: len(self._fields)] = 1.0
        dense = np.full(len(self._layout.numerics), np.nan, np.float32)
        rest: dict[int, float] = {}
        for name, value in numbers.items():
            if name in self.number_at:
                dense[self.number_at[name]] = value
            else:
                row = self._rest.base + 1 + self._bucket(name)
                rest[row] = rest.get(row, 0.0) + self._scaled(value, self._bucket(name))
        for name, text in categories.items():
            if name in self.category_at:
                field = self._fields[self.category_at[name]]
                ids[field.slot] = field.row(text)
            else:
                row = self._rest.row(f"{_text(name)}={text}")
                rest[row] = rest.get(row, 0.0) + 1.0
        for slot, (row, weight) in enumerate(sorted(rest.items())[: self._rest.slots], self._rest.slot):
            ids[slot], weights[slot] = row, weight
        return Encoded(ids, weights, dense)

    def _bucket(self, name: Hashable) -> int:
        return self._rest.row(_text(name)) - self._rest.base - 1

    def _scaled(self, value: float, bucket: int) -> float:
        """0 for a number that was never seen."""
        if not self.squares[bucket]:
            return 0.0
        ratio = value / math.sqrt(self.squares[bucket] / self.count[bucket])
        return min(max(ratio, -WEIGHT_MAX), WEIGHT_MAX)

    def __getstate__(self) -> State:
        rest, arrays = flatten(self.learner.state_dict())
        return {
            "config": self.config.model_dump(mode="json"),
            "learner": (rest, {path: tensor.numpy().copy() for path, tensor in arrays.items()}),
            "boundaries": self.boundaries.state_dict(),
            **{name: list(getattr(self, name)) for name in BOUND},
            **{name: getattr(self, name) for name in COUNTED},
        }

    def __setstate__(self, state: State) -> None:
        self.__init__(Config.parse(state["config"]))  # type: ignore[misc]
        rest, arrays = state["learner"]
        self.learner.load_state_dict(unflatten(rest, {path: torch.from_numpy(a) for path, a in arrays.items()}))
        self.boundaries.load_state_dict(state.get("boundaries", {}))
        for name in BOUND:
            setattr(self, name, {bound: slot for slot, bound in enumerate(state[name])})
        for name in COUNTED:
            setattr(self, name, state[name])


def _sorted_out(x: X) -> tuple[dict[Hashable, float], dict[Hashable, str]]:
    """The numbers, clipped to what a float32 holds, and the categories' texts; without what is missing."""
    numbers: dict[Hashable, float] = {}
    categories: dict[Hashable, str] = {}
    for name, value in x.items():
        if isinstance(value, Real | Decimal) and not isinstance(value, bool):
            if value == value:  # NaN is missing
                numbers[name] = float(min(max(value, -FLOAT32_MAX), FLOAT32_MAX))
        elif value is not None:
            categories[name] = _text(value)
    return numbers, categories


def _text(value: Hashable) -> str:
    if isinstance(value, str):
        return value
    return repr(value.item() if isinstance(value, np.generic) else value)


def _bind(bound: dict[Hashable, int], names: Iterable[Hashable], room: int) -> None:
    """Give new names the next free inputs, whatever order they stand in."""
    if len(bound) < room:
        for name in sorted((name for name in names if name not in bound), key=repr)[: room - len(bound)]:
            bound[name] = len(bound)


EMPTY = {
    "hidden": "model='logistic' has no hidden layer",
    "plasticity": "None stands for no rule",
    "plugins": "None stands for no method",
    "boundaries": "None stands for no signals",
}


@dataclass(kw_only=True, eq=False, repr=False)
class _Settings(base.Estimator):
    """What a user chooses, and what both estimators promise.

    Args:
        model: mlp, deepfm or logistic.
        hidden: Units per hidden layer. For none take `model="logistic"`.
        embedding_dim: Numbers per category.
        optimizer: sgd, adagrad, adam or ftrl.
        learning_rate: Step size; categories take twice as much.
        replay_capacity: Examples kept for replay, by reservoir sampling (count).
        replay_per_event: How many of them are learned from again beside each new one; 0: no replay.
        plasticity: Rules that keep a net able to learn, by kind or as tables: `("continual_backprop",)`.
        plugins: Methods of continual learning, likewise: `streamcl.plugin` says what they can do.
        boundaries: Who sends them signals, likewise: clock, detector, surprise, new_class. Without any, a method that
            waits for a boundary goes on waiting. An example is a second of a clock's time; there are no segments.
        numbers: Inputs for numbers (count). With 0 all are hashed, and a missing one is zero instead of the mean: the
            choice for bags of words.
        categories: Fields for strings and bools (count).
        buckets: Rows of each field, and of the bag of names without an input (count).
        rest: Most rows of that bag that an example can touch (count).
        seed: Of everything random.

    Raises:
        ConfigError: a setting that can't be; the text names it as `streamcl schema` does.
        ValueError: an empty tuple, which River's `clone` can't copy.

    Numbers are standardised here: a scaler in front does no harm and is not needed. An example whose label or gradient
    is not finite or too large is left out, and counted in `learner.left_out`. Torch is set to one thread, in the whole
    process: with two a single example takes ten times as long.
    """

    model: str = "mlp"
    hidden: tuple[int, ...] = (64, 32)
    embedding_dim: int = 8
    optimizer: str = "adagrad"
    learning_rate: float = 0.05
    replay_capacity: int = 1000
    replay_per_event: int = 4
    plasticity: tuple[Any, ...] | None = None
    plugins: tuple[Any, ...] | None = None
    boundaries: tuple[Any, ...] | None = None
    numbers: int = 64
    categories: int = 16
    buckets: int = 1024
    rest: int = 64
    seed: int = 0

    def _build(self, task: Task, classes: int = 2) -> DictLearner:
        for name in EMPTY:
            if getattr(self, name) == ():
                raise ValueError(f"{name}: an empty tuple can't be cloned by River; {EMPTY[name]}")
        sources = [each if isinstance(each, str) else each.get("kind") for each in self.boundaries or ()]
        if "segment" in sources:
            raise ConfigError("boundaries: segment: an example of River's names none; take clock, detector or surprise")
        features: dict[str, Any] = {f"n{i:05}": "numeric" for i in range(self.numbers)}
        features |= {f"c{i:05}": {"kind": "categorical", "buckets": self.buckets} for i in range(self.categories)}
        features[REST] = {"kind": "bag", "buckets": self.buckets, "max_items": self.rest, "pooling": "sum"}
        kinds = [each if isinstance(each, str) else each["kind"] for each in self.plugins or ()]
        keeps = any(issubclass(plugin.resolve(kind), plugin.Retention) for kind in kinds)
        retention = "plugin" if keeps else "reservoir"
        replay = {"retention": retention, "capacity": self.replay_capacity, "per_event": self.replay_per_event}
        config = {
            "name": "river",
            "task": task,
            "seed": self.seed,
            "events": {"url": "memory://river/events", "label": "label"},  # never opened
            "features": features,
            "model": {
                "kind": self.model,
                "hidden": self.hidden,
                "embedding_dim": self.embedding_dim,
                "classes": classes,
            },
            "optimizer": {"kind": self.optimizer, "learning_rate": self.learning_rate},
            "replay": replay if self.replay_per_event or keeps else {},
            "plasticity": self.plasticity or (),
            "plugins": self.plugins or (),
            "boundaries": self.boundaries or (),
            "diagnostics": {"sample_every_steps": 0},  # nobody would read them
        }
        return DictLearner(Config.parse(config, type(self).__name__))


@dataclass(kw_only=True, eq=False, repr=False)
class StreamRegressor(_Settings, base.Regressor):
    """streamcl's learner as a River regressor: a small net with replay that learns one example at a time.

    `StreamRegressor(model="mlp", hidden=(64, 32), learning_rate=0.05, seed=0)`; all settings stand at `_Settings`. It
    reads dicts of any names and values; see `DictLearner`. The label is standardised while learning.
    """

    def __post_init__(self) -> None:
        self.learner = self._build("regression")

    def learn_one(self, x: X, y: float) -> None:
        self.learner.learn(x, float(y))

    def predict_one(self, x: X) -> float:
        """0 before the first example."""
        return float(self.learner.predict(x).served[0])


@dataclass(kw_only=True, eq=False, repr=False)
class StreamClassifier(_Settings, base.Classifier):
    """streamcl's learner as a River classifier: a small net with replay that learns one example at a time.

    `StreamClassifier(model="mlp", hidden=(64, 32), learning_rate=0.05, seed=0)`; the other settings stand at
    `_Settings`. It reads dicts of any names and values; see `DictLearner`.

    Args:
        multiclass: Labels are anything hashable, and a new class may come at any time. False: they are bools, with one
            output instead of one for each class; False and True have a probability from the start.
        max_classes: Room for classes (count). Their outputs are there from the start, and probabilities are shared
            among those seen.

    Raises:
        ValueError: in `learn_one`, for one class more than there is room for, or a label that is no bool.
    """

    multiclass: bool = True
    max_classes: int = 32

    def __post_init__(self) -> None:
        self.classes: dict[Hashable, int] = {}  # by label, in the order of their first sight
        self.learner = self._build("multiclass", self.max_classes) if self.multiclass else self._build("binary")

    @property
    def _multiclass(self) -> bool:
        return self.multiclass

    def learn_one(self, x: X, y: Hashable) -> None:
        if self.multiclass:
            self.learner.learn(x, float(self._index(y)))
        elif y in (False, True):
            self.learner.learn(x, float(y))
        else:
            raise ValueError("label: must be a bool; set multiclass=True for other labels")

    def _index(self, label: Hashable) -> int:
        if label not in self.classes:
            if len(self.classes) == self.max_classes:
                raise ValueError(f"label: more than {self.max_classes} classes; raise max_classes")
            self.classes[label] = len(self.classes)
        return self.classes[label]

    def predict_proba_one(self, x: X, **_kwargs: Any) -> dict[Any, float]:
        """By label, of those seen; empty before the first."""
        scores = self.learner.predict(x)
        if not self.multiclass:
            p = float(scores.served[0])
            return {False: 1.0 - p, True: p}
        logits = scores.output[: len(self.classes)].astype(np.float64)
        powers = np.exp(logits - logits.max(initial=-math.inf))
        return dict(zip(self.classes, (powers / powers.sum()).tolist(), strict=True))
