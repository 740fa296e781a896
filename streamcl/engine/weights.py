"""Named weight sets: other weights of the same model, a teacher's, an average's or those of another time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamcl.plugin import PluginError
from streamcl.protocols import State

if TYPE_CHECKING:
    from streamcl.engine.eager import Eager


class WeightSet:
    """A copy of all weights, that whoever made it moves. It begins as the live ones stand.

    Units that are made anew (see `Dense.renew`) are made anew here too. A copy takes as much memory as the model.

    Args:
        name: How Terms and Recalls ask for it: `ema`, `previous`, `anchor`, ...

    Attributes:
        flat: (P,) dense parameters.
        table: (R, W)
        ready: It has something to teach; a copy that has not been taken yet has not.
    """

    ready = True

    def __init__(self, engine: Eager, name: str) -> None:
        if name in engine.sets:
            raise PluginError(f"plugins: two of them make the weights {name!r}")
        self.engine = engine
        self.flat = engine.dense.sets[name] = engine.dense.flat.clone()
        self.table = engine.table.clone()
        engine.sets[name] = self

    def copy_live(self) -> None:
        """Become what the live weights are; O(table)."""
        self.flat.copy_(self.engine.dense.flat)
        self.table.copy_(self.engine.table)

    def rows(self, ids: Tensor) -> Tensor:
        """(..., W) rows of the table at ids (...)."""
        return self.table[ids]

    def before(self, touched: Tensor) -> None:
        """These rows of the live table are about to change."""

    def params(self) -> dict[str, Tensor]:
        """Dense parameters by name, as views."""
        return {name: self.engine.dense.part(self.flat, name) for name in self.engine.dense.params}

    def state_dict(self) -> State:
        return {"flat": self.flat.clone(), "table": self.table.clone()}

    def load_state_dict(self, state: State) -> None:
        """An empty state: it begins as the live weights are."""
        with torch.no_grad():
            if state:
                self.flat.copy_(self.engine.dense.fitted(state["flat"], self.engine.dense.flat))
                self.table.copy_(state["table"])
            else:
                self.copy_live()


def shared(engine: Eager, name: str) -> WeightSet:
    """The set of this name, or a new one. Of several plug-ins that keep one set each saves it: they save the same."""
    return engine.sets[name] if name in engine.sets else WeightSet(engine, name)
