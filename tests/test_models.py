from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.models import FFM, FM, MODELS, DCNv2, DeepFM, Logistic, XDeepFM, build_model
from streamcl.models.tower import Shape
from streamcl.state import digest
from tests.steps import take

KINDS = sorted(MODELS)
TASKS = ["binary", "multiclass", "regression"]


def config(kind: str = "deepfm", task: str = "binary", features: Any = None, seed: int = 3, **model: Any) -> Config:
    return Config.parse(
        {
            "name": "t",
            "task": task,
            "seed": seed,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": features or {"a": {"kind": "categorical", "buckets": 20}, "n": "numeric"},
            "model": {"kind": kind, "embedding_dim": 3, "hidden": [4, 5], "classes": 3, **model},
        }
    )


def layout_of(made: Config) -> Any:
    return Featurizer(made).layout


def inputs(shape: Shape, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sizes = ((shape.fields, shape.outputs), (shape.fields, shape.dim), (shape.numerics,))
    first, vectors, dense = (torch.randn(rows, *size, dtype=torch.float64) for size in sizes)
    return first, vectors, dense


def randomised(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()


def test_logistic_is_a_sum_of_weights() -> None:
    shape = Shape(fields=3, dim=0, numerics=2, outputs=2, hidden=())
    model, (first, vectors, dense) = Logistic(shape).double(), inputs(shape)
    randomised(model)
    out = model(first, vectors, dense).detach()
    for b in range(2):
        for o in range(2):
            expected = sum(float(first[b, f, o]) for f in range(3)) + model.bias[o].item()
            expected += sum(model.weight[o, n].item() * float(dense[b, n]) for n in range(2))
            assert out[b, o].item() == pytest.approx(expected)


def test_mlp_is_layers_of_relu() -> None:
    shape = Shape(fields=2, dim=3, numerics=1, outputs=2, hidden=(4, 5))
    model, (first, vectors, dense) = MODELS["mlp"](shape).double(), inputs(shape)
    randomised(model)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    h = np.concatenate([vectors[0, 0], vectors[0, 1], dense[0]])
    for i in range(2):
        h = np.maximum(p[f"hidden.{i}.weight"] @ h + p[f"hidden.{i}.bias"], 0.0)
    expected = p["head.weight"] @ h + p["head.bias"]
    np.testing.assert_allclose(model(first, vectors, dense)[0].detach(), expected)


def test_deepfms_pairwise_part_is_the_sum_over_all_pairs() -> None:
    shape = Shape(fields=5, dim=3, numerics=1, outputs=1, hidden=(4,))
    model, (first, vectors, dense) = DeepFM(shape).double(), inputs(shape)
    pairwise = model(first, vectors, dense) - model.linear(first, vectors, dense) - model.deep(first, vectors, dense)
    for b in range(2):
        slow = sum(float(vectors[b, i] @ vectors[b, j]) for i, j in combinations(range(5), 2))
        assert pairwise[b, 0].item() == pytest.approx(slow)


def test_a_factorisation_machine_is_first_order_weights_and_the_sum_over_all_pairs() -> None:
    shape = Shape(fields=4, dim=3, numerics=2, outputs=1, hidden=())
    model, (first, vectors, dense) = FM(shape).double(), inputs(shape)
    randomised(model)
    out, linear = model(first, vectors, dense).detach(), model.linear(first, vectors, dense).detach()
    for b in range(2):
        slow = sum(float(vectors[b, i] @ vectors[b, j]) for i, j in combinations(range(4), 2))
        assert out[b, 0].item() == pytest.approx(linear[b, 0].item() + slow)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_field_aware_machine_pairs_the_vectors_that_two_fields_have_towards_each_other(outputs: int) -> None:
    shape = Shape(fields=4, dim=3, numerics=2, outputs=outputs, hidden=())
    model = FFM(shape).double()
    assert model.dim == 9
    first, vectors, dense = inputs(shape._replace(dim=model.dim))
    randomised(model)
    out, linear = model(first, vectors, dense).detach(), model.linear(first, vectors, dense).detach()

    def towards(b: int, i: int, j: int) -> torch.Tensor:
        place = [other for other in range(4) if other != i].index(j)
        return vectors[b, i, 3 * place : 3 * place + 3]

    for b in range(2):
        products = torch.stack([towards(b, i, j) * towards(b, j, i) for i, j in combinations(range(4), 2)]).sum(0)
        slow = products.sum()[None] if model.pairs is None else model.pairs.weight.detach() @ products
        np.testing.assert_allclose(out[b], linear[b] + slow)


def test_a_field_aware_row_holds_a_vector_for_each_other_field() -> None:
    made = config("ffm", features={name: {"kind": "categorical", "buckets": 5} for name in "abc"})
    assert Eager(made, layout_of(made)).table.shape == (18, 1 + 2 * 3)


def test_a_cross_layer_multiplies_by_what_came_in() -> None:
    shape = Shape(fields=2, dim=2, numerics=1, outputs=2, hidden=(4,), cross=2)
    model, (first, vectors, dense) = DCNv2(shape).double(), inputs(shape)
    randomised(model)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    given = x = np.concatenate([vectors[0, 0], vectors[0, 1], dense[0]])
    for i in range(2):
        x = np.array([given[j] * (p[f"cross.{i}.weight"][j] @ x + p[f"cross.{i}.bias"][j]) + x[j] for j in range(5)])
    h = np.maximum(p["deep.hidden.0.weight"] @ x + p["deep.hidden.0.bias"], 0.0)
    expected = p["deep.head.weight"] @ h + p["deep.head.bias"]
    np.testing.assert_allclose(model(first, vectors, dense)[0].detach(), expected)


def test_a_compressed_interaction_layer_weighs_the_products_of_maps_and_fields() -> None:
    shape = Shape(fields=3, dim=4, numerics=1, outputs=2, hidden=(4,))
    model, (first, vectors, dense) = XDeepFM(shape, (3, 2)).double(), inputs(shape)
    randomised(model)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    rest = model.linear(first, vectors, dense) + model.deep(first, vectors, dense)
    found = (model(first, vectors, dense) - rest).detach()
    for b in range(2):
        e = vectors[b].numpy()
        x, sums = e, []
        for layer in range(2):
            weight = p[f"project.{layer}.weight"].reshape(-1, len(x), 3)
            x = np.array([sum(w[i, j] * x[i] * e[j] for i in range(len(x)) for j in range(3)) for w in weight])
            sums += [row.sum() for row in x]
        np.testing.assert_allclose(found[b], p["sums.weight"] @ np.array(sums))


def test_deepfm_projects_its_pairwise_products_to_several_outputs() -> None:
    shape = Shape(fields=4, dim=3, numerics=0, outputs=2, hidden=(4,))
    model, (first, vectors, dense) = DeepFM(shape).double(), inputs(shape)
    assert model.pairs is not None
    pairwise = model(first, vectors, dense) - model.linear(first, vectors, dense) - model.deep(first, vectors, dense)
    products = sum(vectors[0, i] * vectors[0, j] for i, j in combinations(range(4), 2))
    np.testing.assert_allclose(pairwise[0].detach(), (model.pairs.weight @ products).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_a_function_of_the_seed_alone(kind: str) -> None:
    two_fields = {"a": SMALL, "b": SMALL}
    made, other = config(kind, features=two_fields), config(kind, features=two_fields, seed=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = Eager(made, layout_of(made))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = Eager(made, layout_of(made))
    assert digest(one.state_dict()) == digest(two.state_dict())
    if kind != "logistic":  # which starts at zero
        assert digest(one.state_dict()) != digest(Eager(other, layout_of(other)).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_finite_and_the_first_score_is_the_prior(kind: str) -> None:
    engine = Eager(config(kind), layout_of(config(kind)))
    assert all(bool(torch.isfinite(p).all()) for p in engine.dense.params.values())
    assert abs(engine.predict(torch.tensor([[5]]), torch.ones(1, 1), torch.ones(1, 1)).item()) < 1e-6


BUILT_IN: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in (*KINDS, "xdeepfm", "autoint", "shared_bottom", "mmoe", "recurrent")},
    "din": {"din": {"attends": {"seen": "a"}}},
    "two_tower": {"two_tower": {"user": ["seen", "n"], "item": ["a"]}},
}


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_fresh_model_answers_the_prior_that_it_is_given(kind: str) -> None:
    seen = {"kind": "bag", "buckets": 20, "max_items": 2}
    made = config(
        kind, features={"a": SMALL, "seen": seen, "n": "numeric"}, prior=0.02, init_scale=1e-4, **BUILT_IN[kind]
    )
    scores = Learner(made).predict(Featurizer(made).encode({"a": "x", "seen": ["y"], "n": 3.0}))
    assert scores.served[0] == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"task": "regression"}, "model.prior: a regression task has no rate"),
        ({"kind": "some.module:Class"}, "model.prior: some.module:Class sets its own bias"),
    ],
)
def test_a_prior_that_means_nothing_is_refused(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**more, prior=0.02)


