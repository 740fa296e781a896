from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from streamcl.models.linear_state import ElementWise, KeyState, MinGRU, MinLSTM
from streamcl.models.lssl import DiagonalLSSL
from streamcl.models.online_credit import OnlineCredit, Stack

IN, UNITS, OUT, KEYS = 5, 6, 3, 4

CELLS: dict[str, Callable[[], ElementWise]] = {
    "minGRU": lambda: MinGRU(IN, UNITS, seed=1, horizon=8),
    "minGRU with an output gate": lambda: MinGRU(IN, UNITS, seed=1, horizon=8, output_gate=True),
    "minGRU that fades": lambda: MinGRU(IN, UNITS, seed=1, horizon=8, timed=True),
    "minLSTM": lambda: MinLSTM(IN, UNITS, seed=1, horizon=8),
    "minLSTM that fades": lambda: MinLSTM(IN, UNITS, seed=1, horizon=8, timed=True, output_gate=True),
    "LSSL": lambda: DiagonalLSSL(IN, UNITS, UNITS, seed=1, delta=(0.05, 0.5)),
}
kinds = pytest.mark.parametrize("kind", sorted(CELLS))


def events(length: int, keys: int = KEYS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x (T, B, in) and dt (T, B)."""
    made = torch.Generator().manual_seed(length)
    x = torch.randn(length, keys, IN, generator=made, dtype=dtype)
    return x, 0.1 + 2.0 * torch.rand(length, keys, generator=made, dtype=dtype)


def loss_of(head: nn.Linear, h: Tensor) -> Tensor:
    return torch.tanh(head(h)).square().sum()


def head_for(width: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    head = nn.Linear(width, OUT, dtype=dtype)
    with torch.no_grad():
        for param in head.parameters():
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(9), dtype=dtype))
    return head


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def through_time(cell: ElementWise, head: nn.Linear, x: Tensor, dt: Tensor | None) -> dict[str, Tensor]:
    """The oracle: of the last event's loss, by autograd through the unrolled recurrence."""
    cell.zero_grad()
    state = cell.init_state(x.shape[1])
    for t in range(len(x)):
        h, state = cell.step(x[t], state, None if dt is None else dt[t])
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    return gradients(cell)


def by_traces(
    credit: OnlineCredit, head: nn.Linear, x: Tensor, dt: Tensor | None
) -> tuple[dict[str, Tensor], KeyState]:
    credit.zero_grad()
    state = credit.init_state(x.shape[1])
    for t in range(len(x)):
        h, state = credit.step(x[t], state, None if dt is None else dt[t])
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    return gradients(credit.cell), state


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, grad in wanted.items():
        scale = max(grad.abs().max().item(), 1.0)
        assert (found[name] - grad).abs().max().item() <= tolerance * scale, name


@kinds
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 60])
def test_the_gradient_of_one_event_is_that_of_backpropagation_through_the_whole_past(
    kind: str, length: int, timed: bool
) -> None:
    cell = CELLS[kind]().double()
    head = head_for(cell.width)
    x, dt = events(length)
    wanted = through_time(cell, head, x, dt if timed else None)
    found, _ = by_traces(OnlineCredit(cell), head, x, dt if timed else None)
    assert_equal(found, wanted, 1e-10)


@kinds
def test_in_single_precision_the_gradient_over_300_events_agrees_to_1e_5(kind: str) -> None:
    cell = CELLS[kind]()
    head = head_for(cell.width, torch.float32)
    x, _ = events(300, dtype=torch.float32)
    wanted = through_time(cell, head, x, None)
    found, _ = by_traces(OnlineCredit(cell), head, x, None)
    assert_equal(found, wanted, 1e-5)


@kinds
def test_the_gradient_into_the_input_is_that_of_this_event(kind: str) -> None:
    cell = CELLS[kind]().double()
    x, _ = events(5)
    credit = OnlineCredit(cell)
    plain, traced = cell.init_state(KEYS), credit.init_state(KEYS)
    for t in range(4):
        _, plain = cell.step(x[t], plain)
        _, traced = credit.step(x[t], traced)
    last = x[4].clone().requires_grad_()
    wanted = torch.autograd.grad(cell.step(last, plain)[0].sum(), last)[0]
    found = torch.autograd.grad(credit.step(last, traced)[0].sum(), last)[0]
    assert torch.equal(found, wanted)


@kinds
def test_h_and_the_state_are_the_cells_own(kind: str) -> None:
    cell = CELLS[kind]()
    x, dt = events(7, dtype=torch.float32)
    credit = OnlineCredit(cell)
    plain, traced = cell.init_state(KEYS), credit.init_state(KEYS)
    for t in range(len(x)):
        wanted, plain = cell.step(x[t], plain, dt[t])
        h, traced = credit.step(x[t], traced, dt[t])
        assert torch.equal(h, wanted)
        assert torch.equal(traced["s"], plain["s"])


