"""The gradient of a step that all ranks take together: each brings one event's, and they are added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.group.weights import Said, Weights
from streamcl.learner import Learner
from streamcl.plugin import Grads, Rule, Step


class _Noted(Rule):
    """What the optimiser was given since the ranks last met."""

    def __init__(self) -> None:
        self.total: Grads | None = None

    def transform(self, grads: Grads, step: Step) -> Grads:
        """Noted, and passed on as it is."""
        self.total = grads if self.total is None else self.total.plus(grads)
        return grads


class Gradients(Weights):
    """Synchronous SGD on a batch of one event of each rank.

    A rank learns its event by itself first, so that whatever else hangs on a step goes on as ever. When the ranks meet
    that step is taken back, the gradients of all are added up in the order of ranks, and the optimiser takes one step
    along the sum. A rank without an event adds nothing; without any there is no step.

    Source:
        Chen et al. 2016, arXiv 1604.00981, section 3, without its backup workers.

    Differs from the source:
        The sum, not the mean: an event counts as much as where one learner takes it.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self.noted = _Noted()
        super().__init__(config, learner)
        learner.engine.around.append(self.noted)

    def begin(self) -> None:
        super().begin()
        self.noted.total = None

    def say(self) -> dict[str, Tensor]:
        grads = self.noted.total
        if grads is None:
            grads = Grads(torch.zeros_like(self.flat), torch.zeros(0, dtype=torch.int64), self.table[:0])
        flat = self.engine.dense.flat.detach()
        return {"flat": flat, "gradient": grads.dense, "ids": grads.touched, "rows": grads.rows}

    def hear(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        engine, dense = self.engine, self.engine.dense
        mine = torch.from_numpy(self.touches.counts()[0])
        given = [Grads(each["gradient"], each["ids"], each["rows"]) for each in said if each["gradient"].any()]
        with torch.no_grad():
            for column, base in zip((engine.table, *engine.row_slots), (self.table, *self.row_slots), strict=True):
                column[mine] = base[mine]
            for column, base in zip((dense.flat, *dense.slots), (self.flat, *self.slots), strict=True):
                column.copy_(base)
            if given:
                total = given[0]
                for each in given[1:]:
                    total = total.plus(each)
                engine.move_rows(total.touched, total.rows)
                dense.step(total.dense)
                self._follow_up(total.touched)
        self.noted.total = None

    def _follow_up(self, ids: Tensor) -> None:
        engine, dense = self.engine, self.engine.dense
        for column, base in zip((engine.table, *engine.row_slots), (self.table, *self.row_slots), strict=True):
            base[ids] = column[ids]
        for column, base in zip((dense.flat, *dense.slots), (self.flat, *self.slots), strict=True):
            base.copy_(column)
        if self.others is not None:
            self.others(ids)
