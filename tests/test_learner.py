import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.state import digest, flatten, unflatten

TASKS = ["binary", "multiclass", "regression"]
FEATURES = {
    "user": {"kind": "categorical", "buckets": 500},
    "tags": {"kind": "bag", "buckets": 10, "max_items": 3},
    "price": "numeric",
}


def config(task: str = "binary", **more: Any) -> Config:
    model = {"kind": "deepfm", "embedding_dim": 3, "hidden": [4], "classes": 3, **more.pop("model", {})}
    base = {"name": "t", "task": task, "events": {"url": "memory://a/b", "label": "y"}, "features": FEATURES}
    replay = {"retention": "recency", **more.pop("replay", {})}
    return Config.parse({**base, "model": model, "replay": replay, **more})


def encode(payload: dict[str, Any]) -> Encoded:
    return Featurizer(config()).encode(payload)


def outcome(features: Encoded, label: float, offset: int = 0) -> Outcome:
    nothing = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
    ticket = Ticket(str(offset), float(offset), features, nothing, Origin(EVENTS, 0, offset))
    return Outcome(ticket, label, Fate.JOINED, 0.0)


def stream(task: str, count: int, seed: int = 0) -> list[Outcome]:
    """Users have a taste: the label follows from who it is, and a little from the price."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        user, price = int(rng.integers(12)), float(rng.normal(50.0, 20.0))
        tags = [str(t) for t in rng.integers(5, size=rng.integers(5))]
        labels = {"binary": user % 2, "multiclass": user % 3, "regression": 1000.0 + 50.0 * (user % 4) + price}
        payload = {"user": user, "tags": tags, "price": None if i % 9 == 0 else price}
        found.append(outcome(encode(payload), float(labels[task]), i))
    return found


def learned(made: Config, outcomes: list[Outcome]) -> Learner:
    learner = Learner(made)
    for item in outcomes:
        assert learner.learn(item)
    return learner


def same(one: Scores, two: Scores) -> bool:
    return (one.output.tobytes(), one.served.tobytes(), one.version) == (
        two.output.tobytes(),
        two.served.tobytes(),
        two.version,
    )


@pytest.mark.parametrize("task", TASKS)
def test_predicting_changes_nothing_and_repeats_itself(task: str) -> None:
    outcomes = stream(task, 20)
    learner = learned(config(task, replay={"per_event": 2}), outcomes)
    before = digest(learner.state_dict())
    first = [learner.predict(o.ticket.features) for o in outcomes]
    assert all(same(learner.predict(o.ticket.features), p) for o, p in zip(outcomes, first, strict=True))
    assert digest(learner.state_dict()) == before


@pytest.mark.parametrize(("task", "outputs", "served"), [("binary", 1, 1), ("multiclass", 3, 3), ("regression", 1, 1)])
def test_scores_have_the_shape_of_their_task(task: str, outputs: int, served: int) -> None:
    scores = learned(config(task), stream(task, 5)).predict(encode({"user": 1}))
    assert (scores.output.shape, scores.served.shape, scores.version) == ((outputs,), (served,), 5)
    assert scores.output.dtype == scores.served.dtype == np.float32
    if task != "regression":
        assert 0.0 < float(scores.served.min()) <= float(scores.served.max()) < 1.0


def test_the_served_score_is_the_sigmoid_or_softmax_of_the_output() -> None:
    scores = learned(config("binary"), stream("binary", 30)).predict(encode({"user": 1}))
    assert scores.served[0] == pytest.approx(1.0 / (1.0 + math.exp(-scores.output[0])))
    scores = learned(config("multiclass"), stream("multiclass", 30)).predict(encode({"user": 1}))
    powers = [math.exp(x) for x in scores.output]
    assert scores.served == pytest.approx([p / sum(powers) for p in powers])


def test_extreme_logits_are_served_without_overflow() -> None:
    learner = Learner(config("binary"))
    for logit, score in ((1e30, 1.0), (-1e30, 0.0), (-100.0, 0.0)):
        assert learner.serve(np.array([[logit]], np.float32))[0, 0] == pytest.approx(score)
    served = Learner(config("multiclass")).serve(np.array([[1e30, -1e30, 0.0]], np.float32))[0]
    assert served.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["logistic", "fm", "mlp", "deepfm", "dcnv2"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam", "ftrl"])
def test_a_separable_problem_is_learned(kind: str, rule: str) -> None:
    outcomes = stream("binary", 600)
    rate = {"sgd": 0.3, "adagrad": 0.1, "adam": 0.02, "ftrl": 0.3}[rule]
    made = config("binary", model={"kind": kind}, optimizer={"kind": rule, "learning_rate": rate})
    learner = learned(made, outcomes)
    hits = [(learner.predict(o.ticket.features).served[0] > 0.5) == (o.label > 0.5) for o in outcomes[-200:]]
    assert np.mean(hits) > 0.97


def test_classes_are_learned() -> None:
    outcomes = stream("multiclass", 600)
    learner = learned(config("multiclass"), outcomes)
    hits = [learner.predict(o.ticket.features).served.argmax() == o.label for o in outcomes[-200:]]
    assert np.mean(hits) > 0.97


def test_regression_is_served_in_the_units_of_the_label() -> None:
    outcomes = stream("regression", 800)
    learner = learned(config("regression"), outcomes)
    last = outcomes[-200:]
    errors = [learner.predict(o.ticket.features).served[0] - o.label for o in last]
    assert abs(np.mean(errors)) < 10.0
    assert np.std(errors) < 0.5 * np.std([o.label for o in last])


def test_regression_does_not_depend_on_the_unit_of_the_label() -> None:
    outcomes = stream("regression", 50)
    thousandfold = [outcome(o.ticket.features, o.label * 1024.0, i) for i, o in enumerate(outcomes)]
    one, two = (learned(config("regression"), items).predict(encode({"user": 3})) for items in (outcomes, thousandfold))
    assert two.served[0] == pytest.approx(1024.0 * one.served[0], rel=1e-5)


def test_before_the_first_label_a_regression_serves_nought_and_after_it_the_label() -> None:
    learner = Learner(config("regression"))
    assert learner.predict(encode({"user": 1})).served[0] == pytest.approx(0.0, abs=1e-3)
    assert learner.learn(outcome(encode({"user": 1}), 700.0))
    assert learner.predict(encode({"user": 1})).served[0] == pytest.approx(700.0, abs=1.0)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_live_one_plus_weight_times_the_mean_of_the_replayed(task: str) -> None:
    rate, weight, draws = 0.125, 0.75, 3
    optimizer = {"kind": "sgd", "learning_rate": rate, "embedding_learning_rate": rate}
    learner = learned(
        config(task, optimizer=optimizer, replay={"per_event": draws, "weight": weight}), stream(task, 10)
    )
    live = stream(task, 1, seed=9)[0]
    twin = Learner(config(task, optimizer=optimizer))
    twin.load_state_dict(learner.state_dict())

    ids, weights, dense, y = learner.memory.draw(draws, learner.version)
    twin.numerics.update(live.ticket.features.dense)
    if task == "regression":
        twin.target.update(np.array([live.label], np.float32))
    losses = []
    for row in [(*live.ticket.features, np.float32(live.label))] + [
        (ids[i].numpy(), weights[i].numpy(), dense[i].numpy(), y[i].numpy()) for i in range(draws)
    ]:
        args = [torch.from_numpy(a)[None] for a in (row[0], row[1], twin.numerics.apply(row[2]))]
        label = twin.target.apply(np.array([row[3]], np.float32)) if task == "regression" else np.array([row[3]])
        out = twin.engine.forward(twin.engine.table[args[0]], *args[1:])
        losses.append(twin.engine.losses(out, torch.from_numpy(label))[0])
    loss = losses[0] + weight * sum(losses[1:]) / draws
    names, params = zip(*twin.engine.dense.params.items(), strict=True)
    expected = {n: p - rate * g for n, p, g in zip(names, params, torch.autograd.grad(loss, params), strict=True)}

    assert learner.learn(live)
    for name, param in learner.engine.dense.params.items():
        torch.testing.assert_close(param.detach(), expected[name].detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam", "ftrl"])
def test_a_replay_of_no_weight_is_no_replay(rule: str) -> None:
    optimizer = {"kind": rule, "l2": 0.01}
    outcomes = stream("binary", 30)
    none, weightless = (
        learned(config(optimizer=optimizer, replay=replay), outcomes)
        for replay in ({"per_event": 0}, {"per_event": 4, "weight": 0.0})
    )
    assert digest(none.state_dict()) == digest(weightless.state_dict())


def test_an_example_never_replays_itself() -> None:
    made = config(replay={"per_event": 4, "capacity": 1}, worker={"engine": "eager"})
    learner, drawn = Learner(made), []
    examples = learner.memory.examples

    def watching(index: torch.Tensor) -> Any:
        rows = examples(index)
        drawn.append({int(i) for i in rows[0][:, -1]})
        return rows

    learner.memory.examples = watching  # type: ignore[method-assign]
    users = [encode({"user": i}) for i in range(6)]
    for i, features in enumerate(users):
        assert learner.learn(outcome(features, 1.0, i))
    assert drawn == [{int(features.ids[-1])} for features in users[:-1]]


def test_the_first_example_is_learned_without_replay() -> None:
    item = stream("binary", 1)
    with_replay, without = (learned(config(replay={"per_event": n}), item) for n in (3, 0))
    assert digest(with_replay.state_dict()) == digest(without.state_dict())


@pytest.mark.parametrize("label", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("task", ["binary", "regression"])
def test_a_label_that_is_not_finite_changes_nothing(task: str, label: float) -> None:
    learner = learned(config(task, replay={"per_event": 2}), stream(task, 10))
    before = digest(learner.state_dict())
    assert not learner.learn(outcome(encode({"user": 3, "price": 7.0}), label))
    assert digest(learner.state_dict()) == before


@pytest.mark.parametrize("task", TASKS)
def test_a_gradient_that_is_too_large_changes_nothing_not_even_norms_and_memory(task: str) -> None:
    made = config(task, replay={"retention": "reservoir", "per_event": 2})
    learner = learned(made, stream(task, 10))
    learner.engine.max_grad_norm = 1e-12
    before = digest(learner.state_dict())
    assert not learner.learn(stream(task, 1, seed=5)[0])
    assert digest(learner.state_dict()) == before
    assert learner.version == 10


def test_weights_stay_finite_whatever_comes() -> None:
    learner = Learner(config("regression", optimizer={"kind": "sgd", "learning_rate": 50.0}))
    rng = np.random.default_rng(0)
    for i in range(300):
        payload = {"user": i % 7, "price": float(rng.normal() * 10.0 ** rng.integers(-30, 30))}
        learner.learn(outcome(encode(payload), float(rng.normal() * 10.0 ** rng.integers(-30, 30)), i))
    assert bool(torch.isfinite(learner.engine.dense.flat).all())
    assert bool(torch.isfinite(learner.engine.table).all())


def test_replayed_rows_that_are_too_large_do_not_quarantine_a_good_example() -> None:
    learner = learned(config("regression", replay={"per_event": 2}), stream("regression", 10))
    learner.memory.weights[:] = 1e30
    assert learner.learn(stream("regression", 1, seed=5)[0])
    assert learner.version == 11


def test_an_infinite_number_moves_no_norm() -> None:
    learner = learned(config(), stream("binary", 10))
    before = digest(learner.numerics.state_dict())
    features = encode({"user": 1})
    features.dense[0] = np.inf
    assert learner.learn(outcome(features, 1.0))
    assert digest(learner.numerics.state_dict()) == before


def test_replay_uses_todays_norms() -> None:
    learner = learned(config(replay={"per_event": 1, "capacity": 1}), stream("binary", 1))
    assert math.isnan(learner.memory.dense[0, 0])
    assert learner.learn(outcome(encode({"user": 1, "price": 40.0}), 1.0))
    assert learner.memory.dense[0, 0] == 40.0  # raw


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    kind=st.sampled_from(["logistic", "fm", "mlp", "deepfm", "dcnv2"]),
    rule=st.sampled_from(["sgd", "adagrad", "adam", "ftrl"]),
    retention=st.sampled_from(["none", "reservoir", "recency", "class_balanced"]),
    cut=st.integers(0, 20),
)
def test_a_learner_resumed_anywhere_goes_on_to_the_bit(
    task: str, kind: str, rule: str, retention: str, cut: int
) -> None:
    if retention == "class_balanced" and task == "regression":
        retention = "recency"
    replay = {"retention": retention, "capacity": 6, "per_event": 0 if retention == "none" else 3}
    made = config(task, model={"kind": kind}, optimizer={"kind": rule}, replay=replay)
    outcomes = stream(task, 20)
    whole, resumed = learned(made, outcomes), Learner(made)
    resumed.load_state_dict(unflatten(*flatten(learned(made, outcomes[:cut]).state_dict())))
    for item in outcomes[cut:]:
        assert resumed.learn(item)
    assert digest(resumed.state_dict()) == digest(whole.state_dict())
    assert same(resumed.predict(encode({"user": 5})), whole.predict(encode({"user": 5})))


def test_learning_ignores_and_spares_the_global_generators() -> None:
    outcomes = stream("binary", 20)
    made = config(replay={"retention": "reservoir", "capacity": 5, "per_event": 3})
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        digests.append(digest(learned(made, outcomes).state_dict()))
        assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1]


def test_what_it_reads_out_is_how_much_it_holds_and_has_learned() -> None:
    learner = learned(config(replay={"capacity": 5}), stream("binary", 9))
    replay = {"replay_rows": 5.0, "replay_age_s": 2.0, "replay_fill": 1.0}
    assert learner.read() == {**replay, "weights_version": 9.0, "diagnostics_examples": 0.0}
