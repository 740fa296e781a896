"""Forgetting, end to end: no trace on disk, the same state whatever happens on the way, one line on record."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.audit import FILE, Audit
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.protocols import ConnectorError
from streamcl.records import Selector, mark
from streamcl.recovery import Keeper, store_of
from streamcl.remote import Remote
from streamcl.snapshot import CheckpointError
from streamcl.state import digest
from streamcl.stations import Checkpoint
from streamcl.worker import Worker, build
from tests.journey import BROKER, COMMANDS_URL, Item, click, die_after, fill, finish, order, repeat, settings, view

WHO = "user-Quetzalcoatl"
MEMORIES = [
    {"kind": "knn", "key": "embedding", "capacity": 50},
    {"kind": "sketch", "key": "ids", "bits": 3, "arrays": 4},
    {"kind": "key", "key": "user"},
]


def config_of(folder: Path, **changes: Any) -> Config:
    """Everything that holds events, and a window so long that many of them wait."""
    data: dict[str, Any] = {
        "commands": COMMANDS_URL,
        "error_memory": MEMORIES,
        "diagnostics": {"sample_every_steps": 1, "window": 16},
        "replay": {"retention": "recency", "capacity": 40, "per_event": 1},
        "join": {"attribution_window_s": 1000.0, "orphan_s": 1000.0},
        "deltas": {"url": (folder / "deltas").as_uri(), "every_events": 5},
        "checkpoint": {
            "folder": str(folder / "here"),
            "remote": (folder / "away").as_uri(),
            "every_events": 6,
            "retain": 4,
        },
    }
    return settings(folder, **{**data, **changes})


def stream() -> list[Item]:
    """Two users' events, of both some that are labelled and some that wait; and an orphan."""
    items: list[Item] = []
    for id in range(24):
        items.append(view(id + 7_000_000, float(id), user=WHO if id % 3 == 0 else f"u{id % 5}", price=price(id)))
        if id % 2 == 0:
            items.append(click(id + 7_000_000, id + 0.5))
    return [*items, click(7_777_777, 24.0)]


def price(id: int) -> float:
    return 1000.0 + id / 7.0


def needles() -> dict[str, bytes]:
    """What of the user may be found on a disk, as it would be written there."""
    found = {"key": WHO.encode(), "hash of the key": struct.pack("<q", mark(WHO)), "orphan": b"7777777"}
    for id in range(0, 24, 3):
        name = str(id + 7_000_000)
        found |= {
            f"id {id}": name.encode(),
            f"hash of id {id}": struct.pack("<q", mark(name)),
            f"price {id}": np.float32(price(id)).tobytes(),
        }
    return found | {
        f"{name}, as text": str(struct.unpack("<q", b)[0]).encode() for name, b in found.items() if "hash" in name
    }


