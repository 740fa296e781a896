"""Units that say next to nothing are made anew, all at once, every so often: recycling dormant neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from streamcl.plasticity.layers import Taps
from streamcl.plasticity.reset import Init, Reset
from streamcl.plugin import Rule, Step
from streamcl.protocols import State

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class ReDo(Rule):
    """Every F steps, each hidden unit whose share of its layer's mean activation is at most tau is made anew.

    In step t = 1, 2, ..., after the optimiser's: the total of each unit grows by its |h| (mean over rows, and over the
    positions of a convolution). If F divides t, unit i of a layer of n units is dormant if total_i <= tau x mean of the
    layer's n totals; so all are, if all have said nothing. Dormant units of all layers are found before any is made
    anew, then layers from front to back, units in order: rows drawn, biases 0, outgoing weights 0, optimiser state
    that of new weights (Adam: both moments and the count of steps 0), nothing moved into the next bias. Then all totals
    are 0.

    A host waits for the device every F steps, never in between.

    Args:
        tau: Share of the mean activation; 0: only units that have been silent.
        every: F (steps).
        init: The distribution that the layers were built with, see `reset.bound`.
        seed: Of the redraws: `key_of(seed, "redo.i")` for layer i, by the number of rows drawn there.

    Source:
        Sokar et al. 2023, arXiv 2302.12902, definition 3.1 (tau-dormant) and algorithm 1.

    Differs from the source:
        The expectation is over the F steps since the last look, as the weights were, not over a batch of today; there
        is no batch on a stream. Fresh biases are 0.
    """

    def __init__(
        self,
        dense: Dense,
        module: nn.Module,
        taps: Taps,
        *,
        tau: float = 0.025,
        every: int = 1000,
        init: Init = "kaiming",
        seed: int = 0,
    ) -> None:
        self.taps, self.tau, self.every = taps, tau, every
        self.reset = Reset(dense, module, "redo", taps, seed, init)
        self.step = 0
        self.total = dense.flat.new_zeros(sum(layer.units for layer in taps.layers))  # (U,) |h| since the last look
        self.replaced = [0] * len(taps.layers)

    def after(self, step: Step) -> None:
        self.step += 1
        self.total.add_(torch.cat([value.abs().mean((0, 2)) for value in self.taps]))
        if self.step % self.every == 0:
            totals = torch.split(self.total, [layer.units for layer in self.taps.layers])
            dormant = [torch.nonzero(total <= self.tau * total.mean())[:, 0] for total in totals]
            for place, (layer, units) in enumerate(zip(self.taps.layers, dormant, strict=True)):
                if len(units):
                    self.reset(layer, place, units, self.replaced[place])
                    self.replaced[place] += len(units)
            self.total.zero_()

    def read(self) -> dict[str, float]:
        return {
            f"layer_{place}_replacements": float(count)
            for place, count in zip(self.taps.places, self.replaced, strict=True)
        }

    def state_dict(self) -> State:
        told = {"step": self.step, "total": self.total.clone(), "replaced": list(self.replaced)}
        return {**told, "layers": self.taps.described()}

    def load_state_dict(self, state: State) -> None:
        """An empty state, and one of other layers: it begins here."""
        state = state if state.get("layers") == self.taps.described() else {}
        self.step = int(state.get("step", 0))
        self.replaced = list(state.get("replaced", [0] * len(self.replaced)))
        if state:
            self.total.copy_(state["total"])
        else:
            self.total.zero_()
