"""Dynamic tables beside an obvious model of them: dicts, and one list in the order of learning."""

import copy
import math
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamcl.config import Config, ConfigError
from streamcl.engine import table_rows
from streamcl.engine.tables import GENERATIONS, DynamicTables, bookkeeping
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.random import bits, key_of, normal_array
from streamcl.records import EVENTS, Encoded, Event, Fate, Origin, Outcome, Scores, Selector, Ticket
from streamcl.state import digest
from streamcl.testing import check_stateful
from tests.test_engine_fused import furthest

MANY = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
SOME = settings(MANY, max_examples=20)
REFUSING = -1.0
"""A norm that no gradient stays below."""
NOTHING = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)


def config(user: Any, tags: Any = None, engine: str = "eager", **more: Any) -> Config:
    """A user with a dynamic table, a bag of tags with another or a hashed one, a hashed field, and a number."""
    features = {
        "user": {"kind": "categorical", "table": user},
        "tags": {"kind": "bag", "max_items": 3, **({"buckets": 5} if tags is None else {"table": tags})},
        "page": {"kind": "categorical", "buckets": 4},
        "price": {"kind": "numeric", "scale": "none"},
    }
    data = {"name": "t", "events": {"url": "memory://a/b", "label": "y", "key": "user"}, "features": features}
    model = {"kind": "fm", "embedding_dim": 2, "hidden": [3], "dtype": "float64", **more.pop("model", {})}
    return Config.parse({**data, "model": model, "worker": {"engine": engine}, **more})


def outcome(made: Config, payload: dict[str, Any], time_s: float, offset: int = 0) -> Outcome:
    features = Featurizer(made).encode(payload)
    key = str(payload.get("user", ""))
    ticket = Ticket(str(offset), time_s, features, NOTHING, Origin(EVENTS, 0, offset), "", key)
    return Outcome(ticket, float(offset % 2), Fate.INLINE, 0.0)


class Model:
    """What the spec says, of one table, for people to read. No filter: it counts in dicts."""

    def __init__(self, table: Any, room: int) -> None:
        self.table, self.room = table, room
        self.rows: dict[str, list[float]] = {}  # id -> [count, first seen, last seen], learned longest ago first
        self.places: list[str | None] = []  # as the table lies in memory
        self.free: list[int] = []
        generations = GENERATIONS.get(table.admission.kind, 1)
        self.span = math.ceil(table.admission.capacity / generations)
        self.past: deque[Counter[str]] = deque([Counter()], maxlen=generations)
        self.clock, self.hand, self.quota = -math.inf, 0, 0
        self.told: Counter[str] = Counter()

    def seen_before(self, id: str) -> int:
        return sum(generation[id] for generation in self.past)

    def earns(self, id: str) -> Any:
        kind = self.table.admission.kind
        return kind == "all" or self.seen_before(id) + 1 >= self.table.admission.threshold

    def old(self, id: str, now: float) -> Any:
        return bool(self.table.ttl_s is not None and now - self.rows[id][2] > self.table.ttl_s)

    def learn(self, ids: list[str], time_s: float) -> None:
        now = self.clock = max(self.clock, time_s)
        new: list[tuple[str, int]] = []
        gone: list[int] = []  # in order; a place is free once the event is over
        for id in ids:
            if id in self.rows:
                if not self.old(id, now) or len(self.rows) <= self.table.min_keep:
                    continue
                gone.append(self.places.index(id))
                self.places[gone[-1]] = None
                del self.rows[id]
                self.told["ttl"] += 1
            if self.earns(id):
                if self.table.full == "refuse" and len(self.rows) >= self.table.max_rows:
                    self.told["refused"] += 1
                    continue
                self.rows[id] = [0, now, now]
                new.append((id, self.take(id)))
                self.told["admitted"] += 1
        for id in ids:
            self.told["asked"] += 1
            if id not in self.rows:
                self.told["oov"] += 1
                self.count(id)
                continue
            self.told["found"] += self.rows[id][0] > 0
            row = self.rows.pop(id)
            self.rows[id] = [row[0] + 1, row[1], now]
        self.free += gone
        while len(self.rows) > self.table.max_rows:
            self.drop(next(iter(self.rows)), "lru")
        self.pass_on(now)

    def take(self, id: str) -> int:
        if self.free:
            place = self.free.pop()
            self.places[place] = id
        else:
            place = len(self.places)
            self.places.append(id)
        return place

    def count(self, id: str) -> None:
        if self.table.admission.kind in GENERATIONS:
            self.past[-1][id] += 1
            if self.past[-1].total() == self.span:
                self.past.append(Counter())

    def drop(self, id: str, reason: str) -> None:
        place = self.places.index(id)
        self.places[place] = None
        self.free.append(place)
        del self.rows[id]
        self.told[reason] += 1

    def pass_on(self, now: float) -> None:
        if self.table.ttl_s is None or not self.places:
            return
        for _ in range(self.table.sweep):
            if self.hand >= len(self.places):
                self.hand = 0
            if self.hand == 0:
                self.quota = math.ceil(self.table.max_evict_ratio * len(self.rows))
            id = self.places[self.hand]
            self.hand += 1
            if id and self.old(id, now) and len(self.rows) > self.table.min_keep and self.quota:
                self.quota -= 1
                self.drop(id, "ttl")


