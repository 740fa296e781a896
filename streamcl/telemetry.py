"""Turns to Prometheus, and health: `/metrics`, `/livez` (also `/healthz`) and `/readyz` beside the loop, on a thread.

Names begin with `streamcl_`, units are base units, counters end in `_total`; no key, user or id is ever a label. What
may be incremented exists at 0 from the start, or the first increase would go unseen.
"""

from __future__ import annotations

import contextlib
import platform
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import prometheus_client as prometheus
import torch
import uvicorn
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streamcl import __version__
from streamcl.config import Config
from streamcl.protocols import StreamclError
from streamcl.records import Stream, Turn

FATES = (
    "predicted",
    "learned",
    "inline",
    "joined",
    "expired",
    "dropped",
    "late",
    "duplicate",
    "orphaned",
    "overflowed",
    "unlabelled",
    "quarantined",
    "dead_letter",
    "skipped",
)
REASONS = (
    "undecodable",
    "schema",
    "non_finite",
    "unknown_feature",
    "too_large",
    "future",
    "duplicate_ticket",
    "quarantined_label",
)
QUALITY = {
    "log_loss": "Mean log-loss of what was served, in nats.",
    "ne": "Log-loss divided by the entropy of the base rate; below 1 is better than a constant.",
    "calibration": "Sum of scores divided by sum of labels; 1 is calibrated.",
    "accuracy": "Share of labels that the score was on the right side of.",
    "no_change_accuracy": "Accuracy of predicting the label before; what a model has to beat.",
    "base_rate": "Share of positive labels.",
    "auc": "Area under the ROC curve; over the whole stream to within auc_bound.",
    "mae": "Mean absolute error, in the label's unit.",
    "rmse": "Root mean squared error, in the label's unit.",
    "baseline_rmse": "Root mean squared error of predicting the mean so far; what a model has to beat.",
}
"""Readings that come twice: over the whole stream, and over the recent window under a name that ends in `_window`."""
PARTS = {
    "tickets": ("tickets", "Events that wait for their label (count)."),
    "orphans": ("waiting_labels", "Labels that wait for their event (count)."),
    "watermark_s": ("watermark_timestamp_seconds", "Event time before which nothing more is expected."),
    "replay_rows": ("replay_rows", "Examples in the replay memory (count)."),
    "weights_version": ("weights_version", "Learning steps behind the current weights (count)."),
    "examples": ("scored_examples", "Labelled examples in the metrics over the whole stream (count)."),
    "unscored": ("unscored_examples", "Labelled examples whose loss was not finite (count)."),
    "auc_bound": ("auc_bound", "Largest error of auc over the whole stream."),
    "suppressed": ("drift_suppressed", "Alarms within the refractory period since the start of the stream (count)."),
    "improvements": ("drift_improvements", "Falls of the mean loss since the start of the stream (count)."),
    "restarts": ("drift_restarts", "Detectors begun afresh after a change of River's version (count)."),
    "sink_inflight_records": ("producer_inflight_records", "Predictions not yet acknowledged (count)."),
    "sink_inflight_bytes": ("producer_inflight_bytes", "The same in bytes."),
    "sink_rebuilds": ("producer_rebuilds", "Producers replaced since the shard was built (count)."),
    "sink_rejections": (
        "producer_rejections",
        "Predictions that the broker refused since then (count).",
    ),
    "checkpoints_deferred": ("checkpoints_deferred", "Put off, the one before being still written (count)."),
    "source_retries": ("poll_retries", "Polls that failed, brokers being away (count)."),
    "source_away": ("brokers_away", "1 while no broker of the inputs is connected, else 0."),
    "source_commit_failures": ("commit_failures", "Times that progress could not be shown to lag tools (count)."),
    "mean": ("drift_loss_mean", "Mean loss since the last change that the detector saw."),
}
CAUSES = ("unavailable", "fenced")
SAVE_FAULTS = ("disk_full", "denied", "read_only", "io", "other")
"""Why a checkpoint could not be written."""
LIVE_S = 60.0
_TURN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SAVE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

# Of no use to a query, and as many series again.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]


class TelemetryError(StreamclError):
    """The address of `[telemetry]` can't be listened on."""


class Reported:
    """What one shard's worker computed, as told last."""

    def __init__(self) -> None:
        self.position: Mapping[Stream, int] = {}
        self.lag: Mapping[Stream, int] = {}
        self.readings: Mapping[str, float] = {}


