"""`bench stream --stream obd|criteo`: logs whose positives are rare, ours beside VW and FTRL, as they are and tuned.

A tuned peer has the rate, the penalty and the first answer that did best on the first fifth of the very stream; so do
we (`presets`). Where positives are few, who is ahead may be chance: every difference has a bootstrap interval.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from river import optim

from streamcl.bench import peers, presets, retrained
from streamcl.bench.click_logs import WEIGHT, log_rows
from streamcl.bench.drive import Topic
from streamcl.bench.options import OptionError, Options
from streamcl.bench.quality import Floats, Trace, blocks, losses, quality, resampled, weighted
from streamcl.bench.report import Bar, Curve, Report, Row, progress
from streamcl.bench.reproduced import NO_CHANGE, VW, VW_FTRL, Known, mean, measure, missing, reproductions
from streamcl.bench.streams import Dataset

QUICK = 5_000
FIFTH = 5
DRAWS, QUICK_DRAWS = 1000, 100
METHODS = ("logistic", "deepfm")
RIVER = "river logistic ftrl"
RETRAINED_ROWS = 2_000

NOTES = (
    "every score was given before its label was learned from; whole stream; ne = log-loss / entropy of the base rate;"
    " all read the same fields, numbers as sign(x) ln(1 + |x|) for everybody: raw, VW --ftrl ends at NE 4.33 on criteo",
    "tuned: the best NE on the first fifth of the stream, of the grid that is named; --constant and intercept_init are"
    " the same first answer that ours begins with",
    "lower, upper: 95 % bootstrap interval of ours minus theirs over whole-stream figures, mean of our seeds, the same"
    " events drawn for both; an interval that holds 0 says that another such stream could have had another winner",
)
IPS = (
    "ips: each event counted 1 / (propensity x items) times, by the sum of that, and learned from with that weight;"
    " the policy was uniform, so that every weight is 1, and the figures must be, and are, the plain ones"
)
KNOWN = {
    ("obd", False): Known(None, (0.4205, 1.0947), (0.4205, 1.0947), (0.4371, 1.0704)),
    ("obd", True): Known(QUICK, (0.4158, 1.1149), (0.4158, 1.1149), (0.3938, 1.1107)),
    ("criteo", False): Known(None, (0.6231, 1.0184), (0.6231, 1.0184), (0.6261, 1.1319)),
    ("criteo", True): Known(QUICK, (0.5993, 1.0434), (0.5993, 1.0434), (0.6325, 1.2288)),
}
"""What VW reaches; what is asked of us is to be ahead of whoever runs beside us."""


def run(options: Options) -> Report:
    """Our model of `--method` (the headline) and the other of ours, then every peer, all on the same events."""
    began = time.perf_counter()
    stream, preset = str(options.stream), options.choice("preset", ("best", "default"), "best")
    if options.events is not None:
        raise OptionError(f"--events: stream {stream} is read whole, or its first {QUICK:,} rows with --quick")
    method = options.choice("method", METHODS, METHODS[0])
    known, seeds = KNOWN[stream, options.quick], options.seed_list(3)
    data = log_rows(stream, options.data)
    data = data.first(known.events) if known.events else data
    labels, topic = data.labels(), Topic(data, options.via)
    ours = {name: [_ours(topic, name, preset, seed) for seed in seeds] for name in dict.fromkeys((method, *METHODS))}
    others = _peers(logged(data), presets.PRIORS[stream])
    rivals = [name for name in others if name.startswith((VW, VW_FTRL, RIVER))]  # as they are, and tuned
    rest = [name for name in others if name not in (*rivals, NO_CHANGE)]
    traces = [*itertools.chain(*ours.values()), *others.values()]
    headline = mean([measure(trace, labels) for trace in ours[method]])
    return Report(
        bench="stream",
        config={"stream": stream, "preset": preset, "quick": options.quick, **settings(stream, method, preset)},
        seeds=seeds,
        seconds=time.perf_counter() - began,
        rows=[
            *(Row(trace.name, measure(trace, labels) | _ips(trace, data)) for trace in traces),
            *missing(others),
            *differences(labels, ours[method], [others[name] for name in others if name != NO_CHANGE], options.quick),
        ],
        bars=[*_ahead(headline, others, rivals, labels), *reproductions(others, labels, known)],
        aims=_ahead(headline, others, rest, labels),
        headline={name: headline[name] for name in ("auc", "ne", "log_loss", "events", "events_per_s")},
        notes=[*NOTES, *([IPS] if data.weight else []), *([presets.BEST_ON_LOGS] if preset == "best" else [])],
        curves=[
            Curve(trace.name, *blocks(losses(labels, trace.scores))) for trace in traces if trace.name != NO_CHANGE
        ],
        axes=("events", "log-loss (nats), mean of a fiftieth of the stream"),
    )


def settings(stream: str, method: str, preset: str) -> dict[str, Any]:
    """What a preset says of a model on this stream; the rest is the product's default."""
    said = presets.BEST_ON_LOG[stream] if preset == "best" else {}
    return {**said, "model": {**said.get("model", {}), "kind": method}}


def logged(data: Dataset) -> Dataset:
    """The same with the logarithms of its numbers, as the features of ours are: for those who can't take them."""
    numbers = [name for name, kind in data.features.items() if kind == "numeric"]
    payloads = [
        {**payload, **{name: _log(payload[name]) for name in numbers if name in payload}} for payload in data.payloads
    ]
    return replace(data, payloads=payloads)


def _log(x: float) -> float:
    return round(math.copysign(math.log1p(abs(x)), x), 6)


