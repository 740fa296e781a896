import inspect
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from river import api, base

from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Ticket
from streamcl.river_learner import RiverLearner
from streamcl.state import flatten, pickles, unflatten

R: Any = api  # River, without the types that half of it has

MODELS = {
    "binary": "river.linear_model:LogisticRegression",
    "multiclass": "river.tree:HoeffdingTreeClassifier",
    "regression": "river.linear_model:LinearRegression",
}
PLAIN: dict[str, Any] = {
    "binary": R.linear_model.LogisticRegression,
    "multiclass": R.tree.HoeffdingTreeClassifier,
    "regression": R.linear_model.LinearRegression,
}
TASKS = sorted(MODELS)
FEATURES = {
    "user": {"kind": "categorical", "buckets": 30},
    "tags": {"kind": "bag", "buckets": 10, "max_items": 3},
    "price": "numeric",
}


def config(task: str, path: str | None = None, **changes: Any) -> Config:
    return Config.parse(
        {
            "name": "t",
            "task": task,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": FEATURES,
            "model": {"classes": 3},
            "river": path or MODELS[task],
            "trust_pickle": True,
            **changes,
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


def numbers_and_strings(model: Any) -> Any:
    numbers = R.compose.SelectType(float) | R.preprocessing.StandardScaler()
    return numbers + (R.compose.SelectType(str) | R.preprocessing.OneHotEncoder()) | model


def known_category_first(x: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(x.items(), key=lambda item: isinstance(item[1], float)))


def arf() -> Any:
    return R.forest.ARFClassifier(n_models=3)


def bagging() -> Any:
    return R.ensemble.BaggingClassifier(R.preprocessing.StandardScaler() | R.tree.HoeffdingTreeClassifier(), n_models=3)


MADE: dict[str, dict[str, Any]] = {
    "binary": {
        "scaled_logistic": R.preprocessing.StandardScaler() | R.linear_model.LogisticRegression(),
        "scaled_forest": R.preprocessing.StandardScaler() | arf(),
        "function_then_tree": R.compose.FuncTransformer(known_category_first) | R.tree.HoeffdingTreeClassifier(),
        "interactions": R.feature_extraction.PolynomialExtender(2) | R.linear_model.PAClassifier(),
        "bagged_pipelines": bagging(),
        "voting": R.ensemble.VotingClassifier([arf(), bagging()]),
    },
    "multiclass": {
        "one_vs_rest": R.preprocessing.StandardScaler()
        | R.multiclass.OneVsRestClassifier(R.linear_model.PAClassifier()),
        "one_vs_one_inside": R.multiclass.OneVsOneClassifier(
            R.preprocessing.StandardScaler() | R.linear_model.LogisticRegression()
        ),
        "nearest": R.preprocessing.MinMaxScaler() | R.neighbors.KNNClassifier(),
        "stacked": R.ensemble.StackingClassifier(
            [arf(), bagging()], meta_classifier=R.linear_model.SoftmaxRegression()
        ),
    },
    "regression": {
        "scaled_linear": R.preprocessing.StandardScaler() | R.linear_model.LinearRegression(),
        "scaled_target": R.preprocessing.TargetStandardScaler(R.linear_model.LinearRegression()),
        "forest": R.preprocessing.StandardScaler() | R.forest.ARFRegressor(n_models=3),
        "rescaled": R.preprocessing.TargetMinMaxScaler(R.preprocessing.StandardScaler() | R.linear_model.PARegressor()),
    },
}
MADE["strings"] = {
    "encoded_logistic": numbers_and_strings(R.linear_model.LogisticRegression()),
    "encoded_forest": numbers_and_strings(arf()),
    "tree": R.tree.HoeffdingTreeClassifier(),
    "forest": arf(),
}
REFUSED = {  # what it takes or gives is nothing that a learner has
    "EntropySampler": "'tuple' object",  # asks for labels: its prediction is a pair
    "ISOUPTreeRegressor": "'float' object",  # has several targets at once
}


def offered() -> Iterator[Any]:
    """Every classifier and regressor of River, as River builds it for its own checks, for each task that it knows."""
    classes = {c for m in vars(api).values() if inspect.ismodule(m) for c in vars(m).values() if inspect.isclass(c)}
    for kind in sorted(classes, key=lambda c: (c.__module__, c.__name__)):
        if not issubclass(kind, (base.Classifier, base.Regressor)) or inspect.isabstract(kind):
            continue
        if kind.__name__.startswith(
            "SKL2River"
        ):  # scikit-learn's, where that is installed: of one fixed set of features
            continue
        for i, params in enumerate(kind._unit_test_params()):
            try:
                model = kind(**params)
            except (TypeError, RuntimeError):  # it needs arguments and names none, or a newer Python
                continue
            if isinstance(model, base.Regressor):
                tasks = ["regression"]
            else:
                tasks = ["binary", "multiclass"] if model._multiclass else ["binary"]
            for task in tasks:
                yield pytest.param(task, "one_hot", model, id=f"{kind.__name__}-{i}-{task}")


def made() -> Iterator[Any]:
    for task, models in MADE.items():
        for name, model in models.items():
            strings = task == "strings"
            yield pytest.param(
                "binary" if strings else task, "strings" if strings else "one_hot", model, id=f"{task}-{name}"
            )


def stand(monkeypatch: pytest.MonkeyPatch, what: Any) -> str:
    """A path to it."""
    monkeypatch.setattr(sys.modules[__name__], "standing", what, raising=False)
    return f"{__name__}:standing"


@pytest.mark.parametrize(("task", "categories", "model"), [*offered(), *made()])
def test_any_model_of_river_predicts_learns_and_goes_on_after_a_restart_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, task: str, categories: str, model: Any
) -> None:
    settings = config(task, stand(monkeypatch, model), river_categories=categories)
    if text := REFUSED.get(type(model).__name__):
        with pytest.raises(ConfigError, match=f"^river: .*{text}"):
            RiverLearner(settings)
        return
    items = stream(task, 50)
    if base.tags.POSITIVE_INPUT in model._tags:
        items = [item for item in items if not item.ticket.features.dense[0] < 0.0]
    whole, again, restored = (RiverLearner(settings) for _ in range(3))
    assert np.isfinite(whole.predict(items[0].ticket.features).served).all()
    for item in items[:25]:
        for learner in (whole, again):
            learner.predict(item.ticket.features)
            learner.learn(item)
    restored.load_state_dict(unflatten(*flatten(whole.state_dict())))
    for item in items[25:]:
        served = [learner.predict(item.ticket.features).served for learner in (whole, again, restored)]
        assert served[0].shape == ((3,) if task == "multiclass" else (1,))
        assert np.isfinite(served[0]).all()
        assert len({one.tobytes() for one in served}) == 1
        for learner in (whole, again, restored):
            learner.learn(item)


@pytest.mark.parametrize("nested", [False, True])
def test_a_seed_that_is_left_open_is_the_configs(monkeypatch: pytest.MonkeyPatch, nested: bool) -> None:
    model = R.preprocessing.StandardScaler() | R.ensemble.VotingClassifier([arf(), bagging()]) if nested else arf()
    built = RiverLearner(config("binary", stand(monkeypatch, model), seed=7)).model
    found = built["VotingClassifier"].models[0] if nested else built
    assert found.seed == 7
    seeded = R.forest.ARFClassifier(n_models=3, seed=3)
    assert RiverLearner(config("binary", stand(monkeypatch, seeded), seed=7)).model.seed == 3


@pytest.mark.parametrize("kind", ["class", "function", "instance"])
def test_a_class_a_function_and_an_instance_are_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    instance = R.linear_model.LogisticRegression()
    what = {"class": R.linear_model.LogisticRegression, "function": lambda: instance, "instance": instance}[kind]
    learner = RiverLearner(config("binary", stand(monkeypatch, what)))
    plain = RiverLearner(config("binary"))
    for item in stream("binary", 30):
        assert learner.predict(item.ticket.features).served == plain.predict(item.ticket.features).served
        learner.learn(item)
        plain.learn(item)


def test_an_instance_is_copied_with_what_it_has_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = R.linear_model.LogisticRegression()
    features = encode({"user": 1, "price": 2.0})
    for _ in range(20):
        instance.learn_one(plain_dict(features), True)
    before = pickle.dumps(instance)
    learner = RiverLearner(config("binary", stand(monkeypatch, instance)))
    assert learner.predict(features).served[0] == pytest.approx(instance.predict_proba_one(plain_dict(features))[True])
    learner.learn(outcome(features, 0.0, 0))
    assert pickle.dumps(instance) == before


def test_as_strings_a_category_is_one_feature_and_a_bag_is_still_hashed() -> None:
    learner = RiverLearner(config("binary", "river.tree:HoeffdingTreeClassifier", river_categories="strings"))
    features = encode({"user": 4, "tags": ["a"], "price": 1.5})
    row, tag = int(features.ids[3]), int(features.ids[0])
    assert learner._dict(features) == {"price": 1.5, "user": str(row), f"tags={tag}": 1.0}
    assert learner._dict(encode({})) == {}


def test_a_tree_splits_on_a_category_sooner_when_it_is_one_feature() -> None:
    # The label is the parity of one of six users: 0 or 1 by one split on six values, or by several on one each.
    right = {}
    for categories in ("one_hot", "strings"):
        learner = RiverLearner(config("binary", "river.tree:HoeffdingTreeClassifier", river_categories=categories))
        right[categories] = 0
        for item in stream("binary", 600):
            right[categories] += (learner.predict(item.ticket.features).served[0] > 0.5) == item.label
            learner.learn(item)
    assert right["strings"] > right["one_hot"]


class Odd(R.linear_model.LogisticRegression):  # type: ignore[misc]
    """Says what it is told to say."""

    says: Any = None

    def predict_proba_one(self, x: dict[Any, Any], **_kwargs: Any) -> Any:
        return self.says

    _multiclass = True


@pytest.mark.parametrize("says", [{}, {True: float("nan"), False: 0.5}, {0: float("inf"), 1: 0.0}])
def test_what_is_not_finite_is_served_as_no_opinion(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(Odd, "says", says)
    for task, served in (("binary", [0.5]), ("multiclass", [1 / 3] * 3)):
        learner = RiverLearner(config(task, f"{__name__}:Odd"))
        assert learner.predict(encode({})).served == pytest.approx(served)


class Wild(R.linear_model.LinearRegression):  # type: ignore[misc]
    says = 0.0

    def predict_one(self, x: dict[Any, Any]) -> Any:
        return self.says


@pytest.mark.parametrize(("says", "served"), [(float("nan"), 0.0), (None, 0.0), (1e300, 3.4028235e38)])
def test_a_value_that_no_float32_holds_is_clipped(monkeypatch: pytest.MonkeyPatch, says: Any, served: float) -> None:
    monkeypatch.setattr(Wild, "says", says)
    assert RiverLearner(config("regression", f"{__name__}:Wild")).predict(encode({})).served == np.float32(served)


class Namer(base.Classifier):
    """Names the class that it saw last."""

    last: Any = None

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        self.last = y

    def predict_one(self, x: dict[Any, Any], **_kwargs: Any) -> Any:
        return self.last

    _multiclass = True


def test_a_classifier_without_probabilities_gives_all_to_the_class_that_it_names() -> None:
    learner = RiverLearner(config("multiclass", f"{__name__}:Namer"))
    assert learner.predict(encode({})).served == pytest.approx([1 / 3] * 3)
    learner.learn(outcome(encode({}), 2.0, 0))
    assert learner.predict(encode({})).served.tolist() == [0.0, 0.0, 1.0]


def test_a_model_that_cannot_be_pickled_is_refused_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    model = R.compose.FuncTransformer(lambda x: x) | R.linear_model.LogisticRegression()
    with pytest.raises(ConfigError, match=r"^river: .*can't be saved"):
        RiverLearner(config("binary", stand(monkeypatch, lambda: model)))


def test_a_model_that_cannot_read_the_features_is_refused_before_the_first_event() -> None:
    with pytest.raises(ConfigError, match=r"^river: .*river_categories strings"):
        RiverLearner(config("binary", river_categories="strings"))


@pytest.mark.parametrize(
    ("task", "path", "text"),
    [
        ("binary", "river.nothing:Model", "can't be built"),
        ("binary", "river.linear_model:Nothing", "can't be built"),
        ("binary", "river.linear_model", "can't be built"),
        ("binary", ":Model", "can't be built"),
        ("binary", "river.linear_model:__all__", "can't be built"),
        ("binary", "river.preprocessing:StandardScaler", "no River classifier"),
        ("binary", "river.linear_model:LinearRegression", "no River classifier"),
        ("regression", "river.linear_model:LogisticRegression", "no River regressor"),
        ("multiclass", "river.linear_model:LogisticRegression", "more than two classes"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(task: str, path: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^river: '{path}'.*{text}"):
        RiverLearner(config(task, path))
