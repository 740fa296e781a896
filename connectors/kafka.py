"""Kafka, at least once: `kafka://host:port[,host:port]/topic`.

The position lives in the checkpoint and the control log, never in Kafka: partitions are assigned by hand, every start
is an explicit seek, and what is committed is only for tools that show lag.
"""

from __future__ import annotations

import heapq
import logging
import sys
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from connectors import kafka_client as client
from connectors.kafka_control import KafkaControlLog
from connectors.kafka_sink import KafkaSink
from streamcl.config import Config
from streamcl.protocols import ConnectorError
from streamcl.records import Origin, Position, Record, Stream

log = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 5.0


class KafkaSource:
    """The partitions p of every input topic with p % shard.count == shard.index, read committed.

    `seek` comes before the first `poll`. Per partition at most 2 * worker.max_records records and one fetch (1 MiB)
    wait: above 2 * max_records a partition is paused, at max_records it is resumed.

    Attributes:
        retries: How often polling failed because brokers were away (count).
        commit_failures: How often progress could not be shown (count).

    Raises:
        ConnectorError: unknown topic, topics with different numbers of partitions, a shard without a partition,
            an unreachable or refusing broker.
    """

    def __init__(self, inputs: Mapping[str, str], config: Config) -> None:
        self._config = config
        self._servers, _ = client.locate(next(iter(inputs.values())))
        self._topics = {name: client.locate(url)[1] for name, url in sorted(inputs.items())}
        self._consumer = client.connect(KafkaConsumer, client.consumer_settings(self._servers, config), config)
        self._committer = self._open_committer()
        self.retries = self.commit_failures = 0
        self._backoff_s, self._retry_at = 0.0, 0.0
        try:
            counts = client.partition_counts(self._consumer, self._topics.values(), self._servers)
            self._partitions = _assigned(self._topics, counts, config)
        except ConnectorError:
            self.close()
            raise
        self._streams = {partition: stream for stream, partition in self._partitions.items()}
        self._buffers: dict[Stream, deque[Any]] = {stream: deque() for stream in self._partitions}
        self._ends: dict[Stream, int] = dict.fromkeys(self._partitions, 0)
        self._paused: set[Stream] = set()

    def streams(self) -> Sequence[Stream]:
        return list(self._partitions)

    def seek(self, position: Position) -> Position:
        """See `Source.seek`; start_at says where a stream starts that `position` does not name.

        Raises:
            ConnectorError: a stream of another shard, an offset below the log's start (retention overtook us) or
                above its end (the topic was made anew): the client would reset either silently.
        """
        foreign = sorted(position.keys() - self._partitions.keys())
        if foreign:
            raise ConnectorError(f"{foreign[0].input} partition {foreign[0].partition} is not in this shard")
        limits = client.bounds(self._servers, list(self._streams), self._config)
        latest = self._config.kafka.start_at == "latest"
        start: dict[Stream, int] = {}
        for stream, partition in self._partitions.items():
            limit = limits[partition]
            start[stream] = position.get(stream, limit.end if latest else limit.start)
            if not limit.start <= start[stream] <= limit.end:
                raise self._out_of_range(partition, start[stream], limit)
        self._consumer.assign(list(self._streams))
        for stream, partition in self._partitions.items():
            self._consumer.resume(partition)
            self._consumer.seek(partition, start[stream])
            self._buffers[stream].clear()
            self._ends[stream] = limits[partition].end
        self._paused.clear()
        return start

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        """See `Source.poll`. Across streams the record with the lowest (timestamp, input, partition) comes first.

        While a stream is known to hold more but nothing of it has arrived, the others wait for it, `timeout_s` at
        most: else a backlog of events would run ahead of its labels.
        """
        if only is not None and only not in self._buffers:
            raise ConnectorError(f"{only.input} partition {only.partition} is not in this shard")
        wanted = self.streams() if only is None else [only]
        deadline = time.monotonic() + timeout_s
        self._fill(0.0)
        while not any(self._buffers[stream] for stream in wanted) or self._late(wanted):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            self._fill(left_s)
        taken = self._merge(wanted, limit)
        self._resume()
        return taken

    def commit(self, position: Position) -> None:
        """See `Source.commit`. Returns at once; what fails is counted and logged, for it is only a gauge."""
        offsets = {self._partitions[each]: OffsetAndMetadata(offset, "", -1) for each, offset in position.items()}
        try:
            self._committer.commit_async(offsets, callback=self._committed)
        except kafka_errors.KafkaError as error:
            self._committed(offsets, error)

    def lag(self) -> Mapping[Stream, int]:
        return {stream: max(0, self._end(stream) - self._next(stream)) for stream in self._partitions}

    def exhausted(self) -> bool:
        return False

    def close(self) -> None:
        self._consumer.close(timeout_ms=1000)
        self._committer.close(timeout_ms=1000)

    def _open_committer(self) -> Any:
        """A client of its own: with a group, `poll` would wait for a coordinator and could fail for lack of one."""
        wanted = client.settings(self._servers, self._config) | {"group_id": self._config.name}
        wanted |= {"enable_auto_commit": False, "metrics_enabled": False}
        return client.connect(KafkaConsumer, wanted, self._config)

    def _fill(self, timeout_s: float) -> None:
        """One poll of the client into the buffers, or a piece of the back-off while brokers are away."""
        wait_s = self._retry_at - time.monotonic()
        if wait_s > 0:
            time.sleep(min(wait_s, timeout_s))
            return
        try:
            # Everything it holds: a partition that is paused with a part of a fetch still inside the client can stay
            # silent for ever after it is resumed.
            fetched = self._consumer.poll(timeout_ms=timeout_s * 1000, max_records=sys.maxsize)
        except kafka_errors.OffsetOutOfRangeError as error:
            raise self._lost(error) from error
        except kafka_errors.KafkaError as error:
            self._back_off(error)
            return
        for partition, records in fetched.items():
            stream = self._streams[partition]
            self._buffers[stream].extend(records)
            if len(self._buffers[stream]) > 2 * self._config.worker.max_records:
                self._consumer.pause(partition)
                self._paused.add(stream)
        if fetched and self._backoff_s:
            log.warning("kafka://%s: records arrive again", self._servers)
            self._backoff_s = 0.0

    def _back_off(self, error: kafka_errors.KafkaError) -> None:
        """F6: `poll` raises while brokers are away. Wait and go on; one warning per outage."""
        if not client.transient(error):
            raise ConnectorError(f"kafka://{self._servers}: {client.explain(error)}") from error
        if not self._backoff_s:
            log.warning("kafka://%s: %s; trying again until it answers", self._servers, client.explain(error))
        self.retries += 1
        self._backoff_s = min(max(2 * self._backoff_s, _FIRST_BACKOFF_S), _LAST_BACKOFF_S)
        self._retry_at = time.monotonic() + self._backoff_s

    def _merge(self, wanted: Sequence[Stream], limit: int) -> list[Record]:
        """Take from the buffers; stop where a stream runs dry that is known to hold more."""
        taken: list[Record] = []
        stalled = self._late(wanted)  # we have waited for these already
        heads = [(self._buffers[stream][0].timestamp, stream) for stream in wanted if self._buffers[stream]]
        heapq.heapify(heads)
        while heads and len(taken) < limit:
            stream = heads[0][1]
            buffer = self._buffers[stream]
            taken.append(_record(stream, buffer.popleft()))
            if buffer:
                heapq.heapreplace(heads, (buffer[0].timestamp, stream))
                continue
            heapq.heappop(heads)
            if stream not in stalled and self._late([stream]):
                break
        return taken

    def _late(self, wanted: Sequence[Stream]) -> set[Stream]:
        """Streams with an empty buffer that are known to hold more."""
        return {each for each in wanted if not self._buffers[each] and self._next(each) < self._end(each)}

    def _next(self, stream: Stream) -> int:
        """The next offset to deliver. The client's position steps over the markers of transactions."""
        if self._buffers[stream]:
            return int(self._buffers[stream][0].offset)
        position = self._consumer.position(self._partitions[stream], timeout_ms=0) if self._assigned() else None
        return position or 0

    def _end(self, stream: Stream) -> int:
        mark = self._consumer.highwater(self._partitions[stream]) if self._assigned() else None
        return max(self._ends[stream], mark or 0)

    def _assigned(self) -> bool:
        return bool(self._consumer.assignment())

    def _resume(self) -> None:
        for stream in [each for each in self._paused if len(self._buffers[each]) <= self._config.worker.max_records]:
            self._consumer.resume(self._partitions[stream])
            self._paused.discard(stream)

    def _committed(self, offsets: Any, answer: Any) -> None:  # noqa: ARG002 - the client's signature
        if isinstance(answer, Exception):
            self.commit_failures += 1
            log.warning("kafka://%s: progress of group %s not shown: %s", self._servers, self._config.name, answer)

    def _lost(self, error: kafka_errors.OffsetOutOfRangeError) -> ConnectorError:
        partition, offset = next(iter(error.args[0].items()))
        limit = client.bounds(self._servers, [partition], self._config)[partition]
        return self._out_of_range(partition, offset, limit)

    def _out_of_range(self, partition: TopicPartition, offset: int, limit: client.Bounds) -> ConnectorError:
        cause = "retention has removed it" if offset < limit.start else "the topic was made anew, or lost its end"
        return ConnectorError(
            f"kafka://{self._servers}/{partition.topic} partition {partition.partition}: offset {offset} is wanted,"
            f" available are {limit.start} to {limit.end}: {cause}"
        )


