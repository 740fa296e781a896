"""What a group of ranks comes to: the same at every run, and after every death."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import Config, ConfigError
from streamcl.group.manifest import meeting_of
from streamcl.group.ranks import RankLost, Ranks
from streamcl.host import FixedShards, Host
from streamcl.protocols import StreamclError, Unavailable
from streamcl.readings import PARTS
from streamcl.records import Origin, Stream
from streamcl.recovery import Keeper, store_of
from streamcl.snapshot import CheckpointError
from streamcl.standing import standing
from streamcl.telemetry import Telemetry
from streamcl.testing import learned_hash
from streamcl.testing.ranks import Table
from streamcl.worker import build
from tests.group.lives import Died, closed, digests, ended, group, live, produce, watched
from tests.journey import BROKER, COMMANDS_URL

EVERYWHERE = bool(os.environ.get("STREAMCL_EVERYWHERE"))
"""Every point at which a rank can die, not each fourth: some minutes."""


def test_rounds_close_behind_their_count_and_short_at_the_end(tmp_path: Path) -> None:
    produce([12, 7])
    keepers = ended(group(tmp_path))
    config = keepers[0].worker.config
    assert closed(config, 0) == [(1, 5, False), (2, 10, False), (3, 12, True)]
    assert closed(config, 1) == [(1, 5, False), (2, 7, True), (3, 7, True)]


def test_ranks_meet_with_the_same_dense_weights(tmp_path: Path) -> None:
    produce([12, 7])
    weights = [[*k.worker.learner.engine.model.parameters()] for k in ended(group(tmp_path))]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@given(
    counts=st.lists(st.integers(0, 23), min_size=2, max_size=3),
    polls=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    measure=st.sampled_from([{"round_events": 4}, {"round_s": 3.5}, {"round_events": 50, "most_records": 3}]),
    mode=st.sampled_from(["at_least_once", "exactly_once"]),
)
@hypothesis_settings(max_examples=15, deadline=None)
def test_a_group_is_a_function_of_its_streams_however_they_are_polled(
    counts: list[int], polls: tuple[int, int], measure: dict[str, float], mode: str
) -> None:
    found = []
    for most in polls:
        with tempfile.TemporaryDirectory() as folder:
            produce(counts)
            worker = {"max_records": most, "poll_timeout_s": 0.01}
            changes = {"group": measure, "delivery": {"mode": mode}, "worker": worker}
            found.append(digests(ended(group(Path(folder), len(counts), **changes))))
    assert found[0] == found[1]


def test_a_partition_without_records_holds_nobody_up(tmp_path: Path) -> None:
    produce([12, 0])
    keepers = ended(group(tmp_path))
    assert [keeper.worker.progress.records for keeper in keepers] == [12, 0]
    assert [number for number, _, _ in closed(keepers[0].worker.config, 1)] == [1, 2, 3]


def deaths(folder: Path, mode: str) -> list[tuple[int, str, str, int]]:
    """(rank, when, call, nth) of every call of a whole life."""
    made: Counter[tuple[int, str, str]] = Counter()

    def told(rank: int, when: str, call: str) -> None:
        made[rank, when, call] += 1

    produce([12, 7])
    ended(config_of(folder, mode), lambda rank, keeper: watched(rank, keeper, told))
    return [(*where, nth) for where, count in sorted(made.items()) for nth in range(count)]


def config_of(folder: Path, mode: str) -> Config:
    return group(folder, delivery={"mode": mode}, checkpoint={"folder": str(folder), "every_events": 4, "lease_s": 0})


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
def test_whoever_dies_wherever_the_group_goes_on_as_if_nobody_had(tmp_path: Path, mode: str) -> None:
    points = deaths(tmp_path / "counted", mode)[:: 1 if EVERYWHERE else 4]
    undisturbed = digests(ended(config_of(tmp_path / "counted", mode)))
    for at, (dying, when, call, nth) in enumerate(points):
        folder, made = tmp_path / str(at), Counter[tuple[int, str, str]]()

        def told(rank: int, now: str, called: str) -> None:
            if (rank, now, called) == (dying, when, call):  # noqa: B023
                made[rank, now, called] += 1  # noqa: B023
                if made[rank, now, called] == nth + 1:  # noqa: B023
                    raise Died

        produce([12, 7])
        found = live(config_of(folder, mode), lambda rank, keeper: watched(rank, keeper, told))
        assert isinstance(found[dying], Died)
        with pytest.raises(memory.Crash):
            memory.broker(BROKER).die()
        keepers = ended(config_of(folder, mode))
        assert digests(keepers) == undisturbed, (dying, when, call, nth)
        _answered_once(mode)
        shutil.rmtree(folder)


def _answered_once(mode: str) -> None:
    answers: dict[str, list[bytes | None]] = {}
    for message in memory.broker(BROKER).messages("scores"):
        answers.setdefault(json.loads(message.value or b"")["id"], []).append(message.value)
    assert len(answers) == 19
    assert all(len(set(values)) == 1 for values in answers.values())
    if mode == "exactly_once":
        assert all(len(values) == 1 for values in answers.values())


@pytest.mark.parametrize("merge", ["average", "outer", "gradient"])
@pytest.mark.parametrize("nth", [1, 3])
def test_whatever_is_merged_a_death_between_two_meetings_changes_nothing(tmp_path: Path, merge: str, nth: int) -> None:
    def configured(folder: str) -> Config:
        gradient = merge == "gradient"
        own = {"merge": merge} if gradient else {"merge": merge, "round_events": 3}
        changes: dict[str, Any] = {"replay": {}} if gradient else {}
        worker = {"max_records": 5, "poll_timeout_s": 0.01, "engine": "eager" if gradient else "auto"}
        return group(tmp_path / folder, group=own, worker=worker, **changes)

    produce([12, 7])
    undisturbed = digests(ended(configured("undisturbed")))
    produce([12, 7])
    meetings = Counter[int]()

    def die(rank: int, keeper: Keeper) -> None:
        def told(rank: int, when: str, call: str) -> None:
            meetings[rank] += (rank, when, call) == (1, "behind", "merge.meet")
            if (rank, when, call) == (1, "before", "control.append") and meetings[1] == nth:
                raise Died

        watched(rank, keeper, told)

    assert isinstance(live(configured("killed"), die)[1], Died)
    with pytest.raises(memory.Crash):
        memory.broker(BROKER).die()
    assert digests(ended(configured("killed"))) == undisturbed


def test_a_rank_that_has_taken_all_there_is_joins_a_round_that_another_has_closed(tmp_path: Path) -> None:
    broker = produce([10, 3], finished=False)
    config = group(tmp_path)

    def stop(rank: int, keeper: Keeper) -> None:
        def told(rank: int, when: str, call: str) -> None:
            rounds = keeper.worker.rounds
            if rank == 0 and (when, call) == ("before", "source.poll") and rounds and rounds.number == 2:
                broker.finish()

        watched(rank, keeper, told)

    keepers = ended(config, stop)
    assert [keeper.worker.progress.records for keeper in keepers] == [10, 3]
    assert closed(config, 1)[0][0] == 1
    assert closed(config, 0)[:2] == [(1, 5, False), (2, 10, False)]


def test_a_group_leaves_together_when_one_of_it_is_stopped(tmp_path: Path) -> None:
    produce([40, 40], finished=False)
    config = group(tmp_path)

    def stop(rank: int, keeper: Keeper) -> None:
        def told(rank: int, when: str, call: str) -> None:
            if rank == 1 and call == "merge.meet" and keeper.worker.progress.records == 20:
                keeper.worker.stop()

        watched(rank, keeper, told)

    keepers = ended(config, stop)
    rounds = {keeper.worker.rounds.number for keeper in keepers if keeper.worker.rounds}
    assert len(rounds) == 1
    assert all(keeper.last and keeper.last.manifest["clean"] for keeper in keepers)
    produce([0, 0], start=1)  # the rest of what was there, and no more comes
    assert [keeper.worker.progress.records for keeper in ended(config)] == [40, 40]


def test_a_damaged_part_takes_all_ranks_back_to_the_round_before(tmp_path: Path) -> None:
    produce([30, 30])
    config = group(tmp_path, checkpoint={"folder": str(tmp_path), "every_events": 4, "lease_s": 0})
    undisturbed = digests(ended(config))
    for name in ("arrays.safetensors", "state.json"):
        newest = store_of(config.of_shard(1)).ls()[-1].path
        (newest / name).write_bytes(b"")
    assert digests(ended(config)) == undisturbed


@pytest.mark.parametrize(
    ("kept", "said"), [(0, "no round of which every rank has a snapshot"), (1, "holds no snapshot")]
)
def test_without_a_round_that_all_have_nobody_begins(tmp_path: Path, kept: int, said: str) -> None:
    produce([12, 12])
    config = group(tmp_path)
    ended(config)
    gone = store_of(config.of_shard(1)).ls() + store_of(config.of_shard(0)).ls()[: 1 - kept]
    for snapshot in gone:  # rank 1 has none, rank 0 with the first one or without
        shutil.rmtree(snapshot.path)
    found = live(config)
    assert all(isinstance(each, StreamclError) for each in found)
    assert any(said in str(each) for each in found)


def test_the_newest_complete_snapshot_stays_while_others_lack_theirs(tmp_path: Path) -> None:
    produce([60, 60])
    config = group(tmp_path, checkpoint={"folder": str(tmp_path), "every_events": 4, "retain": 1, "lease_s": 0})

    def fail(rank: int, keeper: Keeper) -> None:
        if rank == 1:
            keeper.store.permit = full

    def full() -> None:
        if len(store_of(config.of_shard(1)).ls()) > 1:
            raise CheckpointError("no room")

    live(config, fail)
    names = [{meeting_of(each) for each in store_of(config.of_shard(rank)).ls()} for rank in range(2)]
    assert names[0] & names[1]
    keepers = ended(config)
    assert [keeper.worker.progress.records for keeper in keepers] == [60, 60]


def test_what_a_group_forgets_goes_once_every_rank_has_its_part_of_a_later_snapshot(tmp_path: Path) -> None:
    broker = produce([30, 30], finished=False)
    value = json.dumps({"command": "forget", "id": "one", "key": "3"}).encode()
    broker.produce("orders", value, partition=1, time_s=9.5)
    broker.finish()
    config = group(tmp_path, commands=COMMANDS_URL, checkpoint={"folder": str(tmp_path), "every_events": 12})
    keepers = ended(config)
    assert [keeper.worker.counts["forget_requests"] for keeper in keepers] == [0, 1]
    [line] = keepers[1].audit.lines()
    assert line["request"] == "one"
    assert all(each.manifest["forgets"] == 1 for each in keepers[1].store.ls())


def test_event_times_of_ranks_stay_within_a_round(tmp_path: Path) -> None:
    produce([40, 10])
    config = group(tmp_path, group={"round_s": 5.0})
    ended(config)
    assert closed(config, 0)[:3] == [(1, 6, False), (2, 11, False), (3, 16, False)]  # the record that passes 5, 10, 15
    assert closed(config, 1)[:2] == [(1, 6, False), (2, 10, True)]


def test_a_shard_of_a_group_is_not_run_alone_before_a_clean_stop(tmp_path: Path) -> None:
    produce([12, 12])
    config = group(tmp_path).of_shard(0)

    def die(rank: int, keeper: Keeper) -> None:
        def told(rank: int, when: str, call: str) -> None:
            if call == "merge.meet" and keeper.worker.progress.records == 10:
                raise Died

        watched(rank, keeper, told)

    live(config, die)
    keeper = Keeper(build(config), store_of(config), beside=False, lease_s=0.0)
    keeper.restore()
    with pytest.raises(StreamclError, match="met the others of its group"):
        list(keeper.run())


def test_a_group_that_repeats_its_logs_comes_to_the_same_state(tmp_path: Path) -> None:
    produce([3, 1], finished=False)
    config = group(tmp_path, checkpoint={"folder": str(tmp_path), "every_events": 7, "retain": 1000})

    def feed() -> None:
        for start in range(3, 60, 4):
            time.sleep(0.02)
            produce([4, start % 3], finished=start > 55, start=start)

    with ThreadPoolExecutor(1) as pool:
        feeding = pool.submit(feed)
        lived = digests(ended(config))
        feeding.result()
    for rank in range(2):
        for later in store_of(config.of_shard(rank)).ls()[1:]:
            shutil.rmtree(later.path)
    rounds = [closed(config, rank) for rank in range(2)]
    assert digests(ended(config)) == lived
    taken = [0, *(records for _, records, _ in rounds[1])]
    assert any(after - before < 5 for before, after in itertools.pairwise(taken))  # short ones: it was idle


def test_a_rank_is_neither_rolled_back_nor_followed_by_a_shadow(tmp_path: Path) -> None:
    produce([12, 12])
    config = group(tmp_path)
    ended(config)
    with pytest.raises(ConfigError, match="rank of a group"), standing(config.of_shard(0)):
        pass


def test_in_a_group_an_outage_ends_the_process(tmp_path: Path) -> None:
    broker = produce([40, 40], finished=False)
    config = group(tmp_path, telemetry={"port": 0})
    table = Table(2)

    def host(rank: int, seat: Ranks) -> None:
        mine = config.of_shard(rank)
        with contextlib.closing(seat), contextlib.closing(Telemetry(mine)) as telemetry:
            for turn in Host(mine, FixedShards(mine), telemetry, ranks=seat).run():
                if rank == 1 and turn.records and turn.position[Stream("events", 1)] >= 20:
                    broker.away = lambda topic: topic == "views/1"

    with ThreadPoolExecutor(2) as pool:
        lives = [pool.submit(host, rank, seat) for rank, seat in enumerate(table.seats())]
        found = [life.exception() for life in lives]
    assert isinstance(found[0], RankLost)
    assert isinstance(found[1], Unavailable)
    broker.away = lambda _: False
    broker.finish()
    assert [keeper.worker.progress.records for keeper in ended(config)] == [40, 40]


def test_shards_that_learned_alone_are_no_group(tmp_path: Path) -> None:
    produce([12, 7])
    config = group(tmp_path)
    for rank in range(2):
        mine = config.of_shard(rank)
        keeper = Keeper(build(mine), store_of(mine), beside=False, lease_s=0.0)
        keeper.restore()
        for _ in keeper.run():
            pass
        keeper.close()
    produce([9, 9], start=12)
    with pytest.raises(StreamclError, match="have not begun with one model"):
        ended(config)


def test_every_reading_of_a_group_has_a_text_for_people(tmp_path: Path) -> None:
    produce([12, 7])
    [first, _] = ended(group(tmp_path))
    assert first.worker.rounds
    assert first.worker.rounds.read().keys() <= PARTS.keys()


def test_nothing_is_learned_twice(tmp_path: Path) -> None:
    produce([12, 7])
    keepers = ended(group(tmp_path))
    origins = [Origin("events", partition, n) for partition, count in ((0, 12), (1, 7)) for n in range(count)]
    assert sum(keeper.worker.progress.learned for keeper in keepers) % (1 << 128) == learned_hash(origins)
