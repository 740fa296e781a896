import copy
import math

import pytest
import torch

from streamcl.plasticity import UPGD
from streamcl.random import key_of, noise_array
from tests.plasticity.nets import Net, convolutional, example, mlp, transformed


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


class Oracle:
    """The formula weight by weight, in Python's own floats; a row is what stands on the last axis."""

    def __init__(self, net: Net, rate: float, sigma: float, strength: float, local: bool, protecting: bool) -> None:
        self.net, self.rate, self.sigma, self.strength = net, rate, sigma, strength
        self.local, self.protecting, self.t = local, protecting, 0
        self.u = [[0.0] * p.numel() for p in net.module.parameters()]

    def learn(self, i: int, beta: float) -> None:
        x, y = example(self.net.module, i)
        params = list(self.net.module.parameters())
        gradients = torch.autograd.grad(((self.net.module(x) - y) ** 2).sum(1).mean(), params)
        noise = noise_array(key_of(2, "upgd"), self.t, len(self.net.dense.flat)).tolist()
        self.t += 1
        unbias = 1.0 - beta**self.t
        for u, param, gradient in zip(self.u, params, gradients, strict=True):
            for k, (w, g) in enumerate(zip(param.reshape(-1).tolist(), gradient.reshape(-1).tolist(), strict=True)):
                u[k] = beta * u[k] + (1.0 - beta) * (-g * w)
        most = max(max(u) for u in self.u)
        place = 0
        with torch.no_grad():
            for u, param, gradient in zip(self.u, params, gradients, strict=True):
                w, g, width = param.view(-1), gradient.reshape(-1), param.shape[-1]
                for k in range(len(w)):
                    row = u[k // width * width : (k // width + 1) * width]
                    norm = math.sqrt(sum((v / unbias) ** 2 for v in row))
                    s = sigmoid(u[k] / unbias / (norm if self.local else most)) if norm or not self.local else 0.5
                    xi = self.sigma * noise[place]
                    step = (float(g[k]) + xi) * (1.0 - s) if self.protecting else float(g[k]) + xi * (1.0 - s)
                    w[k] = (1.0 - self.rate * self.strength) * float(w[k]) - self.rate * step
                    place += 1


@pytest.mark.parametrize("protecting", [True, False])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_weights_follow_the_formula_number_by_number(local: bool, protecting: bool, beta: float) -> None:
    net, slow = (Net(mlp(3, 5, 2), rate=0.05) for _ in range(2))
    made = {"sigma": 0.1, "strength": 0.02, "local": local, "protecting": protecting}
    net.rules.append(UPGD(net.dense, decay=beta, seed=2, **made))  # type: ignore[arg-type]
    oracle = Oracle(slow, 0.05, **made)  # type: ignore[arg-type]
    for i in range(30):
        net.learn(1, i)
        oracle.learn(i, beta)
        torch.testing.assert_close(net.dense.flat, slow.dense.flat, rtol=1e-9, atol=1e-11)


def test_one_step_by_hand() -> None:
    net = Net(mlp(1, 1, 1))
    net.dense.flat.copy_(torch.tensor([2.0, 1.0, -1.0, 0.0]))
    rule = UPGD(net.dense, decay=0.5, sigma=0.0, strength=0.1)
    taken = transformed(rule, torch.tensor([-4.0, 2.0, 4.0, 3.0], dtype=torch.float64))
    # u = half of 8, -2, 4, 0; unbiased 8, -2, 4, 0; the largest u is 4: ratios 2, -1/2, 1, 0.
    assert rule.utility.tolist() == [4.0, -1.0, 2.0, 0.0]
    closed = [sigmoid(r) for r in (2.0, -0.5, 1.0, 0.0)]
    expected = [g * (1.0 - s) + 0.1 * w for g, s, w in zip((-4, 2, 4, 3), closed, (2, 1, -1, 0), strict=True)]
    assert taken.tolist() == pytest.approx(expected)


def test_defaults_are_those_of_the_paper() -> None:
    rule = UPGD(Net(mlp(3, 4, 1)).dense)
    assert (rule.decay, rule.sigma, rule.strength, rule.local, rule.protecting) == (0.9999, 0.1, 0.01, False, True)


def test_where_no_utility_is_positive_nothing_harmful_is_protected() -> None:
    net = Net(mlp(1, 1, 1))
    net.dense.flat.copy_(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    rule = UPGD(net.dense, sigma=0.0, strength=0.0)
    taken = transformed(rule, torch.tensor([4.0, 1.0, 5.0, 0.0], dtype=torch.float64))
    assert taken.tolist() == [4.0, 1.0, 2.5, 0.0]


def test_without_noise_decay_and_protection_training_is_bit_for_bit_what_it_was() -> None:
    net, twin = (Net(mlp(3, 5, 1, dtype=torch.float32)) for _ in range(2))
    net.rules.append(UPGD(net.dense, sigma=0.0, strength=0.0, protecting=False))
    for each in (net, twin):
        each.learn(30)
    assert torch.equal(net.dense.flat, twin.dense.flat)


def test_a_filter_is_one_row() -> None:
    net = Net(convolutional())
    rule = UPGD(net.dense, local=True)
    lengths = rule._lengths.tolist()
    assert lengths[:7] == [18, 18, 18, 3, 27, 27, 27]
    assert sum(lengths) == len(net.dense.flat)


@pytest.mark.parametrize("local", [False, True])
def test_utilities_and_noise_go_on_where_they_were(local: bool) -> None:
    whole, other = (Net(mlp(3, 5, 1, dtype=torch.float32, seed=s)) for s in (0, 1))
    rule, again = (UPGD(net.dense, local=local, decay=0.9) for net in (whole, other))
    whole.rules, other.rules = [rule], [again]
    whole.learn(17)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(20, 17)
    other.learn(4)
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(20, 17)
    assert torch.equal(whole.dense.flat, other.dense.flat)
    again.load_state_dict({})
    assert (again.step, bool(again.utility.any())) == (0, False)


def test_a_unit_made_anew_has_no_utility_yet() -> None:
    net = Net(mlp(3, 4, 1))
    rule = UPGD(net.dense)
    net.rules.append(rule)
    reset = net.continual_backprop(rate=0.1, maturity=3)
    while not sum(reset.replaced):
        net.learn(1, reset.step)
    r = int(reset.born.argmax())
    assert not net.dense.part(rule.utility, "0.weight")[r].any()
    assert not net.dense.part(rule.utility, "2.weight")[:, r].any()
    assert rule.utility.count_nonzero() > 4
