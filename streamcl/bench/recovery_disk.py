"""The disk below the checkpoints fails: it is full, its folder is gone, the newest snapshot is damaged.

A worker goes on serving without its disk, says so on `/metrics`, and writes again when it can. A damaged snapshot is
passed over at the next start. What a full disk is, is real: a small tmpfs, which only root may mount.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken, keep, methods, scratch, worst
from streamcl.bench.recovery_kill import judged
from streamcl.bench.recovery_traffic import traffic
from streamcl.bench.recovery_watch import PARTITIONS, POSITION, Sample, Settled, Subject, subject
from streamcl.bench.report import Bar, Report, Row, progress

FAILURES, SAVED_AT = "streamcl_checkpoint_failures_total", "streamcl_checkpoint_last_success_timestamp_seconds"
DAMAGED = "streamcl_checkpoint_damaged_total"
DISK = "16m"
PER_S = 400.0
EVENTS = 60_000
PATIENCE_S = 60.0
FULL, QUICK = 8_000, 400
"""Records that must be taken after the first failure, the disk still broken, to call it serving."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What was seen of one fault; NaN where it could not be brought about.

    Attributes:
        counted: Checkpoints that failed or, damaged, were passed over: by the worker's own counter.
        served: Records taken while the disk was broken and the worker knew.
        alert_s: From the fault to the counter's first move.
        recover_s: From the repair to the next checkpoint; of a damaged snapshot from the new start to work.
    """

    name: str
    counted: float = math.nan
    served: float = math.nan
    alert_s: float = math.nan
    recover_s: float = math.nan


def run(options: Options) -> Report:
    """Methods as in `kill`."""
    began = time.perf_counter()
    least = QUICK if options.quick else FULL
    rows, bars, notes = [], [], [f"the disk is a tmpfs of {DISK}; what lay in the folder that goes is lost for good"]
    with chosen(options.via) as broker:
        for method in methods(options):
            with scratch("disk") as folder, _small_disk(folder / "disk") as mounted:
                troubles, settled = _suffer(broker, folder, method, mounted, least)
                rows += [_row(method, trouble) for trouble in troubles]
                mine = [
                    *_bars(method, troubles, least),
                    *judged(method, broker, settled.ran, settled.replayed, settled.found),
                ]
                bars += mine
                if not mounted:
                    notes.append(f"{method}: no disk could be filled: mounting a tmpfs needs root (Linux)")
                if not all(bar.ok or math.isnan(bar.value) for bar in mine):
                    keep(folder)
    config = {"task": "disk", "broker": broker.kind, "methods": list(methods(options)), "records_per_s": PER_S}
    return Report("recovery", config, [0], time.perf_counter() - began, rows, worst(bars), notes=notes)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """Whether `folder` is a file system of its own, gone at the end."""
    folder.mkdir()
    mounted = _ran("mount", "-t", "tmpfs", "-o", f"size={DISK}", "streamcl-bench", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            _ran("umount", "-l", str(folder))


def _ran(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603 - as written here
    except OSError:
        return False


def _suffer(broker: Broker, folder: Path, method: str, mounted: bool, least: int) -> tuple[list[Trouble], Settled]:
    records = traffic(0, EVENTS, PARTITIONS, time.time())
    checkpoints = folder / "disk" / "checkpoints"
    tables: dict[str, Any] = {
        "delivery": {"mode": method},
        "checkpoint": {"folder": str(checkpoints), "every_events": 500, "retain": 2},
    }
    with subject(broker, folder, records, per_s=PER_S, tables=tables) as worker:
        progress(f"{method}: the disk is full")
        full = _broken(worker, "disk full", _full(folder / "disk"), least) if mounted else Trouble("disk full")
        progress(f"{method}: the folder is gone")
        gone = _broken(worker, "folder gone", _gone(checkpoints), least)
        progress(f"{method}: the newest snapshot is damaged")
        damaged = _damaged(worker, checkpoints)
        progress(f"{method}: the end, and the replay")
        settled = worker.judge(worker.settle())
    return [full, gone, damaged], settled


def _broken(worker: Subject, name: str, fault: contextlib.AbstractContextManager[None], least: int) -> Trouble:
    """Break it, look for the alert and for records that are served meanwhile, repair it, wait for a checkpoint."""
    before = worker.watch.latest().total(FAILURES)
    with fault:
        since_s = time.monotonic()
        alert = worker.sees(lambda each: each.total(FAILURES) > before, PATIENCE_S)
        if alert:
            worker.passes(alert.total(POSITION) + least, PATIENCE_S, alert.at_s)
        last = worker.watch.latest()
    repaired_s, saved_at = time.monotonic(), worker.watch.latest().total(SAVED_AT)
    saved = worker.sees(functools.partial(_newer, saved_at, repaired_s), PATIENCE_S)
    return Trouble(
        name,
        last.total(FAILURES) - before,
        last.total(POSITION) - alert.total(POSITION) if alert else 0.0,
        alert.at_s - since_s if alert else math.inf,
        saved.at_s - repaired_s if saved else math.inf,
    )


def _newer(saved_at: float, since_s: float, sample: Sample) -> bool:
    return sample.at_s > since_s and sample.total(SAVED_AT) > saved_at


@contextlib.contextmanager
def _full(disk: Path) -> Iterator[None]:
    """Not a byte is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


@contextlib.contextmanager
def _gone(checkpoints: Path) -> Iterator[None]:
    """The folder and all that is in it, for good; nor can it be made anew before the end."""
    lost = checkpoints.with_name("lost")
    checkpoints.rename(lost)
    checkpoints.write_bytes(b"")
    shutil.rmtree(lost)
    try:
        yield
    finally:
        checkpoints.unlink()


def _damaged(worker: Subject, checkpoints: Path) -> Trouble:
    """Kill it, turn one bit of what it saved last, and start it again."""
    saved = worker.watch.latest().total(SAVED_AT)
    worker.sees(lambda each: each.total(SAVED_AT) > saved, PATIENCE_S)  # there must be one before the newest
    worker.life.kill()
    far = worker.watch.furthest()
    *_, newest = sorted(checkpoints.glob("*/[0-9]*-*/arrays.safetensors"))
    _flip_a_bit(newest)
    since_s = time.monotonic()
    worker.start()
    works_s = worker.passes(far, PATIENCE_S, since_s)
    passed_over = worker.watch.latest().total(DAMAGED)
    if not passed_over:
        raise Broken(f"{worker.life.log}: {newest} was damaged, and {DAMAGED} is 0")
    return Trouble("newest snapshot damaged", passed_over, recover_s=works_s - since_s if works_s else math.inf)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _row(method: str, trouble: Trouble) -> Row:
    values = {"counted": trouble.counted, "served": trouble.served}
    return Row(f"{method}: {trouble.name}", values | {"alert_s": trouble.alert_s, "recover_s": trouble.recover_s})


def _bars(method: str, troubles: list[Trouble], least: int) -> Iterator[Bar]:
    *faults, damaged = troubles
    for fault in faults:
        yield Bar(f"{method}: {fault.name}: failures on /metrics", fault.counted, 1)
        yield Bar(f"{method}: {fault.name}: records served meanwhile", fault.served, least)
        yield Bar(f"{method}: {fault.name}: seconds from repair to a checkpoint", fault.recover_s, 30.0, False)
    yield Bar(f"{method}: {damaged.name}: passed over", damaged.counted, 1)
    yield Bar(f"{method}: {damaged.name}: seconds from start to work", damaged.recover_s, 60.0, False)
