"""What a serving endpoint tells Prometheus: its requests, and the model that answers them.

Counts are plain numbers that a scrape reads, for a counter with a lock would cost more than some answers do.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import prometheus_client as prometheus
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streamcl import __version__
from streamcl.readings import Reported, Shards

BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STATUSES = (200, 400, 401, 404, 405, 408, 413, 415, 431, 500, 503)
CAUSES = ("queue", "connections")
"""What was too full for a request that was shed."""


class Traffic(Collector):
    """Of one endpoint; its methods are called on one thread, scrapes may come from another.

    Args:
        readings: What the present model says about itself, by key (see `readings`); empty without a model.
    """

    def __init__(self, readings: Callable[[], Mapping[str, float]]) -> None:
        self.readings = readings
        self.answers = Counter(dict.fromkeys(STATUSES, 0))
        self.shed = Counter(dict.fromkeys(CAUSES, 0))
        self.instances = 0
        self.passes = 0
        self.in_flight = 0
        self.queued = 0
        self.swaps = 0
        self.swapped_s = 0.0  # of the monotonic clock
        self.synced_records = 0
        self._times = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0
        self.registry = prometheus.CollectorRegistry()
        self.registry.register(self)
        prometheus.ProcessCollector(registry=self.registry)

    def answered(self, status: int, seconds: float) -> None:
        """`seconds` from the whole request to its answer."""
        self.answers[status] += 1
        self._times[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds += seconds

    def swapped(self, records: int) -> None:
        """Another model answers from now on; it has seen so many records more than the one before."""
        self.swaps += 1
        self.swapped_s = time.monotonic()
        self.synced_records = records

    def collect(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("streamcl_serve_requests", "Requests answered, by HTTP status.", labels=["code"])
        for status, count in sorted(self.answers.items()):
            answers.add_metric([str(status)], count)
        shed = CounterMetricFamily("streamcl_serve_shed", "Requests refused because of load.", labels=["cause"])
        for cause, count in sorted(self.shed.items()):
            shed.add_metric([cause], count)
        yield from (answers, shed, self._histogram())
        yield CounterMetricFamily("streamcl_serve_instances", "Instances scored (count).", value=self.instances)
        yield CounterMetricFamily("streamcl_serve_passes", "Passes of the model that scored them.", value=self.passes)
        yield CounterMetricFamily("streamcl_serve_swaps", "Models taken in place of others.", value=self.swaps)
        gauges: dict[str, tuple[str, float]] = {
            "in_flight": ("Requests taken in and not yet answered (count).", self.in_flight),
            "queued_instances": ("Instances that wait to be scored (count).", self.queued),
            "ready": ("1 when there is a model, else 0.", int(self.swapped_s > 0)),
        }
        if self.swapped_s:
            age_s = time.monotonic() - self.swapped_s
            gauges["swap_age_seconds"] = ("Time since the present model took over.", age_s)
            gauges["sync_records"] = ("Records between this model and the one before (count).", self.synced_records)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"streamcl_serve_{name}", text, value=value)
        told = Shards(labelled=False)
        told.by_index[0] = Reported()
        told.by_index[0].readings = self.readings()
        yield from (family for family in told.collect() if family.samples)
        build = GaugeMetricFamily("streamcl_build_info", "Versions; always 1.", labels=["version", "python", "torch"])
        build.add_metric([__version__, platform.python_version(), torch.__version__], 1)
        yield build

    def _histogram(self) -> HistogramMetricFamily:
        edges = [*map(str, BUCKETS_S), "+Inf"]
        buckets = list(zip(edges, accumulate(self._times), strict=True))
        text = "Time from a whole request to its answer; what waits unread in a socket has not come yet."
        return HistogramMetricFamily("streamcl_serve_request_seconds", text, buckets, sum_value=self._seconds)

    def text(self) -> bytes:
        """What a scrape reads."""
        return prometheus.generate_latest(self.registry)
