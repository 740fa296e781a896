import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from river import compose, datasets, feature_extraction, multiclass, preprocessing

import streamcl
from streamcl.config import ConfigError
from streamcl.river_api import DictLearner, StreamClassifier, StreamRegressor
from streamcl.state import digest

SEGMENTS: Any = datasets.ImageSegments
ONE_VS_ONE: Any = multiclass.OneVsOneClassifier
SMALL: dict[str, Any] = {"hidden": (8,), "numbers": 3, "categories": 2, "buckets": 16, "rest": 4, "replay_capacity": 20}

numbers = st.one_of(st.integers(), st.floats(), st.decimals(allow_nan=False), st.floats(width=32).map(np.float32))
values = st.one_of(numbers, st.text(max_size=3), st.booleans(), st.none(), st.dates(), st.booleans().map(np.bool_))
names = st.one_of(st.sampled_from(["a", "b", "c", "d", "e", "f"]), st.integers(0, 3), st.tuples(st.text(max_size=1)))
dicts = st.dictionaries(names, values, max_size=9)


def small_classifier(**changes: Any) -> StreamClassifier:
    return StreamClassifier(**(SMALL | changes))


def pickled(model: StreamClassifier) -> StreamClassifier:
    copied: StreamClassifier = pickle.loads(pickle.dumps(model))  # noqa: S301
    return copied


def state_of(learner: DictLearner) -> str:
    return digest(learner.learner.state_dict()) + repr((learner.number_at, learner.category_at, learner.left_out))


def accuracy(model: Any, examples: list[tuple[dict[str, Any], Any]]) -> float:
    right = 0
    for x, y in examples:
        right += model.predict_one(x) == y
        model.learn_one(x, y)
    return right / len(examples)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(dicts, st.one_of(st.text(max_size=1), st.integers(0, 2), st.none())), max_size=8))
def test_any_dict_of_any_values_is_predicted_and_learned(stream: list[tuple[dict[Any, Any], Any]]) -> None:
    model, again, regressor = small_classifier(), small_classifier(), StreamRegressor(**SMALL)
    for x, y in stream:
        proba = model.predict_proba_one(x)
        assert set(proba) == set(model.classes)
        assert sum(proba.values()) == pytest.approx(1.0 if proba else 0.0, abs=1e-12)
        model.learn_one(x, y)
        again.learn_one(dict(reversed(x.items())), y)
        regressor.learn_one(x, float(len(x)))
        assert np.isfinite(regressor.predict_one(x))
    assert state_of(model.learner) == state_of(again.learner)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.tuples(dicts, st.sampled_from("xyz")), min_size=2, max_size=8), st.data())
def test_a_pickle_and_a_deep_copy_go_on_to_the_bit(
    stream: list[tuple[dict[Any, Any], str]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(stream)))
    whole = small_classifier()
    for x, y in stream[:cut]:
        whole.learn_one(x, y)
    others = [pickled(whole), copy.deepcopy(whole), whole.clone(include_attributes=True)]
    for model in others:
        assert state_of(model.learner) == state_of(whole.learner)
    for x, y in stream[cut:]:
        for model in [whole, *others]:
            model.learn_one(x, y)
    for model in others:
        assert [model.predict_proba_one(x) for x, _ in stream] == [whole.predict_proba_one(x) for x, _ in stream]


def test_predicting_changes_nothing() -> None:
    model = small_classifier()
    model.learn_one({"a": 1.0}, "x")
    before = state_of(model.learner)
    for x in ({"a": 2.0, "new": 3.0}, {"colour": "red"}, {}):
        model.predict_proba_one(x)
    assert state_of(model.learner) == before


def test_names_take_their_inputs_in_the_order_of_first_sight_those_of_one_dict_sorted() -> None:
    learner = small_classifier().learner
    for x in ({"c": 1.0, "b": True}, {"d": 1, "a": "s", "c": 2.0, "z": "s"}, {"e": 0.5, "f": 1.0}):
        learner.learn(x, 0.0)
    assert learner.number_at == {"c": 0, "d": 1, "e": 2}
    assert learner.category_at == {"b": 0, "a": 1}


def test_none_and_nan_are_missing() -> None:
    model = small_classifier()
    for x, y in (({"a": 1.0, "b": "s"}, 0), ({"a": 3.0, "b": "t"}, 1), ({"a": 5.0}, 0)):
        model.learn_one(x, y)
    for nothing in (None, float("nan"), np.float32("nan")):
        assert model.predict_proba_one({"a": nothing, "b": None, "late": nothing}) == model.predict_proba_one({})


