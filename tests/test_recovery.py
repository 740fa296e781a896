"""Killed anywhere and started again = never killed, bit for bit."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import ConfigError
from streamcl.protocols import Fenced, State, Stateful, StreamclError
from streamcl.records import Message
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.worker import build
from tests.journey import BROKER, Item, click, die_after, fill, finish, repeat, settings, shuffled, view

SOME = effort(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def streams(draw: st.DrawFn) -> list[Item]:
    """Events with labels that are in time, late, missing, doubled, orphaned or too early, and garbage among them."""
    items: list[Item] = []
    now = 0.0
    for id in range(draw(st.integers(3, 14))):
        now += draw(st.sampled_from([0.0, 0.5, 3.0, 12.0, -4.0]))
        partition = draw(st.integers(0, 1))
        fate = draw(st.sampled_from(["click", "late", "never", "twice", "early", "orphan", "garbage", "repeat"]))
        if fate == "garbage":
            items.append(Item("views", b'{"id": ', now, partition))
            continue
        shown, clicked = view(id, now, partition), click(id, now + (25.0 if fate == "late" else 2.0), partition)
        items += {
            "click": [shown, clicked],
            "late": [shown, view(id + 1000, now + 21.0, partition), clicked],
            "never": [shown],
            "twice": [shown, clicked, clicked],
            "early": [clicked, shown],
            "orphan": [click(id + 2000, now, partition)],
            "repeat": [shown, shown, clicked],
        }[fate]
    return items


def by_input(messages: list[Message]) -> dict[str, set[tuple[bytes | None, bytes | None]]]:
    found: dict[str, set[tuple[bytes | None, bytes | None]]] = defaultdict(set)
    for message in messages:
        found[dict(message.headers)["streamcl-input"].decode()].add((message.key, message.value))
    return found


@SOME
@given(streams(), st.integers(1, 2), st.lists(st.integers(0, 12), max_size=4), st.integers(1, 6), st.integers(1, 9))
def test_killed_after_any_turn_and_restarted_equals_never_killed(
    items: list[Item], partitions: int, deaths: list[int], poll: int, every: int
) -> None:
    # Those that died here are still in this process, and their leases may beat into the folder while it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = settings(
            Path(folder),
            worker={"max_records": poll, "poll_timeout_s": 0.01},
            checkpoint={"folder": folder, "every_events": every},
        )
        fill(items, partitions)
        for life, turns in enumerate(deaths):
            die_after(config, turns, shuffled(life))
        killed = finish(config, shuffled(99))
        undisturbed = repeat(config)
        assert killed.digest == undisturbed.digest
        # Each event was answered, and every repeat of an answer is the same to the byte.
        answers = by_input(killed.scores)
        assert all(len(values) == 1 for values in answers.values())
        assert len(answers) == killed.worker.counts["predicted"]


@SOME
@given(streams(), st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=4), st.integers(1, 9))
def test_killed_inside_any_append_and_restarted_equals_never_killed(
    items: list[Item], fuses: list[tuple[int, bool]], every: int
) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = settings(Path(folder), checkpoint={"folder": folder, "every_events": every})
        broker = fill(items, 2)
        for life, (appends, keep) in enumerate(fuses):
            broker.fail_after(appends, keep=keep)
            try:
                finish(config, shuffled(life))
            except memory.Crash:
                continue
            break
        broker._fuse = None  # the stream was shorter than the fuse
        killed = finish(config)
        assert killed.digest == repeat(config).digest
        answers = by_input(killed.scores)
        assert all(len(values) == 1 for values in answers.values())
        assert len(answers) == killed.worker.counts["predicted"]


@SOME
@given(
    streams(),
    st.integers(1, 2),
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_exactly_once_killed_inside_any_append_answers_each_event_once(
    items: list[Item], partitions: int, fuses: list[tuple[int, bool]], every: int
) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = settings(
            Path(folder), checkpoint={"folder": folder, "every_events": every}, delivery={"mode": "exactly_once"}
        )
        broker = fill(items, partitions)
        for life, (appends, keep) in enumerate(fuses):
            broker.fail_after(appends, keep=keep)
            try:
                finish(config, shuffled(life))
            except memory.Crash:
                continue
            break
        broker._fuse = None
        killed = finish(config)
        assert killed.digest == repeat(config).digest
        inputs = [dict(message.headers)["streamcl-input"] for message in killed.scores]
        assert len(inputs) == len(set(inputs)) == killed.worker.counts["predicted"]


@SOME
@given(streams(), st.integers(1, 2), st.integers(1, 50), st.integers(1, 50))
def test_any_split_into_polls_gives_the_same_state_and_predictions(
    items: list[Item], partitions: int, one: int, other: int
) -> None:
    results = []
    for poll in (one, other):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            fill(items, partitions)
            results.append(finish(settings(Path(folder), worker={"max_records": poll, "poll_timeout_s": 0.01})))
    assert results[0].digest == results[1].digest
    assert [m.value for m in results[0].scores] == [m.value for m in results[1].scores]


@SOME
@given(streams())
def test_the_learned_hash_names_exactly_the_records_that_were_learned_from(items: list[Item]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fill(items)
        config = settings(Path(folder))
        worker = build(config)
        keeper = Keeper(worker, store_of(config), beside=False)
        keeper.restore()
        learned = [outcome.ticket.origin for turn in keeper.run() for outcome in turn.outcomes]
        other = build(config).progress
        for origin in reversed(learned):
            other.learn([origin])
        assert other.learned == worker.progress.learned
        assert len(set(learned)) == len(learned) == worker.counts["learned"]


STREAM = [item for id in range(40) for item in (view(id, float(id)), *([click(id, id + 2.0)] if id % 3 == 0 else []))]
PARTS = ("boundaries", "counts", "drift", "joiner", "learner", "lineage", "lists", "metrics", "progress", "slices")


def test_the_parts_that_remember_are_these(tmp_path: Path) -> None:
    fill(STREAM)
    assert tuple(build(settings(tmp_path)).parts()) == PARTS


@pytest.mark.parametrize("forgotten", [part for part in PARTS if part != "lineage"])  # of which this stream has none
def test_a_part_left_out_of_the_snapshot_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    fill(STREAM)
    metrics = {"window": 16, "group_by": "user", "ranking": {"group_by": "user"}}
    config = settings(tmp_path, boundaries=[{"kind": "clock", "every_events": 1000}], metrics=metrics)
    die_after(config, 6)
    worker = build(config)
    part = type(worker.parts()[forgotten])
    loads = part.load_state_dict
    monkeypatch.setattr(part, "load_state_dict", lambda *_: None)
    if forgotten == "progress":  # without its position the stream would begin again, which the control log denies
        with pytest.raises(StreamclError):
            finish(config)
        return
    disturbed = finish(config)
    monkeypatch.setattr(part, "load_state_dict", loads)
    assert disturbed.digest != repeat(config).digest


def test_a_new_part_is_found_without_being_listed(tmp_path: Path) -> None:
    class Memo:
        def state_dict(self) -> State:
            return {"x": 1}

        def load_state_dict(self, state: State) -> None: ...

    fill(STREAM)
    worker = build(settings(tmp_path))
    memo: Stateful = Memo()
    vars(worker)["memo"] = memo
    assert worker.state_dict()["memo"] == {"x": 1}


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
def test_a_damaged_snapshot_is_passed_over_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    die_after(config, 9)
    newest = store_of(config).ls()[-1].path
    arrays = newest / "arrays.safetensors"
    data = arrays.read_bytes()
    if damage == "gone":
        arrays.unlink()
    else:
        arrays.write_bytes(data[:-1] if damage == "torn" else data[:-1] + bytes([data[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        worker = build(config)
        keeper = Keeper(worker, store_of(config), beside=False)
        keeper.restore()
    assert [name for name, _ in keeper.store.damaged] == [newest.name]
    assert newest.name in caplog.text
    for _ in keeper.run():
        pass
    assert digest(worker.state_dict()) == repeat(config).digest


def test_when_every_snapshot_is_damaged_the_worker_refuses_to_learn_everything_again(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    die_after(config, 9)
    for snapshot in store_of(config).ls():
        (snapshot.path / "manifest.json").write_text("{}")
    with pytest.raises(StreamclError, match="every snapshot is damaged"):
        finish(config)


def test_a_lost_checkpoint_folder_is_an_error_that_names_the_control_log(tmp_path: Path) -> None:
    fill(STREAM)
    die_after(settings(tmp_path / "a"), 9)
    with pytest.raises(StreamclError, match=r"holds no snapshot, but memory://journey/shop-control"):
        finish(settings(tmp_path / "b"))


def test_a_predecessor_is_fenced_and_can_neither_publish_nor_save(tmp_path: Path) -> None:
    fill(STREAM)
    config = settings(tmp_path)
    old = Keeper(build(config), store_of(config), beside=False)
    old.restore()
    turns = old.run()
    next(turns)
    finish(config)
    published = len(memory.broker(BROKER).messages("scores"))
    with pytest.raises(Fenced):
        next(turns)
    assert len(memory.broker(BROKER).messages("scores")) == published


@pytest.mark.parametrize(
    ("changes", "path"),
    [({"seed": 1}, "seed"), ({"model": {"kind": "mlp"}}, "model.kind"), ({"metrics": {"window": 5}}, "metrics.window")],
)
def test_a_change_that_means_other_state_is_refused(tmp_path: Path, changes: dict[str, Any], path: str) -> None:
    fill(STREAM)
    finish(settings(tmp_path))
    with pytest.raises(ConfigError, match=path):
        finish(settings(tmp_path, **changes))


def test_a_change_of_kind_stop_needs_a_clean_stop(tmp_path: Path) -> None:
    fill(STREAM)
    faster = {"optimizer": {"learning_rate": 0.2}}
    die_after(settings(tmp_path), 6)
    with pytest.raises(ConfigError, match=r"no clean stop wrote: optimizer.learning_rate"):
        finish(settings(tmp_path, **faster))
    finish(settings(tmp_path))
    finish(settings(tmp_path, **faster))  # after a clean stop it may change


def test_a_free_change_needs_nothing(tmp_path: Path) -> None:
    fill(STREAM)
    die_after(settings(tmp_path), 6)
    free = settings(tmp_path, worker={"max_records": 3, "poll_timeout_s": 0.02}, telemetry={"port": 0})
    assert finish(free).digest == repeat(free).digest


def test_a_single_stream_needs_no_control_log(tmp_path: Path) -> None:
    items = [view(id, float(id), clicked=id % 2) for id in range(30)]
    events = {"url": f"memory://{BROKER}/views", "id": "id", "time": "ts", "label": "clicked"}
    config = settings(tmp_path, labels=None, events=events)
    broker = fill(items)
    die_after(config, 4)
    killed = finish(config)
    assert killed.digest == repeat(config).digest
    assert "shop-control" not in broker.topics()
    assert sorted(json.loads(m.value or b"")["id"] for m in killed.scores[-5:]) == ["25", "26", "27", "28", "29"]