def test_hidden_weights_are_hes_uniform_and_heads_are_zero() -> None:
    made = config("mlp", hidden=[400, 300])
    params = dict(build_model(made, layout_of(made)).named_parameters())
    weight = params["hidden.1.weight"].detach()
    bound = (6.0 / 400) ** 0.5
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    zero = [name for name, p in params.items() if not p.any()]
    assert zero == ["hidden.0.bias", "hidden.1.bias", "head.weight", "head.bias"]


def test_a_fresh_table_is_normal_of_the_scale_and_its_first_order_weights_are_zero() -> None:
    made = config(features={"a": {"kind": "categorical", "buckets": 20_000}}, init_scale=0.5)
    table = Eager(made, layout_of(made)).table
    assert table.shape == (20_001, 4)
    assert not table[:, 0].any()
    assert float(table[:, 1:].std()) == pytest.approx(0.5, rel=0.01)


def test_a_fresh_table_is_the_same_however_it_is_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    whole = Eager(made, layout_of(made)).table
    monkeypatch.setattr("streamcl.engine.eager.BLOCK", 7)
    assert torch.equal(Eager(made, layout_of(made)).table, whole)


SMALL = {"kind": "categorical", "buckets": 9}
ONLY: dict[str, Any] = {
    "numbers": ({"n": "numeric", "m": "numeric"}, {"n": 1.0, "m": -1.0}),
    "categories": ({"a": SMALL, "b": SMALL}, {"a": "x", "b": "y"}),
    "bags": ({"b": {"kind": "bag", "buckets": 9, "max_items": 3}}, {"b": ["x", "y"]}),
}


@pytest.mark.parametrize("only", ONLY)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_task_learns_from_one_sort_of_features_alone(kind: str, task: str, only: str) -> None:
    features, payload = ONLY[only]
    made = config(kind, task, features)
    engine, f = Eager(made, layout_of(made)), Featurizer(made)
    ids, weights, dense = f.encode(payload)
    row = (torch.from_numpy(ids)[None], torch.from_numpy(weights)[None], torch.from_numpy(dense)[None])
    y = torch.ones(1)

    def loss() -> float:
        return float(engine.losses(engine.predict(*row), y))

    before = loss()
    assert engine.predict(*row).shape == (1, 3 if task == "multiclass" else 1)
    for _ in range(20):
        assert take(engine, *row, y, torch.ones(1))
    assert loss() < 0.9 * before
