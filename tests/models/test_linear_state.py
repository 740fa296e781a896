import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from streamcl.models.linear_state import ElementWise, Gated, MinGRU, MinLSTM, uniform_rows
from streamcl.models.lssl import DiagonalLSSL

IN, UNITS, KEYS = 4, 5, 3

CELLS: dict[str, Callable[..., ElementWise]] = {
    "minGRU": lambda units=UNITS, seed=0: MinGRU(IN, units, seed=seed, horizon=10, timed=True, output_gate=True),
    "minLSTM": lambda units=UNITS, seed=0: MinLSTM(IN, units, seed=seed, horizon=10, timed=True, output_gate=True),
    "LSSL": lambda units=UNITS, seed=0: DiagonalLSSL(IN, units, 6, seed=seed, delta=(0.1, 0.5)),
}
kinds = pytest.mark.parametrize("kind", sorted(CELLS))


def events(length: int, seed: int = 0) -> Tensor:
    """(T, B, in)"""
    return torch.randn(length, KEYS, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(cell: ElementWise, x: Tensor, dt: Tensor | None = None) -> Tensor:
    """(T, B, H)"""
    state = cell.init_state(x.shape[1])
    found = []
    for t in range(len(x)):
        h, state = cell.step(x[t], state, None if dt is None else dt[t])
        found.append(h.detach())
    return torch.stack(found)


def scanned(keep: Tensor, added: Tensor) -> Tensor:
    """s_t = keep_t s_(t-1) + added_t over (T, B, N) in closed form: sum over j <= t of added_j x product of keep."""
    log_keep = keep.log().cumsum(0)
    return torch.stack([(added[: t + 1] * (log_keep[t] - log_keep[: t + 1]).exp()).sum(0) for t in range(len(keep))])


def test_min_gru_by_step_is_its_parallel_form() -> None:
    cell = MinGRU(IN, UNITS, seed=1).double()
    x = events(30)
    z = torch.sigmoid(x @ cell.param("weight_z").T + cell.param("bias_z"))
    candidate = x @ cell.param("weight_h").T + cell.param("bias_h")
    torch.testing.assert_close(run(cell, x), scanned(1 - z, z * candidate).detach(), rtol=1e-10, atol=1e-12)


def test_min_lstm_by_step_is_its_parallel_form() -> None:
    cell = MinLSTM(IN, UNITS, seed=1).double()
    x = events(30)
    f, i = (torch.sigmoid(x @ cell.param(f"weight_{g}").T + cell.param(f"bias_{g}")) for g in "fi")
    candidate = x @ cell.param("weight_h").T + cell.param("bias_h")
    wanted = scanned(f / (f + i), i / (f + i) * candidate).detach()
    torch.testing.assert_close(run(cell, x), wanted, rtol=1e-10, atol=1e-12)


def test_an_output_gate_weighs_the_state_by_this_event() -> None:
    gated, plain = MinGRU(IN, UNITS, seed=1, output_gate=True).double(), MinGRU(IN, UNITS, seed=1).double()
    x = events(8)
    gate = torch.sigmoid(x @ gated.param("weight_o").T + gated.param("bias_o")).detach()
    torch.testing.assert_close(run(gated, x), gate * run(plain, x))


def test_the_lssl_by_step_is_a_convolution_with_its_kernel() -> None:
    """K_j = Re(C exp(lambda Delta j) hold B), the convolutional view of the paper's section 3.1, computed densely."""
    cell = DiagonalLSSL(IN, UNITS, 6, seed=2, delta=(0.1, 0.5)).double()
    x = events(25)
    p = {name: value.detach() for name, value in cell.named_parameters()}
    rates = torch.complex(-p["log_decay"].exp(), p["frequency"])
    delta = p["log_delta"].exp()
    hold = (torch.exp(rates * delta) - 1) / rates
    c, b = torch.complex(p["out_re"], p["out_im"]).T, torch.complex(p["in_re"], p["in_im"])
    kernel = [(c @ torch.diag(torch.exp(rates * delta * j) * hold) @ b).real for j in range(len(x))]
    wanted = torch.stack(
        [sum(x[t - j] @ kernel[j].T for j in range(t + 1)) + x[t] @ p["skip"].T for t in range(len(x))]
    )
    torch.testing.assert_close(run(cell, x), wanted, rtol=1e-10, atol=1e-12)


def test_an_lssls_gap_is_as_many_events_of_zeros() -> None:
    cell = DiagonalLSSL(IN, UNITS, 6, seed=2, delta=(0.1, 0.5)).double()
    x = events(3)
    spread = torch.stack([x[0], x[1], torch.zeros_like(x[0]), torch.zeros_like(x[0]), x[2]])
    dt = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)[:, None].expand(3, KEYS)
    torch.testing.assert_close(run(cell, x, dt)[-1], run(cell, spread)[-1], rtol=1e-12, atol=1e-14)


