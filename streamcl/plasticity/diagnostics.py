"""How a net fares: units that fall silent, ranks that shrink, weights that grow, in figures for people and alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from streamcl.memory.owners import NOBODY, Owner, Owners, close_ranks
from streamcl.plasticity.layers import Taps
from streamcl.protocols import State
from streamcl.records import Selector

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense

DORMANT = 0.01
"""A unit that fires on a smaller share of the inputs is dormant."""
MOST = 0.99
"""What the first k singular values must make up for a rank of k."""


class Diagnostics:
    """Looks at the live example of every so manyth learning step, and makes figures of the last `window` of them.

    A unit fires on an example when its value, as the next layer receives it, is not 0: after ReLU that is > 0; units
    of a smooth activation always fire. A convolution's unit fires on the share of positions where it is not 0.

    Readings, for hidden layer i = 0, 1, ... under `layer_i_`:

    - `dormant_ratio`: share of units that fire on less than 1 % of the window's examples.
    - `dead_ratio`: share of units that fire on none of them.
    - `weight_magnitude`: mean |w| of the incoming weights, biases apart.
    - of the last hidden layer, from the singular values s of its window x n values, not centred: `effective_rank`
      exp(-sum p ln p) with p = s / sum s; `approximate_rank`, the least k whose s^2 make up .99 of their sum;
      `stable_rank` sum s^2 / max s^2, the textbook's; `absolute_rank`, the least k whose s make up .99 of their sum,
      which the paper's code calls stable rank. All are 0 when no unit fires.

    And `gradient_norm`, of all dense parameters, its mean over the window; `dense_weight_magnitude`, mean |w| of all of
    them; `diagnostics_examples`, how many examples the window holds. There are no shares, norms and ranks before the
    window is full. Ranks and weights are reckoned every `report_every` steps, the rest when asked.

    Args:
        dense: The parameters.
        taps: The hidden layers, to which this part alone listens through these taps.
        sample_every: Steps from one sampled example to the next, >= 1; the first is the step of that number.
        window: Examples, >= 2.
        report_every: Steps.

    After a forget the window is of the other examples, and is not full before as many have come.

    Memory: window x (units + 1) numbers, part of every checkpoint: 200 kB for layers of 64 and 32 units, 12 MB for
    three of 2,000.

    Source:
        Dohare et al. 2024, Nature 632:768-774: dormant units (firing on < .01 of 1,000 inputs), stable rank (as in its
        code), weight magnitude. Roy and Vetterli 2007 (EUSIPCO): effective rank. Yang et al. 2019, arXiv 1909.12255:
        approximate rank.

    Differs from the source:
        The inputs are the sampled ones of the recent past, each under the weights of its time, instead of 1,000 of the
        next task under today's. A convolution's last hidden layer enters the ranks as its mean over positions.
    """

    def __init__(
        self, dense: Dense, taps: Taps, *, sample_every: int = 16, window: int = 512, report_every: int = 10_000
    ) -> None:
        self.dense, self.taps = dense, taps
        self.sample_every, self.window, self.report_every = sample_every, window, report_every
        units = [layer.units for layer in taps.layers]
        readers = [dense.params[f"{layer.outgoing[0]}.weight"] for layer in taps.layers]
        self._vectors = all(w.dim() == 2 and w.shape[1] == n for w, n in zip(readers, units, strict=True))
        self._units = units
        total, last = sum(units), units[-1]
        self._last = slice(total - last, total) if self._vectors else slice(total, total + last)
        # A row for each example: units' values (with maps: firing shares, then the last layer's values), the norm.
        self.ring = torch.zeros(window, self._last.stop + 1, dtype=dense.flat.dtype, device=dense.flat.device)
        self.owners = Owners(window)
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.sampled = 0
        self.report: dict[str, float] = {}
        self.ring.zero_()
        self.look_ahead()

    def look_ahead(self) -> None:
        self.taps.listen((self.steps + 1) % self.sample_every == 0)

    @property
    def full(self) -> bool:
        return self.sampled >= self.window

    def observe(self, gradient_norm: Tensor, owner: Owner = NOBODY) -> None:
        """A learning step has been taken, its live example in row 0; the norm () is of the dense parameters."""
        self.steps += 1
        phase = self.steps % self.sample_every
        if phase == 0:
            self.owners.write(self.sampled % self.window, owner)
            self._sample(gradient_norm)
        if self.steps % self.report_every == 0:
            self.report = self.reckon()
        self.taps.listen(phase == self.sample_every - 1)

    def _sample(self, gradient_norm: Tensor) -> None:
        if self._vectors:
            said = [value[0] for value in self.taps.vectors()]
        else:
            maps = [value[0] for value in self.taps]  # (n, S) each
            said = [*((value != 0.0).to(value.dtype).mean(1) for value in maps), maps[-1].mean(1)]
        torch.cat([*said, gradient_norm.view(1)], out=self.ring[self.sampled % self.window])
        self.sampled += 1

    def forget(self, who: Selector) -> int:
        """Erase what the units said of somebody's examples; returns of how many."""
        size = min(self.sampled, self.window)
        erased = self.owners.meant(who, size)
        if erased.any():
            order = np.roll(np.arange(size), -(self.sampled % size))  # the oldest first
            kept = order[~erased[order]]
            held = self.ring.cpu()
            close_ranks(held.numpy(), kept, size)
            self.ring.copy_(held)
            self.owners.close_ranks(kept, size)
            self.sampled = len(kept)
        return int(erased.sum())

    def reckon(self) -> dict[str, float]:
        """What a report tells: weights, and the ranks if the window is full."""
        return self._weights() | (self._ranks() if self.full else {})

    def _weights(self) -> dict[str, float]:
        weights = [self.dense.params[f"{layer.incoming}.weight"] for layer in self.taps.layers]
        told = {f"layer_{place}_weight_magnitude": _magnitude(weight) for place, weight in enumerate(weights)}
        return told | {"dense_weight_magnitude": _magnitude(self.dense.flat)}

    def _ranks(self) -> dict[str, float]:
        found = ranks(self.ring[:, self._last])
        return {f"layer_{len(self._units) - 1}_{name}": value for name, value in found.items()}

    def _shares(self) -> dict[str, float]:
        told: dict[str, float] = {}
        said = self.ring[:, : sum(self._units)]
        fired = said.count_nonzero(0) if self._vectors else said.sum(0, dtype=torch.float64)
        for place, units in enumerate(torch.split(fired.double() / self.window, self._units)):
            told[f"layer_{place}_dormant_ratio"] = float((units < DORMANT).double().mean())
            told[f"layer_{place}_dead_ratio"] = float((units == 0.0).double().mean())
        return told | {"gradient_norm": float(self.ring[:, -1].mean(dtype=torch.float64))}

    def read(self) -> dict[str, float]:
        """What is known; asking changes nothing."""
        told = {"diagnostics_examples": float(min(self.sampled, self.window))}
        return told | self.report | (self._shares() if self.full else {})

    def state_dict(self) -> State:
        return {
            "steps": self.steps,
            "sampled": self.sampled,
            "ring": self.ring.clone(),
            "report": dict(self.report),
            **self.owners.state_dict(min(self.sampled, self.window)),
        }

    def load_state_dict(self, state: State) -> None:
        """An empty state, and one of another window: they begin here."""
        self._begin()
        if not state or state["ring"].shape != self.ring.shape:
            return
        self.ring.copy_(state["ring"])
        self.steps, self.sampled, self.report = int(state["steps"]), int(state["sampled"]), dict(state["report"])
        self.owners.load_state_dict(state, min(self.sampled, self.window))
        self.look_ahead()


def ranks(values: Tensor) -> dict[str, float]:
    """Of a matrix (N, n), by name; none when it holds what is not finite."""
    matrix = values.double().cpu()
    if not matrix.isfinite().all():
        return {}
    s = torch.linalg.svdvals(matrix)  # descending
    largest = float(s[0])
    if largest == 0.0:
        return dict.fromkeys(("effective_rank", "approximate_rank", "stable_rank", "absolute_rank"), 0.0)
    s = s / largest  # so that no square is out of range
    p, squares = s / s.sum(), s.square()
    return {
        "effective_rank": float(torch.exp(-torch.special.xlogy(p, p).sum())),
        "approximate_rank": _least(squares),
        "stable_rank": float(squares.sum()),
        "absolute_rank": _least(s),
    }


def _least(descending: Tensor) -> float:
    """The least k whose first k make up .99 of the sum."""
    return float((descending.cumsum(0) < MOST * descending.sum()).sum() + 1)


def _magnitude(weights: Tensor) -> float:
    return float(weights.detach().abs().mean(dtype=torch.float64))
