"""A state comes back bit for bit, and its digest tells any two states apart."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.state import StateError, digest, flatten, pickles, to_json, unflatten

DTYPES = [np.int64, np.uint64, np.uint8, np.bool_, np.float32, np.float64, np.int32, np.uint16, np.float16]


def layouts(array: Any) -> st.SearchStrategy[Any]:
    """The same kind of array, contiguous or not."""
    steps = [array, array.T, array[::-1] if array.ndim else array, array[..., ::2] if array.ndim else array]
    return st.sampled_from(steps)


numpy_arrays = (
    st.sampled_from(DTYPES)
    .flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
    .flatmap(layouts)
)
tensors = numpy_arrays.map(lambda array: torch.from_numpy(array.copy()))
keys = st.text(alphabet="ab$/~é0", max_size=6) | st.sampled_from(["$torch", "$float", "", "$$int", "__metadata__"])
floats = st.floats() | st.sampled_from([-math.nan, struct.unpack(">d", b"\x7f\xf0\0\0\0\0\0\1")[0], -0.0, 5e-324])
integers = st.integers() | st.sampled_from([2**63, -(2**63), 2**63 - 1, -(1 << 64)])
leaves = st.none() | st.booleans() | integers | floats | st.text(max_size=4) | numpy_arrays | tensors
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=4) | st.dictionaries(keys, t, max_size=4), max_leaves=12)
states = st.dictionaries(keys, trees, max_size=4)


def same(a: Any, b: Any) -> bool:
    """The slow, obvious comparison: kinds, dtypes, shapes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and same(a.numpy(), b.numpy())
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


def reordered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: reordered(tree[key]) for key in reversed(tree)}
    return [reordered(item) for item in tree] if isinstance(tree, list) else tree


def through_bytes(state: dict[str, Any]) -> dict[str, Any]:
    rest, found = flatten(state)
    return unflatten(json.loads(to_json(rest)), found)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(states)
def test_a_state_comes_back_bit_for_bit_and_in_the_order_of_its_keys(state: dict[str, Any]) -> None:
    restored = through_bytes(state)
    assert same(restored, state)
    assert list(restored) == list(state)
    assert digest(restored) == digest(state)


@settings(deadline=None, derandomize=True)
@given(states)
def test_the_digest_does_not_depend_on_the_order_of_keys(state: dict[str, Any]) -> None:
    assert digest(reordered(state)) == digest(state)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(states, states)
def test_digests_are_equal_only_for_equal_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (digest(a) == digest(b)) == same(a, b)


@settings(deadline=None, derandomize=True)
@given(numpy_arrays.filter(lambda array: array.nbytes > 0 and array.dtype != np.bool_), st.data())
def test_the_digest_sees_every_bit_of_an_array(array: Any, data: st.DataObject) -> None:
    flipped = array.copy(order="C")
    bit = data.draw(st.integers(0, 8 * array.nbytes - 1))
    flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert digest({"w": flipped}) != digest({"w": array})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0),
        (True, 1),
        (0.0, -0.0),
        (math.nan, -math.nan),
        (None, "null"),
        ([], {}),
        (torch.zeros(2), np.zeros(2, np.float32)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(2, np.int64), np.zeros(2)),
        (np.zeros((0, 3)), np.zeros((0, 4))),
        ({"a": {"b": 1}}, {"a/b": 1}),
        ({"$float": "7ff0000000000000"}, math.inf),
        ({"$torch": "/x"}, torch.zeros(1)),
    ],
)
def test_the_digest_tells_look_alikes_apart(a: Any, b: Any) -> None:
    assert digest({"x": a}) != digest({"x": b})


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        ((1, 2), "tuple"),
        (b"raw", "bytes"),
        (np.float64(1.0), "float64"),
        (np.array(["a"], dtype=object), "object"),
        (np.array([1.0], dtype=">f8"), "byte order"),
        (np.ma.array([1.0]), "MaskedArray"),
        ({3: 1}, "key 3"),
        (torch.zeros(2, 2).to_sparse(), "Tensor can't be saved.*dense"),
    ],
)
def test_what_could_not_come_back_is_refused_by_its_path(leaf: Any, text: str) -> None:
    with pytest.raises(StateError, match=rf"state/part/~1x.*{text}"):
        flatten({"part": {"/x": leaf}})


def test_a_string_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(StateError, match="surrogates"):
        digest({"x": "\ud800"})


def test_a_module_s_own_state_dict_is_a_state() -> None:
    module = torch.nn.Linear(2, 3)
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    restored = through_bytes({"model": state})["model"]
    assert torch.equal(restored["weight"], module.weight)


def test_a_pickle_is_found_wherever_it_stands() -> None:
    rest, _ = flatten({"learner": {"pickle": np.zeros(3, np.uint8)}, "list": ["pickle"], "unpickled": 1})
    assert list(pickles(rest)) == ["/learner/pickle"]


def test_an_integer_has_no_limit_of_digits() -> None:
    state = {"n": 1 << 20_000, "list": [1, -(1 << 20_000)]}
    assert through_bytes(state) == state


def test_two_names_of_one_array_come_back_as_two() -> None:
    shared = torch.arange(3)
    restored = through_bytes({"a": shared, "b": shared})
    assert torch.equal(restored["a"], restored["b"])
