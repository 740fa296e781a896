"""Metrics of a served probability against a label that is 0 or 1."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from streamcl.metrics.calibration import decile_calibrations, expected_calibration_error, shift_logits, shifted
from streamcl.metrics.kernels import PAST_LABELS, PAST_LOSS, PAST_SCORES, PAST_WEIGHT, binary_rows
from streamcl.metrics.losses import clip, entropy, finite, log_losses, ratio, weighted
from streamcl.metrics.ranking import ScoreHistogram, exact_auc
from streamcl.metrics.window import Window, in_larger_ring
from streamcl.protocols import State

Floats = NDArray[np.float64]


def weighted_metrics(weight: float, loss: float, scores: float, labels: float) -> dict[str, float]:
    """By definition, of weighted sums; NaN where undefined."""
    log_loss = ratio(loss, weight)
    return {
        "log_loss": log_loss,
        "ne": ratio(log_loss, entropy([labels, weight - labels])),
        "calibration": ratio(scores, labels),
        "base_rate": ratio(labels, weight),
    }


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
        return weighted_metrics(self.weight, self.loss, self.scores, self.labels) | {
            "accuracy": ratio(self.hits, self.weight),
            "no_change_accuracy": ratio(self.repeats, self.pairs),
        }


class Binary:
    """Log-loss, NE, AUC, calibration, accuracy, no-change accuracy and base rate: whole stream and last `window`.

    `calibration` is predicted over observed positives (1 is calibrated), `accuracy` cuts at 0.5, and
    `no_change_accuracy` is that of always repeating the label before. `auc` is binned to within `auc_bound`
    (see `ScoreHistogram`); `auc_window` is exact.

    Of the last `window` alone: `ece_window` and `decile_calibration_D` (see `streamcl.metrics.calibration`), and
    `ne_recalibrated_window`, which is NE after the one shift of all logits that would have been best for the `window`
    examples before; it is there when those are complete and have both classes.

    What ends in `_decayed` (log-loss, NE, calibration, base rate) is of all examples, the one of k examples ago
    weighing 2^(-k / half_life) as much as its own weight. The base rate in such an NE is the one decayed alike:
    sum(2^(-k / half_life) w y) / sum(2^(-k / half_life) w).
    """

    def __init__(self, window: int, half_life: float) -> None:
        self._sums = np.zeros(8)  # in the order of `Totals`; counts are exact below 2^53
        self._histogram = ScoreHistogram()
        self._size = window
        # Label, score, 1 if the label repeats its predecessor, weight; of the last window and of the one before.
        self._window = Window(2 * window, 4)
        self._previous = np.full(1, np.nan)
        self._decayed = np.zeros(4)
        self._keep = 2.0 ** (-1.0 / half_life)

    @property
    def _totals(self) -> Totals:
        examples, *sums = self._sums.tolist()
        return Totals(int(examples), *sums)

    def loss(self, label: float, served: NDArray[np.float32]) -> float:  # served (1,)
        """Nats; not finite if the label or the score is not."""
        p = clip(float(served[0]))
        return -(label * math.log(p) + (1.0 - label) * math.log(1.0 - p))

    def add(self, labels: Floats, served: NDArray[np.float32], weights: Floats) -> Floats:  # (n,), (n, 1), (n,)
        """Their losses (n,); one that is not finite has entered nothing."""
        losses = np.empty(len(labels))
        counts, ring, written = self._histogram.counts, self._window.ring, self._window.written
        scores = served[:, 0].astype(np.float64)
        places = losses, self._sums, self._previous, counts, ring, written, self._decayed
        binary_rows(labels, scores, weights, *places, self._keep)
        return losses

    def read(self) -> dict[str, float]:
        whole = self._totals.metrics() | {
            "auc": self._histogram.auc(),
            "auc_bound": self._histogram.auc_bound(),
            "examples": self._totals.examples,
        }
        past = self._decayed.tolist()
        decayed = weighted_metrics(past[PAST_WEIGHT], past[PAST_LOSS], past[PAST_SCORES], past[PAST_LABELS])
        rows = self._window.columns()
        before, held = rows[:, : self._size], rows[:, -self._size :]
        window = self._read_window(held)
        if rows.shape[1] == 2 * self._size:
            window["ne_recalibrated"] = _recalibrated(before, held)
        labels, scores, _, weights = held
        deciles = enumerate(decile_calibrations(labels, scores, weights), 1)
        return finite(
            whole
            | {f"{name}_decayed": value for name, value in decayed.items()}
            | {f"{name}_window": value for name, value in window.items()}
            | {f"decile_calibration_{decile}": value for decile, value in deciles}
        )

    def _read_window(self, held: Floats) -> dict[str, float]:
        labels, scores, repeats, weights = held
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
        return totals.metrics() | {
            "auc": exact_auc(labels, scores, weights),
            "ece": expected_calibration_error(labels, scores, weights),
        }

    def state_dict(self) -> State:
        previous = float(self._previous[0])
        return {
            "totals": asdict(self._totals),
            "histogram": self._histogram.state_dict(),
            "window": self._window.state_dict(),
            "previous": None if math.isnan(previous) else previous,
            "decayed": self._decayed.copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """An old snapshot holds one window, and no decayed sums: those begin with the next example."""
        self._sums[:] = list(asdict(Totals(**weighted(state["totals"]))).values())
        self._histogram.load_state_dict(state["histogram"])
        window = state["window"]
        if "decayed" not in state and len(window["ring"]) == self._size:
            window = in_larger_ring(window, 2 * self._size)
        self._window.load_state_dict(window)
        self._previous[0] = math.nan if state["previous"] is None else state["previous"]
        self._decayed[:] = state.get("decayed", 0.0)


def _recalibrated(before: Floats, held: Floats) -> float:
    """NE of what is held, its logits moved by what is best for the rows before."""
    labels, scores, _, weights = held
    moved = shifted(scores, shift_logits(before[0], before[1], before[3]))
    loss, positives, weight = (weights * log_losses(labels, moved)).sum(), (weights * labels).sum(), weights.sum()
    return weighted_metrics(float(weight), float(loss), 0.0, float(positives))["ne"]
