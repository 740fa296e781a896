"""Shards handed out by a consumer group, whole: partition i of a small topic of ours stands for shard i.

Partition p of an input belongs to shard p % count, so a group on the input itself would tear shards apart. The topic
`NAME-shards-COUNT` holds no records, it only has `count` partitions; its name carries the count, so that the workers of
before and after `streamcl reshard` form two groups and none of the old ones is handed a shard of the new.

The group decides who should hold a shard, the control log's fence who does: what a listener is told late, or never,
costs a shard a recovery, and nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping

from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

from connectors import kafka_python_connection as connection
from connectors.kafka_client import ensure_topic, locate
from connectors.kafka_python_faults import explain, transient
from streamcl.config import Config
from streamcl.protocols import ConnectorError

log = logging.getLogger(__name__)

_POLL_MS = 500
_BACKOFF_S = 1.0


class KafkaGroup:
    """A seat in the group; see `Membership`.

    A thread of its own polls, without a gap: a join that completes between two polls is thrown away by the client and
    begun anew, so short polls between turns may never join at all. It stops polling when nobody has asked for a while:
    a member whose loop stands still is no member after shard.max_poll_interval_s.

    A member whose shard was fenced lets go of it until the group hands it out anew, or for one session time-out: then
    whoever fenced it was no member, or is none any more.

    Attributes:
        rebalances: How often shards were assigned, revoked or lost (count).

    Raises:
        ConnectorError: an unreachable or refusing broker, a topic with another number of partitions.
    """

    def __init__(self, url: str, config: Config) -> None:
        self._config = config
        self._servers, _ = locate(url)
        self.topic = f"{config.name}-shards-{config.shard.count}"
        count = ensure_topic(self._servers, self.topic, config, config.shard.count)
        if count != config.shard.count:
            raise ConnectorError(
                f"kafka://{self._servers}/{self.topic}: hands out {config.shard.count} shards and needs as many"
                f" partitions, it has {count}; delete the topic, it holds nothing"
            )
        self.rebalances = 0
        self._tenures: dict[int, int] = {}
        self._doubted: dict[int, float] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._asked_at = time.monotonic()
        self._consumer = connection.connect(KafkaConsumer, _settings(self._servers, self.topic, config), config)
        self._consumer.subscribe(topics=[self.topic], listener=_Listener(self))
        self._thread = threading.Thread(target=self._poll, name="streamcl-group", daemon=True)
        self._thread.start()

    def held(self) -> Mapping[int, int]:
        """See `Membership.held`. While brokers are away it stays as it was: the fence says who may go on."""
        self._asked_at = time.monotonic()
        if self._error:
            raise ConnectorError(f"kafka://{self._servers}/{self.topic}: {explain(self._error)}")
        with self._lock:
            self._doubted = {shard: end for shard, end in self._doubted.items() if end > time.monotonic()}
            return {shard: tenure for shard, tenure in self._tenures.items() if shard not in self._doubted}

    def settled(self) -> bool:
        return bool(self._consumer.group_metadata().generation_id >= 0)

    def fenced(self, shard: int) -> bool:
        with self._lock:
            self._doubted[shard] = time.monotonic() + self._config.shard.session_timeout_s
        return True

    def close(self) -> None:
        """A static member does not leave: it has session_timeout_s to come back."""
        self._closing.set()
        self._thread.join(2.0)
        try:
            self._consumer.close(timeout_ms=1000)
        except kafka_errors.KafkaError as error:
            log.warning("%s: leaving the group: %s", self.topic, explain(error))

    def assigned(self, shards: Iterable[int]) -> None:
        with self._lock:
            self.rebalances += 1
            for shard in shards:
                self._tenures[shard] = self.rebalances
                self._doubted.pop(shard, None)

    def taken(self, shards: Iterable[int]) -> None:
        with self._lock:
            self.rebalances += 1
            for shard in shards:
                self._tenures.pop(shard, None)
                self._doubted.pop(shard, None)

    def _poll(self) -> None:
        patience_s, troubled = self._config.shard.max_poll_interval_s / 2, False
        while not self._closing.is_set() and not self._error:
            if time.monotonic() - self._asked_at > patience_s:
                self._closing.wait(_BACKOFF_S)
                continue
            try:
                self._consumer.poll(timeout_ms=_POLL_MS)
                troubled = False
            except Exception as error:  # noqa: BLE001 - `held` raises it where it is seen
                if not transient(error):
                    self._error = error
                    return
                if not troubled:
                    log.warning("%s: %s; the shards stay as they are", self.topic, explain(error))
                troubled = True
                self._closing.wait(_BACKOFF_S)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # the client has no types
    """F7, F8: on the client's thread nothing may block, and nothing may raise. F9: a lost generation takes all."""

    def __init__(self, group: KafkaGroup) -> None:
        self._group = group

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._group.assigned(each.partition for each in assigned)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._group.taken(each.partition for each in revoked)

    async def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._group.taken(each.partition for each in lost)


def _settings(servers: str, group: str, config: Config) -> dict[str, object]:
    shard = config.shard
    found: dict[str, object] = connection.settings(servers, config) | {
        "group_id": group,
        "partition_assignment_strategy": [CooperativeStickyAssignor],
        "session_timeout_ms": round(shard.session_timeout_s * 1000),
        "heartbeat_interval_ms": round(shard.session_timeout_s * 1000 / 4),
        "max_poll_interval_ms": round(shard.max_poll_interval_s * 1000 / 2),  # the other half passes before
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",  # of a topic without records
        "allow_auto_create_topics": False,
        "metrics_enabled": False,
    }
    name = shard.group_instance_id_env
    if name is not None:
        if not os.environ.get(name):
            raise ConnectorError(f"shard.group_instance_id_env: {name} is not set")
        found["group_instance_id"] = os.environ[name]
    return found
