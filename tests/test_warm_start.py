"""A start with weights from elsewhere: what is given is what is served, once, and the state says whose it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl import connect
from streamcl.config import Config, ConfigError
from streamcl.learner import Learner
from streamcl.records import Encoded
from streamcl.recovery import Keeper, store_of
from streamcl.state import digest
from streamcl.warm_start import save, warm_start
from streamcl.worker import Worker, build
from tests.journey import click, fill, finish, repeat, settings, view

USERS = ["0", "1", "2", "3", "4"]


def weights() -> dict[str, Any]:
    """Of an offline model with an embedding of two numbers, fields `user` and `price`, and a layer of four units."""
    draw = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    dense = {"deep.hidden.0.weight": some(4, 3), "deep.hidden.0.bias": some(4), "deep.head.weight": some(1, 4)}
    dense |= {"deep.head.bias": some(1), "linear.weight": some(1, 1), "linear.bias": some(1)}
    return {
        "dense": dense,
        "categories": {"user": USERS},
        "rows": {"user": some(5, 2)},
        "first": {"user": some(5, 1)},
        "numerics": {"price": (1000.0, 1.0, 0.5)},
    }


def traffic() -> None:
    items = [view(i, float(i)) for i in range(30)] + [click(i, i + 0.5) for i in range(0, 30, 3)]
    fill(sorted(items, key=lambda item: item.time_s))


def wide(folder: Path, **changes: Any) -> Config:
    """So many buckets that five users have one each."""
    features = {"user": {"kind": "categorical", "buckets": 10_007}, "price": "numeric"}
    return settings(folder, **({"features": features} | changes))


def begun(config: Config) -> Worker:
    traffic()
    worker = build(config)
    Keeper(worker, store_of(config), beside=False).restore()
    return worker


def served(worker: Worker, user: object, price: float) -> tuple[Encoded, float]:
    features = worker.decoder.featurizer.encode({"user": user, "price": price})
    return features, float(worker.learner.predict(features).served[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "adam", "ftrl"])
@pytest.mark.parametrize("engine", ["eager", "fused"])
def test_the_first_scores_are_those_of_the_offline_model(tmp_path: Path, optimizer: str, engine: str) -> None:
    given = weights()
    save(tmp_path / "w.safetensors", **given)
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w.safetensors")}
    worker = begun(wide(tmp_path, model=model, optimizer={"kind": optimizer}, worker={"engine": engine}))
    dense = given["dense"]
    for place, user in enumerate(USERS):
        for price in (0.0, 2.0):
            x = torch.cat((given["rows"]["user"][place], torch.tensor([(price - 1.0) / 0.5])))
            hidden = torch.relu(dense["deep.hidden.0.weight"] @ x + dense["deep.hidden.0.bias"])
            logit = dense["deep.head.weight"] @ hidden + dense["deep.head.bias"]
            logit = logit + given["first"]["user"][place] + dense["linear.weight"] @ x[2:] + dense["linear.bias"]
            assert served(worker, int(user), price)[1] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)


def test_a_run_that_is_killed_and_a_replay_come_to_the_same_and_never_look_again(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    sha = save(file, **weights())
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(file)}
    config = wide(tmp_path, model=model, error_memory=[{"kind": "knn"}], plasticity=[{"kind": "l2_init"}])
    begun(config)  # and dropped behind its first snapshot
    file.rename(tmp_path / "elsewhere")
    ran = finish(config)
    assert ran.worker.lineage.facts == [{"kind": "warm_start", "sha256": sha}]
    (tmp_path / "elsewhere").rename(file)
    alone = wide(tmp_path / "other", model=model, error_memory=[{"kind": "knn"}], plasticity=[{"kind": "l2_init"}])
    begun(alone)
    assert finish(alone).digest == ran.digest
    cold = wide(tmp_path / "cold", error_memory=[{"kind": "knn"}], plasticity=[{"kind": "l2_init"}])
    traffic()
    assert finish(cold).digest != ran.digest


def test_rules_and_averages_begin_at_the_given_weights(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", **weights())
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w.safetensors")}
    plugins = [{"kind": "ema"}]
    worker = begun(wide(tmp_path, model=model, plugins=plugins, plasticity=[{"kind": "l2_init"}]))
    assert isinstance(worker.learner, Learner)
    engine = worker.learner.engine
    assert torch.equal(engine.dense.anchors["l2_init"], engine.dense.flat)
    assert all(torch.equal(each.flat, engine.dense.flat) for each in engine.sets.values())
    assert all(torch.equal(each.table, engine.table) for each in engine.sets.values())


def test_a_snapshot_of_another_application_gives_what_both_have(tmp_path: Path) -> None:
    features = {"user": {"kind": "categorical", "buckets": 13}, "price": "numeric"}
    traffic()
    theirs = settings(tmp_path, name="theirs", replay={})
    taught = finish(theirs).worker
    folder = store_of(theirs).ls()[-1].path
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(folder)}
    worker = begun(settings(tmp_path, name="ours", model=model, features=features, seed=5))
    for user in range(5):
        assert served(worker, user, 2.0)[1] == pytest.approx(served(taught, user, 2.0)[1], abs=1e-6)
    other = {**features, "user": {"kind": "categorical", "buckets": 14}}
    with pytest.raises(ConfigError, match=r"rows\.user, shape \(14, 3\): 13 buckets; the config has 14"):
        begun(settings(tmp_path, name="others", model=model, features=other))
    with pytest.raises(ConfigError, match=r"dense\.linear\.weight, shape \(1, 1\): the model's has.*\(1, 0\)"):
        begun(settings(tmp_path, name="others", model=model, features={"user": features["user"]}))


def test_a_checkpoint_that_began_otherwise_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", **weights())
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w.safetensors")}
    traffic()
    finish(wide(tmp_path))
    with pytest.raises(ConfigError, match="there is a checkpoint already, that began without one"):
        finish(wide(tmp_path, model=model))
    traffic()
    finish(wide(tmp_path, name="warm", model=model))
    finish(wide(tmp_path, name="warm"))  # the setting may go, for the state says whose weights they were
    save(tmp_path / "w.safetensors", **(weights() | {"first": {}}))
    with pytest.raises(ConfigError, match="there is a checkpoint already, that began with"):
        finish(wide(tmp_path, name="warm", model=model))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"dense": {"deep.head.bias": torch.zeros(3)}},
            r"dense\.deep\.head\.bias, shape \(3,\): the model's has.*\(1,\)",
        ),
        ({"dense": {"out.bias": torch.zeros(1)}}, r"dense\.out\.bias, shape \(1,\): the model has no such parameter"),
        ({"dense": {"deep.head.bias": torch.tensor([torch.nan])}}, r"dense\.deep\.head\.bias.*not all of it is finite"),
        ({"rows": {"user": torch.zeros(5, 4)}}, r"rows\.user, shape \(5, 4\): the model's rows have 2 such numbers"),
        (
            {"categories": {"shop": USERS}, "rows": {"shop": torch.zeros(5, 2)}, "first": {}},
            r"rows\.shop.*no such field",
        ),
        ({"numerics": {"age": (1.0, 0.0, 1.0)}}, r"numeric\.age: there is no such numeric"),
        ({"numerics": {"price": (1.0, 0.0, -1.0)}}, r"numeric\.price, shape \(3,\): expected \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named_with_its_shape(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    save(tmp_path / "w.safetensors", **(weights() | change))
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w.safetensors")}
    with pytest.raises(ConfigError, match=match):
        begun(wide(tmp_path, model=model))


def test_numbers_that_a_field_does_not_use_must_be_zero(tmp_path: Path) -> None:
    given = weights()
    save(tmp_path / "all.st", **given)
    given["rows"]["user"][:, 1] = 0.0
    save(tmp_path / "narrow.st", **given)
    user = {"kind": "categorical", "buckets": 10_007, "embedding_dim": 1}
    features = {"user": user, "price": "numeric"}
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4]}
    with pytest.raises(ConfigError, match=r"rows\.user, shape \(5, 2\): numbers behind the field.s emb"):
        begun(wide(tmp_path, features=features, model=model | {"warm_start": str(tmp_path / "all.st")}))
    begun(wide(tmp_path, features=features, model=model | {"warm_start": str(tmp_path / "narrow.st")}))


def test_what_is_no_such_file_is_refused_and_nothing_is_saved(tmp_path: Path) -> None:
    for name, content in (("absent", None), ("torn", b"\x00" * 7)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        config = wide(tmp_path, model={"embedding_dim": 2, "warm_start": str(tmp_path / name)})
        with pytest.raises(ConfigError, match=f"model.warm_start: .*{name}"):
            begun(config)
        assert store_of(config).ls() == []


def test_rows_that_are_not_as_many_as_their_categories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.user: shape \(4, 2\), for 5 categories"):
        save(tmp_path / "w", {}, categories={"user": USERS}, rows={"user": torch.zeros(4, 2)})


def test_categories_that_share_a_row_give_it_their_mean(tmp_path: Path) -> None:
    given = weights() | {"categories": {"user": [0, "0"]}, "first": {}}
    save(tmp_path / "w", **(given | {"rows": {"user": torch.tensor([[1.0, 3.0], [2.0, 5.0]])}}))
    model = {"kind": "deepfm", "embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w")}
    worker = begun(wide(tmp_path, model=model))
    features, _ = served(worker, 0, 0.0)
    assert isinstance(worker.learner, Learner)
    assert worker.learner.engine.table[int(features.ids[0])].tolist() == [0.0, 1.5, 4.0]


def test_a_replay_of_a_recording_begins_with_them_too(tmp_path: Path) -> None:
    save(tmp_path / "w", **weights())
    config = wide(
        tmp_path,
        labels=None,
        events={"url": "memory://journey/views", "id": "id", "time": "ts", "label": "y"},
        model={"embedding_dim": 2, "hidden": [4], "warm_start": str(tmp_path / "w")},
    )
    fill([view(i, float(i), y=i % 2) for i in range(20)])
    ran = finish(config)
    again = Worker(config, connect.open_source(config), connect.codecs(config))
    warm_start(again)
    again.progress.position = dict(again.source.seek({}))
    for _ in again.run():
        pass
    assert digest(again.state_dict()) == ran.digest != repeat(config).digest
    assert json.loads(json.dumps(ran.worker.lineage.facts))[0]["kind"] == "warm_start"
