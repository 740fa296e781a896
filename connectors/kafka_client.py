"""What source, sink and control log share: settings, connecting, topics and their bounds, and errors in plain words.

The traps named `F1` to `F11` in these modules are faults of the client that we found by running it; each comment says
what is done about one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient

from connectors import kafka_auth
from streamcl.config import Config
from streamcl.protocols import ConnectorError

log = logging.getLogger(__name__)

_DENIED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
_UNKNOWN_TOPIC = 3
_TELL_WHY = ("kafka.net.manager", "kafka.cluster")


class Bounds(NamedTuple):
    """The offsets that a partition holds: `start` <= offset < `end`."""

    start: int
    end: int


def locate(url: str) -> tuple[str, str]:
    """(bootstrap servers, topic) of `kafka://host:port[,host:port]/topic`. Raises ConnectorError."""
    parts = urlsplit(url)
    topic = parts.path.strip("/")
    if "@" in parts.netloc:
        raise ConnectorError(f"kafka URL of topic {topic!r}: credentials belong in [kafka], not in the URL")
    if parts.scheme != "kafka" or not parts.netloc or not topic or "/" in topic:
        raise ConnectorError(f"{url!r} is not of the form kafka://host:port[,host:port]/topic")
    return parts.netloc, topic


def settings(servers: str, config: Config) -> dict[str, Any]:
    """What every client is opened with. Holds the password: never log it, never put it into an error."""
    found: dict[str, Any] = {
        "bootstrap_servers": servers.split(","),
        "client_id": f"{config.name}-{config.shard.index}",
        "request_timeout_ms": round(config.kafka.request_timeout_s * 1000),
        "metadata_max_age_ms": 60_000,
    }
    return found | kafka_auth.for_kafka_python(config)


def consumer_settings(servers: str, config: Config) -> dict[str, Any]:
    return settings(servers, config) | {
        "enable_auto_commit": False,
        "isolation_level": "read_committed",
        # Never a silent reset; a misspelt policy would act as "none" too, without saying so.
        "auto_offset_reset": "none",
        "allow_auto_create_topics": False,
        "fetch_max_wait_ms": round(config.kafka.fetch_max_wait_s * 1000),
        "metrics_enabled": False,
    }


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
            raise ConnectorError(f"{where}: {explain(cause)}{kafka_auth.hint(str(cause), config)}") from cause
        attempt_s *= 2


def _fatal(error: Exception) -> bool:
    return isinstance(error, _DENIED) or not transient(error) or kafka_auth.refused(str(error))


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


def transient(error: BaseException) -> bool:
    """True for what passes when brokers come back. F6: one such error does not call itself retriable."""
    others = (kafka_errors.UnknownBrokerIdError, kafka_errors.BrokerNotAvailableError)
    return isinstance(error, others) or bool(getattr(error, "retriable", False))


def explain(error: BaseException) -> str:
    """The cause for a person; the client's own text follows."""
    if isinstance(error, kafka_errors.AuthorizationError):
        return f"not authorised: {error}"
    if isinstance(error, _DENIED):
        return f"authentication refused: {error}"
    if isinstance(error, kafka_errors.KafkaTimeoutError | kafka_errors.KafkaConnectionError):
        return f"no broker could be reached: {error}"
    return str(error)


@contextmanager
def plain_errors(where: str) -> Iterator[None]:
    """Turns every error of the client into a ConnectorError that begins with `where`."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise ConnectorError(f"{where}: {explain(error)}") from error


def partition_counts(consumer: Any, topics: Collection[str], servers: str) -> dict[str, int]:
    """Number of partitions by topic. Raises ConnectorError for a topic that does not exist or may not be seen."""
    counts: dict[str, int] = {}
    for topic in sorted(topics):
        with plain_errors(f"kafka://{servers}/{topic}"):
            counts[topic] = len(consumer.partitions_for_topic(topic) or ())
        if not counts[topic]:
            raise ConnectorError(f"kafka://{servers}/{topic}: no such topic, or no right to see it")
    return counts


def bounds(servers: str, partitions: Sequence[TopicPartition], config: Config) -> dict[TopicPartition, Bounds]:
    """What each partition holds now, by asking and then by fetching once.

    The fetch is for the end: under read_committed the answer to the question is the last stable offset, and a broker
    was seen to answer with the base of its last batch. The high watermark that comes with a fetch is right on both.
    """
    wanted = consumer_settings(servers, config) | {"fetch_max_wait_ms": 1}
    timeout_s = config.kafka.request_timeout_s
    consumer = connect(KafkaConsumer, wanted, config)
    try:
        with plain_errors(f"kafka://{servers}: bounds of {_names(partitions)}"):
            consumer.assign(partitions)
            starts = consumer.beginning_offsets(partitions, timeout_ms=timeout_s * 1000)
            ends = consumer.end_offsets(partitions, timeout_ms=timeout_s * 1000)
            for partition in partitions:
                consumer.seek(partition, ends[partition])
            _fetch_once(consumer, partitions, timeout_s)
            marks = {each: max(ends[each], consumer.highwater(each)) for each in partitions}
        return {each: Bounds(starts[each], marks[each]) for each in partitions}
    finally:
        consumer.close(timeout_ms=1000)


def _fetch_once(consumer: Any, partitions: Sequence[TopicPartition], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(consumer.highwater(each) is None for each in partitions):
        if time.monotonic() > deadline:
            raise kafka_errors.KafkaTimeoutError(f"no fetch was answered within {timeout_s:g} s")
        for fetched in consumer.poll(timeout_ms=10):
            consumer.pause(fetched)


def _names(partitions: Sequence[TopicPartition]) -> str:
    return ", ".join(sorted({each.topic for each in partitions}))


def ensure_topic(servers: str, topic: str, config: Config, partitions: int = -1, **configs: str) -> int:
    """Make a missing topic (-1: as many partitions as the broker likes); the number of its partitions.

    Raises:
        ConnectorError: it is missing and can't be made.
    """
    admin = connect(KafkaAdminClient, settings(servers, config), config)
    try:
        with plain_errors(f"kafka://{servers}/{topic}: can't be made"):
            [found] = admin.describe_topics([topic])
            if found["error_code"] == _UNKNOWN_TOPIC:
                _create(admin, topic, partitions, configs)
                [found] = admin.describe_topics([topic])
        if found["error_code"]:
            raise ConnectorError(f"kafka://{servers}/{topic}: {kafka_errors.for_code(found['error_code']).__name__}")
        return len(found["partitions"])
    finally:
        admin.close()


def _create(admin: Any, topic: str, partitions: int, configs: Mapping[str, str]) -> None:
    named = {key.replace("_", "."): value for key, value in configs.items()}
    try:
        admin.create_topics({topic: {"num_partitions": partitions, "configs": named}}, wait_for_metadata=True)
    except kafka_errors.TopicAlreadyExistsError:
        admin.wait_for_topics([topic])  # another shard was faster
    log.info("topic %s made", topic)


def discard(producer: Any) -> None:
    """Close a producer of unknown state. Never raises; waits about 2 s at most.

    F2: `close` raises while records are unacknowledged, and then leaves the sender running. So the second attempt
    fails them first, for which the client has no public way.
    """
    for timeout_s in (0.0, 2.0):
        try:
            producer.close(timeout=timeout_s)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, this producer is not used again
            log.debug("closing a broken producer: %s", error)
            producer._sender.force_close()
            producer._sender.join(1.0)
    producer._closed = True  # else its __del__ tries again, and prints
