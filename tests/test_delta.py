"""Base + deltas = the full snapshot, bit for bit; and what is no delta is not taken for one."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from connectors import memory
from streamcl import delta
from streamcl.config import Config, ConfigError
from streamcl.delta import Change, Newer, Torn, Touched, Unfit, apply, decode, served
from streamcl.learner import Learner
from streamcl.state import digest
from streamcl.testing import check_stateful
from streamcl.worker import build
from tests.journey import Item, click, die_after, fill, finish, repeat, settings, view

SOME = effort(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
DELTAS = {"url": "memory://journey/deltas", "every_events": 4}

ROWS, WIDTH = 12, 3
steps = st.lists(
    st.tuples(st.sampled_from(["update", "admit", "expire", "cut"]), st.sets(st.integers(0, ROWS - 1), max_size=4)),
    max_size=30,
)


class Table:
    """A slow, obvious one: a dict of the rows that there are; all others are fresh."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}
        self.clock = 0.0

    def put(self, id: int) -> None:
        self.clock += 1.0
        self.rows[id] = [self.clock, float(id), -0.0]

    def whole(self) -> dict[int, list[float]]:
        return {id: self.rows.get(id, [0.0] * WIDTH) for id in range(ROWS)}


@SOME
@given(steps, st.integers(0, 29), st.booleans())
def test_a_base_and_every_delta_after_it_are_the_table(steps: Any, start: int, twice: bool) -> None:
    """Whether the base lies at a cut or between two, and however often a delta is applied."""
    table, touched = Table(), Touched()
    deltas: list[tuple[int, dict[int, list[float]], list[int]]] = []
    base, at = table.whole(), 0
    for step, (kind, ids) in enumerate([*steps, ("cut", ())], 1):
        for id in sorted(ids):
            if kind == "expire":
                table.rows.pop(id, None)
            elif kind != "cut":
                table.put(id)
        if ids and kind != "cut":
            note = touched.remove if kind == "expire" else touched.add
            note(torch.tensor(sorted(ids), dtype=torch.int64))
        if kind == "cut":
            deltas.append((step, {i: table.rows[i] for i in touched.rows().tolist()}, touched.gone().tolist()))
            touched.clear()
        if step == start:
            base, at = table.whole(), step
    for end, rows, gone in deltas:
        if end <= at:
            continue
        for _ in range(1 + twice):
            base |= rows | {id: [0.0] * WIDTH for id in gone}
    assert base == table.whole()


def test_touched_rows_survive_being_saved() -> None:
    def touch(touched: Touched, n: int) -> Any:
        (touched.remove if n % 3 == 2 else touched.add)(torch.tensor(sorted({n % 5, 7, n})))
        return touched.rows().tolist(), touched.gone().tolist()

    check_stateful(Touched, touch)


def test_touched_rows_are_bounded_by_the_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "_SPARE", 100)
    touched = Touched()
    for _ in range(1000):
        touched.add(torch.arange(10))
        assert touched._noted <= 110 + 10
    assert touched.rows().tolist() == list(range(10))


def learner_of(config: Config) -> Learner:
    return Learner(config)


def stream(count: int) -> list[Item]:
    return [item for i in range(count) for item in (view(i, float(i)), click(i, i + 0.5, user=i % 3))]


SMALL: dict[str, Any] = {"max_rows": 3, "ttl_s": 4.0, "admission": {"capacity": 28}}
TABLES = {
    "user": {"kind": "categorical", "table": SMALL},
    "id": {"kind": "categorical", "table": {"max_rows": 7, "admission": "all"}},
    "page": {"kind": "categorical", "buckets": 4},
}
"""Whose rows come, go and come again all the time."""
TASKS: list[dict[str, Any]] = [
    {},
    {"task": "regression", "model": {"kind": "mlp", "embedding_dim": 3, "hidden": [4]}},
    {"task": "multiclass", "model": {"kind": "logistic", "classes": 3}},
    {"optimizer": {"kind": "adam"}},
    {"features": {**TABLES, "price": "numeric"}},
    {"features": TABLES, "optimizer": {"kind": "ftrl"}, "worker": {"max_records": 3, "engine": "eager"}},
]


