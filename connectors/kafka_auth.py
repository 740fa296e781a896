"""How brokers are trusted and logged in to: `[kafka]` in the words of each client library, and what a refusal means.

What these functions return holds secrets: never log it, never put it into an error.
"""

from __future__ import annotations

import base64
import logging
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from kafka.net.sasl.oauth import AbstractTokenProvider

from streamcl.config import Config
from streamcl.protocols import ConnectorError, Unavailable
from streamcl.services import Kafka

log = logging.getLogger(__name__)

# At DEBUG these loggers of kafka-python print requests and settings as they are, secrets with them.
_TALKATIVE = ("kafka.net.connection", "kafka.net.transport", "kafka.protocol.parser", "kafka.admin.client")
_TOKEN_TIMEOUT_S = 10.0
_TOKEN_ROOM_S = 30.0
_UNTRUSTED = "the broker's certificate is not signed by one we trust; check kafka.ssl_cafile"
# What a refusal says, in the words of brokers and of OpenSSL (both libraries pass them on), and what to check then.
_HINTS = (
    ("hostname mismatch", "the broker's certificate is for another host; check the URL, kafka.ssl_check_hostname"),
    ("ip address mismatch", "the broker's certificate is for another host; check the URL, kafka.ssl_check_hostname"),
    ("certificate has expired", "the broker's certificate has expired"),
    ("certificate required", "the broker wants a client's certificate; check kafka.ssl_certfile and _keyfile"),
    ("alert certificate expired", "our certificate has expired; check kafka.ssl_certfile"),
    ("alert unknown ca", "the broker does not trust our certificate's authority; check kafka.ssl_certfile"),
    ("alert certificate unknown", "the broker does not trust our certificate; check kafka.ssl_certfile"),
    # Java's words for none at all; librdkafka sends none of an authority that the broker has not named.
    ("alert bad certificate", "the broker wants a certificate, or another; check kafka.ssl_certfile and _keyfile"),
    ("local issuer certificate", _UNTRUSTED),
    ("self-signed certificate", _UNTRUSTED),
    (
        "certificate verify failed",  # librdkafka says no more
        "the broker's certificate has expired, is for another host (kafka.ssl_check_hostname), or is not signed by one"
        " we trust (kafka.ssl_cafile)",
    ),
    ("wrong version number", "this port does not speak TLS; check kafka.security_protocol and the URL"),
    ("record layer failure", "this port does not speak TLS; check kafka.security_protocol and the URL"),
)
# A refused login. kafka-python can lose the broker's last words: what arrives with the end of a connection is dropped.
_OTHER_PROTOCOL = (
    "disconnected",
    "eof occurred",
    "connection reset",
    "broken pipe",
    "transport failure",
    "invalid frame length",
)
_LOGIN_WORDS = ("disconnected", "sasl", "authenticat")
_LOGIN_FIELDS = ("kafka.sasl_username, its password", "kafka.sasl_token_file or kafka.sasl_token_url")


def for_kafka_python(config: Config) -> dict[str, Any]:
    """Settings of a client of kafka-python. Raises ConnectorError: a secret or a certificate can't be had."""
    kafka = config.kafka
    found: dict[str, Any] = {"security_protocol": kafka.security_protocol}
    if "SSL" in kafka.security_protocol:
        found["ssl_context"] = _context(kafka)
    if "SASL" in kafka.security_protocol:
        for name in _TALKATIVE:
            logging.getLogger(name).addFilter(_above_debug)
        found["sasl_mechanism"] = kafka.sasl_mechanism
        if kafka.sasl_mechanism == "OAUTHBEARER":
            found["sasl_oauth_token_provider"] = _Provider(_checked(kafka))
        else:
            found["sasl_plain_username"] = kafka.sasl_username
            found["sasl_plain_password"] = _secret(kafka, "sasl_password")
    return found


