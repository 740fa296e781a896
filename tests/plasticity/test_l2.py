import pytest
import torch

from streamcl.plasticity import L2, L2Init
from tests.plasticity.nets import Net, example, mlp, transformed


def descend(net: Net, rate: float, strength: float, home: list[torch.Tensor] | None, i: int) -> None:
    """One step on a module of torch's own, parameter by parameter, number by number."""
    x, y = example(net.module, i)
    params = list(net.module.parameters())
    gradients = torch.autograd.grad(((net.module(x) - y) ** 2).sum(1).mean(), params)
    with torch.no_grad():
        for place, (param, gradient) in enumerate(zip(params, gradients, strict=True)):
            w, g = param.view(-1), gradient.reshape(-1)
            for k in range(len(w)):
                away = float(w[k]) - (float(home[place].reshape(-1)[k]) if home else 0.0)
                w[k] = float(w[k]) - rate * (float(g[k]) + strength * away)


@pytest.mark.parametrize("home", [False, True])
def test_weights_follow_the_formula_number_by_number(home: bool) -> None:
    net, slow = (Net(mlp(3, 4, 2), rate=0.05) for _ in range(2))
    net.rules.append(L2Init(net.dense, 0.3) if home else L2(net.dense, 0.3))
    first = [p.detach().clone() for p in slow.module.parameters()] if home else None
    for i in range(30):
        net.learn(1, i)
        descend(slow, 0.05, 0.3, first, i)
    torch.testing.assert_close(net.dense.flat, slow.dense.flat, rtol=1e-12, atol=1e-14)


def test_one_step_by_hand() -> None:
    net = Net(mlp(1, 1, 1), rate=0.5)
    with torch.no_grad():
        net.dense.flat.copy_(torch.tensor([2.0, 0.0, 3.0, 1.0]))
    rules = L2(net.dense, 0.1), L2Init(net.dense, 0.1)
    gradient = torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    assert transformed(rules[0], gradient).tolist() == pytest.approx([1.2, -1.0, 0.3, 2.1])
    net.dense.flat.add_(1.0)
    assert transformed(rules[1], gradient).tolist() == pytest.approx([1.1, -0.9, 0.1, 2.1])
    assert gradient.tolist() == [1.0, -1.0, 0.0, 2.0]


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "adam", "ftrl"])
def test_without_strength_training_is_bit_for_bit_what_it_was(kind: str) -> None:
    net, twin = (Net(mlp(3, 5, 1, dtype=torch.float32), kind) for _ in range(2))
    net.rules = [L2(net.dense, 0.0), L2Init(net.dense, 0.0)]
    for each in (net, twin):
        each.learn(30)
    assert torch.equal(net.dense.flat, twin.dense.flat)
