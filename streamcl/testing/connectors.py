"""Contract checks for whoever writes a connector; the built-in ones pass them too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from streamcl.progress import Progress
from streamcl.protocols import ControlLog, Fenced, Outputs, Sink, Source
from streamcl.records import Message, Order, Origin, Record, Run, Stream
from streamcl.testing.state import claim

_PATIENCE = 50  # empty polls before a source counts as silent


def check_source(make: Callable[[], Source], count: int, *, finite: bool = True, timeout_s: float = 0.1) -> None:
    """A source delivers the same `count` records per stream however it is polled, and again from any position.

    Args:
        make: Opens a source on the same records each time; several may be open at once.
        count: Records there, in all streams together; at least 2.
        finite: Nothing more will come, so the source must be exhausted behind the last one.
        timeout_s: Of one poll.
    """
    source = make()
    try:
        source.seek({})  # as a worker does before its first poll
        everything = _drain(source, count, count, timeout_s)
        claim(not source.poll(1, timeout_s), "nothing comes behind the last record")
        _check_streams(source, everything, finite)
        for limit in (1, 3):
            source.seek({})
            again = _drain(source, count, limit, timeout_s)
            claim(_by_stream(again) == _by_stream(everything), f"a limit of {limit} delivers the same records")
        _check_seek(source, everything, timeout_s)
        _check_only(source, everything, timeout_s)
    finally:
        source.close()
    _check_reopened(make, everything, timeout_s)


def _check_streams(source: Source, records: Sequence[Record], finite: bool) -> None:
    streams = list(source.streams())
    claim(streams == sorted(set(streams)), "streams are sorted, each there once")
    for stream, those in _by_stream(records).items():
        claim(stream in streams, f"{stream} has records, so `streams` names it")
        offsets = [record.origin.offset for record in those]
        claim(all(a < b for a, b in pairwise(offsets)), f"offsets of {stream} ascend")
    claim(all(lag >= 0 for lag in source.lag().values()), "lag is not negative")
    claim(source.lag().keys() <= set(streams), "lag names the shard's own streams")
    claim(source.exhausted() == finite, "a finite source is exhausted behind its last record, another never")


def _check_seek(source: Source, everything: Sequence[Record], timeout_s: float) -> None:
    start = dict(source.seek({}))
    claim(start.keys() == set(source.streams()), "`seek` returns the next offset of every stream")
    for cut in sorted({0, 1, len(everything) // 2, len(everything)}):
        position = start | {record.origin.stream: record.origin.offset + 1 for record in everything[:cut]}
        claim(dict(source.seek(position)) == position, "`seek` returns the position that it was given")
        source.commit(position)
        rest = _drain(source, len(everything) - cut, 2, timeout_s)
        claim(_by_stream(rest) == _by_stream(everything[cut:]), f"a seek behind record {cut} delivers the rest")


def _check_only(source: Source, everything: Sequence[Record], timeout_s: float) -> None:
    for stream, those in _by_stream(everything).items():
        source.seek({})
        found = _drain(source, len(those), 2, timeout_s, only=stream)
        claim(found == those, f"`only` delivers {stream} and nothing else")
        rest = _drain(source, len(everything) - len(those), 2, timeout_s)
        claim(not any(r.origin.stream == stream for r in rest), f"what `only` took of {stream} does not come again")


def _check_reopened(make: Callable[[], Source], everything: Sequence[Record], timeout_s: float) -> None:
    source = make()
    try:
        source.seek({})
        again = _drain(source, len(everything), len(everything), timeout_s)
        claim(_by_stream(again) == _by_stream(everything), "another source reads the same, whatever one committed")
    finally:
        source.close()


def _drain(source: Source, count: int, limit: int, timeout_s: float, only: Stream | None = None) -> list[Record]:
    found: list[Record] = []
    idle = 0
    while len(found) < count:
        polled = source.poll(limit, timeout_s, only)
        claim(len(polled) <= limit, f"a poll of {limit} delivers no more than that")
        found += polled
        idle = 0 if polled else idle + 1
        claim(idle < _PATIENCE, f"{count} records come; after {len(found)} there was silence")
    return found


def _by_stream(records: Sequence[Record]) -> dict[Stream, list[Record]]:
    streams = sorted({record.origin.stream for record in records})
    return {stream: [record for record in records if record.origin.stream == stream] for stream in streams}


def check_sink(make: Callable[[], Sink], values: Callable[[], Sequence[bytes | None]]) -> None:
    """What a sink was sent is there after `flush`, in order, and stays when another is opened.

    Args:
        make: Opens a sink on the same place each time.
        values: Reads back the values there, in order. The messages have one key, so they share a partition.
    """
    before = list(values())
    sent = [Message(b'{"n":%d}' % n, key=b"k", time_s=float(n)) for n in range(5)]
    sink = make()
    sink.flush()
    claim(list(values()) == before, "an empty flush writes nothing")
    sink.send(sent[:1])
    sink.send(sent[1:4])
    sink.send([])
    sink.flush()
    claim(list(values()) == before + [m.value for m in sent[:4]], "everything sent is there after a flush, in order")
    sink.flush()
    claim(len(values()) == len(before) + 4, "a second flush writes nothing again")
    sink.close()
    other = make()
    other.send(sent[4:])
    other.flush()
    other.close()
    claim(list(values()) == before + [m.value for m in sent], "a sink that is opened again goes on behind the rest")


def check_control_log(
    make: Callable[[], ControlLog], published: Mapping[str, Callable[[], Sequence[bytes | None]]] = MappingProxyType({})
) -> None:
    """A control log gives back what was appended, from any offset, and lets the newest writer alone append.

    Args:
        make: Makes an unopened log on the same, empty place each time.
        published: By URL that outputs may go to, what reads back the values there, in order; none for a log that
            carries no outputs. The messages have no key, so they share a partition.
    """
    stream, other = Stream("events", 0), Stream("labels", 1)
    orders = [Order((Run(stream, n + 1), Run(other, 1)), {stream: n, other: 7 * n}) for n in range(4)]
    first = make()
    first.open()
    claim(list(first.read(0)) == [], "an empty log reads as nothing")
    outputs = [{url: [Message(b"%d%d" % (n, i)) for i in range(n)] for url in published} for n in range(4)]
    ends = [first.append(order, those) for order, those in zip(orders[:3], outputs, strict=False)]
    claim(all(a < b for a, b in pairwise(ends)), "the offsets that `append` returns ascend")
    claim([order for _, order in first.read(0)] == orders[:3], "orders read back as they were appended")
    for start, rest in zip([0, *ends], [orders[:3], orders[1:3], orders[2:3], []], strict=True):
        claim([order for _, order in first.read(start)] == rest, "a returned offset leads to what is behind it")
    for (after, _), rest in zip(first.read(0), [orders[1:3], orders[2:3], []], strict=True):
        claim([order for _, order in first.read(after)] == rest, "the offset beside an order leads behind it")
    _check_published(published, outputs[:3], "outputs are there once their order is, at every URL and in order")
    _check_fence(first, make(), orders, ends, outputs[3])
    _check_published(published, outputs, "a fenced order leaves no outputs, its successor's are there once")


def _check_published(
    published: Mapping[str, Callable[[], Sequence[bytes | None]]], outputs: Sequence[Outputs], promise: str
) -> None:
    for url, values in published.items():
        claim(list(values()) == [m.value for those in outputs for m in those[url]], promise)


def _check_fence(
    first: ControlLog, second: ControlLog, orders: Sequence[Order], ends: Sequence[int], outputs: Outputs
) -> None:
    second.open()
    for _ in range(2):
        try:
            first.append(orders[3], outputs)
        except Fenced:
            continue
        claim(False, "a successor's `open` fences: `append` raises Fenced, and goes on doing so")
    first.close()
    claim([order for _, order in second.read(0)] == list(orders[:3]), "a fenced order is not in the log")
    claim(second.append(orders[3], outputs) > ends[-1], "the successor appends behind its predecessor")
    claim([order for _, order in second.read(ends[-1])] == [orders[3]], "old offsets hold across writers")
    second.close()


def learned_hash(origins: Iterable[Origin]) -> int:
    """What `Progress.learned` comes to, summed over all shards modulo 2^128, when each of these was learned once."""
    progress = Progress()
    for origin in origins:
        progress.learn([origin])
    return progress.learned
