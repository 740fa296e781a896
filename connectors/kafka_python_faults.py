"""What an error of kafka-python means: which fault it is, whether it passes, how to say it to a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kafka import errors as kafka_errors

from connectors.kafka_client import Fault, Kind

DENIED = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)
_KINDS: tuple[tuple[Kind, tuple[type[Exception], ...]], ...] = (
    (
        Kind.FENCED,
        (
            kafka_errors.ProducerFencedError,
            kafka_errors.InvalidProducerEpochError,
            kafka_errors.TransactionCoordinatorFencedError,
        ),
    ),
    (Kind.DENIED, (*DENIED, kafka_errors.UnknownTopicOrPartitionError, kafka_errors.InvalidTopicError)),
    (
        Kind.RECORD,
        (
            kafka_errors.MessageSizeTooLargeError,
            kafka_errors.RecordListTooLargeError,
            kafka_errors.InvalidRecordError,
            kafka_errors.InvalidTimestampError,
        ),
    ),
)


def transient(error: BaseException) -> bool:
    """True for what passes when brokers come back. F6: one such error does not call itself retriable."""
    others = (kafka_errors.UnknownBrokerIdError, kafka_errors.BrokerNotAvailableError)
    return isinstance(error, others) or bool(getattr(error, "retriable", False))


def explain(error: BaseException) -> str:
    """The cause for a person; the client's own text follows."""
    if isinstance(error, kafka_errors.AuthorizationError):
        return f"not authorised: {error}"
    if isinstance(error, DENIED):
        return f"authentication refused: {error}"
    if isinstance(error, kafka_errors.KafkaTimeoutError | kafka_errors.KafkaConnectionError):
        return f"no broker could be reached: {error}"
    return str(error)


@contextmanager
def faults() -> Iterator[None]:
    """Turns every error of the library into a Fault."""
    try:
        yield
    except kafka_errors.KafkaError as error:
        raise fault_of(error) from error


def fault_of(error: BaseException) -> Fault:
    """A transactional producer that has failed wraps the cause in every later error: then the cause counts."""
    cause = next((each for each in error.args if isinstance(each, kafka_errors.KafkaError)), None)
    if type(error) is kafka_errors.KafkaError and cause is not None:
        return fault_of(cause)
    return Fault(_kind(error), type(error).__name__.removesuffix("Error"), explain(error))


def _kind(error: BaseException) -> Kind:
    for kind, classes in _KINDS:
        if isinstance(error, classes):
            return kind
    return Kind.PASSING if transient(error) else Kind.BROKEN
