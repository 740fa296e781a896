"""Turns to Prometheus, health, the status page: `/metrics`, `/livez` (also `/healthz`), `/readyz`, `/`; on a thread.

Names begin with `streamcl_`, units are base units, counters end in `_total`; no key, user or id is ever a label, and of
the values of a field no more than `metrics.max_segments`, where `metrics.segments` asks for them. What may be
incremented exists at 0 from the start, or the first increase would go unseen.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shutil
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import prometheus_client as prometheus
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from streamcl import __version__
from streamcl.config import Config
from streamcl.memory_limit import memory_limit_bytes
from streamcl.progress import STAGES
from streamcl.protocols import StreamclError
from streamcl.readings import Reported, Shards, Tally
from streamcl.records import Fate, Stream, Turn
from streamcl.status import Status

FATES = (
    "predicted",
    "learned",
    "inline",
    "joined",
    "expired",
    "provisional",
    "not_drawn",
    "dropped",
    "late",
    "late_joined",
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
    "other",
)
"""Why a record became a dead letter; `other` is whatever a codec from elsewhere says."""
CAUSES = ("unavailable", "fenced")
SAVE_FAULTS = ("disk_full", "denied", "read_only", "io", "other")
"""Why a checkpoint could not be written."""
LIVE_S = 60.0
_TURN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_DELAY_BUCKETS = (1.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 259_200.0, 604_800.0, 2_592_000.0)
_STAGE_BUCKETS = (0.0001, 0.0005, *_TURN_BUCKETS)
_SCORE_BUCKETS = (0.001, 0.003, 0.01, 0.03, *(step / 20 for step in range(1, 20)), 0.97, 0.99)
MOST_SOURCES = 16
"""Of drift signals that are told apart; those that come later are `other`."""
SCORES_PER_TURN = 16
"""Served scores that the histogram takes of a turn: all of them would cost more than the rest of this module."""
_SAVE_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

# Of no use to a query, and as many series again.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]


class TelemetryError(StreamclError):
    """The address of `[telemetry]` can't be listened on."""


