"""Named weight sets: other weights of the same model, a teacher's, an average's or those of another time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamcl.plugin import PluginError
from streamcl.protocols import State
from streamcl.state import cut

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
        return {"flat": cut(self.flat), "table": cut(self.table)}

    def load_state_dict(self, state: State) -> None:
        """An empty state: it begins as the live weights are."""
        with torch.no_grad():
            if state:
                self.flat.copy_(self.engine.dense.fitted(state["flat"], self.engine.dense.flat))
                self.table.copy_(state["table"])
            else:
                self.copy_live()


class Average(WeightSet):
    """w' <- d w' + (1 - d) w after each step, of every weight, at the cost of the rows that were touched.

    A row that is not touched stands still, so k steps later its average is w + d^k (w' - w): it is brought up to date
    when it is read, or before it changes.
    """

    def __init__(self, engine: Eager, name: str, decay: float) -> None:
        super().__init__(engine, name)
        self.decay = decay
        self.step = 0
        self.at = torch.zeros(len(self.table), dtype=torch.int64)  # (R,) step that a row's average is of

    def kept(self, at: Tensor) -> Tensor:
        """Double: the share that the average of step `at` still has in today's."""
        return self.decay ** (self.step - at).double()

    def rows(self, ids: Tensor) -> Tensor:
        live = self.engine.table[ids]
        share = self.kept(self.at[ids]).to(live.dtype)
        return torch.lerp(live, self.table[ids], share.unsqueeze(-1))

    def before(self, touched: Tensor) -> None:
        """These rows are about to change."""
        self.table[touched] = self.rows(touched)
        self.at[touched] = self.step

    def after(self, touched: Tensor) -> None:
        """A step has been taken."""
        self.step += 1
        moved = 1.0 - float(self.kept(torch.tensor(self.step - 1)))
        self.flat.lerp_(self.engine.dense.flat, moved)
        self.table[touched] = torch.lerp(self.table[touched], self.engine.table[touched], moved)
        self.at[touched] = self.step

    def state_dict(self) -> State:
        return {**super().state_dict(), "at": cut(self.at), "step": self.step}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.step = int(state.get("step", 0))
        if state:
            self.at.copy_(state["at"])
        else:
            self.at.zero_()


def shared(engine: Eager, name: str) -> WeightSet:
    """The set of this name, or a new one. Of several plug-ins that keep one set each saves it: they save the same."""
    return engine.sets[name] if name in engine.sets else WeightSet(engine, name)
