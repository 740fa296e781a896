"""Continual backpropagation: hidden units that are of little use are made anew, a few at a time, for ever."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from streamcl.plasticity.layers import Taps
from streamcl.plasticity.reset import Init, Reset
from streamcl.plugin import Rule, Step
from streamcl.protocols import State
from streamcl.random import key_of, uniform_array

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense

Utility = Literal["contribution", "mean_corrected", "adaptable", "adaptation", "weight", "random"]


class _Part(NamedTuple):
    """Views (1, n) of what is known of some units: making them at every step would cost as much as the arithmetic."""

    mean_use: Tensor
    mean: Tensor
    born: Tensor


class ContinualBackprop(Rule):
    """Resets the hidden units of the lowest utility that are older than the maturity threshold.

    After each step of the optimiser, for each hidden layer of n units, in the paper's letters: ages a += 1; units with
    a > m are eligible; rho x (how many) is added up, and for each whole one the eligible unit of the lowest utility is
    reset: its mean contribution moves into the next layer's bias, its incoming weights are drawn anew, its outgoing
    weights, its utility and its age become 0, and with all of these weights goes their optimiser state.

    Args:
        dense: The parameters; its weight sets follow a reset.
        module: The module they belong to.
        taps: Its hidden layers in the order of its computation, and their values in the step under way.
        rate: rho, the replacement rate (units per eligible unit and step), 0 to 1. 0 leaves training bit for bit as it
            was; None: `default_rate` of each layer.
        maturity: m, steps during which a unit is safe.
        decay: eta of all running means.
        utility: What is averaged; see `_momentary` and `_weighing`.
        exact: Multiply by the weights in every step, as the paper has it, instead of when a reset is due.
        transfer: Move the unit's mean contribution into the next bias.
        init: The distribution that the layers were built with, see `reset.bound`.
        seed: Of the redraws, which are keyed by layer and number of the replacement.

    Source:
        Dohare et al. 2024, Nature 632:768-774, "Continual backpropagation"; mean-corrected and adaptation utility and
        the bias transfer: Dohare et al. 2021, arXiv 2108.06325, equations 3 to 6.

    Differs from the source:
        The weights in a utility are today's instead of each step's (`exact = False`): the same ranking on a net that
        stands still, and n numbers touched per step instead of n x k. A count of eligible steps stands for the
        fraction that accumulates, so that nothing drifts. With several rows in a step |h| and h are means over rows;
        a convolution's also over positions. A reset is followed by per-weight bias correction of Adam: a fresh weight
        takes the step that Adam's first would be. Bias transfer through a convolution is exact away from its padding.
    """

    def __init__(
        self,
        dense: Dense,
        module: nn.Module,
        taps: Taps,
        *,
        rate: float | None = None,
        maturity: int = 100,
        decay: float = 0.99,
        utility: Utility = "contribution",
        exact: bool = False,
        transfer: bool = True,
        init: Init = "kaiming",
        seed: int = 0,
    ) -> None:
        self.dense, self.taps = dense, taps
        self.layers = layers = taps.layers
        self.rates = [default_rate(layer.units) if rate is None else rate for layer in layers]
        self.maturity, self.decay = maturity, decay
        self.utility, self.exact = utility, exact
        self.transfer = transfer
        self.reset = Reset(dense, module, "continual_backprop", taps, seed, init)
        self.coins = [key_of(seed, f"continual_backprop.{place}.utility") for place in taps.places]
        starts = [sum(layer.units for layer in layers[:i]) for i in range(len(layers))]
        self.spans = [slice(start, start + layer.units) for start, layer in zip(starts, layers, strict=True)]
        outgoing = [module.get_submodule(name) for layer in layers for name in layer.outgoing]
        self._vectors = all(isinstance(reader, nn.Linear) for reader in outgoing) and all(
            module.get_submodule(layer.outgoing[0]).in_features == layer.units for layer in layers
        )
        units = sum(layer.units for layer in layers)
        self.mean_use = dense.flat.new_zeros(units)  # (U,) running mean of what is averaged for the utility
        self.mean = dense.flat.new_zeros(units)  # (U,) f, running mean of h
        self.born = torch.zeros(units, dtype=torch.int64, device=dense.flat.device)  # step of the last reset
        self._whole = self._part(slice(None))
        self._parts = [self._part(span) for span in self.spans]
        self._begin(0)

    def _part(self, span: slice) -> _Part:
        return _Part(self.mean_use[None, span], self.mean[None, span], self.born[None, span])

    def _begin(self, step: int) -> None:
        self.step = step
        self.mean_use.zero_()
        self.mean.zero_()
        self.born.fill_(step)
        self.eligible_steps = [0] * len(self.layers)  # at the present rate
        self.replaced = [0] * len(self.layers)
        self.replaced_before = [0] * len(self.layers)  # at other rates
        self._count_eligible()

    def _count_eligible(self) -> None:
        """How many are eligible, and who will be when: reset times say it, whichever units they were of.

        So the host knows when a reset is due and never has to ask a device.
        """
        births = [Counter(self.born[span].tolist()) for span in self.spans]
        self._eligible = [sum(n for t, n in found.items() if self.step - t > self.maturity) for found in births]
        self._young = [deque((t, n) for t, n in sorted(b.items()) if self.step - t <= self.maturity) for b in births]

    def after(self, step: Step) -> None:
        if not any(self.rates):
            return
        self.step += 1
        self._observe()
        self._ripen()
        self.replace_due()

    def catch_up(self, step: int, eligible_steps: Sequence[int]) -> None:
        """Steps have been taken elsewhere, which have moved the running means and made no unit anew."""
        self.step, self.eligible_steps = step, list(eligible_steps)
        self._count_eligible()

    def pass_by(self, steps: int) -> None:
        """So many steps have been taken elsewhere, which have moved the running means; no unit was due before them."""
        for _ in range(steps):
            self.step += 1
            self._ripen()

    def due_within(self, steps: int) -> int:
        """After how many of so many steps to come a unit is due; all of them where none is."""
        for place, young in enumerate(self._young):
            eligible, total, waiting = self._eligible[place], self.eligible_steps[place], list(young)
            replaced = self.replaced[place] - self.replaced_before[place]
            for k in range(1, steps):
                while waiting and self.step + k - waiting[0][0] > self.maturity:
                    eligible += waiting.pop(0)[1]
                total += eligible
                if eligible and math.floor(self.rates[place] * total) > replaced:
                    steps = k
                    break
        return steps

    def replace_due(self) -> None:
        """Make units anew, as many as are due after the step under way."""
        if due := self._due():
            # Every unit is chosen before anything changes; then from front to back.
            chosen = [(place, self._least_useful(place, count)) for place, count in due]
            for place, units in chosen:
                self._reset(place, units)

    def _observe(self) -> None:
        if self._vectors:  # one pass over all layers
            h = torch.cat(self.taps.vectors(), 1)  # (B, U)
            self._average(h if len(h) == 1 else h.unsqueeze(2), self._whole, range(len(self.layers)))
            return
        for place, value in enumerate(self.taps):
            self._average(value, self._parts[place], (place,))

    def _average(self, value: Tensor, part: _Part, places: Sequence[int]) -> None:
        """Move the running means by (1, n) or (B, n, S)."""
        h = _over_rows(value)
        part.mean.lerp_(h, 1.0 - self.decay)
        if self.utility in ("mean_corrected", "adaptable"):
            mean = part.mean / self._unbias(part.born)
            value = value - (mean if value.dim() == 2 else mean.unsqueeze(2))
        use = _over_rows(value.abs())  # the absolute value of the mean would let rows of two signs cancel
        if self.exact:
            use = use * torch.cat([self._weighing(place) for place in places])
        part.mean_use.lerp_(use, 1.0 - self.decay)

    def _unbias(self, born: Tensor) -> Tensor:
        """1 - eta^a: a running mean that began at 0 is this share of what it would be."""
        return (1.0 - self.decay ** (self.step - born).double()).to(self.mean.dtype)

    def _ripen(self) -> None:
        for place, young in enumerate(self._young):
            while young and self.step - young[0][0] > self.maturity:
                self._eligible[place] += young.popleft()[1]
            self.eligible_steps[place] += self._eligible[place]

    def _due(self) -> list[tuple[int, int]]:
        """(layer, how many units) for each layer with any."""
        due = []
        for place in range(len(self.layers)):
            replaced = self.replaced[place] - self.replaced_before[place]
            count = math.floor(self.rates[place] * self.eligible_steps[place]) - replaced
            if count > 0 and self._eligible[place]:
                due.append((place, min(count, self._eligible[place])))
        return due

    def _least_useful(self, place: int, count: int) -> Tensor:
        """(k,) eligible units of the lowest utility; of equal ones the first."""
        utility = self._utility(place)
        utility = utility.clamp_max(torch.finfo(utility.dtype).max)  # below what is not eligible
        utility = torch.where(self.step - self.born[self.spans[place]] > self.maturity, utility, math.inf)
        return utility.argmin().view(1) if count == 1 else utility.argsort(stable=True)[:count]

    def _utility(self, place: int) -> Tensor:
        """(n,) of each unit today; NaN for one that was made anew in the last step."""
        if self.utility not in ("contribution", "mean_corrected", "adaptable"):
            return self._weighing(place)
        span = self.spans[place]
        utility = self.mean_use[span] / self._unbias(self.born[span])
        return utility if self.exact else utility * self._weighing(place)

    def _weighing(self, place: int) -> Tensor:
        """(n,) what the mean is multiplied by: S_out, S_out / S_in, or for utilities without activations all of it."""
        layer = self.layers[place]
        if self.utility == "random":
            draw = uniform_array(self.coins[place], layer.units, self.step * layer.units)
            return torch.from_numpy(draw).to(self.mean)
        one = torch.ones_like(self.mean[self.spans[place]])
        if self.utility != "adaptation":
            outgoing = [self.dense.params[f"{name}.weight"].detach() for name in layer.outgoing]
            one = sum((w.view(len(w), layer.units, -1).abs().sum((0, 2)) for w in outgoing), torch.zeros_like(one))
        if self.utility in ("adaptable", "adaptation"):
            incoming = self.dense.params[f"{layer.incoming}.weight"].detach().view(layer.units, -1).abs().sum(1)
            one = one / incoming.clamp_min(torch.finfo(one.dtype).tiny)
        return one

    def _reset(self, place: int, units: Tensor) -> None:
        span = self.spans[place]
        mean = self.mean[span][units] / self._unbias(self.born[span][units])  # before it is zeroed
        self.reset(self.layers[place], place, units, self.replaced[place], mean if self.transfer else None)
        self.mean[span].index_fill_(0, units, 0.0)
        self.mean_use[span].index_fill_(0, units, 0.0)
        self.born[span].index_fill_(0, units, self.step)
        self.replaced[place] += len(units)
        self._eligible[place] -= len(units)
        self._young[place].append((self.step, len(units)))

    def read(self) -> dict[str, float]:
        told: dict[str, float] = {}
        for place, (number, span) in enumerate(zip(self.taps.places, self.spans, strict=True)):
            age = self.step - self.born[span]
            told[f"layer_{number}_replacements"] = float(self.replaced[place])
            told |= _percentiles(f"layer_{number}_unit_age_steps", age)
            told |= _percentiles(f"layer_{number}_unit_utility", self._utility(place)[age > 0])
        return told

    def state_dict(self) -> State:
        return {
            "step": self.step,
            "born": self.born.clone(),
            "mean": self.mean.clone(),
            "mean_use": self.mean_use.clone(),
            "eligible_steps": list(self.eligible_steps),
            "replaced": list(self.replaced),
            "replaced_before": list(self.replaced_before),
            "layers": self.taps.described(),
            "rates": list(self.rates),
            "averaged": self._averaged(),
        }

    def _averaged(self) -> list[Any]:
        """What the running means are means of."""
        return [self.utility, self.exact, self.decay]

    def load_state_dict(self, state: State) -> None:
        """An empty state, and one of other layers: it begins here.

        A rate that has changed counts from here on, with no debt of the old one. When something else is averaged from
        here on, all units are young again.
        """
        self._begin(0)
        if state.get("layers") != self.taps.described():
            return
        self.step = int(state["step"])
        for name in ("born", "mean", "mean_use"):
            getattr(self, name).copy_(state[name])
        self.eligible_steps, self.replaced = list(state["eligible_steps"]), list(state["replaced"])
        self.replaced_before = list(state["replaced_before"])
        if state["rates"] != self.rates:
            self.eligible_steps, self.replaced_before = [0] * len(self.layers), list(self.replaced)
        if state["averaged"] != self._averaged():
            self.mean.zero_()
            self.mean_use.zero_()
            self.born.fill_(self.step)
        self._count_eligible()


def default_rate(units: int) -> float:
    """rho for a layer of so many units; of the authors' range for the paper's tasks, 1e-6 to 1e-4, wider is slower."""
    return 1e-4 if units <= 128 else 1e-5 if units <= 1000 else 1e-6


def _percentiles(name: str, values: Tensor) -> dict[str, float]:
    """Of the units that have a value: of n in order the one at place (n - 1) x NN / 100, rounded down."""
    found = values.double().sort().values.tolist()
    return {f"{name}_p{p}": found[(len(found) - 1) * p // 100] for p in (10, 50, 90) if found}


def _over_rows(value: Tensor) -> Tensor:
    """(1, n) mean over rows and positions of (B, n, S); a single row (1, n) is its own."""
    return value if value.dim() == 2 else value.mean((0, 2)).unsqueeze(0)
