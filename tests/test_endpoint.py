"""What the endpoint says about itself is true; who may ask, over TLS too; and a load while models come and go."""

from __future__ import annotations

import logging
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.core.result import Ok

from streamcl.config import ConfigError
from streamcl.openapi import document, page
from streamcl.recovery import store_of
from streamcl.replica import Predictor, Unready
from streamcl.serve import Listening, ServeError
from tests.journey import settings
from tests.serving import Fixed, listening
from tests.test_serve import learned, replica, until

KEY = "open-sesame-53c2"
NESTED = {
    "user": {"kind": "categorical", "buckets": 13},
    "item.id": "categorical",
    "item.price": "numeric",
    "tags": {"kind": "bag", "max_items": 3, "buckets": 13},
}


def metric(endpoint: Listening, name: str, **headers: str) -> float:
    text = httpx.get(f"{endpoint.url}/metrics", headers=headers).text
    found = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    config, _ = learned(tmp_path_factory.mktemp("shard"), features=NESTED)
    return replica(config)


@pytest.fixture(scope="module")
def endpoint(model: Predictor) -> Iterator[Listening]:
    with listening(model, max_body_bytes=100_000) as endpoint:
        yield endpoint


@pytest.mark.parametrize("unknown", ["ignore", "dead_letter"])
def test_no_request_of_the_document_s_making_is_a_5xx_and_no_answer_breaks_it(tmp_path: Path, unknown: str) -> None:
    events = {"url": "memory://journey/views", "id": "id", "time": "ts", "key": "user", "unknown_fields": unknown}
    config, _ = learned(tmp_path, features=NESTED, events=events)
    with listening(replica(config)) as endpoint:
        schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
        for operation in [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]:
            predicts = operation.path == "/v1/predict"
            modes = st.one_of(
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
                operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
            )

            @effort(
                max_examples=120 if predicts else 8,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=modes)
            def ask(case: Any) -> None:
                case.call_and_validate(base_url=endpoint.url, checks=CHECKS)

            ask()


CHECKS = [checks.not_a_server_error]


def test_the_document_follows_the_config() -> None:
    config = settings(Path("unused"), features=NESTED)
    fields = document(config, config.serve)["components"]["schemas"]["Instance"]["properties"]
    assert fields.keys() == {"user", "item", "tags"}
    assert fields["item"]["properties"].keys() == {"id", "price"}
    assert "number" in fields["item"]["properties"]["price"]["type"]


def test_the_page_is_whole_by_itself_and_escapes_what_the_config_names() -> None:
    features = {"<script>": "numeric", "user": "categorical"}
    config = settings(Path("unused"), features=features)
    text = page(document(config, config.serve))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "POST /v1/predict" in text


