"""A replica that follows deltas reads what the worker reads, one model at a time, and tells what it misses."""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from connectors.codec import JSON
from streamcl.channel import open_reader, parts
from streamcl.config import Config
from streamcl.delta import served
from streamcl.follow import Follower
from streamcl.learner import Learner
from streamcl.outcomes import Outcomes
from streamcl.records import Delta
from streamcl.recovery import Keeper, store_of
from streamcl.replica import Model, Predictor
from streamcl.state import digest
from streamcl.worker import build
from tests.journey import BROKER, fill, settings, view

SOME = effort(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
PAYLOAD = {"user": 3, "price": 1.5}
EVENTS = {"url": "memory://journey/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}


def config_for(folder: Path, url: str = "memory://journey/deltas", every: int = 4, **changes: Any) -> Config:
    base: dict[str, Any] = {
        "events": EVENTS,
        "labels": None,
        "deltas": {"url": url, "every_events": every},
        "checkpoint": {"folder": str(folder), "every_events": 10, "retain": 2},
    }
    return settings(folder, **{**base, **changes})


class Life:
    """A worker that goes on when told to, and what was to be served behind every record."""

    def __init__(self, config: Config, count: int = 60) -> None:
        self.config = config
        self.broker = fill([view(i, float(i), clicked=i % 2) for i in range(count)])
        self.start()
        self.wanted: dict[int, str] = {}

    def start(self) -> None:
        self.keeper = Keeper(build(self.config), store_of(self.config), beside=False)
        self.keeper.restore()

    def go(self, records: int) -> None:
        """Take records, one by one, as `Keeper.run` does; then all that was sent is there."""
        worker, keeper = self.keeper.worker, self.keeper
        for _ in range(records):
            [record] = worker.source.poll(1, 0.1)
            turn = worker.turn([record])
            worker.outlets.send(turn)
            worker.outlets.send_deltas(turn)
            assert isinstance(worker.learner, Learner)
            self.wanted[worker.progress.records] = digest(served(worker.learner))
            if worker.progress.records % self.config.checkpoint.every_events == 0:
                keeper.save()
        worker.flush()

    @property
    def records(self) -> int:
        return self.keeper.worker.progress.records


def replica(config: Config, outcomes: Outcomes | None = None) -> Predictor:
    follower = Follower(open_reader(config.deltas_url or "", config))
    predictor = Predictor(store_of(config), JSON(), outcomes, follower)
    predictor.refresh()
    return predictor


def read(predictor: Predictor) -> tuple[int, str]:
    """(records, digest of what is served)."""
    model = predictor.current()
    assert isinstance(model.learner, Learner)
    return model.about["records"], digest(served(model.learner))


@pytest.fixture(params=["folder", "topic"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (tmp_path / "deltas").as_uri() if request.param == "folder" else "memory://journey/deltas"


def test_a_replica_is_at_the_newest_delta_without_another_snapshot(url: str, tmp_path: Path) -> None:
    life = Life(config_for(tmp_path, url))
    life.go(13)
    predictor = replica(life.config)
    assert read(predictor) == (12, life.wanted[12])
    first = predictor.current()
    life.go(6)  # a snapshot is cut as well; it is behind no delta that we have
    assert predictor.refresh()
    assert read(predictor) == (16, life.wanted[16])
    assert not predictor.refresh()
    life.go(5)
    assert predictor.refresh()
    assert read(predictor) == (24, life.wanted[24])
    assert predictor.current().snapshot is first.snapshot  # it lies on our way
    assert predictor.current().brief()["version"] == 24
    told = predictor.read()
    assert (told["deltas_applied"], told["deltas_gaps"], told["deltas_foreign"]) == (4, 0, 0)
    assert told["deltas_age_records"] == 0 and told["deltas_applied_bytes"] > 0


@SOME
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.booleans()), max_size=8), st.integers(1, 9))
def test_whatever_is_looked_at_and_whenever_the_worker_dies_the_replica_reads_what_it_read(
    moves: list[tuple[int, bool, bool]], every: int
) -> None:
    """Against the digest that the worker's own learner had behind the same record."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        life = Life(config_for(Path(folder), every=every), 120)
        predictor = replica(life.config)
        for records, look, die in moves:
            life.go(records)
            if die:
                life.start()
            if look:
                predictor.refresh()
                at, found = read(predictor)
                assert at == 0 or found == life.wanted[at]
        life.go(1)
        predictor.refresh()
        assert predictor.follower is not None and predictor.follower.gaps == 0
        at, found = read(predictor)
        furthest = max(life.wanted)  # a worker that has died may not be there again
        assert furthest // every * every <= at <= furthest
        assert at == 0 or found == life.wanted[at]


def test_a_missing_delta_is_a_gap_until_the_next_snapshot(tmp_path: Path, caplog: Any) -> None:
    url = (tmp_path / "deltas").as_uri()
    life = Life(config_for(tmp_path, url))
    life.go(11)
    predictor = replica(life.config)
    life.go(6)
    (tmp_path / "deltas" / f"{12:020d}.delta").unlink()
    predictor.refresh()
    predictor.refresh()
    assert read(predictor)[0] == 10
    assert predictor.read()["deltas_gaps"] == 1 and predictor.read()["deltas_waiting"] == 1
    assert [each.message for each in caplog.records if "is missing" in each.message] == [
        "deltas: what comes before the delta of 16 records is missing; we are at 10; waiting for the next snapshot"
    ]
    life.go(8)
    predictor.refresh()
    assert read(predictor) == (24, life.wanted[24])
    assert predictor.read()["deltas_waiting"] == 0


def test_a_torn_file_is_read_when_it_is_whole(tmp_path: Path) -> None:
    url = (tmp_path / "deltas").as_uri()
    life = Life(config_for(tmp_path, url))
    life.go(10)
    predictor = replica(life.config)
    life.go(7)
    path = tmp_path / "deltas" / f"{12:020d}.delta"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert not predictor.refresh()
    path.write_bytes(whole)
    assert predictor.refresh()
    assert read(predictor) == (16, life.wanted[16])
    assert predictor.read()["deltas_gaps"] == 0


def reordered(config: Config, broker: memory.MemoryBroker, order: list[int], drop: int = 0) -> Config:
    """The deltas of one topic in another, in another order; each loses its last `drop` parts."""
    sent = [message.value or b"" for message in broker.messages("deltas")]
    for n in order:
        cut = parts(Delta((n + 1) * config.deltas.every_events, sent[n]), 1000)
        for message in cut[: len(cut) - drop]:
            broker.produce("other", message.value, key=message.key, headers=message.headers)
    return config.model_copy(update={"deltas": config.deltas.model_copy(update={"url": "memory://journey/other"})})


@pytest.mark.parametrize("order", [[0, 1, 2, 2, 1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3, 3, 4, 4]])
def test_repeated_deltas_are_dropped(tmp_path: Path, order: list[int]) -> None:
    life = Life(config_for(tmp_path, every=2))
    life.go(10)
    first = store_of(life.config).ls()[0].path
    config = reordered(life.config, life.broker, order)
    keep_only(life.config, first.name)
    predictor = replica(config)
    assert read(predictor) == (10, life.wanted[10])
    assert predictor.read()["deltas_gaps"] == 0 and predictor.read()["deltas_applied"] == 5


def keep_only(config: Config, name: str) -> None:
    for snapshot in store_of(config).ls():
        if snapshot.name != name:
            store_of(config)._delete(snapshot.name)


def test_deltas_in_another_order_are_a_gap(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path, every=2))
    life.go(10)
    keep_only(life.config, store_of(life.config).ls()[0].name)
    predictor = replica(reordered(life.config, life.broker, [0, 2, 1, 3, 4]))
    assert read(predictor) == (2, life.wanted[2])
    assert predictor.read()["deltas_gaps"] == 1


def test_a_torn_delta_in_a_topic_is_ignored_and_what_follows_it_a_gap(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path, every=2))
    life.go(10)
    keep_only(life.config, store_of(life.config).ls()[0].name)
    config = reordered(life.config, life.broker, [0])
    reordered(life.config, life.broker, [1], drop=1)
    reordered(life.config, life.broker, [2])
    predictor = replica(config)
    assert read(predictor) == (2, life.wanted[2])
    assert predictor.read()["deltas_gaps"] == 1


def test_deltas_of_another_configuration_are_passed_over(tmp_path: Path, caplog: Any) -> None:
    other = Life(config_for(tmp_path / "other", model={"kind": "deepfm", "embedding_dim": 3, "hidden": [4]}))
    other.go(12)
    foreign = other.broker.messages("deltas")
    life = Life(config_for(tmp_path / "mine"))
    for message in foreign:
        life.broker.produce("deltas", message.value, key=message.key, headers=message.headers)
    life.go(10)
    keep_only(life.config, store_of(life.config).ls()[0].name)
    predictor = replica(life.config)
    assert read(predictor) == (8, life.wanted[8])
    assert predictor.read()["deltas_foreign"] == 3
    assert "another configuration" in caplog.text


def test_a_delta_of_a_newer_format_waits_for_a_snapshot(tmp_path: Path, caplog: Any) -> None:
    url = (tmp_path / "deltas").as_uri()
    life = Life(config_for(tmp_path, url))
    life.go(10)
    predictor = replica(life.config)
    (tmp_path / "deltas" / f"{12:020d}.delta").write_bytes(b'{"streamcl_delta":2,"sha256":""}\n')
    assert not predictor.refresh()
    assert predictor.read()["deltas_waiting"] == 1
    assert "format 2" in caplog.text


def test_another_history_is_left_for_the_newest_snapshot(tmp_path: Path) -> None:
    """A second run under the same name: the chain of checksums shows it, records and configuration don't."""
    url = (tmp_path / "deltas").as_uri()
    life = Life(config_for(tmp_path / "first", url))
    life.go(22)
    predictor = replica(life.config)
    assert read(predictor)[0] == 20
    second = Life(config_for(tmp_path / "second", url))
    second.broker.produce("views", json.dumps({"id": "x", "ts": 0.0, "user": 9, "clicked": 1}).encode())
    for path in (tmp_path / "deltas").iterdir():
        path.unlink()
    second.keeper.worker.learner.learn(outcome_of(second))
    second.go(26)
    assert not predictor.refresh()
    assert predictor.read()["deltas_gaps"] == 1
    second.keeper.save()
    predictor.store = store_of(second.config)
    assert predictor.refresh()
    assert read(predictor) == (26, second.wanted[26])


def outcome_of(life: Life) -> Any:
    """Something that the first life has not learned from."""
    from streamcl.records import Fate, Origin, Outcome, Ticket

    worker = life.keeper.worker
    features = worker.decoder.featurizer.encode({"user": 4, "price": 7.0})
    scores = worker.learner.predict(features)
    return Outcome(Ticket("y", 0.0, features, scores, Origin("events", 0, 0)), 1.0, Fate.INLINE, 0.0)


def test_a_snapshot_that_a_forget_made_due_is_loaded_though_deltas_lead_there(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path))
    life.go(10)
    predictor = replica(life.config)
    life.go(14)
    assert predictor.refresh()
    life.keeper.worker.counts["forget_requests"] += 1
    due = life.keeper.save()
    assert predictor.refresh()
    assert predictor.current().snapshot.name == due.name
    life.go(20)
    assert predictor.refresh()
    assert read(predictor) == (44, life.wanted[44])


