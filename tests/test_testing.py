"""Every contract check passes what keeps the contract, and names the promise that a broken one breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from streamcl.protocols import NOTHING, ControlLog, Fenced, Outputs, State
from streamcl.records import Message, Order, Origin, Position, Record, Stream
from streamcl.state import StateError
from streamcl.testing import (
    check_control_log,
    check_sink,
    check_source,
    check_stateful,
    difference,
    equal_states,
)

A, B = Stream("events", 0), Stream("events", 1)


class Listed:
    """A source of six records, three in each of two streams; the subclasses break one promise each."""

    def __init__(self) -> None:
        self.at: dict[Stream, int] = {A: 0, B: 0}

    def streams(self) -> Sequence[Stream]:
        return [A, B]

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        taken: list[Record] = []
        for stream in [only] if only else [A, B]:
            for offset in range(self.at[stream], min(3, self.at[stream] + limit - len(taken))):
                taken.append(Record(Origin(*stream, offset), "t", 0.0, b"%d" % offset))
                self.at[stream] = offset + 1
        return taken

    def seek(self, position: Position) -> Position:
        self.at = {A: 0, B: 0, **position}
        return self.at

    def commit(self, position: Position) -> None:
        pass

    def lag(self) -> Mapping[Stream, int]:
        return {stream: 3 - offset for stream, offset in self.at.items()}

    def exhausted(self) -> bool:
        return not sum(self.lag().values())

    def close(self) -> None:
        pass


class Greedy(Listed):
    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        return super().poll(limit + 1, timeout_s, only)


class Lossy(Listed):
    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        return super().poll(limit, timeout_s, only)[: None if limit > 3 else 1]


class Deaf(Listed):
    def seek(self, position: Position) -> Position:
        return super().seek({})


class Mixed(Listed):
    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        return super().poll(limit, timeout_s, None)


class Endless(Listed):
    def exhausted(self) -> bool:
        return False


class Unsorted(Listed):
    def streams(self) -> Sequence[Stream]:
        return [B, A]


class Retimed(Listed):
    opened = 0

    def __init__(self) -> None:
        super().__init__()
        Retimed.opened += 1

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        return [replace(record, time_s=float(Retimed.opened)) for record in super().poll(limit, timeout_s, only)]


class Indebted(Listed):
    def lag(self) -> Mapping[Stream, int]:
        return dict.fromkeys(self.at, -1)

    def exhausted(self) -> bool:
        return self.at == {A: 3, B: 3}


def test_a_source_that_keeps_the_contract_passes() -> None:
    check_source(Listed, count=6, timeout_s=0.0)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (Greedy, "delivers no more than that"),
        (Lossy, "records come; after"),
        (Deaf, "returns the position that it was given"),
        (Mixed, "`only` delivers"),
        (Endless, "a finite source is exhausted"),
        (Unsorted, "streams are sorted"),
        (Retimed, "another source reads the same"),
        (Indebted, "lag is not negative"),
    ],
)
def test_a_source_that_breaks_a_promise_is_told_which(broken: Callable[[], Listed], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_source(broken, count=6, timeout_s=0.0)


def test_a_source_with_more_than_was_said_is_told() -> None:
    with pytest.raises(AssertionError, match="nothing comes behind the last record"):
        check_source(Listed, count=5, timeout_s=0.0)


class Written:
    """A sink into a list that all of them share; `breaks` says how it fails."""

    def __init__(self, place: list[bytes | None], breaks: str = "") -> None:
        self.place, self.breaks = place, breaks
        self.pending: list[bytes | None] = []
        self.rejected: Callable[[Message, str], None] | None = None
        if breaks == "truncates":
            place.clear()

    def send(self, messages: Sequence[Message]) -> None:
        values = [message.value for message in messages]
        self.pending += reversed(values) if self.breaks == "reorders" else values

    def flush(self) -> None:
        self.place += self.pending[:1] if self.breaks == "forgets" else self.pending
        if self.breaks != "repeats":
            self.pending.clear()

    def close(self) -> None:
        self.pending.clear()


def test_a_sink_that_keeps_the_contract_passes() -> None:
    place: list[bytes | None] = [b"old"]
    check_sink(lambda: Written(place), lambda: place)


@pytest.mark.parametrize(
    ("breaks", "promise"),
    [
        ("reorders", "everything sent is there"),
        ("forgets", "everything sent is there"),
        ("repeats", "a second flush writes nothing again"),
        ("truncates", "goes on behind the rest"),
    ],
)
def test_a_sink_that_breaks_a_promise_is_told_which(breaks: str, promise: str) -> None:
    place: list[bytes | None] = []
    with pytest.raises(AssertionError, match=promise):
        check_sink(lambda: Written(place, breaks), lambda: place)


class Logged:
    """A control log into a list and an epoch that all of them share; `breaks` says how it fails."""

    def __init__(self, place: list[Order], epoch: list[int], breaks: str = "") -> None:
        self.place, self.epoch, self.breaks = place, epoch, breaks
        self.mine = 0

    def open(self) -> None:
        self.epoch[0] += 1
        self.mine = self.epoch[0]

    def read(self, start: int) -> Iterator[tuple[int, Order]]:
        skipped = 0 if self.breaks == "rereads" else start
        return iter([(at, order) for at, order in enumerate(self.place, 1) if at > skipped])

    def append(self, order: Order, outputs: Outputs = NOTHING) -> int:
        if self.mine != self.epoch[0] and self.breaks != "unfenced":
            if self.breaks == "leaks":
                self.place.append(order)
            raise Fenced("a successor")
        self.place.append(order)
        return 1 if self.breaks == "stands still" else len(self.place)

    def close(self) -> None:
        pass


def logs(breaks: str = "") -> Callable[[], ControlLog]:
    place: list[Order] = []
    epoch = [0]
    return lambda: Logged(place, epoch, breaks)


def test_a_control_log_that_keeps_the_contract_passes() -> None:
    check_control_log(logs())


@pytest.mark.parametrize(
    ("breaks", "promise"),
    [
        ("unfenced", "a successor's `open` fences"),
        ("leaks", "a fenced order is not in the log"),
        ("rereads", "a returned offset leads to what is behind it"),
        ("stands still", "offsets that `append` returns ascend"),
    ],
)
def test_a_control_log_that_breaks_a_promise_is_told_which(breaks: str, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_control_log(logs(breaks))


class Total:
    """Sums and counts; `breaks` says what its state gets wrong."""

    def __init__(self, breaks: str = "") -> None:
        self.breaks = breaks
        self.sums = np.zeros(2)
        self.count = 0
        self.hidden = 0

    def add(self, step: int) -> float:
        self.sums[step % 2] += step
        self.count += 1
        self.hidden += 1
        return float(self.sums.sum()) + (self.hidden if self.breaks == "hides" else 0)

    def state_dict(self) -> State:
        if self.breaks == "moves":
            self.count += 1
        leaf: Any = (self.count,) if self.breaks == "tuple" else self.count
        return {"sums": self.sums if self.breaks == "aliases" else self.sums.copy(), "count": leaf}

    def load_state_dict(self, state: State) -> None:
        self.sums = state["sums"] if self.breaks == "aliases" else state["sums"].copy()
        self.count = self.count if self.breaks == "forgets" else state["count"]


def test_a_part_that_keeps_the_contract_passes() -> None:
    check_stateful(Total, Total.add)


@pytest.mark.parametrize(
    ("breaks", "promise"),
    [
        ("forgets", "saved at 0 comes back when loaded; they differ at /count: other bits, int"),
        ("hides", "resumed at 0, step 0 answers as it did"),
        ("aliases", "does not change the tree that was loaded at 0; they differ at /sums"),
        ("moves", "`state_dict` changes nothing"),
    ],
)
def test_a_part_that_breaks_a_promise_is_told_which(breaks: str, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_stateful(lambda: Total(breaks), Total.add)


def test_a_leaf_that_no_checkpoint_holds_is_refused() -> None:
    with pytest.raises(StateError, match="count"):
        check_stateful(lambda: Total("tuple"), Total.add)


def test_a_module_of_torch_is_stateful() -> None:
    def train(module: torch.nn.Linear, step: int) -> torch.Tensor:
        output = module(torch.full((2,), float(step)))
        output.sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
        detached: torch.Tensor = output.detach()
        return detached

    def make() -> torch.nn.Linear:
        module = torch.nn.Linear(2, 3)
        torch.nn.init.constant_(module.weight, 0.5)
        torch.nn.init.zeros_(module.bias)
        return module

    check_stateful(make, train, steps=4)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.floats(width=32), max_size=3).map(lambda row: np.array(row, dtype=np.float32))
    | st.lists(st.floats(width=32), max_size=3).map(lambda row: torch.tensor(row, dtype=torch.float32))
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(trees)
def test_a_tree_equals_its_copy_nan_and_all(tree: Any) -> None:
    assert difference(tree, copy.deepcopy(tree)) == ""
    assert equal_states({"x": tree}, {"x": copy.deepcopy(tree)})


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        (0.0, -0.0, "/: other bits, float"),
        (1, 1.0, "/: int and float"),
        (1, True, "/: int and bool"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "/a/b/1: other bits, int"),
        ({"a": 1}, {"b": 1}, "/a: on one side only"),
        ([1], [1, 2], "/: 1 and 2 items"),
        ([1], (1,), "/: list and tuple"),
        (np.zeros(2), torch.zeros(2), "/: ndarray and Tensor"),
        (np.zeros(2), np.zeros(2, np.float32), "/: float64 (2,) and float32 (2,)"),
        (np.zeros((1, 2)), np.zeros(2), "/: float64 (1, 2) and float64 (2,)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), "/: torch.float32 (2,) and torch.int32 (2,)"),
        (torch.zeros(()), -torch.zeros(()), "/: other bits, torch.float32 ()"),
        (np.array([0.0]), np.array([-0.0]), "/: other bits, float64 (1,)"),
        (torch.tensor([True]), torch.tensor([False]), "/: other bits, torch.bool (1,)"),
    ],
)
def test_the_first_difference_is_named_by_its_path(a: Any, b: Any, where: str) -> None:
    assert difference(a, b) == where
    assert not equal_states(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensors_of_every_dtype_and_shape_compare(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert equal_states(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))


def test_a_view_equals_its_copy_whatever_the_layout() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert equal_states(tensor.t(), tensor.t().contiguous())
    array = np.arange(6.0).reshape(2, 3)
    assert equal_states(array.T, np.ascontiguousarray(array.T))
