"""Whatever dies: a worker is killed, starved, cut off and poisoned, and what it has learned and said is counted.

One task a kind of trouble. Each starts real processes of the product on a real broker, and is judged by
`recovery_verifier`, which shares no code with the worker, and by one undisturbed `streamcl replay`.
"""

from __future__ import annotations

import time
from dataclasses import replace

from streamcl.bench import (
    recovery_broker,
    recovery_disk,
    recovery_kill,
    recovery_poison,
    recovery_shards,
    recovery_soak,
)
from streamcl.bench.options import Options
from streamcl.bench.recovery_chaos import Broken
from streamcl.bench.report import Bar, Report, progress

READS = frozenset({"task", "method", "seeds", "via", "kills", "events", "minutes"})
TASKS = {
    "kill": (recovery_kill.run, {"seeds", "via", "kills", "events"}),
    "shards": (recovery_shards.run, {"seeds", "via", "kills", "events"}),
    "broker": (recovery_broker.run, set[str]()),  # it starts three of its own
    "disk": (recovery_disk.run, {"via"}),
    "poison": (recovery_poison.run, {"seeds", "via", "events"}),
    "soak": (recovery_soak.run, {"via", "minutes"}),
}
"""What runs a task, and which options it heeds besides `--task` and `--method`."""


def run(options: Options) -> Report:
    """`--via kafka://host:port` takes a broker that runs already; else Apache Kafka, without Java the embedded one.

    A worker that leaves by itself, or hangs, ends the task: that is a bar that was missed, and its text a note.
    """
    began, task = time.perf_counter(), options.choice("task", TASKS, "kill")
    runs, reads = TASKS[task]
    options.require_read_by(f"recovery --task {task}", {"task", "method", *reads})
    try:
        report = runs(options)
    except Broken as broken:
        progress(str(broken))
        report = Report("recovery", {"task": task}, [0], time.perf_counter() - began, [], notes=[str(broken)])
        return replace(report, bars=[_broken_off(1)])
    return replace(report, bars=[_broken_off(0), *report.bars])


def _broken_off(count: int) -> Bar:
    return Bar("workers that left by themselves, or hung", count, 0, False)
