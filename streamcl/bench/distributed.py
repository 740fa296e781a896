"""`bench distributed`: what a group of workers comes to: how good, with how many bytes; and, reckoned, how fast.

Quality: N ranks in one process, keyed as Kafka's partitions are, against one learner that sees everything. A rank works
through its own part, so their event times may differ within a round; scores are judged all together. Speed is reckoned
by `distributed_model` (`--simulate`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamcl.bench import distributed_model, presets
from streamcl.bench.distributed_group import Course, Shown
from streamcl.bench.distributed_group import run as follow
from streamcl.bench.next_click_events import examples_of, payloads, read_clicks
from streamcl.bench.options import Options
from streamcl.bench.quality import Floats, auc, entropy, losses
from streamcl.bench.report import Bar, Curve, Report, Row, Value, progress
from streamcl.bench.stream import settings
from streamcl.bench.stream_next_click import SETTINGS
from streamcl.bench.streams import LABEL, TIME, recorded
from streamcl.config import Config
from streamcl.stations import GroupConfig

READS = {"data", "stream", "method", "events", "seeds", "simulate"}

STREAMS = ("ml-100k", "yoochoose")
METHODS = ("average", "outer", "none")
LOSS = 0.002
WORLDS, ROUNDS = (2, 4), (10, 100, 1000, 10_000)
CLICKS, QUICK_CLICKS, QUICK_EVENTS = 20_000, 6_000, 10_000
DEFAULT = GroupConfig().learned or 0

NOTES = (
    "ranks take the events of their own users (ml-100k) or sessions (yoochoose) in order, by a hash; a round is so many"
    " learned events of each rank; scores of all ranks are judged together, each given before its label was learned"
    " from; auc_loss is one learner's AUC, on the whole stream in its order, less the group's",
    "bytes_per_event: what one rank says of a round, by the events that it has learned in it; it sends that to every"
    " other rank",
)


@dataclass(frozen=True, slots=True)
class Stream:
    """What is learned, and by which configuration."""

    name: str
    key: str
    settings: Mapping[str, Any]
    shown: Sequence[Shown]

    @property
    def labels(self) -> Floats:
        return np.array([payload[LABEL] for each in self.shown for payload in each], np.float64)

    def config(self, seed: int, **group: Any) -> Config:
        events = {"url": "memory://bench/events", "time": TIME, "label": LABEL, "key": self.key}
        return Config.parse({"name": "b", "events": events, **self.settings, "seed": seed, "group": group}, "bench")


def streams(options: Options) -> Iterator[Stream]:
    """Those that were asked for; `--events` takes so many events (ml-100k) or clicks (yoochoose)."""
    asked = options.choice("stream", (*STREAMS, "both"), "ml-100k" if options.quick else "both")
    if asked in ("ml-100k", "both"):
        data = recorded("ml-100k", options.data)
        if options.events or options.quick:
            data = data.first(options.count("events", QUICK_EVENTS))
        chosen = {"features": data.features, **settings("dcnv2", "best")}
        yield Stream("ml-100k", "user", chosen, [[payload] for payload in data.payloads])
    if asked in ("yoochoose", "both"):
        clicks = read_clicks(options.data, options.count("events", QUICK_CLICKS if options.quick else CLICKS))
        examples = examples_of(clicks)
        shown = [
            _labelled(payloads(examples, n, examples.shown[n]), int(examples.place[n])) for n in range(len(examples))
        ]
        yield Stream("yoochoose", "session", SETTINGS, shown)


def _labelled(shown: Sequence[Mapping[str, Any]], place: int) -> Shown:
    return [{**payload, LABEL: int(at == place)} for at, payload in enumerate(shown)]


def run(options: Options) -> Report:
    """By stream: one learner, then groups of 2 and 4 by round length. `--simulate`: see `distributed_model`."""
    if options.simulate:
        return distributed_model.run(options)
    began = time.perf_counter()
    method = options.choice("method", METHODS, "average")
    seeds = options.seed_list(1)
    rows: list[Row] = []
    bars: list[Bar] = []
    curves: list[Curve] = []
    for stream in streams(options):
        alone = [_alone(stream, seed) for seed in seeds]
        rows.append(_row(f"{stream.name}: one learner", stream, alone, alone))
        for world in WORLDS[:1] if options.quick else WORLDS:
            losses_ = []
            for length in _lengths(options.quick):
                courses = [_group(stream, method, world, length, seed) for seed in seeds]
                rows.append(_row(f"{stream.name}: {world} ranks, rounds of {length}", stream, courses, alone))
                losses_.append(float(str(rows[-1].values["auc_loss"])))
                if length == DEFAULT and method == "average":
                    bars.append(Bar(f"auc loss, {stream.name}, {world} ranks", losses_[-1], LOSS, at_least=False))
            curves.append(Curve(f"{stream.name}, {world} ranks", list(_lengths(options.quick)), losses_))
    return Report(
        bench="distributed",
        config={"method": method, "quick": options.quick, "default_round_events": DEFAULT},
        seeds=seeds,
        seconds=time.perf_counter() - began,
        rows=rows,
        bars=bars,
        notes=[*NOTES, *presets.notes("best")],
        curves=curves,
        axes=("events of a rank in a round", "AUC lost"),
    )


def _lengths(quick: bool) -> tuple[int, ...]:
    return (DEFAULT,) if quick else tuple(sorted({*ROUNDS, DEFAULT}))


def _alone(stream: Stream, seed: int) -> Course:
    progress(f"{stream.name}: one learner, {len(stream.shown)} parts")
    return follow("one learner", stream.config(seed), stream.shown, 1)


def _group(stream: Stream, method: str, world: int, length: int, seed: int) -> Course:
    progress(f"{stream.name}: {world} ranks, rounds of {length}, seed {seed}")
    return follow("group", stream.config(seed, merge=method, round_events=length), stream.shown, world)


def _row(name: str, stream: Stream, courses: Sequence[Course], alone: Sequence[Course]) -> Row:
    labels = stream.labels
    found = float(np.mean([auc(labels, each.trace.scores) for each in courses]))
    base = float(np.mean([auc(labels, each.trace.scores) for each in alone]))
    lost = float(np.mean([losses(labels, each.trace.scores).mean() for each in courses]))
    first = courses[0]
    values: dict[str, Value] = {
        "auc": found,
        "auc_loss": base - found,
        "ne": lost / entropy(labels),
        "rounds": first.rounds,
        "bytes_per_event": round(first.said_bytes / len(labels), 1),
        "divergence": float(np.mean(first.divergences or [0.0])),
        "merge_ms": round(1e3 * first.merging_s / max(first.rounds * first.world, 1), 3),
    }
    return Row(name, values, table=stream.name)