def for_librdkafka(config: Config) -> dict[str, Any]:
    """Settings of a client of confluent-kafka, likewise. With OAUTHBEARER `oauth_cb` is called from its `poll`."""
    kafka = config.kafka
    found: dict[str, Any] = {"security.protocol": kafka.security_protocol}
    if "SSL" in kafka.security_protocol:
        _context(kafka)  # its errors name the field
        paths = {"ca": kafka.ssl_cafile, "certificate": kafka.ssl_certfile, "key": kafka.ssl_keyfile}
        found |= {f"ssl.{name}.location": str(path) for name, path in paths.items() if path is not None}
        found["ssl.endpoint.identification.algorithm"] = "https" if kafka.ssl_check_hostname else "none"
        password = _key_password(kafka)
        if password is not None:
            found["ssl.key.password"] = password
    if "SASL" in kafka.security_protocol:
        found["sasl.mechanism"] = kafka.sasl_mechanism
        if kafka.sasl_mechanism == "OAUTHBEARER":
            tokens = _checked(kafka)
            found["oauth_cb"] = lambda _: tuple(tokens.current())
        else:
            found["sasl.username"] = kafka.sasl_username
            found["sasl.password"] = _secret(kafka, "sasl_password")
    return found


def who(config: Config) -> str:
    """How we present ourselves, for messages: `SASL_SSL PLAIN as 'worker'`."""
    kafka = config.kafka
    name = kafka.sasl_username or kafka.sasl_client_id
    parts = [kafka.security_protocol, kafka.sasl_mechanism or "", f"as {name!r}" if name else ""]
    return " ".join(part for part in parts if part)


def refused(cause: str) -> bool:
    """Whether `cause` is a refusal of TLS, which does not pass by trying again."""
    return bool(_tls_advice(cause))


def hint(cause: str, config: Config) -> str:
    """What to check after a connection failed for `cause`, to be put behind it; empty when we don't know."""
    said, protocol = cause.lower(), config.kafka.security_protocol
    advice = _tls_advice(cause)
    if not advice and "SASL" in protocol and any(word in said for word in _LOGIN_WORDS):
        fields = _LOGIN_FIELDS[config.kafka.sasl_mechanism == "OAUTHBEARER"]
        advice = f"while logging in; check {fields} and kafka.sasl_mechanism"
    if not advice and any(word in said for word in _OTHER_PROTOCOL):
        advice = f"does this port speak {protocol}? check kafka.security_protocol and the URL"
    return f"; {advice}" if advice else ""


def _tls_advice(cause: str) -> str:
    said = cause.lower().replace("_", " ")
    return next((advice for words, advice in _HINTS if words in said), "")


def _above_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG


def _context(kafka: Kafka) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = kafka.ssl_check_hostname
    try:
        if kafka.ssl_cafile is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(kafka.ssl_cafile)
    except OSError as error:
        raise ConnectorError(f"kafka.ssl_cafile: {kafka.ssl_cafile}: {error.strerror or error}") from error
    if kafka.ssl_certfile is not None and kafka.ssl_keyfile is not None:
        password = _key_password(kafka)
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(kafka.ssl_certfile, kafka.ssl_keyfile, password or "")
        except OSError as error:
            raise ConnectorError(
                f"kafka.ssl_certfile, kafka.ssl_keyfile: {kafka.ssl_certfile}, {kafka.ssl_keyfile}"
                f" (password {'given' if password else 'not given'}): {error.strerror or error}"
            ) from None
    return context


def _key_password(kafka: Kafka) -> str | None:
    given = kafka.ssl_key_password_env is not None or kafka.ssl_key_password_file is not None
    return _secret(kafka, "ssl_key_password") if given else None


def _secret(kafka: Kafka, name: str) -> str:
    """From the environment variable NAME_env names, or else the file NAME_file. Raises ConnectorError."""
    variable, path = getattr(kafka, f"{name}_env"), getattr(kafka, f"{name}_file")
    if variable is None:
        return _read(f"kafka.{name}_file", path)
    found = os.environ.get(variable)
    if not found:
        raise ConnectorError(f"kafka.{name}_env: {variable} is {'not set' if found is None else 'empty'}")
    return found


def _read(field: str, path: Path) -> str:
    try:
        found = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConnectorError(f"{field}: {path}: {type(error).__name__}") from None
    if not found:
        raise ConnectorError(f"{field}: {path}: is empty")
    return found


class Token(NamedTuple):
    """A bearer token. `expires_at_s` is in seconds since the epoch."""

    value: str
    expires_at_s: float


