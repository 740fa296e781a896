"""`bench plasticity`: does a net that learns for ever stay able to learn, and what does that cost?"""

from __future__ import annotations

from collections.abc import Callable

from streamcl.bench import plasticity_clicks, plasticity_images, plasticity_overhead, plasticity_regression
from streamcl.bench.options import Options
from streamcl.bench.report import Report

TASKS: dict[str, tuple[Callable[[Options], Report], set[str]]] = {
    "slowly-changing-regression": (plasticity_regression.run, {"method", "seeds", "events"}),
    "permuted-mnist": (plasticity_images.permuted, {"data", "method", "preset", "seeds"}),
    "label-permuted": (plasticity_images.label_permuted, {"data", "method", "seeds"}),
    "drifting-ctr": (plasticity_clicks.run, {"stream", "method", "seeds", "events"}),
    "overhead": (plasticity_overhead.run, set()),
}
"""By name: what is run, and the options that it reads beside `task`."""

READS = {"task"}.union(*(reads for _, reads in TASKS.values()))


def run(options: Options) -> Report:
    """Raises OptionError for an unknown task, or an option that it would ignore."""
    task = options.choice("task", TASKS, "slowly-changing-regression")
    measure, reads = TASKS[task]
    options.require_read_by(f"plasticity --task {task}", {"task", *reads})
    return measure(options)
