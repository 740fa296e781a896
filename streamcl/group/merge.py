"""A stand-in: averages what is dense, and nothing else."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from streamcl.group.ranks import Ranks
from streamcl.learner import Learner
from streamcl.protocols import State
from streamcl.stations import GroupConfig


class Met(NamedTuple):
    bytes_out: int
    bytes_in: int
    divergence: float


class Merge(Protocol):
    def meet(self, examples: int) -> Met: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Average:
    def __init__(self, learner: Learner, ranks: Ranks) -> None:
        self.learner, self.ranks = learner, ranks

    def meet(self, examples: int) -> Met:
        moved, far = 0, 0.0
        with torch.no_grad():
            for parameter in self.learner.engine.model.parameters():
                before = parameter.detach().clone()
                mean = torch.stack(self.ranks.all_gather(before.reshape(-1))).mean(0).view_as(before)
                parameter.copy_(mean)
                moved += before.nbytes
                far = max(far, float((before - mean).norm() / (mean.norm() + 1e-12)))
        return Met(moved, moved * (self.ranks.world - 1), max(self.ranks.gather(far)))

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        pass


def merge_of(config: GroupConfig, learner: Learner, ranks: Ranks) -> Merge:
    return Average(learner, ranks)
