"""A sweep over topics: what a worker has learned in production is what its base learns again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamcl.sweep import run
from tests.kafka.conftest import Cluster
from tests.kafka.test_journey import EVENTS, answer, streamcl, write

OTHER = {"optimizer.learning_rate": [0.1]}


def test_over_two_topics_the_base_is_the_worker_that_ran(broker: Cluster, tmp_path: Path) -> None:
    """In the order of its control log; and so whether in one go or with a round in between."""
    write(broker, tmp_path, own_topic=True)
    ran = answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))
    for halving in ({}, {"halving": {"eta": 2, "first": 500}}):
        results = run({"grid": OTHER, **halving}, tmp_path / "config.toml", jobs=1)
        base = results.row("base")
        assert base.status == "finished"
        for name in ("examples", "log_loss", "calibration", "accuracy"):
            assert base.figures[name] == pytest.approx(ran["metrics"][name], abs=1e-9)


def test_a_topic_that_has_grown_is_another_log(broker: Cluster, tmp_path: Path) -> None:
    topics = write(broker, tmp_path, own_topic=False)
    first = run({"grid": OTHER}, tmp_path / "config.toml", out=tmp_path / "out", jobs=1)
    assert {row.figures["examples"] for row in first.rows} == {EVENTS}
    broker.produce(topics["events"], [(0, json.dumps({"id": -1, "ts": EVENTS, "clicked": 0}).encode(), EVENTS * 1000)])
    second = run({"grid": OTHER}, tmp_path / "config.toml", out=tmp_path / "out", jobs=1)
    assert {row.figures["examples"] for row in second.rows} == {EVENTS + 1}
    assert second.log.digest != first.log.digest
