"""N shards become M: nothing lost, nothing learned twice, and no worker goes on from what has been resharded."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import Config, ConfigError
from streamcl.host import FixedShards, Host
from streamcl.protocols import Fenced, StreamclError
from streamcl.records import EVENTS, Origin, Stream, mark
from streamcl.recovery import Keeper, store_of
from streamcl.reshard import Plan, ReshardError, carry_out, plan
from streamcl.state import digest
from streamcl.telemetry import Telemetry
from streamcl.testing import equal_states, learned_hash
from streamcl.worker import Worker, build
from tests.journey import BROKER, COMMANDS_URL, Item, click, fill, order, settings, view

PARTITIONS, EVENTS_COUNT = 4, 40
SOME = effort(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def config_of(folder: Path | str, count: int, **changes: Any) -> Config:
    """All `count` shards in one process; a turn of it takes three records."""
    shard = {"count": count, "indices": list(range(count))}
    worker = {"max_records": 3, "poll_timeout_s": 0.01}
    return settings(Path(folder), shard=shard, telemetry={"port": 0}, **({"worker": worker} | changes))


def traffic() -> list[Item]:
    """Views over all partitions; some clicked in time, some late, some before they were seen, most never."""
    items: list[Item] = []
    for id in range(EVENTS_COUNT):
        shown, partition = view(id, float(id), id % PARTITIONS), id % PARTITIONS
        clicked = {0: [], 1: [click(id, id + 2.0, partition)], 2: [click(id, id + 30.0, partition)]}.get(id % 5, [])
        items += [click(id, id + 0.5, partition), shown] if id % 5 == 3 else [shown, *clicked]
    # What moves the watermarks on, so that the windows of all others close.
    return items + [view(1000 + p, EVENTS_COUNT + 500.0, p) for p in range(PARTITIONS)]


def everything() -> int:
    return learned_hash(Origin(EVENTS, id % PARTITIONS, id // PARTITIONS) for id in range(EVENTS_COUNT))


def run(config: Config, turns: int | None = None) -> dict[int, Worker]:
    """Run all shards to the end, or for some turns and until a stop is a clean one; returns the workers by shard."""
    host = Host(config, FixedShards(config), Telemetry(config))
    for number, _ in enumerate(host.run(), 1):
        caught_up = [seat.life is not None and seat.life.worker.caught_up for seat in host.seats.values()]
        if turns is not None and number >= turns and all(caught_up):
            host.stop()
    return {index: seat.last for index, seat in host.seats.items() if seat.last}


def kill(config: Config, turns: int) -> None:
    """Drop a host in the middle: nothing is flushed or saved."""
    host = Host(config, FixedShards(config), Telemetry(config))
    for _ in zip(range(turns), host.run(), strict=False):
        pass


def reshard(config: Config, old: int, new: int) -> Plan:
    planned = plan(config, old, new)
    carry_out(planned)
    return planned


def sums(workers: dict[int, Worker]) -> tuple[int, int, Counter[str]]:
    learned = sum(worker.progress.learned for worker in workers.values()) % (1 << 128)
    counts = sum((Counter(worker.counts) for worker in workers.values()), Counter[str]())
    return learned, sum(worker.progress.records for worker in workers.values()), counts


@SOME
@given(st.lists(st.tuples(st.integers(1, PARTITIONS), st.integers(0, 25), st.integers(0, 9)), min_size=1, max_size=4),
    st.sampled_from([2, 1000]))  # fmt: skip
def test_every_event_is_learned_once_over_kills_and_reshards(stages: list[tuple[int, int, int]], memory: int) -> None:
    """(shards, turns until a clean stop, turns until a kill before that) of each stage; each begins by a reshard.

    Tickets wait in memory, or but for two of each shard on disk.
    """
    join = {"attribution_window_s": 10.0, "orphan_s": 5.0, "memory_tickets": memory}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        items = traffic()
        broker = fill(items, PARTITIONS)
        broker.finished = False
        before = None
        for count, turns, until_killed in stages:
            config = config_of(folder, count, join=join)
            if before:
                reshard(config, before, count)
            kill(config, until_killed)
            run(config, turns)
            before = count
        broker.finish()
        learned, records, counts = sums(run(config_of(folder, count, join=join)))
        assert learned == everything()
        assert records == len(items)
        assert counts["predicted"] == EVENTS_COUNT + PARTITIONS
        assert counts["learned"] == EVENTS_COUNT
        assert counts["joined"] + counts["expired"] == EVENTS_COUNT


@SOME
@given(st.integers(1, PARTITIONS), st.integers(1, PARTITIONS), st.integers(0, 30))
def test_what_belongs_to_a_partition_follows_it_and_the_sums_stay(old: int, new: int, turns: int) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fill(traffic(), PARTITIONS).finished = False
        before = run(config_of(folder, old), turns)
        planned = reshard(config_of(folder, new), old, new)
        after = {index: opened(config_of(folder, new).of_shard(index)) for index in range(new)}
        assert sums(after) == sums(before)
        assert all(p % new == i for i, worker in after.items() for _, p in worker.progress.position)
        for part in ("tickets", "orphans", "closed"):
            assert gathered(after, part) == gathered(before, part)
        alarms = [sorted(alarm for w in workers.values() for alarm in w.joiner.alarms) for workers in (before, after)]
        assert alarms[0] == alarms[1]
        positions = [{s: o for w in ws.values() for s, o in w.progress.position.items()} for ws in (before, after)]
        assert positions[0] == positions[1]
        assert planned.describe()["learned_hash"] == f"{sums(before)[0]:032x}"


def opened(config: Config) -> Worker:
    worker = build(config)
    Keeper(worker, store_of(config)).restore()
    return worker


def gathered(workers: dict[int, Worker], part: str) -> dict[str, Any]:
    """What the joiners hold, and every ticket where its partition is."""
    held: dict[str, Any] = {}
    for index, worker in workers.items():
        mine = getattr(worker.joiner, part)
        assert part == "closed" or all(
            item.origin.partition % worker.config.shard.count == index for item in mine.values()
        )
        held |= {id: getattr(item, "origin", item) for id, item in mine.items()}
    return held


def test_as_many_shards_as_before_are_the_same_to_the_bit(tmp_path: Path) -> None:
    fill(traffic(), PARTITIONS).finished = False
    before = run(config_of(tmp_path, 2), 9)
    reshard(config_of(tmp_path, 2), 2, 2)
    for index, worker in before.items():
        again = opened(config_of(tmp_path, 2).of_shard(index))
        assert digest(again.state_dict()) == digest(worker.state_dict())


def test_the_model_comes_from_the_shard_that_held_most(tmp_path: Path) -> None:
    broker = fill(traffic(), PARTITIONS)
    broker.finished = False
    before = run(config_of(tmp_path, 3), 20)  # shard 0 holds the partitions 0 and 3, 1 and 2 one each
    assert [new.model_of for new in plan(config_of(tmp_path, 1), 3, 1).news] == [0]
    assert [new.model_of for new in plan(config_of(tmp_path, 4), 3, 4).news] == [0, 1, 2, 0]
    reshard(config_of(tmp_path, 2), 3, 2)
    after = opened(config_of(tmp_path, 2).of_shard(1))  # of 1 and 3: a tie of the shards 1 and 0
    assert equal_states(after.learner.state_dict(), before[0].learner.state_dict())


def test_a_grown_topic_is_refused_until_resharded_and_then_read_from_its_start(tmp_path: Path) -> None:
    items = traffic()
    broker = fill(items, PARTITIONS)
    broker.finished = False
    run(config_of(tmp_path, 2), 10)
    for topic in ("views", "clicks"):
        broker.grow(topic, PARTITIONS + 2)
    more = [view(2000 + n, EVENTS_COUNT + 500.0, PARTITIONS + n % 2) for n in range(6)]
    more += [view(3000 + n, EVENTS_COUNT + 1000.0, PARTITIONS + n) for n in range(2)]
    for item in more:
        broker.produce(item.topic, item.value, partition=item.partition, time_s=item.time_s)
    broker.finish()
    with pytest.raises(StreamclError, match=r"events partition 4.*streamcl reshard"):
        run(config_of(tmp_path, 2))
    planned = reshard(config_of(tmp_path, 2), 2, 2)
    fresh = {stream: offset for new in planned.news for stream, offset in new.fresh.items()}
    assert fresh == {Stream(name, p): 0 for name in ("events", "labels") for p in (4, 5)}
    _, records, counts = sums(run(config_of(tmp_path, 2)))
    assert records == len(items) + len(more)
    assert counts["predicted"] == EVENTS_COUNT + PARTITIONS + len(more)


def stand(folder: Path) -> dict[str, Any]:
    """Every file, and every topic's length."""
    found: dict[str, Any] = {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}
    broker = memory.broker(BROKER)
    return found | {topic: len(broker.messages(topic)) for topic in broker.topics()}


