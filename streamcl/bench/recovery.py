"""Whatever dies: a worker is killed, starved, cut off and poisoned, and what it has learned and said is counted.

One task a kind of trouble. Each starts real processes of the product on a real broker, and is judged by
`recovery_verifier`, which shares no code with the worker, and by one undisturbed `streamcl replay`.
"""

from __future__ import annotations

from streamcl.bench import (
    recovery_broker,
    recovery_disk,
    recovery_kill,
    recovery_poison,
    recovery_shards,
    recovery_soak,
)
from streamcl.bench.options import Options
from streamcl.bench.report import Report

READS = frozenset({"task", "method", "seeds", "via", "kills", "events", "minutes"})
TASKS = {
    "kill": recovery_kill.run,
    "shards": recovery_shards.run,
    "broker": recovery_broker.run,
    "disk": recovery_disk.run,
    "poison": recovery_poison.run,
    "soak": recovery_soak.run,
}


def run(options: Options) -> Report:
    """`--via kafka://host:port` takes a broker that runs already; else Apache Kafka, without Java the embedded one."""
    return TASKS[options.choice("task", TASKS, "kill")](options)
