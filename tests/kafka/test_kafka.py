"""The source and `check` on real brokers: what a fake can't show."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from connectors import kafka, kafka_client, kafka_python, kafka_python_connection
from connectors.apache import ApacheBroker
from connectors.kafka import KafkaSource
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Gap, Unavailable
from streamcl.records import Message, Record, Stream
from tests.kafka.conftest import CLIENTS, Cluster, started

EVENTS, LABELS = Stream("events", 0), Stream("labels", 0)


def _source(config: Config) -> KafkaSource:
    return kafka.open_source(config.inputs, config)


def _take(source: KafkaSource, count: int, only: Stream | None = None) -> list[Record]:
    """The next `count` records, within 20 s."""
    taken: list[Record] = []
    deadline = time.monotonic() + 20
    while len(taken) < count and time.monotonic() < deadline:
        taken += source.poll(min(100, count - len(taken)), 1.0, only)
    return taken


def test_what_the_sink_sends_the_source_delivers_unchanged(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic(2))
    sink, source = kafka.open_sink(config.events.url, config), _source(config)
    sent = [Message(b"v%d" % i, b"k%d" % (i % 3), (("h", b"\x00"), ("h", b"2")), 1e9 + i / 1000) for i in range(20)]
    sink.send([*sent, Message(None, b"gone", (), 1e9 + 1)])
    sink.flush()
    source.seek({})
    records = _take(source, 21)
    found = [Message(record.value, record.key, record.headers, record.time_s) for record in records]
    assert sorted(found, key=lambda message: message.time_s or 0.0) == [*sent, Message(None, b"gone", (), 1e9 + 1)]
    for key in (b"k0", b"k1", b"k2"):
        assert len({record.origin.partition for record in records if record.key == key}) == 1
    assert {record.topic for record in records} == {kafka_client.locate(config.events.url)[1]}
    sink.close()
    source.close()


def test_a_source_continues_where_it_is_sought_to(cluster: Cluster) -> None:
    topic = cluster.topic(2)
    cluster.produce(topic, [(i % 2, b"%d" % i, i) for i in range(20)])
    source = _source(cluster.config(topic))
    position = {Stream("events", 0): 7, Stream("events", 1): 9}
    for _ in range(2):  # also a second time, with records of the first in the buffers
        assert source.seek(position) == position
        assert [record.value for record in _take(source, 4)] == [b"14", b"16", b"18", b"19"]
    assert source.seek({Stream("events", 1): 10}) == {Stream("events", 0): 0, Stream("events", 1): 10}
    assert [record.value for record in _take(source, 10)] == [b"%d" % i for i in range(0, 20, 2)]
    source.close()


def test_a_backlog_of_events_and_labels_comes_in_the_order_of_time(cluster: Cluster) -> None:
    events, labels = cluster.topic(2), cluster.topic(2)
    cluster.produce(events, [(i % 2, b"e%d" % i, 10 * i) for i in range(300)])
    cluster.produce(labels, [(i % 2, b"l%d" % i, 10 * i + 5) for i in range(300)])
    source = _source(cluster.config(events, labels, worker={"max_records": 20}))
    source.seek({})
    assert [r.value for r in _take(source, 600)] == [b"%s%d" % (kind, i) for i in range(300) for kind in (b"e", b"l")]
    source.close()


def test_only_reads_one_stream(cluster: Cluster) -> None:
    events, labels = cluster.topic(), cluster.topic()
    cluster.produce(events, [(0, b"e", 5)] * 3)
    cluster.produce(labels, [(0, b"l", 1)] * 3)
    source = _source(cluster.config(events, labels))
    source.seek({})
    assert [record.value for record in _take(source, 2, EVENTS)] == [b"e", b"e"]
    assert [record.value for record in _take(source, 4)] == [b"l", b"l", b"l", b"e"]
    source.close()


def test_a_shard_holds_its_partitions_of_every_input(broker: Cluster) -> None:
    events, labels = broker.topic(5), broker.topic(5)
    held: list[Stream] = []
    for index in range(2):
        source = _source(broker.config(events, labels, shard={"index": index, "count": 2}))
        assert {stream.partition % 2 for stream in source.streams()} == {index}
        held += source.streams()
        source.close()
    assert sorted(held) == [Stream(name, number) for name in ("events", "labels") for number in range(5)]
    with pytest.raises(ConnectorError, match="shard 5 of 6 has no partition"):
        _source(broker.config(events, shard={"index": 5, "count": 6}))


def test_commands_go_to_the_partition_of_each_shard_and_none_is_passed_over(cluster: Cluster) -> None:
    """Though events start at the latest; and a missing topic is made with a partition for each shard."""
    events, name = cluster.topic(4), cluster.name()
    told = {"commands": f"{cluster.url}/{name}", "kafka": {"start_at": "latest"}, "shard": {"count": 2}}
    config = cluster.config(events, **told)
    sink = kafka.open_sink(f"{cluster.url}/{name}", config)
    sink.send([Message(b"%d" % number, partition=number) for number in (1, 0, 1)])
    sink.flush()
    sink.close()
    for shard, values in enumerate(([b"0"], [b"1", b"1"])):
        source = _source(config.of_shard(shard))
        assert [stream.input for stream in source.streams()] == ["commands", "events", "events"]
        source.seek({})
        assert [record.value for record in _take(source, len(values))] == values
        source.close()
    with pytest.raises(ConnectorError, match=f"{name}: 3 shards need as many partitions, there are 2"):
        _source(config.of_shard(0, 3))


def test_latest_starts_at_the_end(cluster: Cluster) -> None:
    topic = cluster.topic()
    cluster.produce(topic, [(0, b"old", 1)] * 10)
    source = _source(cluster.config(topic, kafka={"start_at": "latest"}))
    assert source.seek({}) == {EVENTS: 10}
    cluster.produce(topic, [(0, b"new", 1)])
    assert [record.value for record in _take(source, 1)] == [b"new"]
    source.close()


def test_a_missing_topic_is_named_and_not_made(cluster: Cluster) -> None:
    missing = cluster.name()
    for _ in range(2):
        with pytest.raises(ConnectorError, match=f"{missing}: no such topic"):
            _source(cluster.config(missing))


def test_inputs_with_different_partition_counts_are_refused(broker: Cluster) -> None:
    events, labels = broker.topic(2), broker.topic(3)
    with pytest.raises(ConnectorError, match=f"equally many partitions.*{events} has 2, {labels} has 3"):
        _source(broker.config(events, labels))


@pytest.mark.parametrize("library", CLIENTS)
def test_an_unreachable_broker_is_an_error_after_the_timeout(library: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
    url = f"kafka://{closed}/clicks"
    kafka_settings = {"connect_timeout_s": 0.5, "client": library}
    config = Config.parse(
        {"name": "a", "events": {"url": url, "label": "y"}, "features": {"x": "numeric"}, "kafka": kafka_settings}
    )
    began = time.monotonic()
    for attempt in (_source, lambda config: kafka.open_sink(url, config), lambda config: kafka.check([url], config)):
        with pytest.raises(Unavailable, match=rf"kafka://{closed} \(PLAINTEXT\): no broker could be reached"):
            attempt(config)
    assert 1.5 <= time.monotonic() - began < 6


def test_a_position_above_the_end_is_an_error_that_names_it(cluster: Cluster) -> None:
    topic = cluster.topic(2)
    cluster.produce(topic, [(1, b"v", 1)] * 3)
    source = _source(cluster.config(topic))
    source.seek({Stream("events", 1): 3})
    with pytest.raises(ConnectorError, match=f"{topic} partition 1: offset 4 is wanted, available are 0 to 3: .*anew"):
        source.seek({Stream("events", 1): 4})
    source.close()


def _delete_up_to(cluster: Cluster, topic: str, offset: int) -> None:
    admin = KafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    admin.delete_records({TopicPartition(topic, 0): offset})
    admin.close()


def test_a_position_that_retention_overtook_is_a_gap_that_names_it(cluster: Cluster) -> None:
    if cluster.kind == "embedded":
        pytest.skip("the embedded broker can't delete records")
    topic = cluster.topic()
    cluster.produce(topic, [(0, b"v", 1)] * 10)
    source = _source(cluster.config(topic))
    _delete_up_to(cluster, topic, 4)
    with pytest.MonkeyPatch.context() as patch:  # it was there when we looked, and gone when we fetched
        patch.setattr(kafka_client, "bounds", lambda *_: {EVENTS: kafka_client.Bounds(0, 10)})
        source.seek({})
    expected = f"{topic} partition 0: offset 0 is wanted, available are 4 to 10: retention"
    with pytest.raises(Gap, match=expected) as gap:
        _take(source, 1)
    assert (gap.value.wanted, gap.value.available) == ({EVENTS: 0}, {EVENTS: 4})
    with pytest.raises(Gap, match=expected):
        source.seek({EVENTS: 0})
    assert source.seek({}) == {EVENTS: 4}
    source.close()


def test_new_partitions_of_an_input_are_noticed_while_it_is_read(cluster: Cluster) -> None:
    if cluster.kind == "embedded":
        pytest.skip("the embedded broker can't add partitions")
    topic = cluster.topic(2)
    cluster.produce(topic, [(0, b"v", 1)] * 3)
    source = _source(cluster.config(topic, kafka={"metadata_max_age_s": 0.5}))
    source.seek({})
    assert len(_take(source, 3)) == 3
    admin = KafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    admin.create_partitions({topic: 5})
    admin.close()
    with pytest.raises(ConnectorError, match=f"{topic} has 5 partitions, it had 2.*streamcl reshard"):
        for _ in range(200):
            assert not source.poll(10, 0.1)
    source.close()


def test_lag_is_shown_and_reaches_zero_behind_transactions(cluster: Cluster) -> None:
    topic = cluster.topic()
    producer = KafkaProducer(bootstrap_servers=cluster.bootstrap, transactional_id=topic)
    producer.init_transactions()
    for _ in range(3):
        producer.begin_transaction()
        producer.send(topic, b"v", partition=0)
        producer.commit_transaction()
    producer.close()
    source = _source(cluster.config(topic))
    source.seek({})
    assert source.lag() == {EVENTS: 6}  # the markers count until they have been passed
    assert len(_take(source, 3)) == 3
    source.poll(1, 0.5)
    assert source.lag() == {EVENTS: 0}
    source.close()


class Admin:
    """Brokers that answer each question of a topic with the next of these codes, the last one for ever."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = codes

    def describe_topics(self, topics: list[str]) -> list[dict[str, object]]:
        code = self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]
        return [{"error_code": code, "partitions": [] if code else [0, 1]}]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("codes", "last"), [([0], 0), ([3, 0], 0), ([3, 5, 3, 0], 0), ([29], 29), ([5, 29, 0], 29), ([3], 3)]
)
def test_a_topic_just_made_is_waited_for_until_the_broker_that_is_asked_has_heard_of_it(
    codes: list[int], last: int
) -> None:
    assert kafka_python._seen(Admin(codes), "t", 0.3)["error_code"] == last