def rows_of(tables: DynamicTables, made: Config, t: int, ids: list[str]) -> list[tuple[str, float, float, float]]:
    """(id, count, first seen, last seen) of a table, learned longest ago first."""
    of, encoder, field = tables.of, Featurizer(made), tables.names[t]
    names = {encoder.encode({field: [id] if field == "tags" else id}).ids.min(): id for id in ids}
    found, row = [], int(of.oldest[t])
    while row >= 0:
        found.append((names[of.keys[row]], of.count[row], of.first_seen[row], of.last_seen[row]))
        row = int(of.newer[row])
    assert len(found) == of.used[t] == (of.keys[of.base[t] : of.base[t] + of.room[t]] != 0).sum()
    return found


IDS = [f"i{n}" for n in range(9)]
ADMISSIONS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["count", "bloom", "all"]),
        "threshold": st.integers(1, 4),
        "capacity": st.sampled_from([14, 40, 1000]),
        "error": st.just(1e-9),  # of so few ids none is taken for another
    }
)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    most = draw(st.integers(3, 8))
    return {
        "max_rows": most,
        "admission": draw(ADMISSIONS),
        "ttl_s": draw(st.sampled_from([None, 3.0, 10.0])),
        "sweep": draw(st.integers(1, 5)),
        "min_keep": draw(st.integers(0, most)),
        "max_evict_ratio": draw(st.sampled_from([0.2, 0.5, 1.0])),
        "full": draw(st.sampled_from(["evict_lru", "refuse"])),
    }


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["learn"] * 6 + ["predict", "wild", "save"]),
        st.sampled_from([None, *IDS]),
        st.lists(st.sampled_from(IDS), max_size=3),
        st.sampled_from([0.0, 0.0, 1.0, 2.0, 7.0, -3.0]),
    ),
    max_size=60,
)


