"""Streams, configs and runs that the tests of the worker and of recovery share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectors import memory
from streamcl import connect
from streamcl.bootstrap import Bootstrap
from streamcl.config import Config
from streamcl.records import Message, Record
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.worker import Worker, build, logged

BROKER = "journey"
COMMANDS_URL = f"memory://{BROKER}/orders"


def settings(folder: Path, **changes: Any) -> Config:
    """A small worker on memory:// with labels on their own topic; `changes` replace whole tables."""
    data: dict[str, Any] = {
        "name": "shop",
        "events": {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts"},
        "labels": {"url": f"memory://{BROKER}/clicks", "default": 1, "time": "ts"},
        "predictions": f"memory://{BROKER}/scores",
        "features": {"user": {"kind": "categorical", "buckets": 13}, "price": "numeric"},
        "model": {"kind": "deepfm", "embedding_dim": 2, "hidden": [4]},
        "replay": {"retention": "reservoir", "capacity": 8, "per_event": 2},
        "join": {"attribution_window_s": 10.0, "orphan_s": 5.0},
        "drift": {"detector": "page_hinkley"},
        "metrics": {"window": 16},
        "checkpoint": {"folder": str(folder), "every_events": 7},
        "worker": {"max_records": 5, "poll_timeout_s": 0.01},
    }
    return Config.parse({**data, **changes})


@dataclass(frozen=True)
class Item:
    """One record to be produced."""

    topic: str
    value: bytes
    time_s: float
    partition: int = 0


def view(id: int, time_s: float, partition: int = 0, **fields: Any) -> Item:
    payload = {"id": str(id), "ts": time_s, "user": id % 5, "price": float(id % 3), **fields}
    return Item("views", json.dumps(payload).encode(), time_s, partition)


def click(id: int, time_s: float, partition: int = 0, **fields: Any) -> Item:
    return Item("clicks", json.dumps({"id": str(id), "ts": time_s, **fields}).encode(), time_s, partition)


def order(id: str, time_s: float, partition: int = 0, **who: Any) -> Item:
    """A command to forget, for a config with `commands = COMMANDS_URL`."""
    payload = {"command": "forget", "id": id, **who}
    return Item("orders", json.dumps(payload).encode(), time_s, partition)


def fill(items: Sequence[Item], partitions: int = 1) -> memory.MemoryBroker:
    """A fresh broker that holds exactly these records."""
    memory.reset(BROKER)
    broker = memory.broker(BROKER)
    for topic in ("views", "clicks", "orders"):
        broker.create(topic, partitions)
    broker.create("scores")
    for item in items:
        broker.produce(item.topic, item.value, partition=item.partition % partitions, time_s=item.time_s)
    broker.finish()
    return broker


@dataclass
class Result:
    """What a run has come to."""

    digest: str
    worker: Worker
    scores: list[Message] = field(default_factory=list)


def finish(config: Config, order: memory.Choice = "time", bootstrap: Bootstrap | None = None) -> Result:
    """Start a worker where its shard stands, and run it to the end of the stream."""
    memory.broker(BROKER).order = order
    worker = build(config)
    keeper = Keeper(worker, store_of(config), bootstrap=bootstrap, beside=False)
    keeper.restore()
    for _ in keeper.run():
        pass
    return Result(digest(worker.state_dict()), worker, memory.broker(BROKER).messages("scores"))


def die_after(config: Config, turns: int, order: memory.Choice = "time") -> None:
    """Start a worker, let it take some turns, and drop it as kill -9 would: nothing is flushed, saved or closed."""
    memory.broker(BROKER).order = order
    keeper = Keeper(build(config), store_of(config), beside=False)
    keeper.restore()
    for _, _turn in zip(range(turns), keeper.run(), strict=False):
        pass


def repeat(config: Config) -> Result:
    """A backtest of everything, in the logged order if there is one: no checkpoint, nothing published."""
    worker = Worker(config, connect.open_source(config), connect.codecs(config))
    worker.progress.position = dict(worker.source.seek({}))
    several = len(worker.source.streams()) > 1
    turns = worker.rerun(logged(connect.open_control(config), 0)) if several else worker.run()
    for _ in turns:
        pass
    return Result(digest(worker.state_dict()), worker)


def shuffled(seed: int) -> Callable[[Sequence[Record]], Record]:
    """An order of arrival that nobody could have foreseen."""
    calls = iter(range(seed, seed + 10**9, 7919))
    return lambda heads: heads[(next(calls) * 2654435761 >> 7) % len(heads)]
