"""Every Prometheus family that a worker or a serving endpoint exports: for the table of metrics, and for its tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric

from streamcl import readings
from streamcl.config import Config
from streamcl.telemetry import Telemetry
from streamcl.traffic import Traffic

NATS = {"log_loss", "base_log_loss", "sampled_log_loss", "sampled_base_log_loss", "drift_loss_mean"}
LABEL = {f"{base}{name}" for base in ("", "base_") for name in ("mae", "rmse", "baseline_rmse")}
_SUFFIXES = {
    "_timestamp_seconds": "Unix time, s",
    "_start_time_seconds": "Unix time, s",
    "_seconds_total": "s",
    "_seconds": "s",
    "_age_steps": "steps",
    "_bytes": "bytes",
    "_ratio": "ratio",
    "_total": "count",
    "_last_seen_s": "Unix time, s",
}


@dataclass(frozen=True)
class Family:
    """One family. `of`: who exports it. `labels` without `shard`, and without `role` that only a shadow has."""

    name: str
    kind: str
    labels: tuple[str, ...]
    of: str
    text: str

    @property
    def unit(self) -> str:
        """Base units; `1` is a number without one."""
        bare = self.name.removeprefix("streamcl_")
        if bare in NATS or bare.endswith("_log_loss"):
            return "nats"
        if bare.removeprefix("sampled_") in LABEL or bare.removeprefix("task_") in LABEL:
            return "of the label"
        for suffix, unit in _SUFFIXES.items():
            if self.name.endswith(suffix):
                return unit
        return "count" if "(count)" in self.text else "1"

    def samples(self) -> set[str]:
        """Names of its series."""
        tails = ("_bucket", "_sum", "_count") if self.kind == "histogram" else ("",)
        return {self.name + tail for tail in tails}


def families() -> list[Family]:
    """All, by name. Readings of the worker and of a replica come from the same words, so each says whose it is."""
    found = {family.name: family for family in (*_made(), *_told())}
    return [found[name] for name in sorted(found)]


def _made() -> Iterator[Family]:
    """What the two endpoints make themselves, as a first scrape shows it."""
    config = Config.parse({"name": "x", "events": {"url": "memory://x/y", "label": "y"}, "features": {"u": "numeric"}})
    with closing(Telemetry(config)) as worker:
        yield from (_of(metric, "worker") for metric in worker.registry.collect() if metric.samples)
    served = Traffic(dict)
    served.swapped(0)
    for metric in served.registry.collect():
        if metric.name.startswith("streamcl_serve_"):
            yield _of(metric, "endpoint")


def _of(metric: Metric, of: str) -> Family:
    labels = dict.fromkeys(label for sample in metric.samples for label in sample.labels if label != "le")
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    return Family(
        name, metric.type, tuple(labels), of if metric.name.startswith("streamcl") else "both", metric.documentation
    )


def _told() -> Iterator[Family]:
    """What parts tell about themselves."""
    endpoint = {f"streamcl_{readings.PARTS[key][0]}" for key in readings.OF_ENDPOINTS}
    for name, labels, text in readings.explained():
        yield Family(name, "gauge", labels, "endpoint" if name in endpoint else "worker", text)
