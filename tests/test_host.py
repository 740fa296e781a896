"""Several shards in one process: as good as one process each, whatever goes away, and whoever takes over."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import Config
from streamcl.host import FixedShards, Host
from streamcl.lease import Lease
from streamcl.protocols import ConnectorError, Fenced, Membership, StreamclError, Unavailable
from streamcl.records import EVENTS, Origin, Turn
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.telemetry import Telemetry
from streamcl.testing import learned_hash
from streamcl.worker import build
from tests.journey import BROKER, Item, click, fill, repeat, settings, view

SOME = effort(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHARDS = 3
AT_ONCE = (0.0, 0.0)


def sharded(folder: Path | str, **changes: Any) -> Config:
    shard = {"count": SHARDS, "indices": list(range(SHARDS))} | changes.pop("shard", {})
    return settings(Path(folder), shard=shard, telemetry={"port": 0}, **changes)


def traffic(count: int = 30, partitions: int = SHARDS) -> list[Item]:
    """Views over all partitions, every second of them clicked: each is learned once, clicked or expired."""
    items: list[Item] = []
    for id in range(count):
        items.append(view(id, float(id), id % partitions))
        items += [click(id, id + 1.0, id % partitions)] if id % 2 else []
    # What moves the watermarks on, so that the windows of all others close.
    return items + [view(1000 + p, count + 500.0, p) for p in range(partitions)]


def learnable(count: int = 30, partitions: int = SHARDS) -> int:
    """The hash of everything in `traffic` but its last views, whose windows stay open."""
    return learned_hash(Origin(EVENTS, id % partitions, id // partitions) for id in range(count))


class Counted(Telemetry):
    """Remembers what a scrape would find."""

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"streamcl_{name}", labels) or 0.0


def host(config: Config, membership: Membership | None = None) -> Host:
    return Host(config, membership or FixedShards(config), Counted(config), backoff_s=AT_ONCE)


def exhaust(turns: Iterable[Turn]) -> None:
    for _ in turns:
        pass


def digests(found: Host) -> dict[int, str]:
    return {index: digest(seat.last.state_dict()) for index, seat in found.seats.items() if seat.last}


def repeated(config: Config, shards: int = SHARDS) -> dict[int, str]:
    """By shard the digest of a backtest in the logged order."""
    return {index: repeat(config.of_shard(index)).digest for index in range(shards)}


def learned(found: Host) -> int:
    return sum(seat.last.progress.learned for seat in found.seats.values() if seat.last) % (1 << 128)


def test_shards_in_one_process_are_as_good_as_one_process_each(tmp_path: Path) -> None:
    fill(traffic(), SHARDS)
    together = host(sharded(tmp_path / "together"))
    exhaust(together.run())
    apart: dict[int, str] = {}
    for index in range(SHARDS):
        fill(traffic(), SHARDS)
        alone = host(sharded(tmp_path / "apart", shard={"indices": [index]}))
        exhaust(alone.run())
        apart |= digests(alone)
    assert digests(together) == apart
    assert learned(together) == learnable()


@SOME
@given(st.lists(st.integers(1, 40), max_size=8), st.integers(1, 6))
def test_recovered_from_any_outage_equals_never_interrupted(gaps: list[int], poll: int) -> None:
    """`gaps` are the numbers of calls to the broker between two that fail."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = sharded(folder, worker={"max_records": poll, "poll_timeout_s": 0.01})
        broker = fill(traffic(), SHARDS)
        found = host(config)
        found.stood = True  # else the first outage may end it, as it should: see below
        broker.away = failing(gaps)
        exhaust(found.run())
        broker.away = lambda _: False
        assert digests(found) == repeated(config)
        assert learned(found) == learnable()
        assert isinstance(found.telemetry, Counted)
        assert found.telemetry.value("recoveries_total", cause="unavailable") <= len(gaps)


def failing(gaps: list[int]) -> Any:
    calls = iter([answer for gap in gaps for answer in [*[False] * (gap - 1), True]])
    return lambda _: next(calls, False)


