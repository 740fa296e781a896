"""A second configuration that learns beside a live shard, from what that has taken.

It is a process of its own: the live worker neither knows of it nor waits for it, and none of its faults reach it. It
has a name (NAME-shadow), checkpoints and metrics of its own; it publishes nothing and writes to no topic. What it
learns is what a checkpoint of the live shard has behind it, in the order of the live control log: from one live
checkpoint to the next. So it is never ahead, nothing that it has learned can become void, and at each of those points
the metrics of both are of the same labels. It is behind by the live worker's `checkpoint.every_events` at most.

How it begins is settled once, at its first start:

| begins | when |
|---|---|
| from the live state | settings differ in nothing that means other state: the same weights, other rates, say |
| afresh, at the live shard's position | else; with `model.warm_start` from those weights. It knows no label before it |
| afresh, at the start of the log | with `--from-start`: its state is that of a replay of the whole log |

How it takes the live shard's place stands in `streamcl.promotion`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import orjson

from streamcl import connect
from streamcl.bootstrap import Bootstrap
from streamcl.config import Config, ConfigError, changes
from streamcl.group.manifest import refuse_group
from streamcl.outlets import Outlets
from streamcl.progress import Progress
from streamcl.protocols import Codecs, ConnectorError, ControlLog, Source, StreamclError
from streamcl.records import Order, Position, Record, Turn, position_from_json, position_to_json
from streamcl.recovery import store_of
from streamcl.snapshot import Snapshot
from streamcl.worker import Worker, keeps_order, logged

log = logging.getLogger(__name__)

COMPARED = "compared.jsonl"
LOOK_EVERY_S = 1.0
_SAME = ("name", "inputs", "control_url", "shard.count", "checkpoint.folder", "checkpoint.remote")


def beside(live: Config, other: Config) -> Config:
    """The configuration that a shadow runs with: `other`, under a name of its own, and silent.

    Raises:
        ConfigError: `other` could not take the live one's place; names the setting.
    """
    ours, theirs = (
        (each.name, each.inputs, each.control_url, each.shard.count, each.checkpoint.folder, each.checkpoint.remote)
        for each in (live, other)
    )
    for name, mine, its in zip(_SAME, ours, theirs, strict=True):
        if mine != its:
            raise ConfigError(f"shadow: {name} must be the live one's, {mine}, not {its}: it is to take its place")
    data = other.model_dump(mode="json")
    data["checkpoint"] |= {"remote": None}  # a shadow that is lost is begun anew
    data["deltas"] |= {"url": None}
    data["shard"] = {"index": live.shard.index, "count": live.shard.count}
    silent: dict[str, Any] = {"name": f"{live.name}-shadow", "predictions": None, "outcomes": None, "delivery": {}}
    return Config.parse({**data, **silent, "control": None, "serve": {}}, "shadow")


class Shadow(Worker):
    """Follows a live shard from checkpoint to checkpoint.

    Args:
        config: As `beside` gives it, of this shard.
        live: The live shard's configuration.
        order: Its control log, which is only read; None: its single stream has an order by itself.

    Attributes:
        pair: Metrics of both where the shadow stands, as `compared` says.
    """

    def __init__(self, config: Config, source: Source, codecs: Codecs, live: Config, order: ControlLog | None) -> None:
        super().__init__(config, source, codecs, Outlets(config, codecs.predictions))
        self.live = live
        self.order = order
        local = live.checkpoint.model_copy(update={"remote": None})  # nothing is fetched into another's folder
        self.store = store_of(live.model_copy(update={"checkpoint": local}))
        self.folder = store_of(config).folder
        self.lineage.heeds = False
        self.pair: dict[str, Any] = {}
        self._polled: deque[Record] = deque()

    @classmethod
    def open(cls, config: Config, live: Config) -> Shadow:
        """Raises ConnectorError."""
        source = connect.open_source(config)
        order = connect.open_control(live) if keeps_order(live, source.streams()) else None
        return cls(config, source, connect.codecs(config), live, order)

    def run(self) -> Iterator[Turn]:
        """As `Worker.run`; it never ends by itself."""
        look_at = 0.0
        while not self.stopping:
            if time.monotonic() < look_at:
                time.sleep(self.poll_timeout_s)
                yield Turn(0, dict(self.progress.position))
                continue
            goal = self._next()
            self.caught_up = goal is None
            if goal is None:
                look_at = time.monotonic() + LOOK_EVERY_S
                continue
            yield from self.follow(int(goal.manifest["control_offset"]), position_of(goal))
            if not self.stopping:
                self._compare(goal)

    def _next(self) -> Snapshot | None:
        """The first checkpoint of the live shard that lies ahead."""
        for snapshot in self.store.ls():
            if self.order and int(snapshot.manifest["control_offset"]) > self.control_offset:
                return snapshot
            mine = self.progress.position
            if not self.order and any(offset > mine.get(s, 0) for s, offset in position_of(snapshot).items()):
                return snapshot
        return None

    def follow(self, offset: int, position: Position) -> Iterator[Turn]:
        """Learn up to where the live shard stood at a control offset.

        Raises:
            StreamclError: there is no way there from here: what this one has learned is void by now.
        """
        yield from self.rerun(self._orders(offset)) if self.order else self._records(position)
        if self.stopping:
            return
        here = self.progress.position
        wrong = {s: o for s, o in position.items() if here.get(s) != o}
        if wrong:
            raise StreamclError(
                f"{self.folder}: the live shard stood at {position_to_json(position)}, the shadow has come to"
                f" {position_to_json(here)}: drop it, and begin another"
            )
        self.control_offset = offset

    def _orders(self, end: int) -> Iterator[tuple[int, Order]]:
        assert self.order is not None  # noqa: S101 - whoever calls has looked
        start = self.control_offset
        for at, order in logged(self.order, start):
            if at > end:
                return
            if order.leap is not None and order.leap < start:
                raise StreamclError(f"{self.folder}: what this shadow has learned became void by a gap: drop it")
            yield at, order

    def _records(self, position: Position) -> Iterator[Turn]:
        """Of a single stream. What was polled beyond the goal is for the next one."""
        [(stream, end)] = position.items()
        idle_s = 0.0
        while self.progress.position.get(stream, 0) < end and not self.stopping:
            if not self._polled:
                self._polled.extend(self.source.poll(self.config.worker.max_records, self.config.worker.poll_timeout_s))
            ready: list[Record] = []
            while self._polled and self._polled[0].origin.offset < end:
                ready.append(self._polled.popleft())
            if ready:
                idle_s = 0.0
                yield self.turn(ready, recovering=True)
                continue
            idle_s += self.config.worker.poll_timeout_s
            if self._polled or idle_s > 60.0 or self.source.exhausted():
                raise ConnectorError(f"{stream.input} partition {stream.partition}: no records up to offset {end}")

    def _compare(self, goal: Snapshot) -> None:
        self.pair = compared(self, goal)
        try:
            with (self.folder / COMPARED).open("ab") as file:  # a line of its own, whatever a crash has torn before
                file.write(b"\n" + orjson.dumps(self.pair) + b"\n")
        except OSError as error:
            log.warning("%s: figures are not kept: %s", self.folder / COMPARED, error)

    def readings(self) -> dict[str, float]:
        """Its own, and the live one's metrics at the same place under `live_`."""
        return super().readings() | {f"live_{name}": value for name, value in self.pair.get("live", {}).items()}

    def close(self) -> None:
        with closing(self.order) if self.order else closing(self.source):
            super().close()


