"""A replica's error memory is a pure function of its snapshot and the outcomes after it, whatever happens meanwhile."""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from connectors.codec import JSON
from streamcl import outcomes as module
from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.learner import Learner
from streamcl.messages import NUMBER, outcome_of
from streamcl.outcomes import Memory, Outcomes, first_after
from streamcl.readings import PARTS
from streamcl.records import Fate, Learned, Origin, Stream
from streamcl.recovery import Keeper, store_of
from streamcl.replica import Model, Predictor
from streamcl.testing import difference
from streamcl.worker import build
from tests.journey import BROKER, Item, die_after, fill, finish, settings, view

URL = f"memory://{BROKER}/outcomes"
EVENTS = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}
STACK = [
    {"kind": "key", "key": "user", "lambda": 0.5},
    {"kind": "knn", "key": "hidden", "lambda": 0.7, "capacity": 20, "neighbours": 5},
    {"kind": "sketch", "key": "embedding", "lambda": 0.3, "bits": 4, "arrays": 3},
]
AUTO = [{"kind": "knn", "lambda_half_life_events": 5.0}]
SOURCE = Stream("outcomes", 0)


def config_of(folder: Path, **changes: Any) -> Config:
    """A worker with labels in its events and an error memory, that tells its outcomes."""
    base = {"events": EVENTS, "labels": None, "outcomes": URL, "error_memory": STACK}
    return settings(folder / "checkpoints", **{**base, **changes})


def views(first: int, last: int) -> list[Item]:
    return [view(id, float(id), clicked=float(id % 5 in (1, 2) or id % 7 == 0)) for id in range(first, last)]


def produce(first: int, last: int) -> None:
    for item in views(first, last):
        memory.broker(BROKER).produce(item.topic, item.value, time_s=item.time_s)


def begun(folder: Path, *ends: int, **changes: Any) -> tuple[Config, list[Path]]:
    """A worker that stopped cleanly at each of these events, and a copy of its folder from each stop."""
    fill([])
    config = config_of(folder, **changes)
    copies = []
    for first, last in itertools.pairwise((0, *ends)):
        produce(first, last)
        finish(config)
        copies.append(shutil.copytree(store_of(config).folder, folder / f"at-{last}"))
    return config, [Path(each) for each in copies]


def replica(config: Config, folder: Path, **tuned: Any) -> tuple[Predictor, Outcomes]:
    outcomes = Outcomes(URL, config, **tuned)
    predictor = Predictor(Store(folder), JSON(), outcomes)
    predictor.refresh()
    return predictor, outcomes


def move(predictor: Predictor, folder: Path) -> None:
    """Show the replica another snapshot."""
    predictor.store = Store(folder)
    assert predictor.refresh()


def exhaust(outcomes: Outcomes) -> None:
    while outcomes.step(0.0) and outcomes.read()["outcomes_lag"]:
        pass


def remembered(model: Model | None) -> dict[str, Any]:
    """All of the memory but what the module says lives longer than a snapshot."""
    assert model is not None
    assert isinstance(model.learner, Learner)
    state = copy.deepcopy(model.learner.recall.state_dict())
    for stage in state.values():
        for name in ("counts", "losses", "chosen"):
            del stage[name]
    return state


def oracle(folder: Path, learned: list[Learned]) -> dict[str, Any]:
    """A loop over what was learned after the snapshot, from the beginning."""
    loaded = Store(folder).newest()
    assert loaded is not None
    model = Model.of(loaded, JSON())
    assert isinstance(model.learner, Learner)
    model.learner.recall.renew(model.learner.version)
    for each in learned:
        if each.number > model.outcomes:
            model.learner.recall.observe(model.learner.predict(each.features), each.label)
    return remembered(model)


def told(config: Config) -> list[Learned]:
    """Everything on the topic, each number once."""
    layout = build(config).decoder.featurizer.layout
    found = {each.number: each for each in (outcome_of(m.value, layout) for m in messages()) if each}
    return [found[number] for number in sorted(found)]


def messages() -> list[Any]:
    return memory.broker(BROKER).messages("outcomes")


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not difference(one, other)