def test_a_name_may_be_a_number_and_then_a_category() -> None:
    model = small_classifier()
    xs: list[dict[str, Any]] = [{"a": 1.0}, {"a": "one"}, {"a": True}]
    for x in xs:
        model.learn_one(x, "y")
    assert (model.learner.number_at, model.learner.category_at) == ({"a": 0}, {"a": 0})


def test_a_hashed_number_weighs_its_ratio_to_its_root_mean_square() -> None:
    model = small_classifier(numbers=0)
    for value in (3.0, 4.0):
        model.learn_one({"a": value}, "y")
    encoded = model.learner._encode({"a": 10.0}, {})
    assert encoded.weights[2:] == pytest.approx([10.0 / np.sqrt((9.0 + 16.0) / 2.0), 0.0, 0.0, 0.0])
    assert model.learner._encode({"a": -1e30}, {}).weights[2] == -10.0
    assert not model.learner._encode({"never seen": 1.0}, {}).weights[2:].any()


def test_what_finds_no_input_of_its_own_is_still_learned_from() -> None:
    # 40 names, one of which tells the class: it stands in the bag, for the inputs are bound to the names before it.
    rng = np.random.default_rng(0)
    for kind in (float, str):
        stream = []
        for _ in range(600):
            x = {f"{i:02}": kind(rng.integers(2)) for i in range(8)}
            stream.append((x, x["07"]))
        model = small_classifier(buckets=256, rest=16)
        accuracy(model, stream[:400])
        assert accuracy(model, stream[400:]) > 0.9  # chance is .5


def test_a_bag_of_words_is_learned_with_all_numbers_hashed() -> None:
    rng = np.random.default_rng(0)
    neutral = [f"word{i}" for i in range(200)]
    stream = []
    for _ in range(500):
        y = bool(rng.integers(2))
        words = [*rng.choice(neutral, 5), "cheap" if y else "dear"]
        stream.append((" ".join(words), y))
    model: Any = feature_extraction.BagOfWords() | StreamClassifier(numbers=0, multiclass=False)
    for text, y in stream[:300]:
        model.learn_one(text, y)
    assert np.mean([model.predict_one(text) == y for text, y in stream[300:]]) > 0.95


@pytest.mark.parametrize("before", [0, 1000])
def test_a_class_that_comes_late_is_learned_as_fast_as_one_that_comes_at_once(before: int) -> None:
    rng = np.random.default_rng(0)

    def draw(classes: int) -> tuple[dict[str, float], str]:
        c = int(rng.integers(classes))
        return {name: float(c == i) + 0.1 * float(rng.normal()) for i, name in enumerate("abc")}, f"class {c}"

    model = StreamClassifier(replay_per_event=0)
    for _ in range(before):
        model.learn_one(*draw(3))
    late = [draw(4) for _ in range(160)]
    hits = [accuracy(model, [example]) for example in late]
    hits = [hit for hit, (_, y) in zip(hits, late, strict=True) if y == "class 3"]
    assert len(hits) > 20
    assert np.mean(hits[10:]) > 0.9


def test_labels_are_any_hashable_and_come_back_as_they_were() -> None:
    model = small_classifier()
    labels = ["text", 3, (1, "x"), None, 2.5]
    for label in labels:
        model.learn_one({"a": 1.0}, label)
    assert list(model.predict_proba_one({"a": 1.0})) == labels


def test_nothing_is_predicted_before_the_first_class_is_seen() -> None:
    assert StreamClassifier().predict_proba_one({"a": 1.0}) == {}
    assert StreamClassifier().predict_one({"a": 1.0}) is None
    assert StreamClassifier(multiclass=False).predict_proba_one({"a": 1.0}) == {False: 0.5, True: 0.5}
    assert StreamRegressor().predict_one({"a": 1.0}) == 0.0


def test_one_class_too_many_is_refused_and_changes_nothing() -> None:
    model = small_classifier(max_classes=2)
    for label in "xyx":
        model.learn_one({"a": 1.0}, label)
    before = state_of(model.learner)
    with pytest.raises(ValueError, match="max_classes"):
        model.learn_one({"b": 1.0}, "z")
    assert state_of(model.learner) == before
    assert list(model.classes) == ["x", "y"]


def test_a_binary_label_that_is_no_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="multiclass"):
        small_classifier(multiclass=False).learn_one({"a": 1.0}, "no")


