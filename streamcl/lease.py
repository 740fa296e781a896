"""Who may write a shard's snapshots: one worker at a time, the one that claimed last.

A claim is a file `claims/EPOCH` beside the snapshots, made exclusively; it holds who claimed, and a beat that moves
while its process does. Who finds a claim waits for its beat: it moved = its worker lives, so the newcomer refuses to
start; it stood still = dead or frozen, so the newcomer claims with the next epoch, and the old worker is fenced at its
next snapshot. The control log fences it earlier, at its next order.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import orjson
from fsspec.implementations.local import LocalFileSystem

from streamcl.protocols import Fenced, StreamclError

_KEPT = 3  # claims, for people who ask what happened


class Held(StreamclError):
    """Another worker, which lives, has this shard. The text names its host, its process, and since when."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a claim's file says.

    `beat` is a count; `since` a time for people; released: its worker has left. `pids` says where its pid means
    something: containers share a host's name, and not its processes.
    """

    epoch: int
    host: str
    pid: int
    since: str
    beat: int = 0
    released: bool = False
    pids: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def gone(self) -> bool:
        """Its process is known to be dead; False where that can't be known. Our own number is a predecessor's."""
        if self.released:
            return True
        return self.pids == _pids() and (self.pid == os.getpid() or not _alive(self.pid))


class Lease:
    """A worker's right to write snapshots.

    Args:
        place: The shard's folder, a path or an fsspec URL.
        lease_s: How long a claim is watched for its beat, which moves three times in it; 0: take over at once.
    """

    def __init__(self, place: str, lease_s: float) -> None:
        self.place = place
        self.lease_s = lease_s
        self.mine: Claim | None = None
        self._successor: Claim | None = None
        with self._named():
            self._files, root = fsspec.core.url_to_fs(place)
        self._folder = f"{root}/claims"
        self._leaving = threading.Event()
        self._beating: threading.Thread | None = None

    @property
    def epoch(self) -> int:
        """0 before `claim`."""
        return self.mine.epoch if self.mine else 0

    def claim(self) -> int:
        """Take the shard; returns the epoch.

        Raises:
            Held: the worker that has it lives.
            StreamclError: the place can't be written to.
        """
        self.release()
        with self._named():
            self._files.makedirs(self._folder, exist_ok=True)
            newest = self._newest()
            if newest and self._lives(newest):
                raise Held(f"{self.place}: another worker has this shard: {newest}; stop it first")
            since = datetime.now(UTC).isoformat(timespec="seconds")
            self.mine = Claim((newest.epoch if newest else 0) + 1, platform.node(), os.getpid(), since, pids=_pids())
            try:
                self._write(self.mine, mode="create")
            except FileExistsError as error:
                self.mine = None
                raise Held(f"{self.place}: another worker has claimed this shard at the same moment") from error
            except OSError:  # a full disk: a claim without text would still fence who lives
                with contextlib.suppress(Exception):
                    self._files.rm_file(self._path(self.mine.epoch))
                self.mine = None
                raise
            self._prune()
        if self.lease_s:
            self._leaving = threading.Event()
            # Known weakly: whoever is forgotten without a release lives no longer.
            beat = (weakref.ref(self), self.mine, self._leaving, self.lease_s / 3)
            self._beating = threading.Thread(target=_beat, args=beat, name="streamcl-lease", daemon=True)
            self._beating.start()
        return self.mine.epoch

    def check(self) -> None:
        """Raises Fenced when another worker has claimed the shard since. Before `claim` everybody may write."""
        if self.mine is None:
            return
        with self._named():
            newest = self._newest()
        if newest and newest.epoch > self.mine.epoch:
            self._successor = newest
        self.heed()

    def heed(self) -> None:
        """As `check`, from what the beat has seen, without asking: for every turn, and for a worker without input."""
        if self._successor:
            raise Fenced(f"{self.place}: another worker has taken over this shard: {self._successor}")

    def release(self) -> None:
        """Let go; a successor need not wait. Never raises."""
        if self.mine is None:
            return
        self._leaving.set()
        if self._beating:
            self._beating.join(5.0)
        with contextlib.suppress(Exception):  # the worst that comes of it is a successor that waits
            newest = self._newest()
            if newest and newest.epoch == self.mine.epoch:
                self._write(replace(newest, released=True))
        self.mine = self._beating = self._successor = None

    def _lives(self, claim: Claim) -> bool:
        if claim.gone() or not self.lease_s:
            return False
        end = time.monotonic() + self.lease_s
        while time.monotonic() < end:
            time.sleep(self.lease_s / 10)
            now = self._read(claim.epoch)
            if now is None or now.gone():
                return False
            if now.beat != claim.beat:
                return True
        return False

    def _beat(self, claim: Claim) -> bool:
        """False once another worker has claimed the shard."""
        with contextlib.suppress(Exception):  # a place that is away for a while is no reason to die
            newest = self._newest()
            if newest and newest.epoch > claim.epoch:
                if (
                    self.mine and self.mine.epoch == claim.epoch
                ):  # else we have let go of this claim, and may have another
                    self._successor = newest
                return False
            self._files.makedirs(self._folder, exist_ok=True)
            self._write(claim)
        return True

    def _newest(self) -> Claim | None:
        epochs = self._epochs()
        return self._read(epochs[-1]) if epochs else None

    def _epochs(self) -> list[int]:
        self._files.invalidate_cache()
        try:
            names = self._files.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        stems = (str(name).rpartition("/")[2] for name in names)
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _read(self, epoch: int) -> Claim | None:
        """A claim whose text can't be read is just being written, or is a torn one: its beat tells, as any other's."""
        try:
            data = orjson.loads(self._files.cat_file(self._path(epoch)))
            who = (str(data["host"]), int(data["pid"]), str(data["since"]))
            return Claim(epoch, *who, int(data["beat"]), bool(data["released"]), str(data.get("pids", "")))
        except FileNotFoundError:
            return None
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            return Claim(epoch, "unknown", 0, "unknown", beat=-1)

    def _write(self, claim: Claim, mode: str = "overwrite") -> None:
        fields = {name: getattr(claim, name) for name in ("host", "pid", "since", "beat", "released", "pids")}
        path, data = self._path(claim.epoch), orjson.dumps(fields)
        if mode == "overwrite" and isinstance(self._files, LocalFileSystem):  # which empties a file before it fills it
            self._files.pipe_file(f"{path}.new", data)
            Path(f"{path}.new").replace(path)
        else:
            self._files.pipe_file(path, data, mode=mode)

    def _prune(self) -> None:
        for epoch in self._epochs()[:-_KEPT]:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(epoch))

    def _path(self, epoch: int) -> str:
        return f"{self._folder}/{epoch:010d}"

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except StreamclError:
            raise
        except Exception as error:  # each store has errors of its own, which are no OSError
            raise StreamclError(f"{self.place}: can't claim the shard: {error}") from error


def _beat(lease: weakref.ref[Lease], claim: Claim, leaving: threading.Event, every_s: float) -> None:
    """On a thread of its own: a loop in a long turn or a long restore lives, a process that is frozen doesn't."""
    goes_on = True
    while goes_on and not leaving.wait(every_s):
        claim = replace(claim, beat=claim.beat + 1)
        held = lease()
        goes_on = held is not None and held._beat(claim)
        del held


@functools.cache
def _pids() -> str:
    """Where a process id means one process: this boot of this machine, and this namespace of it if it has them."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
