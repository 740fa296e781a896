"""Benches that need a broker, as small as they go: that they run, and that what they must find is found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import pytest

from streamcl.bench import peer_python, worker, worker_clicks_kafka
from streamcl.bench.brokers import Broker
from streamcl.bench.options import Options
from streamcl.bench.quix_clicks import Learning
from streamcl.bench.step_plain import FIELDS, ROWS, Torch
from streamcl.bench.worker_clicks import Clicks

if TYPE_CHECKING:
    from tests.kafka.conftest import Cluster


def test_worker_measures_every_path_on_a_broker(broker: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "QUICK", (1_200, 1))
    monkeypatch.setenv(peer_python.PYTHON, "/nowhere/python")
    report = worker.run(Options(task="kafka", quick=True, via=broker.url))
    assert [row.name for row in report.rows][:3] == [
        *("bare kafka-python loop", "streamcl on memory://", "streamcl on kafka-python"),
    ]
    assert all(float(row.values["us_per_event"] or 0) > 0 for row in report.rows)
    assert any("Quix Streams, Bytewax and Faust are missing" in note for note in report.notes)


def test_worker_learns_from_clicks_on_a_broker_with_each_client(
    broker: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("confluent_kafka", reason="streamcl[librdkafka] is not installed")
    monkeypatch.setenv(peer_python.PYTHON, "/nowhere/python")
    report = worker.run(Options(task="clicks-kafka", quick=True, via=broker.url))
    assert [row.name for row in report.rows] == [
        f"clicks on Kafka, {replay}: {engine} on {client}"
        for replay in ("no replay", "8 rows and cbp")
        for client in ("kafka-python", "librdkafka")
        for engine in ("plain torch", "streamcl fused")
    ]
    assert all(float(row.values["us_per_event"] or 0) > 0 for row in report.rows)
    assert report.config["broker"] == "given"
    assert any("quix streams with plain torch is missing: `make peers`" in note for note in report.notes)


@pytest.mark.skipif(not peer_python.versions(*worker_clicks_kafka.QUIX), reason="no Quix Streams: `make peers`")
def test_quix_streams_answers_each_click_as_the_same_model_does_here(broker: Cluster) -> None:
    place = Broker("given", broker.url)
    made: list[str] = []

    def new_topic() -> str:
        made.append(place.new_topic("clicks"))
        return made[-1]

    stage = Clicks(600, new_topic)
    taken = worker_clicks_kafka.through_quix(stage, place, 0, 600)
    assert taken.wall_s > 0.0 and taken.cpu_s > 0.0
    said = [orjson.loads(record.value) for record in broker.read(made[-1].rpartition("/")[2])]
    here = Learning(Torch(), FIELDS, ROWS // FIELDS)
    assert said == [here(orjson.loads(message)) for message in stage.messages]