def test_a_request_keeps_the_model_that_it_began_with(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path))
    life.go(10)
    predictor = replica(life.config)
    held, answers = [], []
    for _ in range(5):
        held.append(predictor.current())
        answers.append((held[-1].predict(PAYLOAD), read(predictor)))
        life.go(4)
        assert predictor.refresh()
    for model, (answer, (records, wanted)) in zip(held, answers, strict=True):
        assert isinstance(model.learner, Learner)
        assert model.predict(PAYLOAD) == answer
        assert (model.about["records"], digest(served(model.learner))) == (records, wanted)
    assert predictor.read()["deltas_copies"] == 5


def test_a_snapshot_of_a_stream_that_has_stopped_is_loaded_in_the_end(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path))
    life.go(18)
    predictor = replica(life.config)
    life.keeper.save(clean=True)
    assert [predictor.refresh() for _ in range(60)] == [False] * 59 + [True]
    assert read(predictor) == (18, life.wanted[18])


def test_two_learners_are_enough_when_requests_come_and_go(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path))
    life.go(10)
    predictor = replica(life.config)
    learners = set()
    for _ in range(6):
        life.go(4)
        assert predictor.refresh()
        learners.add(id(predictor.current().learner))
    assert len(learners) == 2 and predictor.read()["deltas_copies"] == 1
    assert read(predictor) == (32, life.wanted[32])


