"""One writer of a shard's snapshots at a time: the one that claimed last, and that only if the one before is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import fsspec
import pytest

from streamcl import lease
from streamcl.lease import Claim, Held, Lease
from streamcl.protocols import Fenced, StreamclError

HOLDER = """
import sys
from streamcl.lease import Lease
lease = Lease(sys.argv[1], float(sys.argv[2]))
print(lease.claim(), flush=True)
for line in sys.stdin:
    try:
        lease.check()
        print("mine", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Holder:
    """A process of its own that claims, and tells when asked whether the shard is its own."""

    def __init__(self, place: str, lease_s: float) -> None:
        command = [sys.executable, "-c", HOLDER, place, str(lease_s)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.epoch = int(self._pipe(self.process.stdout).readline())

    def check(self) -> str:
        print("?", file=self._pipe(self.process.stdin), flush=True)
        return self._pipe(self.process.stdout).readline().strip()

    def _pipe(self, pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(str(tmp_path), 0.6)
    yield made
    made.process.kill()
    made.process.communicate()


def claims(place: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted((place / "claims").iterdir())]


def test_a_worker_that_lives_is_not_taken_over_and_named(tmp_path: Path, holder: Holder) -> None:
    newcomer = Lease(str(tmp_path), 6.0)
    with pytest.raises(Held, match=f"another worker has this shard: process {holder.process.pid} on .*, since 20"):
        newcomer.claim()
    assert holder.check() == "mine"
    assert newcomer.epoch == 0


def test_a_worker_that_was_killed_is_taken_over_at_once(tmp_path: Path, holder: Holder) -> None:
    holder.process.send_signal(signal.SIGKILL)
    holder.process.wait()
    assert Lease(str(tmp_path), 600.0).claim() == holder.epoch + 1  # would wait ten minutes otherwise


def test_a_worker_that_is_frozen_is_taken_over_and_finds_itself_fenced_when_it_wakes(
    tmp_path: Path, holder: Holder
) -> None:
    os.kill(holder.process.pid, signal.SIGSTOP)
    newcomer = Lease(str(tmp_path), 1.0)
    assert newcomer.claim() == 2
    os.kill(holder.process.pid, signal.SIGCONT)
    assert f"another worker has taken over this shard: process {os.getpid()}" in holder.check()
    newcomer.check()
    time.sleep(0.5)  # the old one's beat must not bring its claim back to the top
    newcomer.check()
    newcomer.release()


def test_a_lease_of_zero_takes_over_a_worker_that_lives(tmp_path: Path, holder: Holder) -> None:
    assert Lease(str(tmp_path), 0.0).claim() == 2
    assert holder.check().startswith("Fenced")


def test_who_has_released_is_followed_at_once_by_anyone(tmp_path: Path) -> None:
    first = Lease(str(tmp_path), 60.0)
    first.claim()
    first.release()
    assert claims(tmp_path)[-1]["released"] is True
    assert Lease(str(tmp_path), 60.0).claim() == 2


def test_in_one_process_a_shard_that_is_built_anew_claims_again(tmp_path: Path) -> None:
    first, second = Lease(str(tmp_path), 60.0), Lease(str(tmp_path), 60.0)
    assert (first.claim(), second.claim()) == (1, 2)
    with pytest.raises(Fenced):
        first.check()
    first.release()  # and this one's end does not let go of the other's
    assert claims(tmp_path)[-1]["released"] is False
    second.release()


def test_the_beat_tells_a_worker_that_it_was_taken_over_without_its_asking(tmp_path: Path) -> None:
    old, new = Lease(str(tmp_path), 0.3), Lease(str(tmp_path), 0.0)
    old.claim()
    old.heed()
    new.claim()
    deadline = time.monotonic() + 10.0
    with pytest.raises(Fenced, match="another worker has taken over this shard"):
        while time.monotonic() < deadline:
            old.heed()
            time.sleep(0.01)
    old.claim()  # built anew, it has the shard again
    old.heed()
    old.release()
    new.release()


def test_a_beat_that_comes_late_does_not_take_our_own_next_claim_for_a_successor(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path), 60.0)
    lease.claim()
    late = lease.mine
    assert late is not None
    lease.claim()
    assert not lease._beat(late)
    lease.heed()
    lease.release()


def test_a_lease_that_is_forgotten_beats_no_longer(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path), 0.03)
    lease.claim()
    beating = lease._beating
    assert beating is not None
    del lease
    beating.join(10.0)
    assert not beating.is_alive()


def test_before_a_claim_everybody_may_write(tmp_path: Path) -> None:
    Lease(str(tmp_path), 60.0).check()


def test_on_another_host_only_the_beat_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Lease(str(tmp_path), 0.3)
    first.claim()
    monkeypatch.setattr(lease, "_pids", lambda: "elsewhere")
    with pytest.raises(Held):
        Lease(str(tmp_path), 3.0).claim()
    first._leaving.set()  # as if it had died without a word
    assert Lease(str(tmp_path), 0.4).claim() == 2


def test_a_folder_that_vanishes_costs_no_claim(tmp_path: Path) -> None:
    lease = Lease(str(tmp_path / "a"), 60.0)
    lease.claim()
    (tmp_path / "a" / "claims" / "0000000001").unlink()
    (tmp_path / "a" / "claims").rmdir()
    lease.check()


def test_a_claim_that_stays_unreadable_is_taken_over_when_its_time_is_up(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "0000000007").write_text("{")
    lease = Lease(str(tmp_path), 0.3)
    assert lease.claim() == 8
    lease.release()


def test_a_claim_met_half_written_is_one_of_a_worker_that_lives(tmp_path: Path, holder: Holder) -> None:
    """Emptied before it is filled, as some stores do: neither at the first look nor at a later one is it nobody's."""
    path = tmp_path / "claims" / f"{holder.epoch:010d}"
    path.write_text("")
    with pytest.raises(Held):
        Lease(str(tmp_path), 6.0).claim()


def test_a_claim_that_finds_no_room_leaves_none_that_would_fence_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Lease(str(tmp_path), 0.0), Lease(str(tmp_path), 0.0)
    first.claim()

    def full(path: str, _data: bytes, mode: str) -> None:
        assert mode == "create"
        Path(path).touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(second._files, "pipe_file", full)
    with pytest.raises(StreamclError, match="No space left"):
        second.claim()
    assert second.epoch == 0
    first.check()


def test_few_claims_are_kept(tmp_path: Path) -> None:
    for _ in range(6):
        Lease(str(tmp_path), 0.0).claim()
    assert len(claims(tmp_path)) == 3


def test_the_shard_may_lie_in_an_object_store() -> None:
    place = "memory://bucket/shop-0-of-1"
    first, second = Lease(place, 60.0), Lease(place, 60.0)
    assert (first.claim(), second.claim()) == (1, 2)
    with pytest.raises(Fenced, match="memory://bucket/shop-0-of-1: another worker"):
        first.check()
    second.release()
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_place_that_no_package_knows_is_an_error_that_names_it() -> None:
    with pytest.raises(StreamclError, match="s3x://bucket"):
        Lease("s3x://bucket/a", 1.0)


def test_a_claim_says_of_a_dead_process_that_it_is_gone() -> None:
    claim = Claim(1, "here", os.getpid(), "now", pids="another container of this host, with numbers of its own")
    assert not claim.gone()
    assert replace(claim, released=True).gone()
    assert replace(claim, pids=lease._pids()).gone()  # a predecessor had our number
    assert not replace(claim, pids=lease._pids(), pid=os.getppid()).gone()


def test_a_claim_is_never_read_half_written(tmp_path: Path) -> None:
    holder, reader, done = Lease(str(tmp_path), 0.0), Lease(str(tmp_path), 0.0), threading.Event()
    holder.claim()
    mine = holder.mine
    assert mine is not None

    def beat() -> None:
        count = 0
        while not done.is_set():
            count += 1
            holder._write(replace(mine, beat=count))

    thread = threading.Thread(target=beat)
    thread.start()
    seen = [reader._newest() for _ in range(500)]
    done.set()
    thread.join()
    assert {(claim.pid, claim.released) for claim in seen if claim} == {(os.getpid(), False)}
    assert None not in seen
