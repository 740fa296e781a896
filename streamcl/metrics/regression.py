"""Metrics of a served value against a label that is a number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.losses import finite, ratio, weighted
from streamcl.metrics.window import Window
from streamcl.protocols import State


@dataclass(slots=True)
class Totals:
    """How many examples, and weighted sums over them, in the label's unit and its square; `pairs` of those with a
    predecessor.
    """

    examples: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    pairs: float = 0.0
    baseline_squared: float = 0.0
    weight: float = 0.0

    def metrics(self) -> dict[str, float]:
        """By definition; NaN where undefined."""
        return {
            "mae": ratio(self.absolute, self.weight),
            "rmse": math.sqrt(ratio(self.squared, self.weight)),
            "baseline_rmse": math.sqrt(ratio(self.baseline_squared, self.pairs)),
        }


class Regression:
    """Mean absolute and root mean squared error, whole stream and last `window`, in the label's unit.

    `baseline_rmse` is that of answering with the mean of all labels before; the first example has none.
    """

    def __init__(self, window: int) -> None:
        self._totals = Totals()
        self._window = Window(window, 3)  # error, error of the baseline, weight
        self._mean = 0.0

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (1,)
        """The squared error; not finite if the label, the value or the square is not."""
        error = float(served[0]) - label
        return error * error

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
        totals, error = self._totals, float(served[0]) - label
        baseline_error = self._mean - label if totals.examples else 0.0
        totals.pairs += weight * (totals.examples > 0)
        totals.examples += 1
        totals.weight += weight
        totals.absolute += weight * abs(error)
        totals.squared += weight * loss
        totals.baseline_squared += weight * baseline_error * baseline_error
        self._window.append((error, baseline_error, weight))
        self._mean += weight * (label - self._mean) / totals.weight if totals.weight else 0.0

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics() | {"examples": self._totals.examples}
        return finite(whole | {f"{name}_window": value for name, value in self._read_window().items()})

    def _read_window(self) -> dict[str, float]:
        errors, baseline_errors, weights = self._window.columns()
        first = self._totals.examples <= len(errors)  # it has no predecessor
        totals = Totals(
            examples=len(errors),
            absolute=float((weights * np.abs(errors)).sum()),
            squared=float((weights * errors * errors).sum()),
            pairs=float(weights[1 if first else 0 :].sum()),
            baseline_squared=float((weights * baseline_errors * baseline_errors).sum()),
            weight=float(weights.sum()),
        )
        return totals.metrics()

    def state_dict(self) -> State:
        return {"totals": asdict(self._totals), "window": self._window.state_dict(), "mean": self._mean}

    def load_state_dict(self, state: State) -> None:
        self._totals = Totals(**weighted(state["totals"]))
        self._window.load_state_dict(state["window"])
        self._mean = float(state["mean"])
