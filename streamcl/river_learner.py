"""A River model in the learner's place: the same journey, joiner, metrics and recovery around somebody else's model."""

from __future__ import annotations

import importlib
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer
from streamcl.protocols import State
from streamcl.records import Encoded, Outcome, Scores, Selector, Signal
from streamcl.stations import Task


class RiverLearner:
    """Feeds a River classifier or regressor one outcome at a time.

    The model is named by `river = "river.module:Class"` and built without arguments; it sees a dict of the numerics by
    name and of the hashed categories as `field=row` with their weights.

    A River model can only be saved as a pickle, which runs code when loaded and doesn't survive a change of River's
    version: the config must say `trust_pickle = true`.

    Raises:
        ConfigError: the path names no River model, or none for the task.
    """

    def __init__(self, config: Config) -> None:
        self.task = config.task
        self.classes = config.model.classes
        self.layout = Featurizer(config).layout
        self.names = [self.layout.fields[f] for f in self.layout.slot_field]  # (S,)
        self.model = _build(config.river or "", config.task)
        self.version = 0

    def predict(self, features: Encoded) -> Scores:
        served = np.asarray(self._serve(self._dict(features)), np.float32)
        return Scores(served, served, self.version)

    def _serve(self, x: dict[str, float]) -> list[float]:
        if self.task == "regression":
            return [float(self.model.predict_one(x) or 0.0)]
        chances = self.model.predict_proba_one(x)
        if self.task == "binary":
            return [float(chances.get(True, 0.0 if chances else 0.5))]
        return [float(chances.get(c, 0.0 if chances else 1.0 / self.classes)) for c in range(self.classes)]

    def learn(self, outcome: Outcome, signals: Sequence[Signal] = ()) -> bool:
        y: Any = {"binary": bool, "multiclass": int, "regression": float}[self.task](outcome.label)
        self.model.learn_one(self._dict(outcome.ticket.features), y)
        self.version += 1
        return True

    def _dict(self, features: Encoded) -> dict[str, float]:
        layout = self.layout
        x = {n: v for n, v in zip(layout.numerics, features.dense.tolist(), strict=True) if not math.isnan(v)}
        for field, row, weight in zip(self.names, features.ids.tolist(), features.weights.tolist(), strict=True):
            if weight:
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


def _build(path: str, task: Task) -> Any:
    module, _, name = path.partition(":")
    try:
        model = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"river: {path!r} can't be built: {error}") from error
    from river import base  # slow to import, and only needed here

    wanted: Any = base.Regressor if task == "regression" else base.Classifier
    if not isinstance(model, wanted):
        raise ConfigError(f"river: {path!r} is no River {wanted.__name__.lower()}, which task {task} needs")
    if task == "multiclass" and not model._multiclass:  # River's own word for it; it would learn nonsense in silence
        raise ConfigError(f"river: {path!r} can't tell more than two classes")
    return model