def test_partitions_that_a_fault_hid_are_counted_when_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Cluster("none", "none:1").config("t")
    answers = iter([Admin([0]), Admin([3]), Admin([29]), Admin([5])])
    monkeypatch.setattr(kafka_python_connection, "connect", lambda *_: next(answers))
    assert [kafka_python._told_partitions("none:1", "t", config) for _ in range(3)] == [2, 0, 0]
    with pytest.raises(kafka_client.Fault, match="LeaderNotAvailable"):
        kafka_python._told_partitions("none:1", "t", config)


@pytest.mark.parametrize("read", [0, 1, 7, 30])
def test_a_position_is_the_one_that_the_client_tells(broker: Cluster, read: int) -> None:
    topic = broker.topic(3)
    broker.produce(topic, [(i % 2, b"%d" % i, i) for i in range(30)])
    config = broker.config(topic)
    consumer = kafka_python.Consumer(broker.bootstrap, {"events": topic}, config)
    streams = [Stream("events", partition) for partition in range(3)]
    assert [consumer.position(stream) for stream in streams] == [0, 0, 0]  # nothing is assigned yet
    consumer.assign({stream: min(read, 15) if stream.partition < 2 else 0 for stream in streams})
    consumer.poll(0.5)
    told = [consumer._consumer.position(consumer._named(stream), timeout_ms=0) for stream in streams]
    assert [consumer.position(stream) for stream in streams] == told
    consumer.close()


