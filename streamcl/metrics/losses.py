"""Log-loss and entropy in nats, as defined for arrays; the streaming metrics must agree with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLIP = 1e-6
"""Probabilities are kept this far from 0 and 1: no single example costs more than 13.8 nats."""


def clip(p: float) -> float:
    """NaN stays NaN."""
    return min(max(p, CLIP), 1.0 - CLIP)


def log_losses(labels: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """What each example costs: `-(y ln p + (1 - y) ln(1 - p))` in nats.

    Shape:
        labels (N,) in [0, 1], scores (N,) probabilities; returns (N,).
    """
    y = np.asarray(labels, dtype=np.float64)
    p = np.clip(np.asarray(scores, dtype=np.float64), CLIP, 1.0 - CLIP)
    return np.asarray(-(y * np.log(p) + (1.0 - y) * np.log(1.0 - p)))


def log_loss(labels: ArrayLike, scores: ArrayLike) -> float:
    """The mean cost of an example in nats; NaN without examples. Shapes as in `log_losses`."""
    losses = log_losses(labels, scores)
    return float(losses.mean()) if losses.size else math.nan


def entropy(counts: ArrayLike) -> float:
    """Of the distribution with these counts (C,), in nats: the log-loss of the best constant answer."""
    n = np.asarray(counts, dtype=np.float64)
    shares = n[n > 0] / n.sum() if n.any() else n[:0]
    return float(-(shares * np.log(shares)).sum()) + 0.0  # + 0.0: a single class has 0, not -0


def ratio(numerator: float, denominator: float) -> float:
    """NaN where undefined, which `finite` leaves out."""
    return numerator / denominator if denominator else math.nan


def normalized_entropy(labels: ArrayLike, scores: ArrayLike) -> float:
    """Log-loss relative to that of the constant base rate: 1 is as good as the constant, lower is better.

    Shape:
        labels (N,) 0 or 1, scores (N,) probabilities. NaN where every label is the same.

    Source:
        He et al. 2014, doi 10.1145/2648584.2648589, equation 3. The base rate is that of the same examples.
    """
    y = np.asarray(labels, dtype=np.float64)
    return ratio(log_loss(y, scores), entropy([y.sum(), y.size - y.sum()]))


def weighted(state: dict[str, Any]) -> dict[str, Any]:
    """Totals of an old snapshot, in which every example weighed 1."""
    return {"weight": float(state["examples"]), **state}


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Only what is defined: an absent series is honest where NaN would break every sum above it."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
