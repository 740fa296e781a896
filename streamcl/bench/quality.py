"""How scores are judged: over a whole stream, each score given before its label was learned from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

CLAMP = 1e-6
"""Scores are read as at least this far from 0 and 1, for everybody alike: one certain error is not infinite."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a learner said of each event before it saw the label, scores (N,), and the processor seconds it took."""

    name: str
    scores: Floats
    cpu_s: float = math.nan

    @property
    def events_per_s(self) -> float:
        return len(self.scores) / self.cpu_s if self.cpu_s > 0 else float("nan")


def auc(labels: Floats, scores: Floats, weights: Floats | None = None) -> float:
    """Exact area under the ROC curve, ties counted half; NaN unless both classes occur.

    With `weights` (N,) a pair counts the product of its events' weights.

    Source: the Mann-Whitney statistic with mid-ranks.
    """
    if weights is not None:
        return _weighted_auc(labels, scores, weights)
    positives = float(labels.sum())
    negatives = len(labels) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(count) - (count - 1) / 2
    above = float(mid_rank[place][labels > 0].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def _weighted_auc(labels: Floats, scores: Floats, weights: Floats) -> float:
    _, place = np.unique(scores, return_inverse=True)
    positive, negative = (np.bincount(place, weights * side) for side in (labels, 1 - labels))
    pairs = float(positive.sum() * negative.sum())
    return float(positive @ (np.cumsum(negative) - negative / 2)) / pairs if pairs else float("nan")


def grouped_auc(labels: Floats, scores: Floats, groups: NDArray[np.int64]) -> float:
    """gAUC: the mean AUC within a group (a user, a session), weighted by the group's events.

    Groups with one class only are left out; NaN if that leaves none. `groups` (N,): the group of each event.

    Source: Zhu et al. 2017 (KDD, Optimized Cost per Click in Taobao Display Advertising), section 4.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[:1]] - 1))
    total = weight = 0.0
    for part in np.split(order, starts[1:]):
        within = auc(labels[part], scores[part])
        if not math.isnan(within):
            total, weight = total + len(part) * within, weight + len(part)
    return total / weight if weight else math.nan


def calibration(labels: Floats, scores: Floats) -> float:
    """Expected positives by those that came: 1 is right, above 1 promises too much. NaN without a positive."""
    return float(scores.sum() / labels.sum()) if labels.any() else math.nan


def calibration_error(labels: Floats, scores: Floats, bins: int = 20) -> float:
    """ECE: mean distance of score and rate, over `bins` parts of equally many events in the order of their scores.

    Source: Nixon et al. 2019, arXiv 1904.01685, the adaptive form; with parts of equal width a few would hold all.
    """
    parts = np.array_split(np.argsort(scores, kind="stable"), bins)
    return float(sum(abs(scores[part].sum() - labels[part].sum()) for part in parts) / len(labels))


def paired_p(ours: Floats, theirs: Floats) -> float:
    """How likely a mean difference as far from 0 is by chance: two-sided paired t-test over seeds, (n,) each.

    NaN for fewer than two pairs; 1 where no pair differs.
    """
    if len(ours) < 2:
        return math.nan
    if not np.ptp(ours - theirs):
        return 1.0 if ours[0] == theirs[0] else 0.0
    return float(stats.ttest_rel(ours, theirs).pvalue)


def losses(labels: Floats, scores: Floats) -> Floats:
    """Log-loss in nats of every example. # (N,)"""
    p = np.clip(scores, CLAMP, 1 - CLAMP)
    return np.asarray(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def entropy(labels: Floats) -> float:
    """Entropy in nats of the base rate: what the best constant, known beforehand, would lose."""
    rate = float(np.clip(labels.mean(), CLAMP, 1 - CLAMP))
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def quality(labels: Floats, scores: Floats) -> dict[str, float]:
    """AUC, normalised entropy, log-loss and accuracy (at 1/2) of the whole stream; the first two of its last half."""
    half = len(labels) // 2
    loss = losses(labels, scores)
    return {
        "auc": auc(labels, scores),
        "ne": float(loss.mean()) / entropy(labels),
        "log_loss": float(loss.mean()),
        "last_half_auc": auc(labels[half:], scores[half:]),
        "last_half_ne": float(loss[half:].mean()) / entropy(labels[half:]),
        "accuracy": float(np.mean((scores >= 0.5) == (labels > 0.5))),
    }


def weighted(labels: Floats, scores: Floats, weights: Floats) -> dict[str, float]:
    """AUC, normalised entropy and log-loss with each event counted `weights` (N,) times, by their sum.

    With weights of 1 / propensity: the self-normalised estimate of what they would be under a policy that shows all
    alike (Swaminathan & Joachims 2015, *The self-normalized estimator for counterfactual learning*). Equal weights, of
    any size, change nothing.
    """
    loss = float(np.average(losses(labels, scores), weights=weights))
    rate = np.array([np.average(labels, weights=weights)])
    return {"auc": auc(labels, scores, weights), "ne": loss / entropy(rate), "log_loss": loss}


def resampled(labels: Floats, scores: Sequence[Floats], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """AUC and NE of each of S traces in each of B bootstrap samples, the same for all of them. # (B, S, 2)

    A sample draws N events with replacement: how far the figures lie from what another such stream would give.
    """
    rng, count = np.random.default_rng(seed), len(labels)
    loss = [losses(labels, each) for each in scores]
    found = np.empty((draws, len(scores), 2))
    for b in range(draws):
        often = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        base = entropy(np.array([often @ labels / count]))
        found[b] = [
            (auc(labels, each, often), often @ lost / count / base) for each, lost in zip(scores, loss, strict=True)
        ]
    return found


def blocks(values: Floats, count: int = 50) -> tuple[Sequence[float], Sequence[float]]:
    """(end of block in events, mean of block) of `count` equal blocks; a rest that fills no block is left out."""
    width = max(1, len(values) // count)
    means = values[: len(values) // width * width].reshape(-1, width).mean(axis=1)
    return [float(width * (i + 1)) for i in range(len(means))], [float(mean) for mean in means]
