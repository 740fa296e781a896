"""How `bench recovery` starts the product, kills it, and knows in which phase of its life it died."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from kafka import KafkaAdminClient

from streamcl.bench import recovery_life
from streamcl.bench.brokers import Broker
from streamcl.bench.options import Options
from streamcl.bench.recovery_life import IMPORTED, MET
from streamcl.bench.report import Bar, progress
from streamcl.protocols import StreamclError

PHASES = ("start-up", "restore", "re-run", "running", "checkpoint", "commit")
METHODS = ("at_least_once", "exactly_once")
_KEEP = "keep-this-folder"
_STANDS = re.compile(r"(?:restored \S+|began afresh) at (\d+) records")


class Broken(StreamclError):
    """The product left, hung or said something that it must not; the text says where what it left behind lies."""


class Life:
    """One process of the product. stdout and stderr go to files in `folder`, under its number.

    Attributes:
        began_s, ended_s: Of the system's clock.
    """

    def __init__(self, folder: Path, number: int | str, *arguments: str, aim: str = "-") -> None:
        self.number, self.aim = number, aim
        self.log, self._out = folder / f"life-{number}.err", folder / f"life-{number}.out"
        program = [sys.executable, "-m", recovery_life.__name__, str(os.getpid()), aim, *arguments]
        self.began_s, self.ended_s = time.time(), 0.0
        with self.log.open("wb") as errors, self._out.open("wb") as output:
            self.process = subprocess.Popen(program, stdout=output, stderr=errors)  # noqa: S603 - our own program

    def kill(self) -> None:
        """As kill -9 does; returns when it is gone."""
        self.process.kill()
        self.process.wait()
        self.ended_s = time.time()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within it."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        self.ended_s = self.ended_s or time.time()
        return True

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def restored_at(self) -> int | None:
        """Records behind the snapshot that it began from; None while it has not come so far."""
        found = _STANDS.search(self.said())
        return int(found[1]) if found else None

    def standing(self) -> int:
        """How many snapshots it has loaded, or begun without one."""
        return len(_STANDS.findall(self.said()))

    def await_standing(self, timeout_s: float, shards: int = 1) -> bool:
        """Whether it has loaded so many snapshots before the time is over, or it ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.standing() >= shards:
                return True
            if self.wait(0.02):
                return False
        return False

    def answer(self, timeout_s: float) -> Any:
        """Wait for its clean end; the JSON that it prints.

        Raises:
            Broken: it hung, or left with an error.
        """
        if not self.wait(timeout_s):
            self.kill()
            raise Broken(f"{self.log}: did not end within {timeout_s:.0f} s")
        if self.process.returncode:
            raise Broken(f"{self.log}: left with {self.process.returncode}: {self.said()[-1500:]}")
        return orjson.loads(self._out.read_bytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


@dataclass(frozen=True, slots=True)
class Plan:
    """How a life is to end: at a share of the usual start-up, so long after it, or at a call (`aim`)."""

    startup_share: float | None = None
    running_s: float = 0.0
    aim: str = "-"


def plans(seed: int, kills: int, longest_s: float) -> Iterator[Plan]:
    """Three in ten die while they start, four while they run, three inside a checkpoint or a commit.

    Args:
        longest_s: No life runs longer; twice as long where a call is aimed at that may not come.
    """
    rng = np.random.default_rng([seed, 1])
    for _ in range(kills):
        kind = rng.random()
        if kind < 0.3:
            yield Plan(startup_share=float(rng.uniform(0.0, 1.3)))
        elif kind < 0.7:
            yield Plan(running_s=float(rng.uniform(0.0, longest_s)))
        else:
            yield Plan(running_s=2 * longest_s, aim=_aim(rng, commit=kind < 0.85))


def _aim(rng: np.random.Generator, commit: bool) -> str:
    call = "commit" if commit else str(rng.choice(["fsync", "fsync", "fsync", "rename"]))
    most = {"commit": 40, "fsync": 20, "rename": 2}[call]
    when = str(rng.choice(["before", "within", "behind"]))
    seconds = f":{rng.uniform(0, 0.004):.5f}" if when == "within" else ""
    return f"{call}:{rng.integers(0, most)}:{when}{seconds}"


def live_and_die(life: Life, plan: Plan, startup_s: float) -> float | None:
    """Let it live as planned, kill -9. Returns how long it took to load its snapshot (s), if it came so far.

    Raises:
        Broken: it left by itself.
    """
    took: float | None = None
    if plan.startup_share is not None:
        life.wait(plan.startup_share * startup_s)
    elif life.await_standing(60.0):
        took = time.time() - life.began_s
        life.wait(plan.running_s)
    if life.process.poll() is not None and life.process.returncode != -signal.SIGKILL:
        raise Broken(f"{life.log}: left with {life.process.returncode}: {life.said()[-1500:]}")
    life.kill()
    return took


def phase(life: Life, first_order_s: float | None) -> str:
    """In which phase it died; `first_order_s` is when it logged its first order, if it did."""
    said = life.said()
    if MET in said:
        return "commit" if f"{MET}commit" in said else "checkpoint"
    if first_order_s is not None and first_order_s < life.ended_s:
        return "running"
    if _STANDS.search(said):
        return "re-run"
    return "restore" if IMPORTED in said else "start-up"


@contextlib.contextmanager
def scratch(what: str) -> Iterator[Path]:
    """A folder that goes when all went well; after an error, and when `keep` has marked it, it stays and is named."""
    folder = Path(tempfile.mkdtemp(prefix=f"streamcl-recovery-{what}-"))
    try:
        yield folder
    except StreamclError:
        keep(folder)
        raise
    finally:
        if (folder / _KEEP).exists():
            progress(f"what was left behind stays in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path) -> None:
    """What lies there is evidence."""
    (folder / _KEEP).touch()


_AMOUNTS = (": kills", ": events", ": troubles", ": minutes")


def judge(folder: Path, bars: Iterable[Bar]) -> None:
    """Say at once which bars are missed, and keep the evidence; too small an amount alone leaves none."""
    missed = [bar for bar in bars if not (bar.ok or math.isnan(bar.value) or bar.name.endswith(_AMOUNTS))]
    for bar in missed:
        progress(f"missed: {bar.name}: {bar.value}, limit {bar.limit}")
    if missed:
        keep(folder)


@contextlib.contextmanager
def topics(broker: Broker, prefix: str, partitions: Mapping[str, int], **limits: str) -> Iterator[dict[str, str]]:
    """New topics by role; on a broker that is not ours all that begins with `prefix` is gone afterwards.

    Args:
        partitions: By role.
        limits: What the topics are configured with besides; a dot is written as `_`.
    """
    names = {role: f"{prefix}-{role.replace('_', '-')}" for role in partitions}
    configs = {"retention.ms": "-1"} | {name.replace("_", "."): value for name, value in limits.items()}
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    try:
        wanted = {names[role]: {"num_partitions": n, "configs": configs} for role, n in partitions.items()}
        admin.create_topics(wanted, wait_for_metadata=True)
        yield names
        if broker.kind == "given":
            admin.delete_topics([name for name in admin.list_topics() if name.startswith(prefix)])
    finally:
        admin.close()


def write_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The settings as a TOML file, one inline value a line."""
    path = folder / "config.toml"
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items() if value is not None]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    """JSON's strings and numbers are TOML's."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    return orjson.dumps(value).decode()


def methods(options: Options) -> tuple[str, ...]:
    """The one asked for, else both."""
    return METHODS if options.method is None else (options.choice("method", METHODS, METHODS[0]),)


def worst(bars: Iterable[Bar]) -> list[Bar]:
    """One bar a name: of several seeds the one that came off worst."""
    found: dict[str, Bar] = {}
    for bar in bars:
        held = found.setdefault(bar.name, bar)
        worse = bar.value < held.value if bar.at_least else bar.value > held.value
        if worse or math.isnan(bar.value):
            found[bar.name] = bar
    return list(found.values())
