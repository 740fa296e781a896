"""The whole journey on a real broker: events through Kafka, learned by `streamcl run` in a process of its own, against
`streamcl replay` of the same events from files: one prediction per event, and the same state, bit for bit.

Twice: with labels inside the events (one input: offsets are the order), and with labels on a topic of their own (two
inputs: the order in which they came is read back from the control topic).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from streamcl import connect
from streamcl.bench.options import Options
from streamcl.bench.report import Bar, Report, Row
from streamcl.bench.streams import LABEL, TIME, Dataset, recorded, synthetic
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import EVENTS, LABELS, Message

READS = frozenset({"data", "stream"})
WINDOW_S = 3600.0
QUICK = 1_500
IDLE_EXIT_S = 4.0


def run(options: Options) -> Report:
    """Streams: ml-100k (needs --data), or `drifting`, which is synthetic and the default."""
    began = time.perf_counter()
    name = options.choice("stream", ("drifting", "ml-100k"), "drifting")
    data = synthetic(name, 20_000, 0) if name == "drifting" else recorded(name, options.data)
    if options.quick:
        data = data.first(QUICK)
    rows, bars = [], []
    for labels in ("inline", "own topic"):
        row = _journey(data, own_topic=labels == "own topic")
        rows.append(Row(f"labels {labels}", row))
        bars.append(Bar(f"labels {labels}: events with exactly one prediction", row["answered_once"], row["events"]))
        bars.append(Bar(f"labels {labels}: state equals replay", float(row["digest"] == row["replay_digest"]), 1.0))
    return Report("journey", {"stream": data.name, "window_s": WINDOW_S}, [0], time.perf_counter() - began, rows, bars)


def _journey(data: Dataset, own_topic: bool) -> dict[str, Any]:
    brokers = list(entry_points(group="streamcl.brokers", name="embedded"))
    if not brokers:
        raise ConnectorError("no embedded broker is registered; is streamcl installed?")
    streams = dict(_streams(data, own_topic))
    with tempfile.TemporaryDirectory() as temporary, brokers[0].load()() as broker:
        folder = Path(temporary)
        config = _config(data, folder, broker.url, own_topic)
        for topic in (*streams, "predictions", "journey-dead-letters"):
            broker.create_topic(topic)
        for name, messages in streams.items():
            _publish(f"{broker.url}/{name}", messages, config)
            (folder / f"{name}.jsonl").write_bytes(b"".join(m.value + b"\n" for m in messages if m.value))
        start = time.perf_counter()
        live = _streamcl("run", folder, "--idle-exit-s", str(IDLE_EXIT_S))
        seconds = time.perf_counter() - start - IDLE_EXIT_S
        order = ["--order", config.control_url] if own_topic else []
        inputs = [part for name in streams for part in ("--input", f"{name}=file://{folder}/{name}.jsonl")]
        replayed = _streamcl("replay", folder, *inputs, *order)
        answers = Counter(_answers(f"{broker.url}/predictions", config))
    return {
        "events": len(streams[EVENTS]),
        "answered_once": sum(1 for count in answers.values() if count == 1),
        "learned": live["counts"]["learned"],
        "counts": json.dumps(live["counts"]),
        "digest": live["state_digest"],
        "replay_digest": replayed["state_digest"],
        "learned_hash_equal": live["learned_hash"] == replayed["learned_hash"],
        "events_per_s": len(streams[EVENTS]) / seconds,
    }


def _streams(data: Dataset, own_topic: bool) -> Iterator[tuple[str, list[Message]]]:
    """Messages by input. On their own topic, labels come after a heavy-tailed delay; a few come too late, or twice."""
    rng = np.random.default_rng(0)
    delays = rng.exponential(WINDOW_S / 4, len(data.payloads))
    events, labels = [], []
    for i, payload in enumerate(data.payloads):
        body = {**payload, "id": str(i)}
        label = body.pop(LABEL) if own_topic else None
        events.append(Message(orjson.dumps(body), time_s=float(payload[TIME])))
        if label is not None:
            due = float(payload[TIME]) + float(delays[i])
            text = orjson.dumps({"id": str(i), LABEL: label, TIME: due})
            labels += [Message(text, time_s=due)] * (2 if i % 100 == 0 else 1)
    yield EVENTS, events
    if own_topic:
        yield LABELS, sorted(labels, key=lambda message: message.time_s or 0.0)


def _config(data: Dataset, folder: Path, broker: str, own_topic: bool) -> Config:
    settings: dict[str, Any] = {
        "name": "journey",
        "events": {"url": f"{broker}/{EVENTS}", "id": "id", "time": TIME, "label": None if own_topic else LABEL},
        "labels": {"url": f"{broker}/{LABELS}", "label": LABEL, "time": TIME} if own_topic else None,
        "predictions": f"{broker}/predictions",
        "features": dict(data.features),
        "replay": {"retention": "recency", "per_event": 2},
        "join": {"attribution_window_s": WINDOW_S},
        "checkpoint": {"folder": str(folder / "checkpoints"), "every_events": 10_000},
        "telemetry": {"port": 0},
    }
    lines = [f"{name} = {_toml(value)}" for name, value in settings.items() if value is not None]
    (folder / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    return Config.parse(settings)


def _toml(value: Any) -> str:
    """An inline TOML value; JSON's strings and numbers are TOML's."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    return json.dumps(value)


def _publish(url: str, messages: Sequence[Message], config: Config) -> None:
    sink = connect.open_sink(url, config)
    sink.send(messages)
    sink.flush()
    sink.close()


def _streamcl(command: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the command line as a user would; its JSON."""
    program = [sys.executable, "-m", "streamcl.cli", command, str(folder / "config.toml"), *arguments, "--json"]
    done = subprocess.run(program, capture_output=True, check=False)  # noqa: S603 - our own program
    if done.returncode:
        raise ConnectorError(f"streamcl {command} left with {done.returncode}: {done.stderr.decode()[-2000:]}")
    answer: dict[str, Any] = orjson.loads(done.stdout)
    return answer


def _answers(url: str, config: Config) -> Iterator[str]:
    """Which input each published prediction answers, read from the topic by a source of its own."""
    source = connect.connector(url).open_source({EVENTS: url}, config)
    source.seek({})
    empty = 0
    while empty < 20:
        records = source.poll(1000, 0.1)
        empty = 0 if records else empty + 1
        yield from (dict(record.headers)["streamcl-input"].decode() for record in records)
    source.close()