@kinds
def test_a_keys_traces_are_those_it_would_have_alone(kind: str) -> None:
    credit = OnlineCredit(CELLS[kind]().double())
    x, _ = events(9)
    together, alone = credit.init_state(KEYS), credit.init_state(1)
    for t in range(len(x)):
        _, together = credit.step(x[t], together)
        _, alone = credit.step(x[t][2:3], alone)
    for name, value in alone.items():
        torch.testing.assert_close(together[name][2:3], value, rtol=1e-12, atol=1e-14)


@kinds
def test_what_is_carried_has_no_graph_and_a_constant_size(kind: str) -> None:
    credit = OnlineCredit(CELLS[kind]())
    x, _ = events(30, dtype=torch.float32)
    state = credit.init_state(KEYS)
    shapes = {name: value.shape for name, value in state.items()}
    for t in range(len(x)):
        old = {name: value.clone() for name, value in state.items()}
        _, new = credit.step(x[t], state)
        assert all(torch.equal(state[name], value) for name, value in old.items())  # a ticket may hold it
        assert {name: value.shape for name, value in new.items()} == shapes
        assert not any(value.requires_grad for value in new.values())
        state = new


def weighted_past(cell: ElementWise, head: nn.Linear, x: Tensor, decay: float) -> dict[str, Tensor]:
    """The oracle of fixed feedback: each event's own derivative of s, weighed by decay^age, times dL/ds at the end."""
    state = cell.init_state(x.shape[1])
    own = []  # per event, the new state with the old one held
    for t in range(len(x)):
        s = cell.advance(x[t], state["s"].detach(), None)
        own.append(s)
        state = {"s": s}
    last = own[-1].detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(head, cell.read(x[-1], last)), last)
    total = {name: torch.zeros_like(cell.param(name)) for name in cell.traced}
    for age, s in enumerate(reversed(own)):
        found = torch.autograd.grad((g * s).sum(), [cell.param(name) for name in cell.traced], allow_unused=True)
        for name, grad in zip(cell.traced, found, strict=True):
            if grad is not None:
                total[name] += decay**age * grad
    return total


@kinds
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_fixed_feedback_weighs_each_events_own_derivative_by_its_age(kind: str, decay: float) -> None:
    cell = CELLS[kind]().double()
    head = head_for(cell.width)
    x, _ = events(12)
    found, _ = by_traces(OnlineCredit(cell, decay), head, x, None)
    assert_equal(found, weighted_past(cell, head, x, decay), 1e-12)


@kinds
def test_feedback_of_zero_is_backpropagation_through_one_step(kind: str) -> None:
    cell = CELLS[kind]().double()
    head = head_for(cell.width)
    x, _ = events(6)
    found, _ = by_traces(OnlineCredit(cell, 0.0), head, x, None)
    cell.zero_grad()
    state = cell.init_state(KEYS)
    for t in range(len(x)):
        h, state = cell.step(x[t], {name: value.detach() for name, value in state.items()})
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    assert_equal(found, gradients(cell), 1e-13)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_feedback_that_would_not_fade_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        OnlineCredit(CELLS["minGRU"](), decay)


@kinds
def test_after_a_growth_traces_stay_exact(kind: str) -> None:
    cell = CELLS[kind]().double()
    credit = OnlineCredit(cell)
    x, _ = events(20)
    state = credit.init_state(KEYS)
    for t in range(10):
        _, state = credit.step(x[t], state)
    credit.grow(3)
    state = credit.grown(state)
    wanted_shapes = {name: value.shape for name, value in credit.init_state(KEYS).items()}
    assert {name: value.shape for name, value in state.items()} == wanted_shapes
    head = head_for(cell.width)
    for t in range(10, 20):
        h, state = credit.step(x[t], state)
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    found = gradients(cell)

    # the oracle: as if the new units had been there and had read nothing until then
    cell.zero_grad()
    plain = cell.init_state(KEYS)
    for t in range(20):
        h, plain = cell.step(x[t], plain)
        if t == 9:
            new = torch.cat([torch.full((UNITS,), 1.0), torch.zeros(3)]).double().repeat(cell.parts)
            plain = {"s": plain["s"] * new}
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    assert_equal(found, gradients(cell), 1e-11)


def test_across_layers_the_past_of_the_layer_below_is_seen_through_this_event_alone() -> None:
    """The oracle unrolls all, and cuts what the upper layer remembers of earlier outputs of the lower one."""
    lower, upper = MinGRU(IN, UNITS, seed=1, horizon=8).double(), MinLSTM(UNITS, UNITS, seed=2, horizon=8).double()
    head = head_for(UNITS)
    x, _ = events(15)
    stack = Stack([OnlineCredit(lower), OnlineCredit(upper)])
    state = stack.init_state(KEYS)
    for t in range(len(x)):
        h, state = stack.step(x[t], state)
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    found = gradients(lower), gradients(upper)
    stack.zero_grad()
    below, above = lower.init_state(KEYS), upper.init_state(KEYS)
    for t in range(len(x)):
        middle, below = lower.step(x[t], below)
        h, above = upper.step(middle if t == len(x) - 1 else middle.detach(), above)
    loss_of(head, h).backward()  # type: ignore[no-untyped-call]
    assert_equal(found[0], gradients(lower), 1e-11)
    assert_equal(found[1], gradients(upper), 1e-11)
