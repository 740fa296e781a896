"""The demo: a broker, traffic on it, the real worker, and a watcher of the worker's turns.

The worker runs in this process, because everything shown comes from its turns; the traffic comes from a thread and,
over Kafka, through a broker process. Loop, joiner, checkpoints and connector are those of `streamcl run`.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from streamcl.config import Config
from streamcl.demo.ledger import Ledger
from streamcl.demo.simulator import Settings, simulate
from streamcl.demo.traffic import Traffic
from streamcl.demo.view import RECENT, Glance, View
from streamcl.protocols import ConnectorError, StreamclError
from streamcl.recovery import Keeper, store_of
from streamcl.worker import Worker, build

BROKERS = "streamcl.brokers"
SPARK_SLICES = 48
TOPICS = ("demo-impressions", "demo-clicks")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `per_s` is the pace of the traffic in records per second of wall time; a slow machine may lag it."""

    settings: Settings
    per_s: float
    embedded_broker: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. `finished` is False when it was interrupted."""

    ledger: Ledger
    transport: str
    seconds: float
    finished: bool
    counts: dict[str, int]
    readings: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """JSON-ready: the ledger's figures, and how the run went."""
        return {
            "finished": self.finished,
            "seed": self.ledger.simulation.settings.seed,
            "transport": self.transport,
            "seconds": round(self.seconds, 2),
            "events_per_s": round(self.ledger.seen / self.seconds, 1),
            **self.ledger.figures(),
            "counts": self.counts,
            "tickets_waiting": int(self.readings["tickets"]),
        }


def configure(site: str, settings: Settings, checkpoints: Path) -> Config:
    """The worker's configuration; what `streamcl run` would be given as TOML."""
    return Config.parse(
        {
            "name": "demo",
            "seed": settings.seed,
            "events": {"url": f"{site}/{TOPICS[0]}", "id": "id", "key": "user", "time": "time"},
            "labels": {"url": f"{site}/{TOPICS[1]}", "default": 1.0, "time": "time"},
            "predictions": f"{site}/demo-predictions",
            # Clicks travel on a topic of their own: the lateness covers about 60 impressions that are read before them.
            "join": {"attribution_window_s": settings.window_s, "allowed_lateness_s": 180.0},
            "features": {
                "user": {"kind": "categorical", "buckets": 1024},
                "item": {"kind": "categorical", "buckets": 1024},
                "category": {"kind": "categorical", "buckets": 64},
                "device": {"kind": "categorical", "buckets": 16},
                "placement": {"kind": "categorical", "buckets": 16},
                "price": "numeric",
                "tags": {"kind": "bag", "buckets": 128, "max_items": 4},
            },
            "model": {"kind": "deepfm", "embedding_dim": 8, "hidden": [32]},
            "optimizer": {"kind": "adagrad", "learning_rate": 0.03},
            # Few rows and the newest: after a drift, old examples teach what is no longer true.
            "replay": {"retention": "recency", "capacity": 2000, "per_event": 1, "weight": 0.5},
            "drift": {"delta": 0.02},
            "checkpoint": {"folder": str(checkpoints), "every_events": 10_000, "retain": 2},
            "worker": {"max_records": 50, "poll_timeout_s": 0.05},
        },
        "demo",
    )


def run(plan: Plan, console: Console) -> Result:
    """Run the demo to its end, or to the first Ctrl-C; nothing outlives it.

    Raises:
        StreamclError: the traffic could not be sent, or the worker failed.
    """
    simulation = simulate(plan.settings)
    with (
        _site(plan.embedded_broker) as (site, transport),
        tempfile.TemporaryDirectory(prefix="streamcl-demo-") as folder,
    ):
        console.print(f"Events travel through {transport}.", highlight=False)
        config = configure(site, plan.settings, Path(folder))
        traffic = Traffic(simulation, config, plan.per_s)  # opens its sinks first, which makes the topics
        with closing(traffic), closing(build(config)) as worker:
            return _watch(worker, traffic, Ledger(simulation), transport, View(console))


@contextmanager
def _site(embedded_broker: bool) -> Iterator[tuple[str, str]]:
    """(what stands before `/topic` in URLs, how the events travel, in words)."""
    with ExitStack() as stack:
        try:
            broker = stack.enter_context(_broker(embedded_broker))
        except ConnectorError as error:
            yield f"memory://demo-{uuid4().hex}", f"memory, not Kafka: {error}"
        else:
            for topic in TOPICS:
                broker.create_topic(topic, 1)
            yield broker.url, "Kafka (an embedded broker)"


def _broker(wanted: bool) -> Any:
    """The embedded broker, found like a connector so that the core imports none. Raises ConnectorError without one."""
    found = [point for point in entry_points(group=BROKERS, name="embedded") if wanted]
    if not found:
        raise ConnectorError("no embedded broker is registered" if wanted else "as asked")
    try:
        return found[0].load()()
    except ImportError as error:
        raise ConnectorError(f"the embedded broker can't be imported: {error}") from error


def _watch(worker: Worker, traffic: Traffic, ledger: Ledger, transport: str, view: View) -> Result:
    began = time.monotonic()
    keeper, pulse = Keeper(worker, store_of(worker.config)), Pulse(began)
    with closing(keeper), view, _interruptible(worker):
        keeper.restore()
        traffic.start()
        for turn in keeper.run():
            ledger.observe(turn, worker)
            traffic.consumed += turn.records
            if traffic.error:
                raise StreamclError(f"the traffic could not be sent: {traffic.error}") from traffic.error
            if traffic.finished:
                worker.stop()
            if view.due() or worker.stopping:
                view.show(_glance(worker, traffic, ledger, transport, pulse))
    traffic.stop()
    traffic.join()
    seconds = time.monotonic() - began
    return Result(ledger, transport, seconds, traffic.finished, dict(worker.counts), worker.readings())


class Pulse:
    """Impressions per second between two looks."""

    def __init__(self, began: float) -> None:
        self.began = self._then = began
        self._seen = 0

    def rate(self, seen: int) -> float:
        now = time.monotonic()
        rate = (seen - self._seen) / max(now - self._then, 1e-3)
        self._then, self._seen = now, seen
        return rate


@contextmanager
def _interruptible(worker: Worker) -> Iterator[None]:
    """The first Ctrl-C ends the loop after its turn; a second one interrupts."""

    def stop(_number: int, _frame: object) -> None:
        worker.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _glance(worker: Worker, traffic: Traffic, ledger: Ledger, transport: str, pulse: Pulse) -> Glance:
    recent, simulation = ledger.recent(RECENT), ledger.simulation
    return Glance(
        title=f"streamcl demo, seed {simulation.settings.seed}, {transport.partition(':')[0]}",
        share=traffic.consumed / traffic.total,
        per_s=pulse.rate(ledger.seen),
        elapsed_s=time.monotonic() - pulse.began,
        now=ledger.measure(ledger.live, recent),
        before=ledger.measure(ledger.live, ledger.before()),
        bayes=ledger.measure(simulation.bayes, recent),
        readings=worker.readings(),
        replay_capacity=worker.config.replay.capacity,
        curve=tuple(ledger.curve(SPARK_SLICES).live.tolist()),
        drifts=tuple(
            f"{point.name} (impression {point.impression:,})"
            for point in simulation.drift_points
            if point.impression < ledger.seen
        ),
        alarms=tuple(f"at {alarm.impression:,}" for alarm in ledger.alarms),
    )
