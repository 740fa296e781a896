import math

import numpy as np
import pytest

from streamcl.bench import peers
from streamcl.bench.streams import LABEL, TIME, Dataset, synthetic

NUMBERS = Dataset(
    "numbers",
    {"a": "numeric"},
    [{"a": float(i % 7), TIME: float(i), LABEL: int(i % 7 > 3)} for i in range(300)],
)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def test_rivers_sgd_is_the_textbooks() -> None:
    """Oracle: w -= rate * (p - y) for each value present; River's bias has a rate of .01 of its own."""
    data = synthetic("stationary", 200, 0)
    weights: dict[str, float] = {}
    bias, expected = 0.0, []
    for payload in data.payloads:
        keys = [f"{name}={payload[name]}" for name in data.features]
        p = sigmoid(bias + sum(weights.get(key, 0.0) for key in keys))
        expected.append(p)
        for key in keys:
            weights[key] = weights.get(key, 0.0) - 0.1 * (p - payload[LABEL])
        bias -= 0.01 * (p - payload[LABEL])
    assert peers.river_logistic("sgd .1", data).scores == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("optimizer", list(peers.RIVER_OPTIMIZERS))
def test_river_scores_before_it_learns_and_learns_from_numbers_too(optimizer: str) -> None:
    trace = peers.river_logistic(optimizer, NUMBERS)
    assert trace.scores[0] == 0.5
    assert np.mean((trace.scores[200:] >= 0.5) == (NUMBERS.labels()[200:] > 0.5)) > 0.9
    assert trace.events_per_s > 0


@pytest.mark.skipif(not peers.vowpal_wabbit_installed(), reason="vowpalwabbit comes with the extra bench")
def test_vowpal_wabbits_plain_sgd_is_the_textbooks() -> None:
    """Oracle: w -= rate * (p - y) for each value present and the constant."""
    data = synthetic("stationary", 200, 0)
    weights: dict[str, float] = {}
    expected = []
    for payload in data.payloads:
        keys = ["", *(f"{name}={payload[name]}" for name in data.features)]
        p = sigmoid(sum(weights.get(key, 0.0) for key in keys))
        expected.append(p)
        for key in keys:
            weights[key] = weights.get(key, 0.0) - 0.05 * (p - payload[LABEL])
    found = peers.vowpal_wabbit("vw", data, "--sgd -l .05 --power_t 0")
    assert found.scores == pytest.approx(expected, abs=1e-5)


def test_a_line_of_vowpal_wabbit_has_a_namespace_for_each_feature() -> None:
    payload = {"user": "7", "item": "9", "price": 0.5, LABEL: 1}
    assert peers.vw_line({"user": "categorical", "item": "categorical"}, payload) == "1 |u 7 |i 9"
    assert peers.vw_line({"price": "numeric"}, {**payload, LABEL: 0}) == "-1 |p x:0.5"


def test_names_that_begin_alike_stay_whole() -> None:
    line = peers.vw_line({"f0": "categorical", "f1": "categorical"}, {"f0": "a", "f1": "b", LABEL: 0})
    assert line == "-1 |f0 a |f1 b"


def test_constant_says_the_rate_so_far() -> None:
    assert peers.constant([1, 1, 0]).scores.tolist() == pytest.approx([1 / 2, 2 / 3, 3 / 4])


def test_no_change_says_the_label_before() -> None:
    assert peers.no_change([1, 0, 1]).scores.tolist() == [0, 1, 0]


def test_weights_of_a_bag_and_missing_values_reach_the_peers() -> None:
    features = {"likes": {"kind": "bag"}, "age": "numeric", "city": "categorical"}
    payload = {"likes": {"7": 3.0}, LABEL: 0}
    assert peers.vw_line(features, payload) == "-1 |l 7:3.0 |a None |c None"
    assert peers.river_example(features, payload) == {"likes=7": 3.0, "age=None": 1.0, "city=None": 1.0}


def test_river_scales_numbers_and_leaves_categories_beside_them_alone() -> None:
    """Oracle: scaled like numbers, a category that is always 1 where it stands is 0, and teaches nothing."""
    rows = [{"a": str(i % 2), "n": 5.0, TIME: float(i), LABEL: i % 2} for i in range(200)]
    scores = peers.river_logistic("sgd .1", Dataset("mixed", {"a": "categorical", "n": "numeric"}, rows)).scores
    assert scores[198] < 0.2
    assert scores[199] > 0.8