@MANY
@given(tables(), tables(), OPERATIONS)
def test_any_sequence_of_events_leaves_the_rows_that_the_model_has(user: Any, tags: Any, operations: Any) -> None:
    """Predicting, and events that can't be learned, change nothing; a resumed life is the same life."""
    made = config(user, tags, optimizer={"kind": "sgd"})
    learner = Learner(made)
    models = [Model(made.features["tags"].table, 3), Model(made.features["user"].table, 1)]  # type: ignore[union-attr]
    time_s = 0.0
    for offset, (what, who, those, ahead) in enumerate(operations):
        time_s += ahead
        payload = {"user": who, "tags": those, "price": 1.0}
        item = outcome(made, payload, time_s, offset)
        before = digest(learner.state_dict()) if what != "learn" else ""
        if what == "predict":
            learner.predict(item.ticket.features)
        elif what == "save":
            learner = resumed(learner, made)
        else:
            learner.engine.max_grad_norm = REFUSING if what == "wild" else 1e4
            assert learner.learn(item) == (what == "learn")
        if what != "learn":
            assert digest(learner.state_dict()) == before
            continue
        for model, ids in zip(models, (those, [who] if who else []), strict=True):
            model.learn(ids, time_s)
        held = learner.tables
        assert held is not None
        for t, model in enumerate(models):
            rows = [(id, *row) for id, row in model.rows.items()]
            assert rows_of(held, made, t, IDS) == rows
            names = "admitted", "ttl", "lru", "forget", "refused", "asked", "found", "oov"
            assert dict(zip(names, held.of.told[t].tolist(), strict=True)) == {n: model.told[n] for n in names}
            assert int(held.of.high[t]) == len(model.places) <= int(held.of.room[t])


def resumed(learner: Learner, made: Config) -> Learner:
    other = Learner(made)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    return other


def resolved(learner: Learner, features: Encoded) -> tuple[list[int], list[float]]:
    assert learner.tables is not None
    rows, weights = learner.tables.resolve(*(torch.from_numpy(each) for each in features[:2]))
    return rows.tolist(), weights.tolist()


def learned(made: Config, *payloads: dict[str, Any]) -> Learner:
    learner = Learner(made)
    for offset, payload in enumerate(payloads):
        assert learner.learn(outcome(made, {"price": 1.0, **payload}, float(offset), offset))
    return learner


def test_before_its_admission_an_id_adds_nothing_and_learns_nothing() -> None:
    made = config({"admission": {"kind": "count", "threshold": 3}}, model={"kind": "deepfm"})
    learner = learned(made, {"user": "a"}, {"user": "a"})
    encoder = Featurizer(made)
    features = encoder.encode({"user": "a", "price": 1.0})
    (slot,) = np.flatnonzero(features.ids < 0)
    empty = features._replace(
        weights=np.where(np.arange(len(features.ids)) == slot, 0.0, features.weights).astype("f4")
    )
    assert learner.predict(features).output == learner.predict(empty).output
    assert resolved(learner, features)[1][slot] == 0.0
    assert not learner.engine.table[learner.tables.first :].any()  # type: ignore[union-attr]
    assert learner.learn(outcome(made, {"user": "a", "price": 1.0}, 2.0))
    assert learner.predict(features).output != learner.predict(empty).output


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam", "ftrl"])
def test_a_row_that_comes_back_begins_as_it_began(rule: str) -> None:
    """Vector and optimiser state: what another has learned in its place is gone."""
    made = config(
        {"max_rows": 1, "admission": "all"}, optimizer={"kind": rule, "l1": 1e-3, "l2": 1e-3}, model={"kind": "mlp"}
    )
    learner = Learner(made)
    assert learner.tables is not None
    begun: dict[str, list[torch.Tensor]] = {}
    for who in "abcabac":
        item = outcome(made, {"user": who}, 0.0)
        learner.tables.admit(item.ticket.features, 0.0)
        (row,) = [row for row in resolved(learner, item.ticket.features)[0] if row >= learner.tables.first][:1]
        columns = learner.engine.table, *learner.engine.row_slots
        now = [column[row].clone() for column in columns]
        assert all(torch.equal(*pair) for pair in zip(now, begun.setdefault(who, now), strict=True))
        torch.testing.assert_close(now[1:], [slot[0] for slot in learner.engine.row_update.slots(now[0][None])])
        learner.tables.retract()
        assert learner.learn(item)
    assert not torch.equal(begun["a"][0], begun["b"][0])


