import copy

import torch

from streamcl.plasticity import L2Init
from tests.plasticity.nets import Net, mlp


def test_where_weights_began_is_remembered_over_a_restart() -> None:
    whole, other = Net(mlp(3, 5, 1)), Net(mlp(3, 5, 1, seed=4))
    rule = L2Init(whole.dense, 0.2)
    whole.rules.append(rule)
    whole.learn(20)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(20, 20)
    again = L2Init(other.dense, 0.2)
    other.rules.append(again)
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(20, 20)
    assert torch.equal(whole.dense.flat, other.dense.flat)
    again.load_state_dict({})
    assert torch.equal(again.anchor, other.dense.flat)


def test_a_unit_made_anew_is_pulled_to_what_it_was_made() -> None:
    net = Net(mlp(3, 4, 1))
    rule = L2Init(net.dense, 0.1)
    net.rules.append(rule)
    reset = net.continual_backprop(rate=0.1, maturity=3)
    while not sum(reset.replaced):
        net.learn(1, reset.step)
    r = int(reset.born.argmax())
    for name, part in (("0.weight", net.weight("0")[r]), ("0.bias", net.bias("0")[r])):
        assert torch.equal(net.dense.part(rule.anchor, name)[r], part)
    assert not net.dense.part(rule.anchor, "2.weight")[:, r].any()
    assert not torch.equal(rule.anchor, net.dense.flat)
