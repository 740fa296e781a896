"""A River model in the learner's place: the same journey, joiner, metrics and recovery around somebody else's model."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamcl.config import Config, ConfigError
from streamcl.features import FLOAT32_MAX, Featurizer
from streamcl.protocols import State
from streamcl.records import Encoded, Event, Outcome, Scores, Selector, Signal
from streamcl.stations import Categorical, Task

LABELS: dict[Task, Any] = {"binary": bool, "multiclass": int, "regression": float}


class RiverLearner:
    """Feeds a River classifier, regressor or pipeline one outcome at a time.

    `river = "module:name"` names a class (built without arguments), a function that builds a model, or an estimator or
    pipeline (copied, with what it has learned). The model sees a dict: the numerics by name, as they came; a bag's
    items as `field=row` with their weights; a category as `field=row` with weight 1, which suits linear models, or with
    `river_categories = "strings"` as `field` with the row as text, which suits trees and pipelines with an encoder: a
    tree splits on the field at once, instead of on each category. The row stands for the category, for a ticket holds
    no more: two categories in one bucket are one. A missing number is left out, and so is a missing category that would
    be a string; as `field=row` it has a row of its own.

    Every `seed` that the model leaves None is set to the config's, at the price of a copy that has learned nothing.
    Randomness that River takes no seed for (none is known in models that this can build) would break recovery.

    A River model can only be saved as a pickle, which runs code when loaded and doesn't survive a change of River's
    version: the config must say `trust_pickle = true`.

    Before anything is learned, and where a model says nothing finite, all classes are as likely and a value is 0; a
    classifier that knows no probabilities gives all to the class that it names.

    Raises:
        ConfigError: the path names no River model, or none for the task, or one that can't be saved or can't learn from
            such features: two made-up examples are tried on a copy.

    An error that the model raises later stops the worker.
    """

    def __init__(self, config: Config) -> None:
        self.task = config.task
        self.classes = config.model.classes
        self.layout = Featurizer(config).layout
        self.names = [self.layout.fields[f] for f in self.layout.slot_field]  # (S,)
        strings = config.river_categories == "strings"
        self.as_string = [strings and isinstance(config.features[name], Categorical) for name in self.names]  # (S,)
        self.model = _build(config.river or "", config.task, config.seed)
        self.version = 0
        self._rehearse(config)

    def _rehearse(self, config: Config) -> None:
        features = Encoded(
            self.layout.slot_base + 1,
            np.ones(len(self.names), np.float32),
            np.ones(len(self.layout.numerics), np.float32),
        )
        x = self._dict(features)
        try:
            model = pickle.loads(pickle.dumps(self.model))  # noqa: S301
            for label in (0, 1):
                self._serve(model, x)
                model.learn_one(x, LABELS[self.task](label))
            self._serve(model, x)
        except Exception as error:  # somebody else's code may raise anything
            raise ConfigError(
                f"river: {config.river!r} can't be saved, or can't learn from {sorted(x)} with"
                f" river_categories {config.river_categories}: {type(error).__name__}: {error}"
            ) from error

    def described(self) -> dict[str, str]:
        return {"engine": "river"}

    def restated(self, _who: Selector) -> None:
        return None

    def answer(self, event: Event) -> tuple[Encoded, Scores]:
        return event.features, self.predict(event.features)

    def predict(self, features: Encoded) -> Scores:
        served = np.asarray(self._serve(self.model, self._dict(features)), np.float32)
        return Scores(served, served, self.version)

    def _serve(self, model: Any, x: dict[str, Any]) -> list[float]:
        if self.task == "regression":
            value = float(model.predict_one(x) or 0.0)
            return [min(max(value, -FLOAT32_MAX), FLOAT32_MAX) if value == value else 0.0]
        names = [False, True] if self.task == "binary" else range(self.classes)
        chances = _chances(model, x)
        served = [float(chances.get(name, 0.0)) for name in names]
        if not chances or not all(map(math.isfinite, served)):
            served = [1.0 / len(names)] * len(names)
        return served[1:] if self.task == "binary" else served

    def learn(self, outcome: Outcome, _signals: Sequence[Signal] = ()) -> bool:
        self.model.learn_one(self._dict(outcome.ticket.features), LABELS[self.task](outcome.label))
        self.version += 1
        return True

    def _dict(self, features: Encoded) -> dict[str, Any]:
        layout = self.layout
        x: dict[str, Any] = {
            n: v for n, v in zip(layout.numerics, features.dense.tolist(), strict=True) if not math.isnan(v)
        }
        rows, bases = features.ids.tolist(), layout.slot_base.tolist()
        slots = zip(self.names, self.as_string, rows, bases, features.weights.tolist(), strict=True)
        for field, as_string, row, missing, weight in slots:
            if as_string:
                if row != missing:
                    x[field] = str(row)
            elif weight:
                name = f"{field}={row}"
                x[name] = x.get(name, 0.0) + weight  # a bag may hold one category twice
        return x

    def forget(self, _who: Selector) -> dict[str, int]:
        """Nothing: whether a River model holds examples, and whose, is its own affair."""
        return {}

    def read(self) -> dict[str, float]:
        return {"weights_version": float(self.version)}

    def state_dict(self) -> State:
        data = np.frombuffer(pickle.dumps(self.model), np.uint8)
        return {"pickle": torch.from_numpy(data.copy()), "version": self.version}

    def load_state_dict(self, state: State) -> None:
        # Only reached with trust_pickle: the store refuses to load such a state otherwise.
        self.model = pickle.loads(bytes(state["pickle"].numpy()))  # noqa: S301
        self.version = int(state["version"])


def _chances(model: Any, x: dict[str, Any]) -> dict[Any, float]:
    try:
        chances: dict[Any, float] = model.predict_proba_one(x)
    except NotImplementedError:  # River's word for: names a class, and no more
        named = model.predict_one(x)
        return {} if named is None else {named: 1.0}
    return chances


def _build(path: str, task: Task, seed: int) -> Any:
    from river import base  # slow to import, and only needed here

    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        model = _seeded(copy.deepcopy(found) if isinstance(found, base.Estimator) else found(), seed)
    except Exception as error:  # somebody else's code may raise anything
        raise ConfigError(f"river: {path!r} can't be built: {error}") from error
    wanted: Any = base.Regressor if task == "regression" else base.Classifier
    if not isinstance(model, wanted):
        raise ConfigError(f"river: {path!r} is no River {wanted.__name__.lower()}, which task {task} needs")
    if task == "multiclass" and not model._multiclass:  # River's own word for it; it would learn nonsense in silence
        raise ConfigError(f"river: {path!r} can't tell more than two classes")
    return model


def _seeded(model: Any, seed: int) -> Any:
    """The model, or a fresh one of its kind if a seed in it was None."""
    from river import base

    if not isinstance(model, base.Base):
        return model
    params = model._get_params()
    filled = _fill(params, seed)
    return model if filled == params else model.clone(filled)


def _fill(value: Any, seed: int) -> Any:
    """River's nested parameters, each None of a `seed` filled; a model is (class, parameters), or stands in a list."""
    if isinstance(value, dict):
        return {name: seed if name == "seed" and v is None else _fill(v, seed) for name, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_fill(v, seed) for v in value)
    return value if isinstance(value, type) else _seeded(value, seed)
