"""The model and everything that learns with it: predict is pure, learn is one example at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config
from streamcl.engine.eager import Eager, as_tensors
from streamcl.features import FLOAT32_MAX, Featurizer, RunningNorm
from streamcl.memory import ErrorMemory, Replay, Vectors
from streamcl.memory.owners import Owners
from streamcl.plasticity import build_diagnostics
from streamcl.protocols import State
from streamcl.records import Encoded, Outcome, Scores, Selector


class Learner:
    """A torch model that learns from one outcome at a time, with replay and an error memory.

    Args:
        serving: It is to predict what another learned, and says nothing about how that one learns.

    Loss of a step = live example (see `loss.kind`) + `replay.weight` * mean over `replay.per_event` replayed ones. The
    draw comes before the writes, so an event never replays itself.

    Shape:
        `predict(features)` gives `Scores` with output (O,) and served (1,), or (C,) for multiclass.

    Errors:
        None are raised for data: `learn` returns False, and nothing has changed, when the label would make the loss
        or the gradient non-finite or larger than `optimizer.max_grad_norm` (the outcome is to be quarantined). An
        example is left out for its own gradient only: when the replayed rows are what is too large, it is learned
        without them.
    """

    def __init__(self, config: Config, serving: bool = False) -> None:
        layout = Featurizer(config).layout
        self.task = config.task
        # Weightless rows would still move Adam's moments and what l2 pulls at.
        self.per_event = config.replay.per_event if config.replay.weight else 0
        self.replay_weight = config.replay.weight
        self.engine = Eager(config, layout, serving)
        self.numerics = RunningNorm(len(layout.numerics), unscaled=layout.unscaled)
        self.target = RunningNorm(1)  # regression learns standardised labels; idle otherwise
        self.memory = Replay(config.replay, config.seed, len(layout.slot_field), len(layout.numerics))
        self.recall = ErrorMemory(config, layout, self.engine.widths)
        self.rules = self.engine.rules
        trained = self.engine.dense, self.engine.model, self.engine.layers
        self.diagnostics = None if serving else build_diagnostics(config, *trained)
        self.version = 0  # learning steps behind the current weights

    def predict(self, features: Encoded) -> Scores:
        ids, weights, dense = as_tensors(features.ids, features.weights, self.numerics.apply(features.dense))
        [scores] = self._scores([features], ids, weights, dense)
        return scores

    def predict_many(self, batch: Sequence[Encoded]) -> list[Scores]:
        """In one pass: what `predict` says of each, up to the rounding of a matrix product of another height."""
        if not batch:
            return []
        ids, weights, dense = (np.concatenate(column).reshape(len(batch), -1) for column in zip(*batch, strict=True))
        rows = torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(self.numerics.apply(dense))
        return self._scores(batch, *rows)

    def _scores(self, batch: Sequence[Encoded], ids: Tensor, weights: Tensor, dense: Tensor) -> list[Scores]:
        if not self.recall.stages:
            output = self.engine.predict(ids, weights, dense).numpy()
            return [Scores(*each, self.version) for each in zip(output, self._served(output), strict=True)]
        output, *vectors = (each.numpy() for each in self.engine.look(ids, weights, dense))
        served, recalled = self.recall.recall(batch, self._served(output), Vectors(*vectors))
        return [Scores(output[b], served[b], self.version, recalled[b]) for b in range(len(batch))]

    def _served(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, P) of raw outputs (B, O)."""
        if self.task == "binary":
            return np.array([[_sigmoid(logit)] for logit in output[:, 0].tolist()], np.float32)
        raw = output.astype(np.float64)
        if self.task == "multiclass":
            powers = np.exp(raw - raw.max(1, keepdims=True))
            served = powers / powers.sum(1, keepdims=True)
        else:
            served = self.target.mean + raw * self.target.deviation()
        return np.asarray(served, np.float32)

    def learn(self, outcome: Outcome) -> bool:
        """Learn from one outcome; False when it had to be left out."""
        if not abs(outcome.label) <= FLOAT32_MAX:
            return False
        features = outcome.ticket.features
        before = self.numerics.state_dict(), self.target.state_dict()
        self.numerics.update(features.dense)
        if self.task == "regression":
            self.target.update(np.array([outcome.label], np.float32))
        if not self._step(features, outcome.label, float(outcome.ticket.scores.served[0])):
            self.numerics.load_state_dict(before[0])
            self.target.load_state_dict(before[1])
            return False
        self.version += 1
        if self.diagnostics:
            self.diagnostics.observe(self.engine.gradient_norm, Owners.of(outcome.ticket))
        self.memory.write(outcome.ticket, outcome.label)
        if self.recall.stages:
            self.recall.observe(outcome.ticket.scores, outcome.label, owner=Owners.of(outcome.ticket))
        return True

    def forget(self, who: Selector) -> dict[str, int]:
        """Erase what examples have left behind, by part; what the weights have learned of them stays."""
        diagnostics = {"diagnostics": self.diagnostics.forget(who)} if self.diagnostics else {}
        return {"replay": self.memory.forget(who), "error_memory": self.recall.forget(who), **diagnostics}

    def _step(self, features: Encoded, label: float, served: float) -> bool:
        replayed = self.per_event if len(self.memory) else 0
        if self.engine.step(*self._batch(features, label, replayed), served):
            return True
        return replayed > 0 and self.engine.step(*self._batch(features, label, 0), served)

    def _batch(self, features: Encoded, label: float, replayed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        ids, weights, dense = as_tensors(*features)
        y, share = torch.tensor([label]), torch.ones(1)
        if replayed:
            old = self.memory.draw(replayed, self.version)
            ids, weights, dense, y = (torch.cat(pair) for pair in zip((ids, weights, dense, y), old, strict=True))
            share = torch.tensor([1.0] + [self.replay_weight / replayed] * replayed)
        dense = torch.from_numpy(self.numerics.apply(dense.numpy()))
        if self.task == "regression":
            y = torch.from_numpy(self.target.apply(y.unsqueeze(1).numpy())).squeeze(1)
        return ids, weights, dense, y, share

    def read(self) -> dict[str, float]:
        held = {"replay_rows": float(len(self.memory)), "weights_version": float(self.version)}
        held |= self.recall.read() | (self.diagnostics.read() if self.diagnostics else {})
        for rule in self.rules.values():
            for name, value in rule.read().items():
                held[name] = held.get(name, 0.0) + value  # see `Rule.read`
        return held

    def state_dict(self) -> State:
        return {
            "engine": self.engine.state_dict(),
            "numerics": self.numerics.state_dict(),
            "target": self.target.state_dict(),
            "memory": self.memory.state_dict(),
            "version": self.version,
            **({"recall": self.recall.state_dict()} if self.recall.stages else {}),
            **({"diagnostics": self.diagnostics.state_dict()} if self.diagnostics else {}),
        }

    def load_state_dict(self, state: State) -> None:
        for name in ("engine", "numerics", "target", "memory"):
            getattr(self, name).load_state_dict(state[name])
        self.recall.load_state_dict(state.get("recall", {}))
        if self.diagnostics:
            self.diagnostics.load_state_dict(state.get("diagnostics", {}))
        self.version = int(state["version"])


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0
