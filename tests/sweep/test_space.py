from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamcl.config import ConfigError
from streamcl.sweep.space import Candidates, Sweep
from tests.sweep.logs import shop


def found(folder: Path, **content: Any) -> Candidates:
    return Sweep.parse(content).candidates("sweep", shop(folder))


def test_a_grid_is_every_combination_beside_the_base(tmp_path: Path) -> None:
    made = found(tmp_path, grid={"optimizer": {"learning_rate": [0.1, 0.2]}, "model.init_scale": [0.01, 0.02]})
    assert [candidate.name for candidate in made.all] == [
        "base",
        "learning_rate=0.1, init_scale=0.01",
        "learning_rate=0.1, init_scale=0.02",
        "learning_rate=0.2, init_scale=0.01",
        "learning_rate=0.2, init_scale=0.02",
    ]
    config = made.all[3].configs[0]
    assert (config.optimizer.learning_rate, config.model.init_scale, config.optimizer.kind) == (0.2, 0.01, "sgd")


def test_what_learns_the_same_is_one_configuration(tmp_path: Path) -> None:
    made = found(tmp_path, grid={"optimizer.learning_rate": [0.01, 0.1]}, list=[{"optimizer.learning_rate": 0.1}])
    assert [candidate.name for candidate in made.all] == ["base", "learning_rate=0.1"]


def test_each_configuration_has_every_seed(tmp_path: Path) -> None:
    made = found(tmp_path, seeds=[3, 4], grid={"optimizer.learning_rate": [0.1]})
    assert [[config.seed for config in candidate.configs] for candidate in made.all] == [[3, 4], [3, 4]]


def test_a_draw_depends_on_its_path_and_number_alone(tmp_path: Path) -> None:
    space = {"optimizer.learning_rate": {"log_uniform": [0.001, 1.0]}}
    few = found(tmp_path, random={"draws": 3, "space": space})
    more = found(tmp_path, random={"draws": 5, "space": {"model.init_scale": {"uniform": [0.01, 0.1]}, **space}})
    rates = [candidate.settings["optimizer.learning_rate"] for candidate in few.all[1:]]
    assert len(set(rates)) == 3
    assert all(0.001 <= rate <= 1.0 for rate in rates)
    assert [candidate.settings["optimizer.learning_rate"] for candidate in more.all[1:4]] == rates
    other = found(tmp_path, random={"draws": 3, "seed": 1, "space": space})
    assert [candidate.settings["optimizer.learning_rate"] for candidate in other.all[1:]] != rates


def test_log_uniform_draws_as_many_below_the_geometric_mean_as_above(tmp_path: Path) -> None:
    """400 draws: the share below has a deviation of .025; four of them."""
    space = {"optimizer.learning_rate": {"log_uniform": [0.0001, 1.0]}, "replay.capacity": {"integers": [1, 10**9]}}
    made = found(tmp_path, random={"draws": 400, "space": space}).all[1:]
    below = sum(candidate.settings["optimizer.learning_rate"] < 0.01 for candidate in made)
    assert abs(below / 400 - 0.5) < 0.1
    assert all(type(candidate.settings["replay.capacity"]) is int for candidate in made)


def test_a_setting_finds_its_place_in_short_forms_lists_and_missing_tables(tmp_path: Path) -> None:
    entries = [
        {"name": "few", "features.user.buckets": 31},
        {"name": "l2", "plasticity": [{"kind": "l2"}], "loss": {"kind": "task"}},
        {"name": "replay", "replay": {"retention": "recency", "per_event": 2}},
    ]
    made = {candidate.name: candidate.configs[0] for candidate in found(tmp_path, list=entries).all}
    assert getattr(made["few"].features["user"], "buckets") == 31  # noqa: B009 - of one kind of feature alone
    assert made["l2"].plasticity[0].kind == "l2"
    assert made["replay"].replay.per_event == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"girds": {}}, "sweep: girds: unknown key; did you mean 'grid'?"),
        ({"halving": {"eat": 3, "first": 5}}, "sweep: halving.eat: unknown key; did you mean 'eta'?"),
        ({"halving": {"eta": 1, "first": 5}}, "sweep: halving.eta: "),
        ({"choose_on": 1.0}, "sweep: choose_on: "),
        ({"objective": "acu"}, "sweep: objective: "),
        ({"objective": "rmse"}, "sweep: objective: task binary has ne, log_loss"),
        ({"seeds": [1, 1]}, "sweep: seeds: one stands twice"),
        (
            {"grid": {"optimizer": {"learning_rat": [0.1]}}},
            "sweep: grid: optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        ({"grid": {"optimizer.learning_rate": 0.1}}, "sweep: grid.optimizer.learning_rate: expected a list of values"),
        ({"grid": {"optimizer.learning_rate": [-1]}}, "sweep: grid: optimizer.learning_rate: "),
        ({"grid": {"optimizer.kind.x": [1]}}, "sweep: grid: optimizer."),
        ({"grid": {"optimizer.learning_rate.x": [1]}}, "optimizer.learning_rate is no table in the base"),
        ({"grid": {"seed": [1, 2]}}, "sweep: grid.seed: seed is set by the sweep's `seeds`"),
        ({"grid": {"events.label": ["a"]}}, "sweep: grid.events.label: events decides what is read"),
        ({"list": [{"name": "x"}]}, "sweep: list.0: sets nothing"),
        ({"list": [{"plugins": []}, {"plugins.0.weight": 1}]}, "list.1: plugins.0.weight: "),
        (
            {"list": [{"name": "x", "seeds": 1}]},
            "sweep: list.0: seeds: unknown key; did you mean 'seed'?",
        ),
        (
            {"list": [{"name": "x", "optimizer.kind": "adam"}, {"name": "x", "optimizer.kind": "adagrad"}]},
            "two different configurations are named 'x'",
        ),
        ({"random": {"draws": 2, "space": {"a.b": 3}}}, "sweep: random.space.a.b: expected {uniform"),
        ({"random": {"draws": 2, "space": {"a.b": {"unifrom": [0, 1]}}}}, "sweep: random.space.a.b.unifrom: expected"),
        ({"random": {"draws": 2, "space": {"a": {"uniform": [1, 0]}}}}, "sweep: random.space.a: uniform: expected"),
        ({"random": {"draws": 2, "space": {"a": {"log_uniform": [0, 1]}}}}, "low must be above 0"),
        ({"random": {"draws": 2, "space": {"a": {"integers": [0.5, 1]}}}}, "integers: expected [low, high]"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        found(tmp_path, **content)
    assert told in str(wrong.value)


def test_a_base_is_looked_for_beside_the_sweep(tmp_path: Path) -> None:
    shop(tmp_path)
    path = tmp_path / "sweep.toml"
    path.write_text('base = "shop.toml"\n[grid]\noptimizer.learning_rate = [0.1]\n')
    assert len(Sweep.load(path).candidates(str(path)).all) == 2
    path.write_text("[grid]\n")
    with pytest.raises(ConfigError, match="base: no configuration to start from"):
        Sweep.load(path).candidates(str(path))
    path.write_text("[grid\n")
    with pytest.raises(ConfigError, match="not TOML"):
        Sweep.load(path)
