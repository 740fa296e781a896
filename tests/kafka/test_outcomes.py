"""Outcomes on a broker: a worker that was killed has told each, and a replica remembers what a loop over them would."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from connectors import kafka
from connectors.codec import JSON
from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.messages import NUMBER, outcome_message, outcome_of
from streamcl.outcomes import Outcomes
from streamcl.protocols import ConnectorError
from streamcl.recovery import store_of
from streamcl.replica import Predictor
from tests.kafka.conftest import CLIENTS, Cluster
from tests.kafka.test_journey import EVENTS, answer, kill_once_saved, published, streamcl, write
from tests.test_outcomes import begun, oracle, remembered, same, told

CASES = {
    "exactly once, kafka-python": ("apache_kafka", "kafka-python", "exactly_once"),
    "exactly once, librdkafka": ("apache_kafka", "librdkafka", "exactly_once"),
    "at least once, embedded broker": ("broker", "kafka-python", "at_least_once"),
}


@pytest.mark.parametrize(
    ("cluster", "mode"), [((b, c), m) for b, c, m in CASES.values()], ids=list(CASES), indirect=["cluster"]
)
def test_outcomes_of_a_killed_worker_make_the_memory_of_a_replica(cluster: Cluster, tmp_path: Path, mode: str) -> None:
    write(cluster, tmp_path, own_topic=False, mode=mode)
    topic, path = cluster.name(), tmp_path / "config.toml"
    memory = (
        '[[error_memory]]\nkind = "key"\nkey = "user"\nlambda = 0.5\n[[error_memory]]\nkind = "knn"\nlambda = 0.5\n'
    )
    path.write_text(f'outcomes = "{cluster.url}/{topic}"\n{path.read_text()}\n{memory}')
    config = Config.load(path)
    kill_once_saved(tmp_path)
    snapshots = Path(shutil.copytree(store_of(config).folder, tmp_path / "at-the-kill"))
    assert answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))["counts"]["learned"] == EVENTS

    assert config.outcomes_url
    assert cluster.changed(topic).get("cleanup.policy") is None
    told = [(int(dict(m.headers)[NUMBER]), m.value) for m in published(cluster, topic)]
    assert list(dict.fromkeys(number for number, _ in told)) == list(range(1, EVENTS + 1))
    assert len(set(told)) == EVENTS  # what was told twice was the same twice
    if mode == "exactly_once":
        assert len(told) == EVENTS

    outcomes = Outcomes(config.outcomes_url, config)
    predictor = Predictor(Store(snapshots), JSON(), outcomes)
    predictor.refresh()
    read = outcomes.read()
    outcomes.close()
    number = predictor.current().outcomes
    assert number >= 300
    assert (read["outcomes_applied"], read["outcomes_gaps"], read["outcomes_failures"]) == (EVENTS - number, 0.0, 0.0)
    layout = Featurizer(config).layout
    learned = {number: outcome_of(value, layout) for number, value in told}
    same(remembered(predictor.model), oracle(snapshots, [learned[number] for number in sorted(learned)]))


def test_a_topic_of_outcomes_with_several_partitions_is_refused_and_a_missing_one_made(broker: Cluster) -> None:
    wide, missing = broker.topic(2), broker.name()
    config = broker.config(broker.topic(), outcomes=f"{broker.url}/{wide}")
    for does in (
        lambda: kafka.open_sink(f"{broker.url}/{wide}", config),
        lambda: kafka.check(config.published, config),
    ):
        with pytest.raises(ConnectorError, match="it needs 1 partition, this topic has 2"):
            does()
    config = broker.config(broker.topic(), outcomes=f"{broker.url}/{missing}")
    kafka.open_sink(f"{broker.url}/{missing}", config).close()
    assert kafka.check(config.published, config)[1].endswith(f"{missing}: 1 partition(s), offsets 0: 0 to 0")


@pytest.mark.parametrize("cluster", [("broker", client) for client in CLIENTS], indirect=True)
def test_while_its_broker_hangs_a_replica_answers_and_then_reads_on(cluster: Cluster, tmp_path: Path) -> None:
    recorded, [first, _] = begun(tmp_path, 20, 60)
    learned = [outcome_message(each, 1 << 20) for each in told(recorded)[20:]]
    url = f"{cluster.url}/{cluster.name()}"
    config = cluster.config(cluster.topic(), outcomes=url, kafka={"request_timeout_s": 3.0})
    sink = kafka.open_sink(url, config)
    sink.send(learned[:25])
    sink.flush()
    outcomes = Outcomes(url, config)
    predictor = Predictor(Store(first), JSON(), outcomes)
    predictor.refresh()
    assert outcomes.applied == 25
    following = threading.Thread(target=predictor.follow, args=(0.2,))
    following.start()
    try:
        with cluster.frozen():
            until = time.monotonic() + 8.0
            while time.monotonic() < until:
                began = time.monotonic()
                assert predictor.current().predict({"user": 1})["score"]
                assert time.monotonic() - began < 0.5
                time.sleep(0.05)
        sink.send(learned[25:])
        sink.flush()
        until = time.monotonic() + 30.0
        while outcomes.applied < 40 and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        predictor.close()
        following.join()
        sink.close()
    assert (outcomes.applied, outcomes.gaps) == (40, 0)
    same(remembered(predictor.model), oracle(first, told(recorded)))
