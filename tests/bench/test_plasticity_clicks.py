import pytest

from streamcl.bench import plasticity_clicks, run
from streamcl.bench.options import OptionError, Options
from streamcl.bench.plasticity_clicks import Size
from tests.bench.test_report import assert_contract


def test_the_products_rule_is_compared_with_none_on_the_same_clicks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity_clicks, "QUICK", Size(120, 1))
    report = run("plasticity", Options(quick=True, task="drifting-ctr", stream="switching"))
    assert_contract(report.to_json())
    assert [row.name for row in report.rows] == [
        f"{optimizer}: {rule}" for optimizer in ("adagrad", "sgd") for rule in ("off", "continual_backprop")
    ]
    off, on = (row.values for row in report.rows[:2])
    difference = float(str(on["log_loss"])) - float(str(off["log_loss"]))
    assert on["log_loss_minus_off"] == pytest.approx(difference)
    assert report.bars == ()
    assert report.aims[0].value == pytest.approx(difference)


def test_a_rule_the_product_does_not_know_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--method: 'linear' is none of .*continual_backprop"):
        run("plasticity", Options(task="drifting-ctr", method="linear"))
