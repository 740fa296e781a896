"""Whether scores are as high as positives are frequent: by parts of the scores, and what one shift would mend."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

from streamcl.metrics.losses import CLIP, ratio

Floats = NDArray[np.float64]

ECE_BINS = 15
DECILES = 10


def _parts(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None, count: int) -> tuple[Floats, Floats]:
    """(count,) weighted sums of scores, and of labels, over parts of equally many examples, by ascending score.

    Their numbers differ by one at most, the first ones being the larger. Equal scores stand in their own order.
    """
    y, p = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(p, kind="stable")
    sizes = len(y) // count + (np.arange(count) < len(y) % count)
    ends = np.cumsum(sizes)
    sums = (np.concatenate(([0.0], np.cumsum((w * each)[order]))) for each in (p, y))
    of_scores, of_labels = (np.diff(each[np.concatenate(([0], ends))]) for each in sums)
    return of_scores, of_labels


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """ECE: the mean distance of score and label over 15 parts of equally many examples, each as its weight.

    sum over parts of |sum(w p) - sum(w y)|, over sum(w). 0 is calibrated.

    Shape:
        labels (N,) 0 or 1, scores (N,) probabilities, weights (N,), or 1. NaN where nothing weighs. O(N log N).

    Source:
        Nixon et al. 2019, arXiv 1904.01685, the adaptive form: parts of equal width would hold nearly all in one.
    """
    of_scores, of_labels = _parts(labels, scores, weights, ECE_BINS)
    total = float(np.size(labels) if weights is None else np.sum(weights))
    return ratio(float(np.abs(of_scores - of_labels).sum()), total)


def decile_calibrations(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> list[float]:
    """Predicted over observed positives in each tenth of the examples, lowest scores first; NaN without a positive.

    Shapes as in `expected_calibration_error`.
    """
    of_scores, of_labels = _parts(labels, scores, weights, DECILES)
    return [ratio(*each) for each in zip(of_scores.tolist(), of_labels.tolist(), strict=True)]


def shift_logits(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The number that, added to all logits, makes their log-loss least: then scores sum to what labels sum to.

    Shape:
        labels (N,) 0 or 1, scores (N,) probabilities, kept 1e-6 from 0 and 1, weights (N,), or 1. NaN where a class is
        missing.
    """
    y, z = np.asarray(labels, np.float64), _logits(scores)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    total, positives = float(w.sum()), float((w * y).sum())
    if not 0.0 < positives < total:
        return math.nan

    def excess(shift: float) -> float:
        return float((w * expit(z + shift)).sum()) - positives

    # With all logits below the base rate's the scores are too low, with all above it too high.
    goal = math.log(positives) - math.log(total - positives)
    low, high = goal - float(z.max()) - 1.0, goal - float(z.min()) + 1.0
    if not excess(low) < 0.0 < excess(high):  # weights so unequal that a class is lost in rounding
        return math.nan
    return float(brentq(excess, low, high, xtol=1e-9))


def shifted(scores: ArrayLike, shift: float) -> Floats:
    """(N,) the probabilities whose logits are those of scores (N,) + shift."""
    return np.asarray(expit(_logits(scores) + shift))


def _logits(scores: ArrayLike) -> Floats:
    return np.asarray(logit(np.clip(np.asarray(scores, np.float64), CLIP, 1.0 - CLIP)))
