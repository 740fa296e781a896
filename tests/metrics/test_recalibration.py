"""A distortion that calibration undoes is superficial, a lost order is essential."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl.metrics.losses import log_loss
from streamcl.metrics.recalibration import refitted_loss, split_rise

Floats = NDArray[np.float64]


def calibrated(seed: int, count: int, classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """Logits and labels that were drawn with just these chances."""
    draws = np.random.default_rng(seed)
    logits = draws.normal(0.0, 1.5, (count, classes))
    return logits, (logits + draws.gumbel(size=logits.shape)).argmax(1)


def binary(seed: int, count: int) -> tuple[Floats, NDArray[np.int64]]:
    logits, labels = calibrated(seed, count, 2)
    return logits[:, 1] - logits[:, 0], labels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.floats(0.2, 5.0), st.floats(-4.0, 4.0))
def test_another_scale_and_bias_are_superficial(seed: int, scale: float, bias: float) -> None:
    logits, labels = binary(seed, 200)
    rise = split_rise(logits, scale * logits + bias, labels)
    assert rise.essential == pytest.approx(0.0, abs=1e-6)
    assert rise.superficial == pytest.approx(rise.total, abs=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.lists(st.floats(-3.0, 3.0), min_size=3, max_size=3))
def test_so_are_a_scale_and_a_bias_for_each_class(seed: int, biases: list[float]) -> None:
    logits, labels = calibrated(seed, 200, 3)
    rise = split_rise(logits, 2.0 * logits + np.array(biases), labels)
    assert rise.essential == pytest.approx(0.0, abs=1e-5)


def test_scores_that_say_nothing_any_more_are_an_essential_loss_up_to_the_base_rate() -> None:
    logits, labels = binary(0, 2000)
    gone = np.random.default_rng(1).permutation(logits)
    rise = split_rise(logits, gone, labels)
    # Nothing beats the base rate, and a refit of noise on 2,000 examples is better by about 2 parameters / 2 N.
    base = log_loss(labels, np.full(2000, labels.mean()))
    assert refitted_loss(gone, labels) == pytest.approx(base, abs=5 / 2000)
    assert rise.essential == pytest.approx(base - refitted_loss(logits, labels), abs=5 / 2000)
    assert rise.essential > 0.2
    assert rise.superficial > 0.2  # it was as sure as ever


def test_of_a_reversed_order_nothing_but_the_base_rate_is_left_for_a_scale_is_never_negative() -> None:
    logits, labels = binary(0, 500)
    base = log_loss(labels, np.full(500, labels.mean()))
    rise = split_rise(logits, -logits, labels)
    assert rise.essential == pytest.approx(base - refitted_loss(logits, labels), abs=1e-6)


@given(st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_the_parts_sum_to_the_rise_of_the_log_loss(seed: int) -> None:
    before, labels = binary(seed, 60)
    now = before + np.random.default_rng(seed + 1).normal(0.5, 1.0, 60)
    rise = split_rise(before, now, labels)
    assert rise.superficial + rise.essential == pytest.approx(rise.total)
    loss = [log_loss(labels, 1 / (1 + np.exp(-z))) for z in (before, now)]
    assert rise.total == pytest.approx(loss[1] - loss[0], abs=1e-5)  # the metric clips at 1e-6


def test_a_single_logit_and_its_two_classes_are_the_same() -> None:
    one, labels = binary(0, 100)
    two = np.stack((np.zeros(100), one), 1)
    assert split_rise(one, one + 1.0, labels) == pytest.approx(split_rise(two, two + np.eye(2)[1], labels))


def test_a_refit_never_loses_and_separable_scores_come_to_an_end() -> None:
    logits, labels = binary(0, 100)
    assert refitted_loss(logits, labels) <= log_loss(labels, 1 / (1 + np.exp(-logits))) + 1e-12
    assert 0.0 <= refitted_loss([-1.0, -2.0, 1.0, 2.0], [0, 0, 1, 1]) < 1e-3
    assert math.isfinite(refitted_loss([1.0, 1.0], [1, 1]))