def test_a_replica_remembers_what_a_loop_over_the_outcomes_after_its_snapshot_would(tmp_path: Path) -> None:
    config, [first, _] = begun(tmp_path, 20, 45)
    predictor, outcomes = replica(config, first)
    assert predictor.current().outcomes == 20
    exhaust(outcomes)
    same(remembered(predictor.model), oracle(first, told(config)))
    assert outcomes.read().keys() <= PARTS.keys()  # every one has a text for people
    assert outcomes.read() == {
        "outcomes_applied": 25.0,
        "outcomes_lag": 0.0,
        "outcomes_gaps": 0.0,
        "outcomes_repeats": 0.0,
        "outcomes_undecodable": 0.0,
        "outcomes_failures": 0.0,
        "outcomes_away": 0.0,
        "memory_age_outcomes": 25.0,
    }


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_it_does_so_for_every_task(tmp_path: Path, task: str) -> None:
    model = {"kind": "mlp", "hidden": [4], **({"classes": 3} if task == "multiclass" else {})}
    config, [first, _] = begun(tmp_path, 20, 45, task=task, model=model)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    assert (outcomes.applied, outcomes.undecodable) == (25, 0)
    same(remembered(predictor.model), oracle(first, told(config)))


@pytest.mark.parametrize("kept", ["reset", "keep"])
@pytest.mark.parametrize("tail", [20_000, 3], ids=["from the tail", "read again"])
def test_two_replicas_at_the_same_snapshot_and_number_are_the_same_whatever_they_served_before(
    tmp_path: Path, tail: int, kept: str
) -> None:
    stack = [{**stage, "on_new_weights": kept} for stage in STACK]
    config, [first, second, third] = begun(tmp_path, 10, 25, 40, error_memory=stack)
    old, of_old = replica(config, first, tail=tail)
    exhaust(of_old)
    move(old, second)
    exhaust(of_old)
    produce(40, 55)
    finish(config)
    exhaust(of_old)
    move(old, third)
    new, of_new = replica(config, third)
    exhaust(of_new)
    same(remembered(old.model), remembered(new.model))
    same(remembered(old.model), oracle(third, told(config)))
    payload = {"user": 1, "price": 2.0}
    assert old.current().predict(payload) == new.current().predict(payload)
    assert of_old.read()["memory_age_outcomes"] == of_new.read()["memory_age_outcomes"] == 15


def test_with_its_memory_a_new_model_is_complete_before_it_serves(tmp_path: Path) -> None:
    config, [first, second] = begun(tmp_path, 10, 25)
    produce(25, 40)
    finish(config)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    move(predictor, second)
    same(remembered(predictor.model), oracle(second, told(config)))


def test_a_new_snapshot_serves_though_its_memory_can_not_be_read(tmp_path: Path) -> None:
    config, [first, second] = begun(tmp_path, 10, 25)
    predictor, outcomes = replica(config, first, tail=2, patience_s=0.2)
    exhaust(outcomes)
    memory.broker(BROKER).away = lambda topic: topic == "outcomes/0"
    move(predictor, second)
    assert predictor.current().outcomes == 25
    memory.broker(BROKER).away = lambda _: False


def test_a_worker_and_a_replica_under_the_same_weights_remember_the_same(tmp_path: Path) -> None:
    still = {"kind": "sgd", "learning_rate": 1e-40}
    features = {"user": {"kind": "categorical", "buckets": 13}}  # numerics would move their norm
    fill([])
    config = config_of(tmp_path, optimizer=still, features=features, model={"kind": "mlp", "hidden": [4]})
    finish(config)
    start = shutil.copytree(store_of(config).folder, tmp_path / "start")
    produce(0, 40)
    worker = finish(config).worker
    predictor, outcomes = replica(config, Path(start))
    exhaust(outcomes)
    assert isinstance(worker.learner, Learner)
    theirs = worker.learner.recall.state_dict()
    for stage, mine in remembered(predictor.model).items():
        same(
            *(
                {n: v for n, v in form.items() if not n.startswith("owner")}
                for form in (mine["form"], theirs[stage]["form"])
            )
        )


def numbered(numbers: list[int | None]) -> memory.MemorySource:
    broker = fill([])
    broker.create("outcomes")
    for number in numbers:
        broker.produce("outcomes", b"", headers=() if number is None else ((NUMBER, str(number).encode()),))
    return memory.MemorySource({"outcomes": URL})


