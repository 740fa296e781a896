"""A checkpoint under another [features] table: what stays is moved to the bit, what is new changes nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamcl.config import Config, ConfigError
from streamcl.evolve import evolve
from streamcl.records import Scores
from streamcl.worker import Worker, build
from tests.journey import click, fill, finish, settings, view

BEFORE: dict[str, Any] = {
    "user": {"kind": "categorical", "buckets": 13},
    "shelf": {"kind": "categorical", "buckets": 7},
    "price": "numeric",
    "old": "numeric",
    "seen": {"kind": "history", "of": "shelf", "by": "user", "last": 3},
    "r": {"kind": "rate", "of": "shelf"},
}
AFTER = {name: feature for name, feature in BEFORE.items() if name != "old"} | {
    "a": {"kind": "categorical", "buckets": 5},
    "n": {"kind": "count", "of": "user"},
    "z": "bag",
}
KINDS = ["logistic", "fm", "mlp", "deepfm", "dcnv2"]


def config(folder: Path, features: dict[str, Any] | None = None, kind: str = "deepfm", **changes: Any) -> Config:
    model = {"kind": kind, "embedding_dim": 3, "hidden": [4], **changes.pop("model", {})}
    return settings(folder, features=features or BEFORE, model=model, **changes)


def inputs(start: int = 0, count: int = 40) -> None:
    rng = np.random.default_rng(3)
    views = [view(id, float(id), shelf=int(rng.integers(4)), old=1.0, a=id % 3) for id in range(start, start + count)]
    fill([*views, *[click(id, id + 4.0) for id in range(start, start + count) if id % 2]])


def lived(config: Config) -> Worker:
    inputs()
    return on(build(config))


def on(worker: Worker) -> Worker:
    """Takes all that is there, from the start."""
    if worker.control:
        worker.control.open()
    worker.progress.position = dict(worker.source.seek({}))
    for _ in worker.run():
        pass
    return worker


def carried(old: Worker, new: Config) -> Worker:
    worker = build(new)
    worker.load_state_dict(evolve(old.state_dict(), old.config, new))
    return worker


def asked(worker: Worker, **payload: Any) -> Scores:
    features = worker.decoder.featurizer.encode(payload)
    features = worker.past.complete(features, 50.0) if worker.past else features
    assert worker.learner is not None
    return worker.learner.predict(features)


def rows_of(worker: Worker, name: str) -> torch.Tensor:
    field = worker.decoder.featurizer.fields[name]
    table: torch.Tensor = worker.learner.state_dict()["engine"]["table"]
    return table[field.base : field.base + field.buckets + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "ftrl"])
def test_a_field_that_stays_keeps_its_rows_and_all_that_belongs_to_them(
    tmp_path: Path, kind: str, optimizer: str
) -> None:
    old = lived(config(tmp_path, kind=kind, optimizer={"kind": optimizer}))
    new = carried(old, config(tmp_path, AFTER, kind=kind, optimizer={"kind": optimizer}))
    for name in ("user", "shelf"):
        assert torch.equal(rows_of(old, name), rows_of(new, name))
        places = [each.decoder.featurizer.fields[name] for each in (old, new)]
        states = [each.learner.state_dict()["engine"]["row_slots"] for each in (old, new)]
        for slot in states[0]:
            then, now = (s[slot][f.base : f.base + f.buckets + 1] for s, f in zip(states, places, strict=True))
            assert torch.equal(then, now)


@pytest.mark.parametrize("kind", ["logistic", "mlp", "dcnv2"])
def test_what_is_new_changes_no_score_and_what_has_gone_only_its_own_share(tmp_path: Path, kind: str) -> None:
    before = {name: feature for name, feature in BEFORE.items() if name != "old"}
    old = lived(config(tmp_path, before, kind=kind))
    new = carried(old, config(tmp_path, AFTER, kind=kind))
    for n in range(8):
        payload = {"user": n % 5, "shelf": n % 4, "price": float(n)}
        then, now = asked(old, **payload), asked(new, **payload, a=n, z=["x"])
        assert now.output == pytest.approx(then.output, abs=1e-6)  # sums of other lengths


def test_pairs_with_a_new_embedding_are_all_that_moves_a_factorisation(tmp_path: Path) -> None:
    before = {name: feature for name, feature in BEFORE.items() if name != "old"}
    old = lived(config(tmp_path, before, kind="fm"))
    new = carried(old, config(tmp_path, AFTER, kind="fm"))
    then, now = (asked(each, user=1, shelf=2, price=1.0, a=2) for each in (old, new))
    assert then.output != now.output
    assert now.output == pytest.approx(then.output, abs=0.01)  # fresh embeddings are normal with deviation .01


def test_it_learns_on_and_the_new_field_too(tmp_path: Path) -> None:
    old = lived(config(tmp_path))
    inputs(40)
    new = carried(old, config(tmp_path, AFTER))
    before = rows_of(new, "a").clone()
    version = new.learner.version
    on(new)
    assert new.learner.version > version
    assert not torch.equal(before, rows_of(new, "a"))


def test_replayed_rows_and_waiting_tickets_are_encoded_anew(tmp_path: Path) -> None:
    old = lived(config(tmp_path, join={"attribution_window_s": 1e6, "orphan_s": 5.0}))
    new = carried(old, config(tmp_path, AFTER, join={"attribution_window_s": 1e6, "orphan_s": 5.0}))
    fields = [each.decoder.featurizer.fields for each in (old, new)]
    assert old.joiner.tickets.keys() == new.joiner.tickets.keys()
    assert new.joiner.tickets
    for id, ticket in new.joiner.tickets.items():
        then, now = old.joiner.tickets[id].features, ticket.features
        for name in ("user", "shelf", "seen"):
            was, field = fields[0][name], fields[1][name]
            assert (now.ids[field.slot : field.slot + field.slots] - field.base).tolist() == (
                then.ids[was.slot : was.slot + was.slots] - was.base
            ).tolist()
            assert now.weights[field.slot : field.slot + field.slots].tolist() == (
                then.weights[was.slot : was.slot + was.slots].tolist()
            )
        assert (now.ids[fields[1]["a"].slot], now.weights[fields[1]["a"].slot]) == (fields[1]["a"].base, 1.0)
        bag = fields[1]["z"]
        assert not now.weights[bag.slot : bag.slot + bag.slots].any()
        assert np.isnan(now.dense[new.decoder.featurizer.layout.numerics.index("n")])


def test_what_the_past_keeps_stays_with_the_features_that_read_it(tmp_path: Path) -> None:
    old = lived(config(tmp_path))
    new = carried(old, config(tmp_path, AFTER | {"r": {"kind": "rate", "of": "user"}}))
    assert old.past is not None
    assert new.past is not None
    sizes = {name: len(each) for name, each in new.past.kept.items()}
    assert sizes == {"seen": len(old.past.kept["seen"]), "n": 0, "r": 0}
    assert sizes["seen"] > 0


def test_without_a_feature_that_needs_one_there_is_no_past_any_more(tmp_path: Path) -> None:
    new = carried(lived(config(tmp_path)), config(tmp_path, {"user": BEFORE["user"]}))
    assert new.past is None


def test_each_value_keeps_its_row_when_buckets_are_multiplied(tmp_path: Path) -> None:
    old = lived(config(tmp_path, kind="mlp"))
    wider = BEFORE | {"user": {"kind": "categorical", "buckets": 39}}
    new = carried(old, config(tmp_path, wider, kind="mlp"))
    fields = [each.decoder.featurizer.fields["user"] for each in (old, new)]
    for value in range(50):
        then, now = (f.row_of(value) - f.base for f in fields)
        assert torch.equal(rows_of(old, "user")[then], rows_of(new, "user")[now])
    with pytest.raises(ConfigError, match=r"features\.user\.buckets: 13 may become a multiple of that, not 20"):
        carried(old, config(tmp_path, BEFORE | {"user": {"kind": "categorical", "buckets": 20}}, kind="mlp"))


def test_an_average_of_the_weights_is_carried_over(tmp_path: Path) -> None:
    plugins = [{"kind": "ema"}, {"kind": "served", "sets": ["ema"]}]
    before = {name: feature for name, feature in BEFORE.items() if name != "old"}
    old = lived(config(tmp_path, before, kind="mlp", plugins=plugins))
    new = carried(old, config(tmp_path, AFTER, kind="mlp", plugins=plugins))
    then, now = (asked(each, user=1, shelf=2, price=1.0) for each in (old, new))
    assert now.output == pytest.approx(then.output, abs=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"plugins": [{"kind": "reptile"}]}, "plugins.reptile"),
    ({"plasticity": ["upgd"], "optimizer": {"kind": "sgd"}}, "plasticity upgd"),
    ({"kind": "recurrent"}, "recurrent"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_what_is_not_carried_over_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    before, after = config(tmp_path, **dict(changes)), config(tmp_path, AFTER, **dict(changes))
    with pytest.raises(ConfigError, match=named):
        evolve({}, before, after)


def classes(folder: Path, count: int, kind: str) -> Config:
    events = {"url": "memory://journey/views", "id": "id", "key": "user", "time": "ts", "label": "class"}
    features = {"user": BEFORE["user"], "price": "numeric"}
    return config(folder, features, kind, task="multiclass", events=events, labels=None, model={"classes": count})


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_class_takes_little_from_the_others_and_is_learned(tmp_path: Path, kind: str) -> None:
    fill([view(id, float(id), **{"class": id % 2}) for id in range(40)])
    old = on(build(classes(tmp_path, 2, kind)))
    fill([view(id, float(id), **{"class": 2}) for id in range(40, 120)])
    new = carried(old, classes(tmp_path, 3, kind))
    then, now = (asked(each, user=1, price=1.0) for each in (old, new))
    if kind not in ("fm", "deepfm"):
        assert now.output[:2] == pytest.approx(then.output, abs=1e-6)
    assert now.served[2] < 0.02
    assert new.metrics.state_dict()["metrics"]["classes"].tolist() == [20, 20, 0]
    on(new)
    assert asked(new, user=1, price=1.0).served[2] > 10 * now.served[2]  # eighty events of it alone


def test_a_worker_goes_on_from_a_clean_stop_with_other_features_and_not_from_a_dirty_one(tmp_path: Path) -> None:
    inputs()
    finish(config(tmp_path))
    worker = finish(config(tmp_path, AFTER)).worker
    assert worker.learner.version > 0
    again = finish(config(tmp_path, AFTER)).worker  # from its own snapshot: nothing is carried over any more
    assert again.learner.version == worker.learner.version