def test_what_is_committed_can_be_seen_by_lag_tools(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic())
    source = _source(config)
    source.seek({})
    admin = KafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    partition = TopicPartition(kafka_client.locate(config.events.url)[1], 0)
    for offset in (3, 5):
        found = None
        for _ in range(100):  # the first ones may fail: a broker makes the topic of its groups when it is first asked
            source.commit({EVENTS: offset})
            time.sleep(0.05)
            with suppress(kafka_errors.RetriableError):
                found = admin.list_group_offsets({config.name: [partition]})[config.name].get(partition)
            if found is not None and found.offset == offset:
                break
        assert found is not None and found.offset == offset
    admin.close()
    source.close()


def test_a_frozen_broker_costs_time_but_no_record(cluster: Cluster) -> None:
    topic = cluster.topic()
    config = cluster.config(topic)
    sink, source = kafka.open_sink(config.events.url, config), _source(config)
    source.seek({})
    sink.send([Message(b"%d" % i) for i in range(100)])
    before = source.poll(1000, 1.0)
    with cluster.frozen():
        sink.send([Message(b"%d" % i) for i in range(100, 200)])
        source.poll(1, 0.0)
        source.commit({EVENTS: 1})  # does not wait
        began = time.monotonic()
        during = source.poll(1000, 0.5)
        assert time.monotonic() - began < 1.5
        time.sleep(1.5)
    sink.flush()
    records = [*before, *during]
    records += _take(source, 200 - len(records))
    assert [record.origin.offset for record in records] == list(range(200))
    assert [record.value for record in records] == [b"%d" % i for i in range(200)]
    sink.close()
    source.close()