@pytest.mark.parametrize("changes", TASKS)
@SOME
@given(poll=st.integers(1, 30), every=st.integers(1, 9), base=st.integers(0, 60), again=st.booleans())
def test_snapshot_and_deltas_are_the_full_snapshot_of_a_real_worker(
    changes: Any, poll: int, every: int, base: int, again: bool
) -> None:
    """Taken before and behind every record; the base may lie between two cuts."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = {"max_records": poll, "poll_timeout_s": 0.01}
        config = settings(Path(folder), deltas={**DELTAS, "every_events": every}, worker=work, labels=None, **INLINE)
        config = config.model_copy() if not changes else Config.parse({**config.model_dump(mode="json"), **changes})
        fill([view(i, float(i), clicked=i % 2) for i in range(60)])
        worker = build(config)
        snapshots = {0: copy.deepcopy(worker.learner.state_dict())}
        found: list[Change] = []
        wanted: dict[int, str] = {}
        for record in worker.source.poll(60, 0.1):
            turn = worker.turn([record])
            snapshots[worker.progress.records] = copy.deepcopy(worker.learner.state_dict())
            found += [decode(each.data) for each in turn.deltas]
            assert isinstance(worker.learner, Learner)
            wanted[worker.progress.records] = digest(served(worker.learner))
        replica = learner_of(config)
        replica.load_state_dict(snapshots[base])
        assert [each.records for each in found] == list(range(every, 61, every))
        for change in found:
            if change.records > base:
                for _ in range(1 + again):
                    apply(replica, change.state)
                assert digest(served(replica)) == wanted[change.records]


INLINE: dict[str, Any] = {
    "events": {"url": "memory://journey/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}
}


@SOME
@given(st.lists(st.integers(0, 8), max_size=3), st.integers(1, 7), st.integers(1, 9))
def test_poll_size_and_crashes_change_no_delta(deaths: list[int], poll: int, every: int) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = settings(
            Path(folder),
            deltas=DELTAS,
            worker={"max_records": poll, "poll_timeout_s": 0.01},
            checkpoint={"folder": folder, "every_events": every},
        )
        broker = fill(stream(12), 1)
        for turns in deaths:
            die_after(config, turns, "input")
        killed = finish(config, "input")
        sent = [message.value for message in broker.messages("deltas")]
        ends = [decode(value or b"").records for value in sent]
        assert sorted(set(ends)) == [4, 8, 12, 16, 20, 24]
        assert len(set(sent)) == len(set(ends))  # each repeat is the same to the byte
        undisturbed = repeat(config)
        assert killed.digest == undisturbed.digest


def test_a_copy_predicts_as_a_learner_does_whatever_it_knew_before(tmp_path: Path) -> None:
    config = settings(tmp_path, features=TABLES)
    fill(stream(12))
    learner = finish(config).worker.learner
    assert isinstance(learner, Learner) and learner.tables is not None
    copied = learner_of(config)
    for _ in range(2):
        delta.become(copied, learner)
        assert digest(served(copied)) == digest(served(learner))
        copied.tables.put_keys(torch.tensor([copied.tables.first]), torch.tensor([-7]))  # type: ignore[union-attr]


def test_a_delta_with_ids_where_rows_are_hashed_changes_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path, features=TABLES, deltas=DELTAS)
    fill(stream(12))
    worker = finish(config).worker
    assert isinstance(worker.learner, Learner) and worker.deltas
    worker.deltas.touched.add(torch.arange(5))
    state = delta.collect(worker.learner, worker.deltas.touched)
    before = digest(served(worker.learner))
    for keys in (state["rows"]["keys"][:-1], torch.full_like(state["rows"]["keys"], -7)):
        with pytest.raises(Unfit, match="ids of dynamic tables"):
            apply(worker.learner, {**state, "rows": {**state["rows"], "keys": keys}})
    assert digest(served(worker.learner)) == before


def test_a_tombstone_reads_as_a_fresh_row_again(tmp_path: Path) -> None:
    config = settings(tmp_path, deltas=DELTAS)
    fill(stream(12))
    worker = finish(config).worker
    assert isinstance(worker.learner, Learner) and worker.deltas
    fresh = learner_of(config).engine.table
    engine = worker.learner.engine
    gone = (engine.table != fresh).any(1).nonzero().view(-1)[:2]
    assert len(gone) == 2
    worker.deltas.touched.remove(gone)
    state = decode(delta.encode(HEAD, delta.collect(worker.learner, worker.deltas.touched))).state
    apply(worker.learner, state)
    assert torch.equal(engine.table[gone], fresh[gone])


HEAD = {
    "previous": "",
    "fingerprint": "f",
    "since": 0,
    "records": 4,
    "outcomes": 2,
    "position": {"events": {"0": 2}},
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    fill(stream(12))
    finish(settings(tmp_path_factory.mktemp("sealed"), deltas={**DELTAS, "every_events": 24}), "input")
    return memory.broker("journey").messages("deltas")[0].value or b""


def test_a_delta_comes_back_as_it_was(sealed: bytes) -> None:
    change = decode(sealed)
    head = {name: getattr(change, name) for name in HEAD}
    assert delta.encode(head, change.state) == sealed
    assert (change.since, change.records, change.previous) == (0, 24, "")


@effort(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_or_damaged_delta_is_never_read(sealed: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(sealed) - 1))
    cut = data.draw(st.booleans())
    bad = sealed[:at] if cut else sealed[:at] + bytes([sealed[at] ^ data.draw(st.integers(1, 255))]) + sealed[at + 1 :]
    with pytest.raises((Torn, Newer)):
        decode(bad)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]\n", b"null\n", b"7", b'{"streamcl_delta":1}\n', b'{"streamcl_delta":"1"}']
)
def test_what_is_no_delta_is_torn(data: bytes) -> None:
    with pytest.raises(Torn):
        decode(data)


def test_a_newer_format_says_so(sealed: bytes) -> None:
    opening = json.loads(sealed.partition(b"\n")[0])
    newer = json.dumps({**opening, "streamcl_delta": 2}).encode() + b"\nwhatever"
    with pytest.raises(Newer, match="format 2"):
        decode(newer)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"features": {"user": {"kind": "categorical", "buckets": 2}, "price": "numeric"}}, "ids outside"),
        ({"model": {"kind": "deepfm", "embedding_dim": 3, "hidden": [4]}}, "rows of 4 numbers"),
        ({"model": {"kind": "deepfm", "embedding_dim": 2, "hidden": [5]}}, "params"),
    ],
)
def test_a_delta_of_another_model_changes_nothing(sealed: bytes, tmp_path: Path, changes: Any, text: str) -> None:
    learner = learner_of(settings(tmp_path, **changes))
    before = digest(learner.state_dict())
    with pytest.raises(Unfit, match=text):
        apply(learner, decode(sealed).state)
    assert digest(learner.state_dict()) == before


def test_deltas_may_be_switched_on_and_off_between_two_lives(tmp_path: Path) -> None:
    plain = settings(tmp_path, labels=None, **INLINE)
    with_deltas = settings(tmp_path, labels=None, deltas=DELTAS, **INLINE)
    items = [view(i, float(i), clicked=i % 2) for i in range(24)]
    fill(items[:9])
    finish(plain)
    broker = fill(items)
    finish(with_deltas)
    changes = [decode(each.value or b"") for each in broker.messages("deltas")]
    assert [(each.since, each.records) for each in changes] == [(9, 12), (12, 16), (16, 20), (20, 24)]
    fill([*items, view(50, 30.0, clicked=1)])
    assert finish(plain).worker.deltas is None


def test_a_river_model_has_no_deltas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deltas\.url"):
        settings(tmp_path, deltas=DELTAS, river="river.linear_model:LogisticRegression", trust_pickle=True)


def test_without_a_url_nothing_is_noted(tmp_path: Path) -> None:
    fill(stream(3))
    worker = finish(settings(tmp_path)).worker
    assert worker.deltas is None and isinstance(worker.learner, Learner) and worker.learner.engine.watch is None
    assert "deltas" not in worker.state_dict()


def test_fresh_rows_are_those_of_a_fresh_table(tmp_path: Path) -> None:
    engine = learner_of(settings(tmp_path)).engine
    ids = torch.from_numpy(np.array([0, 3, 13], np.int64))
    assert torch.equal(engine.fresh_rows(ids), engine.table[ids])
