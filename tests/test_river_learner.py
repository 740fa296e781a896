from typing import Any

import numpy as np
import pytest
from river import linear_model, naive_bayes, preprocessing, tree

from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.river_learner import RiverLearner
from streamcl.state import flatten, pickles, unflatten

MODELS = {
    "binary": "river.linear_model:LogisticRegression",
    "multiclass": "river.tree:HoeffdingTreeClassifier",
    "regression": "river.linear_model:LinearRegression",
}
PLAIN: dict[str, Any] = {
    "binary": linear_model.LogisticRegression,
    "multiclass": tree.HoeffdingTreeClassifier,
    "regression": linear_model.LinearRegression,
}
TASKS = sorted(MODELS)
FEATURES = {
    "user": {"kind": "categorical", "buckets": 30},
    "tags": {"kind": "bag", "buckets": 10, "max_items": 3},
    "price": "numeric",
}


def config(task: str, path: str | None = None) -> Config:
    return Config.parse(
        {
            "name": "t",
            "task": task,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": FEATURES,
            "model": {"classes": 3},
            "river": path or MODELS[task],
            "trust_pickle": True,
        }
    )


def encode(payload: dict[str, Any]) -> Encoded:
    return Featurizer(config("binary")).encode(payload)


def outcome(features: Encoded, label: float, offset: int) -> Outcome:
    nothing = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)
    ticket = Ticket(str(offset), 0.0, features, nothing, Origin(EVENTS, 0, offset))
    return Outcome(ticket, label, Fate.JOINED, 0.0)


def stream(task: str, count: int = 300) -> list[Outcome]:
    rng, found = np.random.default_rng(0), []
    for i in range(count):
        user, price = int(rng.integers(6)), float(rng.normal())
        label = {"binary": user % 2, "multiclass": user % 3, "regression": user + price}[task]
        tags = [str(t) for t in rng.integers(4, size=rng.integers(4))]
        payload = {"user": user, "tags": tags, "price": None if i % 7 == 0 else price}
        found.append(outcome(encode(payload), float(label), i))
    return found


def plain_dict(features: Encoded) -> dict[str, float]:
    """Numbers by name, then hashed categories as `field=row`, those that stand twice added up."""
    x = {} if np.isnan(features.dense[0]) else {"price": float(features.dense[0])}
    for slot, (row, weight) in enumerate(zip(features.ids, features.weights, strict=True)):
        name = f"{'user' if slot == 3 else 'tags'}={row}"
        if weight:
            x[name] = x.get(name, 0.0) + float(weight)
    return x


def plain_scores(model: Any, task: str, x: dict[str, float]) -> list[float]:
    if task == "regression":
        return [model.predict_one(x)]
    chances = model.predict_proba_one(x)
    if task == "binary":
        return [chances[True]]
    return [chances.get(c, 0.0) for c in range(3)] if chances else [1 / 3] * 3


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_plain_river_on_the_same_dicts(task: str) -> None:
    learner, model = RiverLearner(config(task)), PLAIN[task]()
    for item in stream(task):
        x = plain_dict(item.ticket.features)
        scores = learner.predict(item.ticket.features)
        assert scores.served == pytest.approx(plain_scores(model, task, x), rel=1e-6)
        assert learner.learn(item)
        model.learn_one(x, {"binary": bool, "multiclass": int, "regression": float}[task](item.label))
    assert learner.version == 300


def test_predicting_changes_no_prediction() -> None:
    items = stream("multiclass")
    learner, other = (RiverLearner(config("multiclass")) for _ in range(2))
    for item in items:
        for _ in range(3):
            learner.predict(item.ticket.features)
        learner.learn(item)
        other.learn(item)
    for item in items[:20]:
        one, two = (made.predict(item.ticket.features).served for made in (learner, other))
        assert one.tolist() == two.tolist()


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_model_goes_on_to_the_bit(task: str) -> None:
    items = stream(task)
    whole, restored = RiverLearner(config(task)), RiverLearner(config(task))
    for item in items[:150]:
        whole.learn(item)
    restored.load_state_dict(unflatten(*flatten(whole.state_dict())))
    for item in items[150:]:
        one, two = (made.predict(item.ticket.features) for made in (whole, restored))
        assert (one.served.tobytes(), one.version) == (two.served.tobytes(), two.version)
        whole.learn(item)
        restored.learn(item)


def test_a_state_says_that_it_holds_a_pickle() -> None:
    rest, _ = flatten({"learner": RiverLearner(config("binary")).state_dict()})
    assert list(pickles(rest)) == ["/learner/pickle"]


def test_a_category_that_stands_twice_in_a_bag_weighs_twice() -> None:
    learner = RiverLearner(config("binary"))
    x = learner._dict(encode({"tags": ["a", "a", "b"]}))
    assert sorted(v for name, v in x.items() if name.startswith("tags=")) == pytest.approx([1 / 3, 2 / 3])


def test_before_the_first_example_all_classes_are_as_likely() -> None:
    served = RiverLearner(config("multiclass")).predict(encode({})).served
    assert served == pytest.approx([1 / 3] * 3)
    tree_path = MODELS["multiclass"]
    assert RiverLearner(config("binary", tree_path)).predict(encode({})).served == [0.5]


def test_a_function_that_builds_a_pipeline_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Any:
        return preprocessing.StandardScaler() | linear_model.LogisticRegression()

    monkeypatch.setattr(naive_bayes, "build", build, raising=False)
    learner = RiverLearner(config("binary", "river.naive_bayes:build"))
    for item in stream("binary"):
        learner.learn(item)
    assert learner.read() == {"weights_version": 300.0}


@pytest.mark.parametrize(
    ("task", "path", "text"),
    [
        ("binary", "river.nothing:Model", "can't be built"),
        ("binary", "river.linear_model:Nothing", "can't be built"),
        ("binary", "river.linear_model", "can't be built"),
        ("binary", ":Model", "can't be built"),
        ("binary", "river.preprocessing:StandardScaler", "no River classifier"),
        ("binary", "river.linear_model:LinearRegression", "no River classifier"),
        ("regression", "river.linear_model:LogisticRegression", "no River regressor"),
        ("multiclass", "river.linear_model:LogisticRegression", "more than two classes"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(task: str, path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^river: '{path}'.*{text}"):
        RiverLearner(config(task, path))
