"""`bench stream --task admission`: what tables that are bounded cost in AUC, on a stream whose ids never stop coming.

YOOCHOOSE's next clicks (see `streams.yoochoose`), with the session as a feature: most sessions never come back, so that
rows explode where nobody admits or drops any. The same model runs over the same events with an unbounded collisionless
table for each feature, with bounded ones, and with hashed ones of the bounded ones' size.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.bench.options import Options
from streamcl.bench.quality import Trace, quality
from streamcl.bench.report import Bar, Report, Row, progress
from streamcl.bench.streams import LABEL, NEXT_CLICK, TIME, YOOCHOOSE, DataError, clicks_of, next_clicks
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.records import EVENTS, Event, Fate, Origin, Outcome, Scores, Ticket

PERIODS = 17
CLICKS, QUICK_CLICKS = 300_000, 20_000
CHUNK = 500
"""Events answered and learned at once, as by a turn of the worker."""

UNBOUNDED = {name: {"max_rows": 1 << 20, "admission": "all"} for name in NEXT_CLICK}
BOUNDED: Mapping[str, Mapping[str, Any]] = {
    "session": {"max_rows": 2000, "admission": "all", "ttl_s": 20_000.0},
    "prev": {"max_rows": 4000, "admission": "all"},
    "item": {"max_rows": 4000, "admission": {"kind": "count", "threshold": 3}},
}
"""Event time is the number of the click: `ttl_s` is 20,000 clicks."""
MOST_LOST = 0.001
FEWER = 0.9


def run(options: Options) -> Report:
    start = time.perf_counter()
    count = options.count("events", 5 * (QUICK_CLICKS if options.quick else CLICKS)) // 5
    payloads = list(next_clicks(clicks_of(_periods(options.data), count)))
    labels = np.array([payload[LABEL] for payload in payloads], np.float64)
    rows, found = [], {}
    for name, tables in (("unbounded", UNBOUNDED), ("bounded", BOUNDED), ("hashed", None)):
        progress(f"{name}: {len(payloads)} events")
        trace, told = follow(payloads, tables)
        values = {
            **quality(labels, trace.scores),
            "events": len(labels),
            "events_per_s": round(trace.events_per_s, 1),
            **told,
        }
        found[name] = values
        rows.append(Row(name, values))
    lost = found["unbounded"]["auc"] - found["bounded"]["auc"]
    fewer = 1.0 - found["bounded"]["rows"] / found["unbounded"]["rows"]
    bars = [
        Bar("auc lost by bounds", lost, MOST_LOST, at_least=False),
        Bar("rows fewer", fewer, FEWER),
    ]
    return Report(
        bench="stream",
        config={"task": "admission", "clicks": count, "tables": dict(BOUNDED)},
        seeds=[0],
        seconds=time.perf_counter() - start,
        rows=rows,
        bars=() if options.quick else bars,
        aims=bars if options.quick else (),
        headline={"auc_lost": lost, "rows_fewer": fewer, "events": len(labels)},
        notes=[
            "every score was given before its label was learned from; rows: at the end; table_bytes: vectors, optimiser"
            " state, bookkeeping and filters; hashed: as many buckets for each feature as the bounded table has rows"
        ],
    )


def follow(payloads: list[dict[str, Any]], tables: Mapping[str, Any] | None) -> tuple[Trace, dict[str, float]]:
    """Answer and learn, a chunk at a time; scores, and rows and bytes of all tables in the end."""
    features = {
        name: {"kind": "categorical", **({"table": tables[name]} if tables else {"buckets": BOUNDED[name]["max_rows"]})}
        for name in NEXT_CLICK
    }
    base = {"name": "b", "events": {"url": "memory://b/e", "label": LABEL}, "features": features}
    config = Config.parse(base, "bench")
    encoder, learner = Featurizer(config), Learner(config)
    scores: list[Scores] = []
    begun = time.process_time()
    events = iter(enumerate(payloads))
    while some := list(itertools.islice(events, CHUNK)):
        for number, payload in some:
            time_s, label, origin = payload[TIME], float(payload[LABEL]), Origin(EVENTS, 0, number)
            event = Event(str(number), payload["session"], time_s, encoder.encode(payload), origin, label)
            encoded, said = learner.answer(event)
            scores.append(said)
            assert learner.fused is not None  # noqa: S101 - the model has a compiled form
            ticket = Ticket(event.id, time_s, encoded, said, event.origin, "", event.key)
            learner.fused.learn(Outcome(ticket, label, Fate.INLINE, 0.0))
        assert learner.fused is not None  # noqa: S101
        learner.fused.settle()
    trace = Trace("", np.array([said.served[0] for said in scores], np.float64), time.process_time() - begun)
    return trace, _held(learner)


def _held(learner: Learner) -> dict[str, float]:
    told, table = learner.read(), learner.engine.table
    if learner.tables is None:
        width = 2 * table.element_size() * table.shape[1]  # Adagrad's
        return {"rows": float(len(table)), "table_bytes": float(len(table) * width)}
    sums = {what: sum(told[f"table:{name}:{what}"] for name in learner.tables.names) for what in ("rows", "bytes")}
    each = {f"{name}_rows": told[f"table:{name}:rows"] for name in learner.tables.names}
    oov = {f"{name}_oov": told[f"table:{name}:oov_ratio"] for name in learner.tables.names}
    return {"rows": sums["rows"], "table_bytes": sums["bytes"], **each, **oov}


def _periods(folder: Path | None) -> list[Path]:
    if folder is None:
        raise DataError(f"task admission is recorded: --data DIR must name the folder that holds {YOOCHOOSE}")
    return [folder / YOOCHOOSE.replace("_0", f"_{period}") for period in range(PERIODS)]