class Tokens:
    """Bearer tokens of `[kafka]`, from a file or by the client-credentials flow (RFC 6749, 4.4).

    One that was asked for serves every client of this process until 30 s (or a fifth of its life) before it expires.
    """

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._lock = threading.Lock()
        self._held: Token | None = None
        self._renew_at_s = 0.0

    def current(self) -> Token:
        """A token that has not expired.

        Raises:
            Unavailable: the endpoint does not answer, and what we hold has expired.
            ConnectorError: no such file, an expired token in it, or the endpoint refuses.
        """
        if self._kafka.sasl_token_file is not None:
            return _from_file(self._kafka.sasl_token_file)
        with self._lock:
            now = time.time()
            if self._held is None or now >= self._renew_at_s:
                self._renew(now)
            assert self._held is not None  # noqa: S101 - _renew raises otherwise
            return self._held

    def _renew(self, now: float) -> None:
        try:
            self._held = _ask(self._kafka)
        except ConnectorError as error:
            if self._held is None or now >= self._held.expires_at_s:
                raise
            log.warning("%s; using the old token, which is good for %.0f s", error, self._held.expires_at_s - now)
            return
        life_s = self._held.expires_at_s - now
        self._renew_at_s = now + max(life_s - _TOKEN_ROOM_S, 0.8 * life_s)


@lru_cache(maxsize=16)
def _tokens(kafka: Kafka) -> Tokens:
    return Tokens(kafka)


def _checked(kafka: Kafka) -> Tokens:
    """Asks once, here, where the error reaches who opens the client; the libraries would only log it."""
    tokens = _tokens(kafka)
    tokens.current()
    return tokens


def _from_file(path: Path) -> Token:
    value = _read("kafka.sasl_token_file", path).strip()
    expires_at_s = _expiry(value)
    if expires_at_s is None:
        return Token(value, time.time() + 60.0)  # opaque: look again soon
    if expires_at_s <= time.time():
        raise ConnectorError(f"kafka.sasl_token_file: {path}: the token expired {time.time() - expires_at_s:.0f} s ago")
    return Token(value, expires_at_s)


def _expiry(token: str) -> float | None:
    """The claim `exp` of a JSON web token, in seconds since the epoch; None when it has none or is none."""
    try:
        payload = token.split(".")[1]
        claims = orjson.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the client's secret to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(kafka: Kafka) -> Token:
    url, name, secret = kafka.sasl_token_url, kafka.sasl_client_id, _secret(kafka, "sasl_client_secret")
    form = {"grant_type": "client_credentials"} | ({"scope": kafka.sasl_scope} if kafka.sasl_scope else {})
    pair = ":".join(urllib.parse.quote_plus(part) for part in (str(name), secret))
    request = urllib.request.Request(  # noqa: S310 - the config allows https, and http to loopback
        str(url),
        urllib.parse.urlencode(form).encode(),
        {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode(), "Accept": "application/json"},
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TOKEN_TIMEOUT_S) as answer:
            said = answer.read(1 << 20)
    except urllib.error.HTTPError as error:
        passing = error.code >= 500 or error.code == 429
        advice = "" if passing else "; check kafka.sasl_client_id, its secret and kafka.sasl_scope"
        found = f"kafka.sasl_token_url: {url}: refused with HTTP {error.code}{advice}"
        raise (Unavailable if passing else ConnectorError)(found) from None
    except (OSError, HTTPException) as error:
        raise Unavailable(f"kafka.sasl_token_url: {url}: {getattr(error, 'reason', error)}") from None
    return _token(said, str(url))


def _token(said: bytes, url: str) -> Token:
    try:
        found = orjson.loads(said)
        value, life_s = found["access_token"], found.get("expires_in")
        if not isinstance(value, str) or not value:
            raise TypeError
        expires_at_s = _expiry(value) if life_s is None else time.time() + float(life_s)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConnectorError(f"kafka.sasl_token_url: {url}: the answer holds no access_token") from None
    return Token(value, time.time() + 300.0 if expires_at_s is None else expires_at_s)


class _Provider(AbstractTokenProvider):  # type: ignore[misc] # kafka-python has no types
    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens

    def token(self) -> str:
        return self._tokens.current().value
