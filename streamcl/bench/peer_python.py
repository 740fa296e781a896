"""Peers in a Python of their own, for their dependencies and ours do not go together. `make peers` makes one."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from streamcl.protocols import StreamclError

PYTHON = "STREAMCL_PEERS_PYTHON"
TO_GET = f"`make peers`, or {PYTHON}=python"


class PeerError(StreamclError):
    """A peer did not come to its end; the text is what it said last."""


def interpreter() -> Path | None:
    """What `STREAMCL_PEERS_PYTHON` names, or that of `.venv-peers` here; None where there is none."""
    found = Path(os.environ.get(PYTHON) or ".venv-peers/bin/python").absolute()
    return found if found.is_file() else None


def versions(*packages: str) -> dict[str, str]:
    """Of packages that it holds; empty where it lacks one of them, or there is none."""
    python = interpreter()
    if python is None:
        return {}
    line = "import json, sys, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", line, *packages], capture_output=True, check=False)  # noqa: S603 - our own line
    found: dict[str, str] = {} if done.returncode else json.loads(done.stdout)
    return found


def answer(script: str, *arguments: object) -> dict[str, Any]:
    """The last JSON object that a script beside this file prints. Raises PeerError."""
    python = interpreter()
    if python is None:
        raise PeerError(f"{script}: no Python to run it: {TO_GET}")
    command = [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="streamcl-peer-") as folder:  # they leave their state where they run
        done = subprocess.run(  # noqa: S603 - our own script
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=600
        )
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not said:
        raise PeerError(f"{script} {' '.join(command[2:])} left with {done.returncode}: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(said[-1])
    return found
