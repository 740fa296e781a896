"""A worker's events a second: with a model, in memory (`worker_clicks`); and what Kafka costs, with next to no model.

The bar compares the worker on a broker with the sum of its parts: a bare loop of the same client (consume, decode, add
a field, encode, produce) and the same worker on topics in memory. What the connector does beyond the client's own work
is above that sum. Passes of one round follow each other, so that a busy machine slows them alike; medians are taken.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from streamcl import connect
from streamcl.bench import passthrough, worker_clicks
from streamcl.bench.brokers import chosen
from streamcl.bench.options import Options
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Message
from streamcl.worker import build

READS = frozenset({"via", "task"})
TASKS = ("clicks", "kafka")
PEERS = ("quix", "bytewax", "faust")
PEERS_PYTHON = "STREAMCL_PEERS_PYTHON"
FULL, QUICK = (60_000, 5), (5_000, 3)
PATIENCE_S = 300.0
NEXT_TO_NOTHING = {"river": "river.dummy:PriorClassifier", "trust_pickle": True, "drift": {"detector": "none"}}

_names = itertools.count()

Pass = Callable[[], "tuple[float, float]"]
"""One run over the whole topic; seconds of wall clock and of processor."""


def run(options: Options) -> Report:
    """`--via kafka://host:port` takes a broker that runs already; else Apache Kafka, without Java the embedded one."""
    began = time.perf_counter()
    tasks = (options.choice("task", TASKS, "clicks"),) if options.task else TASKS
    clicks, promised = worker_clicks.measure(options.quick) if "clicks" in tasks else ([], [])
    if "kafka" not in tasks:
        seconds, settings = time.perf_counter() - began, {"quick": options.quick}
        return Report("worker", settings, [0], seconds, clicks, promised, notes=worker_clicks.NOTES)
    count, rounds = QUICK if options.quick else FULL
    with chosen(options.via) as broker:
        stage = Stage(broker.url, count)
        passes: dict[str, Pass] = {
            "bare kafka-python loop": stage.bare,
            "streamcl on memory://": lambda: stage.worker(stage.memory),
            "streamcl on kafka-python": lambda: stage.worker(stage.kafka),
            "streamcl on kafka-python, exactly once": lambda: stage.worker(stage.kafka, EXACTLY_ONCE),
            "streamcl on librdkafka": lambda: stage.worker(stage.kafka, LIBRDKAFKA),
        }
        passes |= {f"{name} pass-through": _peer(stage, name) for name in PEERS if _interpreter()}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            for name, run_pass in passes.items():
                taken[name].append(run_pass())
    wall = {name: statistics.median(w for w, _ in times) / count for name, times in taken.items()}
    cpu = {name: statistics.median(c for _, c in times) / count for name, times in taken.items()}
    rows = [
        Row(name, {"us_per_event": 1e6 * w, "cpu_us_per_event": 1e6 * cpu[name], "events_per_s": 1 / w})
        for name, w in wall.items()
    ]
    shape = {"broker": broker.kind, "events": count, "rounds": rounds, "bytes": stage.bytes, "max_records": 500}
    bars, notes = [*promised, *_bars(wall, cpu)], [*(worker_clicks.NOTES if clicks else ()), *_notes()]
    return Report("worker", shape, [0], time.perf_counter() - began, [*clicks, *rows], bars, notes=notes)


EXACTLY_ONCE: dict[str, Any] = {"delivery": {"mode": "exactly_once"}}
LIBRDKAFKA: dict[str, Any] = {"kafka": {"client": "librdkafka"}}


def _bars(wall: Mapping[str, float], cpu: Mapping[str, float]) -> list[Bar]:
    parts, whole = ("bare kafka-python loop", "streamcl on memory://"), "streamcl on kafka-python"
    return [
        Bar(f"on Kafka / (bare loop + in memory), {kind}", times[whole] / sum(times[p] for p in parts), 1.1, False)
        for kind, times in (("wall clock", wall), ("processor", cpu))
    ]


def _notes() -> list[str]:
    model = "the model is River's PriorClassifier: what is measured is the way there and back"
    if _interpreter():
        return [model, "peers pass through: decode, add a field, encode; they join, learn and remember nothing"]
    return [model, f"Quix Streams, Bytewax and Faust are missing: `make peers`, or {PEERS_PYTHON}=python"]


class Stage:
    """One topic of events on a broker, the same in memory, and everything that runs over them."""

    def __init__(self, url: str, count: int) -> None:
        self.count = count
        self.kafka = f"{url}/bench-worker-{os.getpid()}"
        self.memory = f"memory://bench-worker/{os.getpid()}"
        self.bootstrap, self.topic = urlsplit(self.kafka).netloc, _topic(self.kafka)
        events = [_event(number) for number in range(count)]
        self.bytes = len(events[-1])
        self._make(self.topic)
        for place in (self.kafka, self.memory):
            # Not every peer can decompress.
            sink = connect.open_sink(place, self._config(place, {"kafka": {"compression": "none"}}))
            for start in range(0, count, 1000):
                sink.send([Message(value, b"%d" % (start % 977)) for value in events[start : start + 1000]])
            sink.flush()
            sink.close()

    def out(self, place: str) -> str:
        """URL of a new topic beside `place`."""
        url = f"{place}-out-{next(_names)}"
        if place == self.kafka:
            self._make(_topic(url))
        return url

    def _make(self, topic: str) -> None:
        """With one partition, whatever the broker's default is: the bare loop and some peers read no more."""
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        try:
            admin.create_topics({topic: {"num_partitions": 1}}, wait_for_metadata=True)
        finally:
            admin.close()

    def worker(self, place: str, settings: Mapping[str, Any] | None = None) -> tuple[float, float]:
        """The product's own loop, flushed at its end as at a checkpoint."""
        worker = build(self._config(place, {"predictions": self.out(place), **(settings or {})}))
        try:
            if worker.control:
                worker.control.open()
            worker.progress.position = dict(worker.source.seek({}))
            wall = cpu = 0.0
            untimed = 0
            for turn in worker.run():
                if not wall:
                    wall, cpu, untimed = time.perf_counter(), time.process_time(), turn.records
                if turn.records and worker.progress.records >= self.count:
                    worker.stop()
            worker.flush()
            share = self.count / (self.count - untimed)  # the clock starts behind the first turn
            taken = share * (time.perf_counter() - wall), share * (time.process_time() - cpu)
        finally:
            worker.close()
        if worker.counts["learned"] != self.count:
            raise ConnectorError(f"{place}: {self.count} events, but the worker counted {dict(worker.counts)}")
        return taken

    def bare(self) -> tuple[float, float]:
        """What anyone would write: poll, decode, add a field, encode, send; flush and commit each second."""
        out, done = _topic(self.out(self.kafka)), 0
        consumer = KafkaConsumer(bootstrap_servers=self.bootstrap, group_id=out, enable_auto_commit=False)
        producer = KafkaProducer(
            bootstrap_servers=self.bootstrap, enable_idempotence=False, acks="all", linger_ms=5, compression_type="lz4"
        )
        consumer.assign([TopicPartition(self.topic, 0)])
        consumer.seek_to_beginning()
        wall = cpu = told = 0.0
        deadline = time.monotonic() + PATIENCE_S
        while done < self.count:
            if time.monotonic() > deadline:
                raise ConnectorError(f"{self.kafka}: {done} of {self.count} records came within {PATIENCE_S:.0f} s")
            for records in consumer.poll(timeout_ms=100, max_records=500).values():
                if not wall:
                    wall, cpu, told = time.perf_counter(), time.process_time(), time.perf_counter()
                for record in records:
                    event = orjson.loads(record.value)
                    event["score"] = 0.5
                    producer.send(out, orjson.dumps(event), record.key)
                done += len(records)
            if time.perf_counter() - told > 1.0:
                producer.flush()
                consumer.commit()
                told = time.perf_counter()
        producer.flush()
        taken = time.perf_counter() - wall, time.process_time() - cpu
        producer.close()
        consumer.close()
        return taken

    def _config(self, place: str, settings: Mapping[str, Any]) -> Config:
        shape = {
            "name": f"bench-worker-{next(_names)}",
            "events": {"url": place, "id": "id", "key": "user", "time": "time", "label": "label"},
            "features": {"user": "categorical", "item": "categorical"},
        }
        return Config.parse({**shape, **NEXT_TO_NOTHING, **settings}, "bench")


