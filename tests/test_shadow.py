"""Other settings beside a live shard: they learn what it takes, touch nothing, and take its place without a gap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from connectors import memory
from streamcl.checkpoint import Store
from streamcl.config import Config, ConfigError
from streamcl.host import FixedShards, Host
from streamcl.promotion import drop, promote
from streamcl.protocols import StreamclError
from streamcl.records import Turn
from streamcl.recovery import Keeper, store_of
from streamcl.shadow import Beginning, Shadow, beside, history
from streamcl.state import digest
from streamcl.telemetry import Telemetry
from tests.journey import BROKER, Item, click, die_after, fill, finish, repeat, settings, view
from tests.test_rollback import back, names


def traffic(count: int, start: int = 0, partitions: int = 1) -> list[Item]:
    items = [view(i, float(i), partition=i % partitions) for i in range(start, count)]
    items += [click(i, i + 0.5, partition=i % partitions) for i in range(start, count, 3)]
    return sorted(items, key=lambda item: item.time_s)


def produce(items: list[Item]) -> None:
    broker = memory.broker(BROKER)
    broker.finished = False
    for item in items:
        broker.produce(item.topic, item.value, partition=item.partition, time_s=item.time_s)
    broker.finish()


def live_of(folder: Path, **changes: Any) -> Config:
    checkpoint = {"folder": str(folder), "every_events": 7, "retain": 50}
    return settings(folder, **({"checkpoint": checkpoint} | changes))


def single_of(folder: Path, **changes: Any) -> Config:
    events = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "y"}
    return live_of(folder, labels=None, events=events, **changes)


def but(config: Config, **changes: Mapping[str, Any]) -> Config:
    data = config.model_dump(mode="json")
    return Config.parse({**data, **{name: {**data[name], **table} for name, table in changes.items()}})


def keeper_of(live: Config, other: Config, from_start: bool = False) -> Keeper:
    shadow = Shadow.open(beside(live, other), live)
    return Keeper(shadow, store_of(shadow.config), bootstrap=Beginning(from_start=from_start), beside=False)


def follow(live: Config, other: Config, from_start: bool = False, turns: int | None = None) -> Shadow:
    """Run a shadow until it stands where the newest live checkpoint does; with `turns` it dies behind so many."""
    keeper = keeper_of(live, other, from_start)
    keeper.restore()
    shadow = keeper.worker
    assert isinstance(shadow, Shadow)
    for turn in islice(keeper.run(), turns):
        if shadow.caught_up and not turn.records:
            shadow.stop()
    if turns is None:
        keeper.close()
    return shadow


def ids() -> list[int]:
    return sorted(int(json.loads(each.value or b"")["id"]) for each in memory.broker(BROKER).messages("scores"))


DEEPER = {"hidden": [5, 3]}
FASTER = {"learning_rate": 0.2}


@pytest.mark.parametrize("partitions", [1, 2])
def test_from_the_start_it_comes_to_what_a_replay_comes_to(tmp_path: Path, partitions: int) -> None:
    live = live_of(tmp_path)
    fill(traffic(60, partitions=partitions), partitions)
    finish(live)
    other = but(live, model=DEEPER)
    shadow = follow(live, other, from_start=True)
    state = shadow.state_dict()
    state["lineage"] = {"facts": []}
    assert digest(state) == repeat(other).digest
    assert ids() == list(range(60))  # the live one's alone


def test_dying_and_waking_it_learns_the_same(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    fill(traffic(60))
    finish(live)
    other = but(live, model=DEEPER)
    whole = digest(follow(live, other, from_start=True).state_dict())
    drop(beside(live, other))
    for turns in (1, 4, 9, 2):
        follow(live, other, from_start=True, turns=turns)
    assert digest(follow(live, other).state_dict()) == whole


def test_it_begins_with_the_live_state_where_that_fits_and_afresh_where_not(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    fill(traffic(30))
    ran = finish(live).worker
    same = follow(live, but(live, optimizer=FASTER))
    assert digest(same.learner.state_dict()) == digest(ran.learner.state_dict())
    assert [fact["begun"] for fact in same.lineage.facts] == ["state"]
    drop(beside(live, live))
    fresh = follow(live, but(live, model=DEEPER))
    assert (fresh.learner.version, fresh.progress.position) == (0, ran.progress.position)
    assert [fact["begun"] for fact in fresh.lineage.facts] == ["afresh"]
    produce(traffic(50, 30))
    finish(live)
    assert follow(live, but(live, model=DEEPER)).counts["predicted"] == 20


def test_the_live_worker_is_not_touched(tmp_path: Path) -> None:
    live = live_of(tmp_path / "a")
    fill(traffic(60))
    alone = finish(live).digest
    fill([])
    watched = live_of(tmp_path / "b")
    for end in (20, 40, 60):
        produce(traffic(end, end - 20))
        finish(watched)
        follow(watched, but(watched, model=DEEPER), from_start=True)
    assert repeat(watched).digest == digest(store_of(watched).load(store_of(watched).ls()[-1].name).state)
    assert alone != ""
    assert ids() == list(range(60))
    assert {name for name in memory.broker(BROKER).topics() if "shadow" in name} == set()


def test_it_is_never_ahead_of_a_live_checkpoint(tmp_path: Path) -> None:
    for live in (live_of(tmp_path), single_of(tmp_path, name="alone")):
        fill(traffic(60) if live.labels else [view(i, float(i), y=i % 2) for i in range(60)])
        die_after(live, 5)
        stood = store_of(live).ls()[-1]
        shadow = follow(live, but(live, model=DEEPER), from_start=True)
        assert shadow.progress.state_dict()["position"] == stood.manifest["position"]
        finish(live)
        after = follow(live, but(live, model=DEEPER))
        assert after.progress.state_dict()["position"] == store_of(live).ls()[-1].manifest["position"]


def test_both_are_compared_at_every_live_checkpoint_on_the_same_labels(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    fill(traffic(30))
    finish(live)
    same = but(live, metrics={"window": 16})
    follow(live, same)  # nothing differs, so that the figures must agree
    produce(traffic(90, 30))
    finish(live)
    follow(live, same)
    pairs = history(beside(live, same))
    stood = dict.fromkeys(each.manifest["records"] for each in store_of(live).ls())
    assert [pair["records"] for pair in pairs] == [records for records in stood if records > 40]
    for pair in pairs:
        assert pair["shadow"] == pair["live"]
        assert pair["live"]["examples_since"] > 0
    pair = pairs[-1]
    start = store_of(live).ls()
    then = next(each.manifest["metrics"] for each in start if each.manifest["records"] == 40)
    now = start[-1].manifest["metrics"]
    losses = now["log_loss"] * now["examples"] - then["log_loss"] * then["examples"]
    assert pair["live"]["log_loss_since"] == pytest.approx(losses / (now["examples"] - then["examples"]))


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("partitions", [1, 2])
def test_promoted_from_the_start_it_goes_on_as_if_it_had_always_been_there(
    tmp_path: Path, delivery: str, partitions: int
) -> None:
    live = live_of(tmp_path, delivery={"mode": delivery})
    other = but(live, model=DEEPER)
    fill(traffic(40, partitions=partitions), partitions)
    finish(live)
    follow(live, other, from_start=True)
    produce(traffic(60, 40, partitions))
    finish(live)  # behind which the shadow has not followed
    told = promote(live, other)
    assert told["records"] == 81
    produce(traffic(90, 60, partitions))
    after = finish(other)
    assert ids() == list(range(90))
    state = after.worker.state_dict()
    state["lineage"] = {"facts": []}
    assert digest(state) == repeat(other).digest
    assert [fact["kind"] for fact in after.worker.lineage.facts] == ["shadow", "promoted"]
    assert not store_of(beside(live, other)).folder.exists()


def test_a_single_stream_without_a_control_log_is_promoted_too(tmp_path: Path) -> None:
    live = single_of(tmp_path)
    other = but(live, model=DEEPER)
    fill([view(i, float(i), y=i % 2) for i in range(40)])
    finish(live)
    follow(live, other, from_start=True)
    promote(live, other)
    produce([view(i, float(i), y=i % 2) for i in range(40, 60)])
    after = finish(other)
    assert ids() == list(range(60))
    state = after.worker.state_dict()
    state["lineage"] = {"facts": []}
    assert digest(state) == repeat(other).digest


def test_wherever_a_promotion_dies_the_same_command_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def dying(*_: Any, **__: Any) -> Any:
        raise RuntimeError("killed")

    places = [
        (Shadow, "follow"),
        (Store, "save"),
        (memory.MemoryControlLog, "append"),
        ("streamcl.promotion", "drop"),
        ("streamcl.promotion.shutil", "rmtree"),
    ]
    digests = set()
    for number, (owner, name) in enumerate(places):
        live = live_of(tmp_path / str(number), delivery={"mode": "exactly_once"})
        other = but(live, model=DEEPER)
        fill(traffic(40))
        finish(live)
        follow(live, other, from_start=True)
        with monkeypatch.context() as patched:
            if isinstance(owner, str):
                patched.setattr(f"{owner}.{name}", dying)
            else:
                patched.setattr(owner, name, dying)
            with pytest.raises(RuntimeError):
                promote(live, other)
        assert promote(live, other)["records"] == 54
        produce(traffic(60, 40))
        after = finish(other)
        assert ids() == list(range(60))
        digests.add(digest(after.worker.parts()["learner"].state_dict()))
        assert not store_of(beside(live, other)).folder.exists()
    assert len(digests) == 1


def test_the_former_settings_can_not_go_on_behind_a_promotion(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    other = but(live, optimizer=FASTER)
    fill(traffic(40))
    finish(live)
    follow(live, other)
    promote(live, other)
    with pytest.raises(ConfigError, match=r"no clean stop wrote: optimizer\.learning_rate"):
        finish(live)
    finish(other)


def test_a_recovery_from_before_a_promotion_stops(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    other = but(live, optimizer=FASTER)
    fill(traffic(40))
    finish(live)
    follow(live, other)
    saved = promote(live, other)["snapshot"]
    folder = store_of(live).folder
    (folder / saved).rename(folder / "lost")
    with pytest.raises(StreamclError, match="a shadow took this shard's place at 54 records"):
        finish(other)
    (folder / "lost").rename(folder / saved)
    finish(other)


def test_outcomes_go_on_in_number_and_records_in_count(tmp_path: Path) -> None:
    live = live_of(tmp_path, outcomes=f"memory://{BROKER}/outcomes")
    other = but(live, model=DEEPER)
    fill(traffic(40))
    before = finish(live).worker.progress
    follow(live, other)  # afresh: it has learned nothing
    promote(live, other, accept_loss=True)
    produce(traffic(60, 40))
    after = finish(other).worker
    numbers = [int(dict(each.headers)["streamcl-number"]) for each in memory.broker(BROKER).messages("outcomes")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == after.progress.outcomes > before.outcomes
    assert after.progress.records == before.records + 27


def test_events_that_wait_for_labels_the_shadow_never_saw_are_not_given_up_unasked(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    other = but(live, model=DEEPER)
    fill(traffic(40))
    finish(live)
    follow(live, other)
    with pytest.raises(StreamclError, match=r"\d+ events wait for their label that came before the shadow began"):
        promote(live, other)
    produce(traffic(60, 40))  # longer than the attribution window
    finish(live)
    promote(live, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "other"}, "name must be the live one's, shop, not other"),
        ({"checkpoint": {"folder": "elsewhere"}}, r"checkpoint\.folder must be"),
        ({"shard": {"count": 2}}, r"control_url must be|shard\.count must be"),
        ({"labels": {"url": f"memory://{BROKER}/sales"}}, "inputs must be"),
    ],
)
def test_what_could_not_take_the_live_ones_place_is_refused(tmp_path: Path, change: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        beside(live_of(tmp_path), live_of(tmp_path, **change))


def test_nobody_goes_back_behind_a_promotion(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    other = but(live, optimizer=FASTER)
    fill(traffic(40))
    finish(live)
    follow(live, other)
    promoted = promote(live, other)["snapshot"]
    produce(traffic(60, 40))
    finish(other)
    with pytest.raises(StreamclError, match="is from before a shadow took this shard's place"):
        back(other, names(other)[0])
    back(other, promoted)
    whole = finish(other)
    store = store_of(other)
    for name in names(other)[names(other).index(promoted) + 1 :]:
        (store.folder / name).rename(store.folder / f"gone-{name}")
    assert finish(other).digest == whole.digest  # from the promoted one on, which is not the one before it


def test_promoting_twice_is_promoting_once(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    other = but(live, model=DEEPER)
    fill(traffic(40))
    finish(live)
    follow(live, other, from_start=True)
    assert promote(live, other) == promote(live, other)


def test_without_a_live_checkpoint_or_a_shadow_there_is_nothing_to_do(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    fill(traffic(10))
    with pytest.raises(StreamclError, match="no checkpoint: a shadow begins where a live shard stands"):
        follow(live, live)
    finish(live)
    with pytest.raises(StreamclError, match="there is no shadow to promote"):
        promote(live, live)


def test_a_shadow_whose_settings_have_changed_is_not_promoted(tmp_path: Path) -> None:
    live = live_of(tmp_path)
    fill(traffic(30))
    finish(live)
    follow(live, but(live, optimizer=FASTER))
    before = [each.digest for each in store_of(live).ls()]
    with pytest.raises(ConfigError, match=r"has not learned with this optimizer\.learning_rate"):
        promote(live, but(live, optimizer={"learning_rate": 0.3}))
    with pytest.raises(ConfigError, match=r"has not learned with this model\.hidden"):
        promote(live, but(live, model=DEEPER, optimizer=FASTER))
    assert [each.digest for each in store_of(live).ls()] == before
    finish(live)


def test_a_live_rollback_leaves_the_shadow_its_own_model(tmp_path: Path) -> None:

    live = live_of(tmp_path)
    other = but(live, model=DEEPER)
    fill(traffic(40))
    finish(live)
    back(live, names(live)[2])
    produce(traffic(60, 40))
    finish(live)
    shadow = follow(live, other, from_start=True)
    assert [fact["kind"] for fact in shadow.lineage.facts] == ["shadow"]
    assert shadow.counts["predicted"] == 60


def test_shards_are_followed_together_by_a_host(tmp_path: Path) -> None:
    live = live_of(tmp_path, shard={"count": 2, "indices": [0, 1]})
    other = but(live, model=DEEPER)
    fill(traffic(60, partitions=2), 2)
    for index in range(2):
        finish(live.of_shard(index))
    one = beside(live, other)
    shadows = one.model_copy(update={"shard": live.shard})
    telemetry = Telemetry(shadows, "shadow")

    def opened(config: Config) -> Shadow:
        return Shadow.open(config, live.of_shard(config.shard.index))

    host = Host(shadows, FixedShards(shadows), telemetry, bootstrap=Beginning(from_start=True), build=opened)
    idle = 0
    for turn in host.run():
        idle = 0 if turn.records else idle + 1
        if idle > 6:
            host.stop()
    assert sum(seat.last.counts["predicted"] for seat in host.seats.values() if seat.last) == 60
    for index in range(2):
        assert history(shadows.of_shard(index))
        promote(live.of_shard(index), other.of_shard(index))
    for index in range(2):
        finish(other.of_shard(index))
    assert ids() == list(range(60))


def test_metrics_stand_side_by_side_by_role(tmp_path: Path) -> None:

    live = live_of(tmp_path)
    fill(traffic(60))
    finish(live)
    shadow = follow(live, but(live, model=DEEPER), from_start=True)
    telemetry = Telemetry(shadow.config, "shadow")
    telemetry.observe(Turn(0, shadow.progress.position), seconds=0.0, lag={}, readings=shadow.readings())
    text = generate_latest(telemetry.registry).decode()
    for role in ("live", "shadow"):
        for window in ("whole", "recent"):
            assert f'streamcl_log_loss{{role="{role}",window="{window}"}}' in text
    assert "streamcl_live_log_loss" not in text
