"""Where an id's row is: a hash table in two flat arrays, 12 bytes a slot, for more ids than a dict has room for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.compiled import entry, exact

NOWHERE = np.uint32(0xFFFFFFFF)
_EMPTY = int(NOWHERE)
SMALLEST = 1 << 10
FULL = 0.7
"""Share of the slots that may be taken."""


class Places:
    """Places (32 bits) by hash (64 bits); several under one hash where ids collide, so whoever looks verifies.

    Linear probing; what is removed leaves no mark behind, so it stays as fast as it was. It doubles when it is full,
    which takes about a second at ten million; it never shrinks.
    """

    def __init__(self) -> None:
        self.count = 0
        self._make(SMALLEST)

    def _make(self, size: int) -> None:
        self._hashes, self._places = np.zeros(size, np.uint64), np.full(size, NOWHERE)
        # An index into a memoryview takes a third of the time of one into an array.
        self._hash_at, self._place_at, self._mask = self._hashes.data, self._places.data, size - 1

    @property
    def nbytes(self) -> int:
        return self._hashes.nbytes + self._places.nbytes

    def find(self, hash: int) -> list[int]:
        """Every place that was put under it."""
        at, mask, found = hash & self._mask, self._mask, []
        hashes, places = self._hash_at, self._place_at
        while (place := places[at]) != _EMPTY:
            if hashes[at] == hash:
                found.append(place)
            at = (at + 1) & mask
        return found

    def put(self, hashes: NDArray[np.uint64], places: NDArray[np.uint32]) -> None:
        wanted = self.count + len(hashes)
        if wanted > FULL * len(self._hashes):
            old_hashes, old_places = self._hashes, self._places
            self._make(1 << int(wanted / FULL).bit_length())
            taken = old_places != NOWHERE
            _put(self._hashes, self._places, old_hashes[taken], old_places[taken])
        _put(self._hashes, self._places, hashes, places)
        self.count = wanted

    def remove(self, hashes: NDArray[np.uint64], places: NDArray[np.uint32]) -> None:
        """Those of them that are there."""
        self.count -= int(_remove(self._hashes, self._places, hashes, places))


@entry
def _put(table: Any, where: Any, hashes: Any, places: Any) -> None:
    mask = np.uint64(len(table) - 1)
    for i in range(len(hashes)):
        at = hashes[i] & mask
        while where[at] != NOWHERE:
            at = (at + np.uint64(1)) & mask
        table[at], where[at] = hashes[i], places[i]


@entry
def _remove(table: Any, where: Any, hashes: Any, places: Any) -> int:
    mask, found = np.uint64(len(table) - 1), 0
    for i in range(len(hashes)):
        at = hashes[i] & mask
        while where[at] != NOWHERE and not (where[at] == places[i] and table[at] == hashes[i]):
            at = (at + np.uint64(1)) & mask
        if where[at] != NOWHERE:
            found += 1
            _close_up(table, where, at, mask)
    return found


@exact
def _close_up(table: Any, where: Any, hole: Any, mask: Any) -> None:
    """Move what follows a removed slot to where it is found: Knuth's Algorithm R (TAOCP 3, 6.4)."""
    at = hole
    while True:
        at = (at + np.uint64(1)) & mask
        if where[at] == NOWHERE:
            break
        home = table[at] & mask
        if ((at - home) & mask) >= ((at - hole) & mask):
            table[hole], where[hole] = table[at], where[at]
            hole = at
    where[hole] = NOWHERE
