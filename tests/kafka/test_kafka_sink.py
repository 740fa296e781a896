"""The sink: nothing lost, nothing unbounded."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection, Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors import kafka, kafka_client
from connectors.kafka_client import Fault, Kind
from connectors.kafka_sink import KafkaSink
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Unavailable
from streamcl.records import Message

if TYPE_CHECKING:
    from tests.kafka.conftest import Cluster

URL = "kafka://fake:1/out"


class FakeDelivery:
    def __init__(self, exception: Fault | None) -> None:
        self.exception, self.is_done = exception, False


class FakeProducer:
    """Stores what it is sent, unless the next of `faults` is an error; once it has failed it fails for ever (F1).

    What becomes of a message is known when it is waited for. A `poison` is refused whenever it is sent.
    """

    def __init__(self, stored: list[bytes], faults: Iterator[Fault | None], poison: Collection[bytes] = ()) -> None:
        self.stored, self.faults, self.poison = stored, faults, poison
        self.broken: Fault | None = None

    def send(self, message: Message) -> FakeDelivery:
        value = message.value or b""
        self.broken = self.broken or next(self.faults, None) or (REFUSED if value in self.poison else None)
        if self.broken is None:
            self.stored.append(value)
        return FakeDelivery(self.broken)

    def wait(self, delivery: FakeDelivery, timeout_s: float) -> None:
        delivery.is_done = True

    def fault(self, delivery: FakeDelivery) -> Fault | None:
        return delivery.exception

    def discard(self) -> None:
        pass


PASSING = Fault(Kind.PASSING, "NotEnoughReplicas", "not enough replicas")
REFUSED = Fault(Kind.RECORD, "InvalidRecord", "refused")
BROKEN = Fault(Kind.BROKEN, "Unknown", "nobody knows")
DENIED = Fault(Kind.DENIED, "TopicAuthorizationFailed", "not authorised: out")


def _config(**kafka_settings: Any) -> Config:
    events = {"url": "kafka://fake:1/in", "label": "y"}
    return Config.parse({"name": "a", "events": events, "features": {"x": "numeric"}, "kafka": kafka_settings})


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No broker: topics exist, and a rebuild does not wait."""
    monkeypatch.setattr(kafka_client, "ensure_topic", lambda *_, **__: 1)
    monkeypatch.setattr(kafka_client, "_FIRST_BACKOFF_S", 0.0)
    return monkeypatch


def _fake(
    patched: pytest.MonkeyPatch, faults: Iterable[Fault | None], poison: Collection[bytes] = (), **kafka_settings: Any
) -> Any:
    stored: list[bytes] = []
    script = iter(faults)
    fake = SimpleNamespace(open_producer=lambda *_: FakeProducer(stored, script, poison))
    patched.setattr(kafka_client, "library", lambda _: fake)
    return KafkaSink(URL, _config(**kafka_settings)), stored


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_whatever_breaks_for_a_while_every_message_is_stored_in_order(
    broken: list[bool], count: int, room: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafka_client, "ensure_topic", lambda *_, **__: 1)
        patch.setattr(kafka_client, "_FIRST_BACKOFF_S", 0.0)
        faults = [PASSING if each else None for each in broken]
        sink, stored = _fake(patch, faults, max_inflight_records=room)
        values = [b"%d" % number for number in range(count)]
        for value in values:
            sink.send([Message(value)])
            assert sink.inflight_records <= room
        sink.flush()
    first = {value: stored.index(value) for value in values}
    assert sorted(values, key=first.__getitem__) == values  # repeated perhaps, but never overtaken the first time
    assert sink.inflight_records == sink.inflight_bytes == 0
    assert sink.rebuilds <= sum(broken)


