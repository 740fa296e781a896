import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.bench.quality import Trace, auc, blocks, entropy, losses, quality

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
