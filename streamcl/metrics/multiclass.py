"""Metrics of served class probabilities against a label that is the index of a class."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.losses import clip, entropy, finite, ratio
from streamcl.metrics.window import Window
from streamcl.protocols import State


@dataclass(slots=True)
class Totals:
    """Sums over examples. `pairs` counts those with a predecessor, `repeats` those with its label."""

    examples: int = 0
    loss: float = 0.0
    hits: int = 0
    pairs: int = 0
    repeats: int = 0

    def metrics(self, classes: NDArray[np.int64]) -> dict[str, float]:
        """By definition, given the examples per class (C,); NaN where undefined."""
        log_loss = ratio(self.loss, self.examples)
        return {
            "log_loss": log_loss,
            "ne": ratio(log_loss, entropy(classes)),
            "accuracy": ratio(self.hits, self.examples),
            "no_change_accuracy": ratio(self.repeats, self.pairs),
        }


class Multiclass:
    """Log-loss of the true class, NE, accuracy and no-change accuracy: whole stream and last `window`.

    A tie of the highest probability goes to the first class. NE generalises the binary one: log-loss over the entropy
    of the observed classes.
    """

    def __init__(self, window: int, classes: int) -> None:
        self._totals = Totals()
        self._classes = np.zeros(classes, dtype=np.int64)
        self._window = Window(window, 4)  # label, loss, 1 if right, 1 if the label repeats its predecessor
        self._previous: float | None = None

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (C,)
        """Nats; NaN if the label is no class or its probability is NaN."""
        if not (0 <= label < len(served) and label == int(label)):
            return math.nan
        return -math.log(clip(float(served[int(label)])))

    def add(self, labels: NDArray[np.float64], served: NDArray[np.float32]) -> NDArray[np.float64]:  # (n,), (n, P)
        """Their losses (n,); one that is not finite has entered nothing."""
        losses = np.empty(len(labels))
        for i, label in enumerate(labels.tolist()):
            losses[i] = loss = self.loss(label, served[i])
            if math.isfinite(loss):
                self._add(label, served[i], loss)
        return losses

    def _add(self, label: float, served: NDArray[np.float32], loss: float) -> None:
        totals = self._totals
        hit, repeats = bool(served.argmax() == label), label == self._previous
        totals.examples += 1
        totals.loss += loss
        totals.hits += hit
        totals.pairs += self._previous is not None
        totals.repeats += repeats
        self._classes[int(label)] += 1
        self._window.append((label, loss, hit, repeats))
        self._previous = label

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics(self._classes) | {"examples": self._totals.examples}
        return finite(whole | {f"{name}_window": value for name, value in self._read_window().items()})

    def _read_window(self) -> dict[str, float]:
        labels, losses, hits, repeats = self._window.columns()
        totals = Totals(
            examples=len(labels),
            loss=float(losses.sum()),
            hits=int(hits.sum()),
            pairs=min(len(labels), self._totals.pairs),  # the very first example has no predecessor
            repeats=int(repeats.sum()),
        )
        return totals.metrics(np.bincount(labels.astype(np.int64), minlength=len(self._classes)))

    def state_dict(self) -> State:
        return {
            "totals": asdict(self._totals),
            "classes": self._classes.copy(),
            "window": self._window.state_dict(),
            "previous": self._previous,
        }

    def load_state_dict(self, state: State) -> None:
        self._totals = Totals(**state["totals"])
        self._classes[:] = state["classes"]
        self._window.load_state_dict(state["window"])
        self._previous = state["previous"]
