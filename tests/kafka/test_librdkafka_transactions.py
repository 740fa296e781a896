"""What librdkafka's transactions say of a fault that a broker's answer brought before the next message was given."""

from __future__ import annotations

import pytest

from connectors.kafka_client import Fault, Kind
from streamcl.records import Message

confluent_kafka = pytest.importorskip("confluent_kafka", reason="it comes with streamcl[librdkafka]")
from connectors.librdkafka import Transactions  # noqa: E402


class Refused:
    """A producer that is told, before it is given a message, that its transactions are forbidden."""

    def produce(self, *_given: object, **_named: object) -> None:
        raise confluent_kafka.KafkaException(confluent_kafka.KafkaError(confluent_kafka.KafkaError._FATAL))

    def commit_transaction(self, _timeout_s: float) -> None:
        code = confluent_kafka.KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED
        raise confluent_kafka.KafkaException(confluent_kafka.KafkaError(code))


def test_a_fatal_error_is_told_by_what_it_was() -> None:
    transactions = Transactions.__new__(Transactions)
    transactions._producer, transactions._timeout_s = Refused(), 1.0
    with pytest.raises(Fault) as raised:
        transactions.send("scores", Message(b"1"))
    assert raised.value.kind is Kind.DENIED
