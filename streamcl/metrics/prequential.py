"""What the worker holds: every outcome's served score against its label, in the order of learning."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from streamcl.metrics.binary import Binary
from streamcl.metrics.multiclass import Multiclass
from streamcl.metrics.regression import Regression
from streamcl.protocols import State
from streamcl.records import Outcome
from streamcl.stations import HALF_LIFE, Task


class Prequential:
    """Metrics of predictions that stood before their labels did, over the whole stream and over the last `window`.

    `add` is O(1) an example; `read` takes O(window log window) and changes nothing. Memory is bounded.

    Args:
        window: labelled examples in the metrics that end in `_window` (count).
        half_life: labelled examples after which one counts half in those that end in `_decayed`; binary only.
        classes: width of the served probabilities; multiclass only.

    Shape:
        `served` of an outcome is (1,), a probability or a value, or (C,), class probabilities.

    Raises:
        ValueError: window < 1; or a state of another window is loaded.

    Source:
        Gama, Sebastiao and Rodrigues 2013, doi 10.1007/s10994-012-5320-9, for prequential evaluation.
    """

    def __init__(self, task: Task, window: int, classes: int, half_life: float = HALF_LIFE) -> None:
        self._unscored = 0
        self._metrics: Binary | Multiclass | Regression
        if task == "binary":
            self._metrics = Binary(window, half_life)
        elif task == "multiclass":
            self._metrics = Multiclass(window, classes)
        else:
            self._metrics = Regression(window)

    def update(self, outcome: Outcome) -> float:
        """Take the score that was served in; see `add`."""
        return self.add([outcome.label], [outcome.ticket.scores.served], [outcome.weight])[0]

    def loss(self, outcome: Outcome) -> float:
        """What `update` would return; changes nothing."""
        return self._metrics.loss(outcome.label, outcome.ticket.scores.served)

    def add(self, labels: ArrayLike, served: ArrayLike, weights: ArrayLike | None = None) -> list[float]:
        """The examples' losses: nats, or the squared error for regression. In the metrics they weigh `weights`, or 1.

        One that is not finite is counted as `unscored` and enters no sum, for a sum would never recover from it.

        Shape:
            labels, weights (n,), served (n, 1) or (n, C).
        """
        y = np.asarray(labels, np.float64)
        if not len(y):
            return []
        w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
        losses = self._metrics.add(y, np.asarray(served), w)
        self._unscored += int(len(losses) - np.isfinite(losses).sum())
        return losses.tolist()  # type: ignore[no-any-return]

    def read(self) -> dict[str, float]:
        """By name, finite values only: what is undefined (AUC of one class, say) is absent."""
        return self._metrics.read() | {"unscored": self._unscored}

    def state_dict(self) -> State:
        return {"metrics": self._metrics.state_dict(), "unscored": self._unscored}

    def load_state_dict(self, state: State) -> None:
        self._metrics.load_state_dict(state["metrics"])
        self._unscored = int(state["unscored"])