@effort(max_examples=200, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), max_size=6),
    st.integers(0, 40),
    st.lists(st.integers(0, 60), max_size=4),
    st.sampled_from([1, 4, 1000]),
)
def test_whatever_was_repeated_a_start_is_found_behind_which_every_number_comes_in_order(
    start: int, lives: list[tuple[int, int]], number: int, holes: list[int], near: int
) -> None:
    numbers: list[int | None] = []
    newest = start
    for length, fallen_back in lives:  # a worker repeats what it had told since its snapshot
        newest = max(start, newest - fallen_back)
        numbers += range(newest + 1, newest + 1 + length)
        newest += length
    highest = max((each for each in numbers if each is not None), default=start)
    for hole in holes:
        numbers.insert(min(hole, len(numbers)), None)
    source = numbered(numbers)
    offset = first_after(source, SOURCE, number, near=near)
    highest = max(highest, number) + 3
    numbers += range(newest + 1, highest + 1)  # who has fallen back climbs again
    first = [each for each in dict.fromkeys(numbers[offset:]) if each is not None and each > number]
    assert first == list(range(max(number, start) + 1, highest + 1))


def test_a_start_is_found_with_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = numbered([*range(1, 30_000), *range(2500, 50_000)])
    looks: list[int] = []
    looked = module._numbered

    def look(source: Any, stream: Stream, offset: int, number_of: Any) -> Any:
        looks.append(offset)
        return looked(source, stream, offset, number_of)

    monkeypatch.setattr(module, "_numbered", look)
    for number, most in ((17, 1), (29_000, 2), (2_000_000, 20), (45_000, 20)):
        looks.clear()
        offset = first_after(source, SOURCE, number)
        assert len(looks) <= most
        assert offset >= {17: 1, 29_000: 28_000, 2_000_000: 77_499, 45_000: 71_000}[number]


@effort(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=4), st.booleans())
def test_a_worker_that_died_again_and_again_leaves_a_topic_that_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[int], early: bool
) -> None:
    folder = tmp_path_factory.mktemp("dying")
    config, [first, *_] = begun(folder, 12, 20)
    predictor, outcomes = replica(config, first) if early else (None, None)
    for number, turns in enumerate(deaths):
        produce(20 + 8 * number, 28 + 8 * number)
        die_after(config, turns)
        if outcomes:
            exhaust(outcomes)
    produce(20 + 8 * len(deaths), 60)
    finish(config)
    if predictor is None or outcomes is None:
        predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    assert outcomes.applied == 48
    assert not outcomes.gaps
    same(remembered(predictor.model), oracle(first, told(config)))


@pytest.mark.parametrize("batch", [1, 7])
def test_the_size_of_a_batch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    config, [first, _] = begun(tmp_path, 20, 45)
    monkeypatch.setattr(module, "BATCH", batch)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    same(remembered(predictor.model), oracle(first, told(config)))


def test_a_gap_is_counted_and_the_memory_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, [first, _] = begun(tmp_path, 20, 45)
    memory.broker(BROKER).trim("outcomes", 0, 30)
    with caplog.at_level(logging.WARNING):
        predictor, outcomes = replica(config, first)
        exhaust(outcomes)
    assert outcomes.gaps == 1
    assert "outcomes 21 to 30 are missing" in caplog.text
    same(remembered(predictor.model), oracle(first, told(config)[30:]))


def test_retention_that_overtakes_a_reader_is_a_gap(tmp_path: Path) -> None:
    config, [first, _] = begun(tmp_path, 20, 25)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    produce(25, 45)
    finish(config)
    memory.broker(BROKER).trim("outcomes", 0, 30)
    broker = memory.broker(BROKER)
    broker.away = lambda _: True  # long enough for that
    assert not outcomes.step(0.0)
    broker.away = lambda _: False
    outcomes._retry_at = 0.0
    exhaust(outcomes)
    assert (outcomes.gaps, outcomes.applied) == (1, 20)
    same(remembered(predictor.model), oracle(first, [*told(config)[20:25], *told(config)[30:]]))


def test_what_is_no_outcome_is_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, [first, _] = begun(tmp_path, 20, 30)
    expected = told(config)
    broker = memory.broker(BROKER)
    good = messages()[-1].value.replace(b'"label":0.0', b'"label":7.0').replace(b'"label":1.0', b'"label":7.0')
    broker.produce("outcomes", b"somebody else's")
    for number, value in ((31, b"{"), (32, good), (33, None)):
        broker.produce("outcomes", value, headers=((NUMBER, b"%d" % number),))
    with caplog.at_level(logging.WARNING):
        predictor, outcomes = replica(config, first)
        exhaust(outcomes)
    assert (outcomes.undecodable, outcomes.gaps, outcomes.applied) == (4, 0, 10)
    assert "outcomes:0:30: skipped" in caplog.text
    same(remembered(predictor.model), oracle(first, expected))


