import copy

import pytest
import torch

from streamcl.plasticity import ShrinkAndPerturb
from streamcl.random import key_of, noise_array
from tests.plasticity.nets import STEP, Net, example, mlp, transformed


def made(seed: int = 0, kind: str = "sgd", **settings: float) -> tuple[Net, ShrinkAndPerturb]:
    net = Net(mlp(3, 4, 2, seed=seed), kind, rate=0.05)
    rule = ShrinkAndPerturb(net.dense, seed=5, **settings)  # type: ignore[arg-type]
    net.rules.append(rule)
    return net, rule


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_follow_the_formula_number_by_number(scaled: bool) -> None:
    net, _ = made(strength=0.3, sigma=0.01, scaled=scaled)
    slow = Net(mlp(3, 4, 2), rate=0.05)
    for i in range(20):
        net.learn(1, i)
        x, y = example(slow.module, i)
        params = list(slow.module.parameters())
        gradients = torch.autograd.grad(((slow.module(x) - y) ** 2).sum(1).mean(), params)
        noise, place = noise_array(key_of(5, "shrink_and_perturb"), i, len(slow.dense.flat)), 0
        with torch.no_grad():
            for param, gradient in zip(params, gradients, strict=True):
                w, g = param.view(-1), gradient.reshape(-1)
                for k in range(len(w)):
                    xi = 0.01 * float(noise[place])
                    inside, outside = (xi, 0.0) if scaled else (0.0, xi)
                    w[k] = float(w[k]) - 0.05 * (float(g[k]) + 0.3 * float(w[k]) + inside) + outside
                    place += 1
    torch.testing.assert_close(net.dense.flat, slow.dense.flat, rtol=1e-11, atol=1e-13)


def test_one_step_by_hand() -> None:
    net, rule = made(strength=0.1, sigma=0.5)
    net.dense.flat.fill_(2.0)
    gradient = torch.ones_like(net.dense.flat)
    assert transformed(rule, gradient).tolist() == pytest.approx([1.2] * len(gradient))
    rule.after(STEP)
    noise = noise_array(key_of(5, "shrink_and_perturb"), 0, len(gradient))
    assert net.dense.flat.tolist() == pytest.approx((2.0 + 0.5 * noise).tolist())
    assert rule.step == 1


def test_defaults_are_those_of_the_paper() -> None:
    rule = ShrinkAndPerturb(Net(mlp(3, 4, 1)).dense)
    assert (rule.strength, rule.sigma, rule.scaled) == (1e-4, 1e-5, False)


def test_with_nothing_to_do_training_is_bit_for_bit_what_it_was() -> None:
    for scaled in (False, True):
        net, _ = made(kind="adam", strength=0.0, sigma=0.0, scaled=scaled)
        twin = Net(mlp(3, 4, 2), "adam", rate=0.05)
        for each in (net, twin):
            each.learn(30)
        assert torch.equal(net.dense.flat, twin.dense.flat)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_noise_goes_on_where_it_was(kind: str) -> None:
    whole, rule = made(kind=kind, sigma=0.01)
    whole.learn(13)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(20, 13)
    other, again = made(3, kind, sigma=0.01)
    other.learn(5)
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(20, 13)
    assert torch.equal(whole.dense.flat, other.dense.flat)
    again.load_state_dict({})
    assert again.step == 0
