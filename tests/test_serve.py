"""A replica answers as its worker would, follows it, never writes, and never breaks on what it is sent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors.codec import JSON
from streamcl import snapshot
from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.endpoint import Models
from streamcl.protocols import StreamclError
from streamcl.recovery import store_of
from streamcl.replica import Predictor
from streamcl.snapshot import CheckpointError
from tests.journey import Result, click, fill, finish, settings, view
from tests.serving import listening

PAYLOAD = {"id": "77", "ts": 1.0, "user": 3, "price": 1.5}


def learned(folder: Path, **changes: Any) -> tuple[Config, Result]:
    """A shard that has learned from a short stream, and left its snapshots."""
    config = settings(folder, **changes)
    fill([item for i in range(20) for item in (view(i, float(i)), click(i, i + 0.5))])
    return config, finish(config)


def replica(config: Config) -> Predictor:
    predictor = Predictor(Store(store_of(config).folder), JSON())
    predictor.refresh()
    return predictor


def ask(models: Models, path: str = "/v1/predict", config: Config | None = None, **request: Any) -> httpx.Response:
    """One request to an endpoint of its own."""
    with listening(models, config, max_body_bytes=request.pop("max_bytes", 2000)) as endpoint:
        return httpx.request("POST" if request else "GET", endpoint.url + path, **request)


def error(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()["error"]
    return response.status_code, body["reason"], body["message"]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Predictor, Result]:
    config, result = learned(tmp_path_factory.mktemp("shard"))
    return replica(config), result


def test_a_replica_scores_an_event_exactly_as_its_worker_does(shard: tuple[Predictor, Result]) -> None:
    predictor, result = shard
    encoded = result.worker.decoder.featurizer.encode(PAYLOAD)
    expected = result.worker.learner.predict(encoded)
    body = ask(predictor, json=PAYLOAD).json()
    assert body["predictions"] == [{"score": expected.served.tolist()[0]}]
    assert body["model"]["version"] == expected.version == result.worker.learner.version


def test_a_batch_is_answered_in_order_and_as_one_by_one(shard: tuple[Predictor, Result]) -> None:
    payloads = [{"user": user, "price": 2.0} for user in range(5)]
    singly = [ask(shard[0], json=payload).json()["predictions"][0] for payload in payloads]
    batch = ask(shard[0], json={"instances": payloads}).json()["predictions"]
    # A matrix product of another height rounds otherwise, in the last digits of a float32.
    assert [each["score"] for each in batch] == pytest.approx([each["score"] for each in singly], rel=1e-5)
    assert ask(shard[0], json={"instances": []}).json()["predictions"] == []


def test_a_missing_feature_is_no_error(shard: tuple[Predictor, Result]) -> None:
    assert 0 < ask(shard[0], json={}).json()["predictions"][0]["score"] < 1


def test_the_model_says_where_it_comes_from(shard: tuple[Predictor, Result]) -> None:
    predictor, result = shard
    model = ask(predictor, "/v1/model").json()
    assert model["name"] == "shop"
    assert model["task"] == "binary"
    assert model["records"] == result.worker.progress.records
    assert model["digest"] == result.digest
    assert model["features"] == {"user": "categorical", "price": "numeric"}
    assert model["position"] == result.worker.progress.state_dict()["position"]


def test_multiclass_answers_with_every_probability_and_the_leading_class(tmp_path: Path) -> None:
    config, _ = learned(tmp_path, task="multiclass", model={"kind": "logistic", "classes": 3})
    prediction = ask(replica(config), json=PAYLOAD).json()["predictions"][0]
    assert sum(prediction["score"]) == pytest.approx(1.0)
    assert prediction["score"][prediction["class"]] == max(prediction["score"])


@pytest.mark.parametrize(
    ("payload", "reason", "text"),
    [
        ({"user": {"a": 1}}, "schema", "'user'"),
        ({"user": 1.5}, "schema", "'user'"),
        ({"price": "secret"}, "schema", "'price'"),
        ({"price": True}, "schema", "'price'"),
        ({"price": 1e300}, "non_finite", "'price'"),
        ({"instances": [{}, {"price": "secret"}]}, "schema", "instances[1]: field 'price'"),
        ({"instances": [7]}, "schema", "object"),
    ],
)
def test_a_bad_field_is_a_400_that_names_it_and_not_its_value(
    shard: tuple[Predictor, Result], payload: Any, reason: str, text: str
) -> None:
    status, found, message = error(ask(shard[0], json=payload))
    assert (status, found) == (400, reason)
    assert text in message
    assert "secret" not in message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'"\\ud800"', b"[" * 5000])
def test_what_is_no_json_object_is_a_400(shard: tuple[Predictor, Result], body: bytes) -> None:
    status, reason, _ = error(
        ask(shard[0], max_bytes=10_000, content=body, headers={"content-type": "application/json"})
    )
    assert (status, reason) == (400, "undecodable")


def test_a_number_that_json_does_not_know_is_a_400(shard: tuple[Predictor, Result]) -> None:
    asked = ask(shard[0], content=b'{"price": NaN}', headers={"content-type": "application/json"})
    assert error(asked)[:2] == (400, "non_finite")


def test_too_much_is_a_413_whether_or_not_its_length_is_stated(shard: tuple[Predictor, Result]) -> None:
    def chunks() -> Any:
        for _ in range(30):
            yield b" " * 100

    for content in (b" " * 3000, chunks()):
        response = ask(shard[0], content=content, headers={"content-type": "application/json"})
        assert error(response)[:2] == (413, "too_large")


def test_too_many_instances_are_a_413(shard: tuple[Predictor, Result]) -> None:
    assert error(ask(shard[0], max_bytes=10_000, json={"instances": [{}] * 1001}))[:2] == (
        413,
        "too_large",
    )


def test_anything_but_json_is_a_415(shard: tuple[Predictor, Result]) -> None:
    assert error(ask(shard[0], data={"user": "3"}))[0] == 415
    accepted = ask(shard[0], content=b"{}", headers={"content-type": "Application/JSON; charset=utf-8"})
    assert accepted.status_code == 200


def test_a_wrong_method_or_path_is_the_client_s_error(shard: tuple[Predictor, Result]) -> None:
    assert ask(shard[0], "/v1/predict").status_code == 405
    assert ask(shard[0], "/v2").status_code == 404


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
requests = st.dictionaries(st.sampled_from(["user", "price", "instances", "id", "ts"]), json_values, max_size=4)


@pytest.fixture(scope="module")
def client(shard: tuple[Predictor, Result]) -> Iterator[httpx.Client]:
    with listening(shard[0]) as endpoint, httpx.Client(base_url=endpoint.url) as client:
        yield client


@effort(max_examples=150, deadline=None, derandomize=True)
@given(body=st.one_of(st.binary(max_size=40), requests.map(lambda value: json.dumps(value).encode())))
def test_no_body_is_a_500(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 413)


def test_unknown_fields_are_refused_where_the_worker_refuses_them(tmp_path: Path) -> None:
    events = {"url": "memory://journey/views", "id": "id", "time": "ts", "key": "user", "unknown_fields": "dead_letter"}
    config, _ = learned(tmp_path, events=events)
    assert error(ask(replica(config), json={"usr": 3})) == (400, "unknown_feature", "unknown field 'usr'")
    assert ask(replica(config), json=PAYLOAD).status_code == 200


def test_before_the_first_snapshot_it_lives_but_is_not_ready(tmp_path: Path) -> None:
    config = settings(tmp_path / "none")
    predictor = replica(config)
    for path in ("/livez", "/healthz"):
        assert ask(predictor, path, config).status_code == 200
    for request in ({"path": "/readyz"}, {"path": "/v1/model"}, {"json": PAYLOAD}):
        status, reason, message = error(ask(predictor, config=config, **request))
        assert (status, reason) == (503, "unready")
        assert "no checkpoint" in message
    assert not (tmp_path / "none").exists()


def test_it_follows_new_snapshots_and_passes_damaged_ones_over(tmp_path: Path) -> None:
    config, result = learned(tmp_path)
    predictor, writer = replica(config), store_of(config)
    first = ask(predictor, "/v1/model").json()
    assert predictor.refresh() is False

    loaded = writer.newest()
    assert loaded is not None
    state = result.worker.state_dict()
    state["learner"]["version"] += 1
    second = writer.save(state, loaded.manifest)
    assert predictor.refresh() is True
    assert ask(predictor, "/v1/model").json()["version"] == first["version"] + 1

    third = writer.save(state, loaded.manifest)
    (third.path / snapshot.ARRAYS).write_bytes(b"torn")
    assert predictor.refresh() is False
    assert ask(predictor, "/v1/model").json()["snapshot"] == second.name
    assert ask(predictor, "/readyz").status_code == 200


def test_a_snapshot_that_cannot_be_used_is_tried_once_and_the_old_model_stays(tmp_path: Path) -> None:
    config, _ = learned(tmp_path)
    predictor = replica(config)
    store_of(config).save({"learner": {}}, {"config": config.model_dump(mode="json")})
    with pytest.raises(StreamclError, match="not a snapshot of such a worker"):
        predictor.refresh()
    assert predictor.refresh() is False
    assert ask(predictor, json=PAYLOAD).status_code == 200


def test_a_pickle_is_not_loaded_unless_trusted(tmp_path: Path) -> None:
    config, _ = learned(tmp_path, river="river.linear_model:LogisticRegression", trust_pickle=True)
    with pytest.raises(CheckpointError, match="trust_pickle"):
        replica(config)
    trusting = Predictor(store_of(config), JSON())
    assert trusting.refresh() is True
    assert ask(trusting, json=PAYLOAD).status_code == 200


def test_following_goes_on_after_a_fault_and_ends_with_close(tmp_path: Path) -> None:
    config = settings(tmp_path)
    predictor = replica(config)
    store_of(config).save({}, {})
    thread = threading.Thread(target=predictor.follow, args=(0.01,))
    thread.start()
    until(lambda: "not a snapshot" in predictor.reason)
    learned(tmp_path / "other")
    other = store_of(settings(tmp_path / "other")).newest()
    assert other is not None
    store_of(config).save(other.state, other.manifest)
    until(lambda: predictor.model is not None)
    predictor.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_replica_writes_nothing(tmp_path: Path) -> None:
    config, _ = learned(tmp_path)
    (store_of(config).folder / ".unfinished-by-somebody").mkdir()
    before = files(tmp_path)
    predictor = Predictor(Store(store_of(config).folder, retain=1), JSON())
    predictor.refresh()
    ask(predictor, json=PAYLOAD)
    assert files(tmp_path) == before


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    config, _ = learned(tmp_path)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
    code = (
        "import sys; from streamcl.config import Config; from streamcl.serve import serve; "
        "serve(Config.model_validate_json(sys.argv[1]))"
    )
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"port": port})})
    command = [sys.executable, "-c", code, config.model_dump_json()]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": "."})
    yield f"http://127.0.0.1:{port}", process
    process.kill()
    process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_served_replica_answers_on_loopback_and_leaves_on_sigterm(
    served: tuple[str, subprocess.Popen[bytes]],
) -> None:
    url, process = served
    until(lambda: answers(url), timeout_s=60.0)
    assert httpx.post(f"{url}/v1/predict", json=PAYLOAD).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) in (0, -signal.SIGTERM)