@given(st.sets(st.integers(0, 59), max_size=4), st.integers(0, 60), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_poison_is_rejected_alone_and_the_rest_goes_on(poisoned: set[int], count: int, room: int, away: int) -> None:
    values = [b"%d" % number for number in range(count)]
    poison = [value for number, value in enumerate(values) if number in poisoned]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafka_client, "ensure_topic", lambda *_, **__: 1)
        patch.setattr(kafka_client, "_FIRST_BACKOFF_S", 0.0)
        sink, stored = _fake(patch, [PASSING] * away, poison, max_inflight_records=room)
        rejected: list[bytes] = []
        sink.rejected = lambda message, _: rejected.append(message.value)
        for start in range(0, count, 7):
            sink.send([Message(value) for value in values[start : start + 7]])
            assert sink.inflight_records <= room
        sink.flush()
    assert rejected == poison
    assert sink.rejections == len(poison)
    good = [value for value in values if value not in poison]
    assert list(dict.fromkeys(stored)) == good  # repeated perhaps, but never overtaken the first time
    assert sink.rebuilds <= away + 8 * len(poison)
    assert sink.ready and not sink.blocked
    assert sink.inflight_records == sink.inflight_bytes == 0
    assert sink.errors["InvalidRecord"] >= 2 * len(poison)


def test_a_poison_that_nobody_takes_is_an_error(patched: pytest.MonkeyPatch) -> None:
    sink, _ = _fake(patched, [], [b"bad"])
    sink.send([Message(b"good"), Message(b"bad")])
    with pytest.raises(ConnectorError, match="refused whenever it is sent: refused"):
        sink.flush()


def test_a_broker_that_gives_no_reason_gets_more_chances_before_a_record_is_blamed(patched: pytest.MonkeyPatch) -> None:
    rejected: list[Message] = []
    sink, stored = _fake(patched, [BROKEN] * 3)
    sink.rejected = lambda message, _: rejected.append(message)
    sink.send([Message(b"innocent")])
    sink.flush()
    assert (stored, rejected) == ([b"innocent"], [])
    sink, _ = _fake(patched, [BROKEN] * 4)
    sink.rejected = lambda message, _: rejected.append(message)
    sink.send([Message(b"guilty")])
    sink.flush()
    assert [message.value for message in rejected] == [b"guilty"]


def test_a_refusal_by_the_brokers_rules_is_retried_for_a_while_and_blames_no_record(
    patched: pytest.MonkeyPatch,
) -> None:
    sink, stored = _fake(patched, [DENIED] * 3)
    sink.rejected = lambda *_: pytest.fail("the record is innocent")
    sink.send([Message(b"v")])
    sink.flush()
    assert (stored, sink.rebuilds, sink.errors) == ([b"v"], 3, {"TopicAuthorizationFailed": 3})
    sink, _ = _fake(patched, itertools.repeat(DENIED), delivery_timeout_s=0.2)
    sink.send([Message(b"v")])
    with pytest.raises(ConnectorError, match=rf"{URL}: 1 messages are not acknowledged.*not authorised") as refused:
        sink.flush()
    assert not isinstance(refused.value, Unavailable)
    assert not sink.ready


def test_a_fault_that_stays_is_an_error_after_the_delivery_timeout(patched: pytest.MonkeyPatch) -> None:
    sink, _ = _fake(patched, itertools.repeat(PASSING), delivery_timeout_s=0.2)
    sink.send([Message(b"v")])
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"delivery_timeout_s is 0.2"):
        sink.flush()
    assert 0.2 <= time.monotonic() - began < 2


def test_a_message_over_the_limit_is_bad_input_and_nothing_is_sent(patched: pytest.MonkeyPatch) -> None:
    sink, stored = _fake(patched, [], max_request_bytes=1024)
    sink.send([Message(b"x" * 800)])
    with pytest.raises(BadInput, match=rf"{URL}: a message of \d+ bytes, kafka.max_request_bytes is 1024") as refused:
        sink.send([Message(b"fits"), Message(b"x" * 800, b"k" * 100, (("h", b"y" * 100),))])
    assert refused.value.reason == "too_large"
    assert stored == [b"x" * 800]


@given(st.binary(max_size=300), st.none() | st.binary(max_size=300), st.lists(st.tuples(st.text(), st.binary())))
@settings(max_examples=200, deadline=None)
def test_our_size_is_never_below_the_clients(value: bytes, key: bytes | None, headers: list[tuple[str, bytes]]) -> None:
    from kafka.record.memory_records import MemoryRecordsBuilder

    theirs = MemoryRecordsBuilder(magic=2, compression_type=0, batch_size=0)
    theirs.append(timestamp=0, key=key, value=value, headers=headers)
    theirs.close()
    assert kafka_client._size(Message(value, key, tuple(headers))) >= theirs.size_in_bytes()