def _assigned(topics: Mapping[str, str], counts: Mapping[str, int], config: Config) -> dict[Stream, TopicPartition]:
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{topic} has {count}" for topic, count in counts.items())
        raise ConnectorError(f"inputs must have equally many partitions (the same key in the same one): {found}")
    shard = config.shard
    found_here = {
        Stream(name, partition): TopicPartition(topic, partition)
        for name, topic in topics.items()
        for partition in range(shard.index, counts[topic], shard.count)
    }
    if not found_here:
        raise ConnectorError(f"shard {shard.index} of {shard.count} has no partition of {', '.join(sorted(counts))}")
    return found_here


def _record(stream: Stream, found: Any) -> Record:
    """A record of the client as ours. A header without value reads as an empty one, a missing time as 0."""
    headers = tuple((name, value or b"") for name, value in found.headers)
    origin = Origin(stream.input, stream.partition, found.offset)
    return Record(origin, found.topic, max(found.timestamp, 0) / 1000, found.value, found.key, headers)


def open_source(inputs: Mapping[str, str], config: Config) -> KafkaSource:
    return KafkaSource(inputs, config)


def open_sink(url: str, config: Config) -> KafkaSink:
    return KafkaSink(url, config)


def open_control(url: str, config: Config) -> KafkaControlLog:
    return KafkaControlLog(url, config)


