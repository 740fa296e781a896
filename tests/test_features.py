import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from streamcl.config import Config
from streamcl.features import Featurizer, RunningNorm
from streamcl.protocols import BadInput
from streamcl.records import Encoded
from streamcl.state import digest


def featurizer(**features: Any) -> Featurizer:
    events = {"url": "memory://a/b", "label": "y"}
    return Featurizer(Config.parse({"name": "t", "events": events, "features": features}))


def rows(features: dict[str, Any], payload: dict[str, Any]) -> list[int]:
    return [int(i) for i in featurizer(**features).encode(payload).ids]


def refusal(kind: str, value: Any) -> tuple[str, str]:
    with pytest.raises(BadInput) as caught:
        featurizer(**{"user.tag": kind}).encode({"user": {"tag": value}})
    return caught.value.reason, str(caught.value)


CATEGORY = st.one_of(st.text(), st.integers(), st.booleans())
MIXED: dict[str, Any] = {
    "a": {"kind": "categorical", "buckets": 3},
    "b": {"kind": "bag", "buckets": 5, "max_items": 3},
    "c": {"kind": "categorical", "buckets": 2},
}


@given(CATEGORY, st.lists(CATEGORY, max_size=6), st.none() | CATEGORY)
def test_every_row_lies_in_the_range_of_its_field(a: Any, b: Any, c: Any) -> None:
    f = featurizer(**MIXED)
    ids, weights, dense = f.encode({"a": a, "b": b, "c": c})
    ends = np.append(f.layout.slot_base, f.layout.rows)
    assert f.layout.slot_base.tolist() == [0, 4, 4, 4, 10]
    assert 0 < ids[0] <= 3
    assert all(4 < i <= 9 if w else i == 4 for i, w in zip(ids[1:4], weights[1:4], strict=True))
    assert (ids[4] == 10) if c is None else (10 < ids[4] < f.layout.rows)
    assert ends[-1] == 4 + 6 + 3
    assert [a.dtype.name for a in (ids, weights, dense)] == ["int64", "float32", "float32"]


def test_a_category_goes_to_the_bucket_of_its_hash_whatever_its_field() -> None:
    bucket = xxhash.xxh3_64_intdigest(b"x") % 1000
    features = {name: {"kind": "categorical", "buckets": 1000} for name in ("p", "q")}
    assert rows(features, {"p": "x", "q": "x"}) == [1 + bucket, 1001 + 1 + bucket]


def test_the_order_of_the_config_means_nothing() -> None:
    payload = {"a": 1, "b": ["x"], "c": "z", "n": 2.0, "m": 3.0}
    features = {**MIXED, "n": "numeric", "m": "numeric"}
    one, two = (featurizer(**f).encode(payload) for f in (features, dict(reversed(features.items()))))
    assert [a.tolist() for a in one] == [a.tolist() for a in two]


def test_missing_and_null_share_the_row_of_their_field_and_that_row_has_weight() -> None:
    payloads: list[dict[str, Any]] = [{}, {"a": None}]
    for payload in payloads:
        ids, weights, _ = featurizer(a="categorical").encode(payload)
        assert (ids.tolist(), weights.tolist()) == ([0], [1.0])


def test_the_empty_string_is_a_category_and_not_a_missing_one() -> None:
    assert rows({"a": "categorical"}, {"a": ""}) != [0]


def test_seven_as_integer_and_as_text_is_one_category() -> None:
    assert rows({"a": "categorical"}, {"a": 7}) == rows({"a": "categorical"}, {"a": "7"})


def test_true_and_one_are_two_categories() -> None:
    seen = {tuple(rows({"a": "categorical"}, {"a": v})) for v in (True, 1, False, 0)}
    assert len(seen) == 4


@pytest.mark.parametrize("value", [7.25, 7.0, [987], {"secret": 1}])
def test_a_category_of_a_wrong_type_is_refused_by_name_and_not_by_value(value: Any) -> None:
    reason, text = refusal("categorical", value)
    assert reason == "schema"
    assert "'user.tag'" in text
    assert all(part not in text for part in ("7.25", "7.0", "987", "secret"))


def test_a_dotted_name_goes_into_nested_objects() -> None:
    nested = {"user": {"tag": "x"}}
    assert rows({"user.tag": "categorical"}, nested) == rows({"tag": "categorical"}, {"tag": "x"})
    broken_ones: list[dict[str, Any]] = [{"user": "text"}, {"user": None}, {"user": []}, {"user.tag": "x"}]
    for broken in broken_ones:
        assert rows({"user.tag": "categorical"}, broken) == [0]


