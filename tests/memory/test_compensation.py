"""What is made of findings: the paper's formulas, and a lambda that can switch itself off."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.memory.compensation import GRID, LEAST, Choice, compensated, losses
from streamcl.records import Recalled
from streamcl.stations import Task

unit = st.floats(0.0, 1.0, width=32)
ONE_NUMBER: tuple[Task, ...] = ("binary", "regression")


def recalled(given: list[float], labels: list[float], scores: list[float], support: float = 3.0) -> Recalled:
    given_, labels_, scores_ = (np.array(each, np.float32) for each in (given, labels, scores))
    return Recalled(np.zeros(1, np.float32), given_, labels_, scores_, support, 0)


def pair(gamma: float, strength: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.array([[gamma, strength]])


@given(given=unit, label=unit, score=unit, strength=unit)
def test_gamma_1_mixes_the_score_with_the_mean_label(given: float, label: float, score: float, strength: float) -> None:
    got = compensated(recalled([given], [label], [score]), pair(1.0, strength), "binary")
    assert got[0, 0] == pytest.approx(min(max((1 - strength) * given + strength * label, LEAST), 1 - LEAST), abs=1e-7)


@given(given=unit, label=unit, score=unit, strength=unit)
def test_gamma_0_adds_the_mean_residual(given: float, label: float, score: float, strength: float) -> None:
    got = compensated(recalled([given], [label], [score]), pair(0.0, strength), "binary")
    assert got[0, 0] == pytest.approx(min(max(given + strength * (label - score), LEAST), 1 - LEAST), abs=1e-7)


def test_probabilities_of_classes_stay_probabilities() -> None:
    got = compensated(recalled([0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [0.9, 0.05, 0.05]), pair(0.0, 1.0), "multiclass")
    assert got.sum() == pytest.approx(1.0)
    assert (got > 0.0).all()
    assert got[0].argmax() == 2


def test_a_value_is_not_clamped() -> None:
    got = compensated(recalled([1000.0], [1500.0], [900.0]), pair(0.0, 1.0), "regression")
    assert got[0, 0] == 1600.0


@pytest.mark.parametrize(
    ("task", "scores", "target", "expected"),
    [
        ("binary", [[0.25], [0.5]], [1.0], [-np.log(0.25), -np.log(0.5)]),
        ("binary", [[0.25], [0.5]], [0.0], [-np.log(0.75), -np.log(0.5)]),
        ("multiclass", [[0.2, 0.3, 0.5]], [0.0, 1.0, 0.0], [-np.log(0.3)]),
        ("regression", [[2.0], [5.0]], [3.0], [1.0, 4.0]),
    ],
)
def test_losses_are_nats_or_squares(
    task: Task, scores: list[list[float]], target: list[float], expected: list[float]
) -> None:
    np.testing.assert_allclose(losses(np.array(scores), np.array(target, np.float32), task), expected)


def follow(choice: Choice, rng: np.random.Generator, count: int, useful: bool) -> None:
    """Scores of 1/2 whose error the memory knows, or believes to know."""
    for _ in range(count):
        truth = float(rng.integers(2))
        belief = truth if useful else float(rng.integers(2))
        choice.observe(recalled([0.5], [0.5 + 0.6 * (belief - 0.5)], [0.5]), np.array([truth], np.float32))


def test_lambda_starts_at_0_rises_with_use_and_returns_within_3_half_lives_of_noise() -> None:
    choice, rng = Choice([0.0], GRID, 200.0, "binary"), np.random.default_rng(0)
    assert choice.pair.tolist() == [[0.0, 0.0]]
    follow(choice, rng, 400, useful=True)
    assert choice.pair[0, 1] == 1.0
    follow(choice, rng, 600, useful=False)
    assert choice.pair[0, 1] == 0.0


def test_a_gain_below_the_hysteresis_moves_nothing() -> None:
    choice = Choice([0.0], GRID, 1.0, "binary")
    for _ in range(20):
        choice.observe(recalled([0.5], [0.50001], [0.5]), np.array([1.0], np.float32))
    assert choice.pair[0, 1] == 0.0


def test_gamma_is_chosen_too() -> None:
    choice = Choice([0.0, 1.0], GRID, 100.0, "binary")
    for i in range(300):
        label = float(i % 2)
        choice.observe(recalled([0.5], [0.1 + 0.8 * label], [0.1 + 0.8 * label]), np.array([label], np.float32))
    assert choice.pair.tolist() == [[1.0, 1.0]]


def test_a_regression_moves_by_shares_of_its_error_whatever_the_unit() -> None:
    for scale in (1e-6, 1e6):
        choice = Choice([0.0], GRID, 50.0, "regression")
        for _ in range(100):
            found = recalled([0.0], [0.5 * scale], [0.0])
            choice.observe(found, np.array([scale], np.float32))
        assert choice.pair[0, 1] == 1.0


def test_a_fixed_pair_is_never_moved() -> None:
    choice = Choice([1.0], [0.4], 10.0, "binary")
    follow(choice, np.random.default_rng(0), 50, useful=False)
    assert choice.pair.tolist() == [[1.0, 0.4]]


@given(score=unit, label=unit, mean=unit, support=st.sampled_from([0.0, 3.0]), task=st.sampled_from(ONE_NUMBER))
def test_one_number_is_put_right_as_several_are(
    score: float, label: float, mean: float, support: float, task: Task
) -> None:
    found = recalled([score], [label], [mean], support)
    choice = Choice((0.0, 1.0), GRID, 100.0, task)
    for place in range(len(choice.pairs)):
        choice.chosen = place
        # A score that is not moved is not brought within the bounds either.
        moved = support > 0.0 and choice.pair[0, 1] > 0.0
        expected = compensated(found, choice.pair, task)[0].astype(np.float32) if moved else found.given
        assert choice.serve(found).tobytes() == expected.tobytes()


@given(score=unit, label=st.sampled_from([0.0, 1.0]), mean=unit, support=st.sampled_from([0.0, 3.0]))
@pytest.mark.parametrize("task", ONE_NUMBER)
def test_one_number_s_losses_are_what_several_are_judged_by(
    task: Task, score: float, label: float, mean: float, support: float
) -> None:
    found, target = recalled([score], [mean], [mean / 2], support), np.array([label], np.float32)
    choice = Choice((0.0, 1.0), GRID, 100.0, task)
    choice.observe(found, target)
    expected = choice.rate * losses(compensated(found, choice.pairs, task), target, task)
    np.testing.assert_allclose(choice.losses, expected, rtol=1e-12)
