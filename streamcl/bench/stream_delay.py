"""`bench stream --task delay`: labels that come late, and the losses that are made for them.

A recorded stream whose positives get delays: event n stands at second n, its positive comes d seconds later, if that is
within the attribution window. Every method runs through the real worker, events and labels on two topics. What is
judged are the scores that events were answered with, on what their labels came to in the end.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from streamcl import connect
from streamcl.bench.options import Options
from streamcl.bench.quality import Floats, quality
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.bench.streams import LABEL, Dataset, recorded
from streamcl.config import Config
from streamcl.protocols import StreamclError
from streamcl.random import key_of, uniform_array
from streamcl.records import Message
from streamcl.worker import build

EVENTS, QUICK = 100_000, 6_000
WINDOW, MEAN, WAIT = 0.1, 0.02, 0.01
"""Shares of the stream: the attribution window, the delays' mean, and how long DFM and ES-DFM wait at first."""
LEAST = 0.6

ORACLE, NAIVE, WAITING = "oracle", "naive", "wait"
ORDERS = ("interleaved", "recorded")
LOSSES = ("fnw", "fnc", "dfm", "es_dfm")
KINDS = ("exponential", "heavy")
NOTES = (
    "oracle: every label comes with its event; naive: an event is learned as a negative at once and as a positive when"
    " its label comes, by plain cross-entropy; wait: one example, when the window closes",
    "ne: on final labels, of the scores that stood when the event came; recovered: (naive - ne) / (naive - oracle)",
    "exponential: mean delay a fiftieth of the stream; heavy: Pareto of index 1 from a five-hundredth on, a median of"
    " twice and no mean; a label behind the window, a tenth of the stream, never comes and is a negative for everybody",
    "order: the recording has a user's events in a row, and a positive comes when its user has left, so that there is"
    " nothing to learn of them in time (--preset recorded); interleaved: events in random order, one for each seed",
    "every method has the default model, optimiser and rates: nothing was chosen on the stream",
)

_runs = itertools.count()


class Incomplete(StreamclError):
    """A run did not answer every event."""


@dataclass(frozen=True, slots=True)
class Late:
    """A stream, and when its positives come: delays (N,) s, infinite for a negative; labels (N,) as of the window."""

    data: Dataset
    delays: Floats
    window_s: float

    @property
    def labels(self) -> Floats:
        return (self.delays <= self.window_s).astype(np.float64)


def interleaved(data: Dataset, count: int, seed: int) -> Dataset:
    """So many of its events, in random order: users come and go beside each other, as they do in traffic."""
    order = np.argsort(uniform_array(key_of(seed, "bench.delay.order"), len(data.payloads)), kind="stable")[:count]
    return Dataset(data.name, data.features, [data.payloads[place] for place in order])


def delayed(data: Dataset, kind: str, seed: int) -> Late:
    """Give positives their delays: whole seconds, at least one, for time runs in events."""
    count = len(data.payloads)
    u = uniform_array(key_of(seed, f"bench.delay.{kind}"), count)
    mean = MEAN * count
    drawn = -mean * np.log(u) if kind == "exponential" else 0.1 * mean / u
    delays = np.where(data.labels() > 0.5, np.maximum(1.0, np.rint(drawn)), np.inf)
    return Late(data, delays, WINDOW * count)


def settings(method: str, events: int) -> dict[str, Any]:
    """Of the loss and the join; all else is the product's default."""
    window_s, wait_s = WINDOW * events, max(1.0, WAIT * events)
    join: dict[str, Any] = {"attribution_window_s": window_s, "idle_s": 1.0, "orphan_s": 0.0}
    if method == WAITING:
        return {"join": {**join, "aggregate": "max"}}
    kind = {NAIVE: "task"}.get(method, method)
    first = wait_s if method in ("dfm", "es_dfm") else 0.0
    return {"join": {**join, "wait_s": first}, "loss": {"kind": kind}}


