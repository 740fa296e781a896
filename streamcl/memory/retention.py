"""Which examples stay in a full memory. A policy answers one question: into which slot does this example go?

`place(label)` returns a slot in [0, capacity), or None when the example isn't kept. It is called once per example,
in stream order, and is the only thing that changes a policy's state.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from streamcl.protocols import State
from streamcl.random import below, key_of


class Retention(Protocol):
    def place(self, label: float, /) -> int | None: ...

    def __len__(self) -> int: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Recency:
    """The last `capacity` examples: a memory that moves with the stream."""

    def __init__(self, capacity: int, _seed: int) -> None:
        self.capacity, self.seen = capacity, 0

    def __len__(self) -> int:
        return min(self.seen, self.capacity)

    def place(self, _label: float, /) -> int | None:
        slot = self.seen % self.capacity
        self.seen += 1
        return slot

    def state_dict(self) -> State:
        return {"seen": self.seen}

    def load_state_dict(self, state: State) -> None:
        self.seen = int(state["seen"])


class Reservoir(Recency):
    """A uniform sample of everything learned from so far, in constant memory.

    After `seen` examples each is held with probability `capacity / seen`, whatever their order, so old regimes stay
    represented while the stream drifts.

    Source:
        Algorithm R, Vitter 1985, doi 10.1145/3147.3165.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        super().__init__(capacity, seed)
        self.key = key_of(seed, "replay.reservoir")

    def place(self, _label: float, /) -> int | None:
        self.seen += 1
        if self.seen <= self.capacity:
            return self.seen - 1
        slot = below(self.seen, self.key, self.seen)
        return slot if slot < self.capacity else None


class ClassBalanced:
    """As many examples of each class as the stream allows, each class a uniform sample of its own.

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

    def __len__(self) -> int:
        return self.size

    def place(self, label: float, /) -> int | None:
        self.step += 1
        count = self.seen[label] = self.seen.get(label, 0) + 1
        mine = self.members.setdefault(label, [])
        if self.size < self.capacity:
            mine.append(self.size)
            self.size += 1
            return mine[-1]
        if label not in self.full:  # sizes change below only, so to look here misses no largest class
            most = max(map(len, self.members.values()))
            self.full.update(c for c, slots in self.members.items() if len(slots) == most)
        if label in self.full:
            place = below(count, self.key, self.step)
            return mine[place] if place < len(mine) else None
        return self._take(mine, most)

    def _take(self, mine: list[int], most: int) -> int:
        """A slot for `mine`, from the largest class."""
        theirs = self.members[min(c for c, slots in self.members.items() if len(slots) == most)]
        place = below(len(theirs), self.key, self.step)
        slot = theirs[place]
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
        self.size, self.step = len(state["slots"]), sum(seen)


RETENTIONS: dict[str, type[Recency] | type[ClassBalanced]] = {
    "recency": Recency,
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
}
