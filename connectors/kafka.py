"""Kafka, at least once: `kafka://host:port[,host:port]/topic`.

The position lives in the checkpoint and the control log, never in Kafka: partitions are assigned by hand, every start
is an explicit seek, and what is committed is only for tools that show lag.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from connectors import kafka_client as client
from connectors.kafka_client import Fault, Kind
from connectors.kafka_control import KafkaControlLog
from connectors.kafka_group import KafkaGroup
from connectors.kafka_sink import KafkaSink
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Gap
from streamcl.records import COMMANDS, Position, Record, Stream

log = logging.getLogger(__name__)


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
        opened = client.library(config).open_consumer
        self._consumer = opened(self._servers, self._topics, config, group=config.name)
        self.retries = self.commit_failures = 0
        self._failures, self._retry_at, self._look_at = 0, 0.0, 0.0
        try:
            self._counts = client.partition_counts(self._consumer, self._topics, self._servers, config)
            self._streams = _assigned(self._topics, self._counts, config)
        except ConnectorError:
            self.close()
            raise
        self._buffers: dict[Stream, deque[Record]] = {stream: deque() for stream in self._streams}
        self._ends: dict[Stream, int] = dict.fromkeys(self._streams, 0)
        self._paused: set[Stream] = set()

    @property
    def away(self) -> bool:
        """No broker is connected: that nothing comes does not mean that nothing is there."""
        return not self._consumer.reachable()

    def streams(self) -> Sequence[Stream]:
        return list(self._streams)

    def seek(self, position: Position) -> Position:
        """See `Source.seek`; start_at says where a stream starts that `position` does not name. Commands start at their
        first one, whatever it says: none of them may be passed over.

        Raises:
            Gap: an offset below the log's start: retention overtook us.
            ConnectorError: a stream of another shard, an offset above the log's end: the topic was made anew. The
                library would reset either silently.
        """
        foreign = sorted(position.keys() - self._buffers.keys())
        if foreign:
            raise ConnectorError(f"{foreign[0].input} partition {foreign[0].partition} is not in this shard")
        limits = client.bounds(self._servers, self._topics, self._streams, self._config)
        latest = self._config.kafka.start_at == "latest"
        ends = {stream for stream in limits if latest and stream.input != COMMANDS}
        start = {s: position.get(s, limit.end if s in ends else limit.start) for s, limit in limits.items()}
        self._in_range(start, limits)
        try:
            self._consumer.assign(start)
        except Fault as fault:
            raise fault.at(f"kafka://{self._servers}") from fault
        for stream, limit in limits.items():
            self._buffers[stream].clear()
            self._ends[stream] = limit.end
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
        if deadline > self._look_at:
            self._refuse_new_partitions()
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
        self._consumer.commit(position, self._commit_failed)

    def lag(self) -> Mapping[Stream, int]:
        return {stream: max(0, self._end(stream) - self._next(stream)) for stream in self._streams}

    def exhausted(self) -> bool:
        return False

    def close(self) -> None:
        self._consumer.close()

    def _fill(self, timeout_s: float) -> None:
        """One poll of the client into the buffers, or a piece of the back-off while brokers are away."""
        wait_s = self._retry_at - time.monotonic()
        if wait_s > 0:
            time.sleep(min(wait_s, timeout_s))
            return
        try:
            fetched = self._consumer.poll(timeout_s)
        except Fault as fault:
            self._back_off(fault)
            return
        for stream, records in fetched.items():
            self._buffers[stream].extend(records)
            if len(self._buffers[stream]) > 2 * self._config.worker.max_records:
                self._consumer.pause(stream)
                self._paused.add(stream)
        if fetched and self._failures:
            log.warning("kafka://%s: records arrive again", self._servers)
            self._failures = 0

    def _back_off(self, fault: Fault) -> None:
        """F6: `poll` raises while brokers are away. Wait and go on; one warning per outage."""
        if fault.kind is Kind.RANGE and fault.stream is not None:
            raise self._lost(fault.stream, fault.offset) from fault
        if fault.kind is not Kind.PASSING:
            raise fault.at(f"kafka://{self._servers}") from fault
        if not self._failures:
            log.warning("kafka://%s: %s; trying again until it answers", self._servers, fault)
        self._retry_at = time.monotonic() + client.backoff_s(self._failures)
        self._failures += 1
        self.retries += 1

    def _merge(self, wanted: Sequence[Stream], limit: int) -> list[Record]:
        """Take from the buffers; stop where a stream runs dry that is known to hold more."""
        taken: list[Record] = []
        stalled = self._late(wanted)  # we have waited for these already
        heads = [(self._buffers[stream][0].time_s, stream) for stream in wanted if self._buffers[stream]]
        heapq.heapify(heads)
        while heads and len(taken) < limit:
            stream = heads[0][1]
            buffer = self._buffers[stream]
            taken.append(buffer.popleft())
            if buffer:
                heapq.heapreplace(heads, (buffer[0].time_s, stream))
                continue
            heapq.heappop(heads)
            if stream not in stalled and self._late([stream]):
                break
        return taken

    def _refuse_new_partitions(self) -> None:
        """From what the client has heard anyway, no request is made."""
        self._look_at = time.monotonic() + self._config.kafka.metadata_max_age_s
        for name, topic in self._topics.items():
            found, opened = self._consumer.known_partitions(name), self._counts[topic]
            if found > opened and name != COMMANDS:
                raise ConnectorError(
                    f"kafka://{self._servers}/{topic} has {found} partitions, it had {opened}. Keys may have moved"
                    " between partitions, and their tickets with them: stop every worker and run `streamcl reshard`"
                )

    def _late(self, wanted: Sequence[Stream]) -> set[Stream]:
        """Streams with an empty buffer that are known to hold more."""
        return {each for each in wanted if not self._buffers[each] and self._next(each) < self._end(each)}

    def _next(self, stream: Stream) -> int:
        """The next offset to deliver. The client's position steps over the markers of transactions."""
        if self._buffers[stream]:
            return self._buffers[stream][0].origin.offset
        return self._consumer.position(stream)

    def _end(self, stream: Stream) -> int:
        return max(self._ends[stream], self._consumer.highwater(stream) or 0)

    def _resume(self) -> None:
        for stream in [each for each in self._paused if len(self._buffers[each]) <= self._config.worker.max_records]:
            self._consumer.resume(stream)
            self._paused.discard(stream)

    def _commit_failed(self, cause: str) -> None:
        self.commit_failures += 1
        log.warning("kafka://%s: progress of group %s not shown: %s", self._servers, self._config.name, cause)

    def _lost(self, stream: Stream, offset: int) -> ConnectorError:
        limits = client.bounds(self._servers, self._topics, [stream], self._config)
        try:
            self._in_range({stream: offset}, limits)
        except ConnectorError as error:
            return error
        return ConnectorError(f"{self._where(stream)}: offset {offset} was refused, available are {limits[stream]}")

    def _in_range(self, start: Position, limits: Mapping[Stream, client.Bounds]) -> None:
        below = [stream for stream, offset in start.items() if offset < limits[stream].start]
        above = [stream for stream, offset in start.items() if offset > limits[stream].end]
        for stream in (*above, *below):
            cause = "retention has removed it" if stream in below else "the topic was made anew, or lost its end"
            text = (
                f"{self._where(stream)}: offset {start[stream]} is wanted,"
                f" available are {limits[stream].start} to {limits[stream].end}: {cause}"
            )
            if stream in above:
                raise ConnectorError(text)
            raise Gap(text, {s: start[s] for s in below}, {s: limits[s].start for s in below})

    def _where(self, stream: Stream) -> str:
        return f"kafka://{self._servers}/{self._topics[stream.input]} partition {stream.partition}"