def traces(*folders: Path) -> set[str]:
    files = [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return {name for name, needle in needles().items() if any(needle in data for data in files)}


def rows_of(state: dict[str, Any]) -> list[bytes]:
    """What forms and diagnostics hold of the user's examples, in numbers of their own making."""
    learner, owner = state["learner"], mark(WHO)
    tables = [(learner["recall"]["0"]["form"], "rows"), (learner["diagnostics"], "ring")]
    found = [
        np.asarray(table[name][at]).tobytes()
        for table, name in tables
        for at in np.flatnonzero(table["owner_key"] == owner)
    ]
    sketch = learner["recall"]["1"]["form"]
    return [*found, *(row.tobytes() for row in sketch["sums"].reshape(-1, 3) if row[0])]


def test_no_trace_is_left_anywhere_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamcl.snapshot.CHUNKED_BYTES", 64)  # nearly every array in chunks
    broker, config = fill(stream()), config_of(tmp_path)
    before = finish(config)
    here, away = store_of(config).folder, tmp_path / "away"
    learned = {f"hash of id {id}" for id in range(0, 24, 6)}  # of the others no row knows the owner yet
    held = {name for name in needles() if "text" not in name and ("of id" not in name or name in learned)}
    assert traces(here) == traces(away) == held
    assert len(store_of(config).ls()) == 4
    mine = rows_of(before.worker.state_dict())
    assert len(mine) > 10
    assert any(mine[0] in path.read_bytes() for path in here.rglob("*") if path.is_file())
    (here / "damaged-0000000001-5-0123abcd").mkdir()  # one that was set aside holds them too
    (here / "damaged-0000000001-5-0123abcd" / "state.json").write_bytes(WHO.encode())

    broker.produce("orders", order("r-1", 30.0, key=WHO).value, time_s=30.0)
    after = finish(config)
    assert after.worker.counts["forget_requests"] == 1
    assert traces(tmp_path) == set()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [row for row in mine if any(row in data for data in files)]

    [line] = Audit(here).lines()
    assert line == Audit(tmp_path / "nowhere", store_of(config).remote).lines()[0]
    assert (line["request"], line["position"], line["time_s"]) == ("r-1", "commands:0:0", 30.0)
    rows = {"orphans": 1, "tickets": 4, "closed_ids": 4, "replay": 4, "error_memory": 4 + 12 + 1, "diagnostics": 4}
    assert line["rows"] == rows
    assert after.worker.counts["forgotten_rows"] == sum(rows.values())
    assert len(line["retired"]) == 3  # and one gave way to the new one
    assert store_of(config).newest() is not None
    assert finish(config).digest == after.digest


def test_the_row_of_a_key_in_a_dynamic_table_leaves_no_trace(tmp_path: Path) -> None:
    features = {"user": {"kind": "categorical", "table": {"admission": "all"}}, "price": "numeric"}
    broker, config = fill(stream()), config_of(tmp_path, features=features, error_memory=[])
    finish(config)
    needle = struct.pack("<q", int(Featurizer(config).encode({"user": WHO}).ids[0]))

    def holds() -> bool:
        return any(needle in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    assert holds()
    broker.produce("orders", order("r-1", 30.0, key=WHO).value, time_s=30.0)
    after = finish(config)
    assert Audit(store_of(config).folder).lines()[0]["rows"]["tables"] == 1
    assert not holds()
    assert finish(config).digest == after.digest


def test_what_comes_after_the_command_is_held_like_anything_else(tmp_path: Path) -> None:
    fill([*stream(), order("r-1", 30.0, key=WHO), view(9, 31.0, user=WHO)])
    done = finish(config_of(tmp_path))
    assert [ticket.id for ticket in done.worker.joiner.tickets.values() if ticket.key == WHO] == ["9"]


def with_orders() -> list[Item]:
    """Two commands in the middle of two partitions' events, and a bad one."""
    items = [Item(i.topic, i.value, i.time_s, n % 2) for n, i in enumerate(stream()) if i.topic != "clicks"]
    clicks = [Item(i.topic, i.value, i.time_s) for i in stream() if i.topic == "clicks"]
    orders = [order("r-1", 9.2, key=WHO), order("r-2", 15.2, 1, from_s=3.0, until_s=12.0), Item("orders", b"{", 11.0)]
    return sorted([*items, *clicks, *orders], key=lambda item: item.time_s)


def die_at(config: Config, call: str, nth: int, behind: bool) -> bool:
    """Run until the nth call of that name; False when there are not so many."""
    worker = build(config)
    keeper = Keeper(worker, store_of(config), beside=False)
    owner, name = {"keeper": keeper, "store": keeper.store, "audit": keeper.audit, "control": worker.control}, ""
    part, _, name = call.partition(".")
    does, calls = getattr(owner[part], name), Counter[str]()

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls[call] += 1
        if calls[call] != nth:
            return does(*args, **kwargs)
        if behind:
            does(*args, **kwargs)
        memory.broker(BROKER).die()
        return None

    setattr(owner[part], name, dying)
    try:
        keeper.restore()
        for _ in keeper.run():
            pass
    except memory.Crash:
        return True
    return False


def away_from(config: Config) -> Checkpoint:
    """Where a worker on another machine would look."""
    return config.checkpoint.model_copy(update={"folder": config.checkpoint.folder / "elsewhere"})


CALLS = ["store.save", "store.retire", "audit.add"]


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("call", CALLS)
def test_a_worker_that_dies_on_the_way_goes_on_as_if_it_had_not(tmp_path: Path, call: str, behind: bool) -> None:
    nth, died = 1, True
    while died:
        fill(with_orders(), 2)
        where = {"folder": str(tmp_path / str(nth)), "remote": (tmp_path / f"away-{nth}").as_uri(), "every_events": 15}
        config = config_of(tmp_path, deltas={}, error_memory=[], checkpoint=where)
        died = die_at(config, call, nth, behind)
        done = finish(config)
        assert done.digest == repeat(config).digest
        assert done.worker.counts["forget_requests"] == 2
        assert done.worker.counts["dead_letter"] == 1
        on_record = Audit(store_of(config).folder).lines()
        assert sorted(line["request"] for line in on_record) == ["r-1", "r-2"]
        copies = store_of(config.model_copy(update={"checkpoint": away_from(config)}))
        assert copies.newest() is not None
        for store in (store_of(config), copies):
            assert {snapshot.manifest["forgets"] for snapshot in store.ls()} == {2}
        nth += 1
    assert nth > 3


@effort(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns=st.integers(0, 12), cut=st.integers(1, 9), seed=st.integers(0, 9))
def test_killed_anywhere_and_replayed_it_forgets_at_the_same_place(
    tmp_path_factory: pytest.TempPathFactory, turns: int, cut: int, seed: int
) -> None:
    fill(with_orders(), 2)
    where = {"folder": str(tmp_path_factory.mktemp("shard")), "every_events": 10}
    turn = {"max_records": cut, "poll_timeout_s": 0.01}
    config = config_of(tmp_path_factory.getbasetemp(), deltas={}, checkpoint=where, worker=turn)
    arrival: Callable[..., Any] = lambda heads: heads[seed % len(heads)]  # noqa: E731
    die_after(config, turns, arrival)
    assert finish(config, arrival).digest == repeat(config).digest


def test_a_key_that_nobody_knows_changes_nothing_but_the_counters(tmp_path: Path) -> None:
    """A sketch apart, which can't know that."""
    states = []
    for name, more in (("without", []), ("with", [order("r-1", 12.25, key="nobody")])):
        fill(sorted([*stream()[:-1], *more], key=lambda item: item.time_s))
        config = config_of(tmp_path / name, deltas={}, error_memory=[MEMORIES[0]])
        states.append(finish(config).worker.state_dict())
    for part in ("learner", "joiner", "metrics", "base_metrics", "drift"):
        assert digest(states[0][part]) == digest(states[1][part])
    assert states[1]["counts"] == states[0]["counts"] | {"forget_requests": 1, "forgotten_rows": 0}


def test_an_idle_stream_of_commands_holds_no_window_open(tmp_path: Path) -> None:
    """The only command is older than all events, and bad ones are told."""
    fill([order("r-1", -1e6, key="u"), Item("orders", b"[]", -1e6), *(view(i, float(i)) for i in range(40))])
    config = config_of(tmp_path, deltas={}, join={"attribution_window_s": 10.0, "idle_s": 1e9})
    done = finish(config)
    assert done.worker.counts["expired"] == 29
    [letter] = memory.broker(BROKER).messages("shop-dead-letters")
    assert dict(letter.headers)["streamcl-reason"] == b"undecodable"


def test_commands_may_come_into_a_configuration_that_has_run_and_leave_it(tmp_path: Path) -> None:
    items = stream()
    broker = fill(items)
    finish(config_of(tmp_path, commands=None, deltas={}))
    broker.produce("orders", order("r-1", 30.0, key=WHO).value, time_s=30.0)
    done = finish(config_of(tmp_path, deltas={}))
    assert done.worker.counts["forget_requests"] == 1
    assert finish(config_of(tmp_path, deltas={})).digest == done.digest
    left = finish(config_of(tmp_path, commands=None, deltas={}))
    assert {stream.input for stream in left.worker.progress.position} == {"events", "labels"}


def test_every_shard_needs_a_partition_of_commands(tmp_path: Path) -> None:
    fill([], 1)
    memory.broker(BROKER).create("more", 2)
    events = {"url": f"memory://{BROKER}/more", "label": "y"}
    config = config_of(tmp_path, deltas={}, shard={"count": 2}, events=events, labels=None)
    for opens in (lambda: build(config), lambda: memory.check([], config)):
        with pytest.raises(ConnectorError, match="2 shards need as many partitions, there are 1"):
            opens()


def test_commands_need_not_have_as_many_partitions_as_events(tmp_path: Path) -> None:
    fill([])
    memory.broker(BROKER).create("wide", 3)
    config = config_of(tmp_path, deltas={}, commands=f"memory://{BROKER}/wide")
    memory.check([], config)
    assert len(build(config).source.streams()) == 2 + 3


def test_a_snapshot_is_due_at_once_and_written_beside_the_loop(tmp_path: Path) -> None:
    fill([*stream(), order("r-1", 30.0, key=WHO)])
    memory.broker(BROKER).finished = False
    config = config_of(tmp_path, deltas={}, checkpoint={"folder": str(tmp_path), "every_events": 1_000_000})
    keeper = Keeper(build(config), store_of(config))
    keeper.restore()
    forgotten = False
    for turn in keeper.run():
        forgotten |= bool(turn.forgotten)
        if forgotten and not (turn.forgotten or keeper.forgotten):
            break
    [snapshot] = store_of(config).ls()
    assert snapshot.manifest["forgets"] == 1
    assert len(Audit(store_of(config).folder).lines()) == 1
    keeper.close()


def test_what_can_not_be_retired_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill([*stream(), order("r-1", 30.0, key=WHO), *(view(i, 40.0 + i) for i in range(12))])
    config = config_of(tmp_path, deltas={})
    keeper = Keeper(build(config), store_of(config), beside=False)
    keeper.restore()
    retire, tries = keeper.store.retire, iter([True])

    def failing(before: str) -> list[str]:
        if next(tries, False):
            raise CheckpointError("the store is away")
        return retire(before)

    monkeypatch.setattr(keeper.store, "retire", failing)
    monkeypatch.setattr("streamcl.recovery.LONGEST_BACKOFF_S", 0.0)
    for _ in keeper.run():
        pass
    assert keeper.failures.total() == 1
    [line] = Audit(store_of(config).folder).lines()
    assert line["retired"]
    assert traces(tmp_path) == set()


def test_the_record_is_whole_wherever_its_copies_have_been(tmp_path: Path) -> None:
    config = config_of(tmp_path, deltas={})
    remote, told = store_of(config).remote, {"position": "commands:0:0", "time_s": 1.0, "rows": {}, "retired": []}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = Audit(tmp_path / "one", remote), Audit(tmp_path / "two", remote)
    for n, audit in enumerate((one, two, two, one)):
        audit.add([{"request": str(n), **told}, {"request": "0", **told}])
    assert [line["request"] for line in one.lines()] == ["0", "1", "2", "3"] == [r["request"] for r in two.lines()]
    assert [json.loads(line)["request"] for line in (tmp_path / "one" / FILE).read_text().splitlines()] == list("0123")


def test_every_part_says_how_many_rows_it_erased(tmp_path: Path) -> None:
    fill(stream())
    config = config_of(tmp_path, deltas={})
    worker: Worker = finish(config).worker
    assert worker.joiner.forget(Selector(ids=frozenset({"7000000"}))) == {"orphans": 0, "tickets": 0, "closed_ids": 1}
    assert worker.learner.forget(Selector(until_s=0.5))["replay"] == 1


def test_a_line_whose_copy_failed_is_copied_when_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote((tmp_path / "away").as_uri())
    audit = Audit(tmp_path, remote)
    line = {"request": "r-1", "position": "commands:0:0", "time_s": 30.0, "rows": {}, "retired": ["1"]}
    put, tries = remote.put, iter([True])

    def failing(name: str, data: bytes) -> None:
        if next(tries, False):
            raise OSError("the store is away")
        put(name, data)

    monkeypatch.setattr(remote, "put", failing)
    with pytest.raises(CheckpointError, match="the store is away"):
        audit.add([line])
    elsewhere = Audit(tmp_path / "nowhere", remote)
    assert elsewhere.lines() == []
    audit.add([line | {"retired": []}])
    assert elsewhere.lines() == audit.lines() == [line]