def test_while_brokers_are_away_requests_are_answered_and_reading_goes_on_where_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, [first, _] = begun(tmp_path, 20, 30)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    broker = memory.broker(BROKER)
    broker.away = lambda topic: topic == "outcomes/0"
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            outcomes._retry_at = 0.0
            assert not outcomes.step(0.0)
            assert not outcomes.step(0.0)  # backs off
            assert predictor.current().predict({"user": 1})["score"]
    assert caplog.text.count("serving without new outcomes") == 1
    assert (outcomes.failures, outcomes.read()["outcomes_away"]) == (5, 1.0)
    broker.away = lambda _: False
    produce(30, 45)
    finish(config)
    outcomes._retry_at = 0.0
    with caplog.at_level(logging.WARNING):
        exhaust(outcomes)
    assert "outcomes arrive again" in caplog.text
    assert (outcomes.gaps, outcomes.applied, outcomes.read()["outcomes_away"]) == (0, 25, 0.0)
    same(remembered(predictor.model), oracle(first, told(config)))


def test_a_topic_that_does_not_exist_yet_or_has_no_order_is_an_outage(tmp_path: Path) -> None:
    config, [first] = begun(tmp_path, 20)
    outcomes = Outcomes(f"memory://{BROKER}/later", config)
    predictor = Predictor(Store(first), JSON(), outcomes)
    predictor.refresh()
    assert predictor.current().predict({"user": 1})["score"]
    assert outcomes.failures == 1
    memory.broker(BROKER).create("wide", 2)
    outcomes = Outcomes(f"memory://{BROKER}/wide", config)
    predictor = Predictor(Store(first), JSON(), outcomes)
    predictor.refresh()
    assert outcomes.failures == 1