def test_the_page_and_the_document_are_served(endpoint: Listening) -> None:
    described = httpx.get(f"{endpoint.url}/openapi.json").json()
    assert described["openapi"] == "3.1.0"
    answer = httpx.get(f"{endpoint.url}/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "item.price" in answer.text


def test_metrics_count_answers_by_status_and_say_what_the_model_says(endpoint: Listening) -> None:
    before = metric(endpoint, 'streamcl_serve_requests_total{code="400"}')
    httpx.post(f"{endpoint.url}/v1/predict", json={"tags": "secret"})
    httpx.post(f"{endpoint.url}/v1/predict", json={"instances": [{}, {}, {}]})
    text = httpx.get(f"{endpoint.url}/metrics").text
    assert metric(endpoint, 'streamcl_serve_requests_total{code="400"}') == before + 1
    assert metric(endpoint, "streamcl_serve_instances_total") >= 3
    assert metric(endpoint, "streamcl_serve_swaps_total") == 1
    assert metric(endpoint, "streamcl_weights_version") == 20
    for name in ("swap_age_seconds", "in_flight", "request_seconds_bucket", "shed_total", "sync_records"):
        assert f"\nstreamcl_serve_{name}" in text
    assert "secret" not in text


def test_without_the_key_only_health_is_answered_and_the_key_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREDICTIONS_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with listening(Fixed(), api_key_env="PREDICTIONS_KEY") as endpoint, httpx.Client(base_url=endpoint.url) as client:
        for path in ("/livez", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        told = ""
        wrong: list[dict[str, str]] = [{}, {"authorization": "Bearer nonsense"}, {"authorization": f"Basic {KEY}"}]
        wrong += [{"x-api-key": KEY[:-1]}]
        for path in ("/v1/model", "/metrics", "/openapi.json", "/docs", "/elsewhere"):
            for headers in wrong:
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["reason"]) == (401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
                told += answer.text
        assert client.post("/v1/predict", json={}).status_code == 401
        for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.post("/v1/predict", json={}, headers=headers).status_code == 200
            told += client.get("/openapi.json", headers=headers).text + client.get("/metrics", headers=headers).text
    assert KEY not in told + caplog.text


def test_a_key_from_a_file_and_none_at_all(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path_given: dict[str, Any] = {"api_key_file": path}
    faults = [(path_given, r"serve\.api_key_file: .*FileNotFoundError")]
    faults += [({"api_key_env": "NOT_THERE"}, r"serve\.api_key_env: NOT_THERE: is not set")]
    for place, text in faults:
        with pytest.raises(ServeError, match=text), listening(Fixed(), **place):
            pass
    path.write_text(" \n")
    with pytest.raises(ServeError, match="empty"), listening(Fixed(), **path_given):
        pass
    path.write_text(f"{KEY}\n")
    with listening(Fixed(), api_key_file=path) as endpoint:
        assert httpx.get(f"{endpoint.url}/v1/model", headers={"x-api-key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("station", "text"),
    [
        ({"ssl_certfile": "a.pem"}, "ssl_certfile and ssl_keyfile"),
        ({"api_key_env": "A", "api_key_file": "b"}, "one of them"),
        ({"max_instances": 10, "max_queued_instances": 9}, "max_queued_instances"),
        ({"request_timeout_s": 0}, "serve.request_timeout_s"),
        ({"prot": 1}, "did you mean 'port'"),
    ],
)
def test_a_station_that_makes_no_sense_is_refused_by_name(station: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        settings(Path("unused"), serve=station)


def certificate(folder: Path, password: bytes | None = None) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(private)
    return paths


def test_with_a_certificate_it_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(cert))
    with listening(Fixed(), ssl_certfile=cert, ssl_keyfile=key, max_body_bytes=1000) as endpoint:
        url = f"https://localhost:{endpoint.port}"
        with httpx.Client(base_url=url, verify=trusting) as client:
            assert client.post("/v1/predict", json={"user": 1}).status_code == 200
            assert client.post("/v1/predict", content=b" " * 2000).status_code == 413
            assert client.get("/v1/model").status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez")  # whose authorities are the system's
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{endpoint.port}/livez")
        assert httpx.get(f"{url}/livez", verify=trusting).status_code == 200


def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, b"secret")
    nowhere = tmp_path / "nowhere.pem"
    for path, text in ((cert, r"serve\.ssl_certfile, serve\.ssl_keyfile"), (nowhere, r"nowhere\.pem")):
        with pytest.raises(ServeError, match=text), listening(Fixed(), ssl_certfile=path, ssl_keyfile=key):
            pass


def test_a_place_that_is_taken_is_an_error_that_names_it() -> None:
    with listening(Fixed()) as endpoint, pytest.raises(ServeError, match=f"127.0.0.1:{endpoint.port}: Address already"):
        config = settings(Path("unused"), serve={"port": endpoint.port})
        Listening(Fixed(), config)


def test_requests_at_once_share_a_pass_and_agree_with_single_ones(model: Predictor) -> None:
    users = list(range(40))
    with listening(model) as endpoint, httpx.Client(base_url=endpoint.url) as client:

        def score(user: int) -> float:
            answer = client.post("/v1/predict", json={"user": user, "tags": ["a"]})
            return float(answer.json()["predictions"][0]["score"])

        alone = [score(user) for user in users]
        found: dict[int, float] = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({u: score(u) for u in users[i::8]})) for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[user] for user in users] == pytest.approx(alone, rel=1e-5)
        assert metric(endpoint, "streamcl_serve_passes_total") <= metric(endpoint, "streamcl_serve_instances_total")


def test_under_load_every_answer_is_whole_while_snapshots_come_and_the_one_in_use_is_deleted(tmp_path: Path) -> None:
    config, result = learned(tmp_path)
    predictor, writer = replica(config), store_of(config)
    loaded = writer.newest()
    assert loaded is not None
    follower = threading.Thread(target=predictor.follow, args=(0.02,), daemon=True)
    follower.start()
    statuses: list[int] = []
    versions: set[int] = set()
    with listening(predictor) as endpoint:
        end = threading.Event()

        def load() -> None:
            with httpx.Client(base_url=endpoint.url) as client:
                while not end.is_set():
                    answer = client.post("/v1/predict", json={"instances": [{"user": i} for i in range(8)]})
                    statuses.append(answer.status_code)
                    versions.add(answer.json()["model"]["version"])
                    assert len(answer.json()["predictions"]) == 8

        threads = [threading.Thread(target=load, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(1, 5):
            state = result.worker.state_dict()
            state["learner"]["version"] = 1000 + step
            saved = writer.save(state, loaded.manifest)
            until(lambda step=step: 1000 + step in versions)
            for other in writer.ls():
                if other.name != saved.name:
                    shutil.rmtree(other.path)
        shutil.rmtree(writer.save(result.worker.state_dict(), loaded.manifest).path)  # while it may be being read
        for snapshot in writer.ls():  # the one in use
            shutil.rmtree(snapshot.path)
        time.sleep(0.2)
        end.set()
        for thread in threads:
            thread.join()
        assert metric(endpoint, "streamcl_serve_swaps_total") >= 5  # a newest that is gone: the one before
        assert httpx.post(f"{endpoint.url}/v1/predict", json={"user": 3}).status_code == 200
    predictor.close()
    follower.join(timeout=5)
    assert set(statuses) == {200}
    assert {1001, 1002, 1003, 1004} <= versions


def test_before_a_model_the_document_is_that_of_the_config_and_metrics_say_unready() -> None:
    class Nothing:
        def current(self) -> Fixed:
            raise Unready("nothing yet")

        def read(self) -> dict[str, float]:
            return {"outcomes_lag": 7.0}

    with listening(Nothing(), settings(Path("unused"))) as endpoint:
        assert httpx.get(f"{endpoint.url}/openapi.json").status_code == 200
        assert metric(endpoint, "streamcl_serve_ready") == 0
        assert metric(endpoint, "streamcl_outcomes_lag_records") == 7
        answer = httpx.post(f"{endpoint.url}/v1/predict", json={})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
