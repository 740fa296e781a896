"""What a learner keeps beside its weights, and what it means in a group: running statistics, averages, unit ages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.features import RunningNorm
from streamcl.group.blend import Share, alone, mean
from streamcl.group.weights import Said, Weights
from streamcl.plasticity.continual_backprop import ContinualBackprop

if TYPE_CHECKING:
    from streamcl.engine.weights import Average
    from streamcl.learner import Learner

Floats = NDArray[np.float64]


class Moments(NamedTuple):
    """Of some numbers (N,): how many, their mean, and the sum of squares about it."""

    seen: Floats
    mean: Floats
    m2: Floats

    def with_(self, other: Moments) -> Moments:
        """Of both together.

        Source: Chan et al. 1983, doi 10.1080/00031305.1983.10483115, equation 2.1.
        """
        count = self.seen + other.seen
        away, whole = other.mean - self.mean, np.maximum(count, 1.0)
        mean = self.mean + away * (other.seen / whole)
        return Moments(count, mean, self.m2 + other.m2 + away * away * (self.seen * other.seen / whole))

    def without(self, other: Moments) -> Moments:
        """Of those that came behind the other: the inverse."""
        count = self.seen - other.seen
        some, whole = np.maximum(count, 1.0), np.maximum(self.seen, 1.0)
        mean = np.where(count > 0.0, (self.seen * self.mean - other.seen * other.mean) / some, 0.0)
        away = mean - other.mean
        m2 = self.m2 - other.m2 - away * away * (other.seen * count / whole)
        return Moments(count, mean, np.where(count > 0.0, np.maximum(m2, 0.0), 0.0))


class Statistics:
    """Of numerics and of the label: of all numbers that any rank has learned from, and how many events that were."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.norms: list[RunningNorm] = [learner.numerics, learner.target]
        self.begin()

    def begin(self) -> None:
        self.base = [_moments(norm) for norm in self.norms]
        self.version = self.learner.version

    def say(self) -> dict[str, Tensor]:
        said = {f"{i}": _stacked(_moments(norm)) for i, norm in enumerate(self.norms)}
        return said | {"events": torch.tensor([self.learner.version - self.version])}

    def hear(self, said: Sequence[Said], _examples: Sequence[int]) -> None:
        for i, (norm, base) in enumerate(zip(self.norms, self.base, strict=True)):
            rounds = [Moments(*each[f"{i}"].numpy()).without(base) for each in said]
            moved = [each for each in rounds if each.seen.any()]
            if len(moved) == 1:  # to the bit
                [only] = [each for each, new in zip(said, rounds, strict=True) if new.seen.any()]
                whole = Moments(*only[f"{i}"].numpy().copy())
            else:
                whole = base
                for each in moved:
                    whole = whole.with_(each)
            norm.count, norm.mean, norm.m2 = whole
        self.learner.version = self.version + sum(int(each["events"]) for each in said)
        self.begin()


def _moments(norm: RunningNorm) -> Moments:
    return Moments(norm.count, norm.mean, norm.m2)


def _stacked(moments: Moments) -> Tensor:
    return torch.from_numpy(np.stack(moments))  # (3, N)


