"""Superficial and essential forgetting: what a new scale and bias would bring back, and what is gone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

Floats = NDArray[np.float64]

LARGEST_SCALE = 1e3
"""Logits that separate the classes have no best scale."""


class Rise(NamedTuple):
    """Of the mean log-loss on old examples, in nats: `total` is the sum of the other two."""

    total: float
    superficial: float
    essential: float


def split_rise(before: ArrayLike, now: ArrayLike, labels: ArrayLike) -> Rise:
    """Splits how much worse old examples are predicted now into what a refit repairs and the rest.

    A loss is what remains with the best scale and biases, plus what these would save. The rise of the first is
    essential: the order of the scores has suffered. That of the second is superficial: the scores still know, but say
    it in another voice, which replay of a few rows, or an error memory, puts right. Either may be negative.

    Args:
        before, now: Logits of the same held-out examples when their segment had been learned, and now.

    Shape:
        before, now (N,) with labels 0 or 1, or (N, C) with labels 0 to C - 1; labels (N,).

    Source:
        The distinction: SEFE, Chen et al. 2025, arXiv 2505.02486.

    Differs from the source:
        There an answer of a language model is superficially wrong when its form is. Here form is the scale, at least 0,
        and a bias for each class: what calibration on the same examples repairs. It is fitted to the examples that it
        is judged on, so with few of them the essential part is too small, by about the number of biases + 1 over 2 N in
        each loss.
    """
    y = np.asarray(labels, np.int64)
    was, has = _classes(before), _classes(now)
    total, essential = _loss(has, y) - _loss(was, y), refitted_loss(was, y)
    essential = refitted_loss(has, y) - essential
    return Rise(total, total - essential, essential)


def refitted_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean log-loss, in nats, of scale x logits + bias of the class at its best; shapes as in `split_rise`."""
    z, y = _classes(logits), np.asarray(labels, np.int64)
    one_hot = np.eye(z.shape[1])[y]

    def loss(free: Floats) -> tuple[float, Floats]:
        moved = free[0] * z + np.concatenate(([0.0], free[1:]))
        error = np.exp(moved - logsumexp(moved, axis=1, keepdims=True)) - one_hot  # (N, C)
        return _loss(moved, y), np.concatenate(([(error * z).sum()], error.sum(0)[1:])) / len(y)

    start, bounds = np.eye(1, z.shape[1])[0], [(0.0, LARGEST_SCALE), *[(None, None)] * (z.shape[1] - 1)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9})
    return min(float(found.fun), _loss(z, y))


def _classes(logits: ArrayLike) -> Floats:
    """(N, C); a single logit is that of class 1 against 0."""
    z = np.asarray(logits, np.float64)
    return np.stack((np.zeros(len(z)), z), 1) if z.ndim == 1 else z


def _loss(logits: Floats, labels: NDArray[np.int64]) -> float:
    return float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())
