"""How the source orders, waits, pauses and backs off, over a fake of the client that delivers as a test pleases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.consumer.fetcher import ConsumerRecord

from connectors import kafka, kafka_client, kafka_python
from connectors.kafka import KafkaSource
from connectors.kafka_client import Bounds, Fault, Kind
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Origin, Record, Stream

Logs = Mapping[Stream, Sequence[int]]
"""Timestamps in ms of the records of each stream."""


class FakeConsumer:
    """Gives the records of one partition a poll, at most `batch`; `choose` says of which, None of none.

    Attributes:
        faults: Raised by the next polls, in turn.
        handed: Number of records given out, by stream.
    """

    def __init__(self, logs: Logs, batch: int, choose: Callable[[Sequence[Stream]], Stream | None]) -> None:
        self.logs, self.batch, self.choose = logs, batch, choose
        self.handed = dict.fromkeys(logs, 0)
        self.faults: list[Fault] = []
        self.paused: set[Stream] = set()

    def poll(self, timeout_s: float) -> dict[Stream, list[Record]]:
        if self.faults:
            raise self.faults.pop(0)
        ready = [each for each in self.logs if self.handed[each] < len(self.logs[each])]
        ready = [each for each in ready if each not in self.paused]
        stream = self.choose(ready) if ready else None
        if stream is None:
            return {}
        start = self.handed[stream]
        times = self.logs[stream][start : start + self.batch]
        self.handed[stream] += len(times)
        return {stream: [_record(Origin(*stream, start + i), time) for i, time in enumerate(times)]}

    def partitions(self, name: str) -> int:
        return len([stream for stream in self.logs if stream.input == name])

    known_partitions = partitions

    def assign(self, position: Mapping[Stream, int]) -> None:
        self.handed |= position
        self.paused.clear()

    def pause(self, stream: Stream) -> None:
        self.paused.add(stream)

    def resume(self, stream: Stream) -> None:
        self.paused.discard(stream)

    def position(self, stream: Stream) -> int:
        return self.handed[stream]

    def highwater(self, stream: Stream) -> int:
        return len(self.logs[stream])

    def reachable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _record(origin: Origin, time_ms: int) -> Record:
    return Record(origin, origin.input, time_ms / 1000, b"")


def _config(max_records: int) -> Config:
    return Config.parse(
        {
            "name": "app",
            "events": {"url": "kafka://fake:1/events", "id": "id"},
            "labels": {"url": "kafka://fake:1/labels"},
            "features": {"x": "numeric"},
            "worker": {"max_records": max_records},
        }
    )


def _open(fake: FakeConsumer, max_records: int = 4) -> KafkaSource:
    """A source on the fake, at the start of its logs."""
    limits = {stream: Bounds(0, len(times)) for stream, times in fake.logs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafka_client, "library", lambda _: SimpleNamespace(open_consumer=lambda *_, **__: fake))
        patch.setattr(kafka_client, "bounds", lambda *_: limits)
        config = _config(max_records)
        source = kafka.open_source(config.inputs, config)
        source.seek({})
    return source


def _first(ready: Sequence[Stream]) -> Stream:
    return ready[0]


def _drain(source: KafkaSource, total: int) -> Iterator[Record]:
    taken = 0
    while taken < total:
        records = source.poll(4, 60.0)
        assert records
        taken += len(records)
        yield from records


def _merged(logs: Logs) -> list[Origin]:
    """The oracle: again and again the head with the lowest (timestamp, stream)."""
    at = dict.fromkeys(logs, 0)
    order: list[Origin] = []
    while heads := [(logs[each][at[each]], each) for each in logs if at[each] < len(logs[each])]:
        stream = min(heads)[1]
        order.append(Origin(*stream, at[stream]))
        at[stream] += 1
    return order


@st.composite
def _some_logs(draw: st.DrawFn) -> Logs:
    partitions = draw(st.integers(1, 3))
    times = st.lists(st.integers(0, 20), max_size=15)
    return {Stream(name, number): draw(times) for name in ("events", "labels") for number in range(partitions)}


@given(_some_logs(), st.integers(1, 5), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_a_backlog_is_merged_by_time_however_it_arrives(logs: Logs, batch: int, max_records: int, random: Any) -> None:
    source = _open(FakeConsumer(logs, batch, lambda ready: random.choice([None, *ready])), max_records)
    taken = list(_drain(source, sum(map(len, logs.values()))))
    assert [record.origin for record in taken] == _merged(logs)


@given(_some_logs(), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_only_gives_that_stream_in_offset_order_between_other_polls(logs: Logs, batch: int, random: Any) -> None:
    source = _open(FakeConsumer(logs, batch, random.choice))
    taken: list[Origin] = []
    while len(taken) < sum(map(len, logs.values())):
        only = random.choice([None, *logs])
        records = source.poll(random.randint(1, 4), 0.0, only)
        assert only is None or all(record.origin.stream == only for record in records)
        taken += [record.origin for record in records]
    for stream, times in logs.items():
        assert [each.offset for each in taken if each.stream == stream] == list(range(len(times)))


def test_events_wait_for_labels_that_are_known_to_be_there() -> None:
    events, labels = Stream("events", 0), Stream("labels", 0)
    fake = FakeConsumer({events: [10, 30], labels: [20]}, 5, _first)  # every event arrives before the label
    assert [record.origin.input for record in _open(fake).poll(10, 5.0)] == ["events", "labels", "events"]


def test_a_stream_that_does_not_come_holds_the_others_back_for_the_timeout_only() -> None:
    events, labels = Stream("events", 0), Stream("labels", 0)
    fake = FakeConsumer({events: [10, 30], labels: [20]}, 5, lambda ready: events if events in ready else None)
    assert [record.origin.input for record in _open(fake).poll(10, 0.05)] == ["events", "events"]


@pytest.mark.parametrize("max_records", [1, 7, 50])
def test_what_waits_per_partition_is_bounded(max_records: int) -> None:
    logs = {Stream("events", 0): range(1000), Stream("labels", 0): range(1000, 2000)}
    fake = FakeConsumer(logs, max_records, _first)
    source = _open(fake, max_records)
    for _ in range(40):
        source.poll(1, 5.0)
        assert fake.handed[Stream("events", 0)] - 40 <= 3 * max_records
        assert fake.handed[Stream("labels", 0)] <= 3 * max_records


def test_a_paused_partition_is_resumed_and_read_to_its_end() -> None:
    logs = {Stream("events", 0): range(200), Stream("labels", 0): range(200)}
    source = _open(FakeConsumer(logs, 4, _first), max_records=4)
    assert len(list(_drain(source, 400))) == 400


def test_while_brokers_are_away_polls_are_empty_and_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    logs = {Stream("events", 0): [1, 2], Stream("labels", 0): []}
    fake = FakeConsumer(logs, 5, _first)
    source = _open(fake)
    fake.faults = [Fault(Kind.PASSING, "UnknownBrokerId", "away"), Fault(Kind.PASSING, "NodeNotReady", "away")]
    with caplog.at_level(logging.WARNING, "connectors.kafka"):
        assert source.poll(5, 0.01) == []
        assert [record.origin.offset for record in source.poll(5, 5.0)] == [0, 1]
    assert source.retries == 2
    assert ["trying again" in message for message in caplog.messages] == [True, False]


def test_a_refusal_while_polling_is_an_error_that_names_the_topic() -> None:
    fake = FakeConsumer({Stream("events", 0): [1], Stream("labels", 0): []}, 5, _first)
    source = _open(fake)
    fake.faults = [Fault(Kind.DENIED, "TopicAuthorizationFailed", "not authorised: events")]
    with pytest.raises(ConnectorError, match=r"kafka://fake:1.*not authorised.*events"):
        source.poll(5, 1.0)


def test_lag_counts_what_waits_here_too() -> None:
    stream = Stream("events", 0)
    source = _open(FakeConsumer({stream: range(10), Stream("labels", 0): []}, 6, _first))
    source.poll(2, 1.0)
    assert source.lag() == {stream: 8, Stream("labels", 0): 0}
    assert not source.exhausted()


def test_a_stream_of_another_shard_is_refused() -> None:
    source = _open(FakeConsumer({Stream("events", 0): [], Stream("labels", 0): []}, 6, _first))
    with pytest.raises(ConnectorError, match="events partition 7 is not in this shard"):
        source.poll(1, 0.0, Stream("events", 7))
    with pytest.raises(ConnectorError, match="labels partition 7 is not in this shard"):
        source.seek({Stream("labels", 7): 0})


def test_a_header_without_value_and_a_missing_time_have_a_meaning() -> None:
    given = dict.fromkeys(ConsumerRecord._fields) | {"topic": "clicks", "offset": 3, "timestamp": -1}
    given |= {"value": b"v", "key": b"k", "headers": [("a", None), ("b", b"1")]}
    expected = Record(Origin("events", 2, 3), "clicks", 0.0, b"v", b"k", (("a", b""), ("b", b"1")))
    assert kafka_python._record(Stream("events", 2), ConsumerRecord(**given)) == expected
