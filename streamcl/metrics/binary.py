"""Metrics of a served probability against a label that is 0 or 1."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.kernels import binary_rows
from streamcl.metrics.losses import clip, entropy, finite, log_losses, ratio, weighted
from streamcl.metrics.ranking import ScoreHistogram, exact_auc
from streamcl.metrics.window import Window
from streamcl.protocols import State


@dataclass(slots=True)
class Totals:
    """How many examples, and weighted sums over them: `pairs` of those with a predecessor, `repeats` with its label."""

    examples: int = 0
    loss: float = 0.0
    scores: float = 0.0
    labels: float = 0.0
    hits: float = 0.0
    pairs: float = 0.0
    repeats: float = 0.0
    weight: float = 0.0

    def metrics(self) -> dict[str, float]:
        """By definition; NaN where undefined."""
        log_loss = ratio(self.loss, self.weight)
        return {
            "log_loss": log_loss,
            "ne": ratio(log_loss, entropy([self.labels, self.weight - self.labels])),
            "calibration": ratio(self.scores, self.labels),
            "accuracy": ratio(self.hits, self.weight),
            "no_change_accuracy": ratio(self.repeats, self.pairs),
            "base_rate": ratio(self.labels, self.weight),
        }


class Binary:
    """Log-loss, NE, AUC, calibration, accuracy, no-change accuracy and base rate: whole stream and last `window`.

    `calibration` is predicted over observed positives (1 is calibrated), `accuracy` cuts at 0.5, and
    `no_change_accuracy` is that of always repeating the label before. `auc` is binned to within `auc_bound`
    (see `ScoreHistogram`); `auc_window` is exact.
    """

    def __init__(self, window: int) -> None:
        self._sums = np.zeros(8)  # in the order of `Totals`; counts are exact below 2^53
        self._histogram = ScoreHistogram()
        self._window = Window(window, 4)  # label, score, 1 if the label repeats its predecessor, weight
        self._previous = np.full(1, np.nan)

    @property
    def _totals(self) -> Totals:
        examples, *sums = self._sums.tolist()
        return Totals(int(examples), *sums)

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (1,)
        """Nats; not finite if the label or the score is not."""
        p = clip(float(served[0]))
        return -(label * math.log(p) + (1.0 - label) * math.log(1.0 - p))

    def add(
        self, labels: NDArray[np.float64], served: NDArray[np.float32], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:  # (n,), (n, 1), (n,)
        """Their losses (n,); one that is not finite has entered nothing."""
        losses = np.empty(len(labels))
        counts, ring, written = self._histogram.counts, self._window.ring, self._window.written
        scores = served[:, 0].astype(np.float64)
        binary_rows(labels, scores, weights, losses, self._sums, self._previous, counts, ring, written)
        return losses

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics() | {
            "auc": self._histogram.auc(),
            "auc_bound": self._histogram.auc_bound(),
            "examples": self._totals.examples,
        }
        return finite(whole | {f"{name}_window": value for name, value in self._read_window().items()})

    def _read_window(self) -> dict[str, float]:
        labels, scores, repeats, weights = self._window.columns()
        first = self._totals.examples <= len(labels)  # the very first example has no predecessor
        totals = Totals(
            examples=len(labels),
            loss=float((weights * log_losses(labels, scores)).sum()),
            scores=float((weights * scores).sum()),
            labels=float((weights * labels).sum()),
            hits=float((weights * ((scores >= 0.5) == (labels >= 0.5))).sum()),
            pairs=float(weights[1 if first else 0 :].sum()),
            repeats=float((weights * repeats).sum()),
            weight=float(weights.sum()),
        )
        return totals.metrics() | {"auc": exact_auc(labels, scores, weights)}

    def state_dict(self) -> State:
        previous = float(self._previous[0])
        return {
            "totals": asdict(self._totals),
            "histogram": self._histogram.state_dict(),
            "window": self._window.state_dict(),
            "previous": None if math.isnan(previous) else previous,
        }

    def load_state_dict(self, state: State) -> None:
        self._sums[:] = list(asdict(Totals(**weighted(state["totals"]))).values())
        self._histogram.load_state_dict(state["histogram"])
        self._window.load_state_dict(state["window"])
        self._previous[0] = math.nan if state["previous"] is None else state["previous"]
