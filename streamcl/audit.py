"""What has been forgotten, on record: one line of JSON for each command, and nothing in it of whom."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from streamcl.chunks import sync
from streamcl.remote import Remote
from streamcl.snapshot import CheckpointError

FILE = "audit.jsonl"

Line = Mapping[str, Any]
Lines = dict[tuple[str, str], Line]


class Audit:
    """A file of a shard's folder, and its copy beside the copies of snapshots.

    A line is written once the rows and every snapshot that held them are gone:

    - `request`: the command's id, as its writer chose it;
    - `position`: where it stood, `commands:PARTITION:OFFSET`; `time_s`: the time of that record;
    - `rows`: how many were erased, by part; `retired`: the snapshots that were deleted.

    Request and position are its identity: a recovery that repeats the command writes no second line.

    Raises:
        CheckpointError: it can't be read or written.
    """

    def __init__(self, folder: Path, remote: Remote | None = None) -> None:
        self.path = folder / FILE
        self.remote = remote

    def lines(self) -> list[Line]:
        """Oldest first."""
        return list(_merged(self._copies()).values())

    def add(self, lines: Sequence[Line]) -> None:
        """Append those that are not there; durable, here and in the copy, when it returns."""
        copies = self._copies()
        known = _merged(copies)
        whole = known | {_identity(line): line for line in lines if _identity(line) not in known}
        if all(copy.keys() == whole.keys() for copy in copies):  # one alone may have it: the other failed
            return
        data = b"".join(orjson.dumps(line) + b"\n" for line in whole.values())
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self.path)
            sync(self.path.parent)
            if self.remote:
                self.remote.put(FILE, data)
        except OSError as error:
            raise CheckpointError(f"{self.path}: can't be written: {error}") from error

    def _copies(self) -> list[Lines]:
        """The store's, if there is one, and the folder's."""
        try:
            away = [self.remote.get(FILE)] if self.remote else []
            here = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise CheckpointError(f"{self.path}: can't be read: {error}") from error
        return [{_identity(line): line for line in map(orjson.loads, data.splitlines())} for data in (*away, here)]


def _merged(copies: Sequence[Lines]) -> Lines:
    """A shard may have been elsewhere for a while, or its store away."""
    return {identity: line for copy in copies for identity, line in copy.items()}


def _identity(line: Line) -> tuple[str, str]:
    return str(line["request"]), str(line["position"])
