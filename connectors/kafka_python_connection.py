"""Opening any client of kafka-python: what all of them are told, and why one could not connect."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient

from connectors import kafka_auth
from connectors.kafka_python_faults import DENIED, explain, transient
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Unavailable

_TELL_WHY = ("kafka.net.manager", "kafka.cluster")


def settings(servers: str, config: Config) -> dict[str, Any]:
    """What every client is opened with. Holds the password: never log it, never put it into an error."""
    found: dict[str, Any] = {
        "bootstrap_servers": servers.split(","),
        "client_id": f"{config.name}-{config.shard.index}",
        "request_timeout_ms": round(config.kafka.request_timeout_s * 1000),
        "metadata_max_age_ms": round(config.kafka.metadata_max_age_s * 1000),
    }
    return found | kafka_auth.for_kafka_python(config)


def connect(client: Callable[..., Any], wanted: Mapping[str, Any], config: Config) -> Any:
    """Open a client of kafka-python, trying again until `kafka.connect_timeout_s` has passed.

    Raises:
        ConnectorError: unreachable, refused, or settings that can't be; names bootstrap servers and mechanism.
    """
    where = f"kafka://{','.join(wanted['bootstrap_servers'])} ({kafka_auth.who(config)})"
    deadline = time.monotonic() + config.kafka.connect_timeout_s
    told: list[Exception] = []
    attempt_s = 1.0  # short at first: the client itself would retry a wrong password until its time-out
    while True:
        left_s = max(deadline - time.monotonic(), 0.001)
        with _last_words() as causes:
            try:
                return _open(client, wanted, min(attempt_s, left_s))
            except kafka_errors.KafkaError as error:
                causes.append(error)
            except (OSError, ValueError, RuntimeError) as error:
                raise ConnectorError(f"{where}: {error}") from error
        told = [each for each in causes if not _timed_out(each)] or told
        fatal = [each for each in causes if _fatal(each)]
        if fatal or time.monotonic() >= deadline:
            cause = (fatal or told or causes)[0]
            refusal = ConnectorError if fatal else Unavailable
            raise refusal(f"{where}: {explain(cause)}{kafka_auth.hint(str(cause), config)}") from cause
        attempt_s *= 2


def _fatal(error: Exception) -> bool:
    return isinstance(error, DENIED) or not transient(error) or kafka_auth.refused(str(error))


def _timed_out(error: Exception) -> bool:
    return isinstance(error, kafka_errors.KafkaTimeoutError | kafka_errors.RequestTimedOutError)


def _open(client: Callable[..., Any], wanted: Mapping[str, Any], timeout_s: float) -> Any:
    """One attempt. A constructor that fails leaves its IO thread running, so we close the network client under it."""
    made: list[Any] = []

    def network(*args: Any, **kwargs: Any) -> Any:
        made.append(KafkaNetClient(*args, **kwargs))
        return made[-1]

    try:
        return client(**wanted, bootstrap_timeout_ms=max(1, round(timeout_s * 1000)), kafka_client=network)
    except BaseException:
        for each in made:
            each.close()
        raise


@contextmanager
def _last_words() -> Iterator[list[Exception]]:
    """Collects why connecting failed: the client tells only its log, and raises a time-out."""
    causes: list[Exception] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            causes.extend(each for each in arguments if isinstance(each, Exception))

    listener, sources = Listener(logging.WARNING), [logging.getLogger(name) for name in _TELL_WHY]
    for source in sources:
        source.addHandler(listener)
    try:
        yield causes
    finally:
        for source in sources:
            source.removeHandler(listener)