def test_one_shard_in_trouble_keeps_no_other_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sharded(tmp_path)
    broker = fill(traffic(), SHARDS)
    found = host(config)
    assert isinstance(found.telemetry, Counted)
    turns = found.run()
    for _ in range(SHARDS):
        next(turns)
    broker.away = lambda place: place == "shop-control-1"
    while not all(found.seats[index].ended for index in (0, 2)):
        next(turns)
    for _ in range(5):
        next(turns)
    assert "shard 1: recovering: memory://journey/shop-control-1" in found.telemetry.why()
    assert found.telemetry.value("ready") == 0
    assert found.telemetry.value("recoveries_total", cause="unavailable") > 3
    assert not found.settled()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and r.name == "streamcl.host"]
    assert len(warnings) == 1  # for the outage, not for each attempt
    broker.away = lambda _: False
    exhaust(turns)
    assert found.telemetry.value("ready") == 1
    assert digests(found) == repeated(config)


def test_a_host_whose_shards_have_never_stood_does_not_wait_for_ever(tmp_path: Path) -> None:
    broker = fill(traffic(), SHARDS)
    broker.away = lambda place: place == "shop-control-0"
    with pytest.raises(Unavailable, match="shop-control-0"):
        exhaust(host(sharded(tmp_path)).run())


def test_stopping_saves_every_shard_cleanly(tmp_path: Path) -> None:
    config = sharded(tmp_path)
    broker = fill(traffic(), SHARDS)
    broker.finished = False
    found = host(config)
    turns = found.run()
    next(turns)  # the others haven't begun
    found.stop()
    exhaust(turns)
    saved = {index: store_of(config.of_shard(index)).newest() for index in range(SHARDS)}
    assert saved[0] is not None
    assert saved[0].manifest["clean"]
    assert [saved[1], saved[2]] == [None, None]


@pytest.mark.parametrize("error", [Fenced("taken"), ConnectorError("no right to write")])
def test_an_error_that_needs_a_person_ends_all_shards_the_others_cleanly(tmp_path: Path, error: StreamclError) -> None:
    config = sharded(tmp_path)
    broker = fill(traffic(), SHARDS)
    found = host(config)
    turns = found.run()
    for _ in range(SHARDS):
        next(turns)

    def refuse(place: str) -> bool:
        if place == "shop-control-1":
            raise error
        return False

    broker.away = refuse
    with pytest.raises(type(error)) as raised:
        exhaust(turns)
    assert raised.value is error
    for index, clean in enumerate([True, False, True]):
        newest = store_of(config.of_shard(index)).newest()
        assert newest is not None
        assert newest.manifest["clean"] is clean


def test_an_idle_shard_keeps_the_busy_one_waiting_no_longer_than_it_must(tmp_path: Path) -> None:
    config = sharded(tmp_path, worker={"max_records": 1, "poll_timeout_s": 30.0})
    broker = fill([view(id, float(id), 0) for id in range(8)], SHARDS)
    broker.finished = False
    found = host(config)
    turns = found.run()
    for _ in range(3 * SHARDS):
        next(turns)
    waits = {index: seat.life.worker.poll_timeout_s for index, seat in found.seats.items() if seat.life}
    assert waits == {0: 30.0, 1: 0.0, 2: 0.0}  # a backlog waits for its late streams as if it were alone
    broker.finish()
    exhaust(turns)


def test_an_idle_worker_notices_that_another_one_has_claimed_its_shard(tmp_path: Path) -> None:
    config = settings(tmp_path, checkpoint={"folder": str(tmp_path), "lease_s": 0.3}, telemetry={"port": 0})
    broker = fill([view(0, 0.0)])
    broker.finished = False
    turns = host(config).run()
    while next(turns).records == 0:
        pass
    Lease(str(store_of(config).folder), 0.0).claim()
    with pytest.raises(Fenced, match="another worker has taken over this shard: process"):
        exhaust(itertools.islice(turns, 10_000))


def test_while_brokers_do_not_answer_a_host_is_neither_settled_nor_ready(tmp_path: Path) -> None:
    broker = fill([view(0, 0.0)])
    broker.finished = False
    found = host(settings(tmp_path, telemetry={"port": 0}))
    turns = found.run()
    next(turns)
    assert found.settled()
    [seat] = found.seats.values()
    assert seat.life is not None
    seat.life.worker.source.away = True  # type: ignore[attr-defined]  # as a source may have it
    next(turns)
    assert not found.settled()
    assert found.telemetry.why() == "no broker is connected"
    seat.life.worker.source.away = False  # type: ignore[attr-defined]
    next(turns)
    assert found.settled()
    assert found.telemetry.why() == ""
    broker.finish()
    exhaust(turns)


