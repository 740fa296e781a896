"""Metrics of a served value against a label that is a number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.losses import finite, ratio
from streamcl.metrics.window import Window
from streamcl.protocols import State


@dataclass(slots=True)
class Totals:
    """Sums over examples, in the label's unit and its square. `pairs` counts those with a predecessor."""

    examples: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    pairs: int = 0
    baseline_squared: float = 0.0

    def metrics(self) -> dict[str, float]:
        """By definition; NaN where undefined."""
        return {
            "mae": ratio(self.absolute, self.examples),
            "rmse": math.sqrt(ratio(self.squared, self.examples)),
            "baseline_rmse": math.sqrt(ratio(self.baseline_squared, self.pairs)),
        }


class Regression:
    """Mean absolute and root mean squared error, whole stream and last `window`, in the label's unit.

    `baseline_rmse` is that of answering with the mean of all labels before; the first example has none.
    """

    def __init__(self, window: int) -> None:
        self._totals = Totals()
        self._window = Window(window, 2)  # error, error of the baseline
        self._mean = 0.0

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (1,)
        """The squared error; not finite if the label, the value or the square is not."""
        error = float(served[0]) - label
        return error * error

    def add(self, labels: NDArray[np.float64], served: NDArray[np.float32]) -> NDArray[np.float64]:  # (n,), (n, P)
        """Their losses (n,); one that is not finite has entered nothing."""
        losses = np.empty(len(labels))
        for i, label in enumerate(labels.tolist()):
            losses[i] = loss = self.loss(label, served[i])
            if math.isfinite(loss):
                self._add(label, served[i], loss)
        return losses

    def _add(self, label: float, served: NDArray[np.float32], loss: float) -> None:
        totals, error = self._totals, float(served[0]) - label
        baseline_error = self._mean - label if totals.examples else 0.0
        totals.pairs += totals.examples > 0
        totals.examples += 1
        totals.absolute += abs(error)
        totals.squared += loss
        totals.baseline_squared += baseline_error * baseline_error
        self._window.append((error, baseline_error))
        self._mean += (label - self._mean) / totals.examples

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics() | {"examples": self._totals.examples}
        return finite(whole | {f"{name}_window": value for name, value in self._read_window().items()})

    def _read_window(self) -> dict[str, float]:
        errors, baseline_errors = self._window.columns()
        totals = Totals(
            examples=len(errors),
            absolute=float(np.abs(errors).sum()),
            squared=float((errors * errors).sum()),
            pairs=min(len(errors), self._totals.pairs),
            baseline_squared=float((baseline_errors * baseline_errors).sum()),
        )
        return totals.metrics()

    def state_dict(self) -> State:
        return {"totals": asdict(self._totals), "window": self._window.state_dict(), "mean": self._mean}

    def load_state_dict(self, state: State) -> None:
        self._totals = Totals(**state["totals"])
        self._window.load_state_dict(state["window"])
        self._mean = float(state["mean"])