def _assigned(topics: Mapping[str, str], counts: Mapping[str, int], config: Config) -> list[Stream]:
    shard, keyed = config.shard, {topic: counts[topic] for name, topic in topics.items() if name != COMMANDS}
    if len(set(keyed.values())) > 1:
        found = ", ".join(f"{topic} has {count}" for topic, count in sorted(keyed.items()))
        raise ConnectorError(f"inputs must have equally many partitions (the same key in the same one): {found}")
    if COMMANDS in topics and counts[topics[COMMANDS]] < shard.count:
        topic = topics[COMMANDS]
        raise ConnectorError(f"{topic}: {shard.count} shards need as many partitions, there are {counts[topic]}")
    found_here = [
        Stream(name, partition)
        for name, topic in topics.items()
        for partition in range(shard.index, counts[topic], shard.count)
    ]
    if not found_here:
        raise ConnectorError(f"shard {shard.index} of {shard.count} has no partition of {', '.join(sorted(counts))}")
    return found_here


def open_source(inputs: Mapping[str, str], config: Config) -> KafkaSource:
    return KafkaSource(inputs, config)


def open_sink(url: str, config: Config) -> KafkaSink:
    return KafkaSink(url, config)


def open_control(url: str, config: Config) -> KafkaControlLog:
    return KafkaControlLog(url, config)


def join_group(url: str, config: Config) -> KafkaGroup:
    return KafkaGroup(url, config)


def check(urls: Collection[str], config: Config) -> Sequence[str]:
    """See `Connector.check`: brokers answer, inputs exist and are co-partitioned, what each partition holds.

    Raises:
        ConnectorError: also when a part of the client library is missing.
    """
    found = [client.library(config).check()]
    source = KafkaSource(config.inputs, config)
    source.close()
    for url in urls:
        found += _look(url, required=url in config.inputs.values(), config=config)
    return found


def _look(url: str, required: bool, config: Config) -> list[str]:
    servers, topic = client.locate(url)
    consumer = client.library(config).open_consumer(servers, {"topic": topic}, config)
    try:
        count = client.partition_count(consumer, "topic", url, config)
    finally:
        consumer.close()
    if not count:
        if required:
            raise ConnectorError(f"{url}: no such topic, or no right to see it")
        return [f"{url}: will be made"]
    if url in (config.outcomes_url, config.deltas_url) and count != 1:
        raise ConnectorError(f"{url}: has one order: it needs 1 partition, this topic has {count}")
    streams = [Stream("topic", number) for number in range(count)]
    limits = client.bounds(servers, {"topic": topic}, streams, config)
    ranges = ", ".join(f"{each.partition}: {limit.start} to {limit.end}" for each, limit in limits.items())
    return [f"{url}: {count} partition(s), offsets {ranges}"]
