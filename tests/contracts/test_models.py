"""Every built-in model keeps the contract, with both engines where both can compute it; and so does a user's."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from streamcl.architectures import KINDS, Recurrent
from streamcl.engine.fused import COMPILED
from streamcl.models import Network, Shape
from streamcl.testing import PluginCheck, model_checks

CELLS = get_args(Recurrent.model_fields["cell"].annotation)
UNCREDITED = {"retnet", "legs"}
SETTINGS: dict[str, dict[str, Any]] = {
    "xdeepfm": {"xdeepfm": {"maps": [3, 2]}},
    "autoint": {"autoint": {"heads": 2, "units": 3}},
    "din": {"din": {"attends": {"c1": "c0"}, "hidden": [4]}},
    "two_tower": {"two_tower": {"user": ["c0", "n0"], "item": ["n2", "c1"], "width": 5, "sampled": "n1"}},
    "shared_bottom": {"multitask": {"hidden": [4]}},
    "mmoe": {"multitask": {"experts": 3, "hidden": [4]}},
}
FEATURES: dict[str, dict[str, Any]] = {
    "din": {"c1": {"kind": "bag", "buckets": 20, "max_items": 1}},
    "two_tower": {"n1": {"kind": "numeric", "scale": "none"}},
}


class Mine(Network):
    """A user's: it reads what is not pooled, and has parameters outside of any layer."""

    first_order = slots = True

    def __init__(self, shape: Shape, rank: int = 2) -> None:
        super().__init__(shape)
        self.left, self.right = (nn.Linear(shape.fields * shape.dim, rank) for _ in range(2))
        self.head = nn.Linear(rank + shape.numerics, shape.outputs)
        self.scale = nn.Parameter(torch.ones(len(shape.slots)))

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor, items: Tensor, weights: Tensor) -> Tensor:
        x = vectors.flatten(1)
        scaled = (items * (weights * self.scale).unsqueeze(2)).mean((1, 2)).unsqueeze(1)
        out: Tensor = self.head(torch.cat((self.left(x) * self.right(x), dense), 1)) + first.sum(1) + scaled
        return out


def models() -> dict[str, dict[str, Any]]:
    """Settings by name: every kind, the recurrent one with every cell, and a user's."""
    found: dict[str, dict[str, Any]] = {"own": {"model": {"kind": f"{__name__}:Mine", "options": {"rank": 3}}}}
    for kind in KINDS:
        if kind != "recurrent":
            model = {"kind": kind, "hidden": [8, 6], **SETTINGS.get(kind, {})}
            found[kind] = {"model": model, "features": FEATURES.get(kind, {})}
            continue
        for cell in CELLS:
            credit = "detached" if cell in UNCREDITED else "exact"
            recurrent = {"cell": cell, "units": 4, "credit": credit, "keys": 64}
            found[cell] = {"model": {"kind": kind, "hidden": [6], "recurrent": recurrent}}
    return found


@pytest.mark.parametrize("check", model_checks(), ids=str)
@pytest.mark.parametrize("model", models().values(), ids=models())
def test_a_model_keeps_the_contract(model: dict[str, Any], check: PluginCheck) -> None:
    check(model)


@pytest.mark.parametrize("check", model_checks(), ids=str)
@pytest.mark.parametrize("kind", sorted(COMPILED))
def test_a_compiled_model_keeps_the_contract(kind: str, check: PluginCheck) -> None:
    check({**models()[kind], "engine": "fused"})
