"""`bench stream`: our models through the real worker, and their peers, on one recorded stream in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamcl.bench import peers, presets, retrained, stream_delay, stream_logs, stream_next_click, stream_tables
from streamcl.bench.click_logs import LOGS
from streamcl.bench.drive import Topic
from streamcl.bench.options import OptionError, Options
from streamcl.bench.quality import Floats, Trace, blocks, losses
from streamcl.bench.report import Bar, Curve, Report, Row, progress
from streamcl.bench.reproduced import NO_CHANGE, VW, VW_FTRL, Known, mean, measure, missing, reproductions
from streamcl.bench.streams import Dataset, recorded, with_side

READS = {"data", "stream", "preset", "method", "seeds", "via", "task", "events"}

DEFINITIONS = (
    "every score was given before its label was learned from; whole stream unless said; ne = log-loss / entropy of"
    " the base rate; events_per_s counts processor seconds of one thread: ours from JSON bytes to encoded prediction,"
    " VW's with parsing, River's on ready dicts; peers run with their defaults, but for the rate that is named"
)


QUICK = (
    "quick: the limits on ml-100k are lower than what VW reaches on these few events (see the aims); they were set so"
    " after one rate of .05 for everything had missed VW's, at AUC .7066 / NE .8984"
)
KNOWN = {
    ("ml-100k", False): Known(None, (0.7573, 0.8420), (0.7573, 0.8420), (0.7589, 0.8396)),
    ("ml-100k", True): Known(10_000, (0.7000, 0.9070), (0.7198, 0.8876), (0.7168, 0.8902)),
    ("elec", False): Known(None, (0.7960, 0.8119), (0.7960, 0.8119), (0.7851, 0.8156)),
    ("elec", True): Known(10_000, (0.8258, 0.7957), (0.8258, 0.7957), (0.7635, 0.8565)),
}


def run(options: Options) -> Report:
    """Our model of `--method` (the headline) and the logistic one, then every peer, all on the same events.

    `--task admission`, `delay` and `next-click` are others, and so are logs of single rows: see `stream_tables`,
    `stream_delay`, `stream_next_click`, `stream_logs`.
    """
    tasks = {"admission": stream_tables.run, "delay": stream_delay.run, "next-click": stream_next_click.run}
    if (task := options.choice("task", ("peers", *tasks), "peers")) in tasks:
        return tasks[task](options)
    start = time.perf_counter()
    stream = options.choice("stream", ("ml-100k", "elec", *LOGS), "ml-100k")
    if stream in LOGS:
        return stream_logs.run(options)
    preset = options.choice("preset", presets.PRESETS, "default")
    method = options.choice("method", presets.METHODS, presets.HEADLINE.get(preset, "deepfm"))
    known, seeds = KNOWN[stream, options.quick], options.seed_list(1)
    data = recorded(stream, options.data)
    data = data if known.events is None else data.first(known.events)
    labels = data.labels()
    if preset == "side" and stream != "ml-100k":
        raise OptionError(f"--preset: side is of ml-100k, not of {stream}")
    mine = with_side(data, options.data or Path()) if preset == "side" else data
    topic = Topic(mine, options.via)
    ours = {name: [_ours(topic, name, preset, seed) for seed in seeds] for name in dict.fromkeys((method, "logistic"))}
    others = _peers(data) | (_with_side(mine) if mine is not data else {})
    traces = [*(trace for runs in ours.values() for trace in runs), *others.values()]
    headline = mean([measure(trace, labels) for trace in ours[method]])
    return Report(
        bench="stream",
        config={"stream": stream, "preset": preset, "quick": options.quick, **settings(method, preset)},
        seeds=seeds,
        seconds=time.perf_counter() - start,
        rows=[Row(trace.name, measure(trace, labels)) for trace in traces] + missing(others),
        bars=[*_promises(headline, known, preset, options.quick), *reproductions(others, labels, known)],
        aims=[*presets.aims(preset, headline, options.quick), *_aims(stream, headline, others, labels, known)],
        headline={name: headline[name] for name in ("auc", "ne", "log_loss", "events", "events_per_s")},
        notes=[DEFINITIONS, *presets.notes(preset), *([QUICK] if options.quick else [])],
        curves=[_curve(trace, labels) for trace in traces if trace.name != NO_CHANGE],
        axes=("events", "log-loss (nats), mean of a fiftieth of the stream"),
    )


def settings(method: str, preset: str) -> dict[str, Any]:
    """What a preset says of a model; the rest is the product's default."""
    said = presets.PRESETS[preset].get(method, {})
    return {**said, "model": {**presets.PARTS.get(method, {}), **said.get("model", {}), "kind": method}}


