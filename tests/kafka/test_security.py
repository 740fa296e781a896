"""Logging in to Apache Kafka: accepted, refused with a message that says what to check, and no secret anywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from connectors import kafka
from connectors.kafka import KafkaSource
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Stream
from tests.kafka.conftest import Cluster

EVENTS = Stream("events", 0)


def _source(config: Config) -> KafkaSource:
    return kafka.open_source(config.inputs, config)


@pytest.fixture
def secure(apache_kafka: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, dict[str, Any]]]:
    """A broker that wants a password, and the settings that give it."""
    monkeypatch.setenv("TEST_KAFKA_PASSWORD", "right-Horse-battery")
    yield (
        apache_kafka,
        {
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": "PLAIN",
            "sasl_username": "worker",
            "sasl_password_env": "TEST_KAFKA_PASSWORD",
        },
    )


def _behind_password(cluster: Cluster, topic: str, sasl: dict[str, Any]) -> Config:
    events = {"url": f"kafka://{cluster.sasl}/{topic}", "label": "y"}
    return cluster.config(topic, events=events, kafka=sasl | {"connect_timeout_s": 3.0})


def test_the_password_comes_from_the_environment_or_a_file(
    secure: tuple[Cluster, dict[str, Any]], tmp_path: Any
) -> None:
    cluster, sasl = secure
    topic = cluster.topic()
    (tmp_path / "password").write_text("right-Horse-battery\n")
    from_file = sasl | {"sasl_password_env": None, "sasl_password_file": tmp_path / "password"}
    for each in (sasl, from_file):
        source = _source(_behind_password(cluster, topic, each))
        assert source.seek({}) == {EVENTS: 0}
        source.close()


def test_a_wrong_password_is_refused_and_never_shown(
    secure: tuple[Cluster, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster, sasl = secure
    config = _behind_password(cluster, cluster.topic(), sasl)
    monkeypatch.setenv("TEST_KAFKA_PASSWORD", "wrong-Horse-battery")
    with caplog.at_level(logging.DEBUG), pytest.raises(ConnectorError) as refused:
        _source(config)
    text = str(refused.value)
    assert text.startswith(f"kafka://{cluster.sasl} (SASL_PLAINTEXT PLAIN as 'worker'): ")
    assert "authentication refused" in text or "while authenticating; wrong user, password" in text
    assert "Horse" not in text + repr(refused.value.__cause__) + caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sasl_password_env": "TEST_KAFKA_UNSET"}, "TEST_KAFKA_UNSET is not set"),
        ({"sasl_password_env": None}, "SASL needs kafka.sasl_password_env or kafka.sasl_password_file"),
        ({"sasl_password_env": None, "sasl_password_file": "missing"}, "sasl_password_file: missing: FileNotFound"),
    ],
)
def test_what_is_missing_for_sasl_is_named(
    secure: tuple[Cluster, dict[str, Any]], settings: dict[str, Any], expected: str
) -> None:
    cluster, sasl = secure
    with pytest.raises(ConnectorError, match=expected):
        _source(_behind_password(cluster, cluster.topic(), sasl | settings))
