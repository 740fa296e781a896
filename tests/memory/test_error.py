"""The error memory inside learner and worker: of prediction time, in stream order, off without a trace."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch.nn import functional

from streamcl.config import Config, ConfigError
from streamcl.engine.eager import as_tensors
from streamcl.engine.reloop import self_corrected
from streamcl.features import Featurizer
from streamcl.join import Joiner
from streamcl.learner import Learner
from streamcl.memory import ErrorMemory
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.state import digest, flatten, unflatten
from tests import journey
from tests.steps import take

TASKS = ["binary", "multiclass", "regression"]
STAGES: list[dict[str, Any]] = [
    {"kind": "key", "key": "user"},
    {"kind": "knn", "capacity": 30, "neighbours": 5, "gamma": "auto"},
    {"kind": "sketch", "key": "hidden", "bits": 4, "arrays": 3, "lambda": 0.5},
    {"kind": "knn", "key": "ids", "capacity": 10, "gamma": 1},
    {"kind": "sketch", "key": f"{__name__}:first_two", "bits": 2, "arrays": 2},
]


def first_two(_features: Encoded, embedding: Any, _hidden: Any) -> Any:
    return embedding[:2]


def scalar(_features: Encoded, _embedding: Any, _hidden: Any) -> float:
    return 1.0


def config(stages: list[dict[str, Any]], task: str = "binary", **more: Any) -> Config:
    data = {
        "name": "t",
        "task": task,
        "events": {"url": "memory://a/b", "label": "y"},
        "features": {
            "user": {"kind": "categorical", "buckets": 500},
            "tags": {"kind": "bag", "buckets": 10, "max_items": 3},
            "price": "numeric",
        },
        "model": {"kind": "deepfm", "embedding_dim": 3, "hidden": [4], "classes": 3},
        "error_memory": stages,
    }
    return Config.parse({**data, **more})


def events(made: Config, count: int, seed: int = 0) -> list[tuple[Encoded, float]]:
    rng, encode = np.random.default_rng(seed), Featurizer(made).encode
    classes = 3 if made.task == "multiclass" else 2
    found = []
    for _ in range(count):
        user = int(rng.integers(12))
        payload = {"user": user, "tags": ["a", str(user % 3)], "price": float(rng.normal())}
        found.append((encode(payload), float((user + (rng.random() < 0.2)) % classes)))
    return found


def ticket(features: Encoded, scores: Scores, offset: int = 0) -> Ticket:
    return Ticket(str(offset), float(offset), features, scores, Origin(EVENTS, 0, offset))


def run(learner: Learner, stream: list[tuple[Encoded, float]], delay: int = 0) -> list[Scores]:
    """Predict each, and learn from its label `delay` events later."""
    waiting: list[Outcome] = []
    said = []
    for offset, (features, label) in enumerate(stream):
        said.append(learner.predict(features))
        waiting.append(Outcome(ticket(features, said[-1], offset), label, Fate.JOINED, 0.0))
        if len(waiting) > delay:
            assert learner.learn(waiting.pop(0))
    return said


def bytes_of(said: list[Scores]) -> list[bytes]:
    return [scores.served.tobytes() for scores in said]


@pytest.mark.parametrize("task", TASKS)
def test_a_lambda_of_0_and_no_memory_at_all_serve_and_learn_the_same(task: str) -> None:
    off, idle = (
        config(stages, task)
        for stages in ([], [{"kind": "knn", "lambda": 0}, {"kind": "key", "key": "user", "lambda": 0}])
    )
    learners = Learner(off), Learner(idle)
    one, two = (run(learner, events(off, 60)) for learner in learners)
    assert bytes_of(one) == bytes_of(two) == [scores.base.tobytes() for scores in two]
    states = [learner.state_dict() for learner in learners]
    assert "recall" not in states[0]
    del states[1]["recall"]
    assert digest(states[0]) == digest(states[1])


@pytest.mark.parametrize("task", TASKS)
def test_a_label_changes_no_score_given_before_it(task: str) -> None:
    made = config([each | {"lambda": 1.0} for each in STAGES], task)
    stream = events(made, 50)
    other = [*stream[:30], (stream[30][0], 1.0 - min(stream[30][1], 1.0)), *stream[31:]]
    one, two = (bytes_of(run(Learner(made), each)) for each in (stream, other))
    assert one[:31] == two[:31]
    assert one[31:] != two[31:]


@pytest.mark.parametrize("task", TASKS)
def test_each_stage_is_given_what_the_one_before_served(task: str) -> None:
    learner = Learner(made := config(STAGES, task))
    assert all(len(scores.recalled) == len(STAGES) for scores in run(learner, events(made, 60)))
    scores = learner.predict(events(made, 1, seed=5)[0][0])
    after = [each.given for each in scores.recalled[1:]] + [scores.served]
    for stage, recalled, next_given in zip(learner.recall.stages, scores.recalled, after, strict=True):
        assert stage.choice.serve(recalled).tobytes() == next_given.tobytes()


def test_what_is_written_is_key_and_score_of_prediction_time() -> None:
    made = config([{"kind": "knn", "key": "embedding"}])
    learner = Learner(made)
    said = run(learner, events(made, 25), delay=7)
    held = learner.recall.stages[0].form.state_dict()["values"]
    np.testing.assert_array_equal(held[:, 1], [scores.base[0] for scores in said[: len(held)]])
    np.testing.assert_array_equal(held[:, 0], [label for _, label in events(made, 25)][: len(held)])


@settings(deadline=None, max_examples=10)
@given(task=st.sampled_from(TASKS), cut=st.integers(1, 49), delay=st.sampled_from([0, 5]))
def test_a_restored_learner_goes_on_bit_for_bit(task: str, cut: int, delay: int) -> None:
    made = config(STAGES, task)
    stream = events(made, 50)
    whole, resumed = Learner(made), Learner(made)
    run(whole, stream[:cut], delay)
    resumed.load_state_dict(unflatten(*flatten(whole.state_dict())))
    assert bytes_of(run(whole, stream[cut:])) == bytes_of(run(resumed, stream[cut:]))
    assert digest(whole.state_dict()) == digest(resumed.state_dict())


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_is_scored_as_one_by_one(task: str) -> None:
    learner = Learner(made := config(STAGES, task))
    run(learner, events(made, 60))
    features = [each for each, _ in events(made, 9, seed=1)]
    for one, many in zip(map(learner.predict, features), learner.predict_many(features), strict=True):
        np.testing.assert_allclose(many.served, one.served, rtol=1e-5, atol=1e-6)
        assert [r.support for r in many.recalled] == pytest.approx([r.support for r in one.recalled], rel=1e-3)


def test_other_weights_read_nothing_old_and_late_labels_of_the_old_are_counted_not_written() -> None:
    made = config([{"kind": "knn"}, {"kind": "key", "key": "user"}, {"kind": "sketch", "on_new_weights": "keep"}])
    learner = Learner(made)
    stream = events(made, 40)
    said = run(learner, stream)
    learner.recall.renew(7)
    fresh = learner.predict(stream[0][0])
    assert [bool(each.support) for each in fresh.recalled] == [False, False, True]
    learner.recall.observe(said[-1], stream[-1][1])
    read = learner.recall.read()
    assert [read[f"error_memory_{i}_stale"] for i in range(3)] == [1, 1, 0]
    assert [read[f"error_memory_{i}_rows"] for i in range(3)] == [0, 0, 41]
    learner.recall.observe(learner.predict(stream[0][0]), 1.0)
    assert learner.recall.read()["error_memory_0_rows"] == 1


def test_losses_of_lambda_outlive_the_weights() -> None:
    made = config([{"kind": "key", "key": "user"}])
    before, after = Learner(made), Learner(made)
    run(before, events(made, 200))
    after.recall.inherit(before.recall)
    after.recall.renew(1)
    assert after.recall.stages[0].choice.losses.tobytes() == before.recall.stages[0].choice.losses.tobytes()
    assert not len(after.recall.stages[0].form)


def test_a_user_whose_taste_the_weights_can_not_follow_is_put_right() -> None:
    """Frozen weights, labels that follow the user: the memory has to find out by itself, and to trust itself."""
    made = config([{"kind": "key", "key": "user", "shrinkage": 1.0}])
    learner = Learner(made)
    losses: dict[str, list[float]] = {"base": [], "served": []}
    for features, label in events(made, 3000):
        scores = learner.predict(features)
        for name in losses:
            p = float(getattr(scores, name)[0])
            losses[name].append(-np.log(p if label else 1.0 - p))
        learner.recall.observe(scores, label)
    assert learner.recall.read()["error_memory_0_lambda"] >= 0.7
    assert np.mean(losses["served"][-1000:]) < np.mean(losses["base"][-1000:]) - 0.1


@pytest.mark.parametrize("partitions", [1, 3])
def test_poll_size_crash_and_restart_change_nothing(tmp_path: Path, partitions: int) -> None:
    items = [
        item
        for i in range(60)
        for item in (journey.view(i, float(i), i), *([journey.click(i, i + 3.0, i)] if i % 3 else []))
    ]
    stages = [{"kind": "key", "key": "user"}, {"kind": "knn", "capacity": 20}, {"kind": "sketch", "bits": 3}]

    def settings_of(name: str, records: int) -> Config:
        worker = {"max_records": records, "poll_timeout_s": 0.01}
        return journey.settings(tmp_path / name, error_memory=stages, worker=worker)

    digests = set()
    for records in (1, 7, 1000):
        journey.fill(items, partitions)
        digests.add(journey.finish(settings_of(f"whole{records}", records)).digest)
    journey.fill(items, partitions)
    for turns in (3, 9):
        journey.die_after(settings_of("crash", 5), turns)
    result = journey.finish(settings_of("crash", 5))
    digests.add(result.digest)
    assert len(digests) == 1
    assert result.worker.readings()["error_memory_0_hit_ratio"] > 0.5
    assert "base_log_loss" in result.worker.readings()


def test_tickets_keep_what_was_recalled(tmp_path: Path) -> None:
    made = config(STAGES)
    learner = Learner(made)
    said = run(learner, events(made, 20))
    joiner, twin = (Joiner(journey.settings(tmp_path).join, Counter()) for _ in range(2))
    for offset, ((features, _), scores) in enumerate(zip(events(made, 20), said, strict=True)):
        joiner.add(ticket(features, scores if offset != 4 else replace(scores, recalled=()), offset))
    twin.load_state_dict(unflatten(*flatten(joiner.state_dict())))
    assert digest(twin.state_dict()) == digest(joiner.state_dict())
    for one, two in zip(joiner.tickets.values(), twin.tickets.values(), strict=True):
        assert len(one.scores.recalled) == len(two.scores.recalled)
        for mine, theirs in zip(one.scores.recalled, two.scores.recalled, strict=True):
            for one_value, other_value in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one_value, other_value)


def test_a_memory_may_come_change_and_go_after_a_clean_stop(tmp_path: Path) -> None:
    items = [item for i in range(30) for item in (journey.view(i, float(i)), journey.click(i, i + 9.0))]
    journey.fill(items[:20])
    journey.finish(journey.settings(tmp_path))
    stages = [{"kind": "key", "key": "user"}, {"kind": "knn", "capacity": 20}]
    for stage_list in (stages, stages[:1], [{"kind": "knn", "capacity": 9, "key": "hidden"}], []):
        result = journey.finish(journey.settings(tmp_path, error_memory=stage_list))
        assert len(result.worker.learner.recall.stages) == len(stage_list)  # type: ignore[union-attr]


def test_a_changed_stage_takes_no_ticket_of_before() -> None:
    old, new = config([{"kind": "knn", "capacity": 9}]), config([{"kind": "knn", "capacity": 8}])
    before, after = Learner(old), Learner(new)
    said = run(before, events(old, 20))
    after.load_state_dict(before.state_dict())
    after.recall.observe(said[-1], 1.0)
    assert not len(after.recall.stages[0].form)
    assert after.recall.read()["error_memory_0_stale"] == 1


@pytest.mark.parametrize(
    ("stages", "more", "text"),
    [
        ([{"kind": "key", "key": "price"}], {}, "error_memory.0.key: 'price' is no categorical feature"),
        ([{"kind": "key", "key": "tags"}], {}, "error_memory.0.key: 'tags' is no categorical feature"),
        ([{"kind": "knn"}], {"model": {"kind": "logistic"}}, "model logistic offers ids, or module:function"),
        (
            [{"kind": "knn", "key": "hidden"}],
            {"model": {"kind": "mlp", "hidden": []}},
            "model mlp offers embedding, ids",
        ),
        ([{"kind": "knn", "lambda": 1.5}], {}, "error_memory.0"),
        ([{"kind": "knn", "gama": 1}], {}, "error_memory.0.gama: unknown key; did you mean 'gamma'?"),
        ([{"kind": "knn", "lamda": 1}], {}, "did you mean 'lambda'?"),
        ([{"kind": "tree"}], {}, "error_memory.0"),
        ([{"kind": "key", "key": "user"}], {"river": "x:y", "trust_pickle": True}, "a River model offers none"),
    ],
)
def test_what_can_not_be_is_said_with_its_path(stages: list[dict[str, Any]], more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("?", r"\?").replace("(", r"\(")):
        config(stages, **more)


@pytest.mark.parametrize(
    ("path", "text"), [("nowhere:f", "nowhere"), (f"{__name__}:gone", "gone"), (f"{__name__}:scalar", "not a vector")]
)
def test_a_key_function_that_is_none_is_refused(path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"error_memory\.0\.key.*{text}"):
        Learner(config([{"kind": "knn", "key": path}]))


def test_without_stages_it_does_nothing() -> None:
    made = config([])
    memory = ErrorMemory(made, Featurizer(made).layout, (0, 0))
    memory.observe(Learner(made).predict(events(made, 1)[0][0]), 1.0)
    assert memory.read() == memory.state_dict() == {}


def test_reloop_pulls_towards_what_was_better_when_served() -> None:
    """The logit gradient is (1 - a)(p - y) + a p (1 - p) s, with s = -1 if y = 1 and p < p', 1 if y = 0 and p > p'."""
    made = config([], loss={"kind": "reloop", "alpha": 0.3}, optimizer={"kind": "sgd"})
    [(features, _)] = events(made, 1)
    for label in (0.0, 1.0):
        for served in (0.1, 0.9):
            learner = Learner(made)
            ids, weights, dense = as_tensors(*features)
            event = ids, weights, dense, torch.tensor([label]), torch.ones(1)
            take(learner.engine, *event, 0.5)
            bias = learner.engine.dense.params["linear.bias"]
            p = float(learner.engine.predict(ids, weights, dense).sigmoid())
            before = float(bias.detach())
            take(learner.engine, *event, served)
            sign = -1.0 if label == 1.0 and p < served else 1.0 if label == 0.0 and p > served else 0.0
            expected = 0.7 * (p - label) + 0.3 * p * (1 - p) * sign
            assert (before - float(bias.detach())) / made.optimizer.learning_rate == pytest.approx(expected, rel=1e-4)


def test_reloop_holds_a_rounding_error_for_nothing() -> None:
    logit, y = torch.zeros(1, requires_grad=True), torch.ones(1)
    plain = functional.binary_cross_entropy_with_logits(logit, y, reduction="none")
    for served, slope in ((0.5 + 3e-7, -0.5), (0.5 - 3e-7, -0.5), (0.5, -0.5), (0.6, -0.5 - 0.25)):
        loss = self_corrected(plain, logit, y, served, alpha=0.5) * 2.0
        [gradient] = torch.autograd.grad(loss.sum(), logit, retain_graph=True)
        assert float(gradient) == pytest.approx(slope, abs=1e-6)


def test_reloop_is_for_binary_labels() -> None:
    with pytest.raises(ConfigError, match=r"loss\.kind: reloop"):
        config([], "regression", loss={"kind": "reloop"})
