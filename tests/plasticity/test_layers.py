import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.models import build_model
from streamcl.plasticity import Hidden, LayerError, Taps, find, named, of_tower
from tests.plasticity.nets import convolutional, mlp


def test_the_hidden_layers_of_a_stack_are_all_but_the_last() -> None:
    assert find(mlp(4, 8, 6, 1)) == [Hidden("0", ("2",), (), 8), Hidden("2", ("4",), (), 6)]
    assert find(nn.Linear(3, 1)) == []


def test_pooling_norms_and_flattening_stand_between_layers() -> None:
    assert find(convolutional(norm=True)) == [
        Hidden("0", ("3",), ("1",), 3),
        Hidden("3", ("6",), (), 4),
        Hidden("6", ("8",), (), 5),
    ]


class Written(nn.Module):
    """A forward pass in code: two heads, a residual stream, a concatenation, a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.stream, self.twice = nn.Linear(2, 2), nn.Linear(2, 2)
        self.aside, self.out = nn.Linear(3, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.trunk(x))
        both = self.left(h) + self.right(h)  # their outputs are added: no units
        residual = both + functional.relu(self.stream(both))
        again = self.twice(torch.tanh(self.twice(residual)))
        out: Tensor = self.out(torch.cat((again, self.aside(x)), 1))
        return out


def test_only_units_that_linear_layers_alone_read_are_found() -> None:
    assert find(Written()) == [Hidden("trunk", ("left", "right"), (), 4)]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) if x.sum() > 0 else -self.a(x)
        out: Tensor = self.b(torch.relu(h))
        return out


def test_a_module_that_cannot_be_followed_says_that_its_layers_must_be_named() -> None:
    with pytest.raises(LayerError, match=r"Branching can't be found .*name them"):
        find(Branching())
    assert named(Branching(), "a", ["b"]) == Hidden("a", ("b",), (), 3)


@pytest.mark.parametrize(
    ("incoming", "outgoing", "text"),
    [
        ("c", "b", "'c' is no linear or convolutional layer of the model; it has a, b"),
        ("a", "", "'' is no linear"),
        ("b", "a", "'a' reads 2 inputs, 'b' has 1 units"),
    ],
)
def test_layers_that_do_not_fit_are_named(incoming: str, outgoing: str, text: str) -> None:
    net = Branching()
    if text.startswith("'a' reads"):
        net.a = nn.Linear(3, 2)  # 3 inputs can't be positions of 2 units
        net.b = nn.Linear(2, 2)
        text = "'a' reads 3 inputs, 'b' has 2 units"
    with pytest.raises(LayerError, match=text):
        named(net, incoming, [outgoing])


def test_grouped_convolutions_have_no_units() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert find(net) == []
    with pytest.raises(LayerError, match="grouped"):
        named(net, "0", ["2"])


@pytest.mark.parametrize("kind", ["mlp", "deepfm"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_towers_of_the_built_in_models_are_found(kind: str, layer_norm: bool) -> None:
    base: dict[str, Any] = {
        "name": "t",
        "events": {"url": "memory://a/b", "label": "y"},
        "features": {"a": "categorical"},
    }
    config = Config.parse({**base, "model": {"kind": kind, "hidden": [5, 4], "layer_norm": layer_norm}})
    prefix = "deep." if kind == "deepfm" else ""
    model = build_model(config, Featurizer(config).layout)
    known = of_tower(model, model.tower)
    assert find(model) == known
    assert known == [
        Hidden(f"{prefix}hidden.0", (f"{prefix}hidden.1",), (), 5),
        Hidden(f"{prefix}hidden.1", (f"{prefix}head",), (), 4),
    ]


def test_taps_hold_what_the_next_layer_received_in_the_last_step() -> None:
    net = convolutional()
    taps = Taps(net, find(net))
    with pytest.raises(LayerError, match="nothing has passed from '0' to '3' in a step yet"):
        list(taps)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    net(x)
    first, second, third = taps
    assert (first.shape, second.shape, third.shape) == ((2, 3, 64), (2, 4, 16), (2, 5, 1))
    assert torch.equal(first, torch.relu(net[0](x)).reshape(2, 3, 64))  # type: ignore[index]
    with torch.inference_mode():
        net(x + 1.0)
    assert torch.equal(next(iter(taps)), first)


def test_a_copied_module_computes_with_its_own_weights() -> None:
    net = mlp(2, 3, 1)
    Taps(net, find(net))
    x = torch.ones(1, 2, dtype=torch.float64)
    net(x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    assert float(net(x).detach()) == 0.0
    assert float(twin(x).detach()) != 0.0


def test_two_listeners_share_a_tap() -> None:
    net = mlp(2, 3, 1)
    one, two = Taps(net, find(net)), Taps(net, find(net))
    x = torch.ones(1, 2, dtype=torch.float64)
    net(x)
    assert torch.equal(one.vectors()[0], two.vectors()[0])
