"""The seam of everything that changes weights beside the optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from streamcl.protocols import State


class Rule(Protocol):
    """Around the optimiser's step on the dense parameters; never on rows of the table.

    Rules run in the order of the configuration, under `torch.no_grad`. Randomness is keyed by the rule's own step
    count, which is part of its state; a step that was refused (see `Eager.step`) is not one.
    """

    def transform(self, gradient: Tensor) -> Tensor:
        """(P,) that the optimiser is to take instead; the argument stays as it is."""
        ...

    def after(self) -> None:
        """The optimiser has taken its step."""
        ...

    def read(self) -> Mapping[str, float]:
        """What it has to say about itself; asking changes nothing. What two rules say under one name is added up."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None:
        """An empty state: the rule begins here."""
        ...
