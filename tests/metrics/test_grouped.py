from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.grouped import grouped_auc
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