def _ours(topic: Topic, method: str, preset: str, seed: int) -> Trace:
    name = f"streamcl {method}, seed {seed}"
    progress(f"{name}, preset {preset}: {len(topic.data.payloads)} events of {topic.data.name}")
    return topic.run(name, {**settings(topic.data.name, method, preset), "seed": seed}, publish=True)


def _peers(data: Dataset, prior: float) -> dict[str, Trace]:
    """By name; without VW's where it is not installed."""
    labels = data.labels()
    constant = peers.constant(labels)
    traces = [constant, peers.no_change(labels)]
    first = math.log(prior / (1.0 - prior))
    if peers.vowpal_wabbit_installed():
        progress("vowpal wabbit")
        traces += [peers.vowpal_wabbit(VW, data), peers.vowpal_wabbit(VW_FTRL, data, "--ftrl")]
        traces += [tuned(name, data, peers.vowpal_wabbit, grid) for name, grid in _vw_grids(first).items()]
    progress("river")
    traces.append(peers.river_logistic("ftrl", data))
    traces.append(tuned(f"{RIVER} tuned", data, _river, _river_grid(first)))
    progress(name := _retrained(data))
    offline = retrained.retrained_deepfm(data, every_s=_every_s(data))
    unlearned = offline.scores == 0.5  # before the first training there is the rate so far
    traces.append(Trace(name, np.where(unlearned, constant.scores, offline.scores), offline.cpu_s))
    return {trace.name: trace for trace in traces}


def _every_s(data: Dataset) -> float:
    return retrained.DAY_S if data.name == "obd" else float(RETRAINED_ROWS)


def _retrained(data: Dataset) -> str:
    return retrained.NAME if data.name == "obd" else f"deepfm retrained every {RETRAINED_ROWS:,} rows"


def _vw_grids(first: float) -> dict[str, list[str]]:
    rates, alphas = (0.02, 0.05, 0.1, 0.25, 0.5), (0.002, 0.005, 0.02, 0.05, 0.1)
    return {
        f"{VW} tuned": [f"--constant {first:.4f} -l {rate} --l2 {l2}" for rate in rates for l2 in (0, 1e-5, 1e-4)],
        f"{VW_FTRL} tuned": [
            f"--constant {first:.4f} --ftrl --ftrl_alpha {alpha} --ftrl_beta {beta} --l2 {l2}"
            for alpha in alphas
            for beta in (0.1, 1)
            for l2 in (0, 1, 20)
        ],
    }


def _river_grid(first: float) -> list[str]:
    return [f"intercept_init {first:.4f} alpha {a} l2 {l2}" for a in (0.01, 0.03, 0.1, 0.3) for l2 in (0, 1, 5, 20)]


def _river(name: str, data: Dataset, arguments: str) -> Trace:
    _, first, _, alpha, _, l2 = arguments.split()
    optimizer = optim.FTRLProximal(alpha=float(alpha), beta=1.0, l1=0.0, l2=float(l2))
    return peers.river(name, data, optimizer, intercept_init=float(first))


def tuned(name: str, data: Dataset, peer: Callable[[str, Dataset, str], Trace], grid: Sequence[str]) -> Trace:
    """A peer on the whole stream, with the arguments of least NE on the first fifth of it."""
    part = data.first(len(data.payloads) // FIFTH)
    labels = part.labels()
    found = {each: quality(labels, peer(name, part, each).scores)["ne"] for each in grid}
    best = min(grid, key=lambda each: found[each] if math.isfinite(found[each]) else math.inf)
    progress(f"{name}: {best}")
    return replace(peer(name, data, best), name=f"{name}: {best}")


def _ips(trace: Trace, data: Dataset) -> dict[str, float]:
    if data.weight is None or trace.name == NO_CHANGE:
        return {}
    weights = np.array([payload[WEIGHT] for payload in data.payloads])
    return {f"ips_{name}": value for name, value in weighted(data.labels(), trace.scores, weights).items()}


def _ahead(
    headline: Mapping[str, float], others: Mapping[str, Trace], names: Sequence[str], labels: Floats
) -> list[Bar]:
    bars = []
    for name in names:
        theirs, short = quality(labels, others[name].scores), name.partition(":")[0]
        bars.append(Bar(f"auc >= {short}", headline["auc"], theirs["auc"]))
        bars.append(Bar(f"ne <= {short}", headline["ne"], theirs["ne"], at_least=False))
    return bars


def differences(labels: Floats, ours: Sequence[Trace], others: Sequence[Trace], quick: bool = False) -> list[Row]:
    """Ours, the mean of its seeds, minus each of the others, with the interval that nineteen of twenty samples give."""
    progress("bootstrap")
    scores = [trace.scores for trace in (*ours, *others)]
    drawn = resampled(labels, scores, QUICK_DRAWS if quick else DRAWS)
    whole = np.array([[q["auc"], q["ne"]] for q in (quality(labels, each) for each in scores)])
    rows = []
    for place, other in enumerate(others, len(ours)):
        found = whole[: len(ours)].mean(0) - whole[place]
        spread = np.nanpercentile(drawn[:, : len(ours)].mean(1) - drawn[:, place], (2.5, 97.5), axis=0)
        values = {
            f"{metric}_{part}": float(value)
            for m, metric in enumerate(("auc", "ne"))
            for part, value in zip(("difference", "lower", "upper"), (found[m], *spread[:, m]), strict=True)
        }
        rows.append(Row(f"ours - {other.name}", values, table="ours minus theirs"))
    return rows
