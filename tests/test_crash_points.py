"""Every point at which a worker can die, in both modes of delivery, and what recovery makes of it.

The table `POINTS` is the one of `streamcl.recovery`; `everywhere` goes on to number each call that crosses the worker's
boundary, and kills it before and behind each.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from connectors import memory
from streamcl.channel import RECORDS
from streamcl.config import Config
from streamcl.messages import NUMBER
from streamcl.protocols import Fenced
from streamcl.recovery import Keeper, store_of
from streamcl.worker import build
from tests.journey import BROKER, Item, click, fill, finish, repeat, settings, view

When = Literal["before", "behind", "kept"]  # kept: behind, and what was on its way arrives although nobody is told


@dataclass(frozen=True)
class Point:
    """Death at call number `nth` of `call`."""

    name: str
    call: str
    when: When
    nth: int = 0
    life: int = 1  # which start dies: the first one has no snapshot yet

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


POINTS = [
    Point("before the predecessor is fenced", "control.open", "before"),
    Point("behind the fence", "control.open", "behind"),
    Point("first start, before its snapshot", "store.save", "before", life=0),
    Point("first start, behind its snapshot", "store.save", "behind", life=0),
    Point("behind loading the snapshot", "worker.load_state_dict", "behind"),
    Point("behind the seek", "source.seek", "behind"),
    Point("in the middle of a re-run", "source.poll", "behind", nth=1),
    Point("records polled, their order not logged", "control.append", "before", nth=2),
    Point("the order or transaction is on its way, and lost", "control.append", "before", nth=1),
    Point("the order or transaction is durable, nobody was told", "control.append", "behind", nth=2),
    Point("in the middle of a turn", "worker._take", "behind", nth=13),
    Point("before the dead letters", "dead_letters.send", "before"),
    Point("dead letters sent, nothing else", "dead_letters.send", "kept"),
    Point("before the predictions", "predictions.send", "before", nth=2),
    Point("predictions sent, not acknowledged, lost", "predictions.send", "behind", nth=2),
    Point("predictions sent, not acknowledged, arrived", "predictions.send", "kept", nth=2),
    Point("predictions sent, not the outcomes", "outcomes.send", "before", nth=2),
    Point("outcomes sent, not acknowledged, lost", "outcomes.send", "behind", nth=2),
    Point("outcomes sent, not acknowledged, arrived", "outcomes.send", "kept", nth=2),
    Point("before a delta is sent", "deltas.send", "before", nth=1),
    Point("behind a delta that is sent", "deltas.send", "behind", nth=1),
    Point("before the flush of a checkpoint", "worker.flush", "before", nth=1),
    Point("behind the flush of a checkpoint", "worker.flush", "behind", nth=1),
    Point("before a checkpoint", "store.save", "before", nth=1),
    Point("behind a checkpoint", "store.save", "behind", nth=1),
    Point("behind showing progress", "source.commit", "behind", nth=1),
]
"""Death inside the writing of a checkpoint: any line of it, in tests/test_checkpoint.py."""

MODES = ("at_least_once", "exactly_once")


def stream() -> list[Item]:
    """Two partitions of events, clicks in time, late and missing, and a few bad records."""
    items: list[Item] = []
    for id in range(24):
        items.append(view(id, float(id), id % 2))
        if id % 3 == 0:
            items.append(click(id, id + (14.0 if id % 4 == 0 else 2.0), id % 2))
        if id % 7 == 5:
            items.append(Item("views", b"{", float(id), id % 2))
    return items


@dataclass
class Life:
    """One start of a worker, all of whose boundary calls are counted; it dies where `point` says."""

    config: Config
    point: Point | None = None
    calls: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        worker = build(self.config)
        keeper = Keeper(worker, store_of(self.config), beside=False)
        owners: dict[str, Any] = {"worker": worker, "store": keeper.store}
        owners |= {"control": worker.control, "source": worker.source}
        owners |= {
            name: getattr(worker.outlets, name) for name in ("predictions", "outcomes", "dead_letters", "deltas")
        }
        for call in sorted(CALLS):
            owner, name = call.split(".")
            if owners[owner] is not None:
                setattr(owners[owner], name, self._watched(call, getattr(owners[owner], name)))
        keeper.restore()
        for _ in keeper.run():
            pass

    def _watched(self, call: str, does: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            nth, self.calls[call] = self.calls[call], self.calls[call] + 1
            mine = self.point is not None and (call, nth) == (self.point.call, self.point.nth)
            if mine and self.point and self.point.when == "before":
                memory.broker(BROKER).die()
            result = does(*args, **kwargs)
            if mine and self.point:
                memory.broker(BROKER).die(keep=self.point.when == "kept")
            return result

        return watched


CALLS = {point.call for point in POINTS}


def config_of(folder: Path, mode: str) -> Config:
    checkpoint = {"folder": str(folder), "every_events": 11}
    beside = {
        "outcomes": f"memory://{BROKER}/outcomes",
        "deltas": {"url": f"memory://{BROKER}/deltas", "every_events": 5},
    }
    return settings(folder, delivery={"mode": mode}, checkpoint=checkpoint, **beside)


def verify(config: Config, mode: str) -> None:
    """What every crash must come to: the state, and the answers, of a worker that never died."""
    done = finish(config)
    undisturbed = repeat(config)
    assert done.digest == undisturbed.digest
    assert done.worker.progress.learned == undisturbed.worker.progress.learned
    answers: dict[bytes, list[bytes | None]] = {}
    for message in done.scores:
        answers.setdefault(dict(message.headers)["streamcl-input"], []).append(message.value)
    assert len(answers) == 24
    assert all(len(set(values)) == 1 for values in answers.values())
    if mode == "exactly_once":
        assert all(len(values) == 1 for values in answers.values())
    told = [(int(dict(m.headers)[NUMBER]), m.value) for m in memory.broker(BROKER).messages("outcomes")]
    first = list(dict(told))  # in the order in which a number came first
    assert (
        first == list(range(1, done.worker.counts["learned"] + 1)) == list(range(1, done.worker.progress.outcomes + 1))
    )
    assert len(set(told)) == len(first)
    if mode == "exactly_once":
        assert len(told) == len(first)
    deltas = [(int(dict(m.headers)[RECORDS]), m.value) for m in memory.broker(BROKER).messages("deltas")]
    assert list(dict(deltas)) == list(range(5, done.worker.progress.records + 1, 5))  # as numbers came first
    assert len(set(deltas)) == len(dict(deltas))  # and again only as the same bytes
    letters = memory.broker(BROKER).messages("shop-dead-letters")
    origins = {
        dict(letter.headers)["streamcl-offset"] + dict(letter.headers)["streamcl-partition"] for letter in letters
    }
    assert len(origins) == 3


def happens(point: Point, mode: str) -> bool:
    """Exactly once, predictions and outcomes travel with the order: no call of theirs can be died at."""
    return mode != "exactly_once" or not point.call.startswith(("predictions", "outcomes"))


@pytest.mark.parametrize(("point", "mode"), [(p, m) for p in POINTS for m in MODES if happens(p, m)], ids=str)
def test_a_worker_that_died_here_goes_on_as_if_it_had_not(tmp_path: Path, point: Point, mode: str) -> None:
    fill(stream(), 2)
    config = config_of(tmp_path, mode)
    if point.life:
        die_before(config, "control.append", 4)
    with pytest.raises(memory.Crash):
        Life(config, point).run()
    verify(config, mode)


def die_before(config: Config, call: str, nth: int) -> None:
    with pytest.raises(memory.Crash):
        Life(config, Point("earlier", call, "before", nth)).run()


def everywhere(folder: Path, mode: str) -> Iterator[Point]:
    """Before and behind each boundary call of a whole life."""
    fill(stream(), 2)
    life = Life(config_of(folder, mode))
    life.run()
    for call, count in sorted(life.calls.items()):
        whens = ("before", "behind", "kept") if call.endswith(("send", "append")) else ("before", "behind")
        for nth, when in itertools.product(range(count), whens):
            yield Point(f"{when} {call} {nth}", call, when, nth)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_a_worker_may_die_before_and_behind_every_call_across_its_boundary(tmp_path: Path, mode: str) -> None:
    points = list(everywhere(tmp_path / "whole", mode))
    assert len(points) > 120
    for number, point in enumerate(points):
        fill(stream(), 2)
        config = config_of(tmp_path / str(number), mode)
        with pytest.raises(memory.Crash):
            Life(config, point).run()
        verify(config, mode)


@pytest.mark.parametrize("mode", MODES)
def test_with_the_newest_snapshots_lost_an_older_one_leads_to_the_same_state(tmp_path: Path, mode: str) -> None:
    fill(stream(), 2)
    config = config_of(tmp_path, mode)
    die_before(config, "control.append", 6)
    store = store_of(config)
    assert len(store.ls()) > 1
    for snapshot in store.ls()[1:]:
        store._delete(snapshot.name)
    verify(config, mode)


@pytest.mark.parametrize("mode", MODES)
def test_of_two_workers_with_one_identity_the_older_neither_publishes_nor_saves(tmp_path: Path, mode: str) -> None:
    fill(stream(), 2)
    config = config_of(tmp_path, mode)
    older = Keeper(build(config), store_of(config), beside=False)
    older.restore()
    turns = older.run()
    next(turns)
    newer = Keeper(build(config), store_of(config), beside=False)
    newer.restore()
    before = len(memory.broker(BROKER).messages("scores")), store_of(config).ls()
    with pytest.raises(Fenced):
        next(turns)
    assert before == (len(memory.broker(BROKER).messages("scores")), store_of(config).ls())
