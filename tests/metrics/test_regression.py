import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import metrics as _river_metrics

from streamcl.metrics.regression import Regression

river_metrics: Any = _river_metrics  # typed only in parts

NUMBER = st.floats(-1e3, 1e3, width=32)
Examples = list[tuple[float, float]]


def fed(examples: Examples, window: int) -> Regression:
    metrics = Regression(window)
    for label, value in examples:
        metrics.add(np.array([label]), np.array([[value]], np.float32), np.ones(1))
    return metrics


def root_mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def by_definition(examples: Examples, window: int) -> dict[str, float]:
    """Of the last `window` examples; the baseline is the mean of every label before."""
    labels = [label for label, _ in examples]
    baseline = [sum(labels[:i]) / i - labels[i] for i in range(1, len(labels))][-window:]
    errors = [value - label for label, value in examples[-window:]]
    found = {"mae": sum(map(abs, errors)) / len(errors), "rmse": root_mean_square(errors)}
    return found | ({"baseline_rmse": root_mean_square(baseline)} if baseline else {})


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=30), st.integers(1, 40))
def test_whole_stream_and_window_are_as_defined(examples: Examples, window: int) -> None:
    windowed = {f"{name}_window": value for name, value in by_definition(examples, window).items()}
    expected = by_definition(examples, len(examples)) | windowed | {"examples": len(examples)}
    assert fed(examples, window).read() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_errors_equal_rivers() -> None:
    draws = np.random.default_rng(0)
    examples = [(float(y), float(np.float32(y + e))) for y, e in draws.normal(size=(500, 2))]
    mae, rmse, metrics = river_metrics.MAE(), river_metrics.RMSE(), fed(examples, 10).read()
    for label, value in examples:
        mae.update(label, value)
        rmse.update(label, value)
    assert metrics["mae"] == pytest.approx(mae.get(), rel=1e-12)
    assert metrics["rmse"] == pytest.approx(rmse.get(), rel=1e-12)


def test_nothing_is_known_of_an_empty_stream() -> None:
    assert Regression(3).read() == {"examples": 0}


def test_a_square_that_overflows_is_not_finite() -> None:
    assert math.isinf(Regression(3).loss(1e200, np.zeros(1, np.float32)))


@pytest.mark.parametrize("cut", [0, 1, 50, 51, 120])
def test_a_restored_regression_goes_on_bit_for_bit(cut: int) -> None:
    draws = np.random.default_rng(1)
    examples = [(float(y), float(v)) for y, v in draws.normal(size=(120, 2))]
    restored = Regression(50)
    restored.load_state_dict(fed(examples[:cut], 50).state_dict())
    for label, value in examples[cut:]:
        served = np.array([value], np.float32)
        restored.add(np.array([label], np.float64), served[None], np.ones(1))
    assert restored.read() == fed(examples, 50).read()
