"""What a run has come to: each shard, and sums that do not depend on how the inputs were cut."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from connectors import memory
from streamcl import summary
from streamcl.host import FixedShards, Host
from streamcl.telemetry import Telemetry
from tests.journey import BROKER, fill, settings, view


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    memory.reset(BROKER)


def ended(folder: Path, shards: int) -> summary.Ended:
    fill([view(id, float(id), id % 2, clicked=id % 2) for id in range(20)], partitions=2)
    events = {"url": f"memory://{BROKER}/views", "id": "id", "time": "ts", "label": "clicked"}
    shard = {"count": shards, "indices": list(range(shards))}
    config = settings(folder, labels=None, events=events, shard=shard, telemetry={"port": 0})
    host = Host(config, FixedShards(config), Telemetry(config))
    for _ in host.run():
        pass
    return {seat.last: seat.readings for seat in host.seats.values() if seat.last}


def test_the_sums_are_the_same_however_the_inputs_are_cut(tmp_path: Path) -> None:
    whole, cut = ended(tmp_path / "1", 1), ended(tmp_path / "2", 2)
    config = next(iter(whole)).config
    assert summary.totals(config, whole) == summary.totals(config, cut)
    assert [summary.of_shard(*each)["records"] for each in cut.items()] == [10, 10]


def test_a_table_shows_counts_metrics_and_the_digest(tmp_path: Path) -> None:
    [(worker, readings)] = ended(tmp_path, 1).items()
    told = summary.of_shard(worker, readings)
    text = io.StringIO()
    Console(file=text, width=120).print(summary.table(told))
    for word in ("shop, shard 0: 20 records", "learned", "log_loss", told["state_digest"]):
        assert word in text.getvalue()


def test_a_reading_s_name_is_no_markup(tmp_path: Path) -> None:
    [(worker, readings)] = ended(tmp_path, 1).items()
    result = summary.of_shard(worker, {**readings, "segment:device:[/]:events": 3.0})
    console = Console(file=io.StringIO(), width=120)
    console.print(summary.table(result))
    assert "segment:device:[/]:events" in console.file.getvalue()  # type: ignore[attr-defined]
