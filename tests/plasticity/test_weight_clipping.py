import math

import pytest
import torch
from torch import nn

from streamcl.plasticity import WeightClipping
from tests.plasticity.nets import STEP, Net, convolutional, mlp


def test_no_number_leaves_its_layers_bound() -> None:
    net, slow = (Net(mlp(4, 3, 5, 2), rate=0.3) for _ in range(2))
    rule = WeightClipping(net.dense, net.module, 0.5)
    net.rules.append(rule)
    touched = 0
    for i in range(30):
        for each in (net, slow):
            each.learn(1, i)
        for name, fan_in in (("0", 4), ("2", 3), ("4", 5)):
            for part in (slow.weight(name), slow.bias(name)):
                w, limit = part.view(-1), 0.5 / math.sqrt(fan_in)
                for k in range(len(w)):
                    touched += abs(float(w[k])) > limit
                    w[k] = min(max(float(w[k]), -limit), limit)
        assert torch.equal(net.dense.flat, slow.dense.flat)
    assert touched > 50


def test_one_step_by_hand() -> None:
    net = Net(mlp(4, 1, 1))
    rule = WeightClipping(net.dense, net.module, 3.0)  # 1.5 below, 3 above
    net.dense.flat.copy_(torch.tensor([1.4, 1.6, -9.0, 0.0, 2.0, 2.9, -3.1]))
    rule.after(STEP)
    assert net.dense.flat.tolist() == pytest.approx([1.4, 1.5, -1.5, 0.0, 1.5, 2.9, -3.0])


def test_a_kernel_counts_and_a_norm_is_left_alone() -> None:
    net = Net(convolutional(norm=True))
    rule = WeightClipping(net.dense, net.module, 2.0)
    upper = {name: set(net.dense.part(rule.upper, name).reshape(-1).tolist()) for name in net.dense.params}
    assert upper["0.weight"] == upper["0.bias"] == {2.0 / math.sqrt(2 * 3 * 3)}
    assert upper["6.weight"] == {2.0 / math.sqrt(64)}
    assert upper["1.weight"] == upper["1.bias"] == {math.inf}


def test_only_what_is_named_is_clipped() -> None:
    net = Net(mlp(4, 3, 1))
    rule = WeightClipping(net.dense, net.module, 0.1, only=["0"])
    net.dense.flat.fill_(7.0)
    rule.after(STEP)
    assert net.weight("2").tolist() == [[7.0] * 3]
    assert net.bias("0").tolist() == pytest.approx([0.05] * 3)


def test_a_layer_that_is_the_module_itself_is_clipped() -> None:
    net = Net(nn.Linear(4, 1).double())
    WeightClipping(net.dense, net.module, 0.1).after(STEP)
    assert net.dense.flat.abs().max() <= 0.05


def test_an_infinite_bound_changes_no_bit() -> None:
    net, twin = (Net(mlp(3, 5, 1), "adam") for _ in range(2))
    net.rules.append(WeightClipping(net.dense, net.module, math.inf))
    for each in (net, twin):
        each.learn(30)
    assert torch.equal(net.dense.flat, twin.dense.flat)
