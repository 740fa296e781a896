import math

import torch
from torch import Tensor

from streamcl.models.context import LongContext, ShortMemory
from streamcl.models.linear_state import KeyState, MinGRU, Recurrent
from streamcl.models.lssl import DiagonalLSSL
from streamcl.models.online_credit import OnlineCredit

IN, KEYS, CATEGORIES = 5, 3, 2


def events(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, KEYS, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(backbone: Recurrent, x: Tensor, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
    state = backbone.init_state(x.shape[1])
    found = []
    for t in range(len(x)):
        h, state = backbone.step(x[t], state, None if dt is None else dt[t])
        found.append(h.detach())
    return torch.stack(found), state


def in_category(x: Tensor, categories: list[int]) -> Tensor:
    """Events whose first numbers are a one-hot of their category, the same for all keys."""
    x = x.clone()
    x[..., :CATEGORIES] = torch.eye(CATEGORIES, dtype=x.dtype)[torch.tensor(categories)][:, None]
    return x


def test_a_short_memory_of_weight_zero_leaves_its_backbone_as_it_is() -> None:
    cell = MinGRU(IN, 4).double()
    x = events(6)
    found = run(ShortMemory(cell, IN).double(), x)[0]
    torch.testing.assert_close(found, run(cell, x)[0], rtol=1e-13, atol=1e-15)


def test_a_short_memory_adds_the_last_inputs_under_a_gate() -> None:
    cell = MinGRU(IN, 4).double()
    memory = ShortMemory(cell, IN, window=2, seed=1).double()
    with torch.no_grad():
        memory.kernel.copy_(torch.tensor([[0.5], [0.25]]).expand(2, IN))
    x = events(6)
    gate = torch.sigmoid(x @ memory.weight.T + memory.bias)
    one, two = (torch.cat((torch.zeros_like(x[:n]), x[:-n])) for n in (1, 2))
    corrected = (x + gate * (0.5 * one + 0.25 * two)).detach()
    torch.testing.assert_close(run(memory, x)[0], run(cell, corrected)[0], rtol=1e-12, atol=1e-14)


def test_a_short_memory_can_start_as_a_sum_with_the_last_input() -> None:
    memory = ShortMemory(MinGRU(IN, 4), IN, window=3, start=1.0)
    assert memory.kernel.detach().tolist() == [[1.0] * IN, [0.0] * IN, [0.0] * IN]


def test_a_short_memory_learns_and_carries_no_graph() -> None:
    memory = ShortMemory(OnlineCredit(MinGRU(IN, 4)), IN)
    state = memory.init_state(KEYS)
    for event in events(4).float():
        h, state = memory.step(event, state)
        assert not any(value.requires_grad for value in state.values())
    h.sum().backward()  # type: ignore[no-untyped-call]
    assert memory.kernel.grad is not None
    assert memory.kernel.grad.abs().sum() > 0


def test_an_event_moves_the_state_of_its_category_alone() -> None:
    """Each category's part of h is that of a backbone that saw only this category's events, by their distances."""
    cell = DiagonalLSSL(IN, 4, 6, delta=(0.1, 0.5)).double()
    long = LongContext(cell, IN, CATEGORIES).double()
    categories = [0, 1, 1, 0, 1, 0, 0, 1]
    x = in_category(events(len(categories)), categories)
    dt = 0.1 + torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found, state = run(long, x, dt)
    clock = dt.cumsum(0)
    for category in range(CATEGORIES):
        own = [t for t, c in enumerate(categories) if c == category]
        since = torch.diff(clock[own], dim=0, prepend=torch.zeros_like(clock[:1]))
        wanted, _ = run(cell, x[own], since)
        torch.testing.assert_close(found[own][..., :6], wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state["elapsed"][:, category], clock[-1] - clock[own[-1]], atol=1e-12, rtol=0)


def test_attention_is_over_the_last_events_and_no_others() -> None:
    long = LongContext(MinGRU(IN, 4), IN, CATEGORIES, window=3, attention=2, seed=5).double()
    x = in_category(events(7), [0, 1, 0, 0, 1, 1, 0])
    found, _ = run(long, x)
    q, k, v = (long.get_parameter(f"weight_{part}").detach() for part in "qkv")
    for t in range(7):
        for b in range(KEYS):
            last = x[max(t - 2, 0) : t + 1, b]
            weights = ((x[t, b] @ q.T) @ (last @ k.T).T / math.sqrt(2)).softmax(0)
            torch.testing.assert_close(found[t, b, 4:], weights @ (last @ v.T), rtol=1e-10, atol=1e-12)


def test_a_state_per_category_goes_with_traces() -> None:
    cell = MinGRU(IN, 4, horizon=8).double()
    long = LongContext(OnlineCredit(cell), IN, CATEGORIES).double()
    categories = [0, 1, 0, 1, 0]
    x = in_category(events(5), categories)
    state = long.init_state(KEYS)
    for event in x:
        h, state = long.step(event, state)
    h[:, :4].sum().backward()  # type: ignore[no-untyped-call]
    found = [cell.param(name).grad for name in cell.traced]
    plain = cell.init_state(KEYS)
    for event in x[[0, 2, 4]]:
        h, plain = cell.step(event, plain)
    wanted = torch.autograd.grad(h.sum(), [cell.param(name) for name in cell.traced])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_state_has_a_constant_size() -> None:
    long = LongContext(OnlineCredit(MinGRU(IN, 4)), IN, CATEGORIES)
    state = long.init_state(KEYS)
    shapes = {name: value.shape for name, value in state.items()}
    for event in in_category(events(20), [0, 1] * 10).float():
        _, state = long.step(event, state)
        assert {name: value.shape for name, value in state.items()} == shapes
        assert not any(value.requires_grad for value in state.values())