@pytest.mark.parametrize(("pooling", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_bag_weighs_its_items_by_its_pooling(pooling: str, weight: float) -> None:
    bag = {"b": {"kind": "bag", "max_items": 4, "pooling": pooling}}
    ids, weights, _ = featurizer(**bag).encode({"b": ["x", "y"]})
    assert weights.tolist() == [weight, weight, 0.0, 0.0]
    assert ids[2:].tolist() == [0, 0]
    assert ids[0] != ids[1]


def test_items_beyond_a_bags_end_are_ignored() -> None:
    bag = {"b": {"kind": "bag", "max_items": 2}}
    long, cut = (featurizer(**bag).encode({"b": items}) for items in (["x", "y", "z"], ["x", "y"]))
    assert [a.tolist() for a in long] == [a.tolist() for a in cut]


def test_an_empty_a_missing_and_a_null_bag_weigh_nothing() -> None:
    payloads: list[dict[str, Any]] = [{"b": []}, {}, {"b": None}]
    for payload in payloads:
        ids, weights, _ = featurizer(b={"kind": "bag", "max_items": 2}).encode(payload)
        assert (ids.tolist(), weights.tolist()) == ([0, 0], [0.0, 0.0])


@pytest.mark.parametrize("value", ["text", {"x": "y"}, 7, [None], [["x"]], [1.5]])
def test_what_is_no_list_of_categories_is_no_bag(value: Any) -> None:
    reason, text = refusal("bag", value)
    assert reason == "schema"
    assert "'user.tag'" in text


def test_numbers_stand_in_the_order_of_their_names_and_a_missing_one_is_nan() -> None:
    dense = featurizer(z="numeric", a="numeric", m="numeric").encode({"z": 3, "a": 1.5}).dense
    np.testing.assert_array_equal(dense, np.array([1.5, np.nan, 3.0], np.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, -1e39, 10**400])
def test_a_number_that_is_not_finite_in_32_bits_is_refused(value: Any) -> None:
    assert refusal("numeric", value) == ("non_finite", "field 'user.tag': not a finite 32-bit number")


@pytest.mark.parametrize("value", ["77.5", True, [77.5], {"x": 77.5}])
def test_what_is_no_number_is_refused_without_showing_it(value: Any) -> None:
    reason, text = refusal("numeric", value)
    assert reason == "schema"
    assert "77.5" not in text


def test_a_dynamic_table_has_ids_of_its_field_in_the_place_of_rows() -> None:
    dynamic = {"kind": "categorical", "table": "dynamic"}
    features = {"a": dynamic, "b": {"kind": "bag", "max_items": 2, "table": "dynamic"}, "c": "categorical"}
    made = featurizer(**features)
    ids = [made.encode({"a": text, "b": [text, text]}).ids for text in ("x", "y", "x")]
    assert (ids[0] == ids[2]).all() and (ids[0] != ids[1])[:3].all()
    assert (ids[0][:3] < 0).all() and ids[0][0] != ids[0][1] == ids[0][2]
    assert made.encode({}).ids.tolist() == made.layout.slot_base.tolist() == [0, 1, 1, 2]
    assert made.layout.slot_table.tolist() == [0, 1, 1, -1] and made.layout.dynamic == ("a", "b")
    assert made.layout.known(np.arange(4), np.array([ids[0][0], 0, -1, 2]))
    assert not made.layout.known(np.array([3]), np.array([-1]))


def test_a_million_new_categories_need_no_memory() -> None:
    f = featurizer(a={"kind": "categorical", "buckets": 1000})
    f.encode({"a": "warm"})
    tracemalloc.start()
    try:
        seen = {f.categoricals[0].row(str(i)) for i in range(1_000_000)}
        f.encode({"a": "cold"})
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == set(range(1, 1001))
    assert now < 200_000  # bytes, of which `seen` is most


NUMBERS = st.one_of(st.just(float("nan")), st.floats(-1e6, 1e6, width=32))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40))
def test_running_norm_is_numpys_mean_and_deviation_of_what_is_not_missing(table: list[tuple[float, float]]) -> None:
    norm, data = RunningNorm(2), np.array(table, np.float32)
    for row in data:
        norm.update(row)
    for i in range(2):
        column = data[:, i][~np.isnan(data[:, i])].astype(np.float64)
        assert norm.count[i] == len(column)
        if len(column):
            assert norm.mean[i] == pytest.approx(column.mean(), rel=1e-9, abs=1e-6)
            std = column.std() if len(set(column.tolist())) > 1 else 1.0
            assert norm.deviation()[i] == pytest.approx(std, rel=1e-6, abs=1e-6)


def filled(*values: float) -> RunningNorm:
    norm = RunningNorm(1)
    for value in values:
        norm.update(np.array([value], np.float32))
    return norm


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40))
def test_an_unscaled_number_is_taken_as_it_comes_and_its_neighbour_is_scaled(table: list[tuple[float, float]]) -> None:
    norm, alone = RunningNorm(2, unscaled=np.array([True, False])), RunningNorm(1)
    for row in np.array(table, np.float32):
        first, second = norm.apply(row)
        assert first == (0.0 if np.isnan(row[0]) else row[0])
        assert second == alone.apply(row[1:])[0]
        norm.update(row)
        alone.update(row[1:])
    assert digest({name: column[1:] for name, column in norm.state_dict().items()}) == digest(alone.state_dict())


