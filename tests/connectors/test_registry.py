"""The client asks once, waits while the registry is away, and never takes another fault for a bad payload."""

from __future__ import annotations

import logging
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from connectors.registry import Reference, Registry, Schema, check, enrol, framed, schema_id, subject_of
from streamcl.config import Config, ConfigError
from streamcl.protocols import BadInput, ConnectorError, Unavailable
from streamcl.services import Registry as Settings
from tests.connectors.registry_server import Answer, SchemaRegistry

TEXT = '{"type": "record", "name": "R", "fields": []}'


class Clock:
    """Time that passes only by sleeping; `wakes` is called after each sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.wakes: Any = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.wakes()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def client(server: SchemaRegistry, clock: Clock, **settings: Any) -> Registry:
    return Registry(Settings(url=server.url, **settings), clock=clock, sleep=clock.sleep)


def config(server: SchemaRegistry, **settings: Any) -> Config:
    return Config.parse(
        {
            "name": "app",
            "events": {"url": "memory://b/events", "label": "y"},
            "predictions": "memory://b/scores",
            "features": {"a": "numeric"},
            "registry": {"url": server.url, **settings},
        }
    )


def test_a_frame_is_a_zero_byte_and_the_id_in_four_bytes() -> None:
    assert framed(258, b"xy") == b"\x00\x00\x00\x01\x02xy"
    assert schema_id(framed(0xFFFFFFFF, b"")) == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("payload", "fault"),
    [(b"", "no magic byte"), (b'{"a": "hunter2"}', "no magic byte"), (b"\x00\x00\x01", "ends within the schema id")],
)
def test_what_is_not_framed_is_bad_input_that_shows_no_value(payload: bytes, fault: str) -> None:
    with pytest.raises(BadInput, match=fault) as caught:
        schema_id(payload)
    assert caught.value.reason == "undecodable"
    assert "hunter2" not in str(caught.value)


def test_a_schema_is_asked_for_once(server: SchemaRegistry, clock: Clock) -> None:
    number = server.add("s", TEXT)
    asked = client(server, clock)
    assert asked.by_id(number) == asked.by_id(number) == Schema("AVRO", TEXT)
    assert server.asked == [f"GET /schemas/ids/{number}"]


def test_an_unknown_id_is_bad_input_and_not_asked_again_for_a_while(server: SchemaRegistry, clock: Clock) -> None:
    asked = client(server, clock, unknown_id_s=30)
    for _ in range(3):
        with pytest.raises(BadInput, match="schema id 101 is unknown") as caught:
            asked.by_id(101)
        assert caught.value.reason == "undecodable"
    assert len(server.asked) == 1
    assert server.add("s", TEXT) == 101
    clock.now += 29
    with pytest.raises(BadInput):
        asked.by_id(101)
    clock.now += 2
    assert asked.by_id(101).text == TEXT
    assert clock.slept == []


@pytest.mark.parametrize("code", [404, 40401, None])
def test_any_other_404_is_not_the_payloads_fault(server: SchemaRegistry, clock: Clock, code: int | None) -> None:
    def fault(_: str) -> None:
        answer = Answer(404, code or 0, "no such page")
        answer.body = b"<html>nginx</html>" if code is None else answer.body
        raise answer

    server.fault = fault
    with pytest.raises(ConnectorError, match=f"{server.url}.*404"):
        client(server, clock).by_id(1)


def test_references_come_behind_their_own_references_each_once(server: SchemaRegistry, clock: Clock) -> None:
    def reference(name: str) -> dict[str, Any]:
        return {"name": name, "subject": f"of/{name}", "version": 1}

    server.add("of/a", "A")
    server.add("of/b", "B", references=[reference("a")])
    server.add("of/c", "C", references=[reference("a"), reference("b")])
    number = server.add("top", "TOP", references=[reference("c"), reference("b")])
    asked = client(server, clock)
    schema = asked.by_id(number)
    assert schema.references == (Reference("c", "of/c", 1), Reference("b", "of/b", 1))
    assert {name: each.text for name, each in asked.references(schema).items()} == {"a": "A", "b": "B", "c": "C"}
    assert list(asked.references(schema)) == ["a", "b", "c"]
    assert len(server.asked) == 7  # four schemas by id, three versions


def test_a_reference_to_nowhere_is_not_the_payloads_fault(server: SchemaRegistry, clock: Clock) -> None:
    schema = Schema("AVRO", TEXT, (Reference("x", "gone", 3),))
    with pytest.raises(ConnectorError, match=r"subject gone, version 3: 404 .*40401"):
        client(server, clock).references(schema)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_registry_in_trouble_is_asked_again_with_back_off(
    server: SchemaRegistry, clock: Clock, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    number = server.add("s", TEXT)

    def fault(_: str) -> None:
        if len(server.asked) <= 8:
            raise Answer(status, 50001, "trouble")

    server.fault = fault
    with caplog.at_level(logging.WARNING, "connectors.registry"):
        assert client(server, clock, patience_s=60).by_id(number).text == TEXT
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert all(most / 2 <= slept <= most for slept, most in zip(clock.slept, longest, strict=True))
    # Other tests' clients of Kafka may still be dying.
    first, last = (each.message for each in caplog.records if each.name == "connectors.registry")
    assert f"{status} " in first
    assert last.endswith("answers again")


def test_a_registry_that_comes_back_within_the_patience_is_no_error(server: SchemaRegistry, clock: Clock) -> None:
    number = server.add("s", TEXT)
    server.stop()
    clock.wakes = lambda: server.start() if len(clock.slept) == 3 else None
    assert client(server, clock).by_id(number).text == TEXT


def test_a_registry_that_stays_away_is_unavailable_and_no_bad_input(server: SchemaRegistry, clock: Clock) -> None:
    server.stop()
    asked = client(server, clock, patience_s=7)
    with pytest.raises(Unavailable, match=rf"{server.url}: /schemas/ids/5: Connect.*gave up after 7 s"):
        asked.by_id(5)
    assert sum(clock.slept) == pytest.approx(7)
    server.start()
    with pytest.raises(BadInput):
        asked.by_id(5)


def test_a_wrong_password_stops_at_once_and_is_never_shown(
    server: SchemaRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.login = ("reader", "right")
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2")
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectorError, match=r"as 'reader'.*401.*wrong user") as caught:
        client(server, clock, username="reader", password_env="REGISTRY_PASSWORD").by_id(1)
    assert not isinstance(caught.value, Unavailable)
    assert clock.slept == []
    coded = "cmVhZGVyOmh1bnRlcjI"  # reader:hunter2, as it travels
    for text in (str(caught.value), repr(caught.value), caplog.text):
        assert "hunter2" not in text
        assert coded not in text


def test_the_password_comes_from_the_environment_or_from_a_file(
    server: SchemaRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    number = server.add("s", TEXT)
    server.login = ("reader", "hunter2")
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2")
    (tmp_path / "password").write_text("hunter2\n")
    for where in ({"password_env": "REGISTRY_PASSWORD"}, {"password_file": tmp_path / "password"}):
        assert client(server, clock, username="reader", **where).by_id(number)


def test_neither_a_proxy_nor_a_login_comes_out_of_the_environment(
    server: SchemaRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    number = server.add("s", TEXT)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert client(server, clock, patience_s=0).by_id(number).text == TEXT
    assert server.logins == [""]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"username": "u"}, "registry.username needs"),
        ({"username": "u", "password_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
        ({"username": "u", "password_file": Path("/no/such/file")}, "registry.password_file: /no/such/file"),
        ({"ssl_cafile": Path("/no/such/file")}, "registry.ssl_cafile"),
    ],
)
def test_a_login_that_can_not_be_had_names_its_setting(settings: Any, named: str) -> None:
    with pytest.raises(ConnectorError, match=named):
        Registry(Settings(url="https://127.0.0.1:1", **settings))


def test_without_a_url_the_setting_is_named() -> None:
    with pytest.raises(ConnectorError, match=r"registry\.url: needed"):
        Registry(Settings())


@pytest.mark.parametrize("url", ["ftp://host", "http://user:hunter2@host"])
def test_a_url_is_http_and_holds_no_password(server: SchemaRegistry, url: str) -> None:
    with pytest.raises(ConfigError, match=r"registry\.url: ") as caught:
        config(server, url=url)
    assert "hunter2" not in str(caught.value)


def test_a_schema_of_ours_is_registered_once(server: SchemaRegistry) -> None:
    schema = Schema("AVRO", TEXT)
    number = enrol(config(server), schema)
    assert enrol(config(server), schema) == number
    assert server.subjects == {"scores-value": [number]}
    assert server.schemas[number]["schema"] == TEXT


def test_the_subject_is_the_topics_unless_the_config_says_so(server: SchemaRegistry) -> None:
    assert subject_of(config(server)) == "scores-value"
    enrol(config(server, subject="a/b c"), Schema("AVRO", TEXT))
    assert list(server.subjects) == ["a/b c"]


def test_a_schema_that_may_only_be_looked_up_must_be_there(server: SchemaRegistry) -> None:
    schema, settings = Schema("AVRO", TEXT), config(server, register_schema=False)
    with pytest.raises(ConnectorError, match=r"subject scores-value: the predictions' schema is not there"):
        enrol(settings, schema)
    server.add("scores-value", '{"type": "string"}')
    with pytest.raises(ConnectorError, match=r"not there"):
        enrol(settings, schema)
    assert enrol(settings, schema) if server.add("scores-value", TEXT) else False
    assert not [each for each in server.asked if each.startswith("POST") and each.endswith("/versions")]


def test_a_schema_that_does_not_suit_its_subject_is_refused_with_the_registrys_words(server: SchemaRegistry) -> None:
    server.add("scores-value", '{"type": "string"}')
    server.incompatible = True
    with pytest.raises(ConnectorError, match=r"subject scores-value: 409 .*incompatible with an earlier"):
        enrol(config(server), Schema("AVRO", TEXT))


def test_check_proves_that_it_answers_and_changes_nothing(server: SchemaRegistry) -> None:
    schema = Schema("AVRO", TEXT)
    assert check(config(server), "AVRO") == [f"avro, registry {server.url} answers"]
    assert check(config(server), "AVRO", schema)[1] == "avro, subject scores-value will be registered"
    assert server.subjects == {}
    with pytest.raises(ConnectorError, match="is not there"):
        check(config(server, register_schema=False), "AVRO", schema)
    number = server.add("scores-value", TEXT)
    assert check(config(server), "AVRO", schema)[1] == f"avro, subject scores-value has schema id {number}"


def test_check_does_not_wait_and_refuses_a_registry_without_the_kind(server: SchemaRegistry) -> None:
    server.kinds = ["AVRO"]
    with pytest.raises(ConnectorError, match="takes no PROTOBUF schemas, only AVRO"):
        check(config(server), "PROTOBUF")
    server.stop()
    with pytest.raises(Unavailable, match="gave up after 0 s"):
        check(config(server), "AVRO")


def test_another_server_is_not_taken_for_a_registry(server: SchemaRegistry, clock: Clock) -> None:
    for status, body in (
        (200, b"<html>hello</html>"),
        (301, b""),
        (200, b"[1, 2]"),
        (200, b'{"schema": 1'),
        (418, b""),
    ):

        def fault(_: str, status: int = status, body: bytes = body) -> None:
            answer = Answer(status, 0, "")
            answer.body = body
            raise answer

        server.fault = fault
        with pytest.raises(ConnectorError, match=server.url) as caught:
            client(server, clock).by_id(1)
        assert not isinstance(caught.value, Unavailable)


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "registry")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, plain))
    return certificate, private


def test_tls_trusts_the_named_authority_alone_and_shows_the_clients_certificate(tmp_path: Path, clock: Clock) -> None:
    certificate, key = _certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    with SchemaRegistry(context) as server:
        number = server.add("s", TEXT)
        ours = {"ssl_cafile": certificate, "ssl_certfile": certificate, "ssl_keyfile": key}
        assert client(server, clock, **ours).by_id(number).text == TEXT
        for lacking in ({}, {"ssl_cafile": certificate}):
            with pytest.raises(Unavailable, match=server.url):
                client(server, clock, patience_s=0, **lacking).by_id(number)