class Shards(Collector):
    """What others computed, by shard: a scrape sees whole tellings, and no series of a value that is gone.

    Args:
        labelled: Readings carry a label `shard`: there are several.
    """

    def __init__(self, labelled: bool) -> None:
        self.labels = ["shard"] if labelled else []
        self.by_index: dict[int, Reported] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        told = dict(self.by_index)
        yield _by_stream("position", "Offset that is read next.", [each.position for each in told.values()])
        yield _by_stream("lag_records", "Records that wait (count); at least 0.", [each.lag for each in told.values()])
        left = {index: dict(each.readings) for index, each in told.items()}
        for readings in left.values():
            for told_already in ("lag_records", "alarms"):  # by partition, and as a counter
                readings.pop(told_already, None)
        yield from self._quality(left)
        for key in dict.fromkeys(key for readings in left.values() for key in readings):
            name, text = PARTS.get(key, (key, "Reported by a part of the worker."))
            family = GaugeMetricFamily(f"streamcl_{name}", text, labels=self.labels)
            for index, readings in left.items():
                if key in readings:
                    family.add_metric(self.values(index), readings[key])
            yield family

    def values(self, index: int) -> list[str]:
        return [str(index)] if self.labels else []

    def _quality(self, left: Mapping[int, dict[str, float]]) -> Iterator[GaugeMetricFamily]:
        """Takes out of `left` what has a window."""
        for name, text in QUALITY.items():
            family = GaugeMetricFamily(f"streamcl_{name}", text, labels=["window", *self.labels])
            for index, readings in left.items():
                for window, key in (("whole", name), ("recent", f"{name}_window")):
                    if key in readings:
                        family.add_metric([window, *self.values(index)], readings.pop(key))
            yield family


