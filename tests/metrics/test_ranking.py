import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import metrics as _river_metrics

from streamcl.metrics.kernels import LIMIT
from streamcl.metrics.ranking import BINS, ScoreHistogram, exact_auc

river_metrics: Any = _river_metrics  # typed only in parts

# Few distinct values, so that ties are common.
SCORE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
PAIRS = st.lists(st.tuples(st.booleans(), SCORE), min_size=1, max_size=40)


def slow_auc(pairs: list[tuple[bool, float]]) -> float:
    """Every pair of a positive and a negative, by definition."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for positive, p in pairs
        if positive
        for negative, n in pairs
        if not negative
    ]
    return sum(wins) / len(wins) if wins else math.nan


def filled(pairs: list[tuple[bool, float]]) -> ScoreHistogram:
    histogram = ScoreHistogram()
    histogram.add(*(zip(*pairs, strict=True) if pairs else ([], [])))
    return histogram


@given(PAIRS)
def test_exact_auc_counts_every_pair_and_half_of_the_ties(pairs: list[tuple[bool, float]]) -> None:
    labels, scores = zip(*pairs, strict=True)
    np.testing.assert_equal(exact_auc(labels, scores), slow_auc(pairs))


@given(PAIRS.flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(pairs))))
def test_exact_auc_does_not_depend_on_the_order(both: tuple[list[tuple[bool, float]], ...]) -> None:
    first, second = (exact_auc(*zip(*pairs, strict=True)) for pairs in both)
    np.testing.assert_equal(first, second)


@given(PAIRS)
def test_exact_auc_of_the_negated_scores_is_the_rest(pairs: list[tuple[bool, float]]) -> None:
    labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
    np.testing.assert_allclose(exact_auc(labels, -scores), 1 - exact_auc(labels, scores), rtol=0, atol=1e-12)


def test_exact_auc_equals_rivers_rolling_one_where_no_scores_tie() -> None:
    """With these scores rounded to two places River says .8349, `slow_auc`, the judge of ties, .8357."""
    draws = np.random.default_rng(1)
    scores = draws.random(400)
    labels = draws.random(400) < scores
    peer = river_metrics.RollingROCAUC(window_size=400)
    for label, score in zip(labels.tolist(), scores.tolist(), strict=True):
        peer.update(label, score)
    assert exact_auc(labels, scores) == pytest.approx(peer.get(), abs=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc(label: int) -> None:
    assert math.isnan(exact_auc([label] * 3, [0.1, 0.2, 0.3]))
    assert math.isnan(filled([(bool(label), 0.3)]).auc())
    assert math.isnan(filled([(bool(label), 0.3)]).auc_bound())


def test_no_examples_have_no_auc() -> None:
    assert math.isnan(exact_auc([], []))


@given(PAIRS)
def test_the_histogram_is_within_its_bound(pairs: list[tuple[bool, float]]) -> None:
    histogram = filled(pairs)
    if math.isnan(slow_auc(pairs)):
        assert math.isnan(histogram.auc())
        return
    assert abs(histogram.auc() - slow_auc(pairs)) <= histogram.auc_bound() + 1e-12


@given(st.lists(st.tuples(st.booleans(), st.integers(-20, 20)), min_size=1, max_size=40))
def test_the_histogram_is_exact_for_scores_in_bins_of_their_own(pairs: list[tuple[bool, int]]) -> None:
    spread = [(positive, 1 / (1 + math.exp(-logit / 2 - 0.001))) for positive, logit in pairs]
    np.testing.assert_equal(filled(spread).auc(), slow_auc(spread))


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 2.0), (-1.5, 1.0), (-4.0, 0.3)])
def test_the_histogram_is_within_a_ten_thousandth_on_scores_that_spread(mean: float, deviation: float) -> None:
    draws = np.random.default_rng(2)
    scores = (1 / (1 + np.exp(-draws.normal(mean, deviation, 20_000)))).astype(np.float32)
    labels = draws.random(20_000) < scores
    histogram = filled(list(zip(labels.tolist(), scores.tolist(), strict=True)))
    assert abs(histogram.auc() - exact_auc(labels, scores)) < 1e-4
    assert histogram.auc_bound() < 2e-3


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_beyond_the_limit_share_the_outermost_bin(sign: int) -> None:
    ends = [0.0, 5e-324, 1e-8] if sign < 0 else [1.0, float(np.nextafter(1.0, 0.0)), 1 - 1e-8]
    histogram = ScoreHistogram()
    histogram.add([True] * len(ends), ends)
    counts = histogram.state_dict()["counts"]
    assert counts[1, 0 if sign < 0 else BINS - 1] == len(ends)
    assert math.log(1 / 1e-8) > LIMIT


def test_a_restored_histogram_is_equal_and_shares_nothing() -> None:
    first = filled([(True, 0.7), (False, 0.2), (True, 0.1)])
    second = ScoreHistogram()
    second.load_state_dict(first.state_dict())
    first.add([False], [0.9])
    assert second.auc() == 0.5
