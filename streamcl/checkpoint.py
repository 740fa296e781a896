"""Snapshots of a whole worker: atomic, verified, retained, and loaded without executing code.

A snapshot is a folder `SEQUENCE-RECORDS` of three files: small arrays (`arrays.safetensors`), everything else that is
no array (`state.json`), and a manifest, written last, with the checksum of the other two and of itself. Large arrays
lie in `chunks` beside the snapshots (see `streamcl.chunks`), which share them: what has not changed is not written
again. A snapshot gets its name by one rename after every byte was synced; so what has a name is whole, or was damaged
later, and the checksums show it. With a `Remote` each is copied to an object store, and fetched where it is newer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from streamcl import __version__
from streamcl.chunks import Chunks, names_of
from streamcl.protocols import Fenced, State, StreamclError
from streamcl.remote import Remote
from streamcl.state import Arrays, StateError, digest, digest_flat, flatten, pickles, to_json, unflatten

__all__ = ["CheckpointError", "Damaged", "Loaded", "Snapshot", "Store", "Vanished", "digest", "environment"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of what lies in a snapshot. Raise it with every change that an older reader would misread, and add a migration."""

Migration = Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]
"""(state, manifest) of format n to those of format n + 1."""

MIGRATIONS: dict[int, Migration] = {1: lambda state, manifest: (state, manifest)}
"""By the format that they start from. Format 1 knew no chunks."""

ARRAYS, REST, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
CHUNKS = "chunks"
CHUNKED_BYTES = 1 << 20
"""Arrays of this size or more are cut into chunks."""
_NAME = re.compile(r"(\d{10})-\d+")
_UNFINISHED = ".unfinished-"
_SEAL = b'{"sha256":"%s",'
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}


class CheckpointError(StreamclError):
    """A checkpoint could not be written or read. The text names the folder and the cause."""


class Damaged(CheckpointError):
    """A snapshot that is torn, corrupt or foreign; the one before it may be used."""


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


