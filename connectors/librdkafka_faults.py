"""What an error of librdkafka means: which fault it is, and how to say it to a person."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from kafka import errors as kafka_errors

from connectors import kafka_python_faults
from connectors.kafka_client import Fault, Kind

# The library's own codes are negative. A broker's mean the same to both libraries, see `kafka_python_faults.fault_of`.
_KINDS = {
    Kind.FENCED: (KafkaError._FENCED,),
    Kind.DENIED: (KafkaError._AUTHENTICATION, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION),
    Kind.RANGE: (KafkaError._AUTO_OFFSET_RESET, KafkaError._NO_OFFSET),
    Kind.PASSING: (
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._WAIT_COORD,
        KafkaError._UNKNOWN_BROKER,
        KafkaError._QUEUE_FULL,
        KafkaError._DESTROY_BROKER,
    ),
}
_AWAY = _KINDS[Kind.PASSING]
_KIND = {code: kind for kind, codes in _KINDS.items() for code in codes}


@contextmanager
def faults() -> Iterator[None]:
    """Turns every error of the library into a Fault."""
    try:
        yield
    except KafkaException as error:
        raise fault_of(error.args[0]) from error
    except BufferError as error:
        raise Fault(Kind.PASSING, "QueueFull", str(error)) from error


def fault_of(error: Any) -> Fault:
    if error.code() >= -1:
        return kafka_python_faults.fault_of(kafka_errors.for_code(error.code())(error.str()))
    text = error.str()
    if error.code() == KafkaError._AUTHENTICATION:
        text = f"authentication refused: {text}"
    elif error.code() in _AWAY:
        text = f"no broker could be reached: {text}"
    return Fault(kind_of(error), error.name().strip("_"), text)


def kind_of(error: Any) -> Kind:
    code = error.code()
    if code >= -1:
        return kafka_python_faults.fault_of(kafka_errors.for_code(code)()).kind
    return _KIND.get(code, Kind.PASSING if error.retriable() else Kind.BROKEN)
