"""Workers of a shop under traffic, each with a fault of its own: real processes on real brokers."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
from kafka import KafkaProducer

from connectors.embedded import EmbeddedBroker
from tests.kafka.conftest import toml

PER_S, BEAT_S = 80.0, 0.1
USERS, ITEMS = 40, 20
WINDOW_S = 2.0


def settings(broker: EmbeddedBroker, name: str, folder: Path, port: int, healthy: bool) -> dict[str, Any]:
    """As much switched on as a worker has to tell of."""
    url = f"{broker.url}/{name}"
    return {
        "name": name,
        "predictions": f"{url}-scores",
        "events": {"url": f"{url}-views", "id": "id", "key": "user", "time": "ts"},
        "labels": {"url": f"{url}-clicks", "label": "y", "default": 1, "time": "ts"},
        # Only the one in health has a disk to rely on.
        "join": {"attribution_window_s": WINDOW_S, "orphan_s": 1.0} | ({"memory_tickets": 50} if healthy else {}),
        "features": {
            "user": {"kind": "categorical", "table": {"max_rows": 1000}},
            "item": {"kind": "categorical", "buckets": 64},
            "price": "numeric",
        },
        "model": {"kind": "deepfm", "embedding_dim": 4, "hidden": [16, 8]},
        "replay": {"retention": "reservoir", "capacity": 500, "per_event": 2},
        "error_memory": [{"kind": "key", "key": "user"}],
        "plasticity": [{"kind": "continual_backprop"}],
        "diagnostics": {"sample_every_steps": 2, "window": 64, "report_every_steps": 200},
        "metrics": {"window": 400, "group_by": "user"},
        "drift": {"refractory_events": 50},
        "checkpoint": {"folder": str(folder), "every_events": 400, "retain": 2},
        "telemetry": {"port": port, "sample_every": 1},
        "control": f"{url}-control",
    }


class Traffic(threading.Thread):
    """Views at a steady rate and the clicks on them, by the clock.

    Attributes:
        labels: False: nobody tells of clicks any more.
        poison: A share of the clicks that come as NaN.
        sign: -1: users and items are liked by whom they were not.
    """

    def __init__(self, producer: KafkaProducer, shop: str) -> None:
        super().__init__(name=f"traffic of {shop}", daemon=True)
        self.producer, self.shop = producer, shop
        self.labels, self.poison, self.sign = True, 0.0, 1.0
        self.ended = threading.Event()

    def run(self) -> None:
        waiting, number = list[tuple[float, bytes, bytes]](), 0
        draw = random.Random(7)  # noqa: S311 - no secret
        likes = [draw.gauss(0.0, 1.5) for _ in range(USERS + ITEMS)]
        while not self.ended.wait(BEAT_S):
            now = time.time()
            for _ in range(round(PER_S * BEAT_S)):
                number += 1
                user, item = draw.randrange(USERS), draw.randrange(ITEMS)
                key, id_ = str(user).encode(), f"{number}"
                view = {"id": id_, "ts": now, "user": str(user), "item": str(item), "price": draw.random()}
                self.producer.send(f"{self.shop}-views", orjson.dumps(view), key)
                taste = self.sign * (likes[user] + likes[USERS + item])
                if draw.random() < 1.0 / (1.0 + 2.718281828**-taste) and self.labels:
                    delay_s = 0.2 + 0.5 * draw.random()
                    y = b"NaN" if draw.random() < self.poison else b"1"
                    click = b'{"id":"%s","ts":%.3f,"y":%s}' % (id_.encode(), now + delay_s, y)
                    waiting.append((now + delay_s, key, click))
            due = [each for each in waiting if each[0] <= now]
            waiting = [each for each in waiting if each[0] > now]
            for _, key, click in due:
                self.producer.send(f"{self.shop}-clicks", click, key)

    def stop(self) -> None:
        self.ended.set()


@contextlib.contextmanager
def worker(
    broker: EmbeddedBroker, producer: KafkaProducer, name: str, folder: Path, port: int, checkpoints: Path
) -> Iterator[Traffic]:
    """`streamcl run` in a process of its own, and its traffic."""
    for topic in ("views", "clicks", "scores", "control", "dead-letters"):
        broker.create_topic(f"{name}-{topic}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(toml(settings(broker, name, checkpoints, port, name == "healthy")))
    traffic = Traffic(producer, name)
    command = [sys.executable, "-W", "ignore", "-m", "streamcl.cli", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        (folder / f"{name}.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        traffic.start()
        try:
            yield traffic
        finally:
            traffic.stop()
            process.kill()


class Producer(KafkaProducer):  # type: ignore[misc]  # untyped
    """Of whom nothing is owed: its broker may be dead, and then closing raises, and the end of it prints."""

    def __del__(self) -> None:
        pass


@contextlib.contextmanager
def producing(broker: EmbeddedBroker) -> Iterator[KafkaProducer]:
    """What all traffic to a broker goes through."""
    producer = Producer(bootstrap_servers=broker.bootstrap, linger_ms=50, acks=1, enable_idempotence=False, retries=0)
    try:
        yield producer
    finally:
        with contextlib.suppress(Exception):  # the broker may be dead
            producer.close(timeout=1.0)
