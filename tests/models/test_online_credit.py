from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from streamcl.models.linear_state import DiagonalLSSL, ElementWise, KeyState, MinGRU, MinLSTM
from streamcl.models.online_credit import OnlineCredit

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
@pytest.mark.parametrize("length", [1, 2, 40, 200])
def test_the_gradient_of_one_event_is_that_of_backpropagation_through_the_whole_past(
    kind: str, length: int, timed: bool
) -> None:
    cell = CELLS[kind]().double()
    head = head_for(cell.width)
    x, dt = events(length)
    wanted = through_time(cell, head, x, dt if timed else None)
    found, _ = by_traces(OnlineCredit(cell), head, x, dt if timed else None)
    assert_equal(found, wanted, 1e-10)
