import io
import math

import pytest
from rich.console import Console

from streamcl.demo.view import Glance, View, board, clock, line, number, spark

METRICS = {"log_loss": 0.412, "ne": 0.84, "auc": 0.77}
GLANCE = Glance(
    title="a demo",
    share=0.25,
    per_s=312.0,
    elapsed_s=20.0,
    now=METRICS,
    before={**METRICS, "log_loss": 0.701},
    bayes={**METRICS, "log_loss": 0.333},
    readings={"tickets": 123.0, "lag_records": 7.0, "replay_rows": 1500.0},
    replay_capacity=2000,
    curve=(0.7, 0.5, 0.4, math.nan),
    drifts=("tastes turn (impression 90)",),
    alarms=("at 95",),
)


def _shown(console_is_terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=console_is_terminal, width=110, color_system=None)
    with View(console) as view:
        view.show(GLANCE)
    return out.getvalue()


def test_the_board_shows_everything_that_is_promised() -> None:
    out = io.StringIO()
    Console(file=out, width=110).print(board(GLANCE))
    for text in ("a demo", "0.412", "0.701", "0.333", "0.840", "0.770", "312", "7 records", "123", "1,500 of 2,000",
                 "tastes turn (impression 90)", "at 95", "25%", "1:00 left", "Ctrl-C"):  # fmt: skip
        assert text in out.getvalue()


@pytest.mark.parametrize("width", [80, 110, 200])
def test_the_board_stays_within_the_terminal(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(board(GLANCE))
    assert max(len(row) for row in out.getvalue().splitlines()) <= width


def test_without_a_terminal_a_glance_is_one_plain_line() -> None:
    shown = _shown(console_is_terminal=False)
    assert shown == line(GLANCE) + "\n"
    assert "\x1b" not in shown


def test_on_a_terminal_a_glance_is_a_board() -> None:
    assert "a demo" in _shown(console_is_terminal=True)


def test_a_glance_is_due_at_once_and_then_only_after_a_while() -> None:
    view = View(Console(file=io.StringIO()), line_every_s=60.0)
    assert view.due()
    view.show(GLANCE)
    assert not view.due()


def test_time_left_follows_from_what_is_done() -> None:
    assert GLANCE.left_s == pytest.approx(60.0)


def test_a_spark_rises_with_the_values_and_marks_what_is_missing() -> None:
    assert spark((0.0, 1.0, math.nan)) == "▁█·"
    assert spark((0.5, 0.5)) == "▁▁"
    assert spark((math.nan,)) == "·"


def test_what_is_undefined_is_a_dash() -> None:
    assert number(None) == "-"
    assert clock(math.nan) == "-:--"
    assert clock(125.9) == "2:05"
