"""Metrics of served class probabilities against a label that is the index of a class."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.losses import clip, entropy, finite, ratio, weighted
from streamcl.metrics.window import Window
from streamcl.protocols import State


@dataclass(slots=True)
class Totals:
    """How many examples, and weighted sums over them: `pairs` of those with a predecessor, `repeats` with its label."""

    examples: int = 0
    loss: float = 0.0
    hits: float = 0.0
    pairs: float = 0.0
    repeats: float = 0.0
    weight: float = 0.0

    def metrics(self, classes: NDArray[np.float64]) -> dict[str, float]:
        """By definition, given the weight per class (C,); NaN where undefined."""
        log_loss = ratio(self.loss, self.weight)
        return {
            "log_loss": log_loss,
            "ne": ratio(log_loss, entropy(classes)),
            "accuracy": ratio(self.hits, self.weight),
            "no_change_accuracy": ratio(self.repeats, self.pairs),
        }


class Multiclass:
    """Log-loss of the true class, NE, accuracy and no-change accuracy: whole stream and last `window`.

    A tie of the highest probability goes to the first class. NE generalises the binary one: log-loss over the entropy
    of the observed classes.
    """

    def __init__(self, window: int, classes: int) -> None:
        self._totals = Totals()
        self._classes = np.zeros(classes)
        self._window = Window(window, 5)  # label, loss, 1 if right, 1 if the label repeats its predecessor, weight
        self._previous: float | None = None

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (C,)
        """Nats; NaN if the label is no class or its probability is NaN."""
        if not (0 <= label < len(served) and label == int(label)):
            return math.nan
        return -math.log(clip(float(served[int(label)])))

    def add(
        self, labels: NDArray[np.float64], served: NDArray[np.float32], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:  # (n,), (n, P), (n,)
        """Their losses (n,); one that is not finite has entered nothing."""
        losses = np.empty(len(labels))
        for i, (label, weight) in enumerate(zip(labels.tolist(), weights.tolist(), strict=True)):
            losses[i] = loss = self.loss(label, served[i])
            if math.isfinite(loss):
                self._add(label, served[i], loss, weight)
        return losses

    def _add(self, label: float, served: NDArray[np.float32], loss: float, weight: float) -> None:
        totals = self._totals
        hit, repeats = bool(served.argmax() == label), label == self._previous
        totals.examples += 1
        totals.weight += weight
        totals.loss += weight * loss
        totals.hits += weight * hit
        totals.pairs += weight * (self._previous is not None)
        totals.repeats += weight * repeats
        self._classes[int(label)] += weight
        self._window.append((label, loss, hit, repeats, weight))
        self._previous = label

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics(self._classes) | {"examples": self._totals.examples}
        return finite(whole | {f"{name}_window": value for name, value in self._read_window().items()})

    def _read_window(self) -> dict[str, float]:
        labels, losses, hits, repeats, weights = self._window.columns()
        first = self._totals.examples <= len(labels)  # the very first example has no predecessor
        totals = Totals(
            examples=len(labels),
            loss=float((weights * losses).sum()),
            hits=float((weights * hits).sum()),
            pairs=float(weights[1 if first else 0 :].sum()),
            repeats=float((weights * repeats).sum()),
            weight=float(weights.sum()),
        )
        counts = np.bincount(labels.astype(np.int64), weights, len(self._classes))
        return totals.metrics(np.asarray(counts, np.float64))

    def state_dict(self) -> State:
        return {
            "totals": asdict(self._totals),
            "classes": self._classes.copy(),
            "window": self._window.state_dict(),
            "previous": self._previous,
        }

    def load_state_dict(self, state: State) -> None:
        self._totals = Totals(**weighted(state["totals"]))
        self._classes[:] = state["classes"]
        self._window.load_state_dict(state["window"])
        self._previous = state["previous"]
