import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import metrics as _river_metrics

from streamcl.metrics.losses import CLIP, clip, entropy, finite, log_loss, log_losses, normalized_entropy

river_metrics: Any = _river_metrics  # typed only in parts

PROBABILITY = st.floats(0, 1, width=32)
PAIRS = st.lists(st.tuples(st.integers(0, 1), PROBABILITY), min_size=1, max_size=50)


@given(PAIRS)
def test_log_loss_is_the_mean_over_a_plain_loop(pairs: list[tuple[int, float]]) -> None:
    slow = [-math.log(clip(p)) if y else -math.log(1 - clip(p)) for y, p in pairs]
    labels, scores = zip(*pairs, strict=True)
    assert log_loss(labels, scores) == pytest.approx(sum(slow) / len(slow), rel=1e-9)


def test_log_loss_equals_rivers_where_nothing_is_clipped() -> None:
    draws = np.random.default_rng(0)
    scores = draws.uniform(0.01, 0.99, 500)
    labels = draws.random(500) < scores
    peer = river_metrics.LogLoss()
    for label, score in zip(labels.tolist(), scores.tolist(), strict=True):
        peer.update(label, score)
    assert log_loss(labels, scores) == pytest.approx(peer.get(), rel=1e-12)


def test_a_confident_mistake_costs_at_most_the_clip() -> None:
    np.testing.assert_allclose(log_losses([1, 0], [0, 1]), -math.log(CLIP))


def test_clip_keeps_nan() -> None:
    assert math.isnan(clip(math.nan))


@given(st.integers(1, 99), st.integers(1, 5))
def test_ne_of_the_constant_base_rate_is_one(positives: int, scale: int) -> None:
    labels = np.repeat(np.arange(100) < positives, scale)
    assert normalized_entropy(labels, np.full(labels.size, positives / 100)) == pytest.approx(1, abs=1e-12)


@given(PAIRS)
def test_ne_is_log_loss_over_the_entropy_of_the_same_labels(pairs: list[tuple[int, float]]) -> None:
    labels, scores = zip(*pairs, strict=True)
    rate = sum(labels) / len(labels)
    if rate in (0, 1):
        assert math.isnan(normalized_entropy(labels, scores))
        return
    constant = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert normalized_entropy(labels, scores) == pytest.approx(log_loss(labels, scores) / constant, rel=1e-9)


def test_entropy_of_equal_classes_is_the_log_of_their_number() -> None:
    assert entropy([5, 5, 5, 0]) == pytest.approx(math.log(3))
    assert entropy([7, 0]) == 0
    assert entropy([0, 0]) == 0


def test_nothing_seen_is_undefined() -> None:
    assert math.isnan(log_loss([], []))
    assert math.isnan(normalized_entropy([], []))


def test_finite_leaves_out_what_is_undefined() -> None:
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}
