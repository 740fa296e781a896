"""Groups of workers on memory://, a thread for each rank, that live once and may die on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from connectors import memory
from streamcl import connect
from streamcl.config import Config
from streamcl.group.ranks import Ranks
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.testing.ranks import Table
from streamcl.worker import build
from tests.journey import BROKER, settings

RANKS = 2


class Died(BaseException):
    """A kill -9: nobody catches it, nothing is closed."""


def group(folder: Path, ranks: int = RANKS, **changes: Any) -> Config:
    """A worker that is one of several; labels inline, so that rounds are of a known number of records."""
    tables: dict[str, Any] = {
        "events": {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "click"},
        "labels": None,
        "group": {"round_events": 5},
        "shard": {"count": ranks},
        "commands": None,
    }
    return settings(folder, **{**tables, **changes})


def produce(counts: Sequence[int], finished: bool = True, start: int = 0) -> memory.MemoryBroker:
    """So many labelled views on each partition, a second apart."""
    if not start:
        memory.reset(BROKER)
        for topic in ("views", "orders"):
            memory.broker(BROKER).create(topic, len(counts))
        memory.broker(BROKER).create("scores")
    broker = memory.broker(BROKER)
    for partition, count in enumerate(counts):
        for n in range(start, start + count):
            payload = {"id": f"{partition}-{n}", "ts": float(n), "user": n % 5, "price": n % 3, "click": n % 7 % 2}
            broker.produce("views", json.dumps(payload).encode(), partition=partition, time_s=float(n))
    if finished:
        broker.finish()
    return broker


Prepare = Callable[[int, Keeper], None]
"""Of a rank, before it is restored."""


def live(config: Config, prepare: Prepare | None = None) -> list[Keeper | BaseException]:
    """Start every rank where the group stands, and run all to the end: what each came to, or what ended it."""
    seats = Table(config.shard.count).seats()

    def one(rank: int, seat: Ranks) -> Keeper:
        keeper = None
        try:
            mine = config.of_shard(rank)
            keeper = Keeper(build(mine, seat), store_of(mine), beside=False, lease_s=0.0)
            if prepare:
                prepare(rank, keeper)
            keeper.restore()
            for _ in keeper.run():
                pass
            return keeper
        except BaseException:
            seat.close()
            raise

    with ThreadPoolExecutor(len(seats)) as pool:
        lives = [pool.submit(one, rank, seat) for rank, seat in enumerate(seats)]
        return [life.exception() or life.result() for life in lives]


def ended(config: Config, prepare: Prepare | None = None) -> list[Keeper]:
    """As `live`, of a group in which nobody dies."""
    found = live(config, prepare)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return [each for each in found if isinstance(each, Keeper)]


def digests(keepers: Sequence[Keeper]) -> list[str]:
    return [digest(keeper.worker.state_dict()) for keeper in keepers]


def closed(config: Config, rank: int) -> list[tuple[int, int, bool]]:
    """Of a rank's control log: each round's number, its records by then, and whether no more could come."""
    orders = connect.open_control(config.of_shard(rank)).read(0)
    return [(o.closes.round, sum(o.position.values()), o.closes.ended) for _, o in orders if o.closes]


def watched(rank: int, keeper: Keeper, told: Callable[[int, str, str], None]) -> None:
    """Have `told(rank, "before" or "behind", call)` called around whatever crosses a rank's boundary."""
    worker, rounds = keeper.worker, keeper.worker.rounds
    owners: dict[str, Any] = {"control": worker.control, "source": worker.source, "store": keeper.store}
    owners |= {
        "predictions": worker.outlets.predictions,
        "ranks": rounds and rounds.ranks,
        "merge": rounds and rounds.merge,
    }
    for call in CALLS:
        owner, name = call.split(".")
        if owners[owner] is not None:  # exactly once, predictions go with the order
            setattr(owners[owner], name, _around(getattr(owners[owner], name), partial(told, rank), call))


def _around(does: Callable[..., Any], told: Callable[[str, str], None], call: str) -> Callable[..., Any]:
    def around(*args: Any, **kwargs: Any) -> Any:
        told("before", call)
        found = does(*args, **kwargs)
        told("behind", call)
        return found

    return around


CALLS = (
    *("control.open", "control.append", "source.poll", "predictions.send", "predictions.flush"),
    *("store.save", "ranks.gather", "merge.meet"),
)
