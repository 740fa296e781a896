from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from streamcl import plugin
from streamcl.bench import continual, run
from streamcl.bench.continual import ENTRANTS, Findings, Job
from streamcl.bench.continual_recipes import FIELDS, PROMISES, RECIPES, TOLD, Field, Promise, recipes
from streamcl.bench.continual_run import Run
from streamcl.bench.continual_streams import STREAMS
from streamcl.bench.options import Options
from streamcl.bench.streams import DataError
from streamcl.config import Config
from tests.bench.continual_data import tiny_course
from tests.bench.test_report import assert_contract

TINY = "split-digits"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small stream, in this process."""
    field = Field("balanced", ("reservoir",), (), ("plain torch er",), seeds=3)
    monkeypatch.setattr(continual, "STREAMS", {TINY: lambda _folder, seed, _quick: tiny_course(seed)})
    monkeypatch.setattr(continual, "FIELDS", {TINY: field})
    monkeypatch.setattr(continual, "_side_by_side", lambda jobs: [job() for job in jobs])
    continual._course.cache_clear()


def made(values: Mapping[str, list[dict[str, float]]]) -> Findings:
    """Findings of entrants on the tiny stream: the figures of each seed."""
    curve = np.arange(3.0), np.ones(3)
    runs = {
        Job(TINY, name, seed, False, None): Run(figures, curve)
        for name, seeds in values.items()
        for seed, figures in enumerate(seeds)
    }
    return Findings(runs)


def test_every_recipe_that_a_stream_names_is_one_of_the_table_and_every_entrant_is_known() -> None:
    for stream, field in FIELDS.items():
        assert set(field.names(quick=False)) <= recipes().keys()
        assert set(field.names(quick=True)) <= set(field.names(quick=False))
        assert {*field.anchors, *field.peers} <= set(ENTRANTS)
        assert set(field.quick_anchors) <= set(field.anchors)
        assert stream in STREAMS


def test_every_recipe_weighs_its_replayed_rows_as_one_unless_its_name_says_otherwise() -> None:
    course = tiny_course(0)
    for name, recipe in RECIPES.items():
        if "user" in name or "item" in name or "reloop" in name:
            continue  # of a recommender only
        config = Config.parse(course.config(recipe, 0))
        assert config.replay.weight == (10.0 if "weigh alike" in name else 1.0)
        if "replay" in recipe:
            assert config.replay.per_event == course.memory["per_event"]


def test_a_report_has_all_rows_of_all_entrants_and_the_differences_to_the_control(tiny: None) -> None:
    report = run("continual", Options(seeds=2))
    assert_contract(report.to_json())
    rows = {row.name: row.values for row in report.rows}
    assert [name.split(": ")[1] for name in rows] == ["balanced", "reservoir", "plain torch er"]
    control, other = rows[f"{TINY}: balanced"], rows[f"{TINY}: reservoir"]
    assert isinstance(control["final"], float)
    assert isinstance(other["final"], float)
    assert other["d_final"] == pytest.approx(other["final"] - control["final"])
    assert "d_final" not in control
    assert [bar.name for bar in report.bars] == [f"{TINY}: final of reservoir"]
    assert len(report.curves) == 3


def test_a_method_that_is_asked_for_stands_beside_the_control_alone(tiny: None) -> None:
    report = run("continual", Options(seeds=1, method="reservoir", stream=TINY))
    assert [row.name for row in report.rows] == [f"{TINY}: balanced", f"{TINY}: reservoir"]


def test_a_stream_without_its_data_is_left_out_with_the_reason_or_refused_when_asked_for(
    tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(folder: Path | None, seed: int, quick: bool) -> None:
        raise DataError("no such file")

    tiny_alone = {TINY: lambda _folder, seed, _quick: tiny_course(seed)}
    monkeypatch.setattr(continual, "STREAMS", {**tiny_alone, "elec2": absent})
    report = run("continual", Options(seeds=1, method="no memory"))
    assert "left out: elec2: no such file" in report.notes
    with pytest.raises(DataError, match="no such file"):
        run("continual", Options(stream="elec2"))


def test_a_bar_is_the_mean_of_its_row_or_the_mean_of_paired_differences() -> None:
    found = made({"balanced": [{"final": 80.0}, {"final": 84.0}], "reservoir": [{"final": 81.0}, {"final": 87.0}]})
    assert found.promised(Promise(TINY, "reservoir", "final", 0, 0)) == 84.0
    assert found.promised(Promise(TINY, "reservoir", "final", 0, 0, minus="balanced")) == 2.0
    [bar] = found.bars(quick=False)
    assert (bar.name, bar.value, bar.limit, bar.ok) == (f"{TINY}: final of reservoir", 84.0, 82.0, True)


def test_a_promise_about_who_was_not_run_is_no_bar() -> None:
    assert made({"balanced": [{"final": 90.0}]}).bars(quick=False) == []


def test_each_preset_of_the_product_is_a_recipe_with_and_without_being_told_of_new_tasks() -> None:
    course = tiny_course(0)
    for name, preset in plugin.presets().items():
        assert name in recipes()
        config = Config.parse(course.config(recipes()[name + TOLD], 0))
        assert [boundary.kind for boundary in config.boundaries] == ["segment"]
        assert len(config.plugins) == len(preset.get("plugins", ()))
        held = preset.get("replay", {}).get("capacity", 50)
        assert config.replay.capacity == (held if "replay" in preset else 20_000)
        if "replay" not in preset:
            assert Config.parse(course.config(recipes()[f"balanced + {name}"], 0)).replay.capacity == 50


def test_who_fails_is_a_note_with_the_reason_and_a_bar_that_is_not_met() -> None:
    curve = np.arange(3.0), np.ones(3)
    found = Findings(
        {
            Job(TINY, "balanced", 0, False, None): Run({"final": 80.0, "min_acc": 50.0}, curve),
            Job(TINY, "reservoir", 0, False, None): "example 7 was left out",
        }
    )
    assert found.failures == [f"failed: {TINY}: reservoir, seed 0: example 7 was left out"]
    [bar] = found.bars(quick=False)
    assert np.isnan(bar.value)
    assert not bar.ok


def test_a_difference_counts_the_seeds_that_both_were_run_with() -> None:
    found = made({"balanced": [{"final": 80.0}, {"final": 0.0}], "no memory": [{"final": 70.0}]})
    assert found.row(TINY, "no memory").values["d_final"] == -10.0


def test_the_best_recipe_is_the_one_of_the_best_main_figure() -> None:
    found = made({"balanced": [{"final": 80.0}], "reservoir": [{"final": 81.0}], "plain torch er": [{"final": 99.0}]})
    assert found.best(TINY) == "reservoir"


def test_quick_limits_are_no_harder_than_those_of_the_full_run() -> None:
    assert all(promise.quick_limit <= promise.limit for promise in PROMISES)
