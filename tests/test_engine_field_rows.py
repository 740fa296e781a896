"""Rows of a field that are narrower, or learned otherwise, beside a loop over rows that does the same one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamcl.config import Config, ConfigError
from streamcl.engine.choice import engine_of
from streamcl.engine.field_rows import FieldRows, said
from streamcl.engine.optimizers import UPDATES
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Ticket
from streamcl.stations import Optimizer
from streamcl.testing import check_stateful

KINDS = ("sgd", "adagrad", "adam", "ftrl")
RATE = 0.1
"""Of all rows that say nothing else."""


def config(user: Any, page: Any, kind: str = "adagrad", **more: Any) -> Config:
    """Two fields with rows of their own, one that says nothing of them, and a history that shares the pages'."""
    features = {
        "user": {"kind": "categorical", **({} if "table" in user else {"buckets": 5}), **user},
        "page": {"kind": "categorical", "buckets": 4, **page},
        "ad": {"kind": "categorical", "buckets": 3},
        "past": {"kind": "history", "of": "page", "by": "user", "last": 2},
    }
    optimizer = {"kind": kind, "embedding_learning_rate": RATE, "l2": 0.01}
    model = {"kind": "deepfm", "embedding_dim": 3, "hidden": [3], "dtype": "float64"}
    data = {"name": "t", "events": {"url": "memory://a/b", "label": "y"}, "features": features, "model": model}
    return Config.parse({**data, "optimizer": optimizer, **more})


def learn(learner: Learner, made: Config, numbers: Iterable[int]) -> None:
    featurizer = Featurizer(made)
    for i in numbers:
        found = featurizer.encode({"user": i * 7 % 11, "page": i * 5 % 6, "ad": i % 3})
        features = Encoded(found.ids, found.weights, found.dense)
        scores = learner.predict(features)
        ticket = Ticket(str(i), float(i), features, scores, Origin(EVENTS, 0, i), "", "")
        learner.learn(Outcome(ticket, float(i % 3 == 0), Fate.INLINE, float(i)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user", [{"embedding_dim": 1}, {"embedding_dim": 0}])
@pytest.mark.parametrize("table", [None, {"admission": "all"}], ids=["hashed", "dynamic"])
def test_numbers_that_a_field_does_not_use_are_zero_for_good(kind: str, user: Any, table: Any) -> None:
    made = config({**user, **({"table": table} if table else {})}, {}, kind)
    learner = Learner(made)
    learn(learner, made, range(60))
    engine, dim = learner.engine, user["embedding_dim"]
    if engine.tables is None:
        field = Featurizer(made).fields["user"]
        rows = engine.table[field.base : field.base + field.buckets + 1]
    else:
        rows = engine.table[engine.tables.first :]
    assert not rows[:, 1 + dim :].any()
    assert rows[:, : 1 + dim].any(0).all()
    field = Featurizer(made).fields["page"]
    assert engine.table[field.base : field.base + field.buckets + 1].any(0).all()


def test_a_fresh_row_is_what_its_field_begins_with() -> None:
    made = config({"embedding_dim": 2}, {"optimizer": {"kind": "ftrl"}})
    engine = Learner(made).engine
    ids = torch.arange(len(engine.table))
    assert torch.equal(engine.fresh_rows(ids), engine.table)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_field_says_like_everyone_changes_nothing(kind: str) -> None:
    told = {"optimizer": {"kind": kind, "learning_rate": RATE}, "embedding_dim": 3}
    plain, same = config({}, {}, kind, worker={"engine": "eager"}), config(told, {}, kind)
    states = []
    for made in (plain, same):
        learner = Learner(made)
        learn(learner, made, range(40))
        states.append(learner.state_dict()["engine"])
    assert torch.equal(states[0]["table"], states[1]["table"])
    assert states[0]["row_slots"].keys() == states[1]["row_slots"].keys()
    assert all(torch.equal(slot, states[1]["row_slots"][i]) for i, slot in states[0]["row_slots"].items())


each_says = st.fixed_dictionaries(
    {},
    optional={
        "embedding_dim": st.integers(0, 3),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"kind": st.sampled_from(KINDS), "learning_rate": st.sampled_from([0.05, 0.3])}
        ),
    },
)


