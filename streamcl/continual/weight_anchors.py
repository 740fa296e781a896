"""Weights are held where they stood when a segment ended: all alike, by what they meant for it, or what moved most.

Each holds by the gradient of strength / 2 x sum of F (w - w*)^2, added to that of the losses: exactly what a Term of
that penalty would give, without autograd walking all weights. The optimiser scales it as any gradient. A weight's pull,
strength x F, is at most `limit`: with SGD a step of learning rate x limit above 2 would leap over w* and further away.

A row of the table is pulled when it is touched, and by then by as much as in any step: rows that are not touched stand
still anyway, so their pull could only bring them back. It is not added up meanwhile. An event that is to be forgotten
stays in sums of squares as it stays in the weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.engine.weights import shared
from streamcl.plugin import Context, Grads, Rule, Step
from streamcl.protocols import State
from streamcl.records import Signal
from streamcl.state import cut
from streamcl.stations import New, Stop

CALM = 1e30  # squares and sums of them stay finite


class EWC(Rule):
    """Online EWC: a weight is held by how large its gradients were, which tells what old segments need of it.

    Along the way the squared gradients of live examples are added up. At a `boundary`, whoever sends it, F <- decay F +
    their mean, and w* is what the weights are now. Before the first one nothing is held.

    Memory: three numbers a weight, w*, F and the sum (`rows`: of the table too). Costs a pass, forward and backward, of
    the live example in every `every`th step.

    Source:
        Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3; the online form: Schwarz et al. 2018, arXiv 1805.06370,
        section 3.1: one F that fades, one w*.

    Differs from the source:
        F is the mean of squares seen since the last boundary, each at the weights of its time and by the true label
        (the empirical Fisher), instead of an expectation at the segment's last weights: no second pass over data
        that is gone. It is larger, by the errors of the beginning. F isn't normalised. Only the task's loss counts.
    """

    class Options(Rule.Options):
        kind: Literal["ewc"] = "ewc"
        strength: float = Stop(100.0, ge=0, description="lambda, per step; 0: off")
        decay: float = Stop(1.0, ge=0, le=1, description="gamma: what is left of F at a boundary")
        limit: float = Stop(10.0, gt=0, description="a weight's pull, strength x F, is at most this (1 / step)")
        every: int = Stop(1, ge=1, description="gradients are looked at in each so-manyth step")
        rows: bool = New(True, description="rows of the table are held too; else dense weights alone")

    options: Options
    keeps_rows = True

    def bind(self, context: Context) -> None:
        self.engine, dense, table = context.engine, context.engine.dense, context.engine.table
        self.anchor = dense.anchors["ewc"] = dense.flat.clone()
        self.fisher = dense.traces["ewc.fisher"] = torch.zeros_like(dense.flat)
        self.sum = dense.traces["ewc.sum"] = torch.zeros_like(dense.flat)
        table = table if self.options.rows else table[:0]
        self.row_anchor, self.row_fisher, self.row_sum = table.clone(), torch.zeros_like(table), torch.zeros_like(table)
        self.count, self.boundaries = 0, 0

    def on_signal(self, signal: Signal) -> None:
        if signal.kind != "boundary" or not self.count:
            return
        for fisher, total in ((self.fisher, self.sum), (self.row_fisher, self.row_sum)):
            fisher.mul_(self.options.decay).add_(total, alpha=1.0 / self.count).clamp_max_(CALM)
            total.zero_()
        self.anchor.copy_(self.engine.dense.flat)
        self.row_anchor.copy_(self.engine.table[: len(self.row_anchor)])
        self.count, self.boundaries = 0, self.boundaries + 1

    def before(self, step: Step) -> None:
        if not self.options.strength or step.live is None or step.number % self.options.every:
            return
        grads = step.gradient("live")
        self.sum.add_(grads.dense.square().clamp_(max=CALM))
        if self.options.rows:
            self.row_sum[grads.touched] += grads.rows.square().clamp_(max=CALM)
        self.count += 1

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.options.strength or not self.boundaries:
            return grads
        dense = grads.dense + self._pull(self.fisher, self.engine.dense.flat - self.anchor)
        if not self.options.rows:
            return grads.with_dense(dense)
        at = grads.touched
        rows = grads.rows + self._pull(self.row_fisher[at], self.engine.table[at] - self.row_anchor[at])
        return Grads(dense, at, rows)

    def _pull(self, fisher: Tensor, away: Tensor) -> Tensor:
        return (self.options.strength * fisher).clamp_max(self.options.limit) * away

    def read(self) -> dict[str, float]:
        return {"boundaries": float(self.boundaries), "mean_fisher": float(self.fisher.double().mean())}

    def _tensors(self) -> dict[str, Tensor]:
        names = ("anchor", "fisher", "sum", "row_anchor", "row_fisher", "row_sum")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> State:
        tensors = {name: cut(tensor) for name, tensor in self._tensors().items()}
        return {"count": self.count, "boundaries": self.boundaries, **tensors}

    def load_state_dict(self, state: State) -> None:
        self.count, self.boundaries = int(state.get("count", 0)), int(state.get("boundaries", 0))
        for name, tensor in self._tensors().items():
            if state:
                fitted = name in ("anchor", "fisher", "sum")  # of dense parameters; the others are of rows
                tensor.copy_(self.engine.dense.fitted(state[name], torch.zeros_like(tensor)) if fitted else state[name])
            else:
                tensor.zero_()


class L2Anchor(Rule):
    """All weights are pulled alike, F = 1, to where they stood at the last boundary, or at the very beginning.

    The weights that they are pulled to are the weight set `anchor` or `initial`, which others may read. `anchor` pulls
    from the first `boundary` on, `initial` from the first step.

    Source:
        Smith et al. 2023, "A closer look at rehearsal-free continual learning", arXiv 2203.17269: L2 in the parameters
        to those of the last task.

    Differs from the source:
        strength is of the gradient, twice that of a penalty without the half. The classifier's own weights are held
        as the others.
    """

    class Options(Rule.Options):
        kind: Literal["l2_anchor"] = "l2_anchor"
        to: Literal["anchor", "initial"] = New("anchor", description="weights of the last boundary, or the first ones")
        strength: float = Stop(0.01, ge=0, description="per step; 0: off")

    options: Options
    provides = frozenset({"anchor", "initial"})

    def bind(self, context: Context) -> None:
        self.engine = context.engine
        self.anchor = shared(context.engine, self.options.to)
        self.holds = self.options.to == "initial"

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.options.to == "anchor":
            self.anchor.copy_live()
            self.holds = True

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.options.strength or not self.holds:
            return grads
        dense = grads.dense.add(self.engine.dense.flat - self.anchor.flat, alpha=self.options.strength)
        away = self.engine.table[grads.touched] - self.anchor.table[grads.touched]
        return Grads(dense, grads.touched, grads.rows.add(away, alpha=self.options.strength))

    def state_dict(self) -> State:
        return {**self.anchor.state_dict(), "holds": self.holds}

    def load_state_dict(self, state: State) -> None:
        self.anchor.load_state_dict(state)
        self.holds = bool(state.get("holds", self.options.to == "initial"))


class HoldLargest(Rule):
    """Holds the weights that past segments have moved most: of each matrix the largest `share` of |w - w before it|.

    At a `boundary` these join what is held, and w* is what the weights are now. Dense matrices alone: biases and rows
    of the table are free. A weight that is made anew is free too.

    Source:
        Chen et al. 2025, "SEFE: superficial and essential forgetting eliminator", arXiv 2505.02486: RegLoRA, which
        keeps the largest elements of a LoRA's weight update from being changed by later tasks.

    Differs from the source:
        The update of the weights themselves, not a low-rank one; a square as penalty. What is held stays so.
    """

    class Options(Rule.Options):
        kind: Literal["hold_largest"] = "hold_largest"
        strength: float = Stop(1.0, ge=0, description="per step; 0: off")
        share: float = Stop(0.02, gt=0, le=1, description="of a matrix, that each segment holds")

    options: Options

    def bind(self, context: Context) -> None:
        self.dense = dense = context.engine.dense
        self.anchor = dense.anchors["hold_largest"] = dense.flat.clone()
        self.held = dense.traces["hold_largest"] = torch.zeros_like(dense.flat)  # (P,) 0 or 1

    def on_signal(self, signal: Signal) -> None:
        if signal.kind != "boundary":
            return
        moved = (self.dense.flat - self.anchor).abs()
        for name, param in self.dense.params.items():
            if param.dim() > 1:
                delta = self.dense.part(moved, name).flatten()
                largest = delta.argsort(descending=True, stable=True)[: round(self.options.share * len(delta))]
                largest = largest[delta[largest] > 0.0]
                self.dense.part(self.held, name).view(-1)[largest] = 1.0
        self.anchor.copy_(self.dense.flat)

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.options.strength:
            return grads
        return grads.with_dense(
            torch.addcmul(grads.dense, self.held, self.dense.flat - self.anchor, value=self.options.strength)
        )

    def read(self) -> dict[str, float]:
        return {"held": float(self.held.sum())}

    def state_dict(self) -> State:
        return {"anchor": self.anchor.clone(), "held": self.held.clone()}

    def load_state_dict(self, state: State) -> None:
        if state:
            self.anchor.copy_(self.dense.fitted(state["anchor"], self.dense.flat))
            self.held.copy_(self.dense.fitted(state["held"], torch.zeros_like(self.held)))
        else:
            self.anchor.copy_(self.dense.flat)
            self.held.zero_()


PRESETS: dict[str, dict[str, Any]] = {
    "ewc": {"plugins": [{"kind": "ewc"}]},
    "l2_anchor": {"plugins": [{"kind": "l2_anchor"}]},
    "sefe": {"plugins": [{"kind": "hold_largest"}]},
}
