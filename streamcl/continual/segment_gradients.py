"""What the gradients of past segments tell of a new one: how fast to learn, and which directions to spare.

A `boundary` ends a segment, whoever sends it. Both are of dense weights; rows of the table learn as ever. An event that
is to be forgotten stays in means of gradients and in bases, as it stays in the weights.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from streamcl.plugin import Context, Grads, PluginError, Rule, Step
from streamcl.protocols import State
from streamcl.random import below
from streamcl.records import Signal
from streamcl.stations import New, Stop


class TAG(Rule):
    """Learns slowly where past segments had large gradients, and slowest where those pointed the other way.

    Of each segment s it keeps running means of the gradient, m_s, and of its square, v_s. In segment t a weight's
    gradient becomes g / (sqrt(a_t v_t + sum over past s of a_s v_s) + epsilon), with a_s = exp(-b cos(m_t, m_s)), the
    cosine over a parameter (a matrix, a bias), and a_t = exp(-b), or 1 in the first segment. A cosine near 1 makes the
    divisor small. The step that follows is SGD's.

    Memory: 2 x (segments + 1) numbers a dense weight; costs a dot product with each past segment in every step.

    Source:
        Malviya, Ravindran & Chandar 2022, arXiv 2105.05155, TAG-RMSProp; b 5, decays .9 and .99 as in the authors'
        code.

    Differs from the source:
        The last `segments` past ones count, not all. A weight that is made anew has no past. Rows of the table are
        left to the optimiser: their moments would take 2 x (segments + 1) tables.
    """

    class Options(Rule.Options):
        kind: Literal["tag"] = "tag"
        segments: int = New(10, ge=1, description="past segments that count (count)")
        b: float = Stop(5.0, ge=0, description="how much relatedness counts")
        direction_decay: float = Stop(0.9, ge=0, lt=1, description="of the mean gradient")
        decay: float = Stop(0.99, ge=0, lt=1, description="of the mean square")
        epsilon: float = Stop(1e-8, gt=0, description="added to the divisor")

    options: Options

    def bind(self, context: Context) -> None:
        if context.config.optimizer.kind != "sgd":
            raise PluginError("plugins: tag: it divides by gradients itself; set optimizer.kind to sgd")
        self.dense = dense = context.engine.dense
        slots = self.options.segments + 1
        self.first, self.second = (
            dense.flat.new_zeros(slots, len(dense.flat)),
            dense.flat.new_zeros(slots, len(dense.flat)),
        )
        for slot in range(slots):
            dense.traces[f"tag.first.{slot}"], dense.traces[f"tag.second.{slot}"] = self.first[slot], self.second[slot]
        self._begin()

    def _begin(self) -> None:
        self.number = 0  # of the present segment; its slot is that modulo the slots
        self.steps = 0  # in it
        self.first.zero_()
        self.second.zero_()

    @property
    def past(self) -> list[int]:
        """Slots of the past segments, the oldest first."""
        slots = len(self.first)
        return [number % slots for number in range(max(0, self.number - slots + 1), self.number)]

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.steps:
            self.number, self.steps = self.number + 1, 0
            slot = self.number % len(self.first)
            self.first[slot], self.second[slot] = 0.0, 0.0

    def transform(self, grads: Grads, step: Step) -> Grads:
        here, g = self.number % len(self.first), grads.dense
        self.first[here].lerp_(g, 1.0 - self.options.direction_decay)
        self.second[here].lerp_(g * g, 1.0 - self.options.decay)
        self.steps += 1
        square = self.second[here] * (math.exp(-self.options.b) if self.past else 1.0)
        if self.past:
            for name in self.dense.params:
                self.dense.part(square, name).add_(self._of_past(name, here))
        return grads.with_dense(g / (square.sqrt() + self.options.epsilon))

    def _of_past(self, name: str, here: int) -> Tensor:
        """The sum over past segments of a_s v_s, for one parameter."""
        directions = [self.dense.part(self.first[slot], name).reshape(-1) for slot in (*self.past, here)]
        stacked = torch.nn.functional.normalize(torch.stack(directions), dim=1)
        relations = torch.exp(-self.options.b * (stacked[:-1] @ stacked[-1]))  # (K,)
        squares = torch.stack([self.dense.part(self.second[slot], name) for slot in self.past])
        found: Tensor = torch.tensordot(relations, squares, 1)
        return found

    def read(self) -> dict[str, float]:
        return {"past_segments": float(len(self.past))}

    def state_dict(self) -> State:
        return {
            "number": self.number,
            "steps": self.steps,
            "first": self.first.clone(),
            "second": self.second.clone(),
        }

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            self.number, self.steps = int(state["number"]), int(state["steps"])
            for name, column in (("first", self.first), ("second", self.second)):
                column.copy_(self.dense.fitted(state[name], torch.zeros_like(column)))


class CUBER(Rule):
    """Spares what old segments' inputs span, layer by layer, unless old gradients agree with the new one.

    At a boundary `sample` rows of the memory are drawn, and for each layer of the tower the left singular vectors of
    its inputs are added to an orthonormal basis B until it holds `energy` of their squares. A layer's gradient G, its
    bias the column of an input that is always 1, then becomes G - strength x G B B': what the layer makes of old inputs
    stays. It is left whole if the cosine of G B B' with the gradient that each past segment ended with is at least
    `agreement`: the step is then thought to help those too.

    Memory: a basis of at most `share` of a layer's inputs, and `segments` gradients. Costs two matrix products a layer
    and step. A layer whose basis is full learns little that is new; so it suits streams of few segments, and a clock
    as the sender of boundaries will fill it.

    Source:
        Lin et al. 2022 (CUBER), arXiv 2211.00789: projection, and the agreement of gradients as the sign of positive
        backward transfer. The basis: Saha et al. 2021 (GPM), arXiv 2103.09762, algorithm 1.

    Differs from the source:
        One basis for all segments instead of one for each, so a conflict with one segment protects all. No scaling
        matrix in the old subspace. What was old is what the memory holds at the boundary, which may be of several
        segments. Rows of the table, and weights outside the tower, are not held. A weight that is made anew is free
        until the next boundary.
    """

    class Options(Rule.Options):
        kind: Literal["cuber"] = "cuber"
        energy: float = Stop(0.95, gt=0, le=1, description="of the old inputs' squares that the basis is to hold")
        share: float = Stop(0.8, gt=0, le=1, description="of a layer's inputs that the basis may take up")
        sample: int = Stop(200, ge=1, description="rows of the memory that a boundary looks at")
        agreement: float = Stop(0.5, ge=0, le=1, description="least cosine at which a gradient is left whole")
        segments: int = New(10, ge=1, description="past gradients that are asked (count)")
        strength: float = Stop(1.0, ge=0, le=1, description="share of the old component that is taken out; 0: off")

    options: Options

    def bind(self, context: Context) -> None:
        self.context, self.dense = context, context.engine.dense
        if context.config.replay.retention == "none":
            raise PluginError("plugins: cuber: bases are made of rows in the memory; set replay.retention")
        tower = context.engine.model.tower
        if tower is None:
            raise PluginError("plugins: cuber: the model has no layers whose inputs could be spared")
        names = {id(part): name for name, part in context.engine.model.named_modules()}
        self.layers = [names[id(layer)] for layer in (*tower.hidden, tower.head)]
        self.key = context.key("cuber.sample")
        size = len(self.dense.flat)
        self.known = self.dense.traces["cuber.known"] = torch.zeros(size)  # (P,) 1; 0 if made anew since the boundary
        self.old = torch.zeros(self.options.segments, size)  # (K, P) gradients of past segments
        for slot in range(len(self.old)):
            self.dense.traces[f"cuber.old.{slot}"] = self.old[slot]
        self._begin()

    def _begin(self) -> None:
        self.boundaries = 0
        self.known.zero_()
        self.old.zero_()
        self.bases = [self._weights(self.known, name).new_zeros(self._width(name), 0) for name in self.layers]

    def _width(self, name: str) -> int:
        return self.dense.params[f"{name}.weight"].shape[1] + 1

    def _weights(self, column: Tensor, name: str) -> Tensor:
        """(out, in + 1) of a layer, the bias last."""
        weight, bias = (self.dense.part(column, f"{name}.{part}") for part in ("weight", "bias"))
        return torch.cat((weight, bias[:, None]), 1)

    def on_signal(self, signal: Signal) -> None:
        memory = self.context.memory
        if signal.kind != "boundary" or not len(memory):
            return
        drawn = [below(len(memory), self.key, self.boundaries, i) for i in range(self.options.sample)]
        rows = self.context.rows(memory, torch.tensor(drawn))
        inputs = self.context.engine.inputs(rows)
        self.bases = [self._grown(basis, x) for basis, x in zip(self.bases, inputs, strict=True)]
        self.old[self.boundaries % len(self.old)] = self.context.engine.gradient(rows).dense
        self.known.fill_(1.0)
        self.boundaries += 1

    def _grown(self, basis: Tensor, inputs: Tensor) -> Tensor:
        """(in + 1, k) with as many directions of the inputs (n, in) as it takes."""
        x = torch.cat((inputs, inputs.new_ones(len(inputs), 1)), 1).double()
        basis = basis.double()
        _, values, directions = torch.linalg.svd(x - x @ basis @ basis.T, full_matrices=False)
        total, left = (x * x).sum(), (values * values)
        missing = self.options.energy * total - (total - left.sum())  # what the basis doesn't hold yet
        held = torch.cat((left.new_zeros(1), left.cumsum(0)))
        enough = int((held < missing).sum())
        room = int(self.options.share * len(basis)) - basis.shape[1]
        added = directions[: max(0, min(enough, room))].T
        grown: Tensor = torch.linalg.qr(torch.cat((basis, added), 1)).Q
        return grown.float().contiguous()  # as it is loaded: the order in memory decides how a product rounds

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.options.strength or not self.boundaries:
            return grads
        dense = grads.dense.clone()
        for name, basis in zip(self.layers, self.bases, strict=True):
            known = self._weights(self.known, name)
            inside = ((self._weights(dense, name) * known) @ basis) @ basis.T * known
            if not self._agreed(name, inside):
                taken = self.options.strength * inside
                self.dense.part(dense, f"{name}.weight").sub_(taken[:, :-1])
                self.dense.part(dense, f"{name}.bias").sub_(taken[:, -1])
        return grads.with_dense(dense)

    def _agreed(self, name: str, inside: Tensor) -> bool:
        old = [self._weights(gradient, name) for gradient in self.old[: self.boundaries]]
        cosines = [torch.nn.functional.cosine_similarity(inside.flatten(), g.flatten(), dim=0) for g in old]
        return float(min(cosines)) >= max(self.options.agreement, 1e-6)  # 0 is the cosine of nothing

    def read(self) -> dict[str, float]:
        shares = (basis.shape[1] / len(basis) for basis in self.bases)
        return {f"layer_{place}_held": share for place, share in enumerate(shares)}

    def state_dict(self) -> State:
        return {
            "boundaries": self.boundaries,
            "known": self.known.clone(),
            "old": self.old.clone(),
            "bases": {str(place): basis.clone() for place, basis in enumerate(self.bases)},
        }

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            self.boundaries = int(state["boundaries"])
            for name, column in (("known", self.known), ("old", self.old)):
                column.copy_(self.dense.fitted(state[name], torch.zeros_like(column)))
            self.bases = [state["bases"][str(place)].clone() for place in range(len(self.layers))]


PRESETS = {
    "tag": {"optimizer": {"kind": "sgd", "learning_rate": 1e-4}, "plugins": [{"kind": "tag"}]},
    "cuber": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "cuber"}]},
}
