from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.calibration import (
    DECILES,
    ECE_BINS,
    decile_calibrations,
    expected_calibration_error,
    shift_logits,
    shifted,
)
from streamcl.metrics.losses import log_losses

ROW = st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), st.sampled_from([0.5, 1.0, 3.0]))
Rows = list[tuple[int, float, float]]


def parts(rows: Rows, count: int) -> list[Rows]:
    """Dealt out by hand: whoever comes first takes one more as long as there are some over."""
    ranked, found = sorted(rows, key=lambda row: row[1]), []
    for part in range(count):
        size = len(rows) // count + (part < len(rows) % count)
        found.append(ranked[:size])
        ranked = ranked[size:]
    return found


@given(st.lists(ROW, min_size=1, max_size=60))
def test_the_error_is_the_mean_distance_over_parts_of_equal_count(rows: Rows) -> None:
    gaps = [abs(sum(w * p for _, p, w in part) - sum(w * y for y, _, w in part)) for part in parts(rows, ECE_BINS)]
    expected = sum(gaps) / sum(w for _, _, w in rows)
    assert expected_calibration_error(*zip(*rows, strict=True)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(ROW, min_size=1, max_size=60))
def test_each_decile_has_its_own_calibration(rows: Rows) -> None:
    expected = []
    for part in parts(rows, DECILES):
        positives = sum(w * y for y, _, w in part)
        expected.append(sum(w * p for _, p, w in part) / positives if positives else math.nan)
    assert decile_calibrations(*zip(*rows, strict=True)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_of_no_example_there_is_no_error() -> None:
    assert math.isnan(expected_calibration_error([], []))
    assert all(math.isnan(each) for each in decile_calibrations([], []))


@given(st.lists(ROW, min_size=2, max_size=40))
def test_the_best_shift_makes_scores_sum_to_the_labels_and_no_other_loses_less(rows: Rows) -> None:
    labels, scores, weights = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    shift = shift_logits(labels, scores, weights)
    if len(set(labels.tolist())) < 2:
        assert math.isnan(shift)
        return

    def loss(at: float) -> float:
        return float((weights * log_losses(labels, shifted(scores, at))).sum())

    assert (weights * shifted(scores, shift)).sum() == pytest.approx((weights * labels).sum(), rel=1e-6)
    z = np.log(np.clip(scores, 1e-6, 1 - 1e-6) / np.clip(1 - scores, 1e-6, 1 - 1e-6))
    if np.abs(z + shift).max() < 13.0:  # beyond it the loss is clipped
        assert all(loss(shift) <= loss(shift + step) + 1e-9 for step in (-0.1, -0.01, 0.01, 0.1))


def test_weights_too_unequal_to_be_summed_give_no_shift() -> None:
    assert math.isnan(shift_logits([0, 1], [0.5, 0.5], [1e-30, 1e30]))
