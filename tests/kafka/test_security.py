"""Logging in to Apache Kafka: accepted, refused with a message that says what to check, and no secret anywhere."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from connectors import kafka, kafka_auth
from connectors.apache import ApacheBroker, Listener
from connectors.kafka_auth import Tokens
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Unavailable
from streamcl.records import Message, Order, Run, Stream
from streamcl.services import Kafka
from tests.kafka.certificates import Authority, Pair
from tests.kafka.conftest import Cluster, started, toml

EVENTS = Stream("events", 0)
USER, PASSWORD = "worker", "right-Horse-battery"
CLIENT_SECRET = "right-Staple-secret"
KEY_PASSWORD = "right-Key-lock"


@dataclass(frozen=True)
class Secured:
    """A broker with every kind of listener, and who may come in."""

    broker: ApacheBroker
    authority: Authority
    stranger: Authority
    client: Pair
    locked: Pair
    foreign: Pair

    def config(self, listener: str, settings: Mapping[str, Any], **tables: Any) -> Config:
        cluster = Cluster("apache", self.broker.listener(listener))
        time_outs = {"connect_timeout_s": 3.0} | dict(settings)
        return cluster.config(tables.pop("events", self.topic()), kafka=time_outs, **tables)

    def topic(self) -> str:
        return Cluster("apache", self.broker.bootstrap).topic()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = Authority(folder), Authority(folder, "stranger")
    store = authority.issue("broker").store
    listeners = {
        "LOGIN": Listener("SASL_PLAINTEXT"),
        "TLS": Listener("SSL", store),
        "MTLS": Listener("SSL", store, authority.certificate, client_certificate=True),
        "TLSLOGIN": Listener("SASL_SSL", store),
        "EXPIRED": Listener("SSL", authority.issue("expired", days=-1).store),
        "ELSEWHERE": Listener("SSL", authority.issue("elsewhere", host="kafka.example").store),
    }
    clients = authority.issue("client"), authority.issue("locked", password=KEY_PASSWORD), stranger.issue("foreign")
    with started(ApacheBroker(listeners=listeners, users={USER: PASSWORD})) as broker:
        yield Secured(broker, authority, stranger, *clients)


@pytest.fixture(params=["kafka-python", "librdkafka"])
def client(request: pytest.FixtureRequest) -> dict[str, str]:
    """Each library, as a setting."""
    if request.param == "librdkafka":
        pytest.importorskip("confluent_kafka")
    return {"client": request.param}


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_PASSWORD", PASSWORD)
    monkeypatch.setenv("TEST_WRONG_PASSWORD", "wrong-Horse-battery")
    monkeypatch.setenv("TEST_CLIENT_SECRET", CLIENT_SECRET)
    monkeypatch.setenv("TEST_KEY_PASSWORD", KEY_PASSWORD)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _login(mechanism: str, protocol: str = "SASL_PLAINTEXT", **changed: Any) -> dict[str, Any]:
    found = {"security_protocol": protocol, "sasl_mechanism": mechanism, "sasl_username": USER}
    return found | {"sasl_password_env": "TEST_PASSWORD"} | changed


def _works(config: Config) -> None:
    """Source, sink and control log reach the broker and do their work there."""
    source = kafka.open_source(config.inputs, config)
    assert source.seek({}) == {EVENTS: 0}
    source.close()
    sink = kafka.open_sink(config.dead_letters_url, config)
    sink.send([Message(b"v", None, (), None)])
    sink.flush()
    sink.close()
    control = kafka.open_control(config.control_url, config)
    control.open()
    assert control.append(Order((Run(EVENTS, 1),), {EVENTS: 1})) == 1
    control.close()


def _refused(config: Config) -> str:
    with pytest.raises(ConnectorError) as refused:
        kafka.open_source(config.inputs, config)
    return str(refused.value)


def _unsigned(**claims: Any) -> str:
    """A JSON web token without a signature, which the broker of the tests takes."""
    parts = [{"alg": "none"}, {"sub": USER, "iat": time.time(), "exp": time.time() + 600} | claims]
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_password_is_accepted_in_the_clear_and_behind_tls(
    secured: Secured, client: dict[str, str], mechanism: str
) -> None:
    _works(secured.config("LOGIN", client | _login(mechanism)))
    _works(secured.config("TLSLOGIN", client | _login(mechanism, "SASL_SSL", ssl_cafile=secured.authority.certificate)))


def test_the_password_may_come_from_a_file(secured: Secured, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    _works(secured.config("LOGIN", _login("PLAIN", sasl_password_env=None, sasl_password_file=tmp_path / "password")))


def test_a_token_is_accepted_from_a_file_and_from_an_endpoint(
    secured: Secured, client: dict[str, str], tmp_path: Path
) -> None:
    login = client | {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER"}
    (tmp_path / "token").write_text(_unsigned() + "\n")
    _works(secured.config("LOGIN", login | {"sasl_token_file": tmp_path / "token"}))
    with _endpoint([(200, {"access_token": _unsigned(), "expires_in": 600})]) as (url, asked):
        _works(secured.config("LOGIN", login | _client(url)))
    assert len(asked) == 1  # one token serves every client


def test_tls_is_accepted_with_and_without_a_certificate_of_ours(secured: Secured, client: dict[str, str]) -> None:
    trust = client | {"security_protocol": "SSL", "ssl_cafile": secured.authority.certificate}
    _works(secured.config("TLS", trust))
    _works(secured.config("MTLS", trust | _own(secured.client)))
    _works(secured.config("MTLS", trust | _own(secured.locked) | {"ssl_key_password_env": "TEST_KEY_PASSWORD"}))


def test_the_host_of_a_certificate_may_be_ignored(secured: Secured, client: dict[str, str]) -> None:
    trust = client | {"security_protocol": "SSL", "ssl_cafile": secured.authority.certificate}
    _works(secured.config("ELSEWHERE", trust | {"ssl_check_hostname": False}))


def _own(pair: Pair) -> dict[str, Any]:
    return {"ssl_certfile": pair.certificate, "ssl_keyfile": pair.key}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("wrong", [{"sasl_password_env": "TEST_WRONG_PASSWORD"}, {"sasl_username": "nobody"}])
def test_a_wrong_password_or_user_is_refused_and_never_shown(
    secured: Secured, client: dict[str, str], mechanism: str, wrong: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        text = _refused(secured.config("LOGIN", client | _login(mechanism, **wrong)))
    user = wrong.get("sasl_username", USER)
    assert f"(SASL_PLAINTEXT {mechanism} as {user!r}): " in text
    assert "check kafka.sasl_username, its password and kafka.sasl_mechanism" in text
    assert "Horse" not in text + caplog.text


def test_a_refused_token_names_its_field(secured: Secured, client: dict[str, str], tmp_path: Path) -> None:
    login = client | {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER"}
    (tmp_path / "token").write_text("no-Token-at-all")
    text = _refused(secured.config("LOGIN", login | {"sasl_token_file": tmp_path / "token"}))
    assert "check kafka.sasl_token_file" in text
    assert "no-Token" not in text


def test_every_fault_of_trust_says_what_to_check(secured: Secured, client: dict[str, str]) -> None:
    trust = client | {"security_protocol": "SSL", "ssl_cafile": secured.authority.certificate}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("TLS", trust | {"ssl_cafile": secured.stranger.certificate}, "check kafka.ssl_cafile"),
        ("TLS", {"security_protocol": "SSL"}, "check kafka.ssl_cafile"),
        ("EXPIRED", trust, "the broker's certificate has expired"),
        ("ELSEWHERE", trust, "is for another host; check the URL, kafka.ssl_check_hostname"),
        ("MTLS", trust, "check kafka.ssl_certfile and _keyfile"),
        ("MTLS", trust | _own(secured.foreign), "check kafka.ssl_certfile"),
        ("PLAINTEXT", trust, "does this port speak SSL? check kafka.security_protocol"),
        ("TLS", {"security_protocol": "PLAINTEXT"}, "does this port speak PLAINTEXT? check kafka.security_protocol"),
        ("LOGIN", {"security_protocol": "PLAINTEXT"}, "does this port speak PLAINTEXT? check kafka.security_protocol"),
        ("MTLS", trust | _own(secured.locked), "password not given"),
        ("MTLS", trust | {"ssl_certfile": "none.pem", "ssl_keyfile": "none.key"}, "kafka.ssl_certfile"),
        ("MTLS", {"security_protocol": "SSL", "ssl_cafile": "none.pem"}, "kafka.ssl_cafile: none.pem: No such file"),
    ]
    unclear = ("check kafka.ssl_cafile", "the broker's certificate has expired", "is for another host; check the URL, ")
    for listener, settings, expected in cases:
        # Which of the three it is, librdkafka keeps to itself.
        vague = client["client"] == "librdkafka" and expected.startswith(unclear)
        wanted = "has expired, is for another host" if vague else expected
        assert wanted in _refused(secured.config(listener, client | settings)), (listener, settings)


def _client(url: str) -> dict[str, Any]:
    return {"sasl_token_url": url, "sasl_client_id": "us", "sasl_client_secret_env": "TEST_CLIENT_SECRET"}


@contextmanager
def _endpoint(answers: list[tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A token endpoint that gives each answer once and the last one for ever; and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            asked.append(form | {"authorization": self.headers["Authorization"]})
            code, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/token", asked
        finally:
            server.shutdown()
            thread.join()


def _bearer(**settings: Any) -> Kafka:
    return Kafka(security_protocol="SASL_PLAINTEXT", sasl_mechanism="OAUTHBEARER", **settings)


def test_tokens_are_asked_for_by_client_credentials_and_used_until_they_expire() -> None:
    answers = [(200, {"access_token": "one", "expires_in": 0.3}), (200, {"access_token": "two", "expires_in": 600})]
    with _endpoint(answers) as (url, asked):
        tokens = Tokens(_bearer(**_client(url), sasl_scope="kafka"))
        assert tokens.current().value == tokens.current().value == "one"
        time.sleep(0.3)
        assert tokens.current().value == "two"
    pair = base64.b64encode(f"us:{CLIENT_SECRET}".encode()).decode()
    assert asked == [{"grant_type": ["client_credentials"], "scope": ["kafka"], "authorization": f"Basic {pair}"}] * 2


def test_a_token_that_is_good_outlives_its_endpoint() -> None:
    with _endpoint([(200, {"access_token": "one", "expires_in": 10}), (503, {})]) as (url, asked):
        tokens = Tokens(_bearer(**_client(url)))
        assert tokens.current().value == "one"
        tokens._renew_at_s = 0.0
        assert tokens.current().value == "one"
        assert len(asked) == 2
        tokens._held = tokens.current()._replace(expires_at_s=0.0)
        with pytest.raises(Unavailable, match=r"sasl_token_url: http://.*: refused with HTTP 503"):
            tokens.current()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((401, {"error": "invalid_client"}), r"HTTP 401; check kafka.sasl_client_id, its secret and kafka.sasl_scope"),
        ((302, {}), "HTTP 302"),
        ((200, {"token": "x"}), "the answer holds no access_token"),
        ((200, ["x"]), "the answer holds no access_token"),
    ],
)
def test_an_endpoint_that_refuses_is_named(answer: tuple[int, Any], expected: str) -> None:
    with _endpoint([answer]) as (url, asked), pytest.raises(ConnectorError, match=expected) as refused:
        Tokens(_bearer(**_client(url))).current()
    assert not isinstance(refused.value, Unavailable)
    assert len(asked) == 1
    assert "Staple" not in str(refused.value) + repr(refused.value.__cause__)


def test_an_endpoint_that_is_away_passes_by_itself() -> None:
    with pytest.raises(Unavailable, match=r"kafka.sasl_token_url: http://127.0.0.1:9/: .*refused"):
        Tokens(_bearer(**_client("http://127.0.0.1:9/"))).current()


def test_a_token_file_is_read_anew_and_an_expired_token_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "token"
    tokens = Tokens(_bearer(sasl_token_file=path))
    with pytest.raises(ConnectorError, match=r"sasl_token_file: .*FileNotFoundError"):
        tokens.current()
    for text in ("first", "second"):
        path.write_text(f"{text}\n")
        assert tokens.current().value == text
    path.write_text(_unsigned(exp=time.time() - 100))
    with pytest.raises(ConnectorError, match="the token expired 100 s ago"):
        tokens.current()
    path.write_text("")
    with pytest.raises(ConnectorError, match="is empty"):
        tokens.current()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sasl_password_env": "TEST_UNSET"}, "kafka.sasl_password_env: TEST_UNSET is not set"),
        ({"sasl_password_env": None, "sasl_password_file": "missing"}, "sasl_password_file: missing: FileNotFound"),
    ],
)
def test_a_missing_secret_is_named(change: dict[str, Any], expected: str) -> None:
    config = Cluster("none", "127.0.0.1:9").config("t", kafka=_login("PLAIN", **change))
    for settings in (kafka_auth.for_kafka_python, kafka_auth.for_librdkafka):
        with pytest.raises(ConnectorError, match=expected):
            settings(config)


def test_librdkafka_is_told_the_same(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("client", password=KEY_PASSWORD)
    tls = {"ssl_cafile": authority.certificate, "ssl_key_password_env": "TEST_KEY_PASSWORD"} | _own(pair)
    config = Cluster("none", "127.0.0.1:9").config("t", kafka=_login("SCRAM-SHA-512", "SASL_SSL", **tls))
    assert kafka_auth.for_librdkafka(config) == {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(authority.certificate),
        "ssl.certificate.location": str(pair.certificate),
        "ssl.key.location": str(pair.key),
        "ssl.key.password": KEY_PASSWORD,
        "ssl.endpoint.identification.algorithm": "https",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": USER,
        "sasl.password": PASSWORD,
    }
    (tmp_path / "token").write_text("opaque")
    bearer = {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER"}
    config = Cluster("none", "127.0.0.1:9").config("t", kafka=bearer | {"sasl_token_file": tmp_path / "token"})
    value, expires_at_s = kafka_auth.for_librdkafka(config)["oauth_cb"]("")
    assert value == "opaque"
    assert time.time() < expires_at_s


_AT_DEBUG = """
import logging, sys
import kafka, kafka.admin, kafka.consumer, kafka.producer, connectors.kafka
from streamcl import cli
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
for name in [each for each in logging.root.manager.loggerDict if each.startswith("kafka")]:
    logging.getLogger(name).setLevel(logging.DEBUG)  # the command line quiets their parent only