def refused(config: Config, old: int, new: int, match: str, error: type[StreamclError] = ReshardError) -> None:
    before = stand(config.checkpoint.folder)
    with pytest.raises(error, match=match):
        reshard(config, old, new)
    assert stand(config.checkpoint.folder) == before


def test_shards_that_are_not_at_rest_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    fill(traffic(), PARTITIONS).finished = False
    config = config_of(tmp_path, 2)
    run(config, 5)
    refused(config, 3, 4, "no snapshot of shard 0 of 3; is --from right")
    refused(config, 2, PARTITIONS + 1, "has no partition", StreamclError)
    refused(config_of(tmp_path, 2, model={"kind": "logistic"}), 2, 1, "model.kind", ConfigError)
    kill(config, 4)  # it has logged orders since
    refused(config, 2, 3, "goes on behind the newest snapshot of shard 0 of 2")
    fill(traffic(), PARTITIONS).finished = False
    kill(config_of(tmp_path / "other", 2), 3)
    refused(config_of(tmp_path / "other", 2), 2, 3, "is not that of a clean stop")


def test_a_worker_that_still_runs_is_fenced(tmp_path: Path) -> None:
    fill(traffic(), PARTITIONS).finished = False
    config = config_of(tmp_path, 2)
    run(config, 5)
    asleep = opened(config.of_shard(1))
    reshard(config, 2, 3)
    with pytest.raises(Fenced):
        for _ in asleep.run():
            pass


