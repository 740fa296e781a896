"""What a run has come to, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from streamcl.config import Config
from streamcl.state import digest
from streamcl.worker import Worker

Ended = Mapping[Worker, Mapping[str, float]]
"""Workers that have ended, and what they said about themselves last."""


def of_shard(worker: Worker, readings: Mapping[str, float]) -> dict[str, Any]:
    """One shard; the state's digest proves that two runs are one."""
    progress = worker.progress.state_dict()
    return {
        "name": worker.config.name,
        "shard": worker.config.shard.index,
        "records": progress["records"],
        "position": progress["position"],
        "learned_hash": progress["learned"],
        "counts": worker.counts.state_dict(),
        "metrics": dict(readings),
        "state_digest": digest(worker.state_dict()),
    }


def totals(config: Config, workers: Ended) -> dict[str, Any]:
    """Sums that do not depend on how the inputs were cut into shards."""
    learned = sum(worker.progress.learned for worker in workers) % (1 << 128)
    return {
        "name": config.name,
        "records": sum(worker.progress.records for worker in workers),
        "counts": dict(sorted(sum((worker.counts for worker in workers), Counter()).items())),
        "learned_hash": f"{learned:032x}",
    }


def table(result: Mapping[str, Any]) -> Table:
    """Of one shard."""
    title = f"{result['name']}, shard {result['shard']}: {result['records']} records"
    made = Table("what", "value", title=title, title_justify="left")
    for name, value in {**result["counts"], **result["metrics"]}.items():
        made.add_row(escape(name), f"{value:.6g}")  # a segment's value may look like markup
    made.add_row("state digest", str(result["state_digest"]))
    return made
