"""Other weights beside the live ones: averages that are served or teach, and which of them to serve."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.engine.weights import Average, WeightSet
from streamcl.plugin import Context, PluginError, Query, Recall, Rule, Step
from streamcl.protocols import State
from streamcl.records import Outcome, Signal
from streamcl.stations import Stop


class EMA(Rule):
    """Keeps an exponential moving average of the weights as the set `ema`: served (see `served`), or a teacher.

    Source:
        Temporal ensembles: Soutif-Cormerais et al. 2023, arXiv 2306.16817, section 4: the EMA of the weights is what
        predicts, the live weights go on learning.

    Differs from the source:
        Rows of the table are averaged too, as if each step had averaged all of them.
    """

    class Options(Rule.Options):
        kind: Literal["ema"] = "ema"
        decay: float = Stop(0.99, ge=0, lt=1, description="of the average; 1 / (1 - decay) steps are its memory")

    options: Options
    provides = frozenset({"ema"})

    def bind(self, context: Context) -> None:
        self.average = Average(context.engine, "ema", self.options.decay)

    def before(self, step: Step) -> None:
        self.average.before(step.touched)

    def after(self, step: Step) -> None:
        self.average.after(step.touched)

    def state_dict(self) -> State:
        return self.average.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.average.load_state_dict(state)


class Previous(Rule):
    """Keeps the weights as they stood at the last `boundary` as the set `previous`: a teacher of what was learned then.

    Until the first one there is nothing to teach, and whoever asks `previous.ready` is told so. Costs O(table) at a
    boundary, nothing between two.

    Source:
        The old model of Li & Hoiem 2017 (LwF), arXiv 1606.09282, and of all that distil from the last task's.
    """

    class Options(Rule.Options):
        kind: Literal["previous"] = "previous"
        on: tuple[str, ...] = Stop(("boundary",), min_length=1, description="signals at which the weights are taken")

    options: Options
    provides = frozenset({"previous"})

    def bind(self, context: Context) -> None:
        self.weights = WeightSet(context.engine, "previous")
        self.weights.ready = False

    def on_signal(self, signal: Signal) -> None:
        if signal.kind in self.options.on:
            self.weights.copy_live()
            self.weights.ready = True

    def read(self) -> dict[str, float]:
        return {"ready": float(self.weights.ready)}

    def state_dict(self) -> State:
        return {**self.weights.state_dict(), "ready": self.weights.ready}

    def load_state_dict(self, state: State) -> None:
        self.weights.load_state_dict(state)
        self.weights.ready = bool(state.get("ready", False))


class Served(Recall):
    """Answers with one of several weight sets: with the one of the lowest recent loss.

    Every set answers every event; the losses are those of the answers, half a weight after `half_life_events` labelled
    events. Live weights that catch up fast are served right behind a drift, an average otherwise.
    """

    needs = frozenset({"ema"})

    class Options(Recall.Options):
        kind: Literal["served"] = "served"
        sets: tuple[str, ...] = Stop(("live", "ema"), min_length=1, description="weight sets; of equal ones the first")
        half_life_events: float = Stop(500.0, gt=0, description="how long a loss counts (labelled events)")

    options: Options

    def bind(self, context: Context) -> None:
        for name in self.options.sets:
            if name != "live" and name not in context.engine.sets:
                known = ", ".join(["live", *context.engine.sets])
                raise PluginError(f"plugins: served: no weights {name!r} before it; there are {known}")
        self.context = context
        self.losses = np.zeros(len(self.options.sets))  # decayed sums, nats

    @property
    def chosen(self) -> int:
        return int(self.losses.argmin())

    def apply(self, output: Tensor, query: Query) -> Tensor:
        outputs = [output if name == "live" else query.out(name).output for name in self.options.sets]
        query.notes["served"] = torch.stack(outputs, 1)  # (B, K, O)
        return outputs[self.chosen]

    def observe(self, outcome: Outcome) -> None:
        noted: NDArray[np.float32] | None = outcome.ticket.scores.notes.get("served")
        if noted is None or len(noted) != len(self.losses):  # served before this was configured
            return
        y = torch.full((len(noted),), self.context.y(outcome.label))
        losses = self.context.engine.losses(torch.from_numpy(noted), y).double().numpy()
        self.losses = self.losses * 0.5 ** (1.0 / self.options.half_life_events) + losses

    def read(self) -> dict[str, float]:
        return {f"is_{name}": float(place == self.chosen) for place, name in enumerate(self.options.sets)}

    def state_dict(self) -> State:
        return {"sets": list(self.options.sets), "losses": self.losses.copy()}

    def load_state_dict(self, state: State) -> None:
        same = state.get("sets") == list(self.options.sets)
        self.losses = np.array(state["losses"]) if same else np.zeros(len(self.options.sets))


PRESETS = {
    "temporal_ensembles": {"plugins": [{"kind": "ema", "decay": 0.99}, {"kind": "served", "sets": ["ema"]}]},
}