def check(urls: Collection[str], config: Config) -> Sequence[str]:
    """See `Connector.check`: brokers answer, inputs exist and are co-partitioned, what each partition holds.

    Raises:
        ConnectorError: also when the C library for checksums is missing; without it consuming is five times slower.
    """
    if find_spec("crc32c") is None:
        raise ConnectorError("the package crc32c is missing: pip install 'kafka-python[crc32c]'")
    source = KafkaSource(config.inputs, config)
    source.close()
    found = ["crc32c is installed"]
    for url in urls:
        found += _look(url, required=url in config.inputs.values(), config=config)
    return found


def _look(url: str, required: bool, config: Config) -> list[str]:
    servers, topic = client.locate(url)
    consumer = client.connect(KafkaConsumer, client.consumer_settings(servers, config), config)
    try:
        with client.plain_errors(url):
            numbers = sorted(consumer.partitions_for_topic(topic) or ())
    finally:
        consumer.close(timeout_ms=1000)
    if not numbers:
        if required:
            raise ConnectorError(f"{url}: no such topic, or no right to see it")
        return [f"{url}: will be made"]
    limits = client.bounds(servers, [TopicPartition(topic, number) for number in numbers], config)
    ranges = ", ".join(f"{each.partition}: {limit.start} to {limit.end}" for each, limit in limits.items())
    return [f"{url}: {len(numbers)} partition(s), offsets {ranges}"]
