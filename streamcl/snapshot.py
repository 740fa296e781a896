"""The format of one snapshot: its files, their checksums, and the check of every byte, without executing code.

A snapshot is a folder `SEQUENCE-RECORDS` of three files: small arrays (`arrays.safetensors`), everything else that is
no array (`state.json`), and a manifest, written last, with the checksum of the other two and of itself. Large arrays
lie in `chunks` beside the snapshots (see `streamcl.chunks`), which share them: what has not changed is not written
again. So do segments of waiting tickets (see `streamcl.archive`), which the state names: they are written as they fill,
and synced with the first snapshot that names them. When it gets its name, which of many is kept, and where copies are,
is up to `streamcl.checkpoint`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite.binding
import torch
from safetensors import SafetensorError, TensorSpec, serialize_file
from safetensors.torch import load

from streamcl import __version__
from streamcl.chunks import Chunks, names_of, sync
from streamcl.protocols import State, StreamclError
from streamcl.state import digest, digest_flat, files_of, flatten, pickles, to_json, unflatten

FORMAT = 3
"""Of what lies in a snapshot. Raise it with every change that an older reader would misread, and add a migration."""

Migration = Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]
"""(state, manifest) of format n to those of format n + 1."""

MIGRATIONS: dict[int, Migration] = {n: lambda state, manifest: (state, manifest) for n in (1, 2)}
"""By the format that they start from. Format 1 knew no chunks, format 2 no segments."""

ARRAYS, REST, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
CHUNKS = "chunks"
CHUNKED_BYTES = 1 << 20
"""Arrays of this size or more are cut into chunks."""
NAME = re.compile(r"\d{10}-\d+")
_SEAL = b'{"sha256":"%s",'
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


class CheckpointError(StreamclError):
    """A checkpoint could not be written or read. The text names the folder and the cause."""


class Damaged(CheckpointError):
    """A snapshot that is torn, corrupt or foreign; the one before it may be used."""

    def __init__(self, path: Path, cause: str) -> None:
        super().__init__(f"{path}: {cause}")
        self.cause = cause


class Vanished(CheckpointError):
    """No snapshot of that name; retention may have been faster than the reader."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One checkpoint on disk. `manifest` is what the writer gave.

    `size_bytes` counts every file and chunk, `written_bytes` those that had to be written for it.
    """

    name: str
    manifest: Mapping[str, Any]
    path: Path
    digest: str
    format: int
    size_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A snapshot's content, migrated to the present format; `snapshot` says what stands on disk."""

    state: State
    manifest: Mapping[str, Any]
    snapshot: Snapshot


def write(folder: Path, state: State, manifest: Mapping[str, Any], chunks: Chunks, trust_pickle: bool) -> None:
    """Fill an empty folder; durable when it returns, but for the folder's own name.

    Raises:
        CheckpointError: the state holds a pickle, which isn't trusted.
        OSError, SafetensorError, StateError, ValueError: it can't be written.
    """
    rest, arrays = flatten(state)
    _refuse_pickle(folder.parent, rest, trust_pickle)
    chunked, written = chunks.write({path: t for path, t in arrays.items() if t.nbytes >= CHUNKED_BYTES})
    segments = sorted(set(files_of(rest)))
    held, fresh = chunks.settle(segments) if segments else (0, 0)
    small = {path: tensor for path, tensor in arrays.items() if path not in chunked}
    serialize_file({path: spec(tensor) for path, tensor in small.items()}, folder / ARRAYS)
    (folder / REST).write_bytes(to_json(rest))
    body = {
        "format": FORMAT,
        "digest": digest_flat(rest, arrays),
        "files": {name: _checksum(folder / name) for name in (ARRAYS, REST)},
        "chunked": chunked,
        "segments": segments,
        "chunk_bytes": [sum(arrays[path].nbytes for path in chunked) + held, written + fresh],
        "manifest": dict(manifest),
    }
    (folder / MANIFEST).write_bytes(_sealed(to_json(body)))
    (folder / ARRAYS).chmod((folder / REST).stat().st_mode)  # the library's 0600 would shut a replica out
    for name in (ARRAYS, REST, MANIFEST):
        sync(folder / name)
    sync(folder)


def describe(path: Path) -> Snapshot:
    """What the manifest of a snapshot says. Raises CheckpointError, and of it Damaged and Vanished."""
    data = _bytes(path, MANIFEST)
    try:
        body = _unsealed(data)
        size = len(data) + sum(file["bytes"] for file in body["files"].values())
        total, written = body.get("chunk_bytes", (0, 0))
        return Snapshot(path.name, body["manifest"], path, body["digest"], body["format"], size + total, size + written)
    except (ValueError, LookupError, TypeError) as error:
        raise Damaged(path, f"{MANIFEST}: {error}") from error