def _ours(topic: Topic, method: str, preset: str, seed: int) -> Trace:
    name = f"streamcl {method}, seed {seed}"
    progress(f"{name}, preset {preset}: {len(topic.data.payloads)} events of {topic.data.name}")
    return topic.run(name, {**settings(method, preset), "seed": seed}, publish=True)


def _peers(data: Dataset) -> dict[str, Trace]:
    """By name; without VW's two where it is not installed."""
    traces = [peers.constant(data.labels()), peers.no_change(data.labels())]
    if peers.vowpal_wabbit_installed():
        progress("vowpal wabbit")
        traces += [peers.vowpal_wabbit(VW, data), peers.vowpal_wabbit(VW_FTRL, data, "--ftrl")]
    progress("river")
    traces += [peers.river_logistic(name, data) for name in peers.RIVER_OPTIMIZERS]
    progress(retrained.NAME)
    traces.append(retrained.retrained_deepfm(data))
    return {trace.name: trace for trace in traces}


def _with_side(data: Dataset) -> dict[str, Trace]:
    """The peers that take any feature, on those that our models read with preset side."""
    traces = [replace(peers.river_logistic(name, data), name=f"river logistic {name}, side") for name in ("ftrl",)]
    if peers.vowpal_wabbit_installed():
        traces += [peers.vowpal_wabbit(f"{VW}, side", data), peers.vowpal_wabbit(f"{VW_FTRL}, side", data, "--ftrl")]
    return {trace.name: trace for trace in traces}


def _promises(headline: Mapping[str, float], known: Known, preset: str, quick: bool) -> list[Bar]:
    if (asked := presets.ASKED.get(preset)) and not quick:
        return [
            Bar(f"auc >= {asked[0]}", headline["auc"], asked[0]),
            Bar(f"ne <= {asked[1]}", headline["ne"], asked[1], at_least=False),
        ]
    return [
        Bar("auc >= vw default", headline["auc"], known.asked[0]),
        Bar("ne <= vw default", headline["ne"], known.asked[1], at_least=False),
    ]


def _aims(
    stream: str, headline: Mapping[str, float], others: Mapping[str, Trace], labels: Floats, known: Known
) -> list[Bar]:
    """Every peer in this very run, and on a stream of runs what a memory of one label reaches."""
    aims = [
        Bar("auc >= vw default, same slice", headline["auc"], known.vw[0]),
        Bar("ne <= vw default, same slice", headline["ne"], known.vw[1], at_least=False),
        Bar("auc >= vw --ftrl", headline["auc"], known.ftrl[0]),
        Bar("ne <= vw --ftrl", headline["ne"], known.ftrl[1], at_least=False),
    ]
    river = [trace for name, trace in others.items() if name.startswith("river")]
    aims += [Bar(f"auc >= {trace.name}", headline["auc"], measure(trace, labels)["auc"]) for trace in river]
    if stream == "elec":
        no_change = measure(others[NO_CHANGE], labels)
        aims.append(Bar("accuracy >= no-change", headline["accuracy"], no_change["accuracy"]))
    return aims


def _curve(trace: Trace, labels: Floats) -> Curve:
    return Curve(trace.name, *blocks(losses(labels, trace.scores)))
