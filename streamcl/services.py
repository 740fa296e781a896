"""The stations that face outside: how brokers and the schema registry are reached and logged in to; how we are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import model_validator

from streamcl.stations import Free, Station, Stop

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Security(Station):
    """How brokers are trusted and logged in to. Secrets are named, never written: an environment variable or a file."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Free(
        "PLAINTEXT", description="SSL: with TLS; SASL: with a login"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Free(
        None, description="how to log in; needed with SASL"
    )
    sasl_username: str | None = Free(None, description="who logs in (PLAIN, SCRAM)")
    sasl_password_env: str | None = Free(None, description="environment variable that holds the password")
    sasl_password_file: Path | None = Free(None, description="file that holds the password")
    sasl_token_file: Path | None = Free(None, description="file that holds a token (OAUTHBEARER); read when it changes")
    sasl_token_url: str | None = Free(None, description="or where tokens are asked for, by client credentials; https")
    sasl_client_id: str | None = Free(None, description="who asks for tokens")
    sasl_client_secret_env: str | None = Free(None, description="environment variable that holds the client's secret")
    sasl_client_secret_file: Path | None = Free(None, description="file that holds the client's secret")
    sasl_scope: str | None = Free(None, description="scope of the tokens asked for")
    ssl_cafile: Path | None = Free(None, description="PEM file of the authorities to trust; default: the system's")
    ssl_certfile: Path | None = Free(None, description="PEM file of the client's certificate (mTLS)")
    ssl_keyfile: Path | None = Free(None, description="PEM file of the client's key (mTLS)")
    ssl_key_password_env: str | None = Free(None, description="environment variable that holds the key's password")
    ssl_key_password_file: Path | None = Free(None, description="file that holds the key's password")
    ssl_check_hostname: bool = Free(True, description="whether a broker's certificate must name the host we asked")

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        """Every field that is set has an effect, and every field that is needed is set."""
        for prefix, on in (("sasl_", "SASL" in self.security_protocol), ("ssl_", "SSL" in self.security_protocol)):
            if not on and (useless := self._set(prefix)):
                raise ValueError(
                    f"{useless[0]} has no effect with security_protocol {self.security_protocol}; set SASL_SSL"
                    + ("" if prefix == "sasl_" else " or SSL")
                )
        if "SASL" in self.security_protocol:
            self._login_fits()
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            there, lacking = (
                ("ssl_keyfile", "ssl_certfile") if self.ssl_certfile is None else ("ssl_certfile", "ssl_keyfile")
            )
            raise ValueError(f"{lacking} is needed by {there}")
        self._secret("ssl_key_password", "ssl_keyfile", required=False)
        return self

    def _login_fits(self) -> None:
        mechanism = self.sasl_mechanism
        if mechanism is None:
            raise ValueError(f"sasl_mechanism is needed by security_protocol {self.security_protocol}")
        bearer = mechanism == "OAUTHBEARER"
        prefixes = ("sasl_username", "sasl_password") if bearer else ("sasl_token", "sasl_client", "sasl_scope")
        if useless := [name for prefix in prefixes for name in self._set(prefix)]:
            raise ValueError(f"{useless[0]} has no effect with sasl_mechanism {mechanism}")
        if not bearer and not self.sasl_username:
            raise ValueError(f"sasl_username is needed by sasl_mechanism {mechanism}")
        if not bearer:
            self._secret("sasl_password", f"sasl_mechanism {mechanism}")
        elif (self.sasl_token_file is None) == (self.sasl_token_url is None):
            raise ValueError("sasl_mechanism OAUTHBEARER needs one of sasl_token_file and sasl_token_url")
        elif self.sasl_token_url is not None:
            self._token_url_fits(self.sasl_token_url)
        elif useless := self._set("sasl_client") + self._set("sasl_scope"):
            raise ValueError(f"{useless[0]} has no effect with sasl_token_file")

    def _token_url_fits(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and (parts.scheme != "http" or parts.hostname not in _LOOPBACK):
            raise ValueError("sasl_token_url must begin with https://: the client's secret travels there")
        if "@" in parts.netloc:
            raise ValueError("sasl_token_url: no user or password in a URL; see sasl_client_id")
        if not self.sasl_client_id:
            raise ValueError("sasl_client_id is needed by sasl_token_url")
        self._secret("sasl_client_secret", "sasl_token_url")

    def _secret(self, name: str, owner: str, required: bool = True) -> None:
        """One of NAME_env and NAME_file, and only where there is something to open with it."""
        found = self._set(name)
        if len(found) > 1 or (required and not found):
            raise ValueError(f"one of {name}_env and {name}_file is needed by {owner}")
        if found and not required and getattr(self, owner) is None:
            raise ValueError(f"{found[0]} has no effect without {owner}")

    def _set(self, prefix: str) -> list[str]:
        """The fields that begin with `prefix` and differ from their default."""
        fields = type(self).model_fields
        return [name for name in fields if name.startswith(prefix) and getattr(self, name) != fields[name].default]


class Kafka(_Security):
    """Settings of the Kafka connector."""

    client: Literal["kafka-python", "librdkafka"] = Free(
        "kafka-python", description="library that talks to brokers; librdkafka needs streamcl[librdkafka]"
    )
    start_at: Literal["earliest", "latest"] = Free("earliest", description="where a shard without any state starts")
    on_gap: Literal["fail", "earliest", "latest"] = Free(
        "fail", description="where to go on when retention has removed what was to be read next"
    )
    request_timeout_s: float = Free(30.0, gt=0, description="how long a broker may take to answer")
    connect_timeout_s: float = Free(30.0, gt=0, description="how long a start waits for an unreachable broker")
    fetch_max_wait_s: float = Free(0.1, gt=0, description="how long a broker may wait for records to come")
    fetch_queue_bytes: int = Free(
        16 << 20, ge=1 << 20, description="what librdkafka fetches ahead; kafka-python holds one fetch per broker"
    )
    metadata_max_age_s: float = Free(60.0, gt=0, description="how often topics are looked at for new partitions")
    delivery_timeout_s: float = Free(120.0, gt=0, description="how long a prediction may be on its way")
    linger_s: float = Free(0.005, ge=0, description="how long a prediction waits for others to travel with")
    max_inflight_records: int = Free(20_000, ge=1, description="unacknowledged predictions; beyond it the loop waits")
    max_inflight_bytes: int = Free(64 << 20, ge=1024, description="the same in bytes")
    max_request_bytes: int = Free(1_048_576, ge=1024, description="a larger message is not sent")
    compression: Literal["none", "gzip", "lz4", "zstd"] = Free("lz4", description="of what is sent")
    compact_predictions: bool = Free(
        False,
        description="key predictions by event id, not by the event's key, and let their topic keep the last of each id"
        " (cleanup.policy, when the topic is made here)",
    )
    transaction_timeout_s: float = Free(60.0, gt=0, description="after it the brokers give up a silent worker's write")


class Registry(Station):
    """Where the schemas of Avro and Protobuf payloads are kept: a schema registry with Confluent's REST interface.

    Secrets are named, never written: an environment variable or a file.
    """

    url: str | None = Free(
        None, pattern="^https?://", description="http(s)://host:port[/path]; no proxy of the environment is used"
    )
    username: str | None = Free(None, description="who logs in (basic authentication)")
    password_env: str | None = Free(None, description="environment variable that holds the password")
    password_file: Path | None = Free(None, description="file that holds the password")
    ssl_cafile: Path | None = Free(None, description="PEM file of the authorities to trust; default: the system's")
    ssl_certfile: Path | None = Free(None, description="PEM file of the client's certificate")
    ssl_keyfile: Path | None = Free(None, description="PEM file of the client's key")
    timeout_s: float = Free(10.0, gt=0, description="how long one answer may take")
    patience_s: float = Free(
        10.0, ge=0, description="how long a turn waits for a registry that is away; then the shard recovers"
    )
    unknown_id_s: float = Free(60.0, ge=0, description="how long a schema id that it does not know is not asked again")
    subject: str | None = Stop(None, description="of the predictions' schema; default: TOPIC-value")
    register_schema: bool = Free(True, description="register the predictions' schema; else it must be there already")


class Serve(Station):
    """Predictions over HTTP: `streamcl serve`, and the worker's own endpoint.

    Secrets are named, never written: an environment variable or a file.
    """

    host: str = Free("127.0.0.1", description="where to listen; loopback unless told")
    port: int = Free(8080, ge=0, le=65535, description="0: any that is free, which the log then names")
    in_worker: bool = Free(False, description="`run` answers too, from the live model; needs one shard in the process")
    api_key_env: str | None = Free(None, description="environment variable that holds the key clients must show")
    api_key_file: Path | None = Free(None, description="file that holds it")
    ssl_certfile: Path | None = Free(None, description="PEM file of our certificate and its chain: HTTPS only")
    ssl_keyfile: Path | None = Free(None, description="PEM file of its key")
    max_body_bytes: int = Free(1 << 20, ge=1, description="a larger body is refused (413)")
    max_header_bytes: int = Free(16_384, ge=256, description="a longer head is refused (431)")
    max_instances: int = Free(1000, ge=1, description="of one request (413)")
    max_queued_instances: int = Free(10_000, ge=1, description="of all requests under way; beyond it: 503, Retry-After")
    max_connections: int = Free(1000, ge=1, description="at once; further ones are refused (503)")
    request_timeout_s: float = Free(
        10.0, gt=0, description="from its first byte a request must be whole within this (408); an answer be read"
    )
    keep_alive_s: float = Free(60.0, gt=0, description="an idle connection is closed after this")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env and api_key_file: one of them")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile: one is of no use without the other")
        if self.max_queued_instances < self.max_instances:
            raise ValueError("max_queued_instances: below max_instances, which no request could then have")
        return self