class Store:
    """The checkpoints of one shard, in one folder.

    One worker writes (its predecessor is fenced before it starts); any number of readers may look on.

    Args:
        folder: made by the first `save` or `probe`; while absent it reads as an empty one.
        retain: newest valid checkpoints kept (count), >= 1. Damaged ones are evidence and never deleted.
        trust_pickle: allow a state with a key `pickle`. Whoever unpickles it runs what its writer put in.
        migrations: by the format that they start from; applied in order while loading.
        remote: where every snapshot is copied to, and fetched from by a folder that lacks it.

    `damaged` holds (name, cause) of every snapshot found damaged so far, each name once. `permit` is called before a
    snapshot gets its name, and raises what forbids it.
    """

    def __init__(
        self,
        folder: Path,
        retain: int = 3,
        trust_pickle: bool = False,
        migrations: Mapping[int, Migration] = MIGRATIONS,
        remote: Remote | None = None,
    ) -> None:
        if retain < 1:
            raise ValueError("retain must be at least 1")
        self.folder = folder
        self.retain = retain
        self.trust_pickle = trust_pickle
        self.migrations = migrations
        self.remote = remote
        self.chunks = Chunks(folder / CHUNKS)
        self.damaged: list[tuple[str, str]] = []
        self.permit: Callable[[], None] = lambda: None
        self._tried: set[str] = set()  # to mend
        self._valid: set[str] = set()  # saved or verified by this process

    def save(self, state: State, manifest: Mapping[str, Any]) -> Snapshot:
        """Write a snapshot; once this returns it survives a power cut.

        `manifest` is JSON of the caller's; its `records` (count, default 0) stands in the name, for people.

        Raises:
            CheckpointError: older snapshots stand as they stood, and no half one was left.
        """
        with self._writing(), self._chunks_undone(), self._unfinished() as folder:
            self._fill(folder, state, manifest)
            self.permit()
            path = self.folder / f"{self._next():010d}-{int(manifest.get('records', 0))}"
            folder.rename(path)
            _sync(self.folder)
        self._valid.add(path.name)
        self._retain()
        snapshot = self._snapshot(path.name)
        if self.remote:
            with self._writing():
                self.remote.push(snapshot.path, self._names_of_chunks(path.name), self.retain)
        return snapshot

    def probe(self) -> None:
        """Find out now what would make a later `save` fail. Raises CheckpointError."""
        with self._writing(), self._unfinished() as folder:
            self._fill(folder, {}, {})

    def newest(self) -> Loaded | None:
        """The newest valid snapshot. Damaged ones are logged, kept, and listed in `damaged`; a sound copy replaces one.

        Raises:
            CheckpointError: a valid one that must not be passed over in silence: written by a newer streamcl,
                without a migration, or with a pickle that isn't trusted.
        """
        here, away = self._names(), self._names_away()
        for name in sorted({*here, *away}, reverse=True):
            try:
                if self.remote and name not in here:
                    self._fetch(self.remote, name)
                return self.load(name)
            except Damaged:
                if self.remote and name in here and name in away and (mended := self._mend(self.remote, name)):
                    return mended
            except Vanished:
                return self.newest()  # the writer's retention was faster, so there is a newer one
        return None

    def _names_away(self) -> list[str]:
        try:
            return self.remote.names() if self.remote else []
        except OSError as error:
            raise CheckpointError(f"can't see which checkpoints there are: {error}") from error

    def _mend(self, remote: Remote, name: str) -> Loaded | None:
        """Once, and where it can be: a reader may not write here, and an older snapshot serves as well."""
        if name in self._tried:
            return None
        self._tried.add(name)
        try:
            self._fetch(remote, name)
            return self.load(name)
        except CheckpointError as error:
            logger.warning("damaged checkpoint %s stays: %s", self.folder / name, error)
            return None

    def _fetch(self, remote: Remote, name: str) -> None:
        """Bring a copy; what it holds is checked when it is loaded, like any other."""
        with self._writing(), self._unfinished() as folder:
            try:
                remote.pull(name, folder, self.chunks)
            except FileNotFoundError as error:
                raise Vanished(f"{remote.url}/{name}: no such checkpoint") from error
            for path in (*folder.iterdir(), folder):
                _sync(path)
            if (self.folder / name).exists():
                (self.folder / name).rename(self.folder / f"damaged-{name}-{uuid.uuid4().hex[:8]}")
            folder.rename(self.folder / name)
            _sync(self.folder)

    def ls(self) -> list[Snapshot]:
        """Every snapshot with a sound manifest, oldest first. What else it holds is for `verify` to read."""
        found = []
        for name in self._names():
            with contextlib.suppress(Damaged, Vanished):
                found.append(self._snapshot(name))
        return found

    def load(self, name: str) -> Loaded:
        """Read one snapshot and check every byte. Raises CheckpointError, and of it Damaged and Vanished."""
        snapshot = self._snapshot(name)
        if snapshot.format > FORMAT:
            found = f"format {snapshot.format}, this one reads up to {FORMAT}"
            raise CheckpointError(f"{snapshot.path}: written by a newer streamcl ({found})")
        state = self._state(snapshot)
        self._valid.add(name)
        return self._migrate(snapshot, state)

    def verify(self, name: str) -> Snapshot:
        """Check every byte of one snapshot, of any format. Raises as `load` does."""
        snapshot = self._snapshot(name)
        self._state(snapshot)
        return snapshot

    def _fill(self, folder: Path, state: State, manifest: Mapping[str, Any]) -> None:
        rest, arrays = flatten(state)
        self._refuse_pickle(self.folder, rest)
        chunked, written = self.chunks.write({path: t for path, t in arrays.items() if t.nbytes >= CHUNKED_BYTES})
        small = {path: tensor for path, tensor in arrays.items() if path not in chunked}
        save_file(_apart(small), folder / ARRAYS)
        (folder / REST).write_bytes(to_json(rest))
        body = {
            "format": FORMAT,
            "digest": digest_flat(rest, arrays),
            "files": {name: _checksum(folder / name) for name in (ARRAYS, REST)},
            "chunked": chunked,
            "chunk_bytes": [sum(arrays[path].nbytes for path in chunked), written],
            "manifest": dict(manifest),
        }
        (folder / MANIFEST).write_bytes(_sealed(to_json(body)))
        (folder / ARRAYS).chmod((folder / REST).stat().st_mode)  # the library's 0600 would shut a replica out
        for name in (ARRAYS, REST, MANIFEST):
            _sync(folder / name)
        _sync(folder)

    def _snapshot(self, name: str) -> Snapshot:
        path, data = self.folder / name, self._read(name, MANIFEST)
        try:
            body = _unsealed(data)
            size = len(data) + sum(file["bytes"] for file in body["files"].values())
            total, written = body.get("chunk_bytes", (0, 0))
            return Snapshot(name, body["manifest"], path, body["digest"], body["format"], size + total, size + written)
        except (ValueError, LookupError, TypeError) as error:
            raise self._damage(name, f"{MANIFEST}: {error}") from error

    def _state(self, snapshot: Snapshot) -> State:
        try:
            body = _unsealed(self._read(snapshot.name, MANIFEST))
            content = {name: self._checked(snapshot.name, name, body["files"][name]) for name in (ARRAYS, REST)}
            rest = json.loads(content[REST])
            self._refuse_pickle(snapshot.path, rest)
            state = unflatten(rest, load(content[ARRAYS]) | self.chunks.read(body.get("chunked", {})))
        except OSError as error:  # of a chunk
            if not snapshot.path.exists():
                raise Vanished(f"{snapshot.path}: no such checkpoint") from error
            if error.errno in _DAMAGE:
                raise self._damage(snapshot.name, f"a chunk can't be read: {error}") from error
            raise CheckpointError(f"{snapshot.path}: a chunk can't be read: {error}") from error
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise self._damage(snapshot.name, repr(error)) from error
        if digest(state) != snapshot.digest:
            raise self._damage(snapshot.name, "the state does not have the manifest's digest")
        return state

    def _checked(self, name: str, file: str, listed: Mapping[str, Any]) -> bytes:
        data = self._read(name, file)
        if len(data) != listed["bytes"] or hashlib.sha256(data).hexdigest() != listed["sha256"]:
            raise self._damage(name, f"{file} does not have the manifest's size and checksum")
        return data

    def _read(self, name: str, file: str) -> bytes:
        path = self.folder / name
        try:
            return (path / file).read_bytes()
        except OSError as error:
            if not (path.exists() or path.is_symlink()):
                raise Vanished(f"{path}: no such checkpoint") from error
            if error.errno in _DAMAGE:
                raise self._damage(name, f"{file}: {error.strerror}") from error
            raise CheckpointError(f"{path}: {file}: {error.strerror}") from error

    def _migrate(self, snapshot: Snapshot, state: State) -> Loaded:
        manifest = dict(snapshot.manifest)
        for version in range(snapshot.format, FORMAT):
            if version not in self.migrations:
                raise CheckpointError(f"{snapshot.path}: no migration from format {version}")
            state, manifest = self.migrations[version](state, manifest)
        return Loaded(state, manifest, snapshot)

    def _refuse_pickle(self, where: Path, rest: Any) -> None:
        path = next(pickles(rest), None)
        if path is not None and not self.trust_pickle:
            cure = "set trust_pickle = true if you trust this folder"
            raise CheckpointError(f"{where}: the state holds a pickle at {path}: {cure}")

    def _damage(self, name: str, cause: str) -> Damaged:
        if name not in dict(self.damaged):
            logger.warning("damaged checkpoint %s: %s", self.folder / name, cause)
            self.damaged.append((name, cause))
        return Damaged(f"{self.folder / name}: {cause}")

    def _names(self) -> list[str]:
        """Oldest first, by sequence: a stream begun anew counts records from 0, and must not sort before the old."""
        try:
            return sorted(f.name for f in self.folder.iterdir() if _NAME.fullmatch(f.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {error.strerror}") from error

    def _next(self) -> int:
        return 1 + max(map(_sequence, self._names()), default=0)

    def _retain(self) -> None:
        """Failing here costs disk, and never the snapshot just written."""
        kept = 0
        try:
            for name in reversed(self._names()):
                kept += self._is_valid(name)
                if kept > self.retain and name in self._valid:
                    self._delete(name)
            self._sweep_chunks()
        except (OSError, CheckpointError) as error:
            logger.warning("old checkpoints stay: %s", error)

    def _sweep_chunks(self) -> None:
        self.chunks.keep({chunk for name in self._names() for chunk in self._names_of_chunks(name)})

    @contextlib.contextmanager
    def _chunks_undone(self) -> Iterator[None]:
        """What a save that fails had written must not be what fills the disk for the next one."""
        try:
            yield
        except Fenced:  # another worker's chunks may be on their way
            raise
        except Exception:
            with contextlib.suppress(OSError, CheckpointError):
                self._sweep_chunks()
            raise

    def _names_of_chunks(self, name: str) -> set[str]:
        """None for a snapshot whose manifest can't be read: without it its chunks are nobody's."""
        try:
            return names_of(_unsealed(self._read(name, MANIFEST)).get("chunked", {}))
        except (ValueError, LookupError, TypeError, Damaged):
            return set()

    def _is_valid(self, name: str) -> bool:
        if name not in self._valid:
            try:
                self.verify(name)
            except Damaged:
                return False
            self._valid.add(name)
        return True

    def _delete(self, name: str) -> None:
        """Out of the readers' sight first, so that none meets half a snapshot."""
        grave = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        (self.folder / name).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
        self._valid.discard(name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Every fault of writing as one error that names the folder."""
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                _sync(self.folder.parent)
            yield
        except (OSError, SafetensorError, StateError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: can't write a checkpoint: {error}") from error

    @contextlib.contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A folder that is gone afterwards, unless renamed. The lock dies with its writer; the next one sweeps."""
        self._sweep()
        folder = self.folder / f"{_UNFINISHED}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            with _opened(folder) as handle:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        for folder in self.folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError), _opened(folder) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _sequence(name: str) -> int:
    return int(name.partition("-")[0] or 0)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)


def _apart(arrays: Arrays) -> Arrays:
    """A safetensors file takes no two arrays that share memory: the second becomes a copy."""
    seen: set[int] = set()
    apart = {}
    for path, tensor in arrays.items():
        pointer = tensor.untyped_storage().data_ptr()
        apart[path] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return apart


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


def environment() -> dict[str, Any]:
    """What "bit-identical" rests on besides configuration and stream: versions, CPU, threads."""
    return {
        "python": platform.python_version(),
        "streamcl": __version__,
        **{name: metadata.version(name) for name in ("torch", "numpy", "river")},
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each entry that differs between two environments."""
    names = sorted(old.keys() | new.keys())
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
