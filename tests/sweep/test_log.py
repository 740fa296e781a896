from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from streamcl import backtest
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.state import digest
from streamcl.sweep.log import Log, begin, follow, scan
from streamcl.worker import Worker
from tests.sweep.logs import shop


def settings(path: Path) -> Config:
    return backtest.redirected(Config.load(path), {})


def followed(worker: Worker, log: Log, taken: int, until: int) -> int:
    return [now for _, now in follow(worker, log, taken, until)][-1]


@pytest.fixture(params=["inline", "late", "ordered"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Config, Log]:
    """A config and its log: one input; two, merged by time; two, in a logged order of 20 events a turn."""
    config = settings(shop(tmp_path, 200, late=request.param != "inline"))
    if request.param != "ordered":
        return config, scan(config)
    labels = len((tmp_path / "clicks.jsonl").read_text().splitlines())
    orders: list[dict[str, Any]] = []
    for at in range(0, 200, 20):
        upto = min(labels, at // 2 + 10) if at < 180 else labels
        before = orders[-1]["position"]["labels"]["0"] if orders else 0
        runs = [["events", 0, 20], ["labels", 0, upto - before]]
        orders.append({"runs": runs, "position": {"events": {"0": at + 20}, "labels": {"0": upto}}})
    (tmp_path / "order.jsonl").write_text("".join(json.dumps(order) + "\n" for order in orders))
    return config, scan(config, f"file://{tmp_path}/order.jsonl")


def test_a_scan_knows_how_much_there_is(read: tuple[Config, Log]) -> None:
    config, log = read
    assert log.events == 200
    assert log.records >= 200
    assert scan(config, log.order) == log


def test_all_of_it_is_what_replay_takes(read: tuple[Config, Log]) -> None:
    config, log = read
    if log.order is not None:
        return
    with contextlib.closing(backtest.build(config)) as worker, contextlib.closing(backtest.build(config)) as plain:
        begin(worker, log)
        assert followed(worker, log, 0, 200) == 200
        plain.progress.position = dict(plain.source.seek({}))
        for _ in plain.run():
            pass
        assert digest(worker.state_dict()) == digest(plain.state_dict())


def test_a_cut_changes_nothing(read: tuple[Config, Log]) -> None:
    """Stopped at a cut and gone on from its state elsewhere, it comes to the same as in one go."""
    config, log = read
    with contextlib.closing(backtest.build(config)) as whole:
        begin(whole, log)
        followed(whole, log, 0, 200)
        expected = digest(whole.state_dict())
    with contextlib.closing(backtest.build(config)) as first, contextlib.closing(backtest.build(config)) as second:
        begin(first, log)
        taken = followed(first, log, 0, 77)
        assert taken == (77 if log.order is None else 80)  # behind the order in which the event stands
        second.load_state_dict(first.state_dict())
        second.control_offset = first.control_offset
        second.source.seek(second.progress.position)
        followed(second, log, taken, 200)
        assert digest(second.state_dict()) == expected


def test_another_record_is_another_log(tmp_path: Path) -> None:
    path = shop(tmp_path, 50)
    before = scan(settings(path))
    file = tmp_path / "events.jsonl"
    file.write_text(file.read_text().replace('"clicked": 1', '"clicked": 0', 1))
    assert scan(settings(path)).digest != before.digest


def test_what_is_appended_later_is_not_taken(tmp_path: Path) -> None:
    config = settings(shop(tmp_path, 50))
    log = scan(config)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"id": "50", "ts": 50.0, "user": "u1", "price": 1.0, "clicked": 0}\n')
    with contextlib.closing(backtest.build(config)) as worker:
        begin(worker, log)
        assert followed(worker, log, 0, 50) == 50


def test_a_log_that_has_become_shorter_is_an_error(tmp_path: Path) -> None:
    config = settings(shop(tmp_path, 50))
    log = scan(config)
    (tmp_path / "events.jsonl").write_text("")
    with contextlib.closing(backtest.build(config)) as worker:
        begin(worker, log)
        with pytest.raises(ConnectorError, match="ends after 0 records; it had 50"):
            followed(worker, log, 0, 50)


def test_a_topic_in_memory_is_refused(tmp_path: Path) -> None:
    config = Config.load(shop(tmp_path, 1))
    redirected = backtest.redirected(config, {"events": "memory://x/y"})
    with pytest.raises(ConnectorError, match="other processes can't read it"):
        scan(redirected)


def test_an_empty_order_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "order.jsonl").write_text("")
    with pytest.raises(ConnectorError, match="no worker has logged an order"):
        scan(settings(shop(tmp_path, 10, late=True)), f"file://{tmp_path}/order.jsonl")