def _by_stream(name: str, text: str, told: Sequence[Mapping[Stream, int]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"streamcl_{name}", text, labels=["input", "partition"])
    for stream, value in [item for values in told for item in values.items()]:
        family.add_metric([stream.input, str(stream.partition)], max(0, value))
    return family


class Telemetry:
    """Watches the shards of one process from outside. Methods may be called from the loop's thread while others scrape.

    Args:
        config: `[telemetry]` says where to listen. With `shard.count` > 1 gauges of single shards have a label `shard`.

    Raises:
        TelemetryError: from `start`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.registry = prometheus.CollectorRegistry()
        self._shards = Shards(config.shard.count > 1)
        self.registry.register(self._shards)
        prometheus.ProcessCollector(registry=self.registry)
        self._make_flow()
        self._make_checkpoints()
        self._reasons: dict[int | None, str] = {None: "starting"}
        self._beat_s = time.monotonic()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def _make_flow(self) -> None:
        self._consumed = self._counter("events_consumed_total", "Records taken, of every input.")
        self._events = self._counter("events_total", "Events and labels by what became of them.", fate=FATES)
        self._dead_letters = self._counter("dead_letters_total", "Records that could not be used.", reason=REASONS)
        self._drift = self._counter("drift_alarms_total", "Drift signals by their source.", source=("loss",))
        self._turn_seconds = prometheus.Histogram(
            "streamcl_turn_seconds", "Time of a turn that had records.", buckets=_TURN_BUCKETS, registry=self.registry
        )
        self._recoveries = self._counter(
            "recoveries_total", "Shards dropped in order to be recovered, here or elsewhere, by cause.", cause=CAUSES
        )
        self._rebalances = self._gauge("group_rebalances", "Times that the group gave or took shards (count).")
        self._ready = self._gauge("ready", "1 when every shard here has caught up and hears its brokers, else 0.")
        build = self._gauge("build_info", "Versions; always 1.", "version", "python", "torch")
        build.labels(__version__, platform.python_version(), torch.__version__).set(1)

    def _make_checkpoints(self) -> None:
        self._save_seconds = prometheus.Histogram(
            "streamcl_checkpoint_seconds", "Time of a save.", buckets=_SAVE_BUCKETS, registry=self.registry
        )
        self._save_bytes = self._gauge("checkpoint_bytes", "Size of the last checkpoint.", *self._shards.labels)
        self._saved_at = self._gauge(
            "checkpoint_last_success_timestamp_seconds",
            "When the last save ended; before the first, when this process began to run the shard.",
            *self._shards.labels,
        )
        if not self._shards.labels:
            self._saved_at.set_to_current_time()
        self._restores = self._counter(
            "checkpoint_restores_total",
            "Starts: from the newest checkpoint (ok), from one before a damaged one (damaged), without any (none).",
            result=("ok", "damaged", "none"),
        )
        self._failures = self._counter(
            "checkpoint_failures_total", "Checkpoints that could not be written; the worker goes on.", cause=SAVE_FAULTS
        )
        self._damaged = self._counter("checkpoint_damaged_total", "Damaged checkpoints that were passed over.")

    def _counter(self, name: str, text: str, **labels: tuple[str, ...]) -> prometheus.Counter:
        counter = prometheus.Counter(f"streamcl_{name}", text, list(labels), registry=self.registry)
        for values in labels.values():
            for value in values:
                counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str, *labels: str) -> prometheus.Gauge:
        return prometheus.Gauge(f"streamcl_{name}", text, labels, registry=self.registry)

    def observe(
        self, turn: Turn, *, seconds: float, lag: Mapping[Stream, int], readings: Mapping[str, float], shard: int = 0
    ) -> None:
        """Take a turn in, an empty one too. `lag` and `readings` that are empty leave what was told before."""
        self.beat()
        if turn.records:
            self._turn_seconds.observe(seconds)
        self._consumed.inc(turn.records)
        for fate, count in turn.counts.items():
            self._events.labels(fate).inc(count)
        for letter in turn.dead_letters:
            self._dead_letters.labels(letter.reason).inc()
        for signal in turn.signals:
            if signal.kind == "drift":
                self._drift.labels(signal.source).inc()
        reported = self._shards.by_index.setdefault(shard, Reported())
        reported.position = turn.position
        reported.lag = lag or reported.lag
        reported.readings = readings or reported.readings

    def beat(self) -> None:
        """The loop is alive; `observe` says so by itself."""
        self._beat_s = time.monotonic()

    def checkpointed(self, seconds: float, size_bytes: int, shard: int = 0) -> None:
        """A checkpoint has been written."""
        self.beat()
        self._save_seconds.observe(seconds)
        self._of(self._save_bytes, shard).set(size_bytes)
        self._of(self._saved_at, shard).set_to_current_time()

    def checkpoint_failed(self, cause: str, count: int = 1) -> None:
        """A checkpoint could not be written, for one of `SAVE_FAULTS`."""
        self._failures.labels(cause).inc(count)

    def restored(self, damaged: int, result: str, shard: int = 0) -> None:
        """The worker stands where its shard stood (`ok`) or at a beginning (`none`); `damaged` were passed over."""
        self._damaged.inc(damaged)
        self._restores.labels("damaged" if damaged and result == "ok" else result).inc()
        if self._shards.labels and shard not in self._shards.by_index:
            self._of(self._saved_at, shard).set_to_current_time()
        self._shards.by_index.setdefault(shard, Reported())

    def recovers(self, cause: str) -> None:
        """A shard has been dropped: `unavailable`, to be built anew here; `fenced`, because another worker has it."""
        self._recoveries.labels(cause).inc()

    def rebalanced(self, count: int) -> None:
        """How often the group has given shards to this process or taken them, since it joined."""
        self._rebalances.set(count)

    def left(self, shard: int) -> None:
        """A shard is not in this process any more: its series go with it."""
        self._shards.by_index.pop(shard, None)
        self._reasons.pop(shard, None)
        for gauge in (self._save_bytes, self._saved_at) if self._shards.labels else ():
            with contextlib.suppress(KeyError):
                gauge.remove(str(shard))

    def _of(self, gauge: prometheus.Gauge, shard: int) -> prometheus.Gauge:
        return gauge.labels(str(shard)) if self._shards.labels else gauge

    def ready(self, flag: bool, reason: str = "", shard: int | None = None) -> None:
        """What `/readyz` says from now on; `reason` is for people who find it unready. None: the process."""
        self._reasons[shard] = "" if flag else reason or "not ready"
        self._ready.set(not any(self._reasons.values()))

    def why(self) -> str:
        """Why the process is not ready; "" when it is."""
        labelled = bool(self._shards.labels)
        told = {shard: reason for shard, reason in dict(self._reasons).items() if reason}
        return "; ".join(r if s is None or not labelled else f"shard {s}: {r}" for s, r in told.items())

    def start(self) -> str | None:
        """Listen on `telemetry.host` and `telemetry.port`; returns the URL, or None when the port is 0."""
        place = self.config.telemetry
        if place.port == 0:
            return None
        try:
            listener = socket.create_server((place.host, place.port), family=_family(place.host))
        except OSError as error:
            raise TelemetryError(f"telemetry: can't listen on {place.host}:{place.port}: {error.strerror}") from error
        self._server = uvicorn.Server(uvicorn.Config(self.app(), log_level="warning", access_log=False, lifespan="off"))
        # A daemon: a scrape that hangs must not keep a worker from leaving.
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="telemetry", daemon=True)
        self._thread.start()
        return f"http://{place.host}:{place.port}"

    def close(self) -> None:
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(timeout=5.0)

    def app(self) -> Starlette:
        """The endpoints, for a server of one's own."""
        routes = [("/metrics", self._serve_metrics), ("/readyz", self._serve_ready)]
        routes += [("/livez", self._serve_live), ("/healthz", self._serve_live)]
        return Starlette(routes=[Route(path, endpoint) for path, endpoint in routes])

    def _serve_metrics(self, _: Request) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    def _serve_ready(self, _: Request) -> Response:
        return _health(self.why())

    def _serve_live(self, _: Request) -> Response:
        still_s = time.monotonic() - self._beat_s
        return _health(f"the loop has not turned for {still_s:.0f} s" if still_s > LIVE_S else "")


def _health(reason: str) -> Response:
    return JSONResponse({"ok": not reason, "reason": reason}, status_code=503 if reason else 200)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
