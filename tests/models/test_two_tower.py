"""The two towers against loops, and what the correction for sampled items is for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from streamcl.architectures import TwoTower as TwoTowerConfig
from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager, as_tensors
from streamcl.features import Featurizer
from streamcl.models import Shape, TwoTower
from streamcl.plasticity import of_towers
from tests.steps import take

SIDES = {"user": ["user", "age"], "item": ["item", "price"], "width": 3}
FEATURES: dict[str, Any] = {
    "user": {"kind": "categorical", "buckets": 30},
    "item": {"kind": "categorical", "buckets": 30},
    "age": "numeric",
    "price": "numeric",
}


def made(features: dict[str, Any] = FEATURES, task: str = "binary", **towers: Any) -> Config:
    return Config.parse(
        {
            "name": "t",
            "task": task,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": features,
            "model": {"kind": "two_tower", "embedding_dim": 4, "hidden": [8], "two_tower": {**SIDES, **towers}},
        }
    )


def test_the_score_is_the_product_of_what_each_side_says_alone() -> None:
    names, numbers = ("item", "user"), ("age", "price")
    shape = Shape(fields=2, dim=4, numerics=2, outputs=1, hidden=(5,), names=names, numbers=numbers, slots=(0, 1))
    model = TwoTower(shape, TwoTowerConfig.model_validate(SIDES)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    p = {name: param.detach().numpy() for name, param in model.named_parameters()}
    vectors, dense = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    found = model(torch.zeros(2, 2, 0), vectors, dense).detach()
    for b in range(2):
        said = []
        for tower, field, number in (("project_user", 1, 0), ("item_tower", 0, 1)):
            x = np.append(vectors[b, field].numpy(), dense[b, number].item())
            h = np.maximum(p[f"{tower}.hidden.0.weight"] @ x + p[f"{tower}.hidden.0.bias"], 0.0)
            said.append(p[f"{tower}.head.weight"] @ h + p[f"{tower}.head.bias"])
        assert found[b, 0].item() == pytest.approx(math.exp(p["scale"][0]) * (said[0] @ said[1]) + p["bias"][0])
        np.testing.assert_allclose(model.item(vectors, dense)[b].detach(), said[1])


def test_the_hidden_layers_of_both_towers_are_known() -> None:
    config = made()
    engine = Eager(config, Featurizer(config).layout)
    assert [layer.incoming for layer in engine.layers] == ["project_user.hidden.0", "item_tower.hidden.0"]
    assert of_towers(engine.model, engine.model.towers) == engine.layers


def learned(sampled: bool) -> list[float]:
    """What is served for a common and for a rare item, both clicked by everybody who likes them: half of the users.

    Each click is followed by four negatives, drawn by how common an item is: 90 and 10 %.
    """
    features = {**FEATURES, "q": {"kind": "numeric", "scale": "none"}}
    features = {name: features[name] for name in ("user", "item", "q")}
    towers: dict[str, Any] = {"user": ["user"], "item": ["item"] if sampled else ["item", "q"]}
    towers |= {"sampled": "q"} if sampled else {}
    config = made(features, **towers)
    engine, featurizer = Eager(config, Featurizer(config).layout), Featurizer(config)
    q, rng = {"common": 0.9, "rare": 0.1}, np.random.default_rng(0)

    def rows(item: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, weights, dense = as_tensors(*featurizer.encode({"user": "u", "item": item, "q": q[item]}))
        return ids, weights, dense

    for _ in range(3000):
        clicked = "common" if rng.random() < 0.5 else "rare"  # as often: they are liked alike
        shown = ["common" if rng.random() < 0.9 else "rare" for _ in range(4)]
        for item, y in [(clicked, 1.0), *((item, 0.0) for item in shown)]:
            assert take(engine, *rows(item), torch.tensor([y]), torch.ones(1))
    return [float(engine.predict(*rows(item))) for item in q]


def test_with_the_correction_an_item_is_not_worse_for_being_drawn_often() -> None:
    """In theory ln(1 / 4 x .5 / q) without, so ln 9 apart, and ln(.5 / 4) for both with it."""
    biased, right = learned(False), learned(True)
    assert biased[1] - biased[0] == pytest.approx(math.log(9.0), abs=0.5)
    assert right[1] - right[0] == pytest.approx(0.0, abs=0.5)
    assert right == pytest.approx([math.log(0.5 / 4)] * 2, abs=0.5)


def test_what_is_no_probability_corrects_nothing() -> None:
    names, numbers = ("item", "user"), ("q",)
    shape = Shape(fields=2, dim=2, numerics=1, outputs=1, hidden=(), names=names, numbers=numbers, slots=(0, 1))
    model = TwoTower(shape, TwoTowerConfig(user=("user",), item=("item",), sampled="q"))
    found = model.correction(torch.tensor([[0.25], [0.0], [-1.0], [2.0]]))
    assert found is not None
    assert found[:, 0].tolist() == pytest.approx([math.log(4.0), 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"user": []}, "model.two_tower.user: name its features"),
        ({"user": ["user", "age", "item"]}, "model.two_tower: 'item' stands there twice"),
        ({"item": ["item"]}, "model.two_tower: 'price' in neither tower"),
        ({"item": ["item", "price", "colour"]}, "model.two_tower: 'colour' is no feature"),
        (
            {"item": ["item"], "sampled": "price"},
            "two_tower.sampled: 'price' must be a numeric feature with scale none",
        ),
        ({"task": "multiclass"}, "model.kind: two_tower has one dot product"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**change)
    assert text in str(caught.value)
