from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.grouped import grouped_auc, within_groups
from streamcl.metrics.ranking import exact_auc


def slow(rows: list[tuple[int, float, int]]) -> float:
    """Group by group."""
    total = weight = 0.0
    for group in {g for _, _, g in rows}:
        labels, scores = zip(*[(y, s) for y, s, g in rows if g == group], strict=True)
        found = exact_auc(labels, scores)
        if not math.isnan(found):
            total, weight = total + len(labels) * found, weight + len(labels)
    return total / weight if weight else math.nan


ROW = st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.2, 0.5]), st.sampled_from([-(2**63), 0, 7]))


@given(st.lists(ROW, max_size=40))
def test_it_is_the_mean_of_each_groups_own(rows: list[tuple[int, float, int]]) -> None:
    labels, scores, groups = (np.array([row[i] for row in rows]) for i in range(3))
    assert grouped_auc(labels, scores, groups) == pytest.approx(slow(rows), nan_ok=True)


WEIGHTED = st.tuples(ROW, st.sampled_from([0.0, 0.5, 1.0, 4.0]))


@given(st.lists(WEIGHTED, max_size=30))
def test_weights_count_pairs_and_groups(rows: list[tuple[tuple[int, float, int], float]]) -> None:
    """Pair by pair; a group counts as what its events weigh, and what has one class is left out."""
    total = judged = mean = 0.0
    for group in {g for (_, _, g), _ in rows}:
        positives = [(s, w) for (y, s, g), w in rows if g == group and y]
        negatives = [(s, w) for (y, s, g), w in rows if g == group and not y]
        count, pairs = sum(w for _, w in positives + negatives), 0.0
        right = 0.0
        for s, w in positives:
            for other, v in negatives:
                pairs += w * v
                right += w * v * ((s > other) + (s == other) / 2)
        total += count
        if pairs:
            judged, mean = judged + count, mean + count * right / pairs
    labels, scores, groups = (np.array([row[i] for row, _ in rows]) for i in range(3))
    found = within_groups(labels, scores, groups, np.array([w for _, w in rows]))
    assert found.auc == pytest.approx(mean / judged if judged else math.nan, nan_ok=True)
    assert found.left_out == pytest.approx(1 - judged / total if total else math.nan, abs=1e-12, nan_ok=True)