@given(each_says, each_says, st.sampled_from(KINDS), st.integers(0, 1000))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_moves_as_its_fields_own_optimiser_says(user: Any, page: Any, kind: str, seed: int) -> None:
    made = config(user, page, kind)
    layout = Featurizer(made).layout
    generator = torch.Generator().manual_seed(seed)
    rows = layout.rows
    table = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    found = FieldRows(made, layout, table, 1, RATE)
    found.narrow(table)
    slots = found.slots(table)
    oracle: dict[int, tuple[Any, Tensor, Any]] = {}
    for name, field in Featurizer(made).fields.items():
        own = {"user": user, "page": page}.get(name, {}).get("optimizer", {})
        update = UPDATES[own.get("kind", kind)](Optimizer(l2=0.01), own.get("learning_rate", RATE))
        for row in range(field.base, field.base + field.buckets + 1) if name != "past" else ():
            value = table[row : row + 1].clone()
            oracle[row] = (update, value, update.slots(value))
    for _ in range(5):
        ids = torch.randperm(rows, generator=generator)[:6].sort().values
        gradient = torch.randn(6, 4, dtype=torch.float64, generator=generator) * found.keep(ids)
        value, new = found.step(ids, table[ids], gradient, [slot[ids] for slot in slots])
        table[ids] = value
        for slot, each in zip(slots, new, strict=True):
            slot[ids] = each
        for row, g in zip(ids.tolist(), gradient, strict=True):
            update, before, held = oracle[row]
            oracle[row] = (update, *update.step(before, g[None], held))
    assert all(torch.equal(table[row], value[0]) for row, (_, value, _) in oracle.items())
    moved = found.moved(torch.arange(rows), table, slots)
    again = found.step(torch.arange(rows), table, torch.zeros_like(table), moved)[0]
    for row, (update, value, held) in oracle.items():
        assert torch.equal(again[row], update.step(value, torch.zeros_like(value), update.moved(value, held))[0][0])


def test_a_learner_goes_on_from_its_state() -> None:
    made = config(
        {"table": {"admission": "all", "max_rows": 4}, "embedding_dim": 1, "optimizer": {"learning_rate": 0.3}},
        {"optimizer": {"kind": "ftrl", "l1": 0.001}},
        replay={"retention": "reservoir", "capacity": 10, "per_event": 2},
    )
    check_stateful(lambda: Learner(made), lambda learner, n: learn(learner, made, [n]), steps=20)


def test_such_rows_are_learned_by_the_eager_engine_and_it_says_why() -> None:
    assert said(config({}, {})) is None
    assert engine_of(config({}, {})) == ("fused", "")
    assert engine_of(config({}, {"embedding_dim": 2})) == ("eager", "features.page.embedding_dim")
    assert engine_of(config({"optimizer": {"kind": "sgd"}}, {})) == ("eager", "features.user.optimizer")


@pytest.mark.parametrize(
    ("user", "more", "message"),
    [
        ({"embedding_dim": 4}, {}, r"features\.user\.embedding_dim: 4 is more than model\.embedding_dim 3"),
        (
            {"embedding_dim": 1},
            {"model": {"kind": "logistic"}},
            r"features\.user\.embedding_dim: a logistic model has no embeddings",
        ),
        (
            {"table": "dynamic", "optimizer": {"kind": "adam"}},
            {},
            r"features\.user\.optimizer: beside a dynamic table",
        ),
        (
            {"optimizer": {"kind": "adam"}},
            {"optimizer": {"kind": "sgd"}, "plasticity": [{"kind": "upgd"}]},
            r"features\.user\.optimizer\.kind: upgd is a form of SGD",
        ),
        (
            {"optimizer": {"learning_rate": 1.0}},
            {"river": "river.linear_model:LogisticRegression", "trust_pickle": True},
            r"features\.user\.optimizer: a River model has no rows",
        ),
        ({"optimizer": {"rate": 1.0}}, {}, r"features\.user\.categorical\.optimizer\.rate|features\.user\.optimizer"),
    ],
)
def test_what_does_not_fit_is_named(user: Any, more: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(user, {}, **more)