class Averages:
    """The average of the weights (plug-in `ema`): as far behind the merged weights as those of the ranks were behind
    their own, on average; that of a row as those of the ranks that have touched it were.

    What it counts are steps of a rank, so its memory is `1 / (1 - decay)` of these; where ranks have taken different
    numbers of them, it is told the most.
    """

    def __init__(self, learner: Learner, average: Average, weights: Weights) -> None:
        self.average, self.engine, self.weights = average, learner.engine, weights
        self.begin()

    def begin(self) -> None:
        self.flat, self.step = self.average.flat.clone(), self.average.step

    def say(self) -> dict[str, Tensor]:
        rows = torch.from_numpy(self.weights.touches.counts()[0])
        step = torch.tensor([self.average.step])
        return {"flat": self.average.flat, "rows": self.average.rows(rows), "step": step}

    def hear(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        """Behind the weights, which know what was heard of them."""
        live = self.weights.heard
        with torch.no_grad():
            self._hear_dense(said, live, examples)
            self._hear_rows(said, live)
        self.begin()

    def _hear_dense(self, said: Sequence[Said], live: Sequence[Said], examples: Sequence[int]) -> None:
        learned = [rank for rank, count in enumerate(examples) if count]
        behind, total = torch.zeros_like(self.average.flat), sum(examples)
        for rank in learned:
            behind += (said[rank]["flat"] - live[rank]["flat"]) * (examples[rank] / total)
        only = said[learned[0]]["flat"] if len(learned) == 1 else None
        self.average.flat.copy_(self.engine.dense.flat + behind if only is None else only)

    def _hear_rows(self, said: Sequence[Said], live: Sequence[Said]) -> None:
        """How far behind they are is merged like rows that were not behind at the round's start."""
        average, table = self.average, self.engine.table
        ids = torch.unique(torch.cat([each["ids"] for each in live]))
        shares, own = [], []
        for each, weights in zip(said, live, strict=True):
            at = torch.searchsorted(ids, weights["ids"])
            shares.append(Share(at, each["rows"] - weights["rows"], (), weights["steps"]))
            own.append(Share(at, each["rows"], (), weights["steps"]))
        new = table[ids] + mean(table.new_zeros(len(ids), table.shape[1]), shares)
        alone(own, (new,))
        average.table[ids] = new
        average.step = max(int(each["step"]) for each in said)
        average.at[ids] = average.step


class Renewals:
    """Continual backpropagation: one record of units for all ranks, so a unit made anew anywhere is new everywhere.

    Running means of use and of activations are averaged by steps. Ages, eligible steps and replacements of all ranks
    add up, so that as many units are renewed per event as one learner would renew. A unit that a rank has made anew in
    the round is that rank's to say (of several the lowest rank's): its weights, what the optimiser holds of them, its
    utility and its age there; what other ranks have learned into the old unit is gone with it.
    """

    def __init__(self, rule: ContinualBackprop, weights: Weights) -> None:
        self.rule, self.weights = rule, weights
        self.begin()

    def begin(self) -> None:
        rule = self.rule
        self.step, self.born = rule.step, rule.born.clone()
        self.eligible, self.replaced = list(rule.eligible_steps), list(rule.replaced)

    def say(self) -> dict[str, Tensor]:
        rule = self.rule
        return {
            "born": rule.born,
            "mean": rule.mean,
            "mean_use": rule.mean_use,
            "step": torch.tensor([rule.step]),
            "eligible": torch.tensor(rule.eligible_steps, dtype=torch.int64),
            "replaced": torch.tensor(rule.replaced, dtype=torch.int64),
        }

    def hear(self, said: Sequence[Said], examples: Sequence[int]) -> None:
        """Before the weights: it says whose some of them are."""
        rule, owner = self.rule, torch.full_like(self.born, -1)
        for rank, each in reversed(list(enumerate(said))):
            owner[each["born"] > self.step] = rank
        steps = [int(each["step"]) - self.step for each in said]
        taken, born = sum(steps), self.born.clone()
        mean, mean_use = torch.zeros_like(rule.mean), torch.zeros_like(rule.mean_use)
        moved = [(each, count) for each, count in zip(said, steps, strict=True) if count]
        for each, count in moved:
            mean += each["mean"] * (count / taken)
            mean_use += each["mean_use"] * (count / taken)
        for rank, each in enumerate(said):
            mine = owner == rank
            mean[mine], mean_use[mine] = each["mean"][mine], each["mean_use"][mine]
            born[mine] = self.step + taken - (int(each["step"]) - each["born"][mine])
        if moved:
            only = len(moved) == 1
            rule.mean.copy_(moved[0][0]["mean"] if only else mean)
            rule.mean_use.copy_(moved[0][0]["mean_use"] if only else mean_use)
            rule.born.copy_(born)
            eligible = _added(self.eligible, [each["eligible"] for each in said])
            rule.replaced = _added(self.replaced, [each["replaced"] for each in said])
            rule.catch_up(self.step + taken, eligible)
        self.weights.owner.fill_(-1)
        for rank in reversed(range(len(said))):
            if bool((owner == rank).any()):
                self.weights.owner[self._weights_of(owner == rank)] = rank
        self.begin()

    def _weights_of(self, units: Tensor) -> Tensor:
        """(P,) bool: what goes into these units (U,) and comes from them."""
        dense = self.weights.engine.dense
        found = torch.zeros(len(dense.flat), dtype=torch.bool)
        for layer, span in zip(self.rule.layers, self.rule.spans, strict=True):
            mine = units[span].nonzero().squeeze(1)
            for name in (f"{layer.incoming}.weight", f"{layer.incoming}.bias"):
                if name in dense.params:
                    dense.part(found, name)[mine] = True
            for name in layer.outgoing:
                part = dense.part(found, f"{name}.weight")
                part.view(len(part), layer.units, -1)[:, mine] = True
        return found


def _added(base: Sequence[int], told: Sequence[Tensor]) -> list[int]:
    return [now + sum(int(each[i]) - now for each in told) for i, now in enumerate(base)]
