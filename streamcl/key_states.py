"""What a recurrent model carries from event to event, by key: a slab of rows, the key seen longest ago gives way."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from streamcl.protocols import State
from streamcl.records import Selector


class KeyStates:
    """A row of numbers and the time of the last event for each of the last `capacity` keys.

    Args:
        initial: (W,) the row of a key that has done nothing; its last number is the time since the event before.
        unit_s: Of that time (seconds).

    Memory: 4 W bytes a key, taken as keys come; the slab doubles when it is full.
    """

    def __init__(self, capacity: int, initial: NDArray[np.float32], unit_s: float) -> None:
        self.capacity, self.initial, self.unit_s = capacity, initial, unit_s
        self._begin()

    def _begin(self) -> None:
        # In the order of last use; the first of a plain dict stands behind all that have moved.
        self.slots: OrderedDict[str, int] = OrderedDict()
        self.free: list[int] = []
        self.rows = np.zeros((0, len(self.initial)), np.float32)
        self.times = np.zeros(0)

    def __len__(self) -> int:
        return len(self.slots)

    def before(self, key: str, time_s: float) -> NDArray[np.float32]:
        """(W,) what a key brings to an event at this time. Changes nothing."""
        slot = self.slots.get(key)
        if slot is None:
            return self.initial.copy()
        row: NDArray[np.float32] = self.rows[slot].copy()
        row[-1] = max(0.0, time_s - self.times[slot]) / self.unit_s
        return row

    def write(self, key: str, time_s: float, state: NDArray[np.float32]) -> None:
        """(W - 1,) what the key takes along from its event. A state that is not finite begins anew."""
        slot = self.slots.pop(key, None)
        if slot is None:
            slot = self._slot()
        self.slots[key] = slot
        self.rows[slot, :-1] = state if np.isfinite(state).all() else self.initial[:-1]
        self.times[slot] = time_s

    def _slot(self) -> int:
        if len(self.slots) >= self.capacity:
            return self.slots.popitem(last=False)[1]
        if self.free:
            return self.free.pop()
        if len(self.slots) == len(self.rows):
            more = min(max(16, len(self.rows)), self.capacity - len(self.rows))
            self.rows = np.concatenate((self.rows, np.zeros((more, self.rows.shape[1]), np.float32)))
            self.times = np.concatenate((self.times, np.zeros(more)))
        return len(self.slots)

    def forget(self, who: Selector) -> int:
        """Erase the states of keys that are meant. A selection of events alone cannot be taken out of a state: then all
        that may hold one of them begin anew, which without a key are all.
        """
        meant = [key for key in self.slots if who.key in (None, key)]
        for key in meant:
            slot = self.slots.pop(key)
            self.rows[slot], self.times[slot] = 0.0, 0.0
            self.free.append(slot)
        return len(meant)

    def state_dict(self) -> State:
        slots = np.array(list(self.slots.values()), np.int64)
        return {"keys": list(self.slots), "rows": self.rows[slots], "times": self.times[slots]}

    def load_state_dict(self, state: State) -> None:
        """Of another width, or empty: it begins here."""
        self._begin()
        if not state or state["rows"].shape[1:] != self.initial.shape:
            return
        self.slots = OrderedDict((key, slot) for slot, key in enumerate(state["keys"]))
        self.rows, self.times = np.array(state["rows"]), np.array(state["times"])
