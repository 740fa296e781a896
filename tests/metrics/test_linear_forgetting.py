"""Forgetting of linear learners with more weights than examples has a closed form; what learns here must match it.

Two tasks have n rows each of p independent standard normal numbers, targets x . w1 and x . w2 with noise of variance s,
and p > n + 1. A learner that goes, from zero, to the nearest weights that fit the first task, then to the nearest that
fit the second, is after task i a random projection away from its target. In expectation over the rows, with
r = 1 - n / p and e = n s / (p - n - 1), the excess risk on task 1 is

    r |w1|^2 + e                                   after task 1
    r (r |w1|^2 + e) + (1 - r) |w2 - w1|^2 + e     after task 2

for a row space of n random directions keeps the share r of any fixed vector's square, and the fit of noise adds e at
right angles to it. The difference is what is forgotten: it grows with the distance of the tasks, and is negative when
they are so alike that the second teaches the first. Source: Lin, Ju, Liang & Shroff 2023, arXiv 2302.05836, two tasks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer
from streamcl.plugin import Plan, Rows, Step

Floats = NDArray[np.float64]
P, N = 40, 10


def closed_form(w1: Floats, w2: Floats, noise: float) -> float:
    r, e = 1.0 - N / P, N * noise / (P - N - 1)
    return float((1 - r) * (np.sum((w2 - w1) ** 2) - r * np.sum(w1**2)) + r * e)


def task(draws: np.random.Generator, target: Floats, noise: float) -> tuple[Floats, Floats]:
    x = draws.normal(size=(N, P))
    return x, x @ target + math.sqrt(noise) * draws.normal(size=N)


def nearest_fit(w: Floats, x: Floats, y: Floats) -> Floats:
    return np.asarray(w + np.linalg.pinv(x) @ (y - x @ w))


def excess_risk(w: Floats, target: Floats) -> float:
    return float(np.sum((w - target) ** 2))


def targets(alike: float) -> tuple[Floats, Floats]:
    one, other = np.eye(2, P)
    return 2.0 * one, 2.0 * (alike * one + math.sqrt(1.0 - alike**2) * other)


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("alike", [-1.0, 0.0, 0.6, 1.0])
def test_minimum_norm_regression_forgets_what_the_closed_form_says(alike: float, noise: float) -> None:
    draws, (w1, w2), found = np.random.default_rng(0), targets(alike), []
    for _ in range(1000):
        after1 = nearest_fit(np.zeros(P), *task(draws, w1, noise))
        after2 = nearest_fit(after1, *task(draws, w2, noise))
        found.append(excess_risk(after2, w1) - excess_risk(after1, w1))
    four_errors = 4.0 * np.std(found) / math.sqrt(len(found))  # of a mean: beyond it 1 in 16,000
    assert abs(np.mean(found) - closed_form(w1, w2, noise)) < four_errors


def test_alike_tasks_teach_each_other_and_opposed_ones_forget_most() -> None:
    forgotten = [closed_form(*targets(alike), 0.0) for alike in (1.0, 0.6, 0.0, -1.0)]
    assert forgotten == sorted(forgotten)
    assert forgotten[0] < 0 < forgotten[-1]


def linear_engine() -> Eager:
    config = Config.parse(
        {
            "name": "t",
            "task": "regression",
            "events": {"url": "memory://a/b", "label": "y"},
            "features": {f"x{i}": "numeric" for i in range(P + 1)},
            "model": {"kind": "logistic"},
            "optimizer": {"kind": "sgd", "learning_rate": 0.015},
        }
    )
    return Eager(config, Featurizer(config).layout)


def learn(engine: Eager, x: Floats, y: Floats, passes: int) -> None:
    ids, weights, share = torch.zeros((1, 0), dtype=torch.int64), torch.zeros((1, 0)), torch.ones(1)
    inputs, wanted = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    for row in list(range(len(x))) * passes:
        rows = Rows(ids, weights, inputs[row : row + 1], wanted[row : row + 1])
        assert engine.step(Step(0, Plan(), rows, None, share))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_engine_s_linear_model_is_minimum_norm_regression_one_example_at_a_time(seed: int) -> None:
    # Every step moves the weights along an example, so from zero they stay in the examples' span and end at the nearest
    # fit. The model's bias is one weight more, on a number that is always 1: it is given to the oracle as a column, and
    # to the engine's own bias.
    draws, (w1, w2) = np.random.default_rng(seed), targets(0.3)
    engine, w = linear_engine(), np.zeros(P + 1)
    for target in (w1, w2):
        x, y = task(draws, target, 0.0)
        w = nearest_fit(w, np.column_stack((x, np.ones(N))), y)
        learn(engine, np.column_stack((x, np.zeros(N))), y, passes=60)
        weight, bias = (each.detach().numpy().ravel() for each in engine.model.parameters())
        learned = np.append(weight[:P], bias)
        assert np.abs(learned - w).max() < 1e-3
