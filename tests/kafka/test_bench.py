"""Benches that need a broker, as small as they go: that they run, and that what they must find is found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamcl.bench import worker
from streamcl.bench.options import Options

if TYPE_CHECKING:
    from tests.kafka.conftest import Cluster


def test_worker_measures_every_path_on_a_broker(broker: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "QUICK", (600, 1))
    monkeypatch.setenv(worker.PEERS_PYTHON, "/nowhere/python")
    report = worker.run(Options(task="kafka", quick=True, via=broker.url))
    assert [row.name for row in report.rows][:3] == [
        *("bare kafka-python loop", "streamcl on memory://", "streamcl on kafka-python"),
    ]
    assert all(float(row.values["us_per_event"] or 0) > 0 for row in report.rows)
    assert any("Quix Streams, Bytewax and Faust are missing" in note for note in report.notes)