def test_what_is_unscaled_stands_in_the_config_by_name() -> None:
    layout = featurizer(b={"kind": "numeric", "scale": "none"}, a="numeric", c="categorical").layout
    assert layout.unscaled.tolist() == [False, True]


def test_a_missing_number_reads_as_the_mean_and_a_wild_one_as_the_clip() -> None:
    wild = np.array([[np.nan], [3.0], [1e30], [-1e30], [np.inf], [-np.inf]], np.float32)
    np.testing.assert_allclose(filled(1.0, 3.0).apply(wild)[:, 0], [0.0, 1.0, 10.0, -10.0, 10.0, -10.0])


def test_tiny_numbers_are_standardised_like_others() -> None:
    assert filled(1e-20, 3e-20).apply(np.array([3e-20], np.float32)) == pytest.approx(1.0, rel=1e-6)


def test_a_constant_has_deviation_one_however_often_it_comes() -> None:
    norm = filled(*[0.1] * 1000)
    assert norm.deviation() == 1.0
    assert norm.apply(np.array([0.1], np.float32)) == 0.0


def test_infinity_moves_no_statistic() -> None:
    assert digest(filled(1.0, np.inf, 3.0).state_dict()) == digest(filled(1.0, np.nan, 3.0).state_dict())


def test_before_the_first_number_all_reads_raw() -> None:
    np.testing.assert_array_equal(RunningNorm(2).apply(np.array([2.0, np.nan], np.float32)), [2.0, 0.0])


@given(st.lists(NUMBERS, max_size=20), st.lists(NUMBERS, max_size=20))
def test_a_restored_norm_goes_on_to_the_bit(before: list[float], after: list[float]) -> None:
    whole, restored = filled(*before, *after), RunningNorm(1)
    restored.load_state_dict(filled(*before).state_dict())
    for value in after:
        restored.update(np.array([value], np.float32))
    assert digest(restored.state_dict()) == digest(whole.state_dict())


def test_a_state_taken_before_an_update_stays_what_it_was() -> None:
    norm = filled(1.0, 2.0)
    state, before = norm.state_dict(), digest(norm.state_dict())
    norm.update(np.array([9.0], np.float32))
    assert digest(state) == before


def test_encoded_is_three_arrays() -> None:
    encoded = featurizer(**MIXED, n="numeric").encode({})
    assert isinstance(encoded, Encoded)
    assert [a.shape for a in encoded] == [(5,), (5,), (1,)]


def bag(pooling: str, payload: dict[str, Any], **more: Any) -> list[float]:
    f = featurizer(tags={"kind": "bag", "buckets": 50, "max_items": 3, "pooling": pooling, **more})
    return [float(weight) for weight in f.encode(payload).weights]


POOLED = [("sum", [3.0, 1.0]), ("mean", [0.75, 0.25]), ("sqrtn", [3 / 10**0.5, 1 / 10**0.5])]


@pytest.mark.parametrize(("pooling", "weights"), POOLED)
def test_the_items_of_a_bag_may_have_weights_beside_them_or_in_an_object(pooling: str, weights: list[float]) -> None:
    expected = pytest.approx([*weights, 0.0])
    assert bag(pooling, {"tags": ["x", "y"], "w": [3, 1.0]}, weights="w") == expected
    assert bag(pooling, {"tags": {"x": 3, "y": 1.0}}) == expected
    assert bag(pooling, {"tags": ["x", "y"]}, weights="w") == bag(pooling, {"tags": ["x", "y"]})


def test_weights_of_a_bag_that_are_no_list_of_its_length_are_refused() -> None:
    for wrong in ([1.0], "x", [1.0, "y"]):
        with pytest.raises(BadInput, match="'w'"):
            bag("sum", {"tags": ["x", "y"], "w": wrong}, weights="w")
    with pytest.raises(BadInput, match="'tags'"):
        bag("sum", {"tags": {"x": float("nan")}})


def test_weights_that_add_up_to_nothing_are_no_division_by_zero() -> None:
    assert bag("mean", {"tags": {"x": 0.0}}) == [0.0, 0.0, 0.0]


def test_a_logarithm_keeps_the_sign_and_what_is_missing() -> None:
    f = featurizer(n={"kind": "numeric", "scale": "log"})
    found = [float(f.encode({"n": value}).dense[0]) for value in (math.e - 1, 0.0, 1 - math.e)]
    assert found == pytest.approx([1.0, 0.0, -1.0])
    assert math.isnan(f.encode({}).dense[0])