def scores_of(late: Late, method: str, seed: int) -> Floats:
    """(N,) what each event was answered with."""
    count, name = len(late.data.payloads), f"delay-{os.getpid()}-{next(_runs)}"
    place = f"memory://{name}/stream"
    memory: Any = connect.connector(place)
    oracle = method == ORACLE
    inline = late.labels if oracle else None
    shape: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "events": {"url": f"{place}-views", "id": "id", "time": "ts", **({"label": LABEL} if oracle else {})},
        "features": late.data.features,
        "predictions": f"{place}-scores",
        "drift": {"detector": "none"},
    }
    clicks = {} if oracle else {"labels": {"url": f"{place}-clicks", "default": 1, "time": "ts"}}
    more: Mapping[str, Any] = {} if oracle else settings(method, count)
    config = Config.parse({**shape, **clicks, **more}, "bench")
    _publish(config, f"{place}-views", _views(late, inline))
    if not oracle:
        _publish(config, f"{place}-clicks", _clicks(late))
    worker, found = build(config), np.full(count, np.nan)
    if worker.control:
        worker.control.open()
    try:
        wanted = count + (0 if oracle else int(late.labels.sum()))
        for turn in worker.run():
            for prediction in turn.predictions:
                found[int(prediction.id)] = prediction.scores.served[0]
            worker.flush()
            if worker.progress.records >= wanted:
                worker.stop()
    finally:
        worker.close()
        memory.reset(name)  # 100,000 events leave 1 GB of topics
    if np.isnan(found).any():
        raise Incomplete(f"{method}: {int(np.isnan(found).sum())} events have no answer: {dict(worker.counts)}")
    return found


def _views(late: Late, inline: Floats | None) -> Iterator[Message]:
    for n, payload in enumerate(late.data.payloads):
        known = {name: payload[name] for name in late.data.features}
        label = {} if inline is None else {LABEL: int(inline[n])}
        yield Message(orjson.dumps({"id": str(n), "ts": float(n), **known, **label}), time_s=float(n))


def _clicks(late: Late) -> Iterator[Message]:
    comes = np.arange(len(late.delays)) + late.delays
    order = [int(n) for n in np.argsort(comes, kind="stable") if late.delays[n] <= late.window_s]
    for n in order:
        yield Message(orjson.dumps({"id": str(n), "ts": float(comes[n])}), time_s=float(comes[n]))


def _publish(config: Config, url: str, messages: Iterator[Message]) -> None:
    sink = connect.open_sink(url, config)
    while some := list(itertools.islice(messages, 1000)):
        sink.send(some)
        sink.flush()
    sink.close()


def run(options: Options) -> Report:
    """Methods: one of the losses; streams: one of the kinds of delay; without one, all."""
    began = time.perf_counter()
    events = options.count("events", QUICK if options.quick else EVENTS)
    order = options.choice("preset", ORDERS, ORDERS[0])
    data, seeds = recorded("ml-100k", options.data), options.seed_list(1 if options.quick else 3)
    losses = (options.choice("method", LOSSES, "fnw"),) if options.method else LOSSES
    kinds = (options.choice("stream", KINDS, KINDS[0]),) if options.stream else KINDS
    rows, bars = [], []
    for kind in kinds:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            some = interleaved(data, events, seed) if order == ORDERS[0] else data.first(events)
            late = delayed(some, kind, seed)
            for method in (ORACLE, NAIVE, WAITING, *losses):
                judged = quality(late.labels, scores_of(late, method, seed))
                progress(f"{kind}, seed {seed}: {method}: ne {judged['ne']:.4f}")
                found.setdefault(method, []).append(judged)
        mean = {method: float(np.mean([each["ne"] for each in runs])) for method, runs in found.items()}
        for method, runs in found.items():
            values = {name: float(np.mean([each[name] for each in runs])) for name in ("ne", "auc", "log_loss")}
            spread = float(np.std([each["ne"] for each in runs]))
            recovered = {f"recovered_of_{each}": _recovered(mean, method, each) for each in (NAIVE, WAITING)}
            rows.append(Row(f"{kind}: {method}", {**values, "ne_spread": spread, **recovered}, table=kind))
        bars += [Bar(f"{kind}: {loss}: share of the gap", _recovered(mean, loss, NAIVE), LEAST) for loss in losses]
    settings_ = {"task": "delay", "quick": options.quick, "events": events, "order": order, "window_s": WINDOW * events}
    return Report("stream", settings_, seeds, time.perf_counter() - began, rows, bars, notes=NOTES)


def _recovered(mean: Mapping[str, float], method: str, of: str) -> float:
    return (mean[of] - mean[method]) / (mean[of] - mean[ORACLE])