def test_old_shards_do_not_start_any_more_and_new_ones_not_without_reshard(tmp_path: Path) -> None:
    fill(traffic(), PARTITIONS).finished = False
    run(config_of(tmp_path, 2), 5)
    with pytest.raises(ConfigError, match="reshard --from 2 --to 3"):
        run(config_of(tmp_path, 3), 1)
    reshard(config_of(tmp_path, 3), 2, 3)
    with pytest.raises(ConfigError, match=r"set shard\.count = 3"):
        run(config_of(tmp_path, 2), 1)
    run(config_of(tmp_path, 3), 1)
    refused(config_of(tmp_path, 3), 2, 3, "which a worker wrote: that shard runs already")


def test_snapshots_in_an_object_store_are_resharded_from_and_on_another_machine(tmp_path: Path) -> None:
    broker = fill(traffic(), PARTITIONS)
    broker.finished = False
    remote = (tmp_path / "bucket").as_uri()

    def on(machine: str, count: int) -> Config:
        place = {"folder": str(tmp_path / machine), "every_events": 7, "remote": remote}
        return config_of(tmp_path, count, checkpoint=place)

    run(on("first", 2), 9)
    with pytest.raises(ConfigError, match="reshard --from 2 --to 3"):
        run(on("second", 3))
    reshard(on("second", 3), 2, 3)
    broker.finish()
    assert sums(run(on("third", 3)))[0] == everything()


def test_a_reshard_that_died_halfway_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = fill(traffic(), PARTITIONS)
    broker.finished = False
    run(config_of(tmp_path, 2), 7)
    before = plan(config_of(tmp_path, 3), 2, 3)
    for new in before.news[:2]:  # what a first attempt has come to
        carry_out(Plan(before.olds, [new]))
    assert plan(config_of(tmp_path, 3), 2, 3).describe() == before.describe()
    reshard(config_of(tmp_path, 3), 2, 3)
    broker.finish()
    assert sums(run(config_of(tmp_path, 3)))[0] == everything()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    memory.reset(BROKER)


def test_a_command_that_waits_is_obeyed_before_shards_are_made_anew(tmp_path: Path) -> None:
    """It went to the partitions of the old shards alone, and some of what it means goes to others now."""
    fill(traffic(), PARTITIONS)
    config = config_of(tmp_path, 2, commands=COMMANDS_URL)
    run(config)
    for shard in range(2):
        memory.broker(BROKER).produce("orders", order("r-1", 900.0, key="1").value, partition=shard, time_s=900.0)
    with pytest.raises(ReshardError, match="a command waits"):
        plan(config, 2, 4)
    run(config)
    carry_out(plan(config, 2, 4))
    for worker in run(config_of(tmp_path, 4, commands=COMMANDS_URL)).values():
        joiner = worker.joiner
        assert not [ticket for ticket in joiner.tickets.values() if ticket.key == "1"]
        assert not [id for id, closed in joiner.closed.items() if closed.owner == mark("1")]
