"""Topics in memory keep the connectors' contracts, and die as a test asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Fenced
from streamcl.records import Message, Order, Record, Run, Stream
from streamcl.stations import Shard
from streamcl.testing import check_control_log, check_sink, check_source

EVENTS, LABELS = "memory://test/events", "memory://test/labels"
BOTH = {"events": EVENTS, "labels": LABELS}


@pytest.fixture(autouse=True)
def broker() -> Iterator[memory.MemoryBroker]:
    memory.reset("test")
    yield memory.broker("test")
    memory.reset("test")


def config(**changes: Any) -> Config:
    data = {
        "name": "app",
        "events": {"url": EVENTS, "id": "id"},
        "labels": {"url": LABELS},
        "features": {"a": "categorical"},
    }
    return Config.parse({**data, **changes})


def fill(broker: memory.MemoryBroker, partitions: int = 2) -> None:
    for topic in ("events", "labels"):
        broker.create(topic, partitions)
        for n in range(6):
            broker.produce(
                topic, b"%d" % n, partition=n % partitions, time_s=float(n % 4), key=b"k", headers=(("h", b"v"),)
            )


def places(records: Sequence[Record]) -> list[str]:
    return [str(record.origin) for record in records]


def test_a_finished_source_keeps_the_contract(broker: memory.MemoryBroker) -> None:
    fill(broker)
    broker.finish()
    check_source(lambda: memory.MemorySource(BOTH), count=12)


def test_an_open_source_keeps_the_contract(broker: memory.MemoryBroker) -> None:
    fill(broker)
    check_source(lambda: memory.MemorySource(BOTH, order="input"), count=12, finite=False, timeout_s=0.0)


def test_a_sink_keeps_the_contract(broker: memory.MemoryBroker) -> None:
    broker.create("out", 3)
    check_sink(lambda: memory.MemorySink("memory://test/out"), lambda: [m.value for m in broker.messages("out")])


def test_a_control_log_keeps_the_contract(broker: memory.MemoryBroker) -> None:
    urls = {f"memory://test/{topic}": partial(values, broker, topic) for topic in ("scores", "outcomes")}
    check_control_log(lambda: memory.MemoryControlLog("memory://test/control", urls), urls)


def values(broker: memory.MemoryBroker, topic: str) -> list[bytes | None]:
    return [message.value for message in broker.messages(topic)]


def test_a_record_is_the_message_that_was_produced(broker: memory.MemoryBroker) -> None:
    offset = broker.produce("events", None, key=b"k", time_s=2.5, headers=(("h", b"v"),))
    [record] = memory.MemorySource({"events": EVENTS}).poll(9, 0.0)
    assert offset == 0
    assert (record.topic, record.time_s, record.value, record.key) == ("events", 2.5, None, b"k")
    assert broker.messages("events") == [Message(None, b"k", (("h", b"v"),), 2.5)]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 3)), max_size=20), st.integers(1, 5))
def test_ascending_streams_merge_in_the_order_of_time_input_partition_offset(
    made: list[tuple[int, int, int]], limit: int
) -> None:
    memory.reset("test")
    broker = memory.broker("test")
    for topic in ("events", "labels"):
        broker.create(topic, 2)
    expected = []
    for index, partition, time in sorted(made, key=lambda item: item[2]):
        name = ("events", "labels")[index]
        offset = broker.produce(name, b"", partition=partition, time_s=float(time))
        expected.append((float(time), name, partition, offset))
    source = memory.MemorySource(BOTH)
    found: list[Record] = []
    while polled := source.poll(limit, 0.0):
        found += polled
    assert [(record.time_s, *record.origin) for record in found] == sorted(expected)


def test_a_stream_keeps_its_own_order_when_its_times_do_not_ascend(broker: memory.MemoryBroker) -> None:
    for time in (5.0, 1.0):
        broker.produce("events", b"", time_s=time)
    broker.produce("labels", b"", time_s=3.0)
    assert places(memory.MemorySource(BOTH).poll(9, 0.0)) == ["labels:0:0", "events:0:0", "events:0:1"]


def test_an_order_by_input_drains_one_stream_after_the_other(broker: memory.MemoryBroker) -> None:
    fill(broker, partitions=1)
    source = memory.MemorySource(BOTH, order="input")
    assert [record.origin.input for record in source.poll(9, 0.0)] == ["events"] * 6 + ["labels"] * 3


def test_a_test_can_steer_the_order(broker: memory.MemoryBroker) -> None:
    fill(broker, partitions=1)
    broker.order = lambda heads: heads[-1]  # labels first
    source = memory.open_source(BOTH, config())
    assert [record.origin.input for record in source.poll(9, 0.0)] == ["labels"] * 6 + ["events"] * 3


def test_a_shard_holds_every_count_th_partition(broker: memory.MemoryBroker) -> None:
    fill(broker, partitions=5)
    source = memory.MemorySource(BOTH, Shard(index=1, count=2))
    assert list(source.streams()) == [Stream(name, partition) for name in BOTH for partition in (1, 3)]


def test_a_shard_without_a_partition_is_an_error(broker: memory.MemoryBroker) -> None:
    fill(broker, partitions=1)
    with pytest.raises(ConnectorError, match="shard 1 of 2"):
        memory.MemorySource(BOTH, Shard(index=1, count=2))


def test_lag_and_commit_are_counted_by_stream(broker: memory.MemoryBroker) -> None:
    fill(broker)
    source = memory.MemorySource({"events": EVENTS})
    source.poll(2, 0.0, only=Stream("events", 1))
    assert source.lag() == {Stream("events", 0): 3, Stream("events", 1): 1}
    source.commit({Stream("events", 1): 2})
    assert broker.committed("events") == {1: 2}


def test_a_poll_waits_for_another_thread(broker: memory.MemoryBroker) -> None:
    broker.create("events")
    source = memory.MemorySource({"events": EVENTS})
    thread = threading.Timer(0.05, lambda: broker.produce("events", b"late"))
    thread.start()
    assert [record.value for record in source.poll(1, 30.0)] == [b"late"]
    thread.join()


def test_finishing_wakes_a_waiting_poll(broker: memory.MemoryBroker) -> None:
    broker.create("events")
    source = memory.MemorySource({"events": EVENTS})
    thread = threading.Timer(0.05, broker.finish)
    thread.start()
    assert source.poll(1, 30.0) == []
    assert source.exhausted()
    thread.join()


@pytest.mark.parametrize("offset", [-1, 4])
def test_a_position_outside_the_log_is_an_error(broker: memory.MemoryBroker, offset: int) -> None:
    fill(broker)
    with pytest.raises(ConnectorError, match=rf"test/events, partition 1: offset {offset} is outside 0 .. 3"):
        memory.MemorySource({"events": EVENTS}).seek({Stream("events", 1): offset})


def test_a_stream_of_another_shard_is_an_error(broker: memory.MemoryBroker) -> None:
    fill(broker)
    source = memory.MemorySource({"events": EVENTS})
    for refused in (lambda: source.poll(1, 0.0, Stream("labels", 0)), lambda: source.seek({Stream("events", 2): 0})):
        with pytest.raises(ConnectorError, match="not in this shard"):
            refused()


def test_a_missing_topic_is_an_error_and_not_made() -> None:
    with pytest.raises(ConnectorError, match="memory://test/events: no such topic"):
        memory.MemorySource({"events": EVENTS})
    assert memory.broker("test").topics() == {}


@pytest.mark.parametrize("url", ["memory://test", "memory:///topic", "kafka://host/topic", "topic"])
def test_a_url_of_another_form_is_an_error(url: str) -> None:
    with pytest.raises(ConnectorError, match="memory://BROKER/TOPIC"):
        memory.open_sink(url, config())


def test_a_partition_or_a_partition_count_that_is_not_there_is_an_error(broker: memory.MemoryBroker) -> None:
    broker.create("events", 2)
    with pytest.raises(ConnectorError, match="no partition 2"):
        broker.produce("events", b"", partition=2)
    with pytest.raises(ConnectorError, match="exists with 2 partitions"):
        broker.create("events", 3)


def test_a_key_always_goes_to_the_same_partition(broker: memory.MemoryBroker) -> None:
    broker.create("out", 4)
    sink = memory.MemorySink("memory://test/out")
    sink.send([Message(b"%d" % n, key=b"%d" % (n % 7)) for n in range(70)])
    sink.flush()
    where: dict[bytes | None, set[int]] = {}
    for partition in range(4):
        for message in broker.read("out", partition, 0):
            where.setdefault(message.key, set()).add(partition)
    assert len(where) == 7
    assert all(len(partitions) == 1 for partitions in where.values())


@pytest.mark.parametrize(("keep", "durable"), [(False, [b"0", b"1"]), (True, [b"0", b"1", b"2", b"3"])])
def test_a_crash_while_flushing_loses_or_keeps_what_was_on_its_way(
    broker: memory.MemoryBroker, keep: bool, durable: list[bytes]
) -> None:
    sink, bystander = memory.MemorySink("memory://test/out"), memory.MemorySink("memory://test/other")
    broker.fail_after(2, keep=keep)
    bystander.send([Message(b"x")])
    sink.send([Message(b"%d" % n) for n in range(4)])
    with pytest.raises(memory.Crash):
        sink.flush()
    assert [message.value for message in broker.messages("out")] == durable
    assert len(broker.messages("other")) == keep


@pytest.mark.parametrize("keep", [False, True])
def test_a_crash_while_appending_an_order_loses_or_keeps_it(broker: memory.MemoryBroker, keep: bool) -> None:
    log = memory.MemoryControlLog("memory://test/control")
    log.open()
    broker.fail_after(0, keep=keep)
    with pytest.raises(memory.Crash):
        log.append(Order((Run(Stream("events", 0), 1),), {}))
    assert len(broker.messages("control")) == keep


def test_what_was_open_at_a_crash_stays_dead_and_what_comes_after_works(broker: memory.MemoryBroker) -> None:
    fill(broker)
    source, sink = memory.MemorySource(BOTH), memory.MemorySink("memory://test/out")
    log = memory.MemoryControlLog("memory://test/control")
    log.open()
    sink.send([Message(b"pending")])
    broker.fail_after(0)
    with pytest.raises(memory.Crash):
        log.append(Order((), {}))
    for dead in (
        lambda: sink.send([]),
        sink.flush,
        log.open,
        lambda: log.append(Order((), {})),
        lambda: source.poll(1, 0.0),
        lambda: source.commit({}),
    ):
        with pytest.raises(memory.Crash):
            dead()
    for closing in (source, sink, log):
        closing.close()
    other = memory.MemorySink("memory://test/out")
    other.send([Message(b"alive")])
    other.flush()
    assert [message.value for message in broker.messages("out")] == [b"alive"]


def test_an_order_needs_an_open_log_and_offset_zero_to_its_end() -> None:
    log = memory.open_control("memory://test/control", config())
    with pytest.raises(ConnectorError, match="append before open"):
        log.append(Order((), {}))
    with pytest.raises(ConnectorError, match="no offset 1"):
        log.read(1)


def test_the_fence_is_per_topic() -> None:
    logs = [memory.MemoryControlLog(f"memory://test/control-{n}") for n in (0, 1, 0)]
    for log in logs:
        log.open()
    logs[1].append(Order((), {}))
    with pytest.raises(Fenced, match="memory://test/control-0"):
        logs[0].append(Order((), {}))


def test_check_describes_topics_and_refuses_uneven_partitions(broker: memory.MemoryBroker) -> None:
    fill(broker)
    assert memory.check([EVENTS, "memory://test/out"], config()) == [
        "memory://test/events: 2 partition(s)",
        "memory://test/out: will be made with 1 partition(s)",
    ]
    broker.create("more", 3)
    with pytest.raises(ConnectorError, match="differ in partitions"):
        memory.check([EVENTS], config(labels={"url": "memory://test/more"}))
