"""History is learned from and not answered; the handover stands at one position, whatever dies on either side of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl.bootstrap import Bootstrap, Past
from streamcl.messages import NUMBER
from streamcl.protocols import StreamclError
from streamcl.records import Stream
from streamcl.recovery import Keeper, store_of
from streamcl.testing import check_source
from streamcl.worker import build
from tests.journey import BROKER, Item, click, fill, finish, repeat, settings, shuffled, view


def traffic(first: int, last: int) -> list[Item]:
    """Events `first` to `last`, each third of them clicked."""
    ids = range(first, last)
    return [item for id in ids for item in (view(id, float(id)), *([click(id, id + 2.0)] if id % 3 == 0 else []))]


def append(items: list[Item], partitions: int = 1) -> None:
    for item in items:
        memory.broker(BROKER).produce(item.topic, item.value, partition=item.partition % partitions, time_s=item.time_s)


def answered(messages: list[Any]) -> list[int]:
    return sorted(int(json.loads(message.value)["id"]) for message in messages)


def state_but_the_handover(worker: Any) -> Any:
    state = worker.state_dict()
    del state["progress"]["publish_from"]
    return state


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
@effort(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), st.booleans()), max_size=3))
def test_what_the_topics_held_is_learned_from_and_not_answered(
    tmp_path_factory: pytest.TempPathFactory, mode: str, fuses: list[tuple[int, bool]]
) -> None:
    outcomes = f"memory://{BROKER}/outcomes"
    config = settings(tmp_path_factory.mktemp("a"), delivery={"mode": mode}, outcomes=outcomes)
    broker = fill(traffic(0, 20))
    worker = build(config)
    Keeper(worker, store_of(config), bootstrap=Bootstrap()).restore()  # and dies at once
    assert worker.progress.publish_from == {Stream("events", 0): 20}
    append(traffic(20, 40))
    for life, (appends, keep) in enumerate(fuses):
        broker.fail_after(appends, keep=keep)
        try:
            finish(config, shuffled(life), Bootstrap())
        except memory.Crash:
            continue
        break
    broker._fuse = None
    done = finish(config)
    assert set(answered(done.scores)) == set(range(20, 40))
    told = {int(dict(message.headers)[NUMBER]) for message in broker.messages("outcomes")}
    assert told == set(range(min(told), done.worker.progress.outcomes + 1))  # of the live part, without a hole
    assert min(told) > 1
    assert done.worker.counts["predicted"] == 40
    assert not done.worker.progress.bootstrapping()
    undisturbed = repeat(config).worker
    assert state_but_the_handover(done.worker).keys() == state_but_the_handover(undisturbed).keys()
    assert done.worker.progress.learned == undisturbed.progress.learned


def test_a_recording_is_learned_before_the_live_inputs_and_published_is_the_live_part(tmp_path: Path) -> None:
    fill(traffic(20, 40))
    broker = memory.broker(BROKER)
    for item in traffic(0, 20):
        broker.produce(f"old-{item.topic}", item.value, time_s=item.time_s)
    config = settings(tmp_path, outcomes=f"memory://{BROKER}/outcomes")

    def history() -> memory.MemorySource:
        return memory.MemorySource({n: f"memory://{BROKER}/old-{t}" for n, t in HISTORY})

    done = finish(config, bootstrap=Bootstrap(history))
    assert answered(done.scores) == list(range(20, 40))
    assert done.worker.counts["predicted"] == 40
    assert done.worker.progress.position == {Stream("events", 0): 20, Stream("labels", 0): 7}

    told = [int(dict(message.headers)[NUMBER]) for message in broker.messages("outcomes")]
    assert told == list(range(told[0], done.worker.progress.outcomes + 1))
    assert told[0] > 1

    fill(traffic(0, 40))
    whole = finish(settings(tmp_path / "whole"))
    assert done.worker.counts == whole.worker.counts  # no ticket of the recording is lost at the handover


HISTORY = (("events", "views"), ("labels", "clicks"))


def test_being_stopped_in_a_recording_keeps_nothing(tmp_path: Path) -> None:
    fill(traffic(0, 20))
    config = settings(tmp_path)
    worker = build(config)
    worker.stop()
    bootstrap = Bootstrap(lambda: memory.MemorySource(config.inputs))
    with pytest.raises(StreamclError, match="nothing was kept"):
        Keeper(worker, store_of(config), bootstrap=bootstrap).restore()
    assert store_of(config).ls() == []


def test_the_past_keeps_the_contract_of_a_source() -> None:
    fill(traffic(0, 9))
    urls = {name: f"memory://{BROKER}/{topic}" for name, topic in HISTORY}
    check_source(lambda: Past(memory.MemorySource(urls)), count=12)
    assert Past(memory.MemorySource(urls)).streams() == [Stream("events", -1), Stream("labels", -1)]