def test_no_request_fails_or_sees_half_a_delta_while_many_come(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path, every=1), 60)
    life.go(1)
    predictor = replica(life.config)
    wrong: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            model = predictor.current()
            assert isinstance(model.learner, Learner)
            if digest(served(model.learner)) != life.wanted.get(model.about["records"], "at the start"):
                wrong.append(str(model.about["records"]))
            model.predict(PAYLOAD)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    predictor.refresh()
    for thread in threads:
        thread.start()
    for _ in range(55):
        life.go(1)
        predictor.refresh()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert read(predictor)[0] == 56


MEMORY: list[dict[str, Any]] = [
    {"kind": "knn", "key": "embedding", "lambda": 0.5, "on_new_weights": "reset", "capacity": 50},
    {"kind": "key", "key": "user", "lambda": 0.5, "on_new_weights": "keep"},
]


@pytest.mark.parametrize("stage", MEMORY)
def test_the_error_memory_of_a_delta_is_that_of_the_outcomes_after_it(tmp_path: Path, stage: dict[str, Any]) -> None:
    """None is written twice, and none is forgotten that is to be kept."""
    config = config_for(tmp_path, error_memory=[stage], outcomes="memory://journey/outcomes")
    life = Life(config)
    life.go(10)
    outcomes = Outcomes(config.outcomes_url or "", config)
    predictor = replica(config, outcomes)
    for _ in range(4):
        life.go(5)
        outcomes.step(0.1)
        predictor.refresh()
    model = predictor.current()
    assert read(predictor) == (28, life.wanted[28])
    assert isinstance(model.learner, Learner) and outcomes.memory is not None
    assert outcomes.memory.learner is model.learner and outcomes.memory.number == 30
    if stage["on_new_weights"] == "keep":
        assert predictor.read()["outcomes_applied"] == 20  # each once, whatever weights came
    else:
        assert outcomes.memory.taken == 2


