"""Losses for labels that come late: their gradients vanish where they should, and agree with what they are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from streamcl.config import Config, ConfigError
from streamcl.engine.delayed import Delayed, fake_negative_weighted, nothing_yet, odds
from streamcl.learner import Learner
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket

WINDOW, WAIT = 10.0, 1.0


def config(kind: str = "task", **changes: Any) -> Config:
    data: dict[str, Any] = {
        "name": "late",
        "events": {"url": "memory://late/views", "id": "id", "time": "ts"},
        "labels": {"url": "memory://late/clicks", "default": 1, "time": "ts"},
        "features": {"user": {"kind": "categorical", "buckets": 7}},
        "model": {"kind": "logistic"},
        "loss": {"kind": kind, "unit_s": 1.0},
        "join": {"attribution_window_s": WINDOW, "wait_s": 0.0 if kind in ("fnw", "fnc") else WAIT},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    }
    return Config.parse({**data, **changes})


def outcome(label: float, fate: Fate = Fate.JOINED, delay_s: float = 0.0, row: int = 1, weight: float = 1.0) -> Outcome:
    features = Encoded(np.array([row], np.int64), np.ones(1, np.float32), np.zeros(0, np.float32))
    scores = Scores(np.zeros(1, np.float32), np.full(1, 0.5, np.float32), 0)
    return Outcome(Ticket(str(row), 0.0, features, scores, Origin(EVENTS, 0, row), weight=weight), label, fate, delay_s)


def slope(loss: Tensor, x: Tensor) -> float:
    return float(torch.autograd.grad(loss.sum(), x)[0])


@given(st.floats(0.001, 0.999))
def test_the_expected_gradient_of_fnw_vanishes_where_the_model_is_right(pi: float) -> None:
    """Every event is a negative first, and a positive comes again: its share of the stream is pi / (1 + pi)."""
    x = torch.tensor([math.log(pi) - math.log1p(-pi)], dtype=torch.float64, requires_grad=True)
    y = torch.ones(1, dtype=torch.float64)
    positive, negative = (slope(fake_negative_weighted(x, label), x) for label in (y, 0 * y))
    assert math.isclose(positive, -(1 - pi) * (1 + pi), rel_tol=1e-9)
    assert math.isclose(negative, pi * (1 - pi) * (1 + pi), rel_tol=1e-9)
    assert abs(pi * positive + negative) < 1e-12


@given(st.floats(-700.0, 700.0), st.sampled_from([0.0, 1.0]))
def test_no_logit_makes_a_loss_or_its_gradient_anything_but_a_number(logit: float, label: float) -> None:
    for kind, heads in (("fnw", 0), ("fnc", 0), ("dfm", 1), ("es_dfm", 2)):
        objective = Delayed(config(kind))
        for fate, delay in ((Fate.PROVISIONAL, 1.0), (Fate.LATE, 5.0), (Fate.JOINED, 0.0), (Fate.EXPIRED, 10.0)):
            output = torch.full((1, 1 + heads), logit, requires_grad=True)
            y = 0.0 if fate in (Fate.PROVISIONAL, Fate.EXPIRED) else label
            loss = objective.losses(output, torch.tensor([y]), outcome(y, fate, delay))
            assert torch.isfinite(loss).all()
            assert torch.isfinite(torch.autograd.grad(loss.sum(), output)[0]).all()
    assert 0.0 <= odds(logit) < 1.0


@given(st.floats(-20.0, 20.0), st.floats(0.01, 20.0), st.floats(0.0, 20.0))
def test_what_silence_says_lies_between_nothing_and_that_there_is_no_positive(x: float, rate: float, e: float) -> None:
    logit, rates = torch.tensor([x], dtype=torch.float64), torch.tensor([rate], dtype=torch.float64)
    p = 1.0 / (1.0 + math.exp(-x))
    assert math.isclose(float(nothing_yet(logit, rates, e)), -math.log(1 - p + p * math.exp(-rate * e)), abs_tol=1e-7)
    assert abs(float(nothing_yet(logit, rates, 0.0))) < 1e-12
    assert math.isclose(float(nothing_yet(logit, rates, 1e6)), float(functional.softplus(logit)), rel_tol=1e-12)


@given(st.floats(-5.0, 5.0), st.floats(-5.0, 5.0), st.floats(1.5, 9.0))
def test_the_examples_of_an_event_add_up_to_its_likelihood(x: float, head: float, delay: float) -> None:
    output = torch.tensor([[x, head]], dtype=torch.float64)
    objective, p, rate = Delayed(config("dfm")), 1.0 / (1.0 + math.exp(-x)), math.log1p(math.exp(head))
    objective.ripe = True  # a window has closed

    def told(label: float, fate: Fate, after: float) -> float:
        y = torch.tensor([label], dtype=torch.float64)
        return float(objective.losses(output, y, outcome(label, fate, after)))

    late = told(0.0, Fate.PROVISIONAL, WAIT) + told(1.0, Fate.LATE, delay)
    assert math.isclose(late, -math.log(p * rate * math.exp(-rate * delay)), rel_tol=1e-9)
    never = told(0.0, Fate.PROVISIONAL, WAIT) + told(0.0, Fate.EXPIRED, WINDOW)
    assert math.isclose(never, -math.log(1 - p + p * math.exp(-rate * WINDOW)), rel_tol=1e-9, abs_tol=1e-12)


def test_es_dfm_without_delayed_positives_is_cross_entropy_of_real_negatives() -> None:
    output = torch.tensor([[0.3, -50.0, 50.0], [-1.2, -50.0, 50.0]], dtype=torch.float64)
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    plain = functional.binary_cross_entropy_with_logits(output[:, 0], y, reduction="none")
    assert torch.allclose(Delayed(config("es_dfm")).losses(output, y, None), plain)


def test_the_verdict_on_a_negative_teaches_the_heads_of_es_dfm_alone() -> None:
    output = torch.tensor([[0.3, 0.1, -0.2]], requires_grad=True)
    loss = Delayed(config("es_dfm")).losses(output, torch.zeros(1), outcome(0.0, Fate.EXPIRED, WINDOW))
    gradient = torch.autograd.grad(loss.sum(), output)[0][0]
    assert gradient[0] == 0.0
    assert gradient[1] > 0.0  # no late positive came
    assert gradient[2] < 0.0  # it was a real negative


@pytest.mark.parametrize("kind", ["fnw", "fnc"])
def test_the_compiled_form_is_the_eager_one(kind: str) -> None:
    rng = np.random.default_rng(0)
    learners = [Learner(config(kind, worker={"engine": engine})) for engine in ("eager", "fused")]
    for label, row, weight in zip(rng.integers(0, 2, 400), rng.integers(0, 8, 400), rng.random(400), strict=True):
        for learner in learners:
            fate = Fate.LATE if label else Fate.PROVISIONAL
            assert learner.learn(outcome(float(label), fate, 2.0 * label, int(row), float(weight)))
    for row in range(8):
        eager, fused = (learner.predict(outcome(0.0, row=row).ticket.features) for learner in learners)
        np.testing.assert_allclose(eager.served, fused.served, rtol=1e-5)


def test_es_dfm_and_dfm_run_on_the_eager_engine_which_says_so() -> None:
    assert Learner(config("dfm")).described() == {"engine": "eager", "because": "loss.kind: dfm"}
    assert Learner(config("es_dfm")).described()["because"] == "loss.kind: es_dfm"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": {"kind": "fnw"}, "join": {}}, "join.wait_s: fnw wants every event as a negative at once"),
        ({"loss": {"kind": "es_dfm"}, "join": {}}, "join.wait_s: es_dfm needs it"),
        ({"loss": {"kind": "dfm"}, "replay": {"retention": "recency", "per_event": 1}}, "replay.per_event: dfm"),
        ({"loss": {"kind": "fnc"}, "task": "regression"}, "loss.kind: fnc is for binary labels"),
        ({"error_memory": [{"kind": "key", "key": "user"}]}, "join.wait_s: an error memory"),
        ({"join": {"wait_s": 10.0, "attribution_window_s": 10.0}}, "must be below attribution_window_s"),
        ({"join": {"aggregate": "sum"}}, "join.aggregate: sum is for regression"),
        ({"join": {"late": "reemit", "aggregate": "last"}}, "aggregate: last is known when the window closes"),
        ({"join": {"default": 0.5}}, "join.default: 0.5 is no label"),
        ({"sample": {"negatives": 0.5}, "loss": {"kind": "dfm"}}, "sample.negatives"),
    ],
)
def test_what_does_not_fit_together_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(**changes)
