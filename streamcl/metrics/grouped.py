"""AUC within groups: how well the scores rank what one user, or one session, was shown."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def grouped_auc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> float:
    """gAUC: the mean AUC within a group, weighted by the group's events (impressions, not clicks).

    Groups of one class only are left out; NaN if that leaves none.

    Shape:
        labels (N,) 0 or 1, scores (N,) finite, groups (N,) int64: the group of each event. O(N log N).

    Source:
        Zhu et al. 2017, Optimized Cost per Click in Taobao Display Advertising, doi 10.1145/3097983.3098134, section 4;
        an AUC by mid-ranks, as in `ranking.exact_auc`.
    """
    y, s, g = np.asarray(labels) >= 0.5, np.asarray(scores), np.asarray(groups)
    if not len(y):
        return math.nan
    order = np.lexsort((s, g))
    y, s, g = y[order], s[order], g[order]
    turns = np.append(True, g[1:] != g[:-1])
    new_group = np.flatnonzero(turns)
    ties = np.flatnonzero(turns | np.append(True, s[1:] != s[:-1]))  # where each run of one score in a group begins
    sizes = np.diff(np.append(ties, len(y)))
    firsts = np.repeat(new_group, np.diff(np.append(new_group, len(y))))[ties]  # where its group begins
    ranks = np.repeat(ties - firsts + (sizes + 1) / 2, sizes)  # mid-ranks within the group, from 1 on
    counts = np.diff(np.append(new_group, len(y))).astype(np.float64)
    positives = np.add.reduceat(y.astype(np.float64), new_group)
    above = np.add.reduceat(np.where(y, ranks, 0.0), new_group) - positives * (positives + 1) / 2
    pairs = positives * (counts - positives)
    both = pairs > 0
    weight = counts[both]
    return float((weight * above[both] / pairs[both]).sum() / weight.sum()) if both.any() else math.nan
