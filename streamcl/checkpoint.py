"""The snapshots of one shard: saved and named in one step, retained, copied elsewhere, fetched, mended.

A snapshot (see `streamcl.snapshot`) gets its name by one rename after every byte was synced; so what has a name is
whole, or was damaged later, and the checksums show it. With a `Remote` each is copied to an object store, and fetched
where it is newer.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from streamcl.chunks import Chunks, sync
from streamcl.protocols import Fenced, State
from streamcl.remote import Remote
from streamcl.snapshot import (
    CHUNKS,
    MIGRATIONS,
    NAME,
    CheckpointError,
    Damaged,
    Loaded,
    Migration,
    Snapshot,
    Vanished,
    describe,
    migrated,
    names_of_chunks,
    read,
    refuse_newer,
    write,
)
from streamcl.state import StateError

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished-"


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
    snapshot gets its name, and raises what forbids it. `pinned` is the name of one that stays, however old it is.
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
        self.pinned = ""
        self._tried: set[str] = set()  # to mend
        self._valid: set[str] = set()  # saved or verified by this process

    def save(self, state: State, manifest: Mapping[str, Any]) -> Snapshot:
        """Write a snapshot; once this returns it survives a power cut.

        `manifest` is JSON of the caller's; its `records` (count, default 0) stands in the name, for people.

        Raises:
            CheckpointError: older snapshots stand as they stood, and no half one was left.
        """
        with self._writing(), self._chunks_undone(), self._unfinished() as folder:
            write(folder, state, manifest, self.chunks, self.trust_pickle)
            self.permit()
            path = self.folder / f"{self._next():010d}-{int(manifest.get('records', 0))}"
            folder.rename(path)
            sync(self.folder)
        self._valid.add(path.name)
        self._retain()
        snapshot = self._snapshot(path.name)
        if self.remote:
            with self._writing():
                self.remote.push(snapshot.path, self._names_of_chunks(path.name), self.retain, self.pinned)
        return snapshot

    def probe(self) -> None:
        """Find out now what would make a later `save` fail. Raises CheckpointError."""
        with self._writing(), self._unfinished() as folder:
            write(folder, {}, {}, self.chunks, self.trust_pickle)

    def newest(self) -> Loaded | None:
        """The newest valid snapshot. Damaged ones are logged, kept, and listed in `damaged`; a sound copy replaces one.

        Raises:
            CheckpointError: a valid one that must not be passed over in silence: written by a newer streamcl,
                without a migration, or with a pickle that isn't trusted.
        """
        try:
            found = (self.sound(name) for name in sorted({*self._names(), *self._names_away()}, reverse=True))
            return next(filter(None, found), None)
        except Vanished:
            return self.newest()  # the writer's retention was faster, so there is a newer one

    def sound(self, name: str) -> Loaded | None:
        """One snapshot, fetched where it is not here, mended where it is damaged; None when that can't be.

        Raises:
            CheckpointError: as `newest` does; of it Vanished, when it is neither here nor away.
        """
        here, away = self._names(), self._names_away()
        try:
            if self.remote and name not in here:
                self._fetch(self.remote, name)
            return self.load(name)
        except Damaged:
            return self._mend(self.remote, name) if self.remote and name in here and name in away else None

    def everywhere(self) -> list[Snapshot]:
        """Every snapshot with a sound manifest, here or away, oldest first; what is not here is fetched."""
        here = self._names()
        for name in self._names_away():
            if self.remote and name not in here:
                self._fetch(self.remote, name)
        return self.ls()

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
                sync(path)
            if (self.folder / name).exists():
                (self.folder / name).rename(self.folder / f"damaged-{name}-{uuid.uuid4().hex[:8]}")
            folder.rename(self.folder / name)
            sync(self.folder)

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
        refuse_newer(snapshot)
        state = self._state(snapshot)
        self._valid.add(name)
        return migrated(snapshot, state, self.migrations)

    def verify(self, name: str) -> Snapshot:
        """Check every byte of one snapshot, of any format. Raises as `load` does."""
        snapshot = self._snapshot(name)
        self._state(snapshot)
        return snapshot

    def _snapshot(self, name: str) -> Snapshot:
        with self._noting(name):
            return describe(self.folder / name)

    def _state(self, snapshot: Snapshot) -> State:
        with self._noting(snapshot.name):
            return read(snapshot, self.chunks, self.trust_pickle)

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Damage is told once, whoever comes upon it."""
        try:
            yield
        except Damaged as error:
            if name not in dict(self.damaged):
                logger.warning("damaged checkpoint %s: %s", self.folder / name, error.cause)
                self.damaged.append((name, error.cause))
            raise

    def _names(self) -> list[str]:
        """Oldest first, by sequence: a stream begun anew counts records from 0, and must not sort before the old."""
        try:
            return sorted(f.name for f in self.folder.iterdir() if NAME.fullmatch(f.name))
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
                if kept > self.retain and name in self._valid and name != self.pinned:
                    self._delete(name)
            self._sweep_chunks()
        except (OSError, CheckpointError) as error:
            logger.warning("old checkpoints stay: %s", error)

    def retire(self, before: str) -> list[str]:
        """Delete every snapshot older than that one, here and away, sound or not, and what only they are made of.

        Returns their names. Raises CheckpointError: some may still be there.
        """
        with self._writing():
            old = [name for name in self._names() if _sequence(name) < _sequence(before)]
            for name in old:
                self._delete(name)
            for aside in self.folder.glob("damaged-*"):
                shutil.rmtree(aside)
            self._sweep()
            self._sweep_chunks()
            sync(self.folder)
            away = self.remote.retire(before) if self.remote else []
        return sorted({*old, *away})

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
        try:
            with self._noting(name):
                return names_of_chunks(self.folder / name)
        except Damaged:
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
        self._valid.discard(name)
        shutil.rmtree(grave)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Every fault of writing as one error that names the folder."""
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync(self.folder.parent)
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
