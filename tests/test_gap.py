"""Retention was faster: stop and say so, or leap over the gap as `kafka.on_gap` says, counted and logged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from connectors import memory
from streamcl import connect
from streamcl.config import Config
from streamcl.protocols import Gap, StreamclError
from streamcl.records import Stream
from streamcl.recovery import Keeper, store_of
from streamcl.worker import build, logged
from tests.journey import BROKER, die_after, fill, finish, repeat, settings
from tests.test_recovery import STREAM

EVENTS = Stream("events", 0)


def overtaken(folder: Path, **changes: Any) -> tuple[Config, int]:
    """A worker died some turns behind its snapshot, and retention ate what it would read again."""
    broker = fill(STREAM)
    config = settings(folder, **changes)
    die_after(config, 6)
    loaded = store_of(config).newest()
    assert loaded is not None
    wanted = int(loaded.manifest["position"]["events"]["0"])
    broker.trim("views", 0, wanted + 5)
    return config, wanted


def test_by_default_it_stops_and_names_what_is_missing(tmp_path: Path) -> None:
    config, wanted = overtaken(tmp_path)
    with pytest.raises(Gap, match=f"views, partition 0: offset {wanted}") as gap:
        finish(config)
    assert (gap.value.wanted, gap.value.available) == ({EVENTS: wanted}, {EVENTS: wanted + 5})


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize(("policy", "skipped"), [("earliest", 5), ("latest", None)])
def test_a_leap_goes_on_behind_the_gap(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, policy: str, skipped: int | None
) -> None:
    config, wanted = overtaken(tmp_path, kafka={"on_gap": policy}, delivery={"mode": mode})
    end = len(memory.broker(BROKER).messages("views"))
    with caplog.at_level(logging.ERROR):
        done = finish(config)
    expected = skipped if skipped is not None else end - wanted
    assert done.worker.counts["skipped"] == expected
    assert f"{expected} records are skipped" in caplog.text
    assert done.worker.progress.position[EVENTS] == end
    # Each event is either learned from once, or among the skipped ones, or waits, whatever the void orders had said.
    assert done.worker.counts["predicted"] == end - expected
    if mode == "exactly_once":
        inputs = [dict(message.headers)["streamcl-input"] for message in done.scores]
        assert len(inputs) == len(set(inputs))


def test_a_backtest_of_the_whole_log_leaps_where_the_worker_did(tmp_path: Path) -> None:
    config, _ = overtaken(tmp_path, kafka={"on_gap": "earliest"})
    done = finish(config)
    memory.broker(BROKER).trim("views", 0, 0)  # an archive has kept everything
    control = connect.open_control(config)
    assert [order.leap for _, order in logged(control, 0)].count(None) < len(list(control.read(0))) - 1
    whole = repeat(config)
    assert whole.worker.progress.learned == done.worker.progress.learned
    skipped = done.worker.counts.pop("skipped")
    assert skipped == 5
    assert whole.worker.counts == done.worker.counts


def test_a_partition_that_no_snapshot_names_is_refused(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    die_after(config, 6)
    fill(STREAM, partitions=2)
    worker = build(config)
    worker.control = None  # of the topics that were made anew
    with pytest.raises(StreamclError, match=r"events partition 1, labels partition 1 came after.*streamcl reshard"):
        Keeper(worker, store_of(config)).restore()
