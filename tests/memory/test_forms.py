"""Each form against a slow oracle that keeps every record, and computes in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl.memory.forms import KNN, NO_KEY, ByKey, Centre, Form, Sketch
from streamcl.memory.owners import NOBODY, Owner
from streamcl.methods import KeyMemory, KNNMemory, SketchMemory
from streamcl.records import Selector, mark
from streamcl.state import digest, flatten, unflatten

DIM, WIDTH = 6, 2
Floats = NDArray[np.float32]


def knn(**settings: Any) -> KNN:
    return KNN(KNNMemory.model_validate({"capacity": 20, "neighbours": 5, **settings}), DIM, WIDTH, 0)


def sketch(**settings: Any) -> Sketch:
    return Sketch(SketchMemory.model_validate({"bits": 3, "arrays": 4, **settings}), DIM, WIDTH, 7)


def by_key(**settings: Any) -> ByKey:
    return ByKey(KeyMemory.model_validate({"key": "user", **settings}), 1, WIDTH, 0)


def records(seed: int, count: int) -> tuple[Floats, Floats]:
    """Keys with a mean far from 0, as ReLU outputs have, and values."""
    rng = np.random.default_rng(seed)
    return rng.normal(1.0, 1.0, (count, DIM)).astype(np.float32), rng.random((count, WIDTH)).astype(np.float32)


def numbers(seed: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 6, (count, 1))


def filled(form: Form, seed: int, count: int) -> Form:
    keys, values = records(seed, count)
    for key, value in zip(numbers(seed, count) if isinstance(form, ByKey) else keys, values, strict=True):
        assert form.write(key, value)
    return form


def queries(form: Form, count: int = 7) -> NDArray[Any]:
    return numbers(99, count) if isinstance(form, ByKey) else records(99, count)[0]


FORMS = [knn, sketch, by_key]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), count=st.integers(1, 70), half_life=st.sampled_from([None, 3.0, 50.0]))
def test_rows_read_as_a_sort_of_all_that_is_held_does(seed: int, count: int, half_life: float | None) -> None:
    form = knn(half_life_events=half_life)
    keys, values = records(seed, count)
    held, centre = [], Centre(DIM)
    for key, value in zip(keys, values, strict=True):
        moved = (key - centre.mean).astype(np.float64)
        held.append((moved / np.linalg.norm(moved), value))
        centre.update(key)
        form.write(key, value)
    held = held[-20:]
    asked = queries(form)
    for query, found in zip(asked, form.read(asked), strict=True):
        moved = query.astype(np.float64) - centre.mean
        near = [float(row @ moved / np.linalg.norm(moved)) for row, _ in held]
        best = sorted(range(len(held)), key=lambda i: -near[i])[:5]
        age = {i: len(held) - 1 - i for i in best}
        raw = np.array([near[i] / 0.1 - (math.log(2) / half_life * age[i] if half_life else 0.0) for i in best])
        weights = np.exp(raw - raw.max())
        expected = (weights[:, None] * np.array([held[i][1] for i in best])).sum(0) / weights.sum()
        assert found[0] == len(best)
        np.testing.assert_allclose(found[1:], expected, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    counts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    half_life=st.sampled_from([None, 2.0, 30.0]),
)
def test_a_sketch_reads_as_buckets_that_decay_at_every_write(
    seed: int, counts: tuple[int, int], half_life: float | None
) -> None:
    form = sketch(half_life_events=half_life)
    keys, values = records(seed, sum(counts))
    sums = np.zeros((4, 8, 1 + WIDTH))
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        if i == counts[0]:
            form.reset()
            sums[:] = 0.0
        latched = form.latched.copy()
        sums *= 0.5 ** (1.0 / half_life) if half_life else 1.0
        for array, bucket in enumerate(_buckets(form, key, latched)):
            sums[array, bucket] += [1.0, *value]
        form.write(key, value)
    asked = queries(form)
    for query, found in zip(asked, form.read(asked), strict=True):
        hit = [sums[array, bucket] for array, bucket in enumerate(_buckets(form, query, form.latched))]
        total = np.sum([each for each in hit if each[0] > 0] or [np.zeros(1 + WIDTH)], axis=0)
        if total[0] == 0:
            assert not found.any()
            continue
        np.testing.assert_allclose(found[0], total[0] / sum(each[0] > 0 for each in hit), rtol=1e-5)
        np.testing.assert_allclose(found[1:], total[1:] / total[0], atol=1e-6)


def _buckets(form: Sketch, key: Floats, centre: Floats) -> list[int]:
    signs = form.planes.astype(np.float64) @ (key.astype(np.float64) - centre) > 0
    return [int(sum(1 << bit for bit, up in enumerate(array) if up)) for array in signs]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), count=st.integers(0, 60), half_life=st.sampled_from([None, 2.0, 30.0]))
def test_sums_by_key_read_as_shrunken_decayed_means(seed: int, count: int, half_life: float | None) -> None:
    form = by_key(half_life_events=half_life, shrinkage=2.0)
    keys, values = numbers(seed, count), records(seed, count)[1]
    for key, value in zip(keys, values, strict=True):
        form.write(key, value)
    for key, found in zip(queries(form), form.read(queries(form)), strict=True):
        mine = [i for i in range(count) if keys[i] == key]
        weights = np.array([0.5 ** ((count - 1 - i) / half_life) if half_life else 1.0 for i in mine])
        np.testing.assert_allclose(found[0], weights.sum(), rtol=1e-9)
        expected = weights @ values[mine] / (weights.sum() + 2.0) if mine else np.zeros(WIDTH)
        np.testing.assert_allclose(found[1:], expected, atol=1e-9)


def test_the_key_seen_longest_ago_gives_way() -> None:
    form = by_key(capacity=2)
    for key in (1, 2, 1, 3):
        form.write(np.array([key]), np.ones(WIDTH, np.float32))
    assert [bool(row[0]) for row in form.read(np.array([[1], [2], [3]]))] == [True, False, True]


@pytest.mark.parametrize("make", FORMS)
def test_many_queries_read_bit_for_bit_as_one_by_one(make: Any) -> None:
    form = filled(make(), 1, 50)
    asked = queries(form, 40)
    together = form.read(asked)
    assert all(form.read(asked[i : i + 1]).tobytes() == together[i].tobytes() for i in range(40))


@pytest.mark.parametrize("make", FORMS)
def test_an_empty_form_supports_nothing_and_a_reset_one_is_empty(make: Any) -> None:
    form = make()
    assert not form.read(queries(form)).any()
    filled(form, 2, 30)
    assert form.read(queries(form))[:, 0].any()
    form.reset()
    assert len(form) == 0
    assert not form.read(queries(form)).any()


@pytest.mark.parametrize("make", FORMS)
def test_a_restored_form_goes_on_bit_for_bit(make: Any) -> None:
    whole = filled(make(), 3, 45)
    resumed = make()
    filled(resumed, 4, 9)
    resumed.reset()
    resumed.load_state_dict(unflatten(*flatten(whole.state_dict())))
    assert digest(resumed.state_dict()) == digest(whole.state_dict())
    for form in (whole, resumed):
        filled(form, 5, 30)
    assert whole.read(queries(whole)).tobytes() == resumed.read(queries(resumed)).tobytes()
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize("make", [knn, sketch])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_key_that_is_not_finite_is_neither_written_nor_read(make: Any, value: float) -> None:
    form = filled(make(), 6, 30)
    bad = np.full((1, DIM), value, np.float32)
    before = digest(form.state_dict())
    assert not form.write(bad[0], np.ones(WIDTH, np.float32))
    assert digest(form.state_dict()) == before
    assert not form.read(bad).any()


@pytest.mark.parametrize("make", [knn, sketch])
def test_keys_without_a_direction_are_not_written(make: Any) -> None:
    form = make()
    assert not form.write(np.zeros(DIM, np.float32), np.ones(WIDTH, np.float32))
    for _ in range(3):  # all alike: the centre lies on them
        form.write(np.ones(DIM, np.float32), np.ones(WIDTH, np.float32))
    assert not form.read(np.zeros((1, DIM), np.float32)).any() or len(form)


def test_no_key_is_neither_written_nor_read() -> None:
    form = filled(by_key(), 1, 5)
    assert not form.write(np.array([NO_KEY]), np.ones(WIDTH, np.float32))
    assert not form.read(np.array([[NO_KEY]])).any()


def test_small_errors_may_be_left_out_of_the_rows() -> None:
    form = knn(error_threshold=0.5)
    for given_ in (0.9, 0.1):
        assert form.write(records(0, 1)[0][0] + np.float32(given_), np.array([1.0, given_], np.float32))
    assert len(form) == 1


def test_too_few_rows_support_nothing() -> None:
    form = filled(knn(min_support=5), 0, 4)
    assert not form.read(queries(form)).any()
    assert form.write(*(each[0] for each in records(8, 1)))
    assert form.read(queries(form)).all()


def test_raw_relu_keys_share_few_buckets_once_centred() -> None:
    """2,000 keys in one orthant: uncentred, two random ones fall into one bucket of 3 bits far more often than 1/8."""
    rng = np.random.default_rng(0)
    keys = np.abs(rng.normal(size=(2000, DIM))).astype(np.float32) + 1.0
    form = sketch(arrays=1, half_life_events=None)
    for key in keys:
        form.write(key, np.zeros(WIDTH, np.float32))
    form.reset()  # latches the centre
    shares = np.bincount([_buckets(form, key, form.latched)[0] for key in keys], minlength=8) / 2000
    raw = np.bincount([_buckets(form, key, np.zeros(DIM, np.float32))[0] for key in keys], minlength=8) / 2000
    assert (shares**2).sum() < 0.5 * (raw**2).sum()


def owner(i: int) -> Owner:
    """Of user i % 3."""
    return Owner(mark(f"u{i % 3}"), mark(f"e{i}"), float(i))


def owned(form: Form, seed: int, count: int) -> Form:
    keys, values = records(seed, count)
    for i, (key, value) in enumerate(
        zip(numbers(seed, count) if isinstance(form, ByKey) else keys, values, strict=True)
    ):
        assert form.write(key, value, owner(i))
    return form


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), count=st.integers(1, 50), more=st.integers(0, 30), key=st.sampled_from(["u0", "u4"]))
def test_rows_read_as_if_those_of_one_owner_had_never_come_to_lie_there(
    seed: int, count: int, more: int, key: str
) -> None:
    form, oracle = knn(half_life_events=7.0), knn(half_life_events=7.0)
    owned(form, seed, count)
    order = np.roll(np.arange(len(form)), -(form.writes % len(form)))
    mine = [slot for slot in order if form.owners.keys[slot] == mark(key)]
    for slot in order:
        if slot not in mine:
            at = oracle.writes
            oracle.rows[at], oracle.values[at], oracle.writes = form.rows[slot], form.values[slot], at + 1
    assert form.forget(Selector(key=key)) == len(mine)
    oracle.centre.load_state_dict(form.centre.state_dict())
    for each in (form, oracle):
        filled(each, seed + 1, more)
    np.testing.assert_allclose(form.read(queries(form)), oracle.read(queries(oracle)), rtol=1e-12)  # another order


@pytest.mark.parametrize("make", FORMS)
def test_what_is_erased_is_not_in_the_state(make: Any) -> None:
    form: Any = owned(make(), 1, 30)
    assert form.forget(Selector(until_s=100.0))
    assert len(form) == 0
    fresh = make()
    fresh.writes = form.writes  # of sums by key: a clock, not a count
    assert digest(form.state_dict()) == digest(fresh.state_dict())


def test_a_sum_goes_with_its_owner_and_one_of_several_owners_with_each() -> None:
    form, ones = by_key(), np.ones(WIDTH, np.float32)
    for name, who in ((1, "a"), (2, "b"), (3, "a"), (3, "b"), (4, "b"), (5, "")):
        form.write(np.array([name]), ones, Owner(mark(who)))
    before = form.read(np.array([[2], [4]]))
    restored = by_key()
    restored.load_state_dict(unflatten(*flatten(form.state_dict())))
    for each in (form, restored):
        assert each.forget(Selector(key="a")) == 3  # 1, 3, and 5, which may be anybody's
        assert list(each.sums) == [2, 4] == list(each.owners)
        np.testing.assert_array_equal(each.read(np.array([[2], [4]])), before)
        assert each.forget(Selector(ids=frozenset({"e"}))) == 2


@pytest.mark.parametrize("make", FORMS)
def test_a_state_of_before_rows_had_owners_is_erased_by_every_forget(make: Any) -> None:
    form = filled(make(), 1, 30)
    state = {name: value for name, value in form.state_dict().items() if not name.startswith("owner")}
    form.load_state_dict(unflatten(*flatten(state)))
    held = len(form)
    assert form.forget(Selector(key="u0")) == held > 0


def test_nobody_is_not_somebody() -> None:
    assert mark("") == NOBODY.key == 0 != mark("u0")
    assert mark("u0") == mark("u0") != mark("u1")
