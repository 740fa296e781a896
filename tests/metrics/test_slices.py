from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.metrics.losses import log_loss, normalized_entropy
from streamcl.metrics.ranking import exact_auc
from streamcl.metrics.slices import LONGEST, MISSING, OTHER, Slices
from streamcl.records import Outcome, Selector
from streamcl.state import digest
from streamcl.testing import check_stateful
from tests.metrics.sliced import outcome, take
from tests.metrics.sliced import settings as config

ON: dict[str, Any] = {"group_by": "user", "segments": ["device"], "max_segments": 2, "window": 12}
ROW = st.tuples(
    st.integers(0, 1),
    st.sampled_from([0.125, 0.25, 0.5]),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(["", "ios", "web", "tv", OTHER]),
)
Rows = list[tuple[int, float, str, str]]


def made(rows: Rows) -> list[Outcome]:
    return [outcome(y, p, key, device=device) for y, p, key, device in rows]


def fed(rows: Rows, **changes: Any) -> Slices:
    slices = Slices(config(**(ON | changes)))
    take(slices, made(rows))
    return slices


def by_hand(rows: Rows, window: int, most: int) -> dict[str, float]:
    """From all rows, by plain loops."""
    named: list[str] = []
    for *_, device in rows:
        if (device or MISSING) not in named and len(named) < most and device != OTHER:
            named.append(device or MISSING)
    found: dict[str, float] = {}
    last = rows[-window:]
    for name in (*named, OTHER):
        of = [(y, p) for y, p, _, d in last if ((d or MISSING) if (d or MISSING) in named else OTHER) == name]
        if of:
            y, p = zip(*of, strict=True)
            told = {"events": len(of), "log_loss": log_loss(y, p), "ne": normalized_entropy(y, p)}
            told |= {"auc": exact_auc(y, p), "base_rate": sum(y) / len(y)}
            told |= {"calibration": sum(p) / sum(y) if any(y) else math.nan}
            found |= {f"segment:device:{name}:{what}": value for what, value in told.items()}
    mean = judged = 0.0
    for key in {key for _, _, key, _ in last} - {""}:
        y, p = zip(*[(y, p) for y, p, k, _ in last if k == key], strict=True)
        if len(set(y)) == 2:
            mean, judged = mean + len(y) * exact_auc(y, p), judged + len(y)
    if last:
        found |= {"gauc_left_out_window": 1 - judged / len(last)}
    found |= {"gauc_window": mean / judged} if judged else {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


@given(st.lists(ROW, max_size=30), st.integers(1, 12), st.integers(1, 3))
def test_figures_are_those_of_the_window_s_examples(rows: Rows, window: int, most: int) -> None:
    found = fed(rows, window=window, max_segments=most).read()
    assert found == pytest.approx(by_hand(rows, window, most), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(st.lists(ROW, max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_many_at_once_are_to_the_bit_what_they_are_one_by_one(rows: Rows, cuts: list[int]) -> None:
    whole, cut = fed([]), fed([])
    for each in made(rows):
        take(whole, [each])
    for start, end in pairwise([0, *sorted(cuts), len(rows)]):
        take(cut, made(rows[start:end]))
    assert digest(cut.state_dict()) == digest(whole.state_dict())
    assert cut.read() == whole.read()


def test_it_resumes_to_the_bit() -> None:
    def exercise(part: Slices, step: int) -> Any:
        key, device = "abc"[step % 3], f"device {step % 5}"
        take(part, [outcome(step % 2, 0.125 * (step % 7), key, device=device)])
        return part.read()

    check_stateful(lambda: Slices(config(**ON)), exercise, steps=30)


def test_however_many_values_come_there_are_so_many_series_and_one_more() -> None:
    slices = Slices(config(segments=["device"], max_segments=3, window=1000))
    for value in range(500):
        take(slices, [outcome(value % 2, 0.5, device=f"d{value}")])
    values = {name.split(":")[2] for name in slices.read()}
    assert values == {"d0", "d1", "d2", OTHER}
    assert slices.read()[f"segment:device:{OTHER}:events"] == 497
    assert slices.state_dict()["values"] == [["d0", "d1", "d2"]]


def test_a_value_that_is_too_long_for_a_label_is_among_the_others() -> None:
    slices = Slices(config(segments=["device"], window=10))
    take(slices, [outcome(1, 0.5, device="x" * LONGEST), outcome(1, 0.5, device="y" * (LONGEST + 1))])
    assert {name.split(":")[2] for name in slices.read()} == {"x" * LONGEST, OTHER}


def test_what_has_no_finite_loss_enters_nothing() -> None:
    slices = fed([(1, 0.5, "a", "ios")])
    before = digest(slices.state_dict())
    take(slices, [outcome(0.0, math.nan, "b", device="web")], math.nan)
    assert digest(slices.state_dict()) == before


def test_weights_count_as_so_many_examples() -> None:
    twice = [(1, 0.5, 2.0), (0, 0.25, 1.0), (0, 0.75, 3.0)]
    one, many = Slices(config(**ON)), Slices(config(**ON))
    for y, p, w in twice:
        take(one, [outcome(y, p, "a", w, device="ios")])
        take(many, [outcome(y, p, "a", device="ios")] * int(w))
    found, expected = one.read(), many.read()
    assert found.pop("segment:device:ios:events") == 3
    assert expected.pop("segment:device:ios:events") == 6
    assert found == pytest.approx(expected)


def test_off_it_has_no_state_and_says_nothing() -> None:
    slices = Slices(config())
    take(slices, [outcome(1, 0.5, device="ios")])
    assert slices.state_dict() == {}
    assert slices.read() == {}
    assert slices.forget(Selector(key="u")) == {}


@pytest.mark.parametrize("changes", [{"max_segments": 1}, {"segments": []}, {"group_by": "device"}])
def test_under_other_settings_it_begins_anew(changes: Any) -> None:
    other = Slices(config(**(ON | changes)))
    other.load_state_dict(fed([(1, 0.5, "a", "ios"), (0, 0.5, "a", "ios")]).state_dict())
    assert other.read() == {}
    other.load_state_dict({})
    assert other.read() == {}


def test_whoever_is_forgotten_is_in_no_group_any_more() -> None:
    rows: Rows = [(1, 0.5, "a", "ios"), (0, 0.25, "a", "ios"), (1, 0.25, "b", "ios"), (0, 0.5, "b", "ios")]
    slices = fed(rows)
    assert slices.read()["gauc_window"] == 0.5
    assert slices.forget(Selector(key="b")) == {"grouped": 2}
    assert slices.read()["gauc_window"] == 1.0
    assert slices.read()["gauc_left_out_window"] == 0.5
    assert slices.forget(Selector(ids=frozenset(["x"]))) == {"grouped": 2}  # it may be any
    assert "gauc_window" not in slices.read()
    assert slices.read()["segment:device:ios:events"] == 4
