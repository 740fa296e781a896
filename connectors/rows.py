"""Rows of JSON-lines and CSV files, in constant memory; `connectors.file` says what a row becomes."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import orjson

from connectors.codec import is_text
from streamcl.protocols import ConnectorError

Row = bytes | dict[str, Any]
"""Bytes as they are, or an object that is still to be written as JSON."""

_DECIMAL = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")
_EXPONENT = re.compile(r"-?[0-9](\.[0-9]+)?e[+-][0-9]+")
_BLOCK = 1 << 16


def kind_of(path: Path) -> str:
    """`.jsonl` or `.csv`. Raises ConnectorError for any other name."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".csv"):
        raise ConnectorError(f"{path}: an input ends in .jsonl, .csv, .jsonl.gz or .csv.gz")
    return kind


def open_rows(path: Path, most: int) -> tuple[IO[bytes], Iterator[Row]]:
    """The file, to be closed, and its rows; one longer than `most` bytes is cut at least one byte behind that.

    Raises:
        ConnectorError: a CSV file without usable names (by the iterator).
        OSError, EOFError, zlib.error: the file can't be read (at once, or by the iterator).
    """
    # A CSV reader needs newlines as they are, so both kinds are read as bytes.
    file = cast(IO[bytes], gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))  # noqa: SIM115
    return file, _csv_rows(file, most, path) if kind_of(path) == ".csv" else _lines(file, most)


def _lines(file: IO[bytes], most: int) -> Iterator[bytes]:
    while line := file.readline(most + 2):
        whole = line.endswith(b"\n")
        while not whole and (rest := file.readline(_BLOCK)):
            whole = rest.endswith(b"\n")
        yield line.removesuffix(b"\n")


def _csv_rows(file: IO[bytes], most: int, path: Path) -> Iterator[Row]:
    taken: list[bytes] = []
    reader = csv.reader(_tapped(_lines(file, most), taken), strict=True)
    names = _names(reader, path)
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            cells = None
        raw = b"\n".join(taken)
        if len(raw) > most or not is_text(raw):
            yield raw
        elif cells is None or len(cells) != len(names):
            yield orjson.dumps(cells or [raw.decode()])
        else:
            yield _object(names, cells)


def _tapped(lines: Iterator[bytes], taken: list[bytes]) -> Iterator[str]:
    """Text for the CSV reader; what one row took of it stays in `taken`, since the reader does not say."""
    for line in lines:
        taken.append(line)
        yield line.decode(errors="surrogateescape") + "\n"


def _names(reader: Iterator[list[str]], path: Path) -> list[list[str]]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ConnectorError(f"{path}: header: {error}") from error
    names = [name.removeprefix("\ufeff").split(".") for name in header]
    if not header or not is_text("".join(header).encode(errors="surrogateescape")):
        raise ConnectorError(f"{path}: header: the first row must name the columns, in UTF-8")
    for name in names:
        if any(other[: len(name)] == name for other in names if other is not name):
            raise ConnectorError(f"{path}: header: column {'.'.join(name)!r} appears twice, or within another's path")
    return names


def _object(names: Sequence[Sequence[str]], cells: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        node = made
        for part in name[:-1]:
            node = node.setdefault(part, {})
        node[name[-1]] = _value(cell)
    return made


def _value(cell: str) -> Any:
    if not cell or len(cell) > 32:  # the longest float that Python writes has 24 characters
        return cell or None
    if _EXPONENT.fullmatch(cell):
        return float(cell) if repr(float(cell)) == cell else cell
    if not _DECIMAL.fullmatch(cell):
        return cell
    if "." in cell:
        return float(cell)
    return int(cell) if -(1 << 63) <= int(cell) < 1 << 64 and cell != "-0" else cell
