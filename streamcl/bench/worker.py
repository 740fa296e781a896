"""A worker's events a second: with a model, in memory and on Kafka (`worker_clicks`, `worker_clicks_kafka`); what its
metrics cost (`worker_telemetry`), and what Kafka costs, with next to no model.

The bar compares the worker on a broker with the sum of its parts: a bare loop of the same client (consume, decode, add
a field, encode, produce) and the same worker on topics in memory. What the connector does beyond the client's own work
is above that sum. Passes of one round follow each other, so that a busy machine slows them alike; medians are taken.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import orjson
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from streamcl import connect
from streamcl.bench import peer_python, worker_clicks, worker_clicks_kafka, worker_telemetry
from streamcl.bench.brokers import Broker, chosen
from streamcl.bench.clock import Clock, Taken, timed
from streamcl.bench.options import Options
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Message
from streamcl.worker import build

READS = frozenset({"via", "task"})
TASKS = ("clicks", "telemetry", "clicks-kafka", "kafka")
PEERS = ("quix", "bytewax", "faust")
FULL, QUICK = (60_000, 5), (5_000, 3)
PATIENCE_S = 300.0
NEXT_TO_NOTHING = {"river": "river.dummy:PriorClassifier", "trust_pickle": True, "drift": {"detector": "none"}}

_names = itertools.count()

Pass = Callable[[], Taken]
"""One run over the whole topic."""


def run(options: Options) -> Report:
    """All tasks, or one. `--via kafka://host:port` names a broker; else Apache Kafka, without Java the embedded one."""
    began = time.perf_counter()
    tasks = (options.choice("task", TASKS, "clicks"),) if options.task else TASKS
    shape: dict[str, Any] = {"quick": options.quick}
    rows: list[Row] = []
    bars: list[Bar] = []
    notes: list[str] = []
    if "clicks" in tasks:
        rows, bars = worker_clicks.measure(options.quick)
        notes += worker_clicks.NOTES
    if "telemetry" in tasks:
        found, wanted = worker_telemetry.measure(options.quick)
        rows, bars = rows + found, bars + wanted
        notes += worker_telemetry.NOTES
    if set(tasks) & {"clicks-kafka", "kafka"}:
        with chosen(options.via) as broker:
            shape["broker"] = broker.kind
            if "clicks-kafka" in tasks:
                rows += worker_clicks_kafka.measure(broker, options.quick)
                notes += worker_clicks_kafka.notes(options.quick)
            if "kafka" in tasks:
                found, wanted, settings = measure(broker, options.quick)
                rows, bars, shape = rows + found, bars + wanted, shape | settings
                notes += _notes()
    return Report("worker", shape, [0], time.perf_counter() - began, rows, bars, notes=notes)


def measure(broker: Broker, quick: bool) -> tuple[list[Row], list[Bar], dict[str, Any]]:
    """What Kafka costs: rows, bars and what was run."""
    count, rounds = QUICK if quick else FULL
    stage = Stage(broker, count)
    passes: dict[str, Pass] = {
        "bare kafka-python loop": stage.bare,
        "streamcl on memory://": lambda: stage.worker(stage.memory),
        "streamcl on kafka-python": lambda: stage.worker(stage.kafka),
        "streamcl on kafka-python, exactly once": lambda: stage.worker(stage.kafka, EXACTLY_ONCE),
        "streamcl on librdkafka": lambda: stage.worker(stage.kafka, LIBRDKAFKA),
    }
    passes |= {f"{name} pass-through": partial(stage.peer, name) for name in PEERS if peer_python.interpreter()}
    taken: dict[str, list[Taken]] = {name: [] for name in passes}
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
    shape = {"events": count, "rounds": rounds, "bytes": stage.bytes, "max_records": 500}
    return rows, _bars(wall, cpu), shape


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
    if peer_python.interpreter():
        return [model, "peers pass through: decode, add a field, encode; they join, learn and remember nothing"]
    return [model, f"Quix Streams, Bytewax and Faust are missing: {peer_python.TO_GET}"]


class Stage:
    """One topic of events on a broker, the same in memory, and everything that runs over them."""

    def __init__(self, broker: Broker, count: int) -> None:
        self.count, self.broker = count, broker
        self.kafka, self.memory = broker.new_topic("bench-worker"), f"memory://bench-worker/{next(_names)}"
        self.bootstrap, self.topic = urlsplit(self.kafka).netloc, _topic(self.kafka)
        events = [_event(number) for number in range(count)]
        self.bytes = len(events[-1])
        for place in (self.kafka, self.memory):
            # Not every peer can decompress.
            sink = connect.open_sink(place, self._config(place, {"kafka": {"compression": "none"}}))
            for start in range(0, count, 1000):
                sink.send([Message(value, b"%d" % (start % 977)) for value in events[start : start + 1000]])
            sink.flush()
            sink.close()

    def out(self, place: str) -> str:
        """URL of a new topic beside `place`."""
        return self.broker.new_topic("bench-worker-out") if place == self.kafka else f"{place}-out-{next(_names)}"

    def worker(self, place: str, settings: Mapping[str, Any] | None = None) -> Taken:
        """The product's own loop, flushed at its end as at a checkpoint."""
        worker = build(self._config(place, {"predictions": self.out(place), **(settings or {})}))
        try:
            if worker.control:
                worker.control.open()
            worker.progress.position = dict(worker.source.seek({}))
            return timed(worker, self.count)
        finally:
            worker.close()

    def peer(self, name: str) -> Taken:
        said = peer_python.answer(
            "passthrough.py", name, self.bootstrap, self.topic, _topic(self.out(self.kafka)), self.count
        )
        return Taken(said["wall_s"], said["cpu_s"])

    def bare(self) -> Taken:
        """What anyone would write: poll, decode, add a field, encode, send; flush and commit each second."""
        out, done = _topic(self.out(self.kafka)), 0
        consumer = KafkaConsumer(bootstrap_servers=self.bootstrap, group_id=out, enable_auto_commit=False)
        producer = KafkaProducer(
            bootstrap_servers=self.bootstrap, enable_idempotence=False, acks="all", linger_ms=5, compression_type="lz4"
        )
        consumer.assign([TopicPartition(self.topic, 0)])
        consumer.seek_to_beginning()
        clock, told = Clock(), 0.0
        deadline = time.monotonic() + PATIENCE_S
        while done < self.count:
            if time.monotonic() > deadline:
                raise ConnectorError(f"{self.kafka}: {done} of {self.count} records came within {PATIENCE_S:.0f} s")
            for records in consumer.poll(timeout_ms=100, max_records=500).values():
                if not done:
                    clock, told = Clock(), time.perf_counter()
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
        taken = clock.read()
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
