"""An outer optimiser on what the ranks have learned: each round is one step of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.engine.optimizers import Slots, Update
from streamcl.group.blend import Share, blend
from streamcl.group.weights import Weights
from streamcl.learner import Learner
from streamcl.protocols import State
from streamcl.state import cut


class Outer(Weights):
    """Nesterov momentum along the mean of the ranks' moves.

    With d the mean of w_k - w0 over the ranks that have touched a weight, by steps, mu the momentum and lr the outer
    learning rate: m <- mu m + d, w <- w0 + lr (d + mu m). Slots of the inner optimiser become one as in `average`.
    FTRL's z is what gives the new weight.

    Source:
        DiLoCo: Douillard et al. 2023, arXiv 2311.08105, algorithm 1; momentum .9, rate .7, as torch's SGD has it.

    Differs from the source:
        The inner optimiser's slots are merged; in the source every worker keeps its own, and there a worker's state is
        no other's. Momentum of a row is kept, and moves it, in the rounds that touch it. By steps instead of evenly.
        With one rank it is no identity but Lookahead (Zhang et al. 2019, arXiv 1907.08610) with momentum.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self.rate, self.momentum = config.group.outer_learning_rate, config.group.outer_momentum
        super().__init__(config, learner)
        self.moving = torch.zeros_like(self.flat)  # (P,) m
        self.moving_rows = torch.zeros_like(self.table)  # (R, W)

    def one(
        self, update: Update, value: Tensor, slots: Sequence[Tensor], shares: Sequence[Share], moving: Tensor
    ) -> tuple[Tensor, Slots]:
        mean, held = blend(update, value, slots, shares)
        touched = torch.zeros(len(value), dtype=torch.bool)
        for share in shares:
            touched[share.at] = True
        moved = mean - value
        moving[touched] = self.momentum * moving[touched] + moved[touched]
        new = value.clone()
        new[touched] += self.rate * (moved[touched] + self.momentum * moving[touched])
        return new, update.moved(new, held)

    def state_dict(self) -> State:
        return {"dense": cut(self.moving), "rows": cut(self.moving_rows)}

    def load_state_dict(self, state: State) -> None:
        """An empty one: it stands still."""
        for name, mine in (("dense", self.moving), ("rows", self.moving_rows)):
            mine.copy_(state[name]) if name in state else mine.zero_()
