"""`bench plasticity`: does a net that learns for ever stay able to learn, and what does that cost?"""

from __future__ import annotations

from collections.abc import Callable

from streamcl.bench import plasticity_images, plasticity_overhead, plasticity_regression
from streamcl.bench.options import Options
from streamcl.bench.report import Report

READS = {"data", "task", "method", "preset", "seeds", "events"}

TASKS: dict[str, Callable[[Options], Report]] = {
    "slowly-changing-regression": plasticity_regression.run,
    "permuted-mnist": plasticity_images.permuted,
    "label-permuted": plasticity_images.label_permuted,
    "overhead": plasticity_overhead.run,
}
UNREAD: dict[str, set[str]] = {
    "slowly-changing-regression": {"data", "preset"},
    "permuted-mnist": {"events"},
    "label-permuted": {"events", "preset"},
    "overhead": {"data", "events", "method", "preset", "seeds"},
}
"""Options that a task has no use for."""


def run(options: Options) -> Report:
    """Raises OptionError for an unknown task, or an option that it would ignore."""
    task = options.choice("task", TASKS, "slowly-changing-regression")
    options.require_read_by(f"plasticity --task {task}", READS - UNREAD[task])
    return TASKS[task](options)
