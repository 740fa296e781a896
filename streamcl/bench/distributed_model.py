"""`bench distributed --simulate`: what a group of up to a thousand workers would come to, reckoned from what one does.

A rank's round of R events takes

    R t  +  a B  +  (N - 1) (alpha + B / beta)  +  b N B

t seconds for an event; B bytes that a rank says, which takes `a` seconds a byte to gather up; all-gather round a ring
of N ranks, alpha seconds a message and beta bytes a second (the alpha-beta model: Hockney 1994); and `b` seconds a byte
to merge what N ranks have said. B is D bytes of dense weights with their slots, and r for each row that the round has
touched, of which there are

    U(n, M) = sum over i = 1..M of 1 - (1 - p_i)^n,   p_i = 1 / (i H_M)

for n readings of a table of M rows, whose popularity is Zipf's. All of that is measured here on one machine, the link
too (Gloo over its loopback): a network's alpha and beta are worse. What is left out: stragglers (a round lasts as long
as the slowest rank's), and several ranks on one machine's memory bandwidth.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from streamcl.bench.distributed_group import Member
from streamcl.bench.options import Options
from streamcl.bench.quality import Floats
from streamcl.bench.report import Report, Row, Value, progress
from streamcl.bench.streams import LABEL, TIME, synthetic
from streamcl.config import Config
from streamcl.group.weights import Weights
from streamcl.protocols import StreamclError
from streamcl.stations import GroupConfig

WORLDS = (1, 2, 4, 10, 100, 1000)
TABLES = (10**3, 10**6, 10**9)
LENGTHS = (100, 1000, 10_000)
EVENTS, QUICK_EVENTS = 12_000, 4_000
GIB, MIB = 1 << 30, 1 << 20
HEAVY_S = 1e-3
"""A step that is worth a group."""
_HEAD = 1000  # rows whose share is added up one by one
SETTINGS: dict[str, Any] = {"model": {"kind": "deepfm", "embedding_dim": 16, "hidden": [128, 64]}}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank does, and the link between two.

    Args:
        event_s: Seconds of a rank for one event, decoding and past included.
        say_s, hear_s: Seconds for a byte that is said, and for one that is merged.
        dense_bytes: Of dense weights and their slots, D.
        row_bytes: Said of one touched row, r.
        held_bytes: That a rank's memory holds of one row: twice, with its slots.
        reads: Rows that an event reads (count).
        alpha_s: Of a message.
        beta: Bytes a second between two ranks.
    """

    event_s: float
    say_s: float
    hear_s: float
    dense_bytes: float
    row_bytes: float
    held_bytes: float
    reads: float
    alpha_s: float
    beta: float

    def to_values(self) -> dict[str, Value]:
        return {
            "event_us": 1e6 * self.event_s,
            "say_ns_per_byte": 1e9 * self.say_s,
            "hear_ns_per_byte": 1e9 * self.hear_s,
            "dense_bytes": self.dense_bytes,
            "row_bytes": self.row_bytes,
            "reads": self.reads,
            "alpha_us": 1e6 * self.alpha_s,
            "mib_per_s": self.beta / MIB,
        }


@dataclass(frozen=True, slots=True)
class Predicted:
    """Of a group. `freshness_s`: from an event to the weights of all ranks, on average; of a group that keeps up."""

    events_per_s: float
    speed_up: float
    freshness_s: float
    bytes_per_event: float
    sent_bytes_per_s: float
    memory_gib: float
    ring_events_per_s: float

    def to_values(self) -> dict[str, Value]:
        return {name: getattr(self, name) for name in self.__slots__}


def touched(reads: float, rows: int) -> float:
    """U(n, M): different rows among n readings of M by Zipf's law; by Gauss-Legendre on a logarithmic scale."""
    harmonic = math.log(rows) + 0.5772156649 + 0.5 / rows
    head = np.arange(1.0, min(rows, _HEAD) + 1)
    total = float(_met(reads, head * harmonic).sum())
    if rows > _HEAD:
        nodes, weights = np.polynomial.legendre.leggauss(4)
        edges = np.log(np.geomspace(_HEAD + 0.5, rows + 0.5, 200))[:, None]
        low, high = edges[:-1], edges[1:]
        at = np.exp((high + low) / 2 + (high - low) / 2 * nodes)
        total += float((weights * (high - low) / 2 * at * _met(reads, at * harmonic)).sum())
    return min(total, reads, float(rows))


def _met(reads: float, rarity: Floats) -> Floats:
    """Chance that a row, which one reading in `rarity` is of, is among so many readings."""
    return np.asarray(-np.expm1(reads * np.log1p(-1.0 / rarity)))


def predict(measured: Measured, world: int, rows: int, round_events: int, rate: float | None = None) -> Predicted:
    """A group of so many ranks over a table of so many rows.

    Args:
        rate: Events a second that the stream brings; None: as many as the group can take.
    """
    m = measured
    said = m.dense_bytes + m.row_bytes * touched(round_events * m.reads, rows)
    alone = world == 1
    others = world - 1
    local = round_events * m.event_s
    meeting = 0.0 if alone else m.say_s * said + others * (m.alpha_s + said / m.beta) + m.hear_s * world * said
    # A ring all-reduce of the dense part instead: what is not built. Rows go round as they do.
    sparse = said - m.dense_bytes
    reduced = 2 * others * (m.alpha_s + m.dense_bytes / world / m.beta) + others * (m.alpha_s + sparse / m.beta)
    ring = 0.0 if alone else m.say_s * said + reduced + m.hear_s * (world * sparse + 2 * m.dense_bytes)
    most = world * round_events / (local + meeting)
    taken = most if rate is None else min(most, rate)
    return Predicted(
        events_per_s=taken,
        speed_up=most * m.event_s,
        freshness_s=m.event_s if alone else round_events / (taken / world) / 2 + meeting,
        bytes_per_event=0.0 if alone else said / round_events,
        sent_bytes_per_s=others * said / round_events * taken / world,
        memory_gib=rows * m.held_bytes / (2 if alone else 1) / GIB,
        ring_events_per_s=world * round_events / (local + ring),
    )