@pytest.mark.parametrize(("name", "value"), [("hidden", ()), ("plasticity", ()), ("plugins", ()), ("boundaries", ())])
def test_an_empty_tuple_which_river_cannot_clone_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        StreamRegressor(**{name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "transformer"}, "StreamRegressor: model.kind"),
        ({"optimizer": "lion"}, "StreamRegressor: optimizer.kind"),
        ({"learning_rate": -1.0}, "StreamRegressor: optimizer.learning_rate"),
        ({"replay_capacity": 0}, "StreamRegressor: replay.capacity"),
        ({"plasticity": ("magic",)}, "StreamRegressor: plasticity"),
        ({"seed": None}, "StreamRegressor: seed"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        StreamRegressor(**change)


def test_a_label_that_is_no_number_is_left_out_and_counted() -> None:
    model = StreamRegressor(**SMALL)
    model.learn_one({"a": 1.0}, 2.0)
    model.learn_one({"a": 1.0}, float("nan"))
    assert (model.learner.left_out, model.learner.learner.version) == (1, 1)


@pytest.mark.parametrize("kind", ["logistic", "fm", "mlp", "deepfm", "dcnv2"])
def test_every_model_learns_the_phishing_stream(kind: str) -> None:
    # 56 % of the labels are one class; with a logistic regression of River's it is 89 % over the whole stream.
    assert accuracy(StreamClassifier(model=kind, multiclass=False), list(datasets.Phishing().take(500))) > 0.8


def test_rules_of_plasticity_work_inside() -> None:
    model = small_classifier(plasticity=({"kind": "continual_backprop", "replacement_rate": 0.1, "maturity": 5},))
    accuracy(model, list(datasets.Phishing().take(60)))
    copied = pickled(model)
    assert state_of(copied.learner) == state_of(model.learner)
    assert sum(n for name, n in model.learner.learner.read().items() if name.endswith("replacements")) > 0


def test_it_stands_in_a_pipeline_and_in_a_wrapper() -> None:
    stream = list(SEGMENTS().take(300))
    pipeline = compose.SelectType(int, float) | preprocessing.MinMaxScaler() | StreamClassifier()
    wrapper = ONE_VS_ONE(StreamClassifier(multiclass=False, **SMALL))
    assert accuracy(pipeline, stream) > 0.6  # chance is 1/7
    accuracy(wrapper, stream[:50])


def test_the_package_offers_both_without_importing_them() -> None:
    assert streamcl.StreamClassifier is StreamClassifier
    assert streamcl.StreamRegressor is StreamRegressor
    with pytest.raises(AttributeError, match="nothing"):
        _ = streamcl.nothing
    code = "import sys, streamcl; sys.exit('torch' in sys.modules or 'river' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_methods_of_continual_learning_work_inside() -> None:
    model = small_classifier(plugins=("ema", {"kind": "served"}))
    stream = list(datasets.Phishing().take(60))
    accuracy(model, stream[:30])
    copied = pickled(model.clone(include_attributes=True))
    assert state_of(copied.learner) == state_of(model.learner)
    assert accuracy(copied, stream[30:]) == accuracy(model, stream[30:])
    assert state_of(copied.learner) == state_of(model.learner)


def test_a_method_may_say_who_stays_in_the_memory() -> None:
    model = small_classifier(plugins=("forgetting_curve",), replay_capacity=8)
    for i in range(30):
        model.learn_one({"a": float(i)}, "x" if i % 2 else "y")
    memory = model.learner.learner.memory
    assert len(memory) == 8
    assert memory.keeper is not None


def test_a_method_hears_of_boundaries() -> None:
    every = {"kind": "clock", "every_events": 10}
    told = small_classifier(plugins=("ewc",), boundaries=(every,))
    untold = small_classifier(plugins=("ewc",))
    stream = list(datasets.Phishing().take(60))
    for model in (told, untold):
        accuracy(model, stream[:25])
    assert told.learner.boundaries.read() == {"boundary_0_signals": 2.0}
    assert state_of(told.learner) != state_of(untold.learner)
    copied = pickled(told.clone(include_attributes=True))
    assert accuracy(copied, stream[25:]) == accuracy(told, stream[25:])
    assert copied.learner.boundaries.read() == told.learner.boundaries.read() == {"boundary_0_signals": 6.0}


def test_a_label_that_cannot_be_learned_rings_no_bell() -> None:
    model = StreamRegressor(boundaries=({"kind": "clock", "every_events": 2},))
    for label in (1.0, float("nan"), float("inf"), 2.0):
        model.learn_one({"a": 1.0}, label)
    assert model.learner.left_out == 2
    assert model.learner.boundaries.read() == {"boundary_0_signals": 1.0}


def test_segments_are_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="boundaries: segment"):
        small_classifier(boundaries=("segment",))
