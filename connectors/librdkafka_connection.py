"""Opening any client of librdkafka: what all of them are told, and why one could not connect."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from connectors import kafka_auth
from connectors.kafka_client import Kind
from connectors.librdkafka_faults import fault_of, kind_of
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Unavailable

_LOG = logging.getLogger("connectors.librdkafka")  # where what the library says goes


def settings(servers: str, config: Config) -> dict[str, Any]:
    """What every client is opened with. Holds the password: never log it, never put it into an error."""
    return {
        "bootstrap.servers": servers,
        "client.id": f"{config.name}-{config.shard.index}",
        "socket.timeout.ms": round(config.kafka.request_timeout_s * 1000),
        "topic.metadata.refresh.interval.ms": round(config.kafka.metadata_max_age_s * 1000),
        "reconnect.backoff.max.ms": 1000,
        "logger": _LOG,
        **kafka_auth.for_librdkafka(config),
    }


def connect(client: Callable[[Any], Any], wanted: Mapping[str, Any], config: Config) -> Any:
    """Open a client and wait until a broker answers, for `kafka.connect_timeout_s`.

    Raises:
        ConnectorError: refused, or settings that can't be. Unavailable: no answer. Names bootstrap servers and user.
    """
    where = f"kafka://{wanted['bootstrap.servers']} ({kafka_auth.who(config)})"
    told: list[Any] = []
    try:
        opened = client({**wanted, "error_cb": told.append})
    except (KafkaException, ValueError, TypeError) as error:
        raise ConnectorError(f"{where}: {error}") from error
    deadline = time.monotonic() + config.kafka.connect_timeout_s
    while not _answers(opened, deadline, told):
        fatal = [each for each in told if kind_of(each) is not Kind.PASSING or kafka_auth.refused(each.str())]
        if fatal or time.monotonic() >= deadline:
            known = [each for each in told if each.code() not in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT)]
            known.sort(key=lambda each: each.str().startswith("Failed to get metadata"))  # says least
            cause = fault_of((fatal or known or told)[0])
            refusal = ConnectorError if fatal else Unavailable
            raise refusal(f"{where}: {cause}{kafka_auth.hint(str(cause), config)}")
    told.clear()
    return opened


def _answers(client: Any, deadline: float, told: list[Any]) -> bool:
    try:
        client.list_topics(timeout=min(max(deadline - time.monotonic(), 0.01), 0.5))
    except KafkaException as error:
        client.poll(0)  # what it has to say comes through callbacks
        told.append(error.args[0])
        return False
    return True
