"""`bench stream --task admission`: what bounds cost in AUC, on a stream whose ids never stop coming.

YOOCHOOSE's next clicks (see `streams.yoochoose`), with the session as a feature: most sessions never come back, so that
rows explode where nobody drops any. The same model runs over the same events with an unbounded collisionless table for
each feature, and with tables that are bounded where ids die.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.options import Options
from streamcl.bench.quality import Trace, quality
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.bench.streams import (
    HISTORY,
    LABEL,
    NEGATIVES,
    NEXT_CLICK,
    TIME,
    YOOCHOOSE,
    DataError,
    clicks_of,
    next_clicks,
)
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.records import EVENTS, Event, Fate, Origin, Outcome, Scores, Ticket

PERIODS = 17
CLICKS, QUICK_CLICKS = 2_400_000, 60_000
CHUNK = 500
"""Events answered and learned at once, as by a turn of the worker."""

UNBOUNDED = {name: {"max_rows": 1 << 20, "admission": "all"} for name in NEXT_CLICK}
BOUNDED: Mapping[str, Mapping[str, Any]] = {
    "session": {"max_rows": 3000, "admission": "all", "ttl_s": 10_000.0},
    "prev": {"max_rows": 1 << 20, "admission": "all"},
    "item": {"max_rows": 1 << 20, "admission": "all"},
}
"""Event time is the number of the click: `ttl_s` is 10,000 clicks. Items live: they stay."""
MOST_LOST = 0.001
FEWER = 0.9
NOTES = (
    "every score was given before its label was learned from; rows: at the end; table_bytes: vectors, optimiser state,"
    " bookkeeping and filters. The bounds of sessions were chosen on the first 60,000 clicks; that earlier items stay,"
    " on the first million: 5,000 rows for them cost .008 there. The share of rows saved grows with the stream, for"
    " sessions end and items stay: quick promises nothing of it"
)


def run(options: Options) -> Report:
    start = time.perf_counter()
    count = options.count("events", (1 + NEGATIVES) * (QUICK_CLICKS if options.quick else CLICKS)) // (1 + NEGATIVES)
    clicks, labels = clicks_of(_periods(options.data), HISTORY + count), np.zeros(0)
    rows: list[Row] = []
    for name, tables in (("unbounded", UNBOUNDED), ("bounded", BOUNDED)):
        progress(f"{name}: {len(clicks) - HISTORY} clicks")
        trace, labels, told = follow(next_clicks(clicks), tables)
        judged = {**quality(labels, trace.scores), "events": len(labels)}
        rows.append(Row(name, {**judged, "events_per_s": round(trace.events_per_s, 1), **told}))
    unbounded, bounded = ({name: float(str(row.values[name])) for name in ("auc", "rows")} for row in rows)
    lost, fewer = unbounded["auc"] - bounded["auc"], 1.0 - bounded["rows"] / unbounded["rows"]
    kept, saved = Bar("auc lost by bounds", lost, MOST_LOST, at_least=False), Bar("share of rows saved", fewer, FEWER)
    return Report(
        bench="stream",
        config={"task": "admission", "clicks": len(clicks) - HISTORY, "tables": dict(BOUNDED)},
        seeds=[0],
        seconds=time.perf_counter() - start,
        rows=rows,
        bars=[kept] if options.quick else [kept, saved],
        aims=[saved] if options.quick else [],
        headline={"auc_lost": lost, "rows_saved": fewer, "events": len(labels)},
        notes=[NOTES],
    )


def follow(
    payloads: Iterator[dict[str, Any]], tables: Mapping[str, Any]
) -> tuple[Trace, NDArray[np.float64], dict[str, float]]:
    """Answer and learn, a chunk at a time; scores, labels, and rows and bytes of all tables in the end."""
    features = {name: {"kind": "categorical", "table": tables[name]} for name in NEXT_CLICK}
    base = {"name": "b", "events": {"url": "memory://b/e", "label": LABEL}, "features": features}
    config = Config.parse(base, "bench")
    encoder, learner = Featurizer(config), Learner(config)
    scores, labels, cpu_s = array("f"), array("d"), 0.0
    events = enumerate(payloads)
    while some := list(itertools.islice(events, CHUNK)):
        begun = time.process_time()
        said = [_pass(number, payload, encoder, learner) for number, payload in some]
        assert learner.fused is not None  # noqa: S101 - the model has a compiled form
        learner.fused.settle()
        cpu_s += time.process_time() - begun
        scores.extend(float(each.served[0]) for each in said)
        labels.extend(float(payload[LABEL]) for _, payload in some)
    return Trace("", np.array(scores, np.float64), cpu_s), np.array(labels), _held(learner)


def _pass(number: int, payload: Mapping[str, Any], encoder: Featurizer, learner: Learner) -> Scores:
    """What will have been answered once the work is done."""
    time_s, origin = payload[TIME], Origin(EVENTS, 0, number)
    event = Event(str(number), payload["session"], time_s, encoder.encode(payload), origin, float(payload[LABEL]))
    encoded, said = learner.answer(event)
    ticket = Ticket(event.id, time_s, encoded, said, origin, "", event.key)
    assert learner.fused is not None  # noqa: S101 - as above
    learner.fused.learn(Outcome(ticket, float(payload[LABEL]), Fate.INLINE, 0.0))
    return said


def _held(learner: Learner) -> dict[str, float]:
    told = learner.read()
    assert learner.tables is not None  # noqa: S101 - every feature has one
    sums = {what: sum(told[f"table:{name}:{what}"] for name in learner.tables.names) for what in ("rows", "bytes")}
    each = {f"{name}_rows": told[f"table:{name}:rows"] for name in learner.tables.names}
    return {"rows": sums["rows"], "table_bytes": sums["bytes"], **each}


def _periods(folder: Path | None) -> list[Path]:
    if folder is None:
        raise DataError(f"task admission is recorded: --data DIR must name the folder that holds {YOOCHOOSE}")
    return [folder / YOOCHOOSE.replace("_0", f"_{period}") for period in range(PERIODS)]
