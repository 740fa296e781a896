"""Which examples stay in a full memory. A policy answers one question: into which slot does this example go?

`place(label)` returns a slot in [0, capacity), or None when the example isn't kept. It is called once per example,
in stream order. `forget(erased)` takes rows out; nothing else changes a policy's state.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streamcl.protocols import State
from streamcl.random import below, key_of


class Retention(Protocol):
    def place(self, label: float, /) -> int | None: ...

    def forget(self, erased: NDArray[np.bool_], /) -> NDArray[np.int64]:
        """Rows (len(self),) go; returns the old slots of the others, in the order of their new ones, 0, 1, ..."""
        ...

    def __len__(self) -> int: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Recency:
    """The last `capacity` examples: a memory that moves with the stream.

    After a forget those that are left, and then what comes, until `capacity` are held again.
    """

    def __init__(self, capacity: int, _seed: int) -> None:
        self.capacity, self.seen = capacity, 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def place(self, _label: float, /) -> int | None:
        slot = self.seen % self.capacity
        self.seen += 1
        return slot

    def forget(self, erased: NDArray[np.bool_], /) -> NDArray[np.int64]:
        """The oldest comes to lie in slot 0, and is the first to give way again."""
        order = np.roll(np.arange(len(self)), -(self.seen % len(self)))
        kept = order[~erased[order]]
        self.seen = len(kept)
        return kept

    def state_dict(self) -> State:
        return {"seen": self.seen}

    def load_state_dict(self, state: State) -> None:
        self.seen = int(state["seen"])


class Reservoir:
    """A uniform sample of everything learned from so far, in constant memory.

    After `seen` examples each is held with probability `capacity / seen`, whatever their order, so old regimes stay
    represented while the stream drifts.

    After a forget the others are held as before, each with probability `capacity / seen`, and so is what comes: as if
    the sample were a full one in which the erased rows can't be seen. It fills up again as slowly as it changes.

    Source:
        Algorithm R, Vitter 1985, doi 10.1145/3147.3165.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.seen, self.held = capacity, 0, 0
        self.key = key_of(seed, "replay.reservoir")

    def __len__(self) -> int:
        return self.held

    def place(self, _label: float, /) -> int | None:
        self.seen += 1
        slot = self.seen - 1 if self.seen <= self.capacity else below(self.seen, self.key, self.seen)
        if slot >= self.capacity:
            return None
        if slot >= self.held:  # one that is free
            slot = self.held
            self.held += 1
        return slot

    def forget(self, erased: NDArray[np.bool_], /) -> NDArray[np.int64]:
        kept = np.flatnonzero(~erased)
        if self.seen <= self.capacity:  # everything was held, so it is known how much there was of it
            self.seen = len(kept)
        self.held = len(kept)
        return kept

    def state_dict(self) -> State:
        return {"seen": self.seen, "held": self.held}

    def load_state_dict(self, state: State) -> None:
        self.seen = int(state["seen"])
        self.held = int(state.get("held", min(self.seen, self.capacity)))


HOLE = -1
"""The place of a row that was erased."""


class ClassBalanced:
    """As many examples of each class as the stream allows, each class a uniform sample of its own.

    After a forget each class goes on as if its erased rows were still there and could not be seen, so the others and
    what comes are held with the same probability as without.

    Source:
        Class-balancing reservoir sampling, Chrysakis & Moens 2020 (ICML), algorithm 1.

    Differs from the source:
        Of several largest classes the smallest label gives way, where the paper leaves the choice open. One draw both
        accepts an example and picks its slot.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.key = key_of(seed, "replay.class_balanced")
        self.seen: dict[float, int] = {}
        self.members: dict[float, list[int]] = {}
        self.full: set[float] = set()  # classes that are or were the largest, since the memory filled up
        self.size = self.step = 0
        self.held = 0  # of `size` places those with a row, which lie in slots 0, 1, ...

    def __len__(self) -> int:
        return self.held

    def place(self, label: float, /) -> int | None:
        self.step += 1
        count = self.seen[label] = self.seen.get(label, 0) + 1
        mine = self.members.setdefault(label, [])
        if self.size < self.capacity:
            self.size += 1
            mine.append(self._row(HOLE))
            return mine[-1]
        if label not in self.full:  # sizes change below only, so to look here misses no largest class
            most = max(map(len, self.members.values()))
            self.full.update(c for c, slots in self.members.items() if len(slots) == most)
        if label in self.full:
            place = below(count, self.key, self.step)
            if place >= len(mine):
                return None
            mine[place] = self._row(mine[place])
            return mine[place]
        return self._take(mine, most)

    def _row(self, slot: int) -> int:
        """That slot, or for a hole the next free one."""
        if slot == HOLE:
            slot = self.held
            self.held += 1
        return slot

    def forget(self, erased: NDArray[np.bool_], /) -> NDArray[np.int64]:
        slots = np.where(erased, HOLE, np.cumsum(~erased) - 1).tolist()
        for label, mine in self.members.items():
            mine[:] = [HOLE if slot == HOLE else slots[slot] for slot in mine]
            if self.size < self.capacity:  # everything was held, so it is known how much there was of it
                mine[:] = [slot for slot in mine if slot != HOLE]
                self.seen[label] = len(mine)
        self.held = int((~erased).sum())
        if self.size < self.capacity:
            self.size = self.step = self.held
            self.seen = {label: seen for label, seen in self.seen.items() if seen}
            self.members = {label: mine for label, mine in self.members.items() if mine}
        return np.flatnonzero(~erased)

    def _take(self, mine: list[int], most: int) -> int:
        """A slot for `mine`, from the largest class."""
        theirs = self.members[min(c for c, slots in self.members.items() if len(slots) == most)]
        place = below(len(theirs), self.key, self.step)
        slot = self._row(theirs[place])
        theirs[place] = theirs[-1]  # swap-remove: O(1), and the order is part of the state
        theirs.pop()
        mine.append(slot)
        return slot

    def state_dict(self) -> State:
        labels = sorted(self.seen)
        return {
            "labels": np.array(labels, np.float64),
            "seen": np.array([self.seen[c] for c in labels], np.int64),
            "held": np.array([len(self.members[c]) for c in labels], np.int64),
            "slots": np.array([slot for c in labels for slot in self.members[c]], np.int64),
            "full": np.array([c in self.full for c in labels], np.bool_),
        }

    def load_state_dict(self, state: State) -> None:
        labels, seen, full = (state[name].tolist() for name in ("labels", "seen", "full"))
        parts = np.split(state["slots"], np.cumsum(state["held"])[:-1]) if labels else []
        self.seen = dict(zip(labels, seen, strict=True))
        self.members = {c: part.tolist() for c, part in zip(labels, parts, strict=True)}
        self.full = {c for c, is_full in zip(labels, full, strict=True) if is_full}
        self.size, self.step, self.held = len(state["slots"]), sum(seen), int((state["slots"] != HOLE).sum())


RETENTIONS: dict[str, type[Recency] | type[Reservoir] | type[ClassBalanced]] = {
    "recency": Recency,
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
}
