"""The compiled learner against the product's own rules on plain autograd: the same stream, the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.bench.plasticity_draws import mixed, noise, uniform
from streamcl.bench.plasticity_learner import Examples, Learner, Method, initial_weights
from streamcl.plasticity import (
    UPGD,
    ContinualBackprop,
    L2Init,
    ReDo,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    WeightClipping,
)
from streamcl.plugin import Rule
from streamcl.random import bits, key_of, noise_array, uniform_array
from tests.plasticity.nets import Net

STEPS = 2000
REGRESSION, CLASSES = (20, 5, 1), (12, 9, 8, 7, 4)


class Product(Net):
    """The product's dense parameters, optimiser and rules on a module that begins as the learner does."""

    def __init__(self, method: Method, widths: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            norm = nn.LayerNorm(b, elementwise_affine=False) if method.layer_norm else nn.Identity()
            layers += [nn.Linear(a, b), norm, nn.ReLU()]
        module = nn.Sequential(*layers[:-2]).to(dtype)
        self.linears = [layer for layer in module if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, weight in zip(self.linears, initial_weights(widths, seed), strict=True):
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.zero_()
        super().__init__(module, "sgd", method.learning_rate, l2=method.l2)

    def follow(self, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        losses = []
        for one, target in zip(x, y, strict=True):
            value = loss(self.module(one[None]), target[None])
            self.descend(value)
            losses.append(float(value.detach()))
        return losses


def continual_backprop(product: Product, method: Method, seed: int) -> Rule:
    return ContinualBackprop(
        *(product.dense, product.module, product.taps),
        rate=method.replacement_rate,
        maturity=method.maturity,
        decay=method.decay,
        transfer=method.bias_transfer,
        seed=seed,
    )


def l2_init(product: Product, method: Method, seed: int) -> Rule:
    return L2Init(product.dense, method.l2_init)


def shrink_and_perturb(product: Product, method: Method, seed: int) -> Rule:
    return ShrinkAndPerturb(product.dense, 0.0, method.noise, seed=seed)  # the optimiser shrinks


def weight_clipping(product: Product, method: Method, seed: int) -> Rule:
    return WeightClipping(product.dense, product.module, method.clipping)


def upgd(product: Product, method: Method, seed: int) -> Rule:
    decay, sigma, strength = method.upgd_decay, method.upgd_noise, method.upgd_l2
    return UPGD(product.dense, decay=decay, sigma=sigma, strength=strength, seed=seed)


def redo(product: Product, method: Method, seed: int) -> Rule:
    where = product.dense, product.module, product.taps
    return ReDo(*where, tau=method.redo_tau, every=method.redo_every, seed=seed)


def self_normalized_resets(product: Product, method: Method, seed: int) -> Rule:
    return SelfNormalizedResets(
        *(product.dense, product.module, product.taps),
        percentile=method.percentile,
        expansion=method.expansion,
        revisit=method.revisit,
        initial=method.initial,
        shortest=method.shortest,
        longest=method.longest,
        seed=seed,
    )


RULES: dict[str, Callable[[Product, Method, int], Rule]] = {
    "cbp": continual_backprop,
    "l2_init": l2_init,
    "shrink_and_perturb": shrink_and_perturb,
    "weight_clipping": weight_clipping,
    "upgd": upgd,
    "redo": redo,
    "self_normalized_resets": self_normalized_resets,
}

METHODS = [
    Method("backprop"),
    Method("l2", l2=1e-2),
    Method("layer norm", layer_norm=True),
    Method("cbp", replacement_rate=5e-3, maturity=20),
    Method("cbp", replacement_rate=0.3, maturity=3, bias_transfer=False),  # several of a layer at once
    Method("cbp", replacement_rate=5e-3, maturity=20, l2=1e-3),
    Method("l2_init", l2_init=1e-2),
    Method("shrink_and_perturb", l2=1e-3, noise=1e-3),
    Method("weight_clipping", clipping=0.7),
    Method("upgd", upgd=True, upgd_decay=0.99),
    Method("redo", redo_every=40, redo_tau=0.5),
    Method("self_normalized_resets", silence=True, initial=4, shortest=2, longest=30, revisit=100, percentile=0.8),
]


def stream(widths: tuple[int, ...], *, classes: bool) -> Examples:
    rng = np.random.default_rng(5)
    inputs = rng.integers(0, 256, (STEPS, widths[0])).astype(np.uint8)
    targets = rng.integers(0, widths[-1], STEPS).astype(np.float64) if classes else rng.normal(size=STEPS)
    return Examples(inputs, targets, scale=1 / 255)


def both(method: Method, widths: tuple[int, ...], dtype: Any) -> tuple[Learner, Product, Any, list[float]]:
    classes = widths[-1] > 1
    examples = stream(widths, classes=classes)
    learner = Learner(widths, method, 7, classes=classes, dtype=dtype)
    product = Product(method, widths, 7, torch.from_numpy(np.empty(0, dtype)).dtype)
    if method.name in RULES:
        product.rules.append(RULES[method.name](product, method, 7))
    half = STEPS // 2  # in two calls: what a learner has to remember is not lost between them
    parts = np.arange(half), np.arange(half, STEPS)
    losses = np.concatenate([learner.learn(examples, part)[0] for part in parts])
    x = torch.from_numpy(examples.inputs.astype(dtype) * dtype(examples.scale))
    y = torch.from_numpy(examples.targets)
    if classes:
        return learner, product, losses, product.follow(x, y.long(), functional.cross_entropy)
    error = product.follow(x, y.to(x.dtype), lambda output, target: ((output[:, 0] - target) ** 2).sum())
    return learner, product, losses, error


@pytest.mark.parametrize("widths", [REGRESSION, CLASSES], ids=["regression", "classes"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_compiled_learner_is_the_products_rule_to_1e_9(method: Method, widths: tuple[int, ...]) -> None:
    learner, product, losses, expected = both(method, widths, np.float64)
    np.testing.assert_allclose(losses, expected, rtol=1e-9, atol=1e-9)
    for (weight, bias), layer in zip(learner.parameters(), product.linears, strict=True):
        np.testing.assert_allclose(weight, layer.weight.detach(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(bias, layer.bias.detach(), rtol=1e-9, atol=1e-9)
    for rule in product.rules:
        if isinstance(rule, ContinualBackprop | ReDo | SelfNormalizedResets):
            assert learner.units.replaced.tolist() == rule.replaced
            assert min(rule.replaced) > 20


@pytest.mark.parametrize("method", METHODS[:4] + METHODS[6:], ids=lambda method: method.name)
def test_in_single_precision_it_stays_close(method: Method) -> None:
    _, _, losses, expected = both(method, CLASSES, np.float32)
    np.testing.assert_allclose(losses, expected, rtol=1e-3, atol=1e-3)


def test_without_a_hidden_layer_it_is_a_linear_model() -> None:
    linear = replace(METHODS[0], linear=True)
    learner = Learner(REGRESSION, linear, 0)
    assert learner.widths == (20, 1)
    learner.learn(stream(REGRESSION, classes=False))
    assert learner.dead() != learner.dead()  # none to be dead


def test_draws_are_those_of_the_product() -> None:
    key = key_of(3, "continual_backprop.0")
    base = mixed(np.uint64(key))
    assert [uniform(base, i) for i in range(5, 9)] == uniform_array(key, 4, 5).tolist()
    golden = 0x9E3779B97F4A7C15
    step = mixed(np.uint64((key + 11 * golden) % 2**64))
    assert [noise(step, i) for i in range(6)] == noise_array(key, 11, 6).tolist()
    assert int(mixed(np.uint64((int(step) + golden) % 2**64))) == bits(key, 11, 0)


def test_an_example_is_found_by_order_and_columns() -> None:
    examples = stream(REGRESSION, classes=False)
    order, columns = np.array([4, 2, 9]), np.arange(20)[::-1].copy()
    moved = Examples(examples.inputs[order][:, ::-1].copy(), examples.targets[order], examples.scale)
    one, other = (Learner(REGRESSION, Method("backprop"), 0) for _ in range(2))
    assert one.learn(examples, order, columns)[0].tolist() == other.learn(moved)[0].tolist()


def test_silence_is_counted_since_it_was_set_to_zero() -> None:
    examples = stream(CLASSES, classes=True)
    learner = Learner(CLASSES, Method("backprop"), 0, classes=True)
    learner.learn(examples)
    learner.units.fired[:] = 0
    assert learner.dead() == 1.0
    learner.learn(examples, np.arange(100))
    values = np.array(learner.silent(100))
    assert values.shape == (3,)
    assert 0.0 < values.mean() < 1.0
    assert learner.dead() < 1.0
