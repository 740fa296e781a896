"""Copies of snapshots in an object store, by fsspec: where a shard goes on when its machine is gone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import fsspec

from streamcl.chunks import Chunks
from streamcl.snapshot import MANIFEST, NAME

log = logging.getLogger(__name__)


class Remote:
    """The snapshots of one shard under a URL that fsspec knows (`s3://bucket/prefix`, `gs://...`, `file:///mnt/...`).

    An object store renames nothing and syncs nothing, but a single object is there whole or not at all: so a snapshot
    is there once its manifest is, which is written last and deleted first. Whoever loads it checks every byte.

    Raises:
        OSError: the store is away, or the package for its scheme is missing; the text names the URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with self._named():
            self._files, self._root = fsspec.core.url_to_fs(url)

    def names(self) -> list[str]:
        """Complete snapshots, newest first."""
        with self._named():
            self._files.invalidate_cache()
            return self._complete()

    def folders(self) -> list[str]:
        """Names of what lies under the URL, for who looks at the place of all shards."""
        with self._named():
            self._files.invalidate_cache()
            return self._ls("")

    def push(self, snapshot: Path, chunks: Collection[str], retain: int, pinned: str = "") -> None:
        """Copy a snapshot and those of its chunks that are not there; then let the oldest go, down to `retain`, but for
        the one that is `pinned`.
        """
        with self._named():
            self._files.invalidate_cache()
            there = self._sizes("chunks")
            for path in (snapshot.parent / "chunks" / chunk for chunk in sorted(chunks)):
                if there.get(path.name) != path.stat().st_size:  # a folder's file, unlike an object, may be half there
                    self._put(path, f"chunks/{path.name}")
            for path in sorted(snapshot.iterdir(), key=lambda path: path.name == MANIFEST):
                self._put(path, f"{snapshot.name}/{path.name}")
        try:
            with self._named():
                self._retain(retain, pinned)
        except OSError as error:
            log.warning("old copies stay: %s", error)

    def pull(self, name: str, folder: Path, chunks: Chunks) -> None:
        """Fetch a snapshot into `folder`, and its chunks that are not there or not sound."""
        with self._named():
            for file in self._ls(name):
                (folder / file).write_bytes(self._files.cat_file(f"{self._root}/{name}/{file}"))
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            for chunk in self._ls("chunks"):
                if chunk in text and not chunks.holds(chunk):
                    chunks.add(chunk, self._files.cat_file(f"{self._root}/chunks/{chunk}"))
            chunks.sync()

    def retire(self, before: str) -> list[str]:
        """Let go of every snapshot older than that one, whole or not; their names. Versions that a store keeps stay."""
        with self._named():
            self._files.invalidate_cache()
            names = [name for name in self._ls("") if NAME.fullmatch(name)]
            old = [name for name in names if int(name.partition("-")[0]) < int(before.partition("-")[0])]
            self._remove(old)
            self._sweep(set(names) - set(old))
        return old

    def get(self, name: str) -> bytes:
        """A file that is no part of a snapshot; empty while there is none."""
        with self._named():
            try:
                return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return b""

    def put(self, name: str, data: bytes) -> None:
        with self._named():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/{name}", data)

    def _retain(self, retain: int, pinned: str) -> None:
        """What was left incomplete goes too, and counts for nothing."""
        complete = [name for at, name in enumerate(self._complete()) if at < retain or name == pinned]
        self._remove({name for name in self._ls("") if NAME.fullmatch(name)} - set(complete))
        self._sweep(complete)

    def _remove(self, names: Collection[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")
            self._files.rm(f"{self._root}/{name}", recursive=True)

    def _sweep(self, names: Collection[str]) -> None:
        """Remove the chunks that none of these snapshots names."""
        kept = [f"{self._root}/{name}/{MANIFEST}" for name in names if MANIFEST in self._ls(name)]
        named = "".join(self._files.cat_file(path).decode() for path in kept)
        for chunk in self._ls("chunks"):
            if chunk not in named:
                self._files.rm_file(f"{self._root}/chunks/{chunk}")

    def _complete(self) -> list[str]:
        return sorted((n for n in self._ls("") if NAME.fullmatch(n) and MANIFEST in self._ls(n)), reverse=True)

    def _ls(self, folder: str) -> list[str]:
        return list(self._sizes(folder))

    def _sizes(self, folder: str) -> dict[str, int | None]:
        """By name; none when there is no such folder, which an object store has only with something in it."""
        try:
            found = self._files.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") for entry in found}

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(target, path.read_bytes())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Each client library of a store has errors of its own, which are no OSError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            told = (error.errno, f"{self.url}: {error.strerror}") if error.strerror else (f"{self.url}: {error}",)
            raise OSError(*told) from error
        except Exception as error:
            raise OSError(f"{self.url}: {error}") from error