@pytest.mark.parametrize("library", CLIENTS)
def test_that_brokers_are_away_is_seen_without_any_input_and_that_they_are_back(library: str) -> None:
    if library == "librdkafka":
        pytest.importorskip("confluent_kafka", reason="streamcl[librdkafka] is not installed")
    with started(ApacheBroker()) as apache:
        cluster = Cluster("apache", apache.bootstrap, apache.pid, library)
        source = _source(cluster.config(cluster.topic()))
        source.seek({})
        assert _await(source, away=False)
        apache.kill()
        assert _await(source, away=True)
        apache.restart()
        assert _await(source, away=False)
        source.close()


def _await(source: KafkaSource, away: bool) -> bool:
    deadline = time.monotonic() + 60.0
    while source.away is not away and time.monotonic() < deadline:
        source.poll(10, 0.1)
    return source.away is away


def test_check_tells_what_it_found(cluster: Cluster) -> None:
    events, labels = cluster.topic(2), cluster.topic(2)
    cluster.produce(events, [(1, b"v", 1)] * 3)
    config = cluster.config(events, labels)
    found = kafka.check([*config.inputs.values(), config.dead_letters_url], config)
    assert found == [
        kafka_client.library(config).check(),
        f"{cluster.url}/{events}: 2 partition(s), offsets 0: 0 to 0, 1: 0 to 3",
        f"{cluster.url}/{labels}: 2 partition(s), offsets 0: 0 to 0, 1: 0 to 0",
        f"{config.dead_letters_url}: will be made",
    ]


@pytest.mark.parametrize(
    "url",
    ["kafka://h:1", "kafka://h:1/", "kafka:///topic", "kafka://h:1/a/b", "http://h:1/t", "kafka://u:Secret@h:1/t"],
)
def test_a_malformed_url_is_refused_without_showing_credentials(url: str) -> None:
    with pytest.raises(ConnectorError, match=r"not of the form kafka://|credentials belong in") as refused:
        kafka_client.locate(url)
    assert "Secret" not in str(refused.value)


_SLOW = """
import resource, sys, time
from streamcl.config import Config
from connectors import kafka
config = Config.model_validate_json(sys.stdin.read())
source = kafka.open_source(config.inputs, config)
source.seek({})
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
taken, before = len(source.poll(1, 5.0)), peak()
while taken < 500:
    taken += len(source.poll(5, 1.0))  # the sink is slow: much waits, little is taken
    time.sleep(0.01)
print(peak() - before, taken)
source.close()
"""


@pytest.mark.parametrize("library", CLIENTS)
def test_a_large_backlog_takes_little_memory_however_slowly_it_is_read(broker: Cluster, library: str) -> None:
    topic, megabytes = broker.topic(4), 96
    payload = [os.urandom(8192) for _ in range(128)]
    broker.produce(topic, [(i % 4, payload[i % 128], 1) for i in range(megabytes * 128)])
    settings = {"client": library, "fetch_queue_bytes": 8 << 20}
    config = broker.config(topic, kafka=settings, worker={"max_records": 50})
    command = [sys.executable, "-c", _SLOW]
    said = subprocess.run(
        command, input=config.model_dump_json(), capture_output=True, text=True, check=False, timeout=120
    )
    assert said.returncode == 0, said.stderr
    grown_kib, taken = map(int, said.stdout.split())
    assert taken >= 500
    assert grown_kib < 48 * 1024  # half of what waits
