"""AutoInt and DIN against loops over fields, heads and items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamcl.architectures import DIN as DINConfig
from streamcl.architectures import AutoInt as AutoIntConfig
from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager, as_tensors
from streamcl.features import Featurizer
from streamcl.models import DIN, AutoInt, Shape
from tests.steps import take

Floats = NDArray[np.float64]


def drawn(model: torch.nn.Module) -> dict[str, Floats]:
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    return {name: param.detach().numpy() for name, param in model.named_parameters()}


def through(p: dict[str, Floats], name: str, x: Floats) -> Floats:
    """One hidden layer and a head."""
    h = np.maximum(p[f"{name}.hidden.0.weight"] @ x + p[f"{name}.hidden.0.bias"], 0.0)
    found: Floats = p[f"{name}.head.weight"] @ h + p[f"{name}.head.bias"]
    return found


def test_every_field_and_number_attends_to_every_other_in_each_head() -> None:
    shape = Shape(fields=3, dim=4, numerics=2, outputs=2, hidden=(5,))
    model = AutoInt(shape, AutoIntConfig(layers=2, heads=2, units=3)).double()
    p = drawn(model)
    vectors, dense = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    found = model(torch.zeros(2, 3, 0), vectors, dense).detach()
    for b in range(2):
        e = [*vectors[b].numpy(), *(dense[b, n].item() * p["project_numbers.weight"][n] for n in range(2))]
        for layer in range(2):
            w = {name: p[f"project.{layer}.{name}.weight"] for name in ("query", "key", "value", "rest")}
            after = []
            for m in range(5):
                heads = []
                for of in (slice(0, 3), slice(3, 6)):
                    powers = np.exp([(w["query"][of] @ e[m]) @ (w["key"][of] @ e[k]) for k in range(5)])
                    heads.append(sum(powers[k] / powers.sum() * (w["value"][of] @ e[k]) for k in range(5)))
                after.append(np.maximum(np.concatenate(heads) + w["rest"] @ e[m], 0.0))
            e = after
        deep = through(p, "deep", np.concatenate([vectors[b].numpy().ravel(), dense[b].numpy()]))
        expected = p["head.weight"] @ np.concatenate(e) + p["head.bias"] + deep
        np.testing.assert_allclose(found[b], expected, rtol=1e-9)


def din(attends: dict[str, str]) -> DIN:
    """Fields item (slot 0), other (1), seen (2 to 4)."""
    names, slots = ("item", "other", "seen"), (0, 1, 2, 2, 2)
    shape = Shape(fields=3, dim=4, numerics=1, outputs=1, hidden=(5,), names=names, slots=slots)
    return DIN(shape, DINConfig(attends=attends, hidden=(6,))).double()


def test_an_item_of_the_history_counts_by_how_it_fits_the_target() -> None:
    model = din({"seen": "item"})
    p = drawn(model)
    vectors, items = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    dense = torch.randn(2, 1, dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.5, 0.25, 0.25]], dtype=torch.float64)
    found = model(torch.zeros(2, 3, 0), vectors, dense, items, weights).detach()
    for b in range(2):
        target, pooled = vectors[b, 0].numpy(), np.zeros(4)
        for slot in (2, 3, 4):
            e = items[b, slot].numpy()
            [a] = through(p, "units.0", np.concatenate([e, target, e - target, e * target]))
            pooled = pooled + weights[b, slot].item() * (1.0 + a) * e
        x = np.concatenate([target, vectors[b, 1].numpy(), pooled, dense[b].numpy()])
        np.testing.assert_allclose(found[b], through(p, "deep", x))


def made(**model: Any) -> Config:
    features: dict[str, Any] = {
        "item": {"kind": "categorical", "buckets": 20},
        "seen": {"kind": "bag", "buckets": 20, "max_items": 4},
        "n": "numeric",
    }
    return Config.parse(
        {
            "name": "t",
            "seed": 1,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": features,
            "model": {"kind": "din", "embedding_dim": 4, "init_scale": 0.5, "hidden": [16, 8], **model},
        }
    )


def row(config: Config, payload: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, weights, dense = as_tensors(*Featurizer(config).encode(payload))
    return ids, weights, dense


def test_fresh_attention_is_the_pooling_of_the_bag() -> None:
    config, plain = made(din={"attends": {"seen": "item"}}), made(kind="mlp")
    rows = row(config, {"item": "a", "seen": ["b", "c", "d"], "n": 0.5})
    engines = [Eager(each, Featurizer(each).layout) for each in (config, plain)]
    for engine in engines:
        head = engine.model.tower.head  # type: ignore[union-attr]
        torch.nn.init.ones_(head.weight)
    deep, mlp = (dict(engine.model.named_parameters()) for engine in engines)
    with torch.no_grad():  # the two draw under their own names
        for name, param in mlp.items():
            param.copy_(deep[f"deep.{name}"])
    outputs = [engine.predict(*rows) for engine in engines]
    torch.testing.assert_close(outputs[0], outputs[1])
    assert outputs[0].abs() > 1e-3


def test_din_learns_that_the_target_is_in_the_history() -> None:
    """The label is whether the last item but one that was seen comes again: nothing that single fields tell."""
    config = made(din={"attends": {"seen": "item"}}, dtype="float64")
    engine, rng, hits = Eager(config, Featurizer(config).layout), np.random.default_rng(0), []
    for step in range(6000):
        seen = rng.choice(6, 2, replace=False).tolist()
        item = seen[0] if rng.random() < 0.5 else int(rng.choice([x for x in range(6) if x != seen[0]]))
        rows = row(config, {"item": f"i{item}", "seen": [f"i{x}" for x in seen], "n": 0.0})
        y = torch.tensor([float(item in seen)])
        if step >= 5000:
            hits.append(float((engine.predict(*rows) > 0).float() == y))
        assert take(engine, *rows, y, torch.ones(1))
    assert np.mean(hits) > 0.9  # .6 for always saying yes; 1,000 answers have a deviation of .01


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({}, "model.din.attends: name a history and its target"),
        ({"din": {"attends": {"seen": "author"}}}, "model.din.attends: 'author' is no categorical feature and no bag"),
        ({"din": {"attends": {"n": "item"}}}, "model.din.attends: 'n' is no categorical feature and no bag"),
        ({"din": {"attends": {"item": "item"}}}, "model.din.attends: 'item' is compared with itself"),
        ({"kind": "autoint", "autoint": {"heads": 0}}, "model.autoint.heads: "),
        ({"kind": "autoint", "autoint": {"head": 2}}, "model.autoint.head: unknown key; did you mean 'heads'?"),
    ],
)
def test_settings_that_do_not_fit_are_named(model: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**model)
    assert text in str(caught.value)
