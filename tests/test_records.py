from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamcl.records import mark, marks

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))


@given(TEXTS)
def test_many_marks_at_once_are_the_mark_of_each(texts: list[str]) -> None:
    assert marks(texts).tolist() == [mark(text) for text in texts]
