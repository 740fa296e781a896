"""The step of fixed shapes, uncaptured, beside the eager engine, which is the oracle."""

import copy
from typing import Any

import pytest

from streamcl.engine.graph import Graph, obstacle
from streamcl.engine.on_device import OnDevice
from streamcl.learner import Learner
from tests.test_engine_fused import KNN, LIVELY, furthest, journey
from tests.test_learner import TASKS, config, stream


def engines(kind: type[OnDevice], task: str = "binary", **more: Any) -> tuple[Learner, Learner]:
    """The eager one, and one of steps that are gathered ahead, on the CPU."""
    model = {"dtype": "float64", "hidden": [6, 5], **more.pop("model", {})}
    made = [config(task, model=model, worker={"engine": "eager"}, **copy.deepcopy(more)) for _ in range(2)]
    eager, ahead = (Learner(each) for each in made)
    ahead.fused = kind(made[1], ahead)
    return eager, ahead


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam", "ftrl"])
@pytest.mark.parametrize("task", TASKS)
def test_steps_of_fixed_shapes_come_to_the_same_with_replay_resets_and_an_error_memory(task: str, rule: str) -> None:
    eager, graph = engines(
        Graph,
        task,
        optimizer={"kind": rule, "learning_rate": 0.05, "l2": 1e-3, "l1": 1e-3},
        replay={"retention": "reservoir", "per_event": 3, "capacity": 40},
        plasticity=[LIVELY],
        error_memory=[KNN],
        diagnostics={"sample_every_steps": 3, "window": 20, "report_every_steps": 50},
    )
    outcomes = stream(task, 300)
    (said, taken), (also, as_well) = journey(eager, outcomes), journey(graph, outcomes, 64)
    assert taken == as_well
    assert also == pytest.approx(said, rel=1e-5, abs=1e-6)  # served in float32
    assert sum(graph.rules["continual_backprop"].replaced) > 10  # type: ignore[attr-defined]
    assert furthest(eager, graph) < (1e-6 if task == "regression" else 1e-7)


def test_what_can_not_be_captured_is_named() -> None:
    assert obstacle(config(plasticity=[{"kind": "l2_init"}])) == "plasticity.0: l2_init"
