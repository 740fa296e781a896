"""The table of metrics against what workers really export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric

from streamcl.config import Config
from streamcl.families import families
from streamcl.host import FixedShards, Host
from streamcl.readings import MOST_FAMILIES, MOST_SERIES, Reported, Shards
from streamcl.records import DeadLetter, Origin, Record, Signal, Stream, Turn
from streamcl.sampled import LABELS
from streamcl.telemetry import Telemetry
from tests.journey import Item, click, fill, settings, view

KNOWN = {family.name: family for family in families()}
ELSEWHERE = {
    **dict.fromkeys(
        (
            "brokers_away",
            "commit_failures",
            "poll_retries",
            "producer_inflight_bytes",
            "producer_inflight_records",
            "producer_rebuilds",
            "producer_rejections",
            "outcomes_inflight_bytes",
            "outcomes_inflight_records",
            "outcomes_rebuilds",
            "outcomes_rejections",
        ),
        "told by connectors on brokers",
    ),
    **dict.fromkeys(("feature_psi", "sampled_ne_recalibrated"), "needs more events than a short run has"),
    "live_decile_calibration": "of a shadow",
    **{
        name.removeprefix("streamcl_"): "of the ranks of a group"
        for name in KNOWN
        if name.startswith("streamcl_group_") and name != "streamcl_group_rebalances"  # a consumer group's
    },
}
EVERYTHING: dict[str, Any] = {
    "telemetry": {"port": 1, "sample_every": 1},
    "features": {
        "user": {"kind": "categorical", "table": {"max_rows": 4}},
        "item": {"kind": "categorical", "buckets": 5},
        "price": "numeric",
    },
    "error_memory": [{"kind": "key", "key": "user"}],
    "plasticity": [{"kind": "continual_backprop"}],
    "diagnostics": {"sample_every_steps": 1, "window": 8, "report_every_steps": 8},
    "boundaries": [{"kind": "clock", "every_s": 50.0}],
    "metrics": {
        "window": 16,
        "group_by": "user",
        "segments": ["item"],
        "ranking": {"group_by": "user", "k": [2], "max_items": 5},
    },
}
PLAIN: dict[str, Any] = {"telemetry": {"port": 1, "sample_every": 1}}
RUNS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "regression": {**PLAIN, "task": "regression", "error_memory": [{"kind": "key", "key": "user"}]},
    "tasks": {**PLAIN, "tasks": {"like": {"label": "like", "default": 0}}},
    "recurrent": {**PLAIN, "model": {"kind": "recurrent", "embedding_dim": 2, "hidden": [4]}},
    "published": {**PLAIN, "join": {"attribution_window_s": 10.0, "memory_tickets": 4, "orphan_s": 5.0}},
}


def traffic() -> list[Item]:
    items: list[Item] = []
    for id in range(300):
        items.append(view(id, float(id), user=id % 7, item=id % 3))
        items += [click(id, id + 0.5, like=id % 3 // 2)] if id % 2 else []
    return [*items, view(1000, 500.0)]


def exported(config: Config) -> dict[str, Metric]:
    """By name, of scrapes all along a run."""
    telemetry, found = Telemetry(config), dict[str, Metric]()
    host = Host(config, FixedShards(config), telemetry)
    for number, _ in enumerate(host.run()):
        for seat in host.seats.values():
            if seat.life:
                seat.life.tells_at = 0.0  # tell with every turn
        if number % 20 == 0:
            metrics = [metric for metric in telemetry.registry.collect() if metric.samples]
            found |= {f"{m.name}_total" if m.type == "counter" else m.name: m for m in metrics}
    return found


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metric]:
    """By name, of all runs."""
    found: dict[str, Metric] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamcl.sampled.FIRST", 1 - LABELS)  # a short run shall be enough
        for name, tables in RUNS.items():
            fill(traffic())
            folder = tmp_path_factory.mktemp(name)
            deltas = {"deltas": {"url": f"file://{folder}/deltas", "every_events": 50}} if name == "published" else {}
            found |= exported(settings(folder, **tables, **deltas))
    return found


def test_every_family_of_a_worker_stands_in_the_table(scraped: dict[str, Metric]) -> None:
    assert scraped.keys() - KNOWN.keys() == set()


def test_type_text_and_labels_are_those_of_the_table(scraped: dict[str, Metric]) -> None:
    for name, metric in scraped.items():
        labels = {label for sample in metric.samples for label in sample.labels} - {"le", "shard", "role"}
        family = KNOWN[name]
        assert (metric.type, metric.documentation, labels) == (family.kind, family.text, set(family.labels)), name


def test_every_family_of_the_table_is_exported(scraped: dict[str, Metric]) -> None:
    told = {name for name, family in KNOWN.items() if family.of != "endpoint"}
    missing = {name.removeprefix("streamcl_") for name in told - scraped.keys()}
    assert missing == ELSEWHERE.keys()


def test_every_unit_is_a_base_unit() -> None:
    units = {"s", "Unix time, s", "bytes", "ratio", "count", "nats", "of the label", "steps", "1"}
    assert {family.unit for family in KNOWN.values()} <= units


def labelled(told: Shards) -> dict[str, int]:
    """Series by family."""
    return {family.name: len(family.samples) for family in told.collect()}


def test_a_flood_of_values_costs_a_bounded_number_of_series() -> None:
    told = Shards(labelled=False)
    told.by_index[0] = reported = Reported()
    flood = range(10_000)
    reported.lag = reported.position = {Stream("events", partition): 1 for partition in flood}
    reported.readings = (
        {f"feature:{n}:psi": 0.0 for n in flood}
        | {f"table:{n}:rows": 1.0 for n in flood}
        | {f"mine_{n}": 1.0 for n in flood}
    )
    series = labelled(told)
    assert max(series.values()) == MOST_SERIES
    assert sum(name.startswith("streamcl_mine_") for name in series) == MOST_FAMILIES
    [dropped] = [family.samples[0].value for family in told.collect() if family.name == "streamcl_series_dropped"]
    assert dropped == 4 * (10_000 - MOST_SERIES) + 10_000 - MOST_FAMILIES


def test_what_others_name_makes_no_series_of_its_own() -> None:
    telemetry = Telemetry(settings(Path("unused"), telemetry={"port": 0}))
    before = sum(len(metric.samples) for metric in telemetry.registry.collect())
    for n in range(500):
        origin = Origin("events", 0, n)
        letter = DeadLetter(Record(origin, "views", 0.0, b"{"), f"reason-{n}", "of a codec from elsewhere")
        turn = Turn(1, {}, dead_letters=(letter,), signals=(Signal("drift", f"source-{n}", origin),))
        telemetry.observe(turn, seconds=0.0, lag={}, readings={})
    after = sum(len(metric.samples) for metric in telemetry.registry.collect())
    assert after <= before + 20
    assert telemetry.registry.get_sample_value("streamcl_dead_letters_total", {"reason": "other"}) == 500
