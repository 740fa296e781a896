"""Contract checks for parts that remember, and what they compare with."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from streamcl.protocols import State, Stateful
from streamcl.state import flatten

Part = TypeVar("Part", bound=Stateful)


def check_stateful(
    make: Callable[[], Part],
    exercise: Callable[[Part, int], Any],
    *,
    steps: int = 12,
    compare: Callable[[Any, Any], str] | None = None,
) -> None:
    """A part that is saved at any point and loaded into a used one goes on to the same bytes.

    Args:
        make: A fresh part, equal each time.
        exercise: Gives the part its stimulus number n. Whatever it returns must repeat as well.
        steps: Stimuli; the state is saved before each of them and behind the last.
        compare: Where two trees differ, "" if nowhere; `difference` by default.
    """
    compare = compare or difference
    part = make()
    saved: list[State] = [_frozen(part)]
    outputs: list[Any] = []
    for step in range(steps):
        outputs.append(copy.deepcopy(exercise(part, step)))
        saved.append(_frozen(part))
    claim(not compare(_frozen(part), saved[-1]), "`state_dict` changes nothing")
    for cut in range(steps + 1):
        _check_resumed(make, exercise, saved, outputs, cut, compare)


def _check_resumed(
    make: Callable[[], Part],
    exercise: Callable[[Part, int], Any],
    saved: Sequence[State],
    outputs: Sequence[Any],
    cut: int,
    compare: Callable[[Any, Any], str],
) -> None:
    part = make()
    for step in range(max(1, len(outputs) - cut)):
        exercise(part, step)  # dirt: a load must replace everything
    given = copy.deepcopy(saved[cut])
    part.load_state_dict(given)
    claim_same(compare(_frozen(part), saved[cut]), f"a state saved at {cut} comes back when loaded")
    for step in range(cut, len(outputs)):
        output = exercise(part, step)
        claim_same(compare(output, outputs[step]), f"resumed at {cut}, step {step} answers as it did")
    claim_same(compare(_frozen(part), saved[-1]), f"resumed at {cut}, the end state is the same")
    claim_same(compare(given, saved[cut]), f"learning on does not change the tree that was loaded at {cut}")


def _frozen(part: Stateful) -> State:
    state = part.state_dict()
    flatten(state)  # raises StateError for a leaf that no checkpoint can hold
    return copy.deepcopy(state)


def equal_states(a: Any, b: Any) -> bool:
    """Whether two trees are the same to the bit; see `difference`."""
    return not difference(a, b)


def difference(a: Any, b: Any, path: str = "") -> str:
    """The first path at which two trees differ, and how; "" when they are the same to the bit.

    Strict about types, dtypes, shapes and signs of zero; NaN equals a NaN of the same bits. The order of keys in a
    dict does not count.
    """
    if type(a) is not type(b):
        return f"{path or '/'}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, dict):
        return _dicts(a, b, path)
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path or '/'}: {len(a)} and {len(b)} items"
        found = (difference(x, y, f"{path}/{n}") for n, (x, y) in enumerate(zip(a, b, strict=True)))
        return next(filter(None, found), "")
    kind, bits = _bits(a)
    if (kind, bits) == _bits(b):
        return ""
    other = _bits(b)[0]
    return f"{path or '/'}: {kind} and {other}" if kind != other else f"{path or '/'}: other bits, {kind}"


def _dicts(a: dict[Any, Any], b: dict[Any, Any], path: str) -> str:
    if lonely := sorted(map(str, a.keys() ^ b.keys())):
        return f"{path}/{lonely[0]}: on one side only"
    return next(filter(None, (difference(a[key], b[key], f"{path}/{key}") for key in a)), "")


def _bits(leaf: Any) -> tuple[str, Any]:
    """(what it is, its bits)."""
    if isinstance(leaf, torch.Tensor):
        flat = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{leaf.dtype} {tuple(leaf.shape)}", flat.numpy().tobytes()
    if isinstance(leaf, (np.ndarray, np.generic)):
        return f"{leaf.dtype} {leaf.shape}", leaf.tobytes()
    if isinstance(leaf, float):
        return "float", struct.pack("<d", leaf)
    return type(leaf).__name__, leaf


def claim(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"broken: {promise}")


def claim_same(found: str, promise: str) -> None:
    claim(not found, f"{promise}; they differ at {found}")