class Handed:
    """A group in a test's hands: who holds what is said by the test; a fenced shard waits to be handed out anew."""

    def __init__(self) -> None:
        self.shards: dict[int, int] = {}
        self.asked = self.rebalances = 0

    def held(self) -> Mapping[int, int]:
        self.asked += 1
        return dict(self.shards)

    def settled(self) -> bool:
        return self.asked > 0

    def fenced(self, shard: int) -> bool:
        self.shards.pop(shard, None)
        return True

    def close(self) -> None:
        self.shards.clear()


Moves = st.lists(st.tuples(st.integers(0, SHARDS - 1), st.integers(0, 1), st.integers(1, 6), st.booleans()), max_size=9)


@SOME
@given(Moves, st.integers(1, 4))
def test_shards_that_move_between_two_workers_learn_every_event_once(
    moves: list[tuple[int, int, int, bool]], poll: int
) -> None:
    """(shard, to whom, turns before the next move, is the former holder told?); who isn't told must be fenced."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = settings(
            Path(folder),
            shard={"count": SHARDS, "assignment": "group"},
            telemetry={"port": 0},
            worker={"max_records": poll, "poll_timeout_s": 0.001},
        )
        broker = fill(traffic(), SHARDS)
        broker.finished = False
        groups = [Handed(), Handed()]
        hosts = [host(config, group) for group in groups]
        turns = [each.run() for each in hosts]
        groups[0].shards = dict.fromkeys(range(SHARDS), 0)
        for tenure, (shard, to, count, told) in enumerate(moves, 1):
            if told:
                groups[1 - to].shards.pop(shard, None)
            groups[to].shards[shard] = tenure
            for _ in range(count):
                next(turns[to])
                next(turns[1 - to])
        groups[1].shards.clear()
        next(turns[1])
        groups[0].shards = dict.fromkeys(range(SHARDS), 99)
        broker.finish()
        exhaust(turns[0])
        hosts[1].stop()
        exhaust(turns[1])
        assert digests(hosts[0]) == repeated(config)
        assert learned(hosts[0]) == learnable()


def test_a_shard_that_left_takes_its_series_with_it(tmp_path: Path) -> None:
    config = settings(tmp_path, shard={"count": SHARDS, "assignment": "group"}, telemetry={"port": 0})
    broker = fill(traffic(), SHARDS)
    broker.finished = False
    group = Handed()
    found = host(config, group)
    assert isinstance(found.telemetry, Counted)
    turns = found.run()
    next(turns)  # nothing is held yet
    assert found.telemetry.why() == ""
    group.shards = {0: 1, 1: 1}
    for _ in range(30):
        next(turns)
    assert series(found.telemetry) == {"0", "1"}
    group.shards = {1: 1}
    next(turns)
    next(turns)
    assert series(found.telemetry) == {"1"}
    found.stop()
    exhaust(turns)


def series(telemetry: Telemetry) -> set[str]:
    """The shards and partitions that a scrape names."""
    names = ("shard", "partition")
    return {s.labels[n] for f in telemetry.registry.collect() for s in f.samples for n in names if n in s.labels}


def test_a_fenced_shard_of_a_group_is_dropped_and_the_others_go_on(tmp_path: Path) -> None:
    config = settings(tmp_path, shard={"count": SHARDS, "assignment": "group"}, telemetry={"port": 0})
    broker = fill(traffic(), SHARDS)
    group = Handed()
    group.shards = dict.fromkeys(range(SHARDS), 0)
    found = host(config, group)
    assert isinstance(found.telemetry, Counted)
    turns = found.run()
    for _ in range(SHARDS):
        next(turns)
    rival = build(config.of_shard(1))
    Keeper(rival, store_of(config.of_shard(1))).restore()
    exhaust(turns)
    assert found.seats.keys() == {0, 2}
    assert found.telemetry.value("recoveries_total", cause="fenced") == 1
    assert broker.finished


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    memory.reset(BROKER)