def position_of(snapshot: Snapshot) -> Position:
    return position_from_json(snapshot.manifest["position"])


def compared(shadow: Shadow, goal: Snapshot) -> dict[str, Any]:
    """What both have come to at a checkpoint of the live shard: over all, of late, and since the shadow began."""
    begun = shadow.lineage.last("shadow") or {}
    live, own = dict(goal.manifest.get("metrics", {})), shadow.metrics.read()
    return {
        "snapshot": goal.name,
        "records": goal.manifest["records"],
        "live": {**live, **_since(live, begun.get("live", {}))},
        "shadow": {**own, **_since(own, begun.get("own", {}))},
    }


def _since(now: Mapping[str, float], then: Mapping[str, float]) -> dict[str, float]:
    """Mean losses over the labels in between, from means over all before and behind them."""
    count = now.get("examples", 0.0) - then.get("examples", 0.0)
    found = {"examples_since": count}
    for name, power in (("log_loss", 1), ("accuracy", 1), ("rmse", 2), ("mae", 1)):
        if name in now and count > 0:
            before = then.get("examples", 0.0) * then.get(name, 0.0) ** power
            mean = max(0.0, (now["examples"] * now[name] ** power - before) / count)
            found[f"{name}_since"] = mean ** (1 / power)
    return found


@dataclass(frozen=True, slots=True)
class Beginning(Bootstrap):
    """Where a shadow begins; see the module.

    Args:
        from_start: At the start of the log, not where the live shard stands.
    """

    from_start: bool = False

    def begin(self, worker: Worker) -> None:
        assert isinstance(worker, Shadow)  # noqa: S101 - nobody else begins so
        loaded = worker.store.newest()
        if loaded is None:
            raise StreamclError(f"{worker.store.folder}: no checkpoint: a shadow begins where a live shard stands")
        refuse_group(loaded.snapshot)
        manifest, fact = loaded.manifest, worker.lineage.last("warm_start")
        begun, live = "start", {}
        if self.from_start:
            worker.progress.position = dict(worker.source.seek({}))
        else:
            other = _other_state(manifest["config"], worker)
            live = dict(manifest.get("metrics", {}))
            if other or (fact and fact not in manifest.get("lineage", ())):
                begun = "afresh"
                told = Progress()
                told.load_state_dict(loaded.state["progress"])
                worker.progress.position, worker.progress.records = dict(told.position), told.records
                log.info("%s begins afresh at %d records: other %s", worker.folder, told.records, ", ".join(other))
            else:
                begun = "state"
                worker.load_state_dict(loaded.state)
            worker.control_offset = int(manifest["control_offset"])
            worker.source.seek(worker.progress.position)
        own = worker.metrics.read()
        position = position_to_json(worker.progress.position)
        worker.lineage.add(
            "shadow", records=worker.progress.records, begun=begun, position=position, live=live, own=own
        )


def _other_state(old: Mapping[str, Any], shadow: Shadow) -> list[str]:
    """Settings of the shadow that mean other state than the live one's."""
    config = shadow.config.model_copy(update={"name": shadow.live.name})
    return [path for path, change in changes(old, config) if change == "new"]


def history(config: Config) -> list[dict[str, Any]]:
    """Every pair of metrics so far, oldest first. What a crash made the shadow learn again is told once."""
    path = store_of(config).folder / COMPARED
    lines = path.read_bytes().splitlines() if path.exists() else []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            pair = orjson.loads(line)
        except orjson.JSONDecodeError:  # torn by a crash; it comes again
            continue
        found[pair["snapshot"]] = pair
    return list(found.values())