cli.main()
"""


def _streamcl(output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        return subprocess.Popen([sys.executable, "-c", _AT_DEBUG, *arguments], stdout=file, stderr=file)


def _said(output: Path, *arguments: str) -> bytes:
    _streamcl(output, *arguments).wait(60)
    return output.read_bytes()


def _scraped(port: int, process: subprocess.Popen[bytes]) -> bytes:
    """/metrics, once the worker serves it and until it has learned."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page,
        ):
            found: bytes = page.read()
            if b"streamcl_" in found:
                return found
        time.sleep(0.1)
    raise AssertionError(f"no metrics; the worker left with {process.poll()}")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512", "OAUTHBEARER"])
def test_no_secret_shows_in_logs_metrics_errors_checks_or_checkpoints(
    secured: Secured, tmp_path: Path, mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = _unsigned(marker="right-Token-text")
    with _endpoint([(200, {"access_token": token, "expires_in": 600})]) as (url, _), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.close()
        login = _login(mechanism, "SASL_SSL")
        if mechanism == "OAUTHBEARER":
            login = {"security_protocol": "SASL_SSL", "sasl_mechanism": mechanism} | _client(url)
        trust = {"ssl_cafile": secured.authority.certificate, "ssl_key_password_env": "TEST_KEY_PASSWORD"}
        topic = secured.topic()
        Cluster("apache", secured.broker.bootstrap).produce(topic, [(0, b'{"id": 1, "x": 2, "y": 1}', 1)] * 50)
        config = secured.config(
            "TLSLOGIN",
            login | trust | _own(secured.locked),
            events=topic,
            checkpoint={"folder": str(tmp_path / "checkpoints")},
            telemetry={"port": port},
        )
        path = tmp_path / "config.toml"
        path.write_text(toml(config.model_dump(mode="json", exclude_none=True)))
        process = _streamcl(tmp_path / "run", "run", str(path), "--idle-exit-s", "3", "--json")
        shown = {"metrics": _scraped(port, process)}
        left_with = process.wait(60)
        shown["run"] = (tmp_path / "run").read_bytes()
        assert left_with == 0, shown["run"][-2000:]
        shown["check"] = _said(tmp_path / "said", "check", str(path))
        for name in ("TEST_PASSWORD", "TEST_CLIENT_SECRET"):
            monkeypatch.setenv(name, "wrong-Horse-secret")
        shown["refusal"] = b"" if mechanism == "OAUTHBEARER" else _said(tmp_path / "said", "check", str(path))
    shown["schema"] = json.dumps(Config.model_json_schema()).encode()
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            shown[file.name] = file.read_bytes()
    assert b'"learned": 50' in shown["run"]
    assert shown["run"].count(b"DEBUG kafka.") > 20
    assert mechanism == "OAUTHBEARER" or b"check kafka.sasl_username" in shown["refusal"]
    assert any(b'"config"' in text for name, text in shown.items() if "manifest" in name)
    plain = [PASSWORD, CLIENT_SECRET, KEY_PASSWORD, token, "right-Token-text", "wrong-Horse-secret"]
    coded = [base64.b64encode(each.encode()).decode() for each in (*plain, f"us:{CLIENT_SECRET}")]
    for where, text in shown.items():
        for secret in (*plain, *coded):
            assert secret.encode() not in text, (where, secret)
