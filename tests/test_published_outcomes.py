"""What was learned is told once, in order and by number, for the error memory of read replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors import memory
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.messages import NUMBER, outcome_message, outcome_number, outcome_of
from streamcl.progress import LEAP
from streamcl.protocols import BadInput
from streamcl.records import Encoded, Fate, Learned, Message, Origin, Record
from streamcl.recovery import Keeper, store_of
from streamcl.reshard import carry_out, plan
from streamcl.worker import build
from tests.journey import BROKER, Item, click, die_after, fill, finish, settings, view

URL = f"memory://{BROKER}/outcomes"
MODES = ("at_least_once", "exactly_once")


def traffic(count: int = 24, partitions: int = 1) -> list[Item]:
    """Clicked at once, late, or never; a bad record now and then."""
    items: list[Item] = []
    for id in range(count):
        items.append(view(id, float(id), id % partitions, price=None if id % 4 == 1 else id / 3))
        if id % 3 == 0:
            items.append(click(id, id + (14.0 if id % 4 == 0 else 2.0), id % partitions))
    return [*items, Item("views", b"{", float(count))]


def told(topic: str = "outcomes") -> list[Message]:
    return memory.broker(BROKER).messages(topic)


def numbers(topic: str = "outcomes") -> list[int]:
    return [int(dict(message.headers)[NUMBER]) for message in told(topic)]


def learned_by(config: Config) -> list[Learned]:
    worker = build(config)
    keeper = Keeper(worker, store_of(config), beside=False)
    keeper.restore()
    return [each for turn in keeper.run() for each in turn.learned]


@pytest.mark.parametrize("mode", MODES)
def test_each_learned_outcome_is_told_once_in_order_as_it_was_learned(tmp_path: Path, mode: str) -> None:
    fill(traffic())
    config = settings(tmp_path, outcomes=URL, delivery={"mode": mode})
    learned = learned_by(config)
    assert numbers() == [each.number for each in learned] == list(range(1, len(learned) + 1))
    layout = Featurizer(config).layout
    for message, mine in zip(told(), learned, strict=True):
        same = outcome_of(message.value, layout)
        for one, other in zip(same.features, mine.features, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
        assert same._replace(features=mine.features) == mine
    assert {each.fate for each in learned} == {Fate.JOINED, Fate.EXPIRED}


def test_the_counter_is_state_whether_outcomes_are_told_or_not(tmp_path: Path) -> None:
    fill(traffic())
    silent = finish(settings(tmp_path / "a"))
    fill(traffic())
    telling = finish(settings(tmp_path / "b", outcomes=URL))
    assert silent.digest == telling.digest
    assert telling.worker.progress.outcomes == telling.worker.counts["learned"] == len(told()) > 10


def test_the_size_of_a_poll_changes_no_message(tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 100):
        fill(traffic())
        finish(settings(tmp_path / str(size), outcomes=URL, worker={"max_records": size, "poll_timeout_s": 0.01}))
        found.append([(message.value, message.headers) for message in told()])
    assert found[0] == found[1] == found[2]


def test_a_label_that_is_quarantined_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, outcome, _: outcome.ticket.id != "3" and learn(self, outcome))
    fill([view(id, float(id), clicked=1) for id in range(6)])
    events = {"url": f"memory://{BROKER}/views", "id": "id", "time": "ts", "label": "clicked"}
    eager = {"engine": "eager"}  # a compiled one asks nobody
    done = finish(settings(tmp_path, events=events, labels=None, outcomes=URL, worker=eager))
    assert done.worker.counts["quarantined"] == 1
    assert [(n, json.loads(m.value or b"")["id"]) for n, m in zip(numbers(), told(), strict=True)] == [
        (number, id) for number, id in enumerate("01245", 1)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_behind_a_leap_no_number_comes_again(tmp_path: Path, mode: str) -> None:
    """What the void orders had told stays on the topic, and means something else.

    In exactly-once delivery what was answered in void orders is learned anew in silence: readers see a gap.
    """
    broker = fill(traffic())
    config = settings(tmp_path, outcomes=URL, delivery={"mode": mode}, kafka={"on_gap": "earliest"})
    die_after(config, 5)
    loaded = store_of(config).newest()
    assert loaded is not None
    broker.trim("views", 0, int(loaded.manifest["position"]["events"]["0"]) + 2)
    before = numbers()
    done = finish(config)
    assert done.worker.progress.outcomes > LEAP
    behind = numbers()[len(before) :]
    assert not set(before) & set(behind)
    end = done.worker.progress.outcomes
    assert behind == list(range(end + 1 - len(behind), end + 1))
    assert mode == "exactly_once" or behind[0] == LEAP + loaded.state["progress"]["outcomes"] + 1


def test_each_shard_has_a_topic_and_reshard_repeats_no_number(tmp_path: Path) -> None:
    fill(traffic(40, 4), 4)
    for first, (old, new) in enumerate(((4, 4), (4, 2), (2, 4), (4, 1))):
        config = settings(tmp_path, outcomes=URL, shard={"count": old}, join={"attribution_window_s": 2.0})
        for index in range(old):
            finish(config.of_shard(index))
        carry_out(plan(config, old, new))
        for id in range(100 * first + 100, 100 * first + 140):
            item = view(id, float(id), id % 4)
            memory.broker(BROKER).produce(item.topic, item.value, partition=item.partition, time_s=item.time_s)
    topics = [topic for topic in memory.broker(BROKER).topics() if topic.startswith("outcomes")]
    assert topics == ["outcomes", *(f"outcomes-{index}" for index in range(4))]
    for topic in topics:
        assert numbers(topic) == sorted(set(numbers(topic)))
    assert len(numbers("outcomes-3")) > 20  # before two shards had it, and after


def learned(**changes: Any) -> Learned:
    features = Encoded(np.array([3, 0]), np.array([1.0, 0.0], np.float32), np.array([0.1, np.nan], np.float32))
    base = Learned(7, 9, "é", Origin("events", 1, 5), features, 1.0, Fate.JOINED, 12.5, 0.25)
    return base._replace(**changes)


def layout_of(**features: Any) -> Any:
    data: dict[str, Any] = {"name": "a", "events": {"url": "memory://a/b", "label": "y"}, "features": features}
    return Featurizer(Config.parse(data)).layout


def record(message: Message) -> Record:
    return Record(Origin("outcomes", 0, 0), "outcomes", 0.0, message.value, message.key, message.headers)


def test_a_message_holds_filled_slots_only_and_its_number_in_a_header() -> None:
    message = outcome_message(learned(), 1000)
    assert json.loads(message.value or b"") == {
        "number": 7,
        "records": 9,
        "id": "é",
        "input": "events:1:5",
        "time": 12.5,
        "delay": 0.25,
        "fate": "joined",
        "label": 1.0,
        "slots": [0],
        "ids": [3],
        "weights": [1.0],
        "dense": [0.10000000149011612, None],
    }
    assert (message.key, message.headers) == (None, ((NUMBER, b"7"),))
    assert outcome_number(record(message)) == 7
    assert outcome_number(record(Message(b"{}", headers=((NUMBER, b"x"),)))) is None
    assert outcome_number(record(Message(b"{}"))) is None


def test_an_outcome_that_no_broker_would_take_keeps_its_number_and_has_no_value() -> None:
    message = outcome_message(learned(), 20)
    assert (message.value, outcome_number(record(message))) == (None, 7)
    with pytest.raises(BadInput, match="no outcome"):
        outcome_of(message.value, layout_of(x="numeric"))


BAG = {"kind": "bag", "buckets": 50, "max_items": 3}


@given(
    st.lists(st.lists(st.text(max_size=3), max_size=4) | st.none(), min_size=1, max_size=1),
    st.floats(width=32, allow_nan=False, allow_infinity=False) | st.none(),
)
def test_features_come_back_to_the_bit(bag: list[Any], number: float | None) -> None:
    config = Config.parse(
        {
            "name": "a",
            "events": {"url": "memory://a/b", "label": "y"},
            "features": {"bag": BAG, "x": "numeric", "c": {"kind": "categorical", "buckets": 5}},
        }
    )
    featurizer = Featurizer(config)
    features = featurizer.encode({"bag": bag[0], "x": number})
    same = outcome_of(outcome_message(learned(features=features), 10_000).value, featurizer.layout).features
    for one, other in zip(same, features, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.mark.parametrize(
    "change",
    [
        {"slots": [9]},
        {"slots": [-1]},
        {"ids": [99]},
        {"ids": [1, 2]},
        {"weights": [None]},
        {"dense": []},
        {"dense": ["x", 1]},
        {"input": "events"},
        {"fate": "unknown"},
        {"label": None},
        {"number": []},
    ],
    ids=str,
)
def test_what_is_no_outcome_of_these_features_is_refused(change: dict[str, Any]) -> None:
    layout = layout_of(bag=BAG, x="numeric", z="numeric")
    body = json.loads(outcome_message(learned(), 1000).value or b"")
    assert outcome_of(json.dumps(body).encode(), layout).number == 7
    with pytest.raises(BadInput):
        outcome_of(json.dumps(body | change).encode(), layout)
    for value in (b"", b"{}", b"[]", b"1", b"\xff"):
        with pytest.raises(BadInput):
            outcome_of(value, layout)
