import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.bench.quality import (
    Trace,
    auc,
    blocks,
    calibration,
    calibration_error,
    entropy,
    grouped_auc,
    losses,
    paired_p,
    quality,
    resampled,
    weighted,
)

pairs = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.5, 0.9])), min_size=1, max_size=30)


def auc_oracle(labels: list[int], scores: list[float]) -> float:
    """Every positive against every negative."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for y, p in zip(labels, scores, strict=True)
        if y == 1
        for z, n in zip(labels, scores, strict=True)
        if z == 0
    ]
    return sum(wins) / len(wins) if wins else math.nan


@given(pairs)
def test_auc_is_the_share_of_pairs_in_order(sample: list[tuple[int, float]]) -> None:
    labels, scores = [y for y, _ in sample], [s for _, s in sample]
    found = auc(np.array(labels, float), np.array(scores))
    assert found == pytest.approx(auc_oracle(labels, scores), nan_ok=True)


def test_log_loss_is_minus_the_log_of_what_was_given_to_the_truth() -> None:
    found = losses(np.array([1.0, 0.0]), np.array([0.25, 0.25]))
    assert found == pytest.approx([-math.log(0.25), -math.log(0.75)])


def test_a_certain_error_is_finite() -> None:
    assert losses(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx([-math.log(1e-6)] * 2)


def test_the_base_rate_itself_has_a_normalised_entropy_of_one() -> None:
    labels = np.array([1.0, 0.0, 0.0, 0.0] * 5)
    found = quality(labels, np.full(20, 0.25))
    assert found["ne"] == pytest.approx(1.0)
    assert found["log_loss"] == pytest.approx(entropy(labels))
    assert found["auc"] == 0.5
    assert found["accuracy"] == 0.75


def test_the_last_half_is_judged_by_itself() -> None:
    labels = np.array([1.0, 0.0, 1.0, 0.0])
    found = quality(labels, np.array([0.1, 0.9, 0.9, 0.1]))
    assert found["last_half_auc"] == 1.0
    assert found["auc"] == 0.5


def test_blocks_leave_out_a_rest() -> None:
    ends, means = blocks(np.arange(7.0), count=3)
    assert list(ends) == [2.0, 4.0, 6.0]
    assert list(means) == [0.5, 2.5, 4.5]


def test_a_rate_needs_a_time() -> None:
    assert Trace("x", np.zeros(10), 2.0).events_per_s == 5.0
    assert math.isnan(Trace("x", np.zeros(10)).events_per_s)


def test_a_group_of_both_classes_counts_by_its_events_and_one_of_a_single_class_not_at_all() -> None:
    labels = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    scores = np.array([0.9, 0.1, 0.2, 0.8, 0.1, 0.5, 0.5])
    groups = np.array([7, 7, 3, 3, 3, 5, 5])  # AUC 1 of two events; AUC 1/2 of three; none of two
    assert grouped_auc(labels, scores, groups) == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert math.isnan(grouped_auc(np.ones(2), np.array([0.1, 0.2]), np.array([0, 0])))


def test_who_is_in_which_group_is_all_that_is_read_of_a_group() -> None:
    rng = np.random.default_rng(0)
    labels, scores, groups = rng.integers(0, 2, 200).astype(float), rng.random(200), rng.integers(0, 9, 200)
    order = rng.permutation(200)
    renamed = grouped_auc(labels[order], scores[order], 100 - groups[order])
    assert renamed == pytest.approx(grouped_auc(labels, scores, groups))


def test_calibration_compares_promise_and_fact() -> None:
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    assert calibration(labels, np.full(4, 0.25)) == 1.0
    assert calibration(labels, np.full(4, 0.5)) == 2.0
    assert math.isnan(calibration(np.zeros(4), np.full(4, 0.5)))


def test_errors_of_calibration_that_cancel_out_are_seen() -> None:
    labels, scores = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.25, 0.25, 0.75, 0.75])
    assert calibration(labels, scores) == 1.0
    assert calibration_error(labels, scores, bins=2) == pytest.approx(0.25)


def test_a_difference_that_every_seed_shows_is_no_chance() -> None:
    base = np.array([0.70, 0.72, 0.74, 0.71, 0.73])
    assert paired_p(base + np.array([0.010, 0.011, 0.009, 0.010, 0.0105]), base) < 1e-4
    assert paired_p(base + np.array([0.01, -0.01, 0.01, -0.01, 0.0]), base) > 0.5
    assert paired_p(base, base) == 1.0
    assert math.isnan(paired_p(base[:1], base[:1]))


counted = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.integers(0, 3)), min_size=2, max_size=20
)


@given(counted)
def test_an_event_of_weight_three_counts_as_three(sample: list[tuple[int, float, int]]) -> None:
    labels, scores, weights = (np.array(column, float) for column in zip(*sample, strict=True))
    often = weights.astype(int)
    if len({y for y, _, w in sample if w}) < 2:
        return
    found = weighted(labels, scores, weights)
    plain = quality(np.repeat(labels, often), np.repeat(scores, often))
    assert found == {name: pytest.approx(plain[name]) for name in found}


@given(pairs, st.sampled_from([0.02, 1.0, 46.0]))
def test_equal_weights_of_any_size_change_nothing(sample: list[tuple[int, float]], weight: float) -> None:
    labels, scores = np.array([y for y, _ in sample], float), np.array([s for _, s in sample])
    found, plain = weighted(labels, scores, np.full(len(labels), weight)), quality(labels, scores)
    assert found == {name: pytest.approx(plain[name], nan_ok=True) for name in found}


def test_samples_are_the_same_for_all_traces_and_spread_about_the_whole() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(500) < 0.3).astype(float)
    scores = np.clip(0.3 + 0.2 * labels + 0.2 * (rng.random(500) - 0.5), 0.01, 0.99)
    found = resampled(labels, [scores, scores], 200)
    assert found.shape == (200, 2, 2)
    assert (found[:, 0] == found[:, 1]).all()
    plain = quality(labels, scores)
    spread = found[:, 0].std(0)
    # The mean of 200 samples is within 4 of its standard errors, and of the bootstrap's own bias, a 500th.
    assert found[:, 0].mean(0) == pytest.approx(
        [plain["auc"], plain["ne"]], abs=float(4 * spread.max() / 200**0.5 + 2e-3)
    )
