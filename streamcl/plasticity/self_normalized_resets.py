"""A unit that has been silent for longer than it ever used to be is made anew: self-normalized resets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from streamcl.plasticity.layers import Taps
from streamcl.plasticity.reset import Init, Reset
from streamcl.plugin import Rule, Step
from streamcl.protocols import State

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense

FINENESS = 8  # bins of a histogram per doubling


class SelfNormalizedResets(Rule):
    """Each hidden unit has a threshold of its own: how many steps it may be silent before it is made anew.

    In step t = 1, 2, ..., after the optimiser's:

    1. A unit fires if h > 0 in any row (of a convolution: at any position). If it fires, its silence enters its
       histogram, unless it is 0, and becomes 0; otherwise its silence grows by 1.
    2. Units with silence >= threshold, of all layers, are found; their silence enters their histogram too and becomes
       0; then they are made anew, layers from front to back, units in order, with nothing moved into the next bias. The
       new unit goes on with the threshold and the histogram.
    3. If `revisit` divides t: q is the least silence that at least `percentile` of the unit's histogram does not
       exceed. The threshold becomes q if q is smaller, else `expansion` times what it was (rounded down), within
       [shortest, longest]; a unit whose histogram is empty keeps its threshold. All histograms are emptied.

    A histogram has bins up to ceil(2^(j / 8)), j = 0, 1, ..., and the longest; q is the upper end of a bin, so it is
    exact up to 11 and at most 9 % or 1 too large above. The host knows when a threshold can be reached at the earliest
    and asks the device then, not in each step.

    Args:
        percentile: Of the silences, 0 to 1.
        expansion: Factor of a threshold that was never too long.
        revisit: Steps between two looks at the thresholds.
        initial: First threshold (steps).
        shortest: No threshold is below (steps).
        longest: No threshold is above (steps).
        init: The distribution that the layers were built with, see `reset.bound`.
        seed: Of the redraws: `key_of(seed, "self_normalized_resets.i")` for layer i, by the number of rows drawn there.

    Source:
        Farias & Jozefiak 2024, arXiv 2410.20098, algorithm 1, and the authors' code for the thresholds, which looks at
        them every 16 tasks.

    Differs from the source:
        Silences are counted in steps, not rows; histograms have bins of 9 %, for one of every length would take 40 kB
        a unit. Thresholds are revisited by steps, for a stream has no tasks. `shortest` is the source's "batch size",
        100 there. A unit that has always fired has an empty histogram, of which the authors' code makes the shortest
        threshold: its first pause would be its end.
    """

    def __init__(
        self,
        dense: Dense,
        module: nn.Module,
        taps: Taps,
        *,
        percentile: float = 0.99,
        expansion: float = 2.0,
        revisit: int = 10_000,
        initial: int = 1000,
        shortest: int = 100,
        longest: int = 10_000,
        init: Init = "kaiming",
        seed: int = 0,
    ) -> None:
        self.taps = taps
        self.percentile, self.expansion, self.revisit = percentile, expansion, revisit
        self.initial, self.shortest, self.longest = initial, shortest, longest
        self.reset = Reset(dense, module, "self_normalized_resets", taps, seed, init)
        self._sizes = [layer.units for layer in taps.layers]
        ends = {math.ceil(2.0 ** (j / FINENESS)) for j in range(FINENESS * longest.bit_length())}
        bins = sorted({end for end in ends if end < longest} | {longest})
        device, units = dense.flat.device, sum(self._sizes)
        self.bins = torch.tensor(bins, device=device)  # (K,) upper ends, inclusive
        self.silence = torch.zeros(units, dtype=torch.int64, device=device)  # (U,) steps
        self.threshold = torch.zeros_like(self.silence)  # (U,) steps
        self.histogram = torch.zeros(units, len(bins), dtype=torch.int64, device=device)  # (U, K)
        self._begin()

    def _begin(self) -> None:
        self.step = 0
        self.replaced = [0] * len(self._sizes)
        self.silence.zero_()
        self.threshold.fill_(self.initial)
        self.histogram.zero_()
        self._look_at()

    def _look_at(self) -> None:
        """Set the first step in which any unit can have been silent for long enough; this asks the device."""
        self._due = self.step + max(1, int((self.threshold - self.silence).min()))

    def after(self, step: Step) -> None:
        self.step += 1
        fires = torch.cat([(value > 0).any(2).any(0) for value in self.taps])  # (U,)
        self._note(fires & (self.silence > 0))
        self.silence.add_(1).mul_(~fires)
        if due := self.step >= self._due:
            self._replace()
        if self.step % self.revisit == 0:
            self._revisit()
        if due or self.step % self.revisit == 0:
            self._look_at()

    def _note(self, over: Tensor) -> None:
        """Count the silences that are over, (U,) bool, in the histograms."""
        place = torch.bucketize(self.silence.clamp_max(self.longest), self.bins)
        self.histogram.scatter_add_(1, place.unsqueeze(1), over.unsqueeze(1).to(self.histogram.dtype))

    def _replace(self) -> None:
        over = self.silence >= self.threshold
        self._note(over)
        self.silence.mul_(~over)
        found = [torch.nonzero(part)[:, 0] for part in torch.split(over, self._sizes)]
        for place, (layer, units) in enumerate(zip(self.taps.layers, found, strict=True)):
            if len(units):
                self.reset(layer, place, units, self.replaced[place])
                self.replaced[place] += len(units)

    def _revisit(self) -> None:
        counted = self.histogram.cumsum(1)  # (U, K)
        total = counted[:, -1:]
        enough = counted.double() >= self.percentile * total.double()
        q = self.bins[enough.int().argmax(1)]  # the first of the largest
        wider = (self.threshold.double() * self.expansion).long()
        moved = torch.where(q < self.threshold, q, wider).clamp(self.shortest, self.longest)
        self.threshold.copy_(torch.where(total[:, 0] > 0, moved, self.threshold))
        self.histogram.zero_()

    def read(self) -> dict[str, float]:
        return {
            f"layer_{place}_replacements": float(count)
            for place, count in zip(self.taps.places, self.replaced, strict=True)
        }

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "replaced": list(self.replaced),
            "silence": self.silence.clone(),
            "threshold": self.threshold.clone(),
            "histogram": self.histogram.clone(),
            "layers": self.taps.described(),
        }

    def load_state_dict(self, state: State) -> None:
        """An empty state, and one of other layers or another longest threshold: it begins here."""
        if state.get("layers") != self.taps.described() or state["histogram"].shape != self.histogram.shape:
            self._begin()
            return
        self.step, self.replaced = int(state["step"]), list(state["replaced"])
        for name in ("silence", "threshold", "histogram"):
            getattr(self, name).copy_(state[name])
        self._look_at()
