from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from streamcl.config import Config
from streamcl.continual.key_compat import CompatibleKeys, DriftCompensation, Rotation, old_to_new
from streamcl.learner import Learner
from streamcl.memory.forms import KNN
from streamcl.methods import KNNMemory
from streamcl.plugin import PluginError, Shape
from tests.continual.rows import BOUNDARY, answered, config, made, resumes
from tests.test_learner import stream


def test_the_map_is_that_of_least_squares_with_a_pull_to_the_identity() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(size=(50, 4)) + 3.0
    new = old @ rng.normal(size=(4, 4)) + rng.normal(size=4) + 0.1 * rng.normal(size=(50, 4))
    linear, shift = old_to_new(old, new, 0.0)
    found, *_ = np.linalg.lstsq(np.c_[old, np.ones(50)], new, rcond=None)
    np.testing.assert_allclose(np.c_[linear, shift], found.T, rtol=1e-6)
    linear, shift = old_to_new(old, new, 1e9)
    np.testing.assert_allclose(linear, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(shift, new.mean(0) - old.mean(0), atol=1e-5)


def test_records_move_as_if_their_keys_had_been_mapped_before_they_were_written() -> None:
    rng = np.random.default_rng(1)
    linear, shift = rng.normal(size=(3, 3)), rng.normal(size=3)
    keys = rng.normal(size=(8, 3)).astype(np.float32)
    one, two = (KNN(KNNMemory(capacity=8), 3, 2, 0) for _ in range(2))
    for form in (one, two):
        form.centre.count, form.centre.mean = 10**9, np.zeros(3, np.float32)  # as good as still
    two.centre.mean = shift.astype(np.float32)
    for key in keys:
        one.write(key, np.ones(2, np.float32))
        two.write((linear @ key + shift).astype(np.float32), np.ones(2, np.float32))
    one.move(linear, shift, np.ones(8))
    # the means move by CENTRE_RATE per key, a 1,000th of its distance
    np.testing.assert_allclose(one.rows, two.rows, atol=0.05)
    half = KNN(KNNMemory(capacity=8), 3, 2, 0)
    half.write(np.array([1.0, 0.0, 0.0], np.float32), np.ones(2, np.float32))
    half.write(np.array([0.0, 1.0, 0.0], np.float32), np.ones(2, np.float32))
    before = half.rows.copy()
    half.move(linear, shift, np.zeros(2))
    np.testing.assert_allclose(half.rows, before, atol=1e-6)


def drifting(plugins: list[Any], **more: Any) -> Config:
    return config(
        "multiclass",
        model={"kind": "mlp", "hidden": [16], "embedding_dim": 4, "init_scale": 0.3},
        optimizer={"kind": "sgd", "learning_rate": 0.1},
        replay={"retention": "reservoir", "capacity": 100, "per_event": 2},
        error_memory=[{"kind": "knn", "key": "hidden", "capacity": 100}],
        plugins=plugins,
        **more,
    )


def test_moved_vectors_are_nearer_to_reencoded_ones_and_find_the_same_neighbours() -> None:
    errors, overlaps = {}, {}
    for name, plugins in {
        "still": [{"kind": "drift_compensation", "every": 0, "on": ["never"]}],
        "moved": [{"kind": "drift_compensation", "every": 50, "rows": 100}],
    }.items():
        learner = Learner(drifting(plugins))
        [plugin] = learner.plugins.values()
        assert isinstance(plugin, DriftCompensation)
        for item in stream("multiclass", 600):
            assert learner.learn(answered(learner, item))
        stored = learner.memory.columns["hidden"][:100]
        today = plugin.again(np.arange(100))
        errors[name] = float(((stored - today) ** 2).mean())
        overlaps[name] = overlap(stored, today)
    assert errors["moved"] < 0.3 * errors["still"]
    assert overlaps["moved"] > overlaps["still"] + 0.1


def overlap(stored: Any, today: Any, k: int = 10) -> float:
    """Of the k rows nearest to each row, how many both sets of keys find: queries are as of today."""
    found = []
    for keys in (stored, today):
        away = np.linalg.norm(today[:, None] - keys[None], axis=2)
        found.append(np.argsort(away + 1e9 * np.eye(len(away)), axis=1)[:, :k])
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(*found, strict=True)]))


def test_a_rotation_is_orthonormal_whatever_its_parameter() -> None:
    rotation = Rotation(5)
    with torch.no_grad():
        rotation.raw.copy_(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
        matrix = rotation.matrix(rotation.raw)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Rotation(5).matrix(torch.zeros(5, 5)), torch.eye(5))


def test_the_held_block_of_the_keys_stays_nearer_to_the_previous_one() -> None:
    away = {}
    for weight in (0.0, 1.0):
        made_ = drifting(["previous", {"kind": "compatible_keys", "weight": weight, "block": 0.5}])
        learner = Learner(made_)
        plugin = learner.plugins["compatible_keys"]
        assert isinstance(plugin, CompatibleKeys)
        for number, item in enumerate(stream("multiclass", 500)):
            changed = replace(item, label=(item.label + (number >= 200)) % 3)  # so that the weights have to move
            assert learner.learn(answered(learner, changed), [BOUNDARY] * (number == 200))
        rows = learner._rows(*learner.memory.examples(torch.arange(100)))
        previous = learner.engine.sets["previous"]
        with torch.no_grad():
            now = plugin.keys(learner.engine.out(rows).hidden, plugin.rotation.raw)
            then = plugin.keys(learner.engine.out(rows, "previous").hidden, previous.params()[plugin.name])
        away[weight] = float(((now - then) ** 2).sum() / (then**2).sum())
    assert away[1.0] < 0.5 * away[0.0]


def test_records_are_found_by_the_held_block() -> None:
    learner = Learner(drifting(["previous", {"kind": "compatible_keys", "block": 0.25}]))
    scores = learner.predict(stream("multiclass", 1)[0].ticket.features)
    assert np.abs(scores.recalled[0].key[4:]).max() == 0.0
    assert np.abs(scores.recalled[0].key[:4]).max() > 0.0


@pytest.mark.parametrize(
    "plugins",
    [[{"kind": "drift_compensation", "every": 10, "least": 5}], ["previous", {"kind": "compatible_keys"}]],
)
def test_keys_are_resumed_to_the_bit(plugins: list[Any]) -> None:
    assert resumes(plugins)


def test_what_has_no_hidden_layer_or_no_teacher_is_refused() -> None:
    with pytest.raises(PluginError, match="drift_compensation: model logistic"):
        Learner(config(plugins=["drift_compensation"], model={"kind": "logistic"}))
    with pytest.raises(PluginError, match="drift_compensation: there are no rows"):
        Learner(config(replay={"retention": "none"}, plugins=["drift_compensation"]))
    with pytest.raises(PluginError, match="compatible_keys: no weights 'previous'"):
        Learner(made(["compatible_keys"]))
    with pytest.raises(PluginError, match="compatible_keys: the model has no hidden layer"):
        CompatibleKeys().module(Shape(1, 0))
