"""The last N rows. Sums over them are taken anew at each reading, so they can't drift with the years."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamcl.protocols import State


def in_larger_ring(state: State, size: int) -> State:
    """What a window with this state holds, as the state of one of `size` rows, for all of which there is room."""
    ring, written = np.asarray(state["ring"]), int(state["written"])
    held = np.roll(ring, -(written % len(ring)), axis=0) if written >= len(ring) else ring[:written]
    room = np.zeros((size - len(held), ring.shape[1]))
    return {"ring": np.concatenate((held, room)), "written": len(held)}


class Window:
    """A ring of the last `size` rows of `width` numbers; `append` is O(1).

    Attributes:
        ring, written: (size, width), and (1,) the rows ever appended: compiled code appends to them itself.

    Raises:
        ValueError: size < 1; or a state of another shape is loaded.
    """

    def __init__(self, size: int, width: int) -> None:
        if size < 1:
            raise ValueError(f"metrics.window: {size} must be at least 1")
        self._size = size
        self.ring = np.zeros((size, width), dtype=np.float64)
        self.written = np.zeros(1, np.int64)

    def append(self, row: tuple[float, ...]) -> None:
        self.ring[self.written[0] % self._size] = row
        self.written += 1

    def extend(self, rows: NDArray[np.float64]) -> None:
        """Append (n, width)."""
        first = max(0, len(rows) - self._size)  # no two of those left go to one place
        self.ring[(self.written[0] + np.arange(first, len(rows))) % self._size] = rows[first:]
        self.written += len(rows)

    def columns(self) -> NDArray[np.float64]:
        """The rows held, oldest first, as (width, n): what is computed from them depends on nothing else."""
        written = int(self.written[0])
        if written < self._size:
            return self.ring[:written].T.copy()
        return np.ascontiguousarray(np.roll(self.ring, -(written % self._size), axis=0).T)

    def state_dict(self) -> State:
        return {"ring": self.ring.copy(), "written": int(self.written[0])}

    def load_state_dict(self, state: State) -> None:
        size, width = np.shape(state["ring"])
        if size != self._size or width not in (self.ring.shape[1], self.ring.shape[1] - 1):
            raise ValueError(f"metrics.window: saved {np.shape(state['ring'])}, configured {self.ring.shape}")
        self.ring[:, :width] = state["ring"]
        self.ring[:, width:] = 1.0  # the weights, of which an old snapshot knows nothing
        self.written[0] = state["written"]