def test_a_missing_topic_is_made(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic())
    sink = kafka.open_sink(config.dead_letters_url, config)
    sink.send([Message(None), Message(b"v")])
    sink.flush()
    found = cluster.read(config.dead_letters_url.rpartition("/")[2])
    assert sorted(record.value for record in found) == [b"", b"v"]
    sink.close()


def test_predictions_can_be_compacted(apache_kafka: Cluster) -> None:
    url = f"{apache_kafka.url}/{apache_kafka.name()}"
    config = apache_kafka.config(apache_kafka.topic(), predictions=url, kafka={"compact_predictions": True})
    for place, changed in ((url, {"cleanup.policy": "compact"}), (config.dead_letters_url, {})):
        kafka.open_sink(place, config).close()
        assert apache_kafka.changed(kafka_client.locate(place)[1]) == changed


def test_a_broker_away_for_longer_than_the_delivery_timeout_is_an_error_and_memory_stays_bounded(
    cluster: Cluster,
) -> None:
    limits = {"max_inflight_records": 10, "delivery_timeout_s": 1.5, "request_timeout_s": 1.0}
    config = cluster.config(cluster.topic(), kafka=limits)
    sink = kafka.open_sink(config.events.url, config)
    sink.send([Message(b"before")])
    sink.flush()
    with cluster.frozen():
        began = time.monotonic()
        with pytest.raises(ConnectorError, match="messages are not acknowledged"):
            sink.send([Message(b"%d" % number) for number in range(50)])
        assert time.monotonic() - began < 6
        assert sink.inflight_records <= 10
        sink.close()
    assert time.monotonic() - began < 8


def test_a_short_outage_is_ridden_out_under_back_pressure(cluster: Cluster) -> None:
    config = cluster.config(cluster.topic(), kafka={"max_inflight_bytes": 2048, "max_request_bytes": 1024})
    sink = kafka.open_sink(config.events.url, config)
    with cluster.frozen():
        sink.send([Message(b"%d" % number) for number in range(5)])
    for start in range(5, 200, 5):
        sink.send([Message(b"%d" % number) for number in range(start, start + 5)])
        assert sink.inflight_bytes <= 2048
    sink.flush()
    assert [record.value for record in cluster.read(config.events.url.rpartition("/")[2])] == [
        b"%d" % number for number in range(200)
    ]
    sink.close()


def test_a_broker_that_was_away_for_too_long_can_be_sent_to_again(broker: Cluster) -> None:
    config = broker.config(broker.topic(), kafka={"delivery_timeout_s": 1.2, "request_timeout_s": 1.0})
    sink = kafka.open_sink(config.events.url, config)
    with broker.frozen(), pytest.raises(ConnectorError):
        sink.send([Message(b"lost?")])
        sink.flush()
    sink.close()
    again = kafka.open_sink(config.events.url, config)
    again.send([Message(b"after")])
    again.flush()
    assert broker.read(config.events.url.rpartition("/")[2])[-1].value == b"after"
    again.close()


def test_a_message_that_a_topic_does_not_take_is_rejected_and_the_rest_arrives(cluster: Cluster) -> None:
    if cluster.kind == "embedded":
        pytest.skip("the embedded broker takes everything")
    config = cluster.config(cluster.topic())
    topic = kafka_client.locate(config.events.url)[1]
    cluster.alter(topic, {"max.message.bytes": "3000"})
    sink, rejected = kafka.open_sink(config.events.url, config), list[tuple[bytes | None, str]]()
    sink.rejected = lambda message, error: rejected.append((message.value, error))
    poison = os.urandom(5000)  # does not become small by compression
    sink.send([Message(b"%d" % number) for number in range(50)])
    sink.send([Message(poison), *(Message(b"%d" % number) for number in range(50, 100))])
    sink.flush()
    [(value, error)] = rejected
    assert value == poison
    assert "MessageSizeTooLarge" in error
    found = [int(record.value) for record in cluster.read(topic)]
    assert set(found) == set(range(100))
    assert sink.rejections == 1 and sink.ready
    sink.close()
