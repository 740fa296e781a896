"""Where a key's row is: an open-addressed index without tombstones, compiled (Knuth, TAOCP 3, 6.4, algorithm R).

`keys` (D,) int64 are those of rows; `cells` (a power of two above D,) hold 1 + row, 0: none. A key is looked for from
the cell that its last bits name: ids that are hashes lie at random there, rows that are counted one behind the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamcl.compiled import exact

NONE = -1


@exact
def find(key: Any, keys: Any, cells: Any) -> Any:
    """Row of a key, or NONE."""
    mask = len(cells) - 1
    at = key & mask
    while cells[at] != 0:
        row = cells[at] - 1
        if keys[row] == key:
            return np.int64(row)
        at = (at + 1) & mask
    return NONE


@exact
def enter(row: int, keys: Any, cells: Any) -> None:
    mask = len(cells) - 1
    at = keys[row] & mask
    while cells[at] != 0:
        at = (at + 1) & mask
    cells[at] = row + 1


@exact
def leave(row: int, keys: Any, cells: Any) -> None:
    """Whatever stands behind it, and would be found sooner, moves up."""
    mask = len(cells) - 1
    at = keys[row] & mask
    while cells[at] != row + 1:
        at = (at + 1) & mask
    cells[at] = 0
    behind = (at + 1) & mask
    while cells[behind] != 0:
        home = keys[cells[behind] - 1] & mask
        if ((behind - home) & mask) >= ((behind - at) & mask):
            cells[at] = cells[behind]
            cells[behind] = 0
            at = behind
        behind = (behind + 1) & mask