class Telemetry:
    """Watches the shards of one process from outside. Methods may be called from the loop's thread while others scrape.

    Args:
        config: `[telemetry]` says where to listen. With `shard.count` > 1 gauges of single shards have a label `shard`.
        role: Of whom the metrics are, beside those of the live shards; see `readings.Shards`.

    Raises:
        TelemetryError: from `start`.
    """

    def __init__(self, config: Config, role: str = "") -> None:
        self.config = config
        self.registry = prometheus.CollectorRegistry()
        self._shards = Shards(config.shard.count > 1, role)
        self.registry.register(self._shards)
        prometheus.ProcessCollector(registry=self.registry)
        self._make_flow()
        self._make_checkpoints()
        self._reasons: dict[int | None, str] = {None: "starting"}
        self._beat_s = time.monotonic()
        self.status = Status(config, role, self._shards.by_index, self.why, self.still)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def _make_flow(self) -> None:
        self._consumed = self._counter("events_consumed_total", "Records taken, of every input.")
        self._events = self._counter("events_total", "Events and labels by what became of them.", fate=FATES)
        self._dead_letters = self._counter("dead_letters_total", "Records that could not be used.", reason=REASONS)
        self._by_fate = {
            "forget_requests": self._counter("forget_requests_total", "Commands to forget that were obeyed."),
            "forgotten_rows": self._counter("forgotten_rows_total", "Rows that were erased by them, of every part."),
        }
        self._drift = self._counter("drift_alarms_total", "Drift signals by their source.", source=("loss",))
        self._drifts = {"loss"}
        self._turn_seconds = prometheus.Histogram(
            "streamcl_turn_seconds", "Time of a turn that had records.", buckets=_TURN_BUCKETS, registry=self.registry
        )
        text = "Time that the stages of a turn with records took."
        self._stage_seconds = self._tally("stage_seconds", text, _STAGE_BUCKETS, "stage", STAGES)
        text = "Event time from an event to its label, of labels that were joined."
        self._label_delay = self._tally("label_delay_seconds", text, _DELAY_BUCKETS)
        text = f"What was served, of up to {SCORES_PER_TURN} events a turn: chance of 1, or of the likeliest class."
        self._served = self._tally("served_score", text, _SCORE_BUCKETS) if self.config.task != "regression" else None
        self._delay = self._gauge("event_delay_seconds", "Clock minus event time of the event answered last.")
        self._recoveries = self._counter(
            "recoveries_total", "Shards dropped in order to be recovered, here or elsewhere, by cause.", cause=CAUSES
        )
        self._rebalances = self._gauge("group_rebalances", "Times that the group gave or took shards (count).")
        self._ready = self._gauge("ready", "1 when every shard here has caught up and hears its brokers, else 0.")
        blocks = self._gauge("python_blocks", "Objects and parts of them that Python's allocator holds (count).")
        blocks.set_function(lambda: sys.getallocatedblocks())
        limit = self._gauge("memory_limit_bytes", "What this process may take: of its control group, or all there is.")
        limit.set(memory_limit_bytes())
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
        disk = self._gauge("checkpoint_disk_free_bytes", "Free on the disk of checkpoint.folder; NaN without a folder.")
        disk.set_function(self._free_bytes)
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

    def _tally(
        self, name: str, text: str, edges: Sequence[float], label: str = "", values: Sequence[str] = ("",)
    ) -> Tally:
        self.registry.register(tally := Tally(name, text, edges, label, values))
        return tally

    def _free_bytes(self) -> float:
        try:
            return float(shutil.disk_usage(self.config.checkpoint.folder).free)
        except OSError:
            return math.nan

    def _gauge(self, name: str, text: str, *labels: str) -> prometheus.Gauge:
        return prometheus.Gauge(f"streamcl_{name}", text, labels, registry=self.registry)

    def observe(
        self,
        turn: Turn,
        *,
        seconds: float,
        lag: Mapping[Stream, int],
        readings: Mapping[str, float],
        stages: Mapping[str, float] = MappingProxyType({}),
        shard: int = 0,
    ) -> None:
        """Take a turn in, an empty one too. `lag` and `readings` that are empty leave what was told before.

        Costs nothing for each event but to look at its fate: what takes more is sampled, or done once a turn.
        """
        self.beat()
        if turn.records:
            self._turn_seconds.observe(seconds)
            for stage, took in stages.items():
                self._stage_seconds.add((took,), stage)
        self._consumed.inc(turn.records)
        for fate, count in turn.counts.items():
            if fate not in self._by_fate:
                self._by_fate[fate] = self._events.labels(fate)
            self._by_fate[fate].inc(count)
        joined, late = Fate.JOINED, Fate.LATE
        self._label_delay.add([each.delay_s for each in turn.outcomes if each.fate is joined or each.fate is late])
        if turn.predictions:
            self._delay.set(time.time() - turn.predictions[-1].time_s)
            if self._served:
                some = turn.predictions[:: max(1, len(turn.predictions) // SCORES_PER_TURN)]
                self._served.add([max(each.scores.served.tolist()) for each in some[:SCORES_PER_TURN]])
        for letter in turn.dead_letters:
            self._dead_letters.labels(letter.reason if letter.reason in REASONS else "other").inc()
        for signal in turn.signals:
            if signal.kind == "drift":
                known = signal.source in self._drifts or len(self._drifts) < MOST_SOURCES
                self._drifts.add(source := signal.source if known else "other")
                self._drift.labels(source).inc()
        self.status.history.observe(shard, turn)
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
        self.status.history.saved(shard, size_bytes)

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
        self.status.history.left(shard)
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

    def still(self) -> str:
        """Why the process is not live; "" when it is."""
        still_s = time.monotonic() - self._beat_s
        return f"the loop has not turned for {still_s:.0f} s" if still_s > LIVE_S else ""

    def start(self) -> str | None:
        """Listen on `telemetry.host` and `telemetry.port`; returns the URL, or None when the port is 0."""
        place = self.config.telemetry
        if place.port == 0:
            return None
        try:
            listener = socket.create_server((place.host, place.port), family=_family(place.host))
        except OSError as error:
            raise TelemetryError(f"telemetry: can't listen on {place.host}:{place.port}: {error.strerror}") from error
        settings = uvicorn.Config(self.app(), log_level="warning", log_config=None, access_log=False)
        self._server = uvicorn.Server(settings)  # None: our own handlers
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
        served: list[BaseRoute] = [Route(path, endpoint) for path, endpoint in routes]
        if not self.config.telemetry.page:
            return Starlette(routes=served)
        return Starlette(routes=[*served, self.status.mount()], lifespan=self.status.lifespan)

    def _serve_metrics(self, _: Request) -> Response:
        return Response(prometheus.generate_latest(self.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    def _serve_ready(self, _: Request) -> Response:
        return _health(self.why())

    def _serve_live(self, _: Request) -> Response:
        return _health(self.still())


def _health(reason: str) -> Response:
    return JSONResponse({"ok": not reason, "reason": reason}, status_code=503 if reason else 200)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
