"""Dynamic tables that a group of learners share: what a round has changed is taken back, and what all have come to is
put in its place. Work is in proportion to the rows that have changed, but for copies of the three links of each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl.compiled import entry
from streamcl.engine import table_rows
from streamcl.engine.kernels import KINDS
from streamcl.engine.table_rows import Tables, begin, evict, link, table_of, unlink
from streamcl.index import NONE, enter, find

if TYPE_CHECKING:
    from streamcl.engine.tables import DynamicTables

Arrays = NDArray[Any]
_ROW = ("keys", "count", "first_seen", "last_seen")
_LINKS = ("newer", "older", "free")
_TABLE = ("newest", "oldest", "used", "high", "freed")


class Base:
    """The tables' books as they stood at the start of a round: 44 bytes a row.

    Rows are counted as in `table_rows`: from the first of all dynamic ones.
    """

    def __init__(self, tables: DynamicTables) -> None:
        self.tables = tables
        self.books = {name: getattr(tables.of, name).copy() for name in (*_ROW, *_LINKS, *_TABLE)}

    def keep(self, rows: Arrays) -> None:
        """The books are right as they stand now; at most these rows (n,) have changed."""
        of = self.tables.of
        for name in _ROW:
            self.books[name][rows] = getattr(of, name)[rows]
        for span in self._used():
            for name in _LINKS:
                self.books[name][span] = getattr(of, name)[span]
        for name in _TABLE:
            self.books[name][:] = getattr(of, name)

    def restore(self, rows: Arrays) -> None:
        """Take back what has happened to these rows; whoever calls it does so to their vectors and slots."""
        of = self.tables.of
        changed = rows[of.keys[rows] != self.books["keys"][rows]]
        table_rows.unindex(changed[of.keys[changed] != 0], of.keys, of.cells)
        for name in _ROW:
            getattr(of, name)[rows] = self.books[name][rows]
        for span in self._used():
            for name in _LINKS:
                getattr(of, name)[span] = self.books[name][span]
        for name in _TABLE:
            getattr(of, name)[:] = self.books[name]
        table_rows.index(changed[of.keys[changed] != 0], of.keys, of.cells)

    def _used(self) -> list[slice]:
        """Of each table the rows that have ever been used, now or at the round's start."""
        of = self.tables.of
        ends = of.base + np.maximum(of.high, self.books["high"])
        return [slice(start, end) for start, end in zip(of.base.tolist(), ends.tolist(), strict=True)]


def found(tables: DynamicTables, keys: Arrays) -> Arrays:
    """(n,) rows of ids, or NONE."""
    rows = np.empty(len(keys), np.int64)
    _find(keys, tables.of, rows)
    return rows


def owner(tables: DynamicTables, rows: Arrays) -> Arrays:
    """(n,) which table rows belong to."""
    return np.searchsorted(tables.of.base, rows, side="right") - 1


def remove(tables: DynamicTables, rows: Arrays) -> None:
    """These rows, which stand in their lists, go for want of room; their numbers become 0."""
    _remove(rows, table_rows.BY_LRU, tables.of, *tables.data)


def make(tables: DynamicTables, keys: Arrays, place: Arrays) -> Arrays:
    """Rows for ids (n,) that have none, of table `place` (n,) each: as new ones begin. They stand in no list yet."""
    rows = np.empty(len(keys), np.int64)
    _make(keys, place, tables.of, *tables.data[:2], rows)
    if tables.keep is not None and len(rows):
        at = torch.from_numpy(rows + tables.first)
        for column in tables.columns[: 2 if tables.of.optimizer == KINDS["ftrl"] else 1]:
            column[at] *= tables.keep(at)
    return rows


def unlist(tables: DynamicTables, rows: Arrays) -> None:
    """Take rows out of the lists of who was learned from last."""
    _unlist(rows, tables.of)


def enlist(tables: DynamicTables, rows: Arrays) -> None:
    """Put rows at their head, one after the other."""
    _enlist(rows, tables.of)


def oldest(tables: DynamicTables, place: int, count: int) -> Arrays:
    """(k,) rows that were learned from longest ago, as many as there are up to `count`."""
    rows = np.empty(count, np.int64)
    return rows[: _oldest(place, tables.of, rows)]


@entry
def _find(keys: Any, tables: Tables, rows: Any) -> None:
    for i in range(len(keys)):
        rows[i] = find(keys[i], tables.keys, tables.cells)


@entry
def _remove(rows: Any, reason: int, tables: Tables, table: Any, a: Any, b: Any, c: Any) -> None:
    for row in rows:
        evict(row, reason, tables, table, a, b, c)


@entry
def _make(keys: Any, place: Any, tables: Tables, table: Any, a: Any, rows: Any) -> None:
    row: Any
    for i in range(len(keys)):
        t = place[i]
        if tables.freed[t] > 0:
            tables.freed[t] -= 1
            row = np.int64(tables.free[tables.base[t] + tables.freed[t]])
        else:
            row = np.int64(tables.base[t] + tables.high[t])
            tables.high[t] += 1
        tables.keys[row] = keys[i]
        enter(row, tables.keys, tables.cells)
        tables.used[t] += 1
        begin(row, t, tables, table, a)
        rows[i] = row


@entry
def _unlist(rows: Any, tables: Tables) -> None:
    for row in rows:
        unlink(row, table_of(row, tables), tables)


@entry
def _enlist(rows: Any, tables: Tables) -> None:
    for row in rows:
        link(row, table_of(row, tables), tables)


@entry
def _oldest(place: int, tables: Tables, rows: Any) -> int:
    n, row = 0, tables.oldest[place]
    while n < len(rows) and row != NONE:
        rows[n] = row
        row = tables.newer[row]
        n += 1
    return n
