"""Every row of a file arrives, good or bad, in constant memory."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.codec import JSON
from connectors.rows import kind_of, open_rows
from streamcl.protocols import BadInput, ConnectorError

cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r"), max_size=6)


def rows_of(path: Path, most: int = 1000) -> list[Any]:
    file, rows = open_rows(path, most)
    with file:
        return list(rows)


def csv_rows(folder: Path, content: bytes, most: int = 1000) -> list[Any]:
    path = folder / "rows.csv"
    path.write_bytes(content)
    return rows_of(path, most)


def undecodable(row: Any) -> bool:
    try:
        JSON().decode(row)
    except BadInput:
        return True
    return False


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.booleans())
def test_lines_arrive_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], zipped: bool) -> None:
    path = tmp_path_factory.mktemp("rows") / ("rows.jsonl.gz" if zipped else "rows.jsonl")
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert rows_of(path) == lines


def test_a_last_line_without_its_line_feed_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a":1}\n\n{"a":')
    assert rows_of(path) == [b'{"a":1}', b"", b'{"a":']


@pytest.mark.parametrize("length", [10, 11, 12, 13, 200_000])
def test_a_long_line_is_cut_behind_the_limit_and_the_next_is_whole(tmp_path: Path, length: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * length + b"\nnext\nlast")
    first, *rest = rows_of(path, most=10)
    assert rest == [b"next", b"last"]
    assert len(first) == min(length, 12)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=6))
def test_csv_that_python_wrote_reads_back(tmp_path_factory: pytest.TempPathFactory, table: list[list[str]]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["a", "b"], *table])
    found = csv_rows(tmp_path_factory.mktemp("rows"), out.getvalue().encode())
    assert [[_shown(row["a"], a), _shown(row["b"], b)] for row, (a, b) in zip(found, table, strict=True)] == table


def _shown(value: Any, cell: str) -> str:
    """The text of a cell; a number must be the one that stands there."""
    if isinstance(value, (int, float)):
        assert value == float(cell)
        return cell
    return value or ""


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("0", 0),
        ("-7", -7),
        ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", "18446744073709551616"),
        ("-9223372036854775809", "-9223372036854775809"),
        ("1.50", 1.5),
        ("-0.0", -0.0),
        ("1e-05", 1e-5),
        ("1e+16", 1e16),
        ("", None),
        ("007", "007"),
        ("-0", "-0"),
        ("+1", "+1"),
        (".5", ".5"),
        ("5.", "5."),
        ("1e5", "1e5"),
        ("12e4", "12e4"),
        ("9e+999", "9e+999"),
        ("1_000", "1_000"),
        (" 1", " 1"),
        ("٣", "٣"),
        ("nan", "nan"),
        ("Infinity", "Infinity"),
        ("true", "true"),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_a_cell_is_a_number_only_where_nothing_is_lost(tmp_path: Path, cell: str, value: object) -> None:
    [row] = csv_rows(tmp_path, f"a,b\n{cell},x\n".encode(), most=10_000)
    assert (row["a"], type(row["a"])) == (value, type(value))
    assert orjson.loads(orjson.dumps(row)) == row


def test_a_dotted_column_goes_into_a_nested_object(tmp_path: Path) -> None:
    assert csv_rows(tmp_path, b"id,user.id,user.age\nx,u,3\n") == [{"id": "x", "user": {"id": "u", "age": 3}}]


def test_a_bom_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path) -> None:
    assert csv_rows(tmp_path, b"\xef\xbb\xbfa,b\r\n1,x\r\n") == [{"a": 1, "b": "x"}]


@pytest.mark.parametrize(
    "bad",
    [
        b"1",  # ragged: too few
        b"1,2,3",  # too many
        b"",  # blank
        b'{"a":1}',  # ragged, and an object by itself
        b'"x"y,2',  # badly quoted
        b"\xff,2",  # not UTF-8
        b'{"a":1}\xff,2',
    ],
)
def test_a_bad_row_is_undecodable_and_the_next_is_whole(tmp_path: Path, bad: bytes) -> None:
    first, row, last = csv_rows(tmp_path, b"a,b\n1,2\n" + bad + b"\n3,4\n")
    assert (first, last) == ({"a": 1, "b": 2}, {"a": 3, "b": 4})
    assert undecodable(row)


def test_a_quote_that_never_ends_is_one_bad_row(tmp_path: Path) -> None:
    rows = csv_rows(tmp_path, b'a,b\n1,2\n"3,4\n5,6\n')
    assert rows[0] == {"a": 1, "b": 2}
    assert len(rows) == 2
    assert undecodable(rows[1])


def test_a_huge_cell_is_a_row_above_the_limit(tmp_path: Path) -> None:
    huge, last = csv_rows(tmp_path, b"a,b\n1," + b"x" * 300_000 + b"\n3,4\n", most=1000)
    assert 1000 < len(huge) < 2000
    assert last == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (b"", "must name the columns"),
        (b"\n1,2\n", "must name the columns"),
        (b"a,\xff\n", "in UTF-8"),
        (b"a,b,a\n", "column 'a' appears twice"),
        (b"user.id,user\n", "column 'user' appears twice, or within another's path"),
        (b'"a"b,c\n', "header"),
    ],
)
def test_a_csv_file_without_usable_names_is_an_error(tmp_path: Path, header: bytes, error: str) -> None:
    with pytest.raises(ConnectorError, match=error):
        csv_rows(tmp_path, header)


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.parquet", "a.jsonl.bz2"])
def test_a_file_of_another_kind_is_an_error(name: str) -> None:
    with pytest.raises(ConnectorError, match=r"ends in .jsonl, .csv"):
        kind_of(Path(name))
