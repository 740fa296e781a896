"""AUC within groups: how well the scores rank what one user, or one session, was shown."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from streamcl.metrics.losses import ratio


class GroupedAuc(NamedTuple):
    """NaN where undefined: no group has both classes; there are no events."""

    auc: float
    left_out: float
    """The share of the events whose group has one class only, and is no part of it."""


def grouped_auc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None) -> float:
    """gAUC; see `within_groups`."""
    return within_groups(labels, scores, groups, weights).auc


def within_groups(
    labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, weights: ArrayLike | None = None
) -> GroupedAuc:
    """gAUC: the mean AUC within a group, weighted by the group's events (impressions, not clicks).

    sum(n_g AUC_g) / sum(n_g) over the groups with both classes. With weights (N,) n_g is their sum over the group, and
    a pair of a positive and a negative counts as much as the product of its two, as in `ranking.exact_auc`.

    Shape:
        labels (N,) 0 or 1, scores (N,) finite, groups (N,) int64: the group of each event. O(N log N).

    Source:
        Zhu et al. 2017, Optimized Cost per Click in Taobao Display Advertising, doi 10.1145/3097983.3098134, section 4;
        a tie is half right.
    """
    y, s, g = np.asarray(labels) >= 0.5, np.asarray(scores), np.asarray(groups)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    if not len(y):
        return GroupedAuc(np.nan, np.nan)
    order = np.lexsort((s, g))
    y, s, g, w = y[order], s[order], g[order], w[order]
    turns = np.append(True, g[1:] != g[:-1])
    group = np.flatnonzero(turns)  # where each begins
    tie = np.flatnonzero(turns | np.append(True, s[1:] != s[:-1]))  # where each run of one score in a group begins
    of_tie = np.searchsorted(group, tie, side="right") - 1  # its group
    positives, negatives = (np.add.reduceat(np.where(each, w, 0.0), tie) for each in (y, ~y))
    first = np.searchsorted(tie, group)  # the first run of each group
    below = np.cumsum(negatives) - negatives
    below -= below[first][of_tie]
    right = np.add.reduceat(positives * (below + negatives / 2), first)
    positives, negatives = (np.add.reduceat(each, first) for each in (positives, negatives))
    pairs, count = positives * negatives, positives + negatives
    both = pairs > 0.0
    judged = float(count[both].sum())
    auc = ratio(float((count[both] * right[both] / pairs[both]).sum()), judged)
    return GroupedAuc(auc, 1.0 - ratio(judged, float(count.sum())))
