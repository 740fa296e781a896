"""A shared bottom and a mixture of experts against loops, and further labels that may not be known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from streamcl.architectures import MultiTask as MultiTaskConfig
from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.models import MultiTask, Shape
from streamcl.plugin import Plan, Rows, Step
from tests.models.test_attention import drawn, through

KINDS = ["deepfm", "shared_bottom", "mmoe"]


def made(kind: str = "mmoe", tasks: dict[str, Any] | None = None, **more: Any) -> Config:
    further = {"like": {"label": "liked"}, "buy": {"label": "bought", "weight": 0.5}}
    return Config.parse(
        {
            "name": "t",
            "events": {"url": "memory://a/b", "label": "y"},
            "tasks": further if tasks is None else tasks,
            "features": {"a": {"kind": "categorical", "buckets": 9}, "b": {"kind": "categorical", "buckets": 9}},
            "model": {"kind": kind, "embedding_dim": 3, "hidden": [8, 6], "init_scale": 0.3, "dtype": "float64"},
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
            **more,
        }
    )


@pytest.mark.parametrize("experts", [1, 3])
def test_each_task_mixes_the_experts_for_itself(experts: int) -> None:
    shape = Shape(fields=2, dim=3, numerics=1, outputs=2, hidden=(4, 5), tasks=2)
    model = MultiTask(shape, MultiTaskConfig(hidden=(6,)), experts).double()
    p = drawn(model)
    vectors, dense = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    found = model(torch.zeros(2, 2, 0), vectors, dense).detach()
    for b in range(2):
        x = np.concatenate([vectors[b].numpy().ravel(), dense[b].numpy()])
        said = [np.maximum(through(p, f"experts.{i}", x), 0.0) for i in range(experts)]
        for task in range(2):
            powers = np.exp(p[f"gates.{task}.weight"] @ x) if experts > 1 else np.ones(1)
            mixed = sum(powers[i] / powers.sum() * said[i] for i in range(experts))
            [expected] = through(p, f"own.{task}", np.asarray(mixed))
            assert found[b, task].item() == pytest.approx(expected)


def test_the_hidden_layers_of_experts_and_tasks_are_known() -> None:
    config = made("mmoe", model={"kind": "mmoe", "hidden": [8, 6], "multitask": {"experts": 2, "hidden": [4]}})
    layers = [layer.incoming for layer in Eager(config, Featurizer(config).layout).layers]
    assert layers == [f"experts.{i}.hidden.0" for i in range(2)] + [f"own.{i}.hidden.0" for i in range(3)]


def rows(also: list[list[float]]) -> Rows:
    ids = torch.tensor([[i, 12] for i in range(len(also))])
    y = torch.tensor([float(i % 2) for i in range(len(also))], dtype=torch.float64)
    dense = torch.zeros(len(also), 0, dtype=torch.float64)
    return Rows(ids, torch.ones(len(also), 2), dense, y, torch.tensor(also, dtype=torch.float64))


def taken(engine: Eager, read: Rows) -> Step:
    step = Step(0, Plan(), read, None, torch.ones(len(read.y), dtype=torch.float64))
    assert engine.step(step)
    return step


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_weighted_sum_over_the_labels_that_are_known(kind: str) -> None:
    config = made(kind)
    engine = Eager(config, Featurizer(config).layout)
    taken(engine, rows([[1.0, 0.0], [0.0, 1.0]]))
    read = rows([[1.0, math.nan], [math.nan, math.nan], [0.0, 1.0]])
    output = engine.predict(read.ids, read.weights, read.dense)
    assert output.shape == (3, 3)

    def nats(logit: float, label: float) -> float:
        return math.log1p(math.exp(-logit)) if label else math.log1p(math.exp(logit))

    buy, like = output[:, 1].tolist(), output[:, 2].tolist()  # in the order of their names
    slow = [0.5 * nats(buy[0], 1.0), 0.0, 0.5 * nats(buy[2], 0.0) + nats(like[2], 1.0)]
    assert read.also is not None
    assert engine.further(output, read.also).tolist() == pytest.approx(slow)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_is_not_known_moves_nothing(kind: str) -> None:
    with_tasks, without = made(kind), made(kind, tasks={})
    engines = [Eager(each, Featurizer(each).layout) for each in (with_tasks, without)]
    before = {name: param.clone() for name, param in engines[0].dense.params.items()}
    table = engines[0].table.clone()
    for _ in range(3):
        taken(engines[0], rows([[math.nan, math.nan]] * 2))
    for name, param in engines[0].dense.params.items():
        if ".head." in f".{name}" and param.shape[:1] == (3,):
            torch.testing.assert_close(param[1:], before[name][1:], rtol=0, atol=0)
        if name.startswith(("own.1", "own.2", "gates.1", "gates.2")):
            torch.testing.assert_close(param, before[name], rtol=0, atol=0)
    assert not torch.equal(engines[0].table, table)


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_with_labels_of_their_own_are_all_learned(kind: str) -> None:
    config = made(kind, optimizer={"kind": "adagrad"})
    engine = Eager(config, Featurizer(config).layout)
    for n in range(1500):
        a, b = n % 4, (n // 4) % 3
        y, buy, like = float(a % 2), float(b == 1), float(a < 2)
        also = torch.tensor([[buy if n % 5 else math.nan, like]])
        ids = torch.tensor([[1 + a, 11 + b]])
        dense = torch.zeros(1, 0, dtype=torch.float64)
        taken(engine, Rows(ids, torch.ones(1, 2), dense, torch.tensor([y], dtype=torch.float64), also))
    for a in range(4):
        for b in range(3):
            said = engine.predict(torch.tensor([[1 + a, 11 + b]]), torch.ones(1, 2), torch.zeros(1, 0).double())
            assert (said > 0)[0].tolist() == [a % 2 == 1, b == 1, a < 2]


def test_the_first_task_is_answered_by_the_score_and_the_others_are_noted() -> None:
    learner = Learner(made(error_memory=[{"kind": "key", "key": "a"}]))
    scores = learner.predict(Featurizer(made()).encode({"a": "x", "b": "y"}))
    assert scores.served.shape == scores.output.shape == (1,)
    assert {name: value.tolist() for name, value in scores.notes.items()} == {"task.buy": [0.5], "task.like": [0.5]}
    assert learner.described() == {"engine": "eager", "because": "tasks: like, buy"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"task": "multiclass"}, "tasks: they stand beside a binary task"),
        ({"tasks": {"like": {"label": "a"}}}, "features.a: is the label of tasks.like"),
        ({"tasks": {"Like": {"label": "l"}}}, "tasks.Like"),
        ({"tasks": {"like": {}}}, "tasks.like.label: Field required"),
        ({"model": {"kind": "mmoe", "hidden": []}}, "model.hidden: mmoe has one hidden layer at least"),
    ],
)
def test_settings_that_do_not_fit_are_named(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**more)
    assert text in str(caught.value)
