"""A step may not raise the loss of what was learned before: gradients turned until they agree with those of old rows.

Rows of the table take part: a gradient is one vector of all dense weights and of the rows that the step moves. What an
old gradient says of other rows counts for nothing, since they stand still: GEM moves only weights that would have
moved anyway, A-GEM the replayed rows as well. To first order the promise holds for the step as it is taken by SGD;
other optimisers scale it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.memory.replay import Replay
from streamcl.plugin import Context, Grads, PluginError, Rows, Rule, Step, Term
from streamcl.protocols import State
from streamcl.random import below
from streamcl.records import Outcome, Selector, Signal
from streamcl.stations import Replay as ReplayConfig
from streamcl.stations import Stop

Floats = NDArray[np.float64]


class LiveOnly(Term, Rule):
    """Replayed rows are not learned: they are left to methods that only ask for their gradient, as `agem`.

    Rows of the table that only they read, and that no other loss has pulled at, are not moved: an optimiser with a
    momentum would. It stands before the methods that ask.
    """

    class Options(Term.Options):
        kind: Literal["live_only"] = "live_only"

    options: Options
    replaces_task = True

    def bind(self, context: Context) -> None:
        self.engine = context.engine

    def loss(self, step: Step) -> Tensor:
        if step.live is None:
            return step.share.new_zeros(())
        return self.engine.losses(step.out("live").output, step.live.y, step.served).sum()

    def transform(self, grads: Grads, step: Step) -> Grads:
        if step.live is None or not self.options.weight:
            return grads
        moves = torch.isin(grads.touched, step.live.ids) | (grads.rows != 0).any(1)
        return Grads(grads.dense, grads.touched[moves], grads.rows[moves])


class AGEM(Rule):
    """If the gradient g would raise the loss of the replayed rows, whose gradient is r: g - (g.r / r.r) r.

    Replay stays as it is: g is that of the whole step, live and replayed loss, so the constraint comes on top. Costs
    one more pass, forward and backward, over the replayed rows. In the paper's form they give the constraint alone:
    the preset `agem`, with `live_only` before it.

    Source:
        Chaudhry et al. 2019, arXiv 1812.00420, equation 11.

    Differs from the source:
        On top of replay by default: as the only use of replayed rows it did not hold a class-incremental stream. The
        rows are those that the step replays, not a batch of their own. No task ids; the memory may hold rows of the
        task under way.
    """

    class Options(Rule.Options):
        kind: Literal["agem"] = "agem"
        strength: float = Stop(1.0, ge=0, le=1, description="share of the conflict that is taken out; 0: off")

    options: Options

    def bind(self, context: Context) -> None:
        replay = context.config.replay
        if replay.retention == "none" or not replay.per_event or not replay.weight:
            raise PluginError("plugins: agem: there are no replayed rows; set replay.retention, per_event and weight")
        self.projected = 0

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.options.strength or step.replay is None:
            return grads
        reference = step.gradient("replay")
        dot, square = float(grads.dot(reference)), float(reference.dot(reference))
        if not -math.inf < dot < 0.0 or not square < math.inf:  # nor if either is NaN
            return grads
        self.projected += 1
        return grads.plus(reference, -self.options.strength * dot / square)

    def read(self) -> dict[str, float]:
        return {"projected": float(self.projected)}

    def state_dict(self) -> State:
        return {"projected": self.projected}

    def load_state_dict(self, state: State) -> None:
        self.projected = int(state.get("projected", 0))


class GEM(Rule):
    """The closest gradient that raises the loss of no past segment: g + G'v, with a row of G for each.

    A `boundary` ends a segment, whoever sends it; without one there is no past, and nothing happens. Of each segment
    the last `memory_per_segment` examples are kept, in a table of the plug-in's own; of more than `segments` past ones
    the oldest goes. v solves the dual: min 1/2 v'GG'v + g'G'v over v >= margin. It is looked for only if a constraint
    is broken; a margin above 0 then turns g further than it must, which favours old segments.

    Costs one pass, forward and backward, over `sample` rows of every past segment, in every step.

    Source:
        Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equations 8 to 11; memory of the last examples: section 3.

    Differs from the source:
        In each step `sample` rows of a segment are drawn with replacement, instead of all of them: a step here is one
        example, not ten. Replay, if there is any, goes on, and g is the gradient of both. An active-set method of our
        own in double precision solves the dual.
    """

    class Options(Rule.Options):
        kind: Literal["gem"] = "gem"
        memory_per_segment: int = Stop(256, ge=1, description="examples kept of each (count)")
        segments: int = Stop(20, ge=1, description="past segments whose loss may not rise (count)")
        sample: int = Stop(32, ge=0, description="rows of each segment that a step looks at; 0: all of them")
        margin: float = Stop(0.5, ge=0, description="gamma, the least v")
        strength: float = Stop(1.0, ge=0, le=1, description="share of the correction that is made; 0: off")

    options: Options

    def bind(self, context: Context) -> None:
        self.context = context
        self.key = context.key("gem.sample")
        self._begin()

    def _begin(self) -> None:
        self.tables = [self._table()]  # of past segments, the oldest first, then that of the present one
        self.begun = 1  # segments, the present one too
        self.projected = 0
        self.written: Outcome | None = None  # an outcome of several passes is kept once

    def _table(self) -> Replay:
        replay = self.context.memory
        config = ReplayConfig(retention="recency", capacity=self.options.memory_per_segment)
        return Replay(config, 0, replay.ids.shape[1], replay.dense.shape[1])

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and len(self.tables[-1]):
            self.tables = [*self.tables[-self.options.segments :], self._table()]
            self.begun += 1

    def transform(self, grads: Grads, step: Step) -> Grads:
        past = [(number, table) for number, table in enumerate(self.tables[:-1]) if len(table)]
        if not self.options.strength or not past:
            return grads
        old = torch.stack([self._gradient(table, number, step).on(grads.touched).flat() for number, table in past])
        gram, against = (old @ old.T).double().numpy(), (old @ grads.flat()).double().numpy()
        if not (against < 0.0).any() or not np.isfinite(gram).all() or not np.isfinite(against).all():
            return grads
        self.projected += 1
        v = torch.from_numpy(self.options.strength * dual(gram, against, self.options.margin)).to(old)
        moved, size = v @ old, len(grads.dense)
        return Grads(grads.dense + moved[:size], grads.touched, grads.rows + moved[size:].view_as(grads.rows))

    def _gradient(self, table: Replay, number: int, step: Step) -> Grads:
        return self.context.engine.gradient(self._rows(table, number, step.number))

    def _rows(self, table: Replay, number: int, step: int) -> Rows:
        size, count = len(table), self.options.sample
        first = (self.begun - len(self.tables) + number) << 32  # draws of segments are apart, wherever they stand
        drawn = [below(size, self.key, step, first + i) for i in range(count)] if 0 < count < size else range(size)
        return self.context.rows(table, torch.tensor(list(drawn)))

    def after(self, step: Step) -> None:
        if step.outcome is not None and step.outcome is not self.written:
            self.tables[-1].write(step.outcome.ticket, step.outcome.label)
            self.written = step.outcome

    def forget(self, who: Selector) -> int:
        return sum(table.forget(who) for table in self.tables)

    def read(self) -> dict[str, float]:
        return {"projected": float(self.projected), "rows": float(sum(map(len, self.tables)))}

    def state_dict(self) -> State:
        tables = {str(number): table.state_dict() for number, table in enumerate(self.tables)}
        sizes = [table.capacity for table in self.tables]
        return {"begun": self.begun, "projected": self.projected, "sizes": sizes, "tables": tables}

    def load_state_dict(self, state: State) -> None:
        """A state of another `memory_per_segment`: it begins here. Of another number of segments the newest stay."""
        self._begin()
        if not state or set(state["sizes"]) != {self.options.memory_per_segment}:
            return
        self.begun, self.projected = int(state["begun"]), int(state["projected"])
        kept = [state["tables"][str(number)] for number in range(len(state["tables"]))][-self.options.segments - 1 :]
        self.tables = [self._table() for _ in kept]
        for table, rows in zip(self.tables, kept, strict=True):
            table.load_state_dict(rows)


def dual(gram: Floats, against: Floats, margin: float) -> Floats:
    """(K,) the v >= margin of the least 1/2 v'Qv + q'v, of Q (K, K) positive semidefinite and q (K,)."""
    return margin + nonnegative(gram, against + margin * gram.sum(1))


def nonnegative(gram: Floats, linear: Floats) -> Floats:
    """(K,) the u >= 0 of the least 1/2 u'Qu + c'u, finite also where Q is singular.

    Source:
        Active set, as Lawson & Hanson 1974, Solving Least Squares Problems, chapter 23, by Q and c.
    """
    size = len(linear)
    u, free = np.zeros(size), np.zeros(size, np.bool_)
    ridged = gram + np.eye(size) * (1e-12 * max(float(np.trace(gram)), np.finfo(np.float64).tiny))
    tolerance = 1e-10 * float(np.abs(linear).max())
    for _ in range(10 * size):
        down = np.where(free, -math.inf, -(linear + ridged @ u))
        if not down.max() > tolerance:
            break
        free[int(down.argmax())] = True
        u, free = _least(ridged, linear, u, free)
    return u


def _least(gram: Floats, linear: Floats, u: Floats, free: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """The least over the free ones, of which those are bound again that would be negative."""
    while free.any():
        wanted = np.zeros(len(u))
        wanted[free] = np.linalg.solve(gram[np.ix_(free, free)], -linear[free])
        negative = free & (wanted <= 0.0)
        if not negative.any():
            return wanted, free
        reach = u[negative] / (u[negative] - wanted[negative])
        u = u + reach.min() * (wanted - u)
        stuck = np.flatnonzero(negative)[reach <= reach.min()]
        free = free & (u > 0.0)
        free[stuck] = False
        u = np.where(free, u, 0.0)
    return np.zeros(len(u)), free


PRESETS = {
    "agem": {
        "replay": {"retention": "reservoir", "per_event": 32},
        "plugins": [{"kind": "live_only"}, {"kind": "agem"}],
    },
    "gem": {"plugins": [{"kind": "gem"}]},
}
