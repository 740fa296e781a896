"""A worker that is asked while it learns learns the same, and what it answers is of a state between two records."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

from streamcl.config import ConfigError
from streamcl.gate import Gate
from streamcl.live import Live
from streamcl.recovery import Keeper, store_of
from streamcl.replica import Unready
from streamcl.state import digest
from streamcl.worker import build
from tests.journey import click, fill, finish, settings, view
from tests.serving import listening

STREAM = [item for i in range(400) for item in (view(i, float(i)), click(i, i + 0.5))]
ASKED = {"instances": [{"user": user, "price": 1.0} for user in range(5)]}


def test_state_and_predictions_are_bit_for_bit_those_of_a_worker_that_nobody_asks(tmp_path: Path) -> None:
    fill(STREAM)
    alone = finish(settings(tmp_path / "alone"))

    broker = fill(STREAM)
    config = settings(tmp_path / "asked")
    worker = build(config)
    keeper = Keeper(worker, store_of(config), beside=False)
    keeper.restore()
    answers: list[httpx.Response] = []
    end = threading.Event()
    with listening(Live(config, lambda: worker), config) as endpoint:

        def ask() -> None:
            with httpx.Client(base_url=endpoint.url) as client:
                while not end.is_set():
                    answers.append(client.post("/v1/predict", json=ASKED))

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in keeper.run():
            pass
        end.set()
        for thread in threads:
            thread.join(timeout=10)
    assert digest(worker.state_dict()) == alone.digest
    assert broker.messages("scores") == alone.scores
    versions = {answer.json()["model"]["version"] for answer in answers if answer.status_code == 200}
    assert len(versions) > 3  # answered while it learned
    assert {answer.status_code for answer in answers} <= {200, 503}  # 503 until it had caught up


def test_the_live_model_scores_as_the_worker_does_and_describes_itself(tmp_path: Path) -> None:
    fill(STREAM[:40])
    config = settings(tmp_path)
    result = finish(config)
    with listening(Live(config, lambda: result.worker), config) as endpoint:
        score = httpx.post(f"{endpoint.url}/v1/predict", json={"user": 3, "price": 1.5}).json()
        about = httpx.get(f"{endpoint.url}/v1/model").json()
    encoded = result.worker.decoder.featurizer.encode({"user": 3, "price": 1.5})
    assert score["predictions"][0]["score"] == float(result.worker.learner.predict(encoded).served[0])
    assert about["records"] == result.worker.progress.records
    assert about["snapshot"] == "live"


def test_without_a_worker_that_has_caught_up_it_is_not_ready(tmp_path: Path) -> None:
    fill(STREAM[:2])
    config = settings(tmp_path)
    worker = build(config)
    with pytest.raises(Unready, match="starting"):
        Live(config, lambda: None).current()
    with pytest.raises(Unready, match="repeating"):
        Live(config, lambda: worker).current()
    worker.close()


def test_several_shards_in_a_process_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, shard={"count": 4, "indices": [0, 2]})
    with pytest.raises(ConfigError, match=r"serve\.in_worker"):
        Live(config, lambda: None)


def test_whoever_waits_at_the_gate_is_next() -> None:
    gate, end = Gate(), threading.Event()

    def greedy() -> None:
        while not end.is_set():
            with gate:
                time.sleep(0.001)

    thread = threading.Thread(target=greedy)
    thread.start()
    began = time.monotonic()
    for _ in range(100):
        with gate:
            pass
    spent_s = time.monotonic() - began
    end.set()
    thread.join()
    assert spent_s < 2.0  # a hundred times one turn of the other; a plain lock takes many turns each
