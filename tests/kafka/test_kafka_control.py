"""The control log on real brokers: durable, in order, and one writer at a time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from connectors import kafka
from streamcl.protocols import ConnectorError, Fenced
from streamcl.records import Order, Run, Stream

if TYPE_CHECKING:
    from connectors.kafka_control import KafkaControlLog
    from tests.kafka.conftest import Cluster


def _order(number: int) -> Order:
    return Order((Run(Stream("events", 0), 3), Run(Stream("labels", 2), 1)), {Stream("events", 0): number})


def test_orders_are_read_back_from_any_offset_that_append_returned(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic())
    log = kafka.open_control(config.control_url, config)
    log.open()
    assert list(log.read(0)) == []
    ends = [log.append(_order(number)) for number in range(5)]
    assert list(log.read(0)) == [(end, _order(number)) for number, end in enumerate(ends)]
    assert list(log.read(ends[2])) == [(ends[3], _order(3)), (ends[4], _order(4))]
    assert list(log.read(ends[4])) == []
    log.close()


def test_a_read_ends_where_the_log_ended_when_it_was_called(broker: Cluster) -> None:
    config = broker.config(broker.topic())
    log = kafka.open_control(config.control_url, config)
    log.open()
    log.append(_order(0))
    orders = log.read(0)
    log.append(_order(1))
    assert [order for _, order in orders] == [_order(0)]
    log.close()


def test_who_opens_last_fences_the_others_for_good(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic())
    older, newer = (kafka.open_control(config.control_url, config) for _ in range(2))
    older.open()
    older.append(_order(0))
    newer.open()
    with pytest.raises(Fenced, match="another worker has opened"):
        older.append(_order(1))
    with pytest.raises(ConnectorError, match="not open"):
        older.append(_order(1))
    newer.append(_order(2))
    assert [order for _, order in newer.read(0)] == [_order(0), _order(2)]
    newer.close()


def test_another_shard_is_not_fenced(broker: Cluster) -> None:
    topic, name = broker.topic(2), broker.name()
    logs = []
    for index in range(2):
        config = broker.config(topic, name=name, shard={"index": index, "count": 2})
        logs.append(kafka.open_control(config.control_url, config))
        logs[-1].open()
    for log in logs:
        log.append(_order(0))
        assert len(list(log.read(0))) == 1
        log.close()


def test_a_broker_that_does_not_answer_shuts_the_log_until_it_is_opened_again(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic(), kafka={"transaction_timeout_s": 1.0})
    log = kafka.open_control(config.control_url, config)
    _open_patiently(log)  # a broker makes the topic of its transactions when it is first asked
    log.append(_order(0))
    with cluster.frozen():
        began = time.monotonic()
        with pytest.raises(ConnectorError, match="no answer within 1 s; what became of the transaction is unknown"):
            log.append(_order(1))
        assert time.monotonic() - began < 6
    with pytest.raises(ConnectorError, match="not open"):
        log.append(_order(1))
    _open_patiently(log)
    log.append(_order(2))
    orders = [order for _, order in log.read(0)]
    assert orders in ([_order(0), _order(2)], [_order(0), _order(1), _order(2)])
    log.close()


def _open_patiently(log: KafkaControlLog) -> None:
    """A supervisor restarts until it works: the broker may need a moment to end the transaction that hangs."""
    for _ in range(10):
        try:
            log.open()
            return
        except ConnectorError:
            time.sleep(0.5)
    pytest.fail("the log does not open again")


def test_an_offset_outside_the_log_is_an_error_that_names_it(broker: Cluster) -> None:
    config = broker.config(broker.topic())
    log = kafka.open_control(config.control_url, config)
    log.open()
    end = log.append(_order(0))
    with pytest.raises(
        ConnectorError, match=f"-control partition 0: offset 77 is wanted, available are 0 to {end + 1}"
    ):
        log.read(77)
    log.close()


@pytest.mark.parametrize(("value", "expected"), [(b"{", "not an order"), (b'{"shard": 3}', "not an order")])
def test_a_foreign_record_is_an_error_that_names_its_offset(broker: Cluster, value: bytes, expected: str) -> None:
    topic = broker.topic()
    broker.produce(topic, [(0, value, 1)])
    config = broker.config(topic, control=f"{broker.url}/{topic}")
    with pytest.raises(ConnectorError, match=f"{topic} partition 0, offset 0: {expected}"):
        list(kafka.open_control(config.control_url, config).read(0))


def test_the_log_of_another_shard_is_refused(broker: Cluster) -> None:
    topic = broker.topic()
    broker.produce(topic, [(0, b'{"shard": 3, "runs": [], "position": {}}', 1)])
    config = broker.config(topic, control=f"{broker.url}/{topic}")
    with pytest.raises(ConnectorError, match="written by shard 3, this is shard 0"):
        list(kafka.open_control(config.control_url, config).read(0))


def test_a_control_topic_with_several_partitions_is_refused(broker: Cluster) -> None:
    topic = broker.topic(2)
    config = broker.config(topic, control=f"{broker.url}/{topic}")
    with pytest.raises(ConnectorError, match="needs 1 partition, this topic has 2"):
        kafka.open_control(config.control_url, config).open()


def test_who_follows_the_orders_slowly_still_reads_them_to_the_end(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic(), kafka={"connect_timeout_s": 1.0})
    log = kafka.open_control(config.control_url, config)
    log.open()
    for number in range(3):
        log.append(_order(number))
    found = []
    for _, order in log.read(0):
        time.sleep(1.2)  # longer than the log's end may be waited for
        found.append(order)
    assert found == [_order(0), _order(1), _order(2)]
    log.close()