def test_the_first_vector_is_drawn_by_seed_table_and_id() -> None:
    made = config({"admission": "all"}, seed=7, model={"kind": "deepfm", "init_scale": 0.5})
    learner = Learner(made)
    features = Featurizer(made).encode({"user": "a"})
    assert learner.tables is not None
    learner.tables.admit(features, 0.0)
    [row] = [row for row in resolved(learner, features)[0] if learner.tables.first <= row < learner.tables.of.void]
    key = bits(key_of(7, "table.user"), int(features.ids.min()) % (1 << 64))
    assert learner.engine.table[row].numpy() == pytest.approx([0.0, *(0.5 * normal_array(key, 2))], rel=1e-12)


def test_a_replayed_row_whose_id_has_lost_its_row_reads_zero_and_does_not_bring_it_back() -> None:
    replay = {"retention": "recency", "capacity": 8, "per_event": 4}
    made = config({"max_rows": 1, "admission": "all"}, replay=replay)
    learner = learned(made, {"user": "a"}, {"user": "b"})
    for n in range(5):
        assert learner.learn(outcome(made, {"user": "b", "price": 1.0}, 2.0 + n))
    assert {row[0] for row in rows_of(learner.tables, made, 0, ["a", "b"])} == {"b"}  # type: ignore[arg-type]
    ids, weights, _, _ = learner.memory.examples(torch.tensor([0]))
    assert resolved(learner, Encoded(ids[0].numpy(), weights[0].numpy(), np.zeros(0, np.float32)))[1][-1] == 0.0


def test_ids_by_chance_are_in_after_about_their_threshold() -> None:
    """95 % after `threshold` occurrences: within four deviations of 400 draws; the same for the same seed."""
    policy = {"kind": "probabilistic", "threshold": 3}
    made = config({"admission": policy}, model={"kind": "logistic"})
    visits = [{"user": f"u{n}"} for _ in range(3) for n in range(400)]
    in_by_now = learned(made, *visits).read()["table:user:rows"]
    assert abs(in_by_now / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)
    assert learned(made, *visits).read()["table:user:rows"] == in_by_now


def test_the_filter_lets_ids_in_early_as_rarely_as_was_asked_and_never_late() -> None:
    policy = {"kind": "bloom", "threshold": 2, "capacity": 2000, "error": 0.05}
    made = config({"admission": policy}, model={"kind": "logistic"})
    learner = learned(made, *({"user": f"u{n}"} for n in range(2000)))
    early = learner.read()["table:user:admitted"]
    assert early / 2000 < 0.05
    assert learned(made, {"user": "a"}, {"user": "a"}).read()["table:user:admitted"] == 1


def test_a_budget_of_bytes_is_kept() -> None:
    admission = {"kind": "count", "threshold": 1, "capacity": 100}
    made = config({"max_bytes": 20_000, "admission": admission}, model={"kind": "deepfm", "dtype": "float32"})
    told = learned(made, *({"user": f"u{n}"} for n in range(500))).read()
    assert 15_000 < told["table:user:bytes"] <= 20_000
    assert told["table:user:rows"] < 400 and told["table:user:evicted:lru"] == 500 - told["table:user:rows"]
    with pytest.raises(ConfigError, match=r"features\.user\.table\.max_bytes: 100 bytes are too few"):
        Learner(config({"max_bytes": 100}))


def test_the_bytes_of_a_row_are_those_that_its_arrays_have() -> None:
    of = Learner(config({"max_rows": 1 << 12})).tables.of  # type: ignore[union-attr]
    rows = len(of.keys)
    arrays = of.keys, of.count, of.first_seen, of.last_seen, of.newer, of.older, of.free, of.cells
    assert sum(array.nbytes for array in arrays) / rows <= bookkeeping() + 1