@pytest.mark.parametrize(("policy", "support"), [("keep", True), ("reset", False)])
def test_without_outcomes_a_swap_renews_the_memory(tmp_path: Path, policy: str, support: bool) -> None:
    life = Life(config_for(tmp_path, error_memory=[{**MEMORY[1], "on_new_weights": policy}]))
    life.go(14)
    predictor = replica(life.config)
    learner = predictor.current().learner
    assert isinstance(learner, Learner) and read(predictor)[0] == 12
    encoded = predictor.current().decoder.featurizer.encode(PAYLOAD)
    assert (learner.predict(encoded).recalled[0].support > 0) is support


def test_a_folder_that_is_away_is_told_once_and_serving_goes_on(tmp_path: Path, caplog: Any) -> None:
    life = Life(config_for(tmp_path, (tmp_path / "deltas").as_uri()))
    life.go(10)
    predictor = replica(life.config)
    (tmp_path / "deltas").rename(tmp_path / "elsewhere")
    (tmp_path / "deltas").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not predictor.refresh()
    predictor.current().predict(PAYLOAD)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    memory.reset(BROKER)


def test_a_model_is_one_assignment(tmp_path: Path) -> None:
    life = Life(config_for(tmp_path))
    life.go(10)
    predictor = replica(life.config)
    before = predictor.current()
    life.go(4)
    predictor.refresh()
    after = predictor.current()
    assert isinstance(after, Model) and after is not before and after.lock is not before.lock
    assert after.outcomes == 12 and after.about["position"] == {"events": {"0": 12}}
