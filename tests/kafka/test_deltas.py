"""Deltas on a broker: a worker that was killed has told each change, and a replica serves what the worker learned."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from connectors import kafka
from connectors.codec import JSON
from streamcl.channel import open_reader
from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.delta import served
from streamcl.follow import Follower
from streamcl.learner import Learner
from streamcl.protocols import ConnectorError
from streamcl.recovery import store_of
from streamcl.replica import Predictor
from streamcl.state import digest
from tests.kafka.conftest import Cluster
from tests.kafka.test_journey import EVENTS, answer, kill_once_saved, streamcl, write

CASES = {
    "exactly once, kafka-python": ("apache_kafka", "kafka-python", "exactly_once"),
    "exactly once, librdkafka": ("apache_kafka", "librdkafka", "exactly_once"),
    "at least once, embedded broker": ("broker", "kafka-python", "at_least_once"),
}


def learner_of(predictor: Predictor) -> Learner:
    learner = predictor.current().learner
    assert isinstance(learner, Learner)
    return learner


@pytest.mark.parametrize(
    ("cluster", "mode"), [((b, c), m) for b, c, m in CASES.values()], ids=list(CASES), indirect=["cluster"]
)
def test_deltas_of_a_killed_worker_bring_a_replica_to_what_it_has_learned(
    cluster: Cluster, tmp_path: Path, mode: str
) -> None:
    write(cluster, tmp_path, own_topic=False, mode=mode)
    path = tmp_path / "config.toml"
    path.write_text(f'{path.read_text()}\n[deltas]\nurl = "{cluster.url}/{cluster.name()}"\nevery_events = 40\n')
    config = Config.load(path)
    kill_once_saved(tmp_path)
    snapshots = Path(shutil.copytree(store_of(config).folder, tmp_path / "at-the-kill"))
    assert answer(streamcl(tmp_path, "run", "--idle-exit-s", "3"))["counts"]["learned"] == EVENTS

    assert config.deltas_url
    follower = Follower(open_reader(config.deltas_url, config))
    predictor = Predictor(Store(snapshots), JSON(), None, follower)
    predictor.refresh()
    begun = predictor.current().about["records"]
    last = Predictor(store_of(config), JSON())
    last.refresh()
    told = follower.read()
    predictor.close()
    assert begun == last.current().about["records"] == EVENTS  # a whole number of deltas: the last is the end
    assert digest(served(learner_of(predictor))) == digest(served(learner_of(last)))
    assert told["deltas_gaps"] == 0.0


def test_check_refuses_a_topic_of_deltas_with_several_partitions(broker: Cluster, tmp_path: Path) -> None:
    write(broker, tmp_path, own_topic=False)
    path, wide = tmp_path / "config.toml", broker.topic(2)
    path.write_text(f'{path.read_text()}\n[deltas]\nurl = "{broker.url}/{wide}"\n')
    program = [sys.executable, "-m", "streamcl.cli", "check", str(path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "it needs 1 partition, this topic has 2" in done.stderr) == (1, True), done.stderr
    with pytest.raises(ConnectorError, match="it needs 1 partition"):
        kafka.open_sink(f"{broker.url}/{wide}", Config.load(path))
    path.write_text(path.read_text().replace(wide, broker.name()))
    done = subprocess.run([*program, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert any(line.endswith("will be made") for line in json.loads(done.stdout)["findings"])
