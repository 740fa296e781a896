"""Whose the rows of a table are, in 24 bytes a row: enough to erase them, and of no use once they are erased."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamcl.protocols import State
from streamcl.records import Selector, Ticket, mark
from streamcl.state import cut

NAMES = ("owner_key", "owner_id", "owner_time_s")


class Owner(NamedTuple):
    """Marks (see `records.mark`) of an event's key and id, and its time; 0 and NaN where that is not known."""

    key: int = 0
    id: int = 0
    time_s: float = math.nan


NOBODY = Owner()
"""It is not known whose a row is: every forget erases it."""


class Owners:
    """Three columns of a table of `capacity` rows, for the table to move as it moves its own.

    A mark is a hash of 64 bits. Of 20,000 rows one is erased by mistake in about 10^15 requests, and none escapes.
    """

    def __init__(self, capacity: int) -> None:
        self.keys = np.zeros(capacity, np.int64)
        self.ids = np.zeros(capacity, np.int64)
        self.times = np.full(capacity, np.nan)

    @staticmethod
    def of(ticket: Ticket) -> Owner:
        return Owner(mark(ticket.key), mark(ticket.id), ticket.time_s)

    def write(self, row: int, owner: Owner) -> None:
        self.keys[row], self.ids[row], self.times[row] = owner

    def columns(self) -> tuple[NDArray[Any], ...]:
        return self.keys, self.ids, self.times

    def meant(self, who: Selector, size: int) -> NDArray[np.bool_]:
        """(size,) which of the first rows are to be forgotten."""
        found = np.ones(size, np.bool_)
        if who.owners is not None:
            found &= np.isin(self.keys[:size], list(who.owners))
        if who.ids:
            found &= np.isin(self.ids[:size], (0, *map(mark, who.ids)))
        if who.from_s is not None:
            found &= ~(self.times[:size] < who.from_s)  # NaN stays in
        if who.until_s is not None:
            found &= ~(self.times[:size] >= who.until_s)
        return found

    def close_ranks(self, kept: NDArray[np.int64], size: int) -> None:
        for column in self.columns():
            close_ranks(column, kept, size)

    def state_dict(self, size: int) -> State:
        return {name: cut(column[:size]) for name, column in zip(NAMES, self.columns(), strict=True)}

    def load_state_dict(self, state: Mapping[str, Any], size: int) -> None:
        """A state without these columns, an old snapshot's, is of rows that nobody knows the owners of."""
        for name, column, unknown in zip(NAMES, self.columns(), NOBODY, strict=True):
            column[:size] = state.get(name, unknown)


def close_ranks(column: NDArray[Any], kept: NDArray[np.int64], size: int) -> None:
    """Move the rows `kept` of the first `size`, in that order, to the front; nothing is left behind them."""
    column[: len(kept)] = column[kept]
    column[len(kept) : size] = 0
