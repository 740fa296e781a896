"""What may happen to brokers and the network while a worker runs: nothing is lost, and the time to recover is told.

A feeder sends events and labels without a pause, past all faults that are the worker's alone. Behind the last fault
the state must equal a replay of the topics in the logged order, and every event must have its prediction.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kafka import KafkaProducer

from connectors.apache import ApacheBroker, Listener, free_ports
from streamcl.bench.proxy import Proxy
from tests.kafka.conftest import Cluster, started, toml

EVENTS_PER_S = 100.0
_STREAMCL = [sys.executable, "-m", "streamcl.cli"]
_LAG = "streamcl_lag_records"
GROWTH_BYTES = 150 << 20  # of the worker's memory while it waits: far more than its buffers, far less than a leak


class Feeder:
    """Events and labels on two topics at a steady pace, by a producer that outlives outages."""

    def __init__(self, bootstrap: str, events: str, labels: str) -> None:
        self._topics, self._stopped = (events, labels), threading.Event()
        self._producer = KafkaProducer(
            bootstrap_servers=bootstrap.split(","), enable_idempotence=False, acks="all", delivery_timeout_ms=90_000
        )
        self.sent = 0
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The number of events, all of them acknowledged."""
        self._stopped.set()
        self._thread.join(60)
        self._producer.flush(60)
        assert not self._failed, self._failed[0]
        self._producer.close()
        return self.sent

    def _feed(self) -> None:
        while not self._stopped.wait(1 / EVENTS_PER_S):
            event = {"id": self.sent, "user": self.sent % 7, "price": self.sent % 3}
            self._send(0, event)
            if self.sent % 3 == 0:
                self._send(1, {"id": self.sent, "label": 1})
            self.sent += 1

    def _send(self, topic: int, row: Mapping[str, Any]) -> None:
        future = self._producer.send(self._topics[topic], json.dumps(row).encode(), partition=0)
        future.add_errback(self._failed.append)


