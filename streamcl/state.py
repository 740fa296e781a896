"""A state tree as JSON and arrays, exact to the bit; and its digest, which proves that two states are one.

Leaves are torch tensors, NumPy arrays and JSON values (`streamcl.protocols.State`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import NoneType
from typing import Any, TypeVar

import numpy as np
import torch

from streamcl.protocols import State, StreamclError

Arrays = dict[str, torch.Tensor]
"""By JSON pointer into the tree; contiguous, on the CPU."""

A = TypeVar("A", bound=torch.Tensor | np.ndarray[Any, Any])

_SCALARS = {str, int, float, bool, NoneType}


class StateError(StreamclError):
    """A state holds something that would not come back as it was. The text names its path."""


def flatten(state: State) -> tuple[Any, Arrays]:
    """Split a state into JSON and arrays; shares memory with `state` where it can.

    What comes back is equal in kind (torch or NumPy), dtype, shape and bits, floats that are not finite included.
    Two names of one array come back as two arrays; a gradient, a device and a memory layout do not come back.

    Raises:
        StateError: a leaf that could not come back as it was: a tuple, bytes, a NumPy scalar, an array of objects.
    """
    arrays: Arrays = {}
    return _pack(state, "", arrays), arrays


_shares: ContextVar[bool] = ContextVar("shares", default=False)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Let `cut` copy nothing: whoever asks for a state copies all of it before anything changes."""
    token = _shares.set(True)
    try:
        yield
    finally:
        _shares.reset(token)


def cut(array: A) -> A:
    """What a part puts of a large array into its state: a copy; within `sharing` the array itself.

    Copying a table of a gigabyte stops a worker for a second, and once is enough.
    """
    made: A = array if _shares.get() else copied(array)
    return made


def copied(array: Any) -> Any:
    if isinstance(array, torch.Tensor):
        return array.detach().clone() if array.device.type == "cpu" else array.detach().cpu()
    return array.copy() if type(array) is np.ndarray else array


def private(value: Any, copy: Callable[[Any], Any] = copied) -> Any:
    """A copy of a state that shares no array, list or dict with it."""
    if isinstance(value, dict):
        return {key: private(item, copy) for key, item in value.items()}
    if type(value) is list:
        return value.copy() if _plain(value) else [private(item, copy) for item in value]
    return copy(value) if isinstance(value, (torch.Tensor, np.ndarray)) else value


def unflatten(rest: Any, arrays: Mapping[str, torch.Tensor]) -> State:
    """The inverse of `flatten`."""
    state: State = _unpack(rest, arrays)
    return state


def digest(state: State) -> str:
    """SHA-256 of a state, whatever the order of its keys. Equal digests mean bit-identical states."""
    return digest_flat(*flatten(state))


def digest_flat(rest: Any, arrays: Mapping[str, torch.Tensor]) -> str:
    """The digest of what `flatten` returned."""
    seal = hashlib.sha256(to_json(rest, sort=True))
    for path, tensor in sorted(arrays.items()):
        # A JSON text ends where its bracket closes, and it tells how many bytes follow: no two states read alike.
        seal.update(to_json([path, str(tensor.dtype), list(tensor.shape)]))
        if tensor.numel():
            seal.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seal.hexdigest()


def to_json(value: Any, sort: bool = False) -> bytes:
    """Compact UTF-8. Floats read back to the same bits. Raises StateError."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=sort, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:
        raise StateError(f"not JSON: {error}") from error


def pickles(rest: Any, path: str = "") -> Iterator[str]:
    """Where a flattened state holds a pickle: under a key of that name."""
    if type(rest) is dict:
        for key, item in rest.items():
            if key == "pickle":
                yield f"{path}/{key}"
            yield from pickles(item, f"{path}/{key}")


def files_of(rest: Any) -> Iterator[str]:
    """Files beside it that a flattened state is made of too: what it lists under a key `segment_files`."""
    for key, item in rest.items() if type(rest) is dict else ():
        if key == "segment_files":
            yield from item
        else:
            yield from files_of(item)


def _pack(value: Any, path: str, arrays: Arrays) -> Any:
    kind = type(value)
    if issubclass(kind, dict):  # torch's own state_dict is an OrderedDict
        return {_escape(key, path): _pack(item, _below(path, key), arrays) for key, item in value.items()}
    if kind is list:
        return value if _plain(value) else [_pack(v, _below(path, i), arrays) for i, v in enumerate(value)]
    if kind is float and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}  # JSON has no NaN, and a NaN has a payload
    if kind is int and value.bit_length() > 63:
        return {"$int": hex(value)}  # decimal digits are limited, and other readers stop at 64 bits
    if value is None or kind in (str, bool, int, float):
        return value
    arrays[path] = _tensor(value, path)
    return {"$torch" if isinstance(value, torch.Tensor) else "$numpy": path}


def _plain(values: list[Any]) -> bool:
    """True if a list is JSON as it stands: a list of a million ids needs no visit of each."""
    kinds = set(map(type, values))
    if not kinds <= _SCALARS:
        return False
    if int in kinds and any(type(v) is int and v.bit_length() > 63 for v in values):
        return False
    return float not in kinds or all(map(math.isfinite, (v for v in values if type(v) is float)))


def _escape(key: Any, path: str) -> str:
    if type(key) is not str:
        raise StateError(f"state{path}: key {key!r} is not a string")
    return f"${key}" if key.startswith("$") else key


def _below(path: str, key: Any) -> str:
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _tensor(value: Any, path: str) -> torch.Tensor:
    try:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            return _dense(value.detach().cpu().resolve_conj().resolve_neg())
        if type(value) is np.ndarray:
            plain = value.flags.carray and min(value.strides, default=0) >= 0
            return _dense(torch.from_numpy(value if plain else value.copy(order="C")))
    except (TypeError, ValueError, RuntimeError) as error:
        raise StateError(f"state{path}: this array can't be saved: {error}") from error
    kind = type(value).__name__
    raise StateError(f"state{path}: {kind} can't be saved; use dicts, lists, JSON values, dense arrays")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous; and where there is nothing to stride over, any stride counts as that, so write it anew."""
    return tensor.contiguous() if tensor.numel() > 1 else tensor.clone(memory_format=torch.contiguous_format)


def _unpack(value: Any, arrays: Mapping[str, torch.Tensor]) -> Any:
    if type(value) is list:
        return value if _SCALARS.issuperset(map(type, value)) else [_unpack(item, arrays) for item in value]
    if type(value) is not dict:
        return value
    if len(value) == 1:
        ((tag, item),) = value.items()
        match tag:
            case "$torch":
                return arrays[item]
            case "$numpy":
                return arrays[item].numpy()
            case "$float":
                return struct.unpack(">d", bytes.fromhex(item))[0]
            case "$int":
                return int(item, 16)
    return {key.removeprefix("$"): _unpack(item, arrays) for key, item in value.items()}
