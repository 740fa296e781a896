"""A table of past examples, from which each live example draws a few to be learned again beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streamcl.memory.owners import Owners, close_ranks
from streamcl.memory.retention import RETENTIONS
from streamcl.protocols import State
from streamcl.random import below, key_of
from streamcl.records import Selector, Ticket
from streamcl.stations import Replay as ReplayConfig

COLUMNS = ("ids", "weights", "dense", "y")


class Replay:
    """Preallocated columns of examples (raw features, label, and whose they are), filled by a retention policy.

    Args:
        config: `capacity` rows (count); 20,000 rows of 12 ids, 12 weights and 10 numerics take 4.3 MB.

    Shape:
        `draw(n, step)` returns ids (n, S) int64, weights (n, S), dense (n, N), y (n,) float32; n may exceed what is
        held, for it draws with replacement.

    Raises:
        IndexError: `draw` from an empty memory.
    """

    def __init__(self, config: ReplayConfig, seed: int, slots: int, numerics: int) -> None:
        capacity = config.capacity if config.retention != "none" else 0
        self.policy = RETENTIONS[config.retention](capacity, seed) if capacity else None
        self.key = key_of(seed, "replay.draw")
        self.ids = np.zeros((capacity, slots), np.int64)
        self.weights = np.zeros((capacity, slots), np.float32)
        self.dense = np.zeros((capacity, numerics), np.float32)
        self.y = np.zeros(capacity, np.float32)
        self.owners = Owners(capacity)

    def __len__(self) -> int:
        return len(self.policy) if self.policy is not None else 0

    def draw(self, n: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = len(self)
        if not size:
            raise IndexError("nothing is held that could be replayed")
        index = np.array([below(size, self.key, step, i) for i in range(n)], np.int64)
        ids, weights, dense, y = self.ids[index], self.weights[index], self.dense[index], self.y[index]
        return torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(dense), torch.from_numpy(y)

    def write(self, ticket: Ticket, label: float) -> None:
        slot = self.policy.place(label) if self.policy is not None else None
        if slot is not None:
            self.ids[slot], self.weights[slot], self.dense[slot] = ticket.features
            self.y[slot] = label
            self.owners.write(slot, Owners.of(ticket))

    def forget(self, who: Selector) -> int:
        """Erase rows, and close the ranks; returns how many. What the retention policy says of the rest still holds."""
        size = len(self)
        erased = self.owners.meant(who, size)
        if self.policy is not None and erased.any():
            kept = self.policy.forget(erased)
            for name in COLUMNS:
                close_ranks(getattr(self, name), kept, size)
            self.owners.close_ranks(kept, size)
        return int(erased.sum())

    def state_dict(self) -> State:
        size = len(self)
        held = {name: getattr(self, name)[:size].copy() for name in COLUMNS}
        held |= self.owners.state_dict(size)
        return {**held, "policy": self.policy.state_dict() if self.policy is not None else {}}

    def load_state_dict(self, state: State) -> None:
        if self.policy is not None:  # an empty one is false
            self.policy.load_state_dict(state["policy"])
        for name in COLUMNS:
            getattr(self, name)[: len(self)] = state[name]
        self.owners.load_state_dict(state, len(self))