def run(options: Options) -> Report:
    """Measure one rank and a link, then reckon."""
    began = time.perf_counter()
    measured = measure(options.count("events", QUICK_EVENTS if options.quick else EVENTS))
    rows = [Row("measured", measured.to_values(), table="measured")]
    default = GroupConfig().learned or 0
    plans = [(length, measured) for length in sorted({*LENGTHS, default})]
    plans.append((default, replace(measured, event_s=HEAVY_S)))
    for length, each in plans:
        named = f"rounds of {length}, {1e6 * each.event_s:.0f} us an event"
        for table in TABLES:
            for world in WORLDS:
                values = predict(each, world, table, length).to_values()
                name = f"{world} ranks, 10^{round(math.log10(table))} rows"
                rows.append(Row(f"{named}: {name}", values, table=named))
    return Report(
        bench="distributed",
        config={"simulate": True, **SETTINGS},
        seeds=[0],
        seconds=time.perf_counter() - began,
        rows=rows,
        notes=[
            "reckoned, not measured, but for the first table: see `streamcl.bench.distributed_model` for the formula",
            "ring_events_per_s: if dense weights went round by a ring all-reduce, which is not built; memory_gib: of"
            " one rank, table and slots as they are and as they stood when the ranks last met",
        ],
    )


def measure(events: int) -> Measured:
    """One rank's step and merge on a synthetic stream, and the link between two processes of this machine."""
    data = synthetic("stationary", events, 0)
    shape = {"name": "b", "events": {"url": "memory://b/e", "time": TIME, "label": LABEL, "key": "f0"}}
    config = Config.parse({**shape, "features": data.features, **SETTINGS}, "bench")
    members = [Member(config, rank, 2) for rank in range(2)]
    parts = [[payload] for payload in data.payloads]
    members[0].take(parts[:500])  # compiled code is loaded
    progress(f"one rank's step: {events} events")
    began = time.process_time()
    members[0].take(parts[500:])
    event_s = (time.process_time() - began) / (len(parts) - 500)
    members[1].take(parts[: len(parts) // 2])
    ids = _rows(members[0])
    turns, took = 20, [0.0, 0.0]
    for _ in range(turns):
        began = time.process_time()
        said = [members[0].merge.say(1), members[1].merge.say(1)]
        took[0] += time.process_time() - began
        began = time.process_time()
        members[0].merge.hear(said)
        took[1] += time.process_time() - began
        members[1].merge.hear(said)
        for member in members:
            if member.learner.engine.watch is not None:
                member.learner.engine.watch(ids)
    told = len(said[0])
    engine = members[0].learner.engine
    dense = 4 * len(engine.dense.flat) * (1 + len(engine.dense.slots))
    row = 4 * sum(column[:1].numel() for column in (engine.table, *engine.row_slots))
    alpha_s, beta = link()
    return Measured(
        event_s=event_s,
        say_s=took[0] / turns / (2 * told),
        hear_s=took[1] / turns / (2 * told),
        dense_bytes=float(dense),
        row_bytes=row + 16.0,
        held_bytes=2.0 * row,
        reads=float(engine.fields),
        alpha_s=alpha_s,
        beta=beta,
    )


def _rows(member: Member) -> torch.Tensor:
    """All that it has touched."""
    weights = member.merge.parts["weights"]
    assert isinstance(weights, Weights)  # noqa: S101 - of a group of two
    return torch.from_numpy(weights.touches.counts()[0].copy())


SIZES = (1 << 10, 1 << 23)
TURNS = 30
_PROGRAM = """
import sys, time
import torch
from streamcl.group.ranks import Ranks
from streamcl.stations import GroupConfig
ranks, found = Ranks.of_environment(GroupConfig(timeout_s=60.0)), []
for size in map(int, sys.argv[1].split(",")):
    data = torch.zeros(size, dtype=torch.uint8)
    ranks.all_gather(data)
    began = time.perf_counter()
    for _ in range(int(sys.argv[2])):
        ranks.all_gather(data)
    found.append((time.perf_counter() - began) / int(sys.argv[2]))
if ranks.rank == 0:
    print(",".join(map(str, found)))
ranks.close()
"""


def link() -> tuple[float, float]:
    """(alpha, beta) of an all-gather between two processes of this machine, from a small and a large one.

    Raises:
        StreamclError: they could not talk.
    """
    progress("the link between two ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, ",".join(map(str, SIZES)), str(TURNS)]
    ranks = [
        subprocess.Popen(  # noqa: S603 - our own interpreter
            command, env={**os.environ, **said, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    told = [each.communicate(timeout=120)[0] for each in ranks]
    if any(each.returncode for each in ranks):
        raise StreamclError("bench distributed: two processes of this machine could not join a Gloo group")
    small, large = (float(each) for each in told[0].strip().split(","))
    beta = (SIZES[1] - SIZES[0]) / max(large - small, 1e-9)
    return max(small - SIZES[0] / beta, 0.0), beta