def test_a_model_without_an_error_memory_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, [first] = begun(tmp_path, 20, error_memory=[])

    def opened(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(memory, "open_source", opened)
    predictor, outcomes = replica(config, first)
    assert not outcomes.step(0.0)
    assert predictor.current().memory() is None
    assert predictor.current().predict({"user": 1})["score"]


def test_reading_ends_with_the_model_that_wanted_it(tmp_path: Path) -> None:
    config, [with_memory] = begun(tmp_path / "a", 20)
    predictor, outcomes = replica(config, with_memory)
    exhaust(outcomes)
    _, [without] = begun(tmp_path / "b", 30, error_memory=[])
    move(predictor, without)
    assert outcomes.memory is None
    assert not outcomes.step(0.0)


def test_predicting_changes_no_memory_and_a_memory_changes_what_is_predicted(tmp_path: Path) -> None:
    config, [first, _] = begun(tmp_path, 20, 45)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    before = remembered(predictor.model)
    alone = Predictor(Store(first), JSON())
    alone.refresh()
    payloads = [{"user": user, "price": 1.0} for user in range(5)]
    mine = [predictor.current().predict(payload) for payload in payloads]
    assert mine != [alone.current().predict(payload) for payload in payloads]
    same(remembered(predictor.model), before)


def test_losses_by_which_lambda_is_chosen_outlive_a_snapshot(tmp_path: Path) -> None:
    config, [first, second] = begun(tmp_path, 20, 60, error_memory=AUTO)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    learner = predictor.current().learner
    assert isinstance(learner, Learner)
    before = learner.recall.state_dict()["0"]
    move(predictor, second)
    learner = predictor.current().learner
    assert isinstance(learner, Learner)
    after = learner.recall.state_dict()["0"]
    assert before["losses"].any()
    same({"losses": after["losses"]}, {"losses": before["losses"]})
    assert after["counts"]["reads"] == before["counts"]["reads"]
    same(remembered(predictor.model), oracle(second, []))


def test_requests_and_outcomes_do_not_race(tmp_path: Path) -> None:
    """Every answer is one that the memory gives after some whole number of outcomes, and nothing is lost of it."""
    config, [first, _] = begun(tmp_path, 20, 120)
    learned = [each for each in told(config) if each.number > 20]
    payload = {"user": 1, "price": 2.0}
    quiet, slowly = bare(first)
    possible = {quiet.predict(payload)["score"]}
    for each in learned:
        slowly.take(each)
        possible.add(quiet.predict(payload)["score"])

    busy, quickly = bare(first)
    answers: set[float] = set()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.add(busy.predict(payload)["score"])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for each in learned:
        quickly.take(each)
    over.set()
    for thread in threads:
        thread.join()
    assert answers <= possible
    assert len(answers) > 3
    same(remembered(busy), oracle(first, learned))


def bare(folder: Path) -> tuple[Model, Memory]:
    """The model of the newest snapshot, and its memory, begun."""
    loaded = Store(folder).newest()
    assert loaded is not None
    model = Model.of(loaded, JSON())
    found = model.memory()
    assert found is not None
    found.begin(None)
    return model, found


def test_a_replica_that_follows_by_itself_takes_snapshots_and_outcomes(tmp_path: Path) -> None:
    config, [_] = begun(tmp_path, 20)
    predictor = Predictor(store_of(config), JSON(), Outcomes(URL, config))
    predictor.refresh()
    thread = threading.Thread(target=predictor.follow, args=(0.02,))
    thread.start()
    try:
        produce(20, 60)
        finish(config)
        assert _soon(lambda: predictor.current().outcomes == 60)
        keeper = Keeper(build(config), store_of(config), beside=False)
        keeper.restore()
        produce(60, 65)
        for _turn in zip(range(1), keeper.run(), strict=False):
            keeper.worker.flush()  # and dies: no snapshot says so
        outcomes = predictor.outcomes
        assert outcomes is not None
        assert _soon(lambda: outcomes.read()["memory_age_outcomes"] == 5)
    finally:
        predictor.close()
        thread.join()
    same(remembered(predictor.model), oracle(store_of(config).folder, told(config)))


def _soon(holds: Any) -> bool:
    pause = threading.Event()
    return any(holds() or pause.wait(0.05) for _ in range(200))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    memory.reset(BROKER)


def judged_by(folder: Path, delay_s: float) -> list[float]:
    """Losses of lambda after sessions of four events whose labels come so much after each."""
    stage = {"kind": "key", "key": "user", "half_life_events": 4.0, "shrinkage": 1.0, "lambda_half_life_events": 50.0}
    config, [first] = begun(folder, 20, error_memory=[stage])
    loaded = Store(first).newest()
    assert loaded is not None
    model = Model.of(loaded, JSON())
    assert isinstance(model.learner, Learner)
    taken = Memory(config, model.learner, 0, threading.Lock())
    taken.begin(None)
    number = itertools.count(1)
    for session in range(100):
        events = [
            Learned(
                number=next(number),
                records=0,
                id=f"{session}-{i}",
                origin=Origin("events", 0, 4 * session + i),
                features=model.decoder.featurizer.encode({"user": session % 5, "price": 1.0}),
                label=float(session % 2),
                fate=Fate.JOINED,
                time_s=100.0 * session + i,
                delay_s=delay_s,
            )
            for i in range(4)
        ]
        for each in events:
            taken.take(each)
    losses = model.learner.recall.stages[0].choice.losses
    assert model.learner.recall.read()["error_memory_0_hit_ratio"] > 0.9
    return [float(each) for each in losses]


def test_lambda_is_judged_by_what_was_known_when_the_event_came(tmp_path: Path) -> None:
    """A session's events are of one label, told at once, or 10 s after each. One session tells nothing of the next.

    At once, the memory helps from a session's second event on. Late, it knew nothing of the session when it was asked;
    judged by what it knows when the labels come, it would look as if it had helped.
    """
    at_once, late = (judged_by(tmp_path / str(delay), delay) for delay in (0.0, 10.0))
    assert min(at_once) < at_once[0] - 0.01
    assert min(late) > late[0] - 0.002


def test_an_outcome_judges_lambda_once_whatever_snapshots_come(tmp_path: Path) -> None:
    config, [first, second] = begun(tmp_path, 20, 45, error_memory=AUTO)
    predictor, outcomes = replica(config, first)
    exhaust(outcomes)
    model = predictor.current()
    assert isinstance(model.learner, Learner)
    before = model.learner.recall.stages[0].choice.losses.tobytes()
    move(predictor, second)
    exhaust(outcomes)
    after = predictor.current().learner
    assert isinstance(after, Learner)
    assert after.recall.stages[0].choice.losses.tobytes() == before
