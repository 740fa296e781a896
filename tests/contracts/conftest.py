"""The brokers of the Kafka tests, for the contract that all connectors keep."""

from tests.kafka.conftest import apache_kafka, broker

__all__ = ["apache_kafka", "broker"]
