"""The model and everything that learns with it: predict is pure, learn is one example at a time."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config
from streamcl.engine.eager import Eager, as_tensors
from streamcl.features import Featurizer, RunningNorm
from streamcl.memory import Replay
from streamcl.protocols import State
from streamcl.records import Encoded, Outcome, Scores


class Learner:
    """A torch model that learns from one outcome at a time, with replay.

    Loss of a step = live example + `replay.weight` * mean over `replay.per_event` replayed ones. The draw comes before
    the write, so an event never replays itself.

    Shape:
        `predict(features)` gives `Scores` with output (O,) and served (1,), or (C,) for multiclass.

    Errors:
        None are raised for data: `learn` returns False, and nothing has changed, when the label would make the loss
        or the gradient non-finite or larger than `optimizer.max_grad_norm` (the outcome is to be quarantined).
    """

    def __init__(self, config: Config) -> None:
        layout = Featurizer(config).layout
        self.task = config.task
        self.per_event = config.replay.per_event
        self.replay_weight = config.replay.weight
        self.engine = Eager(config, layout)
        self.numerics = RunningNorm(len(layout.numerics))
        self.target = RunningNorm(1)  # regression learns standardised labels; idle otherwise
        self.memory = Replay(config.replay, config.seed, len(layout.slot_field), len(layout.numerics))
        self.version = 0  # learning steps behind the current weights

    def predict(self, features: Encoded) -> Scores:
        ids, weights, dense = as_tensors(features.ids, features.weights, self.numerics.apply(features.dense))
        output = self.engine.predict(ids, weights, dense).numpy()
        return Scores(output, self._serve(output), self.version)

    def _serve(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        raw = output.astype(np.float64)
        if self.task == "binary":
            served = 1.0 / (1.0 + np.exp(-np.clip(raw, -500.0, 500.0)))
        elif self.task == "multiclass":
            powers = np.exp(raw - raw.max())
            served = powers / powers.sum()
        else:
            served = self.target.mean + raw * self.target.deviation()
        return np.asarray(served, np.float32)

    def learn(self, outcome: Outcome) -> bool:
        """Learn from one outcome; False when it had to be left out."""
        label = np.float32(outcome.label)
        features = outcome.ticket.features
        before = self._norms()
        self.numerics.update(features.dense)
        if self.task == "regression":
            self.target.update(np.array([label]))
        if not self.engine.step(*self._batch(features, label)):
            self._restore(before)
            return False
        self.version += 1
        self.memory.write(features, outcome.label)
        return True

    def _batch(self, features: Encoded, label: np.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ids, weights, dense = as_tensors(*features)
        y, share = torch.tensor([label]), torch.ones(1)
        if self.per_event and len(self.memory):
            old = self.memory.draw(self.per_event, self.version)
            ids, weights, dense, y = (torch.cat(pair) for pair in zip((ids, weights, dense, y), old, strict=True))
            share = torch.full((1 + self.per_event,), self.replay_weight / self.per_event)
            share[0] = 1.0
        dense = torch.from_numpy(self.numerics.apply(dense.numpy()))
        if self.task == "regression":
            y = torch.from_numpy(self.target.apply(y.unsqueeze(1).numpy())).squeeze(1)
        return ids, weights, dense, y, share

    def _norms(self) -> tuple[State, State]:
        return self.numerics.state_dict(), self.target.state_dict()

    def _restore(self, norms: tuple[State, State]) -> None:
        self.numerics.load_state_dict(norms[0])
        self.target.load_state_dict(norms[1])

    def read(self) -> dict[str, float]:
        return {"replay_rows": float(len(self.memory)), "weights_version": float(self.version)}

    def state_dict(self) -> State:
        return {
            "engine": self.engine.state_dict(),
            "numerics": self.numerics.state_dict(),
            "target": self.target.state_dict(),
            "memory": self.memory.state_dict(),
            "version": self.version,
        }

    def load_state_dict(self, state: State) -> None:
        for name in ("engine", "numerics", "target", "memory"):
            getattr(self, name).load_state_dict(state[name])
        self.version = int(state["version"])
