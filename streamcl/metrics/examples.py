"""Labelled examples as columns: gathered once, for all that measure them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import cast

import numpy as np
from numpy.typing import NDArray

from streamcl.records import Outcome, Ticket, marks
from streamcl.traits import keys

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Examples:
    """n examples in the order of learning: labels and weights (n,), what was served (n, 1) or (n, C)."""

    tickets: Sequence[Ticket]
    labels: Floats
    served: NDArray[np.float32]
    weights: Floats

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Examples:
        tickets = [outcome.ticket for outcome in outcomes]
        labels, drawn = [outcome.label for outcome in outcomes], [outcome.drawn for outcome in outcomes]
        served = rows([ticket.scores.served for ticket in tickets])
        return cls(tickets, np.array(labels), served, np.array([ticket.weight for ticket in tickets]) / drawn)

    @cached_property
    def scores(self) -> Floats:
        """(n,) of a binary task."""
        return self.served[:, 0].astype(np.float64)

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """(n,) marks of whose event each is."""
        return marks(keys(self.tickets))

    def scored(self, losses: Sequence[float]) -> Examples:
        """Those whose loss is finite, as `Prequential.add` has said them."""
        if math.isfinite(sum(losses)):
            return self
        known = np.isfinite(losses)
        return Examples(
            list(compress(self.tickets, known)), self.labels[known], self.served[known], self.weights[known]
        )


def rows(served: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(n, C) of n times (C,), at least one. By their bytes: NumPy would look at each as if it were anything."""
    joined = b"".join(cast("Sequence[bytes]", served))  # any buffer will do
    return np.frombuffer(joined, served[0].dtype).reshape(len(served), -1)
