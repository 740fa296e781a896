"""The control log on real brokers: durable, in order, and one writer at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from kafka import KafkaConsumer, TopicPartition

from connectors import kafka, kafka_client
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Fenced, Unavailable
from streamcl.records import Message, Order, Run, Stream
from tests.kafka.conftest import CLIENTS, Cluster

if TYPE_CHECKING:
    from connectors.kafka_control import KafkaControlLog

# The embedded broker shows what was aborted.
apache_only = pytest.mark.parametrize("cluster", [("apache_kafka", client) for client in CLIENTS], indirect=True)


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
    with pytest.raises(Fenced, match="another worker has opened"):
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


def _exactly_once(cluster: Cluster) -> tuple[Config, str]:
    """A configuration, and the name of its topic of predictions."""
    predictions = cluster.topic()
    url = f"{cluster.url}/{predictions}"
    delivery = {"mode": "exactly_once"}
    return cluster.config(cluster.topic(), predictions=url, delivery=delivery), predictions


def _values(cluster: Cluster, topic: str, isolation: str, count: int) -> list[bytes]:
    """What a reader sees; looks again while it is less than `count`."""
    found: list[bytes] = []
    consumer = KafkaConsumer(bootstrap_servers=cluster.bootstrap, isolation_level=isolation, enable_auto_commit=False)
    consumer.assign([TopicPartition(topic, 0)])
    consumer.seek_to_beginning()
    deadline = time.monotonic() + (20 if count else 1)
    while time.monotonic() < deadline and not 0 < count <= len(found):
        found += [record.value for records in consumer.poll(200).values() for record in records]
    consumer.close()
    return found


@apache_only
def test_an_order_and_its_outputs_become_visible_together(cluster: Cluster) -> None:
    config, predictions = _exactly_once(cluster)
    outcomes = cluster.topic()
    config = config.model_copy(update={"outcomes": f"{cluster.url}/{outcomes}"})
    log = kafka.open_control(config.control_url, config)
    log.open()
    for number in range(3):
        messages = [Message(b"%d-%d" % (number, i), b"k") for i in range(2)]
        log.append(_order(number), dict.fromkeys(config.published, messages))
        for topic in (predictions, outcomes):
            assert len(_values(cluster, topic, "read_committed", 2 * number + 2)) == 2 * number + 2
        assert [order for _, order in log.read(0)] == [_order(each) for each in range(number + 1)]
    log.close()


_DYING = """
import sys, time
from streamcl.config import Config
from streamcl.records import Message
from connectors import kafka
config = Config.model_validate_json(sys.stdin.read())
log = kafka.open_control(config.control_url, config)
log.open()
transaction = log._producer
transaction.begin()
transaction.send(sys.argv[1], Message(b"half"))
transaction.send(sys.argv[2], Message(b"order"), 0)
print("sent", flush=True)
time.sleep(60)
"""


@apache_only
def test_what_a_killed_writer_left_half_done_is_never_visible(cluster: Cluster) -> None:
    config, predictions = _exactly_once(cluster)
    control = kafka_client.locate(config.control_url)[1]
    command = [sys.executable, "-c", _DYING, predictions, control]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdin and writer.stdout
    writer.stdin.write(config.model_dump_json().encode())
    writer.stdin.close()
    assert writer.stdout.readline() == b"sent\n"
    for topic, value in ((predictions, b"half"), (control, b"order")):
        assert _values(cluster, topic, "read_uncommitted", 1) == [value]  # it did arrive
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert _values(cluster, predictions, "read_committed", 0) == []
    log = kafka.open_control(config.control_url, config)
    log.open()
    assert list(log.read(0)) == []
    log.append(_order(1), {config.published[0]: [Message(b"whole")]})
    assert _values(cluster, predictions, "read_committed", 1) == [b"whole"]
    assert [order for _, order in log.read(0)] == [_order(1)]
    assert _values(cluster, predictions, "read_uncommitted", 2) == [b"half", b"whole"]
    log.close()


@apache_only
def test_a_writer_that_is_fenced_in_the_middle_of_a_transaction_leaves_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, predictions = _exactly_once(cluster)
    older, newer = (kafka.open_control(config.control_url, config) for _ in range(2))
    older.open()
    assert older._producer is not None
    commit = older._producer.commit

    def overtaken() -> None:
        assert _values(cluster, predictions, "read_uncommitted", 1) == [b"lost"]
        newer.open()
        commit()

    monkeypatch.setattr(older._producer, "commit", overtaken)
    with pytest.raises(Fenced, match="another worker has opened"):
        older.append(_order(0), {config.published[0]: [Message(b"lost")]})
    newer.append(_order(1), {config.published[0]: [Message(b"kept")]})
    assert _values(cluster, predictions, "read_committed", 1) == [b"kept"]
    assert [order for _, order in newer.read(0)] == [_order(1)]
    newer.close()


def test_an_output_that_is_too_large_is_refused_before_the_transaction(cluster: Cluster) -> None:
    config, predictions = _exactly_once(cluster)
    log = kafka.open_control(config.control_url, config)
    log.open()
    with pytest.raises(BadInput, match=r"kafka\.max_request_bytes is 1048576") as refused:
        log.append(_order(0), {config.published[0]: [Message(b"fits"), Message(b"x" * (1 << 20))]})
    assert refused.value.reason == "too_large"
    log.append(_order(1), {config.published[0]: [Message(b"next")]})
    assert _values(cluster, predictions, "read_committed", 1) == [b"next"]
    assert [order for _, order in log.read(0)] == [_order(1)]
    log.close()


@apache_only
def test_an_output_that_its_topic_does_not_take_is_no_outage(cluster: Cluster) -> None:
    config, predictions = _exactly_once(cluster)
    cluster.alter(predictions, {"max.message.bytes": "3000"})
    log = kafka.open_control(config.control_url, config)
    log.open()
    with pytest.raises(ConnectorError, match="MessageSizeTooLarge") as refused:
        log.append(_order(0), {config.published[0]: [Message(os.urandom(5000))]})
    assert not isinstance(refused.value, Unavailable)  # opening anew, again and again, would cure nothing
    log.open()
    log.append(_order(1), {config.published[0]: [Message(b"next")]})
    assert [order for _, order in log.read(0)] == [_order(1)]
    log.close()
