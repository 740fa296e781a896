"""Every error code that brokers answer our requests with, once each: recovered, or a clear error; none silent or hung.

librdkafka's mock cluster gives the answers. kafka-python is told to speak the protocol of 2.0 to it, for the mock's way
to refuse a newer handshake is not understood, and not to check the mock's checksums. The table of what came of each
stays in `build/error-codes-*.md`.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from connectors import kafka, kafka_python, kafka_python_connection
from streamcl import connect
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Fenced, Membership, Unavailable
from streamcl.records import Message, Order, Run, Stream
from tests.kafka import mock_cluster
from tests.kafka.conftest import Cluster
from tests.kafka.mock_cluster import MockCluster

EVENTS = Stream("events", 0)
LANES = 8
SHARDS = 2
CASE_S = 40.0  # a hang, not a speed: each case has time-outs of a few seconds
OLD = {"api_version": (2, 0)}

# By request, the codes of its answer: what Kafka's documentation of the answer lists, and what any broker may say to
# anything (unknown -1, time-out 7, network 13, unsupported version 35, invalid request 42, storage 56). Not there: a
# duplicate sequence number (46) to a producer that sends none; it means that the broker has the batch already.
_ANY = (-1, 7, 13, 31, 35, 42, 56)
_COORDINATOR = (14, 15, 16)
_TRANSACTION = (*_COORDINATOR, 47, 48, 49, 51, 53, 67, 90)
_PARTITION = (3, 5, 6, 8, 9, 29, 74, 75)
CODES = {
    "Produce": (*_ANY, *_PARTITION, 2, 10, 17, 18, 19, 20, 21, 32, 43, 44, 45, 59, 76, 87, 89),
    "Fetch": (*_ANY, 70, 71, 100, 103),
    "Fetch of a partition": (*_ANY, *_PARTITION, 1, 2, 76, 78, 100, 103),
    "ListOffsets": (*_ANY, *_PARTITION, 1, 43, 78),
    "Metadata": _ANY,
    "Metadata of a topic": (*_ANY, 3, 5, 17, 29, 100),
    "OffsetCommit": (*_ANY, *_COORDINATOR, 3, 12, 22, 24, 25, 27, 28, 29, 30, 69, 82),
    "FindCoordinator": (*_ANY, *_COORDINATOR, 24, 30, 53),
    "InitProducerId": (*_ANY, *_TRANSACTION, 50),
    "AddPartitionsToTxn": (*_ANY, *_TRANSACTION, 3, 29, 55),
    "EndTxn": (*_ANY, *_TRANSACTION),
    "JoinGroup": (*_ANY, *_COORDINATOR, 23, 24, 25, 26, 27, 30, 79, 81, 82),
    "SyncGroup": (*_ANY, *_COORDINATOR, 22, 23, 24, 25, 27, 30, 82),
    "Heartbeat": (*_ANY, *_COORDINATOR, 22, 24, 25, 27, 30, 82),
    "Produce in a transaction": (*_ANY, *_PARTITION, 2, 10, 19, 20, 45, 46, 47, 48, 49, 53, 59, 87, 90),
}
# What a broker's rules forbid does not pass by itself: a person has to hear of it.
FORBIDDEN = (29, 30, 53)
FENCED = (47, 90)


@dataclass(frozen=True)
class Case:
    request: str
    code: int
    client: str

    def __str__(self) -> str:
        return f"{self.request} {self.code} {kafka_errors.for_code(self.code).__name__.removesuffix('Error')}"


@dataclass
class Table:
    """What came of each case; lanes write to it."""

    rows: dict[Case, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(f"| {case.client} | {case} | {said} |" for case, said in self.rows.items())


class Scene:
    """The topics of one case, and who looks at them from outside."""

    _numbers = itertools.count()

    def __init__(self, mock: MockCluster, case: Case) -> None:
        self.mock, self.case = mock, case
        self.request = case.request.partition(" ")[0]
        name = f"case-{next(self._numbers)}"
        self.topics = {role: f"{name}-{role}" for role in ("events", "predictions", "control")}
        for topic in self.topics.values():
            mock.create_topic(topic)
        mock.create_topic(f"{name}-shards-{SHARDS}", SHARDS)
        cluster = Cluster("mock", mock.bootstrap)
        urls = {role: f"{cluster.url}/{self.topics[role]}" for role in ("predictions", "control")}
        times = {"request_timeout_s": 3.0, "connect_timeout_s": 5.0, "delivery_timeout_s": 6.0}
        settings = times | {"transaction_timeout_s": 6.0, "client": case.client}
        self.config: Config = cluster.config(self.topics["events"], name=name, kafka=settings, **urls)

    def inject(self) -> None:
        topic = self.topics["events"]
        if self.case.request == "Fetch of a partition":
            self.mock.push_partition(self.request, self.case.code, topic)
        elif self.case.request == "Metadata of a topic":
            self.mock.set_topic(self.case.code, topic)
            threading.Timer(1.0, self.mock.set_topic, (0, topic)).start()
        else:
            self.mock.push(self.request, self.case.code)

    def produce(self, count: int) -> None:
        producer = KafkaProducer(bootstrap_servers=self.mock.bootstrap, enable_idempotence=False, acks="all", **OLD)
        for i in range(count):
            producer.send(self.topics["events"], b"%d" % i, partition=0)
        producer.flush(10)
        producer.close()

    def read(self, role: str) -> list[bytes]:
        """Everything, however busy the machine is."""
        settings = {"enable_auto_commit": False, "check_crcs": False}
        consumer = KafkaConsumer(bootstrap_servers=self.mock.bootstrap, **settings, **OLD)
        partition = TopicPartition(self.topics[role], 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        end, found, deadline = consumer.end_offsets([partition])[partition], [], time.monotonic() + 20
        while consumer.position(partition) < end and time.monotonic() < deadline:
            found += [record.value for record in consumer.poll(timeout_ms=200).get(partition, [])]
        consumer.close()
        return found

    def committed(self) -> int:
        settings = {"group_id": self.config.name, "enable_auto_commit": False}
        consumer = KafkaConsumer(bootstrap_servers=self.mock.bootstrap, **settings, **OLD)
        found = consumer.committed(TopicPartition(self.topics["events"], 0))
        consumer.close()
        return int(found or 0)


def _produce(scene: Scene) -> str:
    """Twenty messages, the error between them: all there in order, or an error; a few may be there twice."""
    sink = kafka.open_sink(scene.config.predictions or "", scene.config)
    wanted = [b"%d" % i for i in range(20)]
    try:
        sink.send([Message(value) for value in wanted[:5]])
        sink.flush()
        scene.inject()
        sink.send([Message(value) for value in wanted[5:]])
        sink.flush()
    finally:
        sink.close()
    found = scene.read("predictions")
    assert list(dict.fromkeys(found)) == wanted, found
    return "recovered" if len(found) == len(wanted) else f"recovered, {len(found) - len(wanted)} sent twice"


def _fetch(scene: Scene) -> str:
    """Twenty records, the error in front of the first or between them: each once, in order, or an error."""
    scene.produce(10)
    source = None
    if scene.request != "Fetch":
        scene.inject()
    try:
        source = kafka.open_source(scene.config.inputs, scene.config)
        source.seek({})
        if scene.request == "Fetch":
            scene.inject()
        scene.produce(10)
        deadline, found = time.monotonic() + 10, list[bytes]()
        while len(found) < 20 and time.monotonic() < deadline:
            found += [record.value or b"" for record in source.poll(100, 0.1)]
    finally:
        if source:
            source.close()
    assert found == [b"%d" % (i % 10) for i in range(20)], found
    return "recovered"


def _commit(scene: Scene) -> str:
    """A commit that fails is counted; the next one shows the progress, and reading has gone on all the time."""
    scene.produce(10)
    source = kafka.open_source(scene.config.inputs, scene.config)
    try:
        source.seek({})
        scene.inject()
        taken, attempts = 0, 0
        while scene.committed() != 10 and attempts < 20:
            taken += len(source.poll(100, 0.1))
            source.commit({EVENTS: taken})
            attempts += 1
        assert taken == 10
        if scene.committed() != 10:
            assert source.commit_failures >= attempts - 2, f"{source.commit_failures} of {attempts} failures counted"
            return "every commit fails and is counted, until the next start"
    finally:
        source.close()
    return f"counted ({source.commit_failures}), next one shows" if source.commit_failures else "recovered"


def _append(scene: Scene) -> str:
    """Orders in transactions: what was confirmed is in the log, in order, and it can be opened and continued."""
    log = kafka.open_control(scene.config.control_url, scene.config)
    confirmed, said = [], "recovered"
    try:
        if scene.request not in ("InitProducerId", "FindCoordinator"):
            log.open()
        scene.inject()
        for turn in range(3):
            try:
                if turn == 0 and scene.request in ("InitProducerId", "FindCoordinator"):
                    log.open()
                log.append(_order(turn), {scene.config.published[0]: [Message(b"%d" % turn)]})
                confirmed.append(turn)
            except Unavailable as error:
                assert scene.case.code not in (*FORBIDDEN, *FENCED), f"opens anew what is forbidden or fenced: {error}"
                said = f"opened anew after {_words(error)}"
                log.open()
    finally:
        log.close()
    found = [order.runs[0].length for _, order in log.read(0)]
    assert [turn for turn in found if turn in confirmed] == confirmed, (found, confirmed)
    assert len(confirmed) >= 2
    return said


def _join(scene: Scene) -> str:
    """The only member of a group holds every shard, in the end and once it has beaten its heart."""
    shard = {"count": SHARDS, "assignment": "group", "session_timeout_s": 2.0}
    config = Config.parse(scene.config.model_dump(mode="json") | {"shard": shard})
    if scene.request != "Heartbeat":
        scene.inject()
    group = connect.join_group(config)
    try:
        began = time.monotonic()
        _until_all_held(group)
        if scene.request == "Heartbeat":
            scene.inject()
            time.sleep(1.5)
            _until_all_held(group)
        took = time.monotonic() - began
    finally:
        group.close()
    return "recovered" if took < 5 else "recovered, in more than 5 s"


def _until_all_held(group: Membership) -> None:
    deadline = time.monotonic() + 20
    while not (group.settled() and group.held().keys() == set(range(SHARDS))):
        assert time.monotonic() < deadline, f"holds {group.held()}"
        time.sleep(0.05)


def _order(turn: int) -> Order:
    return Order((Run(EVENTS, turn),), {EVENTS: turn})


def _words(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text.partition("kafka://")[0] + "…" + text.rpartition("kafka://")[2].partition(" ")[2]


SCENES: dict[str, Callable[[Scene], str]] = {
    "Produce": _produce,
    "Fetch": _fetch,
    "ListOffsets": _fetch,
    "Fetch of a partition": _fetch,
    "Metadata": _fetch,
    "Metadata of a topic": _fetch,
    "OffsetCommit": _commit,
    "FindCoordinator": _append,
    "InitProducerId": _append,
    "AddPartitionsToTxn": _append,
    "EndTxn": _append,
    "Produce in a transaction": _append,
    "JoinGroup": _join,
    "SyncGroup": _join,
    "Heartbeat": _join,
}


def _outcome(mock: MockCluster, case: Case) -> str:
    scene = Scene(mock, case)
    try:
        said = SCENES[case.request](scene)
    except ConnectorError as error:
        assert str(error), "an error without a word"
        said = _words(error)
        forbidden = case.code in FORBIDDEN
        passes = isinstance(error, Unavailable)
        assert not (forbidden and passes), f"waits for what no waiting cures: {said}"
        # "No such topic" passes too, says the protocol; at a start it is a spelling mistake.
        retriable = case.code not in (3, 100) and getattr(kafka_errors.for_code(case.code), "retriable", False)
        assert passes or isinstance(error, Fenced) or not retriable, f"gives up on what passes by itself: {said}"
    assert mock.pending(scene.request) == 0, "nobody met the error"
    return said


def _lane(cases: queue.SimpleQueue[Case], table: Table) -> None:
    with MockCluster() as mock, suppress(queue.Empty):
        while True:
            case = cases.get_nowait()
            table.rows[case] = _boxed(partial(_outcome, mock, case))
            mock.pending(case.request.partition(" ")[0])


def _boxed(work: Callable[[], str]) -> str:
    """What `work` says, or in capitals what is wrong with it."""
    said = ["HANGS"]

    def run() -> None:
        try:
            said[0] = work()
        except AssertionError as error:
            said[0] = f"WRONG: {error}"
        except Exception as error:  # noqa: BLE001 - whatever else comes out is not clear
            said[0] = f"UNCLEAR: {error!r}"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CASE_S)
    return said[0]


@pytest.fixture
def old_protocol(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    settings, consumer_settings = kafka_python_connection.settings, kafka_python.consumer_settings

    def capped(*arguments: Any) -> dict[str, Any]:
        return settings(*arguments) | OLD

    def lenient(*arguments: Any) -> dict[str, Any]:
        return consumer_settings(*arguments) | {"check_crcs": False}

    monkeypatch.setattr(kafka_python_connection, "settings", capped)
    monkeypatch.setattr(kafka_python, "consumer_settings", lenient)
    with suppress(ImportError):
        _unchecked(monkeypatch)
    yield


def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    from connectors import librdkafka_connection

    connect = librdkafka_connection.connect

    def lenient(client: Any, wanted: dict[str, Any], config: Config) -> Any:
        return connect(client, wanted | ({"check.crcs": False} if "check.crcs" in wanted else {}), config)

    monkeypatch.setattr(librdkafka_connection, "connect", lenient)


def _run(cases: Sequence[Case]) -> Table:
    table, waiting = Table(), queue.SimpleQueue[Case]()
    for case in cases:
        waiting.put(case)
    lanes = [threading.Thread(target=_lane, args=(waiting, table)) for _ in range(LANES)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    return table


@pytest.mark.skipif(mock_cluster.library() is None, reason="the mock cluster needs confluent-kafka's wheel")
@pytest.mark.parametrize("client", ["kafka-python", "librdkafka"])
def test_every_error_code_is_recovered_from_or_told_clearly(client: str, old_protocol: None) -> None:
    requests = [each for each in CODES if client == "kafka-python" or SCENES[each] is not _join]  # the group's only one
    cases = [Case(request, code, client) for request in requests for code in CODES[request]]
    table = _run(cases)
    print(f"\n{table}")
    artefact = Path(__file__).parents[2] / "build" / f"error-codes-{client}.md"
    artefact.parent.mkdir(exist_ok=True)
    artefact.write_text(f"| client | request, code | outcome |\n|---|---|---|\n{table}\n", encoding="utf-8")
    bad = {str(case): said for case, said in table.rows.items() if said.startswith(("HANGS", "WRONG", "UNCLEAR"))}
    assert not bad
    assert len(table.rows) == len(cases)
