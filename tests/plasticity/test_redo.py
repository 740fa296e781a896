import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcl.plasticity import ReDo
from streamcl.random import key_of, uniform_array
from tests.plasticity.nets import Net, convolutional, example, mlp


def made(*widths: int, kind: str = "sgd", activation: type[nn.Module] = nn.ReLU, **settings: Any) -> tuple[Net, ReDo]:
    net = Net(mlp(*widths, activation=activation), kind, 0.05)
    rule = ReDo(net.dense, net.module, net.taps, **settings)
    net.rules.append(rule)
    return net, rule


def still(net: Net, steps: int, x: Tensor) -> None:
    for _ in range(steps):
        net.step(x, net.module(x).detach())


def fresh_row(seed: int, place: int, replaced: int, size: int) -> list[float]:
    draw = uniform_array(key_of(seed, f"redo.{place}"), size, replaced * size)
    return [float((2.0 * u - 1.0) * math.sqrt(6.0 / size)) for u in draw]


def test_units_at_or_below_tau_are_made_anew_and_no_others() -> None:
    net, rule = made(2, 5, 1, tau=0.25, every=4, seed=7)
    with torch.no_grad():
        net.weight("0").zero_()
        net.bias("0").copy_(torch.tensor([1.0, 0.25, 0.26, 2.49, 1.0], dtype=torch.float64))  # mean 1
        net.weight("2").fill_(3.0)
    bias, x = net.bias("2").clone(), torch.ones(1, 2, dtype=torch.float64)
    still(net, 3, x)
    assert rule.replaced == [0]
    still(net, 1, x)
    assert rule.replaced == [1]
    assert net.weight("2").tolist() == [[3.0, 0.0, 3.0, 3.0, 3.0]]
    assert net.weight("0")[1].tolist() == fresh_row(7, 0, 0, 2)
    assert net.bias("0").tolist() == [1.0, 0.0, 0.26, 2.49, 1.0]
    assert torch.equal(net.bias("2"), bias)  # nothing moves into it
    assert not rule.total.any()
    assert rule.read() == {"layer_0_replacements": 1.0}


def test_the_mean_is_over_the_steps_since_the_last_look_and_over_rows() -> None:
    net, rule = made(2, 4, 3, 1, activation=nn.Tanh, tau=0.0, every=50)
    expected = [0.0] * 7
    for i in range(12):
        net.learn(1, i, rows=3)
        place = 0
        for value in net.taps.vectors():
            for k in range(value.shape[1]):
                expected[place] += sum(abs(float(v)) for v in value[:, k]) / 3
                place += 1
    assert rule.total.tolist() == pytest.approx(expected)


class Oracle:
    """Unit by unit, in Python's own floats."""

    def __init__(self, net: Net, tau: float, every: int) -> None:
        self.net, self.tau, self.every, self.t = net, tau, every, 0
        self.total = [[0.0] * layer.units for layer in net.taps.layers]
        self.replaced = [0] * len(self.total)

    def after(self) -> None:
        self.t += 1
        for total, value in zip(self.total, self.net.taps.vectors(), strict=True):
            for i in range(len(total)):
                total[i] += sum(abs(float(v)) for v in value[:, i]) / len(value)
        if self.t % self.every:
            return
        dormant = [[i for i, v in enumerate(t) if v <= self.tau * (sum(t) / len(t))] for t in self.total]
        for place, (layer, units) in enumerate(zip(self.net.taps.layers, dormant, strict=True)):
            weight = self.net.weight(layer.incoming)
            for r in units:
                self.net.weight(layer.outgoing[0])[:, r] = 0.0
            for r in units:
                weight[r] = torch.tensor(fresh_row(0, place, self.replaced[place], weight.shape[1]), dtype=weight.dtype)
                self.net.bias(layer.incoming)[r] = 0.0
                self.replaced[place] += 1
        self.total = [[0.0] * len(t) for t in self.total]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_net_that_learns_follows_the_definition(rows: int) -> None:
    net, rule = made(3, 9, 8, 1, tau=0.6, every=5)
    slow = Net(mlp(3, 9, 8, 1), rate=0.05)
    oracle = Oracle(slow, 0.6, 5)
    for i in range(60):
        for each in (net, slow):
            each.step(*example(net.module, i, rows))
        oracle.after()
        assert rule.replaced == oracle.replaced
        torch.testing.assert_close(net.dense.flat, slow.dense.flat, rtol=1e-10, atol=1e-12)
    assert min(rule.replaced) > 5


def test_adam_starts_over_for_the_weights_of_a_unit_made_anew_and_for_no_others() -> None:
    net, rule = made(3, 6, 1, kind="adam", tau=0.0, every=10)
    with torch.no_grad():
        net.bias("0")[2] = -1e3  # dead
    net.learn(10)
    assert rule.replaced == [1]
    mine = torch.zeros(len(net.dense.flat), dtype=torch.bool)
    net.dense.part(mine, "0.weight")[2] = True
    net.dense.part(mine, "0.bias")[2] = True
    net.dense.part(mine, "2.weight")[:, 2] = True
    for slot in net.dense.slots:
        assert not slot[mine].any()
    assert (net.dense.slots[2][~mine] == 10.0).all()


def test_a_layer_that_has_said_nothing_is_made_anew_as_a_whole() -> None:
    net, rule = made(3, 4, 2, every=3)
    with torch.no_grad():
        net.bias("0").fill_(-1e3)
    net.learn(3)
    assert rule.replaced == [4]
    assert not net.weight("2").any()
    assert net.weight("0").reshape(-1).tolist() == fresh_row(0, 0, 0, 3) + fresh_row(0, 0, 1, 3) + fresh_row(
        0, 0, 2, 3
    ) + fresh_row(0, 0, 3, 3)


def test_channels_are_units() -> None:
    net = Net(convolutional())
    rule = ReDo(net.dense, net.module, net.taps, tau=0.0, every=2)
    net.rules.append(rule)
    with torch.no_grad():
        net.bias("3")[1] = -1e3
        net.bias("6").fill_(9.0)
    net.learn(2)
    assert rule.replaced == [0, 1, 0]
    assert not net.weight("6").view(5, 4, 16)[:, 1].any()


def test_while_no_unit_is_dormant_training_is_bit_for_bit_what_it_was() -> None:
    net, rule = made(3, 5, 1, activation=nn.Tanh, tau=0.0, every=2)
    twin = Net(mlp(3, 5, 1, activation=nn.Tanh), rate=0.05)
    for each in (net, twin):
        each.learn(30)
    assert rule.replaced == [0]
    assert torch.equal(net.dense.flat, twin.dense.flat)


def test_a_restart_between_two_looks_changes_no_bit() -> None:
    whole, rule = made(3, 9, 8, 1, kind="adam", tau=0.6, every=7)
    whole.learn(17)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(30, 17)
    other, again = made(3, 9, 8, 1, kind="adam", tau=0.6, every=7)
    other.learn(5)
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(30, 17)
    assert sum(rule.replaced) > sum(kept["replaced"]) > 0
    assert torch.equal(whole.dense.flat, other.dense.flat)
    assert again.replaced == rule.replaced
    again.load_state_dict({})
    assert (again.step, again.replaced, bool(again.total.any())) == (0, [0, 0], False)


def test_defaults_are_those_of_the_paper() -> None:
    _, rule = made(3, 4, 1)
    assert (rule.tau, rule.every) == (0.025, 1000)
