"""`bench serve`: requests a second and their latency, while new models come; beside a plain FastAPI handler.

Real processes on loopback: a server, a closed loop of clients (`serve_load`), and this one, which writes a snapshot
every second. The plain server (`serve_plain`) keeps the first model. Both see the same levels of concurrency in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import orjson

from streamcl import connect
from streamcl.bench.options import Options
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.config import Config
from streamcl.protocols import StreamclError
from streamcl.records import Message
from streamcl.recovery import Keeper, store_of
from streamcl.worker import build

READS: set[str] = set()

FIELDS, NUMERICS, BUCKETS, EVENTS = 12, 2, 5_000, 500
BATCHES = (1, 64)
SWAP_S = 1.0
TIMES = 5.0
"""Throughput at equal p99, times the plain handler's: promised of single events, aimed at for batches."""

LOAD = str(Path(__file__).with_name("serve_load.py"))
"""As a script of its own: as part of the package it would wait for torch."""

CONFIG = """
name = "bench-serve"
[events]
url = "memory://bench-serve/events"
label = "label"
[model]
kind = "deepfm"
embedding_dim = 16
hidden = [128, 64]
[checkpoint]
folder = "{folder}"
every_events = 1000000
[telemetry]
port = 0
[features]
"""

NOTES = (
    "closed loop: each connection is kept and sends its next request once it has the answer; p99 is the client's",
    "at equal p99: the plain handler at its level of highest throughput, against our highest throughput at a level"
    " whose p99 is not above the plain handler's there",
    "plain: FastAPI, pydantic body, eager nn.Module with the same weights, uvicorn with uvloop and httptools; favoured"
    " by one torch thread and handlers on the loop instead of a thread pool; it takes no new models meanwhile",
    "requests that arrive together share a pass of our model, which may move a score by about 1e-7",
    "server, clients and the writer of snapshots share this machine's processors",
)


@dataclass(frozen=True, slots=True)
class Size:
    seconds: float
    levels: tuple[int, ...]


FULL = Size(8.0, (1, 2, 4, 8, 16, 32, 64))
QUICK = Size(1.5, (1, 8, 32))


class Unserved(StreamclError):
    """A server did not come up, or clients could not be run."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One level of concurrency at one server."""

    server: str
    batch: int
    connections: int
    values: dict[str, Any]
    saved: int = 0
    swapped: int = 0

    @property
    def rate(self) -> float:
        return float(self.values["requests"]) / float(self.values["seconds"])

    def row(self) -> Row:
        told = {name: self.values[name] for name in ("p50_ms", "p99_ms", "p999_ms", "non_2xx", "errors")}
        rates = {"requests_per_s": self.rate, "instances_per_s": self.rate * self.batch}
        swaps = {"snapshots": self.saved, "swaps": self.swapped} if self.server == "streamcl" else {}
        return Row(f"{self.server}, batch {self.batch}, {self.connections} connections", {**rates, **told, **swaps})


def run(options: Options) -> Report:
    """Both servers, level by level in turn."""
    began = time.perf_counter()
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="streamcl-bench-") as folder, contextlib.ExitStack() as processes:
        path = _write_config(Path(folder))
        config = Config.load(path)
        _learn(config)
        ports = _free_port(), _free_port()
        ours = [sys.executable, "-m", "streamcl.cli", "serve", str(path), "--port", str(ports[0])]
        plain = [sys.executable, "-m", "streamcl.bench.serve_plain", str(path), str(ports[1])]
        for command in (ours, plain):
            processes.enter_context(_process(command))
        difference = _difference(*ports)
        seen: list[Seen] = []
        for batch, level in itertools.product(BATCHES, size.levels):
            progress(f"batch {batch}, {level} connections")
            seen += [_ours(config, ports[0], batch, level, size), _plain(ports[1], batch, level, size)]
    shape = {"fields": FIELDS, "numerics": NUMERICS, "buckets": BUCKETS, "embedding_dim": 16, "hidden": [128, 64]}
    settings = {"quick": options.quick, "seconds_per_level": size.seconds, "levels": list(size.levels), **shape}
    bars = [Bar("largest difference of two scores", difference, 1e-5, at_least=False), *_bars(seen)]
    rows = [each.row() for each in seen]
    aims = [_faster(seen, BATCHES[1])]  # most of the time goes into JSON and hashing, which both do alike
    return Report("serve", settings, [0], time.perf_counter() - began, rows, bars, aims, notes=NOTES)


def _bars(seen: Sequence[Seen]) -> list[Bar]:
    ours = [each for each in seen if each.server == "streamcl"]
    saved, swapped = sum(each.saved for each in ours), sum(each.swapped for each in ours)
    loaded_s = sum(float(each.values["seconds"]) for each in ours)
    return [
        Bar("answers other than 2xx", sum(each.values["non_2xx"] for each in ours), 0, at_least=False),
        Bar("transport errors", sum(each.values["errors"] for each in ours), 0, at_least=False),
        Bar("snapshots swapped in / written", swapped / saved if saved else math.nan, 1.0),
        # Written each second once the one before is in use, and looked for each second: two at the worst.
        Bar("snapshots swapped in, per second of load", swapped / loaded_s, 1.0 / (2 * SWAP_S)),
        _faster(seen, 1),
    ]


