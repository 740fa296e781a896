from __future__ import annotations

import pytest

from streamcl.config import ConfigError
from streamcl.sweep.halving import Cut, cuts, ranked
from streamcl.sweep.space import Halving


def test_rounds_take_eta_times_the_events_and_leave_one_in_eta() -> None:
    plan = cuts(27, 100_000, Halving(eta=3, first=5_000), None, "sweep")
    assert plan == [Cut(5_000, 9), Cut(15_000, 3), Cut(45_000, 1), Cut(100_000, None)]


def test_no_round_decides_among_one() -> None:
    assert cuts(2, 1_000, Halving(eta=2, first=10), None, "sweep") == [Cut(10, 1), Cut(1_000, None)]
    assert cuts(1, 1_000, Halving(eta=2, first=10), None, "sweep") == [Cut(1_000, None)]


def test_a_choice_on_a_share_lies_behind_its_rounds() -> None:
    plan = cuts(9, 10_000, Halving(eta=3, first=500), 0.2, "sweep")
    assert plan == [Cut(500, 3), Cut(1_500, 1), Cut(2_000, 1), Cut(10_000, None)]
    assert cuts(9, 10_000, None, 0.2, "sweep") == [Cut(2_000, 1), Cut(10_000, None)]


def test_a_first_round_as_long_as_the_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sweep: halving\.first: the choice has 2000 events"):
        cuts(9, 10_000, Halving(eta=3, first=2_000), 0.2, "sweep")


def test_who_has_no_value_comes_last() -> None:
    assert ranked("ne", {"a": None, "b": 0.9, "c": 0.8}) == ["c", "b", "a"]
    assert ranked("auc", {"a": None, "b": 0.9, "c": 0.8}) == ["b", "c", "a"]