def test_a_full_table_that_refuses_keeps_what_it_has() -> None:
    made = config({"max_rows": 2, "admission": "all", "full": "refuse"})
    learner = learned(made, *({"user": f"u{n % 5}"} for n in range(20)))
    told = learner.read()
    assert [row[0] for row in rows_of(learner.tables, made, 0, ["u0", "u1"])] == ["u0", "u1"]  # type: ignore[arg-type]
    assert (told["table:user:rows"], told["table:user:evicted:lru"], told["table:user:refused"]) == (2, 0, 12)
    assert told["table:user:oov_ratio"] == 12 / 20 and told["table:user:hit_ratio"] == 6 / 20


def test_forgetting_a_key_takes_the_row_of_its_own_with_it() -> None:
    made = config({"admission": "all"})
    learner = learned(made, {"user": "a"}, {"user": "b"})
    noted: list[int] = []
    learner.engine.watch = lambda rows: noted.extend(rows.tolist())
    assert learner.forget(Selector(key="a"))["tables"] == 1
    assert learner.forget(Selector(key="a"))["tables"] == learner.forget(Selector(key="b", until_s=9.0))["tables"] == 0
    assert [row[0] for row in rows_of(learner.tables, made, 0, ["a", "b"])] == ["b"]  # type: ignore[arg-type]
    assert len(noted) == 1 and not learner.engine.table[noted].any()


def test_a_state_is_saved_and_resumed_to_the_bit() -> None:
    made = config(
        {"max_rows": 3, "ttl_s": 4.0, "admission": {"capacity": 20}},
        {"max_rows": 4, "admission": {"kind": "probabilistic"}},
        replay={"retention": "recency", "capacity": 8, "per_event": 2},
    )

    def exercise(learner: Learner, n: int) -> Any:
        payload = {"user": f"u{n * n % 7}", "tags": [f"t{n % 3}", f"t{n % 5}"], "price": 1.0}
        item = outcome(made, payload, float(n), n)
        return learner.learn(item), learner.predict(item.ticket.features).output

    check_stateful(lambda: Learner(made), exercise)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        ({"table": "fast"}, "features.user.table: 'fast' is no table"),
        ({"table": {"max_row": 3}}, "features.user.table.max_row: unknown key; did you mean 'max_rows'"),
        ({"table": {"max_rows": 3, "max_bytes": 9}}, "set one of them"),
        ({"table": {"max_rows": 3, "min_keep": 9}}, "min_keep: 9 rows, max_rows 3"),
        ({"table": "dynamic", "buckets": 9}, "buckets: of a hashed table"),
        ({"table": {"admission": {"kind": "count", "treshold": 3}}}, "did you mean 'threshold'"),
        ({"kind": "bag", "max_items": 9, "table": {"max_rows": 8}}, "may have 9 items"),
    ],
)
def test_a_fault_in_a_table_is_named(features: Any, text: str) -> None:
    data = {"name": "t", "events": {"url": "memory://a/b", "label": "y"}}
    with pytest.raises(ConfigError, match=text):
        Config.parse({**data, "features": {"user": {"kind": "categorical", **features}}})


def test_hashed_is_the_default_and_a_name_stands_for_a_table_without_settings() -> None:
    assert config("hashed") == config(None)
    assert config("dynamic").features["user"].table == config({}).features["user"].table != None  # type: ignore[union-attr]  # noqa: E711
    assert Learner(config("hashed")).tables is None


def test_methods_that_hold_something_of_each_row_are_refused() -> None:
    for plugin in ({"kind": "ewc"}, {"kind": "ema"}):
        with pytest.raises(ConfigError, match=r"features\.user\.table: dynamic, but"):
            Learner(config("dynamic", plugins=[plugin]))


