"""A user's model by import path: what it gets, and what it is told when it breaks the contract."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.models import Network, Shape, build_model
from streamcl.state import digest


class Fine(Network):
    def __init__(self, shape: Shape, rank: int = 2) -> None:
        super().__init__(shape)
        self.inner = nn.Linear(shape.fields * shape.dim + shape.numerics, rank)
        self.outer = nn.Linear(rank, shape.outputs)

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.tanh(self.inner(torch.cat((vectors.flatten(1), dense), 1))))
        return out


class Narrow(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return super().forward(first, vectors, dense)[:, 0]


class Dropping(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(first, vectors, dense))


class Mixing(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        out = super().forward(first, vectors, dense)
        return out - out.mean(0)


class Counting(Fine):
    count: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        self.count += 1
        return super().forward(first, vectors, dense)


class Infinite(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return super().forward(first, vectors, dense) / 0.0


class Detached(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return super().forward(first, vectors, dense).detach()


class Misreading(Fine):
    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return super().forward(first, vectors[:, 1:], dense)


class Whimsical(Fine):
    calls = itertools.count()

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        nn.init.constant_(self.outer.bias, float(next(self.calls)))


class Foreign(nn.Module):
    pass


SMALL = {"kind": "categorical", "buckets": 9}


def made(kind: str, seed: int = 0, **more: Any) -> Config:
    model = {"kind": kind if ":" in kind else f"{__name__}:{kind}", "embedding_dim": 3}
    return Config.parse(
        {
            "name": "t",
            "seed": seed,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": {"a": SMALL, "b": SMALL, "n": "numeric"},
            **more,
            "model": {**model, **more.get("model", {})},
        }
    )


def test_it_begins_as_its_constructor_says_from_the_seed_alone() -> None:
    config, before = made("Fine", model={"options": {"rank": 5}}), torch.get_rng_state()
    one = Eager(config, Featurizer(config).layout)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    two = Eager(config, Featurizer(config).layout)
    assert one.dense.params["inner.weight"].shape == (5, 7)
    assert digest(one.state_dict()) == digest(two.state_dict())
    other = made("Fine", seed=1, model={"options": {"rank": 5}})
    assert digest(one.state_dict()) != digest(Eager(other, Featurizer(other).layout).state_dict())


def test_it_is_told_the_names_of_what_it_reads() -> None:
    seen: list[Shape] = []

    class Looking(Fine):
        def __init__(self, shape: Shape) -> None:
            super().__init__(shape)
            seen.append(shape)

    globals()["Looking"] = Looking
    config = made("Looking")
    build_model(config, Featurizer(config).layout)
    assert (seen[0].names, seen[0].numbers, seen[0].slots, seen[0].outputs) == (("a", "b"), ("n",), (0, 1), 1)


def test_the_eager_engine_computes_it() -> None:
    learner = Learner(made("Fine"))
    assert learner.described() == {"engine": "eager", "because": f"model.kind: {__name__}:Fine"}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("no.such.module:Model", "No module named"),
        ("Nobody", "has no attribute 'Nobody'"),
        ("Foreign", "is no subclass of streamcl.models.Network"),
        ("made", "is no subclass of streamcl.models.Network"),
        ("Narrow", r"forward must return \(B, O\) = \(3, 1\), not \(3,\)"),
        ("Dropping", "something else the second time, as with dropout"),
        ("Mixing", "something else of a row beside others, as with batch norm"),
        ("Counting", "changes the buffer 'count', which no checkpoint holds"),
        ("Infinite", "returns what is not finite"),
        ("Detached", "leaves no gradient"),
        ("Misreading", "forward: RuntimeError: "),
        ("Whimsical", "outer.bias begins otherwise each time"),
    ],
)
def test_what_breaks_the_contract_is_refused_at_the_start(kind: str, text: str) -> None:
    config = made(kind)
    with pytest.raises(ConfigError, match=text) as caught:
        build_model(config, Featurizer(config).layout)
    assert str(caught.value).startswith("model.kind: ")


def test_an_option_that_it_does_not_take_is_named() -> None:
    config = made("Fine", model={"options": {"ranks": 5}})
    with pytest.raises(ConfigError, match=r"model\.options: .* unexpected keyword argument 'ranks'"):
        build_model(config, Featurizer(config).layout)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": {"kind": "deepfn"}}, "model.kind: 'deepfn' is neither module:Class nor one of logistic, "),
        ({"model": {"kind": "deepfn"}}, "did you mean 'deepfm'?"),
        ({"model": {"kind": ":Model"}}, "model.kind: ':Model' is neither"),
        ({"model": {"kind": "mlp", "options": {"rank": 1}}}, "options: mlp is built in and takes none"),
    ],
)
def test_a_kind_that_cannot_be_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made("Fine", **change)
    assert text in str(caught.value)


def test_units_that_are_not_there_cannot_be_made_anew() -> None:
    with pytest.raises(Exception, match="plasticity: the model has no hidden units that could be made anew"):
        Learner(made("Fine", plasticity=["redo"]))


def test_a_hidden_layer_that_is_not_there_is_no_key() -> None:
    with pytest.raises(ConfigError, match=r"error_memory\.0\.key: the model has no 'hidden'"):
        Learner(made("Fine", error_memory=[{"kind": "knn", "key": "hidden"}]))
