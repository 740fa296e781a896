"""The eager engine is the slow, obvious oracle: everything here is said beside it."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamcl.config import Config, ConfigError
from streamcl.engine.fused import obstacle
from streamcl.learner import Learner
from streamcl.records import EVENTS, Event, Fate, Origin, Outcome, Selector, Ticket
from streamcl.state import digest, flatten
from streamcl.testing import difference
from tests.test_learner import TASKS, config, encode, outcome, stream

LIVELY = {"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10}
KNN = {"kind": "knn", "capacity": 30, "key": "hidden"}


def engines(task: str = "binary", precision: str = "float64", **more: Any) -> tuple[Learner, Learner]:
    """The same, computed by either."""
    model = {"dtype": precision, "hidden": [6, 5], **more.pop("model", {})}
    eager, fused = (
        Learner(config(task, model=model, worker={"engine": engine}, **copy.deepcopy(more)))
        for engine in ("eager", "fused")
    )
    assert eager.fused is None and fused.fused is not None
    return eager, fused


def journey(learner: Learner, outcomes: list[Outcome], chunk: int = 7) -> tuple[np.ndarray, list[bool]]:
    """Each event is answered, and its label comes with it: scores (n, P), and which labels were learned."""
    tickets, taken = [], []
    for i, item in enumerate(outcomes):
        event = Event(str(i), f"k{i % 5}", float(i), item.ticket.features, Origin(EVENTS, 0, i), item.label)
        features, scores = learner.answer(event)
        weight = (1.0, 0.25, 3.0)[i % 3]
        tickets.append(Ticket(event.id, event.time_s, features, scores, event.origin, "", event.key, weight))
        labelled = Outcome(tickets[-1], item.label, Fate.INLINE, 0.0)
        if learner.fused is None:
            taken.append(learner.learn(labelled))
            continue
        learner.fused.learn(labelled)
        if i % chunk == chunk - 1:
            taken += learner.fused.settle()
    taken += learner.fused.settle() if learner.fused else []
    return np.array([ticket.scores.served for ticket in tickets]), taken


def furthest(one: Learner, two: Learner) -> float:
    """The largest difference between any two numbers of two states, by the size of what differs, at least 1."""
    states = [flatten(learner.state_dict())[1] for learner in (one, two)]
    assert states[0].keys() == states[1].keys()
    found = 0.0
    for name, value in states[0].items():
        a, b = (np.asarray(each, np.float64) for each in (value, states[1][name]))
        assert a.shape == b.shape, name
        alike = (a == b) | (np.isnan(a) & np.isnan(b))
        assert (alike | np.isfinite(a)).all(), name
        with np.errstate(invalid="ignore"):
            apart = np.where(alike, 0.0, np.abs(a - b) / np.maximum(np.abs(a), 1.0))
        found = max(found, float(apart.max(initial=0.0)))
    return found


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam", "ftrl"])
@pytest.mark.parametrize("task", TASKS)
def test_both_engines_come_to_the_same_with_replay_resets_and_an_error_memory(task: str, rule: str) -> None:
    eager, fused = engines(
        task,
        optimizer={"kind": rule, "learning_rate": 0.05, "l2": 1e-3, "l1": 1e-3},
        replay={"retention": "reservoir", "per_event": 3, "capacity": 40},
        plasticity=[LIVELY],
        error_memory=[KNN],
        diagnostics={"sample_every_steps": 3, "window": 20, "report_every_steps": 50},
    )
    outcomes = stream(task, 400)
    (said, taken), (also, as_well) = journey(eager, outcomes), journey(fused, outcomes, 64)
    assert taken == as_well
    np.testing.assert_allclose(also, said, rtol=1e-5, atol=1e-6)  # served in float32
    assert fused.rules["continual_backprop"].read() == pytest.approx(eager.rules["continual_backprop"].read(), rel=1e-9)
    assert sum(fused.rules["continual_backprop"].replaced) > 10  # type: ignore[attr-defined]
    assert furthest(eager, fused) < 1e-6 if task == "regression" else furthest(eager, fused) < 1e-7
    torch.testing.assert_close(fused.engine.dense.flat, eager.engine.dense.flat, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.engine.table, eager.engine.table, rtol=1e-9, atol=1e-9)


AVERAGED = ({"kind": "ema", "decay": 0.9}, {"kind": "served", "sets": ["ema"]})
LIVE_TOO = ({"kind": "ema", "decay": 0.8}, {"kind": "served", "sets": ["live", "ema"], "half_life_events": 5.0})

CONFIGS = st.fixed_dictionaries(
    {
        "task": st.sampled_from(TASKS),
        "optimizer": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["sgd", "adagrad", "adam", "ftrl"]),
                "learning_rate": st.sampled_from([0.01, 0.1]),
                "l2": st.sampled_from([0.0, 0.01]),
                "l1": st.sampled_from([0.0, 0.01]),
                "max_grad_norm": st.sampled_from([1e4, 1.5]),
            }
        ),
        "model": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["logistic", "fm", "mlp", "deepfm", "dcnv2"]),
                "hidden": st.sampled_from([(), (3,), (9, 4), (5, 6, 7)]),
                "embedding_dim": st.sampled_from([1, 3, 9]),
            }
        ),
        "replay": st.fixed_dictionaries(
            {
                "retention": st.sampled_from(["reservoir", "recency"]),
                "capacity": st.sampled_from([1, 12]),
                "per_event": st.sampled_from([0, 1, 5, 9]),
                "weight": st.sampled_from([0.5, 2.0]),
            }
        ),
        "renewed": st.sampled_from(["", "contribution", "mean_corrected", "adaptable", "random"]),
        "reloop": st.booleans(),
        "weighted": st.booleans(),
        "averaged": st.sampled_from([(), AVERAGED[:1], AVERAGED, LIVE_TOO]),
        "seed": st.integers(0, 5),
    }
)


@settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(made=CONFIGS, chunk=st.sampled_from([1, 3, 50]))
def test_whatever_is_configured_both_engines_come_to_the_same(made: dict[str, Any], chunk: int) -> None:
    task, renewed, reloop, weighted = (made.pop(name) for name in ("task", "renewed", "reloop", "weighted"))
    more = copy.deepcopy(made)
    more["plugins"] = copy.deepcopy(more.pop("averaged"))
    if renewed and made["model"]["hidden"] and made["model"]["kind"] not in ("logistic", "fm"):
        more["plasticity"] = [{**LIVELY, "utility": renewed}]
    if reloop and task == "binary":
        more["loss"] = {"kind": "reloop", "alpha": 0.3}
    if weighted and task != "regression":
        more["loss"] = more.get("loss", {}) | {"class_weights": [0.5, 3.0, 0.0][: 2 if task == "binary" else 3]}
    eager, fused = engines(task, **more)
    eager_drawn: list[list[int]] = []
    uniform = eager.memory.uniform
    eager.memory.uniform = lambda n, step: (found := uniform(n, step), eager_drawn.append(found[0].tolist()))[0]  # type: ignore[method-assign, func-returns-value]
    assert fused.fused is not None
    fused.fused.drawn = []
    outcomes = stream(task, 50, more["seed"])
    if made["optimizer"]["kind"] == "adam":
        # It makes a step of full length of a gradient of 1e-17, where the other engine's is 0: step by step, then.
        step_by_step(eager, fused, outcomes)
        return
    (said, taken), (also, as_well) = journey(eager, outcomes), journey(fused, outcomes, chunk)
    assert taken == as_well
    assert [rows.tolist() for rows in fused.fused.drawn if len(rows) and rows[0] >= 0] == eager_drawn
    np.testing.assert_allclose(also, said, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.engine.dense.flat, eager.engine.dense.flat, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused.engine.table, eager.engine.table, rtol=1e-9, atol=1e-9)
    assert furthest(eager, fused) < 1e-6


def step_by_step(eager: Learner, fused: Learner, outcomes: list[Outcome]) -> None:
    for item in outcomes:
        fused.load_state_dict(copy.deepcopy(eager.state_dict()))
        assert fused.learn(item) == eager.learn(item)
        torch.testing.assert_close(fused.engine.dense.flat, eager.engine.dense.flat, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused.engine.table, eager.engine.table, rtol=1e-9, atol=1e-9)
        assert furthest(eager, fused) < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_a_step_in_float32_from_equal_weights_agrees(task: str) -> None:
    eager, fused = engines(task, "float32", replay={"retention": "recency", "per_event": 8, "capacity": 50})
    for item in stream(task, 150):
        eager.load_state_dict(copy.deepcopy(fused.state_dict()))
        assert eager.learn(item) and fused.learn(item)
        torch.testing.assert_close(fused.engine.dense.flat, eager.engine.dense.flat, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused.engine.table, eager.engine.table, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plugins", [(), AVERAGED, LIVE_TOO], ids=["live", "average", "either"])
@pytest.mark.parametrize("retention", ["none", "reservoir", "recency", "class_balanced"])
def test_however_the_work_is_cut_the_state_and_the_answers_are_the_same_to_the_bit(
    retention: str, plugins: Any
) -> None:
    made = config(
        plugins=copy.deepcopy(plugins),
        replay={"retention": retention, "per_event": 0 if retention == "none" else 2, "capacity": 15},
        plasticity=[LIVELY],
        optimizer={"max_grad_norm": 1.0},  # a part of the labels can't be learned
        error_memory=[KNN],
        diagnostics={"sample_every_steps": 2, "window": 10, "report_every_steps": 20},
    )
    found = []
    for chunk in (1, 2, 33, 1000):
        learner = Learner(made)
        said, taken = journey(learner, stream("binary", 200), chunk)
        found.append((said.tobytes(), taken, digest(learner.state_dict())))
    assert 20 < sum(found[0][1]) < 180
    assert found[0] == found[1] == found[2] == found[3]


def test_one_engine_goes_on_where_the_other_has_stopped() -> None:
    settings_: dict[str, Any] = {
        "plasticity": [LIVELY],
        "replay": {"retention": "reservoir", "per_event": 2, "capacity": 20},
    }
    outcomes = stream("binary", 120)
    whole, _ = engines(**copy.deepcopy(settings_))
    journey(whole, outcomes)
    for first in (0, 1):
        pair = engines(**copy.deepcopy(settings_))
        journey(pair[first], outcomes[:60])
        pair[1 - first].load_state_dict(copy.deepcopy(pair[first].state_dict()))
        journey(pair[1 - first], outcomes[60:])
        torch.testing.assert_close(pair[1 - first].engine.dense.flat, whole.engine.dense.flat, rtol=1e-9, atol=1e-9)


def test_an_answer_is_the_same_asked_alone_among_others_or_in_the_stream() -> None:
    _, fused = engines(precision="float32")
    items = stream("binary", 60)
    journey(fused, items[:40])
    asked = [item.ticket.features for item in items[40:]]
    together = [scores.output.tobytes() for scores in fused.predict_many(asked)]
    assert [fused.predict(each).output.tobytes() for each in asked] == together
    promised = [fused.answer(Event("", "", 0.0, each, Origin(EVENTS, 0, 0)))[1] for each in asked]
    assert fused.fused is not None
    fused.fused.settle()
    assert [scores.output.tobytes() for scores in promised] == together


def test_an_answer_says_of_which_weights_it_is() -> None:
    _, fused = engines(optimizer={"max_grad_norm": 1.0})
    assert fused.fused is not None
    versions, learned = [], 0
    for i, item in enumerate(stream("binary", 60)):
        _, scores = fused.answer(Event("", "", 0.0, item.ticket.features, Origin(EVENTS, 0, i)))
        fused.fused.learn(item)
        versions.append(scores)
    taken = fused.fused.settle()
    for scores, was_learned in zip(versions, taken, strict=True):
        assert scores.version == learned
        learned += was_learned
    assert 0 < learned < 60


def test_a_row_is_heard_of_when_it_has_changed() -> None:
    heard: list[set[int]] = []
    for learner in engines(replay={"retention": "reservoir", "per_event": 2}):
        rows: set[int] = set()
        learner.engine.watch = lambda ids, rows=rows: rows.update(ids.tolist())
        journey(learner, stream("binary", 30))
        heard.append(rows)
    assert heard[0] == heard[1] != set()


def test_rows_and_diagnostics_know_whose_they_are() -> None:
    eager, fused = engines(
        replay={"retention": "reservoir", "per_event": 1, "capacity": 20},
        diagnostics={"sample_every_steps": 3, "window": 12},
    )
    for learner in (eager, fused):
        journey(learner, stream("binary", 90))
    for part in ("memory", "diagnostics"):
        one, two = (getattr(learner, part).owners for learner in (eager, fused))
        assert all((a == b).all() for a, b in zip(one.columns(), two.columns(), strict=True))
    assert fused.forget(Selector(key="k3")) == eager.forget(Selector(key="k3"))
    assert not difference(fused.memory.state_dict(), eager.memory.state_dict())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"plugins": ["ema", "reptile"]}, "plugins: reptile"),
        ({"plugins": ["ema", "reptile", {"kind": "served", "sets": ["slow", "ema"]}]}, "plugins: reptile, served"),
        ({"plasticity": [{"kind": "l2_init"}]}, "plasticity.0: l2_init"),
        ({"plasticity": [{**LIVELY, "exact": True}]}, "plasticity.0: continual_backprop, exact"),
        ({"model": {"kind": "recurrent"}}, "model.kind: recurrent"),
        ({"model": {"kind": "ffm"}}, "model.kind: ffm"),
        ({"tasks": {"like": {"label": "liked"}}}, "tasks: like"),
        ({"model": {"layer_norm": True}}, "model.layer_norm"),
        ({"loss": {"kind": "reloop"}, "error_memory": [KNN]}, "loss.kind: reloop"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_has_no_compiled_form_is_named_and_runs_eagerly(more: dict[str, Any], named: str) -> None:
    made: Config = config(**copy.deepcopy(more))
    assert str(obstacle(made)).startswith(named)
    learner = Learner(made)
    assert learner.fused is None and str(learner.obstacle).startswith(named)
    with pytest.raises(ConfigError, match=r"worker\.engine: fused has no form of"):
        Learner(config(worker={"engine": "fused"}, **copy.deepcopy(more)))


def test_features_outside_the_table_are_an_error_and_no_crash() -> None:
    _, fused = engines()
    far = encode({"user": 1})
    for row in (-1, len(fused.engine.table)):
        wrong = far._replace(ids=np.full_like(far.ids, row))
        with pytest.raises(IndexError, match=f"row {row} "):
            fused.predict(wrong)
        with pytest.raises(IndexError, match=f"row {row} "):
            fused.learn(outcome(wrong, 1.0))
    assert fused.learn(outcome(far, 1.0))


@pytest.mark.parametrize("label", [3.0, -1.0])
def test_a_class_that_there_is_not_is_refused(label: float) -> None:
    _, fused = engines("multiclass")
    before = digest(fused.state_dict())
    assert not fused.learn(outcome(encode({"user": 1}), label))
    assert digest(fused.state_dict()) == before


BOUNDS = """
from tests.test_engine_fused import LIVELY, engines, journey
from tests.test_learner import stream
for task in ("binary", "multiclass"):
    eager, fused = engines(task, plasticity=[LIVELY], replay={"retention": "recency", "per_event": 6, "capacity": 9},
                           diagnostics={"sample_every_steps": 2, "window": 5, "report_every_steps": 9})
    journey(fused, stream(task, 60))
"""


def test_no_index_leaves_its_array(tmp_path: Any) -> None:
    checked = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", BOUNDS], env=checked, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