@kinds
@given(first=st.floats(0.01, 20), second=st.floats(0.01, 20))
@settings(max_examples=15, deadline=None)
def test_two_gaps_forget_what_one_of_their_sum_does(kind: str, first: float, second: float) -> None:
    """Of a unit that neither writes nor forgets at an event."""
    cell = CELLS[kind]().double()
    with torch.no_grad():
        for name in ("bias_z", "bias_i"):
            if hasattr(cell, name):
                cell.param(name).fill_(-80.0)
    still = torch.zeros(KEYS, IN, dtype=torch.float64)
    start = torch.ones_like(cell.init_state(KEYS)["s"])

    def gap(s: Tensor, dt: float) -> Tensor:
        return cell.advance(still, s, torch.full((KEYS,), dt, dtype=torch.float64))

    torch.testing.assert_close(gap(gap(start, first), second), gap(start, first + second), rtol=1e-9, atol=1e-14)


def test_without_timing_a_gap_means_nothing_to_a_gated_cell() -> None:
    cell = MinGRU(IN, UNITS).double()
    x = events(5)
    assert torch.equal(run(cell, x), run(cell, x, torch.full((5, KEYS), 9.0, dtype=torch.float64)))


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_units_start_with_time_constants_between_two_events_and_the_horizon(kind: type[Gated]) -> None:
    cell = kind(IN, 200, horizon=50.0)
    keep, _, _ = cell.gates(torch.zeros(1, IN))
    times = 1.0 / (1.0 - keep[0].detach())
    assert times.min() >= 1.99
    assert times.max() <= 50.1
    middle = math.sqrt(2.0 * 50.0)  # of a log-uniform draw of 200, the median is off by less than 4 / sqrt(200) / 2
    assert abs(math.log(times.median().item() / middle)) < 4 / math.sqrt(200) / 2 * math.log(50.0 / 2.0)


@kinds
def test_growth_leaves_what_was_read_unchanged(kind: str) -> None:
    cell = CELLS[kind]().double()
    x, dt = events(20), torch.rand(20, KEYS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    same, grown = cell.init_state(KEYS), cell.init_state(KEYS)
    larger = CELLS[kind]().double()
    for t in range(20):
        if t == 10:
            larger.grow(4)
            grown = larger.grown(grown)
        h, same = cell.step(x[t], same, dt[t])
        g, grown = larger.step(x[t], grown, dt[t])
        torch.testing.assert_close(g[:, : h.shape[1]], h, rtol=1e-12, atol=1e-14)


@kinds
def test_a_grown_cell_draws_the_units_of_one_that_was_built_larger(kind: str) -> None:
    grown, built = CELLS[kind](), CELLS[kind](UNITS + 2)
    grown.grow(2)
    for name in grown.traced:
        if name.startswith(("log_delta", "weight", "bias", "frequency")):
            torch.testing.assert_close(grown.param(name), built.param(name))


@kinds
def test_new_units_can_learn(kind: str) -> None:
    cell = CELLS[kind]()
    cell.grow(2)
    head = nn.Linear(cell.width, 1)
    state = cell.init_state(KEYS)
    for event in events(4).float():
        h, state = cell.step(event, state)
    head(h).sum().backward()
    name = "out_re" if kind == "LSSL" else "weight_h"
    grad = cell.param(name).grad
    assert grad is not None
    assert (grad[UNITS:].abs().sum(1) > 0).all()


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of operations and sizes of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.done.append((str(func), out.nbytes if isinstance(out, Tensor) else 0))
        return out


@kinds
def test_the_work_of_an_event_is_the_same_after_300(kind: str) -> None:
    cell = CELLS[kind]()
    state = cell.init_state(KEYS)
    x = events(1)[0].float()
    spent = []
    with torch.no_grad():
        for event in range(301):
            if event in (0, 300):
                with Count() as count:
                    cell.step(x, state)
                spent.append((count.done, {name: value.shape for name, value in state.items()}))
            _, state = cell.step(x, state)
    assert spent[0] == spent[1]


@kinds
def test_weights_come_from_the_seed_alone(kind: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = CELLS[kind]()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = CELLS[kind](), CELLS[kind](seed=1)
    first.grow(1)
    second.grow(1)
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name))
    assert any(not torch.equal(value, other.get_parameter(name)) for name, value in CELLS[kind]().named_parameters())


@kinds
def test_the_same_events_give_the_same_bits(kind: str) -> None:
    x = events(20)
    assert torch.equal(run(CELLS[kind]().double(), x), run(CELLS[kind]().double(), x))


def test_a_row_of_weights_depends_on_its_number_alone() -> None:
    assert torch.equal(uniform_rows(7, 0, 9, 4, 1.0)[5:], uniform_rows(7, 5, 4, 4, 1.0))