def test_a_river_model_has_no_tables(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.user\.table: a River model"):
        config("dynamic", river="river.linear_model:LogisticRegression", trust_pickle=True)


CONFIGS = st.fixed_dictionaries(
    {
        "optimizer": st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["sgd", "adagrad", "ftrl"]),
                "l2": st.sampled_from([0.0, 0.01]),
                "max_grad_norm": st.sampled_from([1e4, 1.5]),
            }
        ),
        "model": st.fixed_dictionaries({"kind": st.sampled_from(["logistic", "fm", "mlp", "deepfm", "dcnv2"])}),
        "replay": st.fixed_dictionaries(
            {
                "retention": st.just("reservoir"),
                "capacity": st.sampled_from([1, 12]),
                "per_event": st.sampled_from([0, 3]),
            }
        ),
    }
)


def events(seed: int, count: int) -> list[tuple[dict[str, Any], float]]:
    rng, time_s, found = np.random.default_rng(seed), 0.0, []
    for n in range(count):
        time_s += float(rng.choice([0.0, 0.5, 6.0]))
        tags = [f"t{t}" for t in rng.integers(7, size=rng.integers(4))]
        price = 50.0 if n % 11 == 7 else float(rng.normal())
        found.append(
            ({"user": f"u{rng.integers(9)}", "tags": tags, "page": int(rng.integers(3)), "price": price}, time_s)
        )
    return found


@SOME
@given(user=tables(), tags=tables(), more=CONFIGS, seed=st.integers(0, 99), chunk=st.sampled_from([1, 3, 50]))
def test_both_engines_have_the_same_rows(user: Any, tags: Any, more: Any, seed: int, chunk: int) -> None:
    learners = [Learner(config(user, tags, engine, **copy.deepcopy(more))) for engine in ("eager", "fused")]
    told: list[list[Any]] = [[], []]
    moved: list[set[int]] = [set(), set()]
    for learner, noted, came in zip(learners, told, moved, strict=True):
        learner.engine.watch = lambda rows, came=came: came.update(rows.tolist())
        for n, (payload, time_s) in enumerate(events(seed, 40)):
            features = Featurizer(config(user, tags)).encode(payload)
            event = Event(str(n), payload["user"], time_s, features, Origin(EVENTS, 0, n), float(n % 2))
            features, scores = learner.answer(event)
            ticket = Ticket(event.id, time_s, features, scores, event.origin, "", event.key)
            if learner.fused is None:
                noted.append(learner.learn(Outcome(ticket, float(n % 2), Fate.INLINE, 0.0)))
                continue
            learner.fused.learn(Outcome(ticket, float(n % 2), Fate.INLINE, 0.0))
            if n % chunk == chunk - 1:
                noted += learner.fused.settle()
        noted += learner.fused.settle() if learner.fused else []
    eager, fused = learners
    assert told[0] == told[1] and moved[0] == moved[1]
    assert digest(eager.tables.state_dict()) == digest(fused.tables.state_dict())  # type: ignore[union-attr]
    assert furthest(eager, fused) < 1e-7


def test_the_index_finds_what_is_in_it_whatever_has_left() -> None:
    """Among clusters of ids that all want the same place."""
    rng = np.random.default_rng(0)
    keys, cells = np.zeros(12, np.int64), np.zeros(32, np.int32)
    held: dict[int, int] = {}
    for _ in range(4000):
        row = int(rng.integers(12))
        if row in held:
            table_rows.unindex(np.array([row]), keys, cells)
            keys[row] = 0
            del held[row]
        else:
            key = -int(rng.integers(1, 5)) * 32 - int(rng.integers(2))
            if key not in held.values():
                held[row] = keys[row] = key
                table_rows.index(np.array([row]), keys, cells)
        assert sorted(cells[cells > 0] - 1) == sorted(held)
        tables = Tables(keys, cells)
        assert all(tables.find(key) == row for row, key in held.items())


class Tables:
    def __init__(self, keys: Any, cells: Any) -> None:
        self.keys, self.cells = keys, cells

    def find(self, key: int) -> int:
        mask = len(self.cells) - 1
        at = key & mask
        while self.cells[at] and self.keys[self.cells[at] - 1] != key:
            at = (at + 1) & mask
        return int(self.cells[at]) - 1
