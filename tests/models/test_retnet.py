import pytest
import torch
from torch import Tensor
from torch.nn import functional

from streamcl.models.retnet import RetNet

IN, WIDTH, KEYS = 5, 7, 3


def made(**options: object) -> RetNet:
    return RetNet(IN, WIDTH, heads=2, key=6, value=4, **options).double()  # type: ignore[arg-type]


def events(length: int) -> Tensor:
    return torch.randn(length, KEYS, IN, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def run(net: RetNet, x: Tensor, dt: Tensor | None = None) -> Tensor:
    state = net.init_state(x.shape[1])
    found = []
    for t in range(len(x)):
        h, state = net.step(x[t], state, None if dt is None else dt[t])
        found.append(h.detach())
    return torch.stack(found)


def parallel(net: RetNet, x: Tensor) -> Tensor:
    """The paper's equation 5, (Q K^T * D) V with D_nm = gamma^(n - m) for n >= m, per key and head; then equation 8."""
    found = torch.empty(len(x), x.shape[1], WIDTH, dtype=x.dtype)
    age = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
    for b in range(x.shape[1]):
        heads = []
        for i in range(net.heads):
            q, k, v = (x[:, b] @ w[i].T for w in (net.weight_q, net.weight_k, net.weight_v))
            d = torch.where(age >= 0, net.gamma[i] ** age.clamp_min(0), 0.0)
            heads.append(functional.layer_norm((net.scale * q @ k.T * d) @ v, (net.value,)))
        gate = functional.silu(x[:, b] @ net.weight_g.T)
        found[:, b] = (gate * torch.cat(heads, 1)) @ net.weight_o.T
    return found.detach()


@pytest.mark.parametrize("mimetic", [False, True])
def test_the_recurrent_form_is_the_parallel_form(mimetic: bool) -> None:
    net = made(mimetic=mimetic)
    x = events(30)
    torch.testing.assert_close(run(net, x), parallel(net, x), rtol=1e-9, atol=1e-10)


def test_a_gap_is_as_many_events_of_zeros() -> None:
    net = made()
    x = events(3)
    spread = torch.stack([x[0], x[1], torch.zeros_like(x[0]), torch.zeros_like(x[0]), x[2]])
    dt = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)[:, None].expand(3, KEYS)
    torch.testing.assert_close(run(net, x, dt)[-1], run(net, spread)[-1], rtol=1e-12, atol=1e-14)


def test_heads_forget_at_the_papers_rates() -> None:
    torch.testing.assert_close(RetNet(IN, WIDTH, heads=3).gamma, 1.0 - torch.tensor([1 / 32, 1 / 64, 1 / 128]))


@pytest.mark.parametrize("mimetic", [False, True])
def test_growth_leaves_h_unchanged_and_new_queries_learn(mimetic: bool) -> None:
    net, larger = made(mimetic=mimetic), made(mimetic=mimetic)
    x = events(20)
    same, grown = net.init_state(KEYS), net.init_state(KEYS)
    for t in range(20):
        if t == 10:
            larger.grow(4)
            grown = larger.grown(grown)
        h, same = net.step(x[t], same)
        g, grown = larger.step(x[t], grown)
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-14)
    g.sum().backward()  # type: ignore[no-untyped-call]
    assert larger.weight_q.grad is not None
    assert larger.weight_q.grad[:, 6:].abs().sum() > 0


def test_a_mimetic_start_finds_what_was_stored_under_an_equal_key() -> None:
    """One-hot keys: q k^T is 1 for the same key and 0 for others, so that o is the value, but for decay."""
    net = made(mimetic=True)
    x = torch.eye(IN, dtype=torch.float64)
    for head in range(net.heads):
        torch.testing.assert_close((x @ net.weight_q[head].T) @ (x @ net.weight_k[head].T).T, x, atol=1e-6, rtol=0)
    assert net.gamma.min() >= 1.0 - 2.0**-10


def test_more_inputs_than_rows_start_with_orthonormal_rows() -> None:
    net = RetNet(9, WIDTH, key=4, mimetic=True)
    torch.testing.assert_close(net.weight_k[0] @ net.weight_k[0].T, torch.eye(4), atol=1e-6, rtol=0)


def test_keys_and_values_learn_only_if_told_so() -> None:
    x = events(2)
    for learn in (False, True):
        net = made(learn_keys=learn)
        _, state = net.step(x[0], net.init_state(KEYS))
        h, _ = net.step(x[1], state)
        h.sum().backward()  # type: ignore[no-untyped-call]
        assert [p.grad is not None for p in (net.weight_k, net.weight_v)] == [learn, learn]
        assert net.weight_q.grad is not None


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = made(seed=3, mimetic=True)
    torch.manual_seed(2)
    second, other = made(seed=3, mimetic=True), made(seed=4, mimetic=True)
    for name, value in first.named_parameters():
        assert torch.equal(value, second.get_parameter(name))
        assert not torch.equal(value, other.get_parameter(name))


def test_the_state_has_a_constant_size() -> None:
    net = made()
    state = net.init_state(KEYS)
    for event in events(50):
        _, state = net.step(event, state)
        assert state["S"].shape == (KEYS, 2, 6, 4)