class Running:
    """`streamcl run` as a process, seen through its /metrics."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self.output = folder / "stdout"
        with self.output.open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            command = [*_STREAMCL, "run", str(folder / "config.toml"), "--json"]
            self._process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        self.peak_bytes = self.furthest = 0

    def told(self) -> dict[str, float]:
        """Its metrics; none while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=2) as page:
                lines = [line.rpartition(" ") for line in page.read().decode().splitlines()]
        except OSError:
            return {}
        found = {name: float(value) for name, _, value in lines if not name.startswith("#")}
        self.peak_bytes = max(self.peak_bytes, int(found["process_resident_memory_bytes"]))
        return found

    def position(self) -> int:
        """The next event to be read. What is repeated in a recovery does not move it."""
        return int(self.told().get('streamcl_position{input="events",partition="0"}', -1))

    def progress(self, timeout_s: float) -> float:
        """Seconds until it has come further than it ever was."""
        start = time.monotonic()
        while time.monotonic() < start + timeout_s:
            position = self.position()
            if position > max(self.furthest, 0):
                self.furthest = position
                return time.monotonic() - start
            assert self._process.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(f"no progress for {timeout_s:g} s: {self.said()}")

    def finish(self, events: int) -> Any:
        """Let it take everything that there is, and leave."""
        deadline = time.monotonic() + 60
        while self.position() < events or any(n for name, n in self.told().items() if name.startswith(_LAG)):
            assert time.monotonic() < deadline, self.said()
            assert self._process.poll() is None, self.said()
            time.sleep(0.2)
        self._process.terminate()
        assert self._process.wait(60) == 0, self.said()
        return json.loads(self.output.read_bytes())

    def said(self) -> str:
        return (self._folder / "stderr").read_text()[-3000:]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Scene:
    """Topics, a feeder, and a worker that reaches the brokers by `address`."""

    def __init__(self, broker: ApacheBroker, address: str, folder: Path, mode: str) -> None:
        self.cluster = Cluster("apache", broker.bootstrap)
        self.topics = {role: self.cluster.name() for role in ("events", "labels", "predictions")}
        for topic in self.topics.values():
            broker.create_topic(topic)
        self._folder, (port,) = folder, free_ports(1)
        urls = {role: f"kafka://{address}/{topic}" for role, topic in self.topics.items()}
        times = {"request_timeout_s": 4.0, "connect_timeout_s": 8.0, "delivery_timeout_s": 15.0}
        config = {
            "name": self.cluster.name(),
            "predictions": urls["predictions"],
            "events": {"url": urls["events"], "id": "id"},
            "labels": {"url": urls["labels"]},
            "features": {"user": {"kind": "categorical", "buckets": 31}, "price": {"kind": "numeric"}},
            "model": {"embedding_dim": 2, "hidden": [4]},
            "join": {"attribution_window_s": 3.0},
            "delivery": {"mode": mode},
            "checkpoint": {"folder": str(folder / "checkpoints"), "every_events": 1000},
            "telemetry": {"port": port},
            "kafka": times | {"transaction_timeout_s": 15.0},
        }
        (folder / "config.toml").write_text(toml(config))
        self.feeder = Feeder(broker.bootstrap, self.topics["events"], self.topics["labels"])
        self.worker = Running(folder, port)

    def suffer(self, faults: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Each fault in turn, the worker on its feet before and behind it; the seconds that it took to stand again.

        A fault returns when it is over.
        """
        self.worker.progress(60)
        baseline, times = self.worker.peak_bytes, {}
        for name, fault in faults.items():
            fault()
            self.worker.furthest = max(self.worker.furthest, self.worker.position())
            times[name] = self.worker.progress(60)
            self.worker.progress(10)
        assert self.worker.peak_bytes - baseline < GROWTH_BYTES, (baseline, self.worker.peak_bytes)
        print(f"\nseconds to recover: { ({name: round(s, 1) for name, s in times.items()}) }")
        return times

    def settle(self, exactly_once: bool) -> None:
        """All is over: nothing is lost, and the state is that of a replay."""
        count = self.feeder.stop()
        ran = self.worker.finish(count)
        command = [*_STREAMCL, "replay", str(self._folder / "config.toml"), "--json"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        replayed = json.loads(done.stdout)
        assert ran["counts"]["predicted"] == count
        assert ran["state_digest"] == replayed["state_digest"]
        assert ran["learned_hash"] == replayed["learned_hash"]
        inputs = Counter(dict(each.headers)["streamcl-input"] for each in self.cluster.read(self.topics["predictions"]))
        assert inputs.keys() == self._inputs(count)
        twice = sum(inputs.values()) - count
        print(f"{count} events, 0 lost, {twice} predictions sent twice, peak memory {self.worker.peak_bytes >> 20} MiB")
        assert not (exactly_once and twice)

    def _inputs(self, count: int) -> set[bytes]:
        """Where each event stands first: the feeder may have repeated one that was acknowledged to nobody."""
        first: dict[int, int] = {}
        for record in self.cluster.read(self.topics["events"]):
            first.setdefault(json.loads(record.value)["id"], record.offset)
        assert first.keys() == set(range(count)), "lost by the feeder or the brokers"
        return {f"events:0:{offset}".encode() for offset in first.values()}


@contextmanager
def _scene(broker: ApacheBroker, address: str, folder: Path, mode: str) -> Iterator[Scene]:
    scene = Scene(broker, address, folder, mode)
    try:
        yield scene
    finally:
        scene.worker.kill()


def _for(seconds: float, begin: Callable[[], Any], end: Callable[[], Any]) -> Callable[[], None]:
    def fault() -> None:
        begin()
        time.sleep(seconds)
        end()

    return fault


def test_a_broken_network_loses_nothing(tmp_path: Path) -> None:
    [port] = free_ports(1)
    with ExitStack() as stack:
        broker = stack.enter_context(started(ApacheBroker(listeners={"PROXY": Listener(advertised=[port])})))
        proxy = stack.enter_context(Proxy(port, int(broker.listener("PROXY").rpartition(":")[2])))
        scene = stack.enter_context(_scene(broker, f"127.0.0.1:{port}", tmp_path, "exactly_once"))
        ok = partial(proxy.set, "ok")
        scene.suffer(
            {
                "reset": proxy.reset,
                "200 ms more": _for(4, partial(proxy.set, "delay"), ok),
                "cut for 6 s": _for(6, partial(proxy.set, "stall"), ok),  # longer than a request may take
                "refused for 3 s": _for(3, partial(proxy.set, "refuse"), ok),
            }
        )
        scene.settle(exactly_once=True)


def test_a_broker_that_freezes_or_dies_loses_nothing(tmp_path: Path) -> None:
    with started(ApacheBroker()) as broker, _scene(broker, broker.bootstrap, tmp_path, "at_least_once") as scene:
        scene.suffer(
            {"frozen for 6 s": _for(6, broker.freeze, broker.thaw), "kill -9": _for(1, broker.kill, broker.restart)}
        )
        scene.settle(exactly_once=False)


def test_the_death_of_a_leader_loses_nothing(tmp_path: Path) -> None:
    with (
        started(ApacheBroker(brokers=3)) as broker,
        _scene(broker, broker.bootstrap, tmp_path, "exactly_once") as scene,
    ):
        scene.suffer({"leader killed": lambda: broker.kill(broker.leader(scene.topics["events"]))})
        scene.settle(exactly_once=True)
