"""The log that a sweep reads: where it begins, where it ended when the sweep began, and how it is followed to a cut.

Every run reads it for itself, through the connector, like a worker: the operating system keeps a file's pages once for
all of them, decoding can't be shared (what is made of an event depends on the configuration), and no second way of
reading can differ from production.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import orjson
import xxhash

from streamcl import backtest, connect
from streamcl.config import Config
from streamcl.protocols import ConnectorError, Source
from streamcl.records import EVENTS, Order, Stream, Turn, position_from_json, position_to_json
from streamcl.worker import Worker, logged

PATIENCE_S = 60.0
"""How long records that are known to be there may take."""

Places = Mapping[str, Mapping[str, int]]
"""A position as JSON."""


@dataclass(frozen=True, slots=True)
class Log:
    """What all runs of a sweep read.

    `digest` is of every record: two logs of one digest are one. `order` is the URL of the control log that is
    followed, up to its offset `order_end`; None where the inputs have an order by themselves.
    """

    start: Places
    records: int
    events: int
    digest: str
    order: str | None = None
    order_end: int = 0


def scan(config: Config, order: str | None = None) -> Log:
    """Read the log to the end that it has now; topics may grow meanwhile. `order`: see `Log`; default: the inputs' own.

    Raises:
        ConnectorError: can't be read; or it lies in the memory of this process, where no other can read it.
    """
    if config.events.url.startswith("memory:"):
        raise ConnectorError(f"{config.events.url}: other processes can't read it; a sweep needs a file or a topic")
    with contextlib.closing(connect.open_source(config)) as source:
        order = order or backtest.order_of(config, source.streams())
        start = dict(source.seek({}))
        ends = dict.fromkeys(start, math.inf)
        if order is not None:
            seal, order_end, records, events, reached = _orders(config, order)
            ends = {stream: reached.get(stream, 0) for stream in start}
        else:
            seal, order_end, records, events = "", 0, 0, 0
            if not config.events.url.startswith("file:"):
                ends = {stream: start[stream] + lag for stream, lag in source.lag().items()}
        digests, found = _digests(source, ends)
    if order is None:
        records, events = sum(found.values()), sum(n for stream, n in found.items() if stream.input == EVENTS)
    said = orjson.dumps([position_to_json(start), digests, seal])
    return Log(position_to_json(start), records, events, xxhash.xxh3_128_hexdigest(said), order, order_end)


def _orders(config: Config, url: str) -> tuple[str, int, int, int, dict[Stream, int]]:
    """(digest, end, records, events, position) of a control log."""
    seal, end, records, events = xxhash.xxh3_128(), 0, 0, 0
    position: dict[Stream, int] = {}
    with contextlib.closing(connect.connector(url).open_control(url, config)) as control:
        for end, each in logged(control, 0):  # noqa: B007 - the last one counts
            seal.update(orjson.dumps(each.to_json()))
            records += sum(run.length for run in each.runs)
            events += _events(each)
            position = dict(each.position)
    if not records:
        raise ConnectorError(f"{url}: no worker has logged an order in which these inputs were taken")
    return seal.hexdigest(), end, records, events, position


def _events(order: Order) -> int:
    return sum(run.length for run in order.runs if run.stream.input == EVENTS)


def _digests(source: Source, ends: Mapping[Stream, float]) -> tuple[dict[str, str], dict[Stream, int]]:
    """Of every stream up to its end, and how many records it has; whatever the order in which they come."""
    seals = {stream: xxhash.xxh3_128() for stream in ends}
    found = dict.fromkeys(ends, 0)
    left = {stream for stream, end in ends.items() if end > 0}
    since = time.monotonic()
    while left and not source.exhausted():
        records = source.poll(1000, 0.5)
        for record in records:
            stream, offset = record.origin.stream, record.origin.offset
            if offset < ends[stream]:
                seals[stream].update(orjson.dumps([offset, record.time_s, record.value is None]))
                for part in (record.value, record.key):
                    seals[stream].update(b"%d:" % len(part or b"") + (part or b""))
                found[stream] += 1
            if offset >= ends[stream] - 1:
                left.discard(stream)
        if records:
            since = time.monotonic()
            continue
        lag = source.lag()  # an end may be the mark of a transaction, which is no record
        left = {stream for stream in left if lag.get(stream, 0)}
        if time.monotonic() - since > PATIENCE_S:
            raise ConnectorError(f"{min(left).input} partition {min(left).partition}: its end does not come")
    return {f"{stream.input}:{stream.partition}": seal.hexdigest() for stream, seal in sorted(seals.items())}, found


def follow(worker: Worker, log: Log, taken: int, until: int) -> Iterator[tuple[Turn, int]]:
    """Turns, and how many events have been taken after each, from where the worker stands up to `until` events.

    `until = log.events` means the end: labels behind the last event are taken too. With a control log a cut lies
    behind the order in which the event stands.

    Args:
        taken: events that the worker has taken before.

    Raises:
        ConnectorError: the log is not what it was when it was scanned.
    """
    if log.order is not None:
        yield from _follow_order(worker, log, log.order, taken, until)
        return
    idle_since = time.monotonic()
    while worker.progress.records < log.records and (taken < until or until >= log.events):
        limit = min(worker.config.worker.max_records, log.records - worker.progress.records)
        limit = limit if until >= log.events else min(limit, until - taken)
        records = worker.source.poll(limit, 0.5)
        if records:
            taken += sum(record.origin.input == EVENTS for record in records)
            yield worker.turn(records), taken
            idle_since = time.monotonic()
        elif worker.source.exhausted() or time.monotonic() - idle_since > PATIENCE_S:
            raise ConnectorError(f"the log ends after {worker.progress.records} records; it had {log.records}")


def _follow_order(worker: Worker, log: Log, url: str, taken: int, until: int) -> Iterator[tuple[Turn, int]]:
    with contextlib.closing(connect.connector(url).open_control(url, worker.config)) as control:

        def wanted() -> Iterator[tuple[int, Order]]:
            nonlocal taken
            for end, order in logged(control, worker.control_offset):
                if end > log.order_end or (taken >= until and until < log.events):
                    return
                taken += _events(order)
                yield end, order

        for turn in worker.rerun(wanted()):
            yield turn, taken


def begin(worker: Worker, log: Log) -> None:
    """Stand at the log's beginning."""
    worker.progress.position = dict(worker.source.seek(position_from_json(log.start)))
