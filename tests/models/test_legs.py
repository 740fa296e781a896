import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import legendre as npl
from numpy.typing import NDArray
from scipy.linalg import expm
from torch import Tensor

from streamcl.models.legs import LegS, legendre


def coefficients(values: list[float], lasting: list[float], order: int) -> Tensor:
    """c (N,) after such events of one key and one input."""
    memory = LegS(1, order, torch.float64)
    state = memory.init_state(1)
    for value, dt in zip(values, lasting, strict=True):
        x, gap = torch.tensor([[value]], dtype=torch.float64), torch.tensor([dt], dtype=torch.float64)
        h, state = memory.step(x, state, gap)
    return h[0]


def projected(values: list[float], lasting: list[float], order: int) -> NDArray[np.float64]:
    """The oracle: integrals of a step function times Legendre polynomials, from their antiderivatives."""
    edges = np.concatenate(([0.0], np.cumsum(lasting))) / sum(lasting)
    found = []
    for n in range(order):
        antiderivative = npl.Legendre.basis(n).integ()
        pieces = np.diff(antiderivative(2.0 * edges - 1.0)) / 2.0
        found.append(math.sqrt(2 * n + 1) * float(np.dot(values, pieces)))
    return np.array(found)


histories = st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 5)), min_size=1, max_size=25)


@given(history=histories, order=st.sampled_from([1, 2, 7, 40]))
@settings(max_examples=15, deadline=None)
def test_the_coefficients_are_the_projection_of_the_whole_history(
    history: list[tuple[float, float]], order: int
) -> None:
    values, lasting = [v for v, _ in history], [dt for _, dt in history]
    found = coefficients(values, lasting, order)
    np.testing.assert_allclose(found.numpy(), projected(values, lasting, order), atol=1e-10)


def test_a_smooth_signal_is_reconstructed() -> None:
    """Error of holding a signal of slope <= 6 for 1/200 of its time: at most 6 / 200 = 0.03."""
    times = (np.arange(200) + 0.5) / 200
    signal = np.sin(6.0 * times)
    c = coefficients(signal.tolist(), [1.0] * 200, 16)
    read = legendre(torch.from_numpy(times), 16) @ c
    assert np.abs(read.numpy() - signal).max() < 0.03


def test_a_polynomial_has_its_own_coefficients() -> None:
    """u = 1/2 P_0(2u - 1) + 1/2 P_1(2u - 1); held for 1/n of the time, each is off by O(1/n), here n = 500."""
    n = 500
    c = coefficients([(i + 0.5) / n for i in range(n)], [1.0] * n, 4)
    np.testing.assert_allclose(c.numpy(), [0.5, 0.5 / math.sqrt(3), 0.0, 0.0], atol=2e-3)


def test_it_solves_the_papers_equation() -> None:
    """dc/d(log t) = -A c + B x from t = 1 to 1.7 with x held: by matrix exponential, A and B as printed."""
    order, x, end = 8, 0.7, 1.7
    root = np.sqrt(2.0 * np.arange(order) + 1.0)
    a = np.tril(np.outer(root, root), -1) + np.diag(np.arange(order) + 1.0)
    start = coefficients([1.3], [1.0], order)
    resting = np.linalg.solve(a, root * x)
    wanted = resting + expm(-a * math.log(end)) @ (start.numpy() - resting)
    np.testing.assert_allclose(coefficients([1.3, x], [1.0, end - 1.0], order).numpy(), wanted, atol=1e-12)


def test_an_event_lasts_one_unit_when_no_time_is_given() -> None:
    memory = LegS(2, 5)
    x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
    plain, timed = memory.init_state(3), memory.init_state(3)
    for event in x:
        h, plain = memory.step(event, plain)
        g, timed = memory.step(event, timed, torch.ones(3))
    assert torch.equal(h, g)


def test_a_value_that_stands_still_may_come_as_one_event_or_many() -> None:
    once = coefficients([1.0, -2.0, 0.5], [1.0, 3.0, 1.0], 12)
    often = coefficients([1.0, -2.0, -2.0, -2.0, 0.5], [1.0, 0.5, 1.5, 1.0, 1.0], 12)
    torch.testing.assert_close(once, often, rtol=0.0, atol=1e-12)


def test_stretched_time_leaves_the_coefficients_as_they_are() -> None:
    values, lasting = [1.0, -2.0, 0.5, 3.0], [1.0, 0.3, 2.0, 0.7]
    torch.testing.assert_close(
        coefficients(values, lasting, 10), coefficients(values, [1e4 * dt for dt in lasting], 10), rtol=0, atol=1e-10
    )


def test_an_event_at_no_distance_adds_nothing() -> None:
    assert torch.isfinite(coefficients([5.0], [0.0], 6)).all()
    torch.testing.assert_close(
        coefficients([1.0, 9.0], [2.0, 0.0], 6), coefficients([1.0], [2.0], 6), rtol=0.0, atol=1e-12
    )


@pytest.mark.parametrize("order", [16, 64])
def test_single_precision_stays_near_the_projection_over_a_long_history(order: int) -> None:
    draw = np.random.default_rng(0).standard_normal(400)
    memory = LegS(1, order)
    state = memory.init_state(1)
    for value in draw:
        h, state = memory.step(torch.full((1, 1), float(value)), state)
    wanted = projected(draw.tolist(), [1.0] * len(draw), order)
    assert np.abs(h[0].numpy() - wanted).max() < 1e-4 * np.abs(draw).max()
    assert {name: value.shape for name, value in state.items()} == {"c": (1, 1, order), "t": (1,)}


def test_nothing_is_trainable() -> None:
    assert not list(LegS(2, 8).parameters())
