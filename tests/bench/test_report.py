import math
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.bench.options import OptionError
from streamcl.bench.report import Bar, Curve, Report, Row, draw, emit

ROW = Row("ours", {"auc": 0.76, "note": None, "events": 100_000})


def report(*bars: Bar, aims: tuple[Bar, ...] = (), curves: tuple[Curve, ...] = ()) -> Report:
    config = {"stream": "s"}
    return Report("stream", config, [0], 1.5, [ROW], bars, aims, headline={"auc": 0.76}, curves=curves)


def assert_contract(found: dict[str, object]) -> None:
    """The shape that every bench's object has."""
    shape = {"bench": str, "config": dict, "seeds": list, "seconds": float, "machine": dict, "rows": list, "bars": list}
    for name, kind in shape.items():
        assert isinstance(found[name], kind), name
    machine = found["machine"]
    assert isinstance(machine, dict)
    assert machine.keys() == {"cpus", "gpu", "versions"}
    for row in found["rows"]:  # type: ignore[attr-defined]
        assert isinstance(row["name"], str)
    for bar in found["bars"]:  # type: ignore[attr-defined]
        assert bar.keys() == {"name", "value", "limit", "ok"}


def test_the_json_object_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    emit(report(Bar("auc >= peer", 0.76, 0.75)), as_json=True, plot=None)
    found = orjson.loads(capsys.readouterr().out)
    assert_contract(found)
    assert found["auc"] == 0.76
    assert found["rows"] == [{"name": "ours", "auc": 0.76, "note": None, "events": 100_000}]
    assert found["bars"] == [{"name": "auc >= peer", "value": 0.76, "limit": 0.75, "ok": True}]
    assert found["machine"]["versions"]["torch"]


def test_what_is_not_a_number_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    emit(report(Bar("auc", math.nan, 0.75)), as_json=True, plot=None)
    assert orjson.loads(capsys.readouterr().out)["bars"] == [{"name": "auc", "value": None, "limit": 0.75, "ok": False}]


@given(st.floats(allow_nan=True), st.floats(allow_nan=False), st.booleans())
def test_a_bar_is_met_on_its_limit_and_never_by_nan(value: float, limit: float, at_least: bool) -> None:
    assert Bar("x", limit, limit, at_least).ok
    assert Bar("x", value, limit, at_least).ok == (value >= limit if at_least else value <= limit)
    assert not Bar("x", math.nan, limit, at_least).ok


def test_one_missed_bar_makes_the_exit_code() -> None:
    met, missed = Bar("a", 1.0, 0.0), Bar("b", 0.0, 1.0)
    assert report().exit_code == 0
    assert report(met).exit_code == 0
    assert report(met, missed).exit_code == 1


def test_a_missed_aim_does_not() -> None:
    assert report(aims=(Bar("b", 0.0, 1.0),)).exit_code == 0


def test_the_table_shows_rows_bars_and_aims(capsys: pytest.CaptureFixture[str]) -> None:
    emit(report(Bar("bar one", 1.0, 2.0), aims=(Bar("aim one", 1.0, 0.0),)), as_json=False, plot=None)
    out = capsys.readouterr().out
    assert "0.7600" in out
    assert "100000" in out
    assert "bar one" in out
    assert "NO" in out
    assert "aim one" in out


def test_rows_of_a_table_have_columns_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("a", {"auc": 0.7}, table="clicks"), Row("b", {"regret": 0.1}, table="drift")]
    emit(replace(report(), rows=rows), as_json=False, plot=None)
    clicks, drift = capsys.readouterr().out.split("drift", 1)
    assert "auc" in clicks
    assert "regret" not in clicks
    assert "regret" in drift
    assert "auc" not in drift


def test_a_plot_needs_curves(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--plot: bench stream has no curves"):
        draw(report(), tmp_path / "x.png")


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing comes with the extra bench")
    curves = (Curve("a", [1.0, 2.0], [0.5, 0.4], panel="left"), Curve("a", [1.0], [0.5], panel="right"))
    draw(report(curves=curves), tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count("left") >= 1