def read(snapshot: Snapshot, chunks: Chunks, trust_pickle: bool) -> State:
    """The state in a snapshot of any format, every byte checked. Raises as `describe` does."""
    path = snapshot.path
    try:
        body = _unsealed(_bytes(path, MANIFEST))
        content = {name: _checked(path, name, body["files"][name]) for name in (ARRAYS, REST)}
        rest = json.loads(content[REST])
        _refuse_pickle(path, rest, trust_pickle)
        state = unflatten(rest, load(content[ARRAYS]) | chunks.read(body.get("chunked", {})))
        for segment in body.get("segments", ()):
            chunks.check(segment)
    except OSError as error:  # of a chunk
        if not path.exists():
            raise Vanished(f"{path}: no such checkpoint") from error
        if error.errno in _DAMAGE:
            raise Damaged(path, f"a chunk can't be read: {error}") from error
        raise CheckpointError(f"{path}: a chunk can't be read: {error}") from error
    except (SafetensorError, ValueError, LookupError, TypeError) as error:
        raise Damaged(path, repr(error)) from error
    if digest(state) != snapshot.digest:
        raise Damaged(path, "the state does not have the manifest's digest")
    return state


def refuse_newer(snapshot: Snapshot) -> None:
    if snapshot.format > FORMAT:
        found = f"format {snapshot.format}, this one reads up to {FORMAT}"
        raise CheckpointError(f"{snapshot.path}: written by a newer streamcl ({found})")


def migrated(snapshot: Snapshot, state: State, migrations: Mapping[int, Migration]) -> Loaded:
    """State and manifest in the present format. Raises CheckpointError: there is no way to it."""
    manifest = dict(snapshot.manifest)
    for version in range(snapshot.format, FORMAT):
        if version not in migrations:
            raise CheckpointError(f"{snapshot.path}: no migration from format {version}")
        state, manifest = migrations[version](state, manifest)
    return Loaded(state, manifest, snapshot)


def names_of_chunks(path: Path) -> set[str]:
    """None for a snapshot whose manifest is not sound: without it its chunks are nobody's. Raises as `describe`."""
    data = _bytes(path, MANIFEST)
    try:
        body = _unsealed(data)
        return names_of(body.get("chunked", {})) | set(body.get("segments", ()))
    except (ValueError, LookupError, TypeError):
        return set()


def _bytes(path: Path, file: str) -> bytes:
    try:
        return (path / file).read_bytes()
    except OSError as error:
        if not (path.exists() or path.is_symlink()):
            raise Vanished(f"{path}: no such checkpoint") from error
        if error.errno in _DAMAGE:
            raise Damaged(path, f"{file}: {error.strerror}") from error
        raise CheckpointError(f"{path}: {file}: {error.strerror}") from error


def _checked(path: Path, file: str, listed: Mapping[str, Any]) -> bytes:
    data = _bytes(path, file)
    if len(data) != listed["bytes"] or hashlib.sha256(data).hexdigest() != listed["sha256"]:
        raise Damaged(path, f"{file} does not have the manifest's size and checksum")
    return data


def _refuse_pickle(where: Path, rest: Any, trusted: bool) -> None:
    path = next(pickles(rest), None)
    if path is not None and not trusted:
        cure = "set trust_pickle = true if you trust this folder"
        raise CheckpointError(f"{where}: the state holds a pickle at {path}: {cure}")


def spec(tensor: torch.Tensor) -> TensorSpec:
    """Where its bytes are. The library's own `save_file` for torch makes a ctypes type of every length that it meets,
    and ctypes keeps them all: a worker whose tickets come and go grew by 2 KB with every snapshot.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(dtype=kind, shape=tensor.shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _sealed(body: bytes) -> bytes:
    """A JSON object that begins with the checksum of its own rest."""
    rest = body.removeprefix(b"{")
    return _SEAL % hashlib.sha256(rest).hexdigest().encode() + rest


def _unsealed(data: bytes) -> Any:
    if data != _sealed(data[len(_SEAL % bytes(64)) :]):
        raise ValueError("does not have its own checksum")
    return json.loads(data)


def environment(engine: str = "eager", device: str = "cpu") -> dict[str, Any]:
    """What "bit-identical" rests on besides configuration and stream: the engine, versions, CPU, threads."""
    # Compiled code is made for one kind of CPU, torch's for its vector instructions alone.
    host = {"host": llvmlite.binding.get_host_cpu_name()} if engine == "fused" else {}
    return {
        "engine": engine,
        **({"device": f"{device} {torch.version.cuda}"} if device != "cpu" else {}),
        **host,
        "python": platform.python_version(),
        "streamcl": __version__,
        **{name: metadata.version(name) for name in ("torch", "numpy", "numba", "river")},
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs between two environments."""
    old = {"engine": "eager", **old}  # there was no other
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