def _faster(seen: Sequence[Seen], batch: int) -> Bar:
    return Bar(f"batch {batch}: throughput at equal p99, times plain", _times(seen, batch), TIMES)


def _times(seen: Sequence[Seen], batch: int) -> float:
    """See NOTES."""
    plain = max((s for s in seen if s.server == "plain" and s.batch == batch), key=lambda s: s.rate)
    most = plain.values["p99_ms"]
    allowed = [s.rate for s in seen if s.server == "streamcl" and s.batch == batch and s.values["p99_ms"] <= most]
    return max(allowed, default=0.0) / plain.rate


def _write_config(folder: Path) -> Path:
    lines = [f'f{i} = {{kind = "categorical", buckets = {BUCKETS}}}' for i in range(FIELDS)]
    lines += [f'n{i} = "numeric"' for i in range(NUMERICS)]
    path = folder / "serve.toml"
    path.write_text(CONFIG.format(folder=folder / "checkpoints") + "\n".join(lines) + "\n")
    return path


def _payloads(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    ids, numbers = rng.integers(0, 50_000, (count, FIELDS)), rng.normal(size=(count, NUMERICS)).round(3)
    return [
        {f"f{i}": f"v{value}" for i, value in enumerate(row)} | {f"n{i}": float(n) for i, n in enumerate(numbers[k])}
        for k, row in enumerate(ids.tolist())
    ]


def _learn(config: Config) -> None:
    """A first snapshot, of a real worker."""
    sink = connect.open_sink(config.events.url, config)
    sink.send([Message(orjson.dumps({**p, "label": i % 2}), time_s=float(i)) for i, p in enumerate(_payloads(EVENTS))])
    sink.flush()
    sink.close()
    worker = build(config)
    keeper = Keeper(worker, store_of(config), beside=False)
    keeper.restore()
    for _ in keeper.run():
        if worker.progress.records >= EVENTS:
            worker.stop()
    worker.close()


def _free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[None]:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603 - our own
    try:
        yield
        if process.poll() is not None:
            raise Unserved(f"{' '.join(command)}: left with code {process.returncode}")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()


def _post(port: int, path: str, body: Any) -> Any:
    url, data = f"http://127.0.0.1:{port}{path}", None if body is None else orjson.dumps(body)
    asked = Request(url, data, {"content-type": "application/json"})
    with urlopen(asked, timeout=10) as answer:  # noqa: S310
        return orjson.loads(answer.read())


def _difference(ours: int, plain: int) -> float:
    """Of the scores of the same events, one by one; also waits for the servers."""
    deadline = time.monotonic() + 120
    for port in (ours, plain):
        while True:
            try:
                _post(port, "/v1/predict", _payloads(1)[0])
                break
            except (URLError, OSError) as error:
                if time.monotonic() > deadline:
                    raise Unserved(f"no answer on port {port}: {error}") from error
                time.sleep(0.1)
    scores = [[_post(p, "/v1/predict", e)["predictions"][0]["score"] for e in _payloads(50)] for p in (ours, plain)]
    return float(np.abs(np.subtract(scores[0], scores[1])).max())


def _load(port: int, path: str, level: int, size: Size, bodies: Sequence[Any]) -> dict[str, Any]:
    command = [sys.executable, LOAD, str(port), path, str(level), str(size.seconds)]
    sent = b"\n".join(orjson.dumps(body) for body in bodies)
    done = subprocess.run(command, input=sent, capture_output=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        raise Unserved(f"the clients failed: {done.stderr.decode()[-500:]}")
    found: dict[str, Any] = orjson.loads(done.stdout)
    return found


def _bodies(batch: int) -> list[Any]:
    payloads = _payloads(256 * min(batch, 8))
    return payloads if batch == 1 else [{"instances": payloads[i : i + batch]} for i in range(0, len(payloads), batch)]


def _ours(config: Config, port: int, batch: int, level: int, size: Size) -> Seen:
    before, end, saved = _swaps(port), threading.Event(), [0]
    swapping = threading.Thread(target=_swap, args=(config, port, end, saved))
    swapping.start()
    try:
        values = _load(port, "/v1/predict", level, size, _bodies(batch))
    finally:
        end.set()
        swapping.join()
    return Seen("streamcl", batch, level, values, saved[0], _swaps(port) - before)


def _plain(port: int, batch: int, level: int, size: Size) -> Seen:
    path = "/v1/predict" if batch == 1 else "/v1/batch"
    return Seen("plain", batch, level, _load(port, path, level, size, _bodies(batch)))


def _swap(config: Config, port: int, end: threading.Event, saved: list[int]) -> None:
    """A snapshot each second, once the one before is in use; the last one is waited for too."""
    store = store_of(config)
    loaded = store.newest()
    if loaded is None:
        return
    due, manifest = time.monotonic(), dict(loaded.manifest)
    while not end.wait(max(due - time.monotonic(), 0.0)):
        due += SWAP_S
        loaded.state["learner"]["version"] += 1
        manifest["records"] += 1
        name = store.save(loaded.state, manifest).name
        saved[0] += 1
        give_up = time.monotonic() + 10.0
        while _post(port, "/v1/model", None)["snapshot"] != name and time.monotonic() < give_up:
            time.sleep(0.05)


def _swaps(port: int) -> int:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(next(float(line.split()[1]) for line in lines if line.startswith("streamcl_serve_swaps_total ")))
