import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.window import Window

ROWS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=30)


def filled(size: int, rows: list[tuple[int, int]]) -> Window:
    window = Window(size, 2)
    for row in rows:
        window.append(row)
    return window


@given(st.integers(1, 8), ROWS)
def test_columns_are_the_last_rows_oldest_first(size: int, rows: list[tuple[int, int]]) -> None:
    held = np.array(rows[-size:], dtype=float).reshape(-1, 2)
    np.testing.assert_array_equal(filled(size, rows).columns(), held.T)


@given(st.integers(1, 8), ROWS, ROWS)
def test_rows_at_once_are_rows_one_after_another(
    size: int, before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    window = filled(size, before)
    window.extend(np.array(after, dtype=float).reshape(-1, 2))
    assert window.written == filled(size, before + after).written
    np.testing.assert_array_equal(window.ring, filled(size, before + after).ring)


@given(st.integers(1, 8), ROWS, ROWS)
def test_a_restored_window_goes_on_as_if_nothing_had_been(
    size: int, before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> None:
    restored = Window(size, 2)
    restored.load_state_dict(filled(size, before).state_dict())
    for row in after:
        restored.append(row)
    np.testing.assert_array_equal(restored.columns(), filled(size, before + after).columns())


def test_what_was_read_or_saved_stays_as_it_was() -> None:
    window = filled(2, [(1, 2)])
    columns, state = window.columns(), window.state_dict()
    window.append((3, 4))
    window.append((5, 6))
    assert columns.tolist() == [[1], [2]]
    assert state["ring"].tolist() == [[1, 2], [0, 0]]


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics\.window"):
        Window(0, 2)


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics\.window: saved \(3, 2\), configured \(4, 2\)"):
        Window(4, 2).load_state_dict(Window(3, 2).state_dict())
