import pytest

from streamcl.bench import plasticity_overhead, run
from streamcl.bench.options import Options
from streamcl.bench.plasticity_overhead import Size, cases, engine
from streamcl.methods import PLASTICITY
from tests.bench.test_report import assert_contract


def test_every_rule_of_the_product_stands_beside_a_step_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity_overhead, "QUICK", Size(2, 20))
    report = run("plasticity", Options(quick=True, task="overhead"))
    assert_contract(report.to_json())
    rows = {row.name: row.values for row in report.rows}
    assert {"off", *PLASTICITY, "layer_norm", "continual_backprop, exact", "diagnostics"} <= rows.keys()
    assert 0 < float(str(rows.pop("diagnostics, ranks and weights")["us_per_step"])) < 100
    for name, values in rows.items():
        assert float(str(values["us_per_step"])) > 0
        assert ("ratio" in values) != name.startswith(("off", "compiled: off"))
    [bar] = report.bars
    assert bar.value == rows["continual_backprop"]["ratio"]


def test_the_engines_that_are_compared_differ_by_their_rule_alone() -> None:
    made = {"off": engine({}), **{case.name: engine(case.settings) for case in cases() if case.base == "off"}}
    assert made["off"].rules == {}
    assert list(made["continual_backprop"].rules) == ["continual_backprop"]
    assert {tuple(each.dense.flat[:5].tolist()) for each in made.values()} == {
        tuple(made["off"].dense.flat[:5].tolist())
    }
    assert [p.shape[0] for n, p in made["off"].dense.params.items() if n.endswith("bias")] == [100, 100, 100, 10]