def _topic(url: str) -> str:
    return urlsplit(url).path.strip("/")


def _event(number: int) -> bytes:
    body = {"id": str(number), "time": number / 100, "user": number % 977, "item": number % 377, "label": number % 2}
    text = orjson.dumps(body)
    return text[:-1] + b',"more":"' + b"x" * (190 - len(text)) + b'"}'  # 200 bytes in all, as in others' figures


def _peer(stage: Stage, name: str) -> Pass:
    def run_peer() -> tuple[float, float]:
        out = _topic(stage.out(stage.kafka))
        command = [str(_interpreter()), str(passthrough.__file__), name, stage.bootstrap, stage.topic, out]
        with tempfile.TemporaryDirectory(prefix="streamcl-peer-") as folder:  # they leave their state where they run
            done = subprocess.run(  # noqa: S603 - our own script
                [*command, str(stage.count)], cwd=folder, capture_output=True, text=True, check=False, timeout=600
            )
        answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not answers:
            raise ConnectorError(f"{name} left with {done.returncode}: {done.stderr[-1000:]}")
        answer = json.loads(answers[-1])
        return answer["wall_s"], answer["cpu_s"]

    return run_peer


def _interpreter() -> Path | None:
    """The Python that holds the peers, if there is one."""
    found = Path(os.environ.get(PEERS_PYTHON) or ".venv-peers/bin/python").absolute()
    return found if found.exists() else None
