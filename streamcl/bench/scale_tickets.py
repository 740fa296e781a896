"""`bench scale --task spill`: ten million tickets that wait on disk: in how much memory, and what a join costs."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from streamcl import garbage
from streamcl.bench.report import Bar, Row, progress
from streamcl.join import Joiner
from streamcl.stations import Join

MEMORY = 20_000
"""Tickets that are held in memory where some are to be on disk."""
BESIDE = 100_000
FULL, QUICK = 10_000_000, 100_000
MEASURED, REPEATS = 16_384, 9
MOST_BYTES, MOST_TIMES = 2e9, 1.5
NOTE = (
    f"spill: events that wait, {MEMORY:,} in memory and the rest in segments; us_per_event: an event that comes and a"
    " label that joins one on disk, best of nine turns of 16,384, taken in turns with a joiner that has all of its"
    f" {BESIDE:,} tickets in memory; resident: of the process, libraries and all"
)


def measure(
    quick: bool, waiting: Callable[[Joiner], Any], resident_mb: Callable[[], float]
) -> tuple[list[Row], list[Bar]]:
    """`waiting` makes a stream of events and labels for a joiner; see `scale.Waiting`."""
    size = QUICK if quick else FULL
    near, far = (_filled(waiting, BESIDE, memory) for memory in (10 * BESIDE, MEMORY))
    garbage.spare()  # as a worker does
    costs = _costs([near, far])
    many, began = far, time.perf_counter()
    if size > BESIDE:
        del near, far
        gc.collect()
        many = _filled(waiting, size, MEMORY)
    filled_s = time.perf_counter() - began
    large = _costs([many])[0] if size > BESIDE else costs[1]
    join, mb = many.joiner, resident_mb()
    figures = {
        "waiting": join.waiting,
        "us_per_event": large,
        "resident_mb": mb,
        "index_mb": join.archive.places.nbytes / 1e6,
        "disk_mb": join.archive.bytes / 1e6,
        "segments": len(join.archive.in_order()),
        "fill_s": filled_s,
    }
    rows = [
        Row(f"spill: {BESIDE:,} in memory", {"waiting": BESIDE, "us_per_event": costs[0]}, table="spill"),
        Row(f"spill: {BESIDE:,} on disk", {"waiting": BESIDE, "us_per_event": costs[1]}, table="spill"),
        Row(f"spill: {size:,} on disk", figures, table="spill"),
    ]
    return rows, [
        Bar("spill: tickets that wait", join.waiting, size),
        Bar("spill: resident bytes", 1e6 * mb, MOST_BYTES, at_least=False),
        Bar("spill: cost of an event, on disk / in memory", costs[1] / costs[0], MOST_TIMES, at_least=False),
    ]


def _filled(waiting: Callable[[Joiner], Any], size: int, memory: int) -> Any:
    config = Join(attribution_window_s=4.0 * size, max_tickets=2 * size, memory_tickets=memory)
    stream = waiting(Joiner(config, Counter()))
    while stream.last < size:
        stream.event()
        if stream.last % 1_000_000 == 0:
            progress(f"spill: {stream.last:,} wait")
    return stream


def _costs(streams: list[Any]) -> list[float]:
    """Microseconds of processor time for an event and a label, of each; in turns, for the machine has moods."""
    best = [float("inf")] * len(streams)
    for stream in streams:
        stream.turn(2 * MEASURED)  # until those that join are on disk
    for _ in range(REPEATS):
        for place, stream in enumerate(streams):
            start = time.process_time()
            stream.turn(MEASURED)
            best[place] = min(best[place], 1e6 * (time.process_time() - start) / MEASURED)
    return best
