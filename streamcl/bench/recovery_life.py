"""One life of a `streamcl` process, for `bench recovery`: it dies with the bench, and where it is told to.

    python -m streamcl.bench.recovery_life PARENT_PID AIM ARGUMENTS...

`AIM` is `-`, or `CALL:NTH:WHEN[:SECONDS]`: at the NTH call of CALL (`fsync`, `rename`, `commit`) the process kills
itself `before` it, `behind` it, or `within` it, SECONDS after it began. The product is as it ever is: what is called
is replaced in the libraries below it. Written to stderr: `imported`, once Python has all it needs, and the aim when it
is met.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from kafka import KafkaProducer

IMPORTED, MET = "life: imported", "life: killed at "
_PLACES: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "commit": (KafkaProducer, "commit_transaction"),
}
_PR_SET_PDEATHSIG = 1


def aim(text: str) -> None:
    """Replace the call so that its `nth` one is deadly."""
    call, nth, when, *seconds = text.split(":")
    owner, name = _PLACES[call]
    original: Callable[..., Any] = getattr(owner, name)
    numbers = itertools.count()

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) != int(nth):
            return original(*args, **kwargs)
        if when == "before":
            _die(text)
        if when == "within":
            threading.Thread(target=_die, args=(text, float(seconds[0])), daemon=True).start()
        result = original(*args, **kwargs)
        if when == "within":
            time.sleep(float(seconds[0]))
        _die(text)
        return result

    setattr(owner, name, deadly)


def _die(text: str, after_s: float = 0.0) -> None:
    time.sleep(after_s)
    os.write(2, f"{MET}{text}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def die_with(parent: int) -> None:
    """Die when the process `parent`, which started this one, is gone. Linux only; elsewhere Ctrl-C must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the bench is gone")


def main() -> None:
    parent, where, *arguments = sys.argv[1:]
    die_with(int(parent))
    if where != "-":
        aim(where)
    os.write(2, f"{IMPORTED}\n".encode())
    sys.argv = ["streamcl", *arguments]
    runpy.run_module("streamcl.cli", run_name="__main__")


if __name__ == "__main__":
    main()
