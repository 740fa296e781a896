"""Avalanche's one-pass experience replay on the very same examples, in a Python environment of its own."""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.bench.continual_course import Course
from streamcl.bench.continual_run import Looks, Run, held_out_figures, seen
from streamcl.bench.options import OptionError
from streamcl.bench.peer_python import PYTHON, interpreter
from streamcl.bench.quality import Floats
from streamcl.bench.report import progress

AVALANCHE = {"avalanche er": (1, 0.05), "avalanche er, batch 10": (10, 0.1)}
"""Live examples of a step, and the learning rate, by name."""
MISSING = f"avalanche: {PYTHON} names no Python, and there is no .venv-peers here"
SCRIPT = Path(__file__).with_name("continual_avalanche_peer.py")


def avalanche_er(name: str, course: Course, seed: int) -> Run:
    """Naive training with its ReplayPlugin, on a stream of so many examples at a time; ten are replayed beside them.

    All rows of a step weigh alike, where the plain loop has the mean of the live + the mean of the replayed rows.

    Raises OptionError where there is no such environment, or it fails; the text says what it said.
    """
    python = interpreter()
    if python is None:
        raise OptionError(MISSING)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "course.npz"
        batch, learning_rate = AVALANCHE[name]
        np.savez(place, **_arrays(course), seed=seed, batch=batch, learning_rate=learning_rate)
        found = subprocess.run([python, SCRIPT, place], capture_output=True, text=True, check=False)  # noqa: S603
    if found.returncode:
        raise OptionError(f"{name}: {found.stderr.strip()[-500:]}")
    answer = json.loads(found.stdout.splitlines()[-1])
    progress(f"avalanche {answer['version']}: {answer['seconds']:.0f} s")
    return _run(course, np.array(answer["accuracy"]), answer["cpu_s"])


def _arrays(course: Course) -> dict[str, Any]:
    held_out = course.held_out
    return {
        "x": course.rows.dense,
        "y": course.rows.labels.astype(np.int64),
        "segments": course.segments,
        "test_x": np.concatenate([rows.dense for rows in held_out]),
        "test_y": np.concatenate([rows.labels for rows in held_out]).astype(np.int64),
        "test_segments": np.repeat(np.arange(len(held_out)), [len(rows) for rows in held_out]),
        "hidden": np.array(course.settings["model"]["hidden"]),
        "capacity": course.memory["capacity"],
    }


def _run(course: Course, accuracy: Floats, cpu_s: float) -> Run:
    """Of accuracies (1 + T, T): before anything, and after each task."""
    ends = np.flatnonzero(np.diff(course.segments, append=-1)) + 1
    looks = Looks.of(course, accuracy[0], ends.tolist(), list(accuracy[1:]))
    figures = held_out_figures(looks, [len(rows) for rows in course.held_out])
    unseen = dict.fromkeys(("min_acc", "wc_acc", "stability_gap"), math.nan)  # nobody looks between two ends
    return Run(figures | unseen | {"ms_per_event": 1e3 * cpu_s / len(course.rows)}, seen(looks))
