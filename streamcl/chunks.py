"""Large arrays in pieces that are named by their content, so that snapshots share what has not changed."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from streamcl.state import Arrays

CHUNK_BYTES = 1 << 20
"""Small enough that a table of which few rows change is mostly not written, large enough for few files."""

Listing = Mapping[str, Mapping[str, Any]]
"""By path of an array: `dtype`, `shape` and the names of its `chunks`, in order."""


class Chunks:
    """A folder of files, each named by the SHA-256 of what it holds.

    A chunk that is there is not written again if this process wrote it or has read it and found it sound: what rotted
    on disk before must not become part of a new snapshot.

    `held` are files that lie here beside the snapshots' chunks, by name too: somebody is using them, whether or not a
    snapshot names them yet. They are durable once `settle` has seen them.

    Raises:
        OSError: can't be written or read.
        ValueError: from `read`: a chunk does not hold what its name says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: set[str] = set()
        self._sound: set[str] = set()

    def write(self, arrays: Arrays) -> tuple[dict[str, dict[str, Any]], int]:
        """The listing, and how many bytes had to be written; durable when it returns."""
        listing, written, fresh = {}, 0, set[str]()
        for path, tensor in arrays.items():
            names = []
            for piece in _pieces(tensor):
                names.append(hashlib.sha256(piece).hexdigest())
                if names[-1] not in fresh and not self._written(names[-1]):
                    self.add(names[-1], piece)
                    fresh.add(names[-1])
                    written += len(piece)
            kind = str(tensor.dtype).removeprefix("torch.")
            listing[path] = {"dtype": kind, "shape": list(tensor.shape), "chunks": names}
        if fresh:
            self.sync()
        self._sound |= fresh  # not before: a name that a power cut may take must be written again
        return listing, written

    def add(self, name: str, piece: bytes | memoryview) -> None:
        """Store a chunk, whole or not at all; its name is durable after `sync`."""
        self._place(name, piece, durable=True)

    def _place(self, name: str, piece: bytes | memoryview, durable: bool) -> None:
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / f".{uuid.uuid4().hex}"
        self.held.add(partial.name)  # another thread may be sweeping
        try:
            with partial.open("wb") as file:
                file.write(piece)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.rename(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)
            self.held.discard(partial.name)

    def hold(self, data: bytes) -> str:
        """Store a file that `keep` spares until it is let go; returns its name."""
        name = hashlib.sha256(data).hexdigest()
        self.held.add(name)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._place(name, data, durable=False)
        return name

    def let_go(self, name: str) -> None:
        self.held.discard(name)

    def settle(self, names: Collection[str]) -> tuple[int, int]:
        """Make files durable that were stored by `hold`; how many bytes they are, and how many of them are new."""
        sizes = {name: (self.folder / name).stat().st_size for name in names}
        fresh = [name for name in names if name not in self._sound]
        for name in fresh:
            sync(self.folder / name)
        if fresh:
            self.sync()
        self._sound.update(fresh)
        return sum(sizes.values()), sum(sizes[name] for name in fresh)

    def check(self, name: str) -> None:
        """Raises ValueError, OSError: it does not hold what its name says, or is not there."""
        with (self.folder / name).open("rb") as file:
            self._compare(name, hashlib.file_digest(file, "sha256").hexdigest())

    def sync(self) -> None:
        if self.folder.is_dir():
            sync(self.folder)
            sync(self.folder.parent)

    def holds(self, name: str) -> bool:
        """Whether a chunk is there and sound; reads it."""
        try:
            self._checked(name)
        except (OSError, ValueError):
            return False
        return True

    def read(self, listing: Listing) -> Arrays:
        return {path: self._array(entry) for path, entry in listing.items()}

    def keep(self, names: Collection[str]) -> None:
        """Delete every chunk that is neither named nor held, and what a death left half written."""
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if path.name not in names and path.name not in self.held:
                    self._sound.discard(path.name)
                    path.unlink(missing_ok=True)

    def _written(self, name: str) -> bool:
        return name in self._sound and (self.folder / name).exists()

    def _array(self, entry: Mapping[str, Any]) -> torch.Tensor:
        pieces = [self._checked(name) for name in entry["chunks"]]
        flat = torch.frombuffer(bytearray(b"".join(pieces)), dtype=getattr(torch, entry["dtype"]))
        return flat.reshape(entry["shape"])

    def _checked(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, name: str, found: str) -> None:
        if found != name:
            self._sound.discard(name)
            raise ValueError(f"chunk {name} does not hold what its name says")
        self._sound.add(name)


def names_of(listing: Listing) -> set[str]:
    return {name for entry in listing.values() for name in entry["chunks"]}


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    whole = tensor.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(whole), CHUNK_BYTES):
        yield whole[start : start + CHUNK_BYTES]


def sync(path: Path) -> None:
    """Make what a file holds, or which names a folder holds, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
