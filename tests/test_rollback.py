"""Going back to a checkpoint: the model is what it was, the stream goes on, and every recovery comes to the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from connectors import memory
from streamcl.config import Config, ConfigError
from streamcl.lineage import Lineage
from streamcl.protocols import StreamclError
from streamcl.records import Order, Was
from streamcl.recovery import Keeper, store_of
from streamcl.rollback import _go_back, _load, _relearn
from streamcl.snapshot import Snapshot
from streamcl.standing import standing
from streamcl.state import digest
from streamcl.worker import build
from tests.journey import (
    BROKER,
    COMMANDS_URL,
    Item,
    click,
    die_after,
    fill,
    finish,
    order,
    repeat,
    settings,
    view,
)


def traffic(count: int, start: int = 0) -> list[Item]:
    items = [view(i, float(i)) for i in range(start, count)]
    items += [click(i, i + 0.5) for i in range(start, count, 3)]
    return sorted(items, key=lambda item: item.time_s)


def more(items: list[Item]) -> None:
    broker = memory.broker(BROKER)
    broker.finished = False
    for item in items:
        broker.produce(item.topic, item.value, partition=item.partition, time_s=item.time_s)
    broker.finish()


def back(config: Config, to: str, relearn: bool = False) -> Snapshot:
    with standing(config) as keeper:
        return (_relearn if relearn else _go_back)(keeper, _load(keeper, to))


def learner(config: Config, name: str) -> str:
    return digest(store_of(config).load(name).state["learner"])


def names(config: Config) -> list[str]:
    return [each.name for each in store_of(config).ls()]


def ids() -> list[str]:
    return [json.loads(each.value or b"")["id"] for each in memory.broker(BROKER).messages("scores")]


@pytest.fixture
def several(tmp_path: Path) -> Config:
    """Two inputs, and so a control log."""
    return settings(tmp_path, checkpoint={"folder": str(tmp_path), "every_events": 7, "retain": 30})


@pytest.fixture
def single(tmp_path: Path) -> Config:
    """One input: its own order, no control log."""
    events = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "y"}
    checkpoint = {"folder": str(tmp_path), "every_events": 7, "retain": 9}
    return settings(tmp_path, name="alone", checkpoint=checkpoint, events=events, labels=None)


def test_the_model_is_what_it_was_and_everything_else_stays(several: Config) -> None:
    fill(traffic(30))
    before = finish(several).worker
    target = names(several)[2]
    saved = back(several, target)
    assert learner(several, saved.name) == learner(several, target) != digest(before.learner.state_dict())
    now = store_of(several).load(saved.name).state
    for part in ("progress", "counts", "joiner", "metrics", "drift", "boundaries"):
        assert digest(now[part]) == digest(before.parts()[part].state_dict())
    records = int(store_of(several).load(target).manifest["records"])
    assert now["lineage"]["facts"] == [{"kind": "rollback", "records": before.progress.records, "to": records}]


def test_the_stream_goes_on_and_each_event_is_answered_once(several: Config) -> None:
    fill(traffic(30))
    finish(several)
    back(several, names(several)[2])
    more(traffic(50, 30))
    after = finish(several)
    assert sorted(ids(), key=int) == [str(i) for i in range(50)]
    assert after.worker.counts["learned"] + len(after.worker.joiner.tickets) == 50


def test_a_recovery_from_before_it_and_a_replay_come_to_the_same(several: Config, tmp_path: Path) -> None:
    fill(traffic(30))
    finish(several)
    back(several, names(several)[2])
    more(traffic(50, 30))
    whole = finish(several)
    assert repeat(several).digest == whole.digest  # which has passed the model that is gone back to
    store = store_of(several)
    facts = [each.manifest["lineage"] for each in store.ls()]
    first = next(i for i, told in enumerate(facts) if told)
    shutil.copytree(store.folder, tmp_path / "kept")
    for keep in (1, 2, first - 1):  # from before the model that was gone back to, from it, and from behind it
        for name in names(several)[keep + 1 :]:
            shutil.rmtree(store.folder / name)
        assert finish(several).digest == whole.digest
        shutil.rmtree(store.folder)
        shutil.copytree(tmp_path / "kept", store.folder)


def test_a_model_that_is_nowhere_any_more_is_an_error_and_not_another_state(several: Config) -> None:
    fill(traffic(30))
    finish(several)
    listed = names(several)
    back(several, listed[2])
    store = store_of(several)
    for name in [*listed[:4], *names(several)[len(listed) :]]:
        (store.folder / name).rename(store.folder / f"gone-{name}")
    with pytest.raises(StreamclError, match=r"the model went back to what it was at \d+; that snapshot is gone"):
        finish(several)


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_death_between_the_order_and_the_snapshot_is_answered_by_a_start(several: Config, delivery: str) -> None:
    config = settings(
        several.checkpoint.folder, checkpoint=several.checkpoint.model_dump(mode="json"), delivery={"mode": delivery}
    )
    fill(traffic(30))
    finish(config)
    target = names(config)[2]
    with standing(config) as keeper:
        wanted = _load(keeper, target)
        keeper.store.permit = _die
        with pytest.raises(RuntimeError):
            _go_back(keeper, wanted)
    assert store_of(config).ls()[-1].manifest["lineage"] == []
    more(traffic(50, 30))
    dead = finish(config)
    assert [fact["kind"] for fact in dead.worker.lineage.facts] == ["rollback"]
    assert sorted(ids(), key=int) == [str(i) for i in range(50)]
    assert repeat(config).digest == dead.digest


def _die() -> None:
    raise RuntimeError("killed")


def test_a_worker_that_was_killed_is_first_brought_to_the_end_of_its_log(several: Config) -> None:
    fill(traffic(30))
    die_after(several, 6)
    before = max(each.manifest["records"] for each in store_of(several).ls())
    saved = back(several, names(several)[1])
    assert saved.manifest["records"] > before
    assert saved.manifest["clean"]
    finish(several)
    assert repeat(several).digest == digest(store_of(several).load(names(several)[-1]).state)


def test_twice_and_further_back_is_repeated_too(several: Config) -> None:
    fill(traffic(20))
    finish(several)
    back(several, names(several)[3])
    more(traffic(40, 20))
    finish(several)
    back(several, names(several)[1])
    more(traffic(60, 40))
    whole = finish(several)
    back(several, names(several)[1])  # the same again
    more(traffic(70, 60))
    whole = finish(several)
    assert [fact["kind"] for fact in whole.worker.lineage.facts] == ["rollback"] * 3
    assert repeat(several).digest == whole.digest


def test_without_a_control_log_the_fact_stands_in_the_snapshot(single: Config) -> None:
    fill([view(i, float(i), y=i % 2) for i in range(30)])
    finish(single)
    target = names(single)[1]
    saved = back(single, target)
    assert learner(single, saved.name) == learner(single, target)
    more([view(i, float(i), y=i % 2) for i in range(30, 50)])
    after = finish(single)
    assert after.worker.lineage.facts[0]["kind"] == "rollback"
    assert sorted(ids(), key=int) == [str(i) for i in range(50)]


def test_without_a_control_log_a_death_must_be_accepted(single: Config) -> None:
    fill([view(i, float(i), y=i % 2) for i in range(30)])
    die_after(single, 3)
    with pytest.raises(ConfigError, match="not that of a clean stop, and without a control log nobody knows"):
        back(single, names(single)[0])


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_relearning_comes_to_what_the_settings_would_have_learned(several: Config, single: Config, rate: float) -> None:
    for config, items in (
        (several, traffic(40)),
        (single, [view(i, float(i), y=i % 2) for i in range(40)]),
    ):
        fill(items)
        finish(config)
        target = names(config)[1]
        loaded = store_of(config).load(target)
        data: dict[str, Any] = config.model_dump(mode="json")
        changed = Config.parse({**data, "optimizer": {**data["optimizer"], "learning_rate": rate}})
        back(changed, target, relearn=True)
        again = finish(changed)
        assert sorted(ids(), key=int) == [str(i) for i in range(40)]  # what was answered is not answered again
        # As if the settings had been changed at that snapshot.
        worker = build(changed)
        worker.load_state_dict(loaded.state)
        worker.source.seek(worker.progress.position)
        if worker.control:
            worker.control.open()
            worker.control_offset = int(loaded.manifest["control_offset"])
        for _ in worker.run():
            pass
        for part in ("learner", "joiner", "counts", "metrics"):
            assert digest(again.worker.parts()[part].state_dict()) == digest(worker.parts()[part].state_dict())
        assert again.worker.progress.learned == worker.progress.learned


def test_a_death_while_relearning_learns_again_and_answers_nothing(several: Config) -> None:
    fill(traffic(40))
    finish(several)
    back(several, names(several)[1], relearn=True)
    die_after(several, 3)
    more(traffic(60, 40))
    whole = finish(several)
    assert sorted(ids(), key=int) == [str(i) for i in range(60)]
    assert whole.worker.lineage.facts[0]["kind"] == "relearn"


def test_what_is_not_there_and_another_model_are_refused(several: Config, tmp_path: Path) -> None:
    with pytest.raises(StreamclError, match="there is no checkpoint"):
        back(several, "0000000001-0")
    fill(traffic(20))
    finish(several)
    with pytest.raises(StreamclError, match=r"no snapshot 7; there are 0000000001-0, "):
        back(several, "7")
    before = [each.digest for each in store_of(several).ls()]
    data = several.model_dump(mode="json")
    other = Config.parse({**data, "model": {**data["model"], "hidden": [5]}})
    with pytest.raises(ConfigError, match=r"model\.hidden changed"):
        back(other, names(several)[0])
    assert [each.digest for each in store_of(several).ls()] == before


def test_a_forget_leaves_nothing_to_go_back_to(tmp_path: Path) -> None:
    config = settings(
        tmp_path, commands=COMMANDS_URL, checkpoint={"folder": str(tmp_path), "every_events": 1000, "retain": 9}
    )
    fill([*traffic(20), order("r1", 21.0, key="3")])
    keeper = Keeper(build(config), store_of(config), beside=False)
    keeper.restore()
    for _, _turn in zip(range(2), keeper.worker.run(), strict=False):  # without its keeper: nothing is saved or retired
        pass
    for _turn in keeper.worker.run():
        pass
    with pytest.raises(StreamclError, match="no snapshot 0000000001-0; there are"):
        back(config, "0000000001-0")


def test_a_lineage_left_out_of_the_snapshot_would_be_noticed(several: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(traffic(30))
    finish(several)
    back(several, names(several)[2])
    monkeypatch.setattr(Lineage, "load_state_dict", lambda *_: None)
    assert finish(several).digest != repeat(several).digest


def test_orders_say_it_and_old_ones_read_as_ever() -> None:
    went = Order((), {}, was=Was(17, 4))
    assert Order.from_json(json.loads(json.dumps(went.to_json()))) == went
    promoted = Order((), {}, promoted="ab")
    assert Order.from_json(json.loads(json.dumps(promoted.to_json()))) == promoted
    assert Order.from_json({"runs": [], "position": {}}) == Order((), {})
    lineage = Lineage()
    lineage.load_state_dict({})
    assert lineage.facts == []
