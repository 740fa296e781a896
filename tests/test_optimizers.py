import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl.engine.optimizers import UPDATES, Adagrad, Update, build_update
from streamcl.stations import Optimizer

RATE = 0.1
STEPS = 30
KINDS = sorted(UPDATES)


def rule(kind: str, **more: Any) -> Update:
    return build_update(Optimizer.model_validate({"kind": kind, **more}), RATE)


def gradients() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(STEPS, 4, 3) * torch.logspace(-3, 2, 12).view(4, 3)


def run(made: Update, value: torch.Tensor) -> torch.Tensor:
    slots = made.slots(value)
    for gradient in gradients():
        value, slots = made.step(value, gradient, slots)
    return value


def torch_run(value: torch.Tensor, make: Any) -> torch.Tensor:
    param = torch.nn.Parameter(value.clone())
    optimizer = make([param])
    for gradient in gradients():
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("l2", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam"])
def test_each_rule_is_the_one_of_torch(kind: str, l2: float) -> None:
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, RATE, weight_decay=l2),
        "adagrad": lambda p: torch.optim.Adagrad(
            p, RATE, weight_decay=l2, initial_accumulator_value=Adagrad.INITIAL, eps=0.0
        ),
        "adam": lambda p: torch.optim.Adam(p, RATE, weight_decay=l2),
    }
    torch.manual_seed(1)
    start = torch.randn(4, 3)
    torch.testing.assert_close(run(rule(kind, l2=l2), start), torch_run(start, makers[kind]), rtol=2e-5, atol=2e-6)


def ftrl(w: float, grads: NDArray[np.float64], l1: float, l2: float) -> float:
    """Algorithm 1 of McMahan et al. 2013 for one coordinate, beta = 1, with z started so that it gives `w`."""
    z, n = -w * (1.0 / RATE + l2) - math.copysign(l1, w) * (w != 0.0), 0.0
    for g in grads:
        w = 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((1.0 + math.sqrt(n)) / RATE + l2)
        sigma = (math.sqrt(n + g * g) - math.sqrt(n)) / RATE
        z += g - sigma * w
        n += g * g
    return 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((1.0 + math.sqrt(n)) / RATE + l2)


@pytest.mark.parametrize("start", [0.0, 0.3, -0.3])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (1.0, 0.0), (0.5, 2.0), (30.0, 0.1)])
def test_ftrl_is_algorithm_1(start: float, l1: float, l2: float) -> None:
    got = run(rule("ftrl", l1=l1, l2=l2), torch.full((4, 3), start))
    steps = gradients().double().numpy()
    for i in range(4):
        for j in range(3):
            assert got[i, j].item() == pytest.approx(ftrl(start, steps[:, i, j], l1, l2), rel=1e-3, abs=1e-5)


def test_ftrl_holds_weights_of_weak_evidence_at_exactly_zero() -> None:
    got = run(rule("ftrl", l1=30.0), torch.zeros(4, 3))
    assert (got == 0.0).sum() >= 6
    assert (got != 0.0).any()


@given(st.floats(-2.0, 2.0, width=32), st.sampled_from([0.0, 0.5, 5.0]), st.sampled_from([0.0, 0.5]))
def test_ftrl_starts_where_the_weights_are(start: float, l1: float, l2: float) -> None:
    made, value = rule("ftrl", l1=l1, l2=l2), torch.tensor([[start]])
    after, _ = made.step(value, torch.zeros(1, 1), made.slots(value))
    assert after.item() == pytest.approx(start, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_nothing_in_place(kind: str) -> None:
    made, value, gradient = rule(kind, l2=0.1), torch.ones(2, 2), torch.ones(2, 2)
    slots = made.slots(value)
    copies = [t.clone() for t in (value, gradient, *slots)]
    made.step(value, gradient, slots)
    assert all(torch.equal(a, b) for a, b in zip(copies, (value, gradient, *slots), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_has_a_history_of_its_own(kind: str) -> None:
    made = rule(kind)
    table = torch.ones(3, 2)
    slots = list(made.slots(table))
    assert all(len(slot) == 3 for slot in slots)
    lone, lone_slots = table[:1].clone(), [slot[:1].clone() for slot in slots]
    for step, gradient in enumerate(gradients()[:, :1, :2]):
        row = torch.tensor([0, 2]) if step % 3 else torch.tensor([0])
        both = gradient.expand(len(row), 2)
        new, new_slots = made.step(table[row], both, [slot[row] for slot in slots])
        table[row] = new
        for slot, part in zip(slots, new_slots, strict=True):
            slot[row] = part
        fresh, fresh_slots = made.step(lone, gradient, lone_slots)
        lone, lone_slots = fresh, list(fresh_slots)
    torch.testing.assert_close(table[:1], lone, rtol=0.0, atol=0.0)
    assert torch.equal(table[1], torch.ones(2))


def test_adams_bias_correction_of_a_rare_row_is_that_of_its_first_step() -> None:
    made, value = rule("adam"), torch.zeros(1, 1)
    after, _ = made.step(value, torch.full((1, 1), 1e-3), made.slots(value))
    assert after.item() == pytest.approx(-RATE, rel=2e-5)  # a first step has length lr whatever the gradient


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_finds_the_minimum_of_a_bowl(kind: str) -> None:
    made, value = rule(kind), torch.tensor([[3.0, -2.0]])
    slots = made.slots(value)
    for _ in range(3000):
        value, slots = made.step(value, value - 0.5, slots)
    torch.testing.assert_close(value, torch.full((1, 2), 0.5), rtol=0.0, atol=0.02)
