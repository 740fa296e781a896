"""What a worker says of its predictions is what anybody can compute from what it was given and what it published."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from connectors import memory
from streamcl.config import Config
from streamcl.readings import Reported, Shards
from streamcl.state import digest
from streamcl.worker import Worker
from tests.journey import BROKER, COMMANDS_URL, Item, click, die_after, fill, finish, order, repeat, settings, view

DEVICES = ("ios", "web", "tv", "fridge", "car")
FEATURES = {
    "user": {"kind": "categorical", "buckets": 13},
    "device": {"kind": "categorical", "buckets": 2},  # a row says nothing: names are told apart nevertheless
    "price": "numeric",
}
MEASURED: dict[str, Any] = {
    "window": 30,
    "half_life": 8.0,
    "group_by": "user",
    "segments": ["device"],
    "max_segments": 3,
    "ranking": {"group_by": "request", "k": [1, 2], "max_items": 50, "max_open": 1},
}


class Seen(NamedTuple):
    user: str
    device: str
    request: str
    score: float
    label: int


def views(count: int, **fields: Any) -> list[Item]:
    """Four to a request; every seventh says no device."""
    made = []
    for n in range(count):
        more: dict[str, Any] = {"device": DEVICES[n * n % 5]} if n % 7 else {}
        made.append(view(n, float(n), request=f"r{n // 4}", **more, **{k: v(n) for k, v in fields.items()}))
    return made


def seen(items: Iterable[Item], labels: dict[str, int]) -> list[Seen]:
    """Of each event whose label is known, in the order of the events."""
    scores = {
        (body := json.loads(m.value or b""))["id"]: body["score"] for m in memory.broker(BROKER).messages("scores")
    }
    payloads = [json.loads(item.value) for item in items]
    return [
        Seen(str(p["user"]), p.get("device", "missing"), p["request"], scores[p["id"]], labels[p["id"]])
        for p in payloads
        if p["id"] in labels
    ]


def loss(rows: Sequence[Seen]) -> float:
    return -sum(math.log(r.score if r.label else 1 - r.score) for r in rows) / len(rows)


def ne(rows: Sequence[Seen]) -> float:
    rate = sum(r.label for r in rows) / len(rows)
    return loss(rows) / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan


def calibration(rows: Sequence[Seen]) -> float:
    positives = sum(r.label for r in rows)
    return sum(r.score for r in rows) / positives if positives else math.nan


def auc(rows: Sequence[Seen]) -> float:
    pairs = [(p.score, n.score) for p in rows if p.label for n in rows if not n.label]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs) if pairs else math.nan


def by_segment(rows: Sequence[Seen], all_rows: Sequence[Seen]) -> dict[str, float]:
    own = list(dict.fromkeys(r.device for r in all_rows))[:3]
    found: dict[str, float] = {}
    for name in (*own, "other"):
        of = [r for r in rows if (r.device if r.device in own else "other") == name]
        if of:
            told = {"events": len(of), "log_loss": loss(of), "ne": ne(of), "calibration": calibration(of)}
            told |= {"auc": auc(of), "base_rate": sum(r.label for r in of) / len(of)}
            found |= {f"segment:device:{name}:{what}": value for what, value in told.items()}
    return found


def grouped(rows: Sequence[Seen]) -> dict[str, float]:
    groups = [[r for r in rows if r.user == user] for user in {r.user for r in rows}]
    both = [g for g in groups if len({r.label for r in g}) == 2]
    judged = sum(map(len, both))
    return {
        "gauc_window": sum(len(g) * auc(g) for g in both) / judged,
        "gauc_left_out_window": 1 - judged / len(rows),
    }


def ranked(rows: Sequence[Seen]) -> dict[str, float]:
    """Of the lists that another has followed."""
    requests = list(dict.fromkeys(r.request for r in rows))[:-1]
    lists = [[r for r in rows if r.request == request] for request in requests]
    both = [each for each in lists if len({r.label for r in each}) == 2]
    found: dict[str, float] = {}
    for k in (1, 2):
        sums = [0.0, 0.0, 0.0]
        for each in both:
            order = sorted(each, key=lambda r: (-r.score, r.label))
            positives = sum(r.label for r in each)
            gain = sum(r.label / math.log2(i + 2) for i, r in enumerate(order[:k]))
            sums[0] += gain / sum(1 / math.log2(i + 2) for i in range(min(k, positives)))
            sums[1] += sum(r.label for r in order[:k]) / positives
            sums[2] += max((1 / (i + 1) for i, r in enumerate(order[:k]) if r.label), default=0.0)
        found |= {f"ranking_{w}_at_{k}": s / len(both) for w, s in zip(("ndcg", "recall", "mrr"), sums, strict=True)}
    left_out = 1 - len(both) / len(lists)
    return found | {"ranking_lists": len(lists), "ranking_left_out": left_out, "ranking_open": 1}


def parts(rows: Sequence[Seen], count: int) -> list[list[Seen]]:
    ranked, found = sorted(rows, key=lambda r: r.score), []
    for part in range(count):
        size = len(rows) // count + (part < len(rows) % count)
        found.append(ranked[:size])
        ranked = ranked[size:]
    return found


def shift(rows: Sequence[Seen]) -> float:
    """By halving."""
    low, high, goal = -40.0, 40.0, sum(r.label for r in rows)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(r.score, middle) for r in rows) < goal else (low, middle)
    return low


def moved(score: float, by: float) -> float:
    return 1 / (1 + (1 - score) / score * math.exp(-by))


def expected(rows: Sequence[Seen]) -> dict[str, float]:
    last, before, n = rows[-30:], rows[-60:-30], len(rows)
    found = by_segment(last, rows) | grouped(last) | ranked(rows)
    gaps = [abs(sum(r.score - r.label for r in part)) for part in parts(last, 15)]
    found["ece_window"] = sum(gaps) / len(last)
    found |= {f"decile_calibration_{i}": calibration(part) for i, part in enumerate(parts(last, 10), 1)}
    by = shift(before)
    found["ne_recalibrated_window"] = ne([r._replace(score=moved(r.score, by)) for r in last])
    weights = [2.0 ** (-(n - 1 - i) / 8.0) for i in range(n)]
    rate = sum(w * r.label for w, r in zip(weights, rows, strict=True)) / sum(weights)
    decayed = sum(w * loss([r]) for w, r in zip(weights, rows, strict=True)) / sum(weights)
    found |= {"log_loss_decayed": decayed, "base_rate_decayed": rate, "log_loss": loss(rows), "ne": ne(rows)}
    found["ne_decayed"] = decayed / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    found["calibration_decayed"] = sum(w * r.score for w, r in zip(weights, rows, strict=True)) / sum(weights) / rate
    return {name: value for name, value in found.items() if math.isfinite(value)}


def measured(folder: Path, engine: str = "auto", **changes: Any) -> Config:
    worker = {"max_records": 5, "poll_timeout_s": 0.01, "engine": engine}
    return settings(folder, **{"features": FEATURES, "metrics": MEASURED, "worker": worker, **changes})


def told(worker: Worker, names: Iterable[str]) -> dict[str, float]:
    readings = worker.readings()
    return {name: readings[name] for name in names}


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_every_figure_follows_from_the_published_predictions(tmp_path: Path, engine: str) -> None:
    items = views(90, clicked=lambda n: n * n * 7 % 11 < 4)
    fill(items)
    events = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}
    worker = finish(measured(tmp_path, engine, events=events, labels=None)).worker
    assert bool(worker.fused) == (engine == "fused")
    rows = seen(items, {str(n): int(n * n * 7 % 11 < 4) for n in range(90)})
    found = expected(rows)
    assert told(worker, found) == pytest.approx(found, rel=1e-5, abs=1e-7)
    beside = {name for name in worker.readings() if name.startswith(("segment", "gauc", "decile", "ranking"))}
    assert beside - found.keys() == {"ranking_list_events"}


def late(count: int) -> tuple[list[Item], set[int]]:
    """Views, and clicks on some of them that come one to nine seconds later."""
    clicked = {n for n in range(count) if n * n * 7 % 11 < 4}
    clicks = [click(n, n + 1.5 + n % 9) for n in sorted(clicked)]
    return sorted([*views(count), *clicks], key=lambda item: item.time_s), clicked


@pytest.mark.parametrize("memory_tickets", [2, 1000])
@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_what_waits_on_disk_is_told_apart_as_well(tmp_path: Path, engine: str, memory_tickets: int) -> None:
    """Over all labels, so that their order does not matter; the lists wait for their negatives."""
    items, clicked = late(80)
    fill(items)
    ranking = {**MEASURED["ranking"], "max_open": 1000, "max_items": 4}
    metrics = {**MEASURED, "window": 1000, "max_segments": 50, "ranking": ranking}
    join = {"attribution_window_s": 10.0, "orphan_s": 5.0, "memory_tickets": memory_tickets}
    worker = finish(measured(tmp_path, engine, metrics=metrics, join=join)).worker
    waiting = {origin.offset for origin in worker.joiner.origins()}
    labels = {str(n): int(n in clicked) for n in range(80) if n not in waiting}
    assert len(labels) > 60
    rows = seen([item for item in items if item.topic == "views"], labels)
    found = {**grouped(rows)}
    for device in {r.device for r in rows}:
        of = [r for r in rows if r.device == device]
        found |= {f"segment:device:{device}:auc": auc(of), f"segment:device:{device}:events": len(of)}
    lists = [[r for r in rows if r.request == request] for request in {r.request for r in rows}]
    full = [each for each in lists if len(each) == 4]
    both = [each for each in full if len({r.label for r in each}) == 2]
    best = [min(each, key=lambda r: (-r.score, r.label)) for each in both]
    found |= {"ranking_mrr_at_1": sum(r.label for r in best) / len(both), "ranking_lists": len(full)}
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    assert told(worker, found) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("turns", [1, 4, 9, 16, 22])
def test_a_killed_worker_tells_the_same_to_the_bit(tmp_path: Path, turns: int) -> None:
    items, _ = late(60)
    items += [order("r-1", 30.25, key="3")]
    fill(sorted(items, key=lambda item: item.time_s))
    join = {"attribution_window_s": 10.0, "orphan_s": 5.0, "memory_tickets": 4}
    config = measured(tmp_path, join=join, commands=COMMANDS_URL)
    die_after(config, turns)
    done, again = finish(config), repeat(config)
    assert done.digest == again.digest
    assert digest(done.worker.slices.state_dict()) == digest(again.worker.slices.state_dict())
    names = [name for name in again.worker.readings() if name.startswith(("segment", "gauc", "ranking"))]
    assert len(names) > 20
    assert told(done.worker, names) == told(again.worker, names)
    assert again.worker.counts["forgotten_rows"] > 0


def test_what_is_measured_may_change_at_a_clean_stop(tmp_path: Path) -> None:
    """Tickets that wait say what they were made to say; a part with other settings begins anew."""
    broker = fill(views(60))
    plain = finish(measured(tmp_path, metrics={"window": 30})).worker
    assert not any(name.startswith(("segment", "gauc", "ranking")) for name in plain.readings())
    for item in [item for item in views(90) if item.time_s >= 60.0]:
        broker.produce("views", item.value, time_s=item.time_s)
    worker = finish(measured(tmp_path)).worker
    readings = worker.readings()
    assert readings["examples"] == 79
    assert sum(v for n, v in readings.items() if n.startswith("segment") and n.endswith(":events")) == 30
    assert readings["segment:device:missing:events"] >= 11  # of those that waited


def test_prometheus_has_a_bounded_number_of_series(tmp_path: Path) -> None:
    items = [view(n, float(n), device=f"d{n}", request="r") for n in range(60)]
    fill(items)
    worker = finish(measured(tmp_path, metrics={**MEASURED, "max_segments": 4})).worker
    shards = Shards(labelled=False)
    shards.by_index[0] = Reported()
    shards.by_index[0].readings = worker.readings()
    families = {family.name: family for family in shards.collect()}
    values = {sample.labels["value"] for sample in families["streamcl_segment_log_loss"].samples}
    assert values <= {"d0", "d1", "d2", "d3", "other"}
    assert not [name for name in families if "d1" in name or "device" in name]
