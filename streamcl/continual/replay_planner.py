"""When to replay, how much, and from where: spaced visits, a bandit over parts of the memory, passes of few modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from streamcl.continual.retention_scores import Strata, merged
from streamcl.memory.replay import Replay
from streamcl.plugin import Context, Draw, Plan, Planner, PluginError, Rule, Step
from streamcl.protocols import State
from streamcl.random import bits, uniform_array
from streamcl.records import Outcome, Signal
from streamcl.stations import Stop

Floats = NDArray[np.float64]


class Spaced(Draw, Planner, Rule):
    """Rows are visited at growing intervals: one is due when `interval` x growth ^ visits steps have gone by.

    As many rows are drawn as are due, no more than `replay.per_event` and no fewer than `least`: first those that are
    most overdue, in units of their interval, no row twice. O(capacity) per event.

    Source:
        View-batch, Kang et al. 2025 (CVPR), arXiv 2503.18371: a recall interval long enough to rest, after the
        forgetting curve. Growing intervals: Leitner's boxes, as in Amiri et al. 2017 (EMNLP).

    Differs from the source:
        The paper stretches the interval by putting several augmented views of one image into a batch, tied by a
        self-supervised loss; events have no augmentation that is known to keep the label, so a visit is one view.
    """

    class Options(Draw.Options):
        kind: Literal["spaced"] = "spaced"
        interval: float = Stop(10.0, gt=0, description="from writing a row to its first visit (steps)")
        growth: float = Stop(1.5, ge=1, description="of the interval, with each visit")
        longest: float = Stop(1000.0, gt=0, description="no interval is longer (steps)")
        least: int = Stop(1, ge=0, description="rows drawn even when none is due (count)")

    options: Options
    needs = frozenset({"hits", "last_seen"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.steps = 0

    def overdue(self, memory: Replay, number: int) -> Floats:
        """(N,) time since the last visit in intervals; due from 1 on."""
        size = len(memory)
        visits = np.minimum(memory.columns["hits"][:size], 64)
        interval = np.minimum(self.options.interval * self.options.growth**visits, self.options.longest)
        return np.asarray((number - memory.columns["last_seen"][:size]) / interval, np.float64)

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        memory = self.context.memory
        return replace(plan, draw=min(plan.draw, max(self._due(), self.options.least), len(memory)))

    def _due(self) -> int:
        return int((self.overdue(self.context.memory, self.steps) >= 1.0).sum())

    def after(self, step: Step) -> None:
        self.steps = step.number + 1

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        order = np.argsort(-self.overdue(memory, number), kind="stable")
        return torch.from_numpy(np.resize(order, count)), torch.ones(count)

    def read(self) -> dict[str, float]:
        return {"due": float(self._due())}

    def state_dict(self) -> State:
        return {"steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        self.steps = int(state.get("steps", 0))


class Schedule(Draw, Planner, Rule):
    """A bandit chooses what each event replays: a class, a segment, an age, or how many rows.

    Each choice is judged by the share of the loss of `probe` rows of the memory, drawn uniformly, that the step takes
    away, cut to -1 .. 1. Weights grow by Exp3; a share of them flows back to all, so that what has become bad can
    become good again. O(capacity) per draw, two forward passes of `probe` rows per step.

    Source:
        Replay scheduling, Klasson et al. 2023 (TMLR), arXiv 2209.08660: when to replay which task matters. Exp3.S:
        Auer et al. 2002, doi 10.1137/S0097539701398375, section 8.

    Differs from the source:
        The paper searches a schedule with Monte Carlo trees or learns a policy over many runs, both offline; this
        bandit decides online, without looking ahead. The whole step is judged, with the live event in it, which is the
        same for all choices.
    """

    class Options(Draw.Options):
        kind: Literal["schedule"] = "schedule"
        over: Literal["class", "segment", "age", "amount"] = Stop("class", description="what is chosen from")
        parts: int = Stop(8, ge=2, le=256, description="most segments or ages told apart (count)")
        amounts: tuple[Annotated[int, Field(ge=0)], ...] = Stop(
            (1, 4, 16), min_length=2, description="amount: rows that may be drawn"
        )
        explore: float = Stop(0.2, gt=0, le=1, description="share of the choices that are uniform")
        rate: float = Stop(0.05, gt=0, le=1, description="of the weights' growth")
        share: float = Stop(0.001, ge=0, lt=1, description="of the weights, that flows back to all at each step")
        probe: int = Stop(8, ge=1, le=1024, description="rows that the reward is measured on (count)")

    options: Options
    needs = frozenset({"written"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        over = self.options.over
        self.strata = Strata("none" if over == "amount" else over, self.options.parts, context, self.kind)
        self.arms = len(self.options.amounts) if over == "amount" else self.strata.count
        self.logs = np.zeros(self.arms)
        self.key, self.probes = context.key("schedule.choice"), context.key("schedule.probe")
        self.before_loss, self.reward = 0.0, 0.0
        self.choice: tuple[int, float] | None = None  # arm and its chance, of the step that is under way

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.strata.begin():
            ends = float(self.logs[:2].max())
            self.logs = np.concatenate(([ends], merged(self.logs)[1:]))

    def chances(self, open_: NDArray[np.bool_]) -> Floats:
        """(K,) of each arm; 0 where it is not open."""
        powers = np.where(open_, np.exp(self.logs - self.logs[open_].max()), 0.0)
        explore = self.options.explore
        return np.asarray((1.0 - explore) * powers / powers.sum() + explore * open_ / open_.sum(), np.float64)

    def _choose(self, number: int, open_: NDArray[np.bool_]) -> int:
        chances = self.chances(open_)
        lot = uniform_array(bits(self.key, number), 1)[0]
        arm = int(np.flatnonzero(open_)[np.searchsorted(np.cumsum(chances[open_])[:-1], lot, side="right")])
        self.choice = arm, float(chances[arm])
        return arm

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        self.choice = None
        if self.options.over != "amount":
            return plan
        arm = self._choose(self.strata.steps, np.ones(self.arms, np.bool_))
        return replace(plan, draw=self.options.amounts[arm] if plan.draw else 0)

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        if self.options.over == "amount":
            return memory.uniform(count, number)
        parts = self.strata.of(memory)
        arm = self._choose(number, np.bincount(parts, minlength=self.arms) > 0)
        rows = np.flatnonzero(parts == arm)
        lots = uniform_array(bits(self.key, number, 1), count)
        return torch.from_numpy(rows[(lots * len(rows)).astype(np.int64)]), torch.ones(count)

    def _probed(self, number: int) -> float:
        """The mean task loss of rows that are the same before and after a step."""
        engine, size = self.context.engine, len(self.context.memory)
        lots = uniform_array(bits(self.probes, number), self.options.probe)
        rows = self.context.rows(self.context.memory, torch.from_numpy((lots * size).astype(np.int64)))
        return float(engine.losses(engine.out(rows).output, rows.y).mean())

    def before(self, step: Step) -> None:
        if not len(self.context.memory) or (step.replay is None and self.options.over != "amount"):
            self.choice = None
        if self.choice is not None:
            self.before_loss = self._probed(step.number)

    def after(self, step: Step) -> None:
        self.strata.steps = step.number + 1
        if self.choice is None:
            return
        arm, chance = self.choice
        fall = (self.before_loss - self._probed(step.number)) / max(self.before_loss, 1e-6)
        self.reward = min(max(fall, -1.0), 1.0)
        self.logs[arm] += self.options.rate * self.reward / chance / self.arms
        self.logs -= self.logs.max()  # Exp3.S next: each weight takes its part of a share of the sum
        weights = np.exp(self.logs)
        self.logs = np.log(weights + self.options.share * weights.mean())
        self.choice = None

    def read(self) -> dict[str, float]:
        chances = self.chances(np.ones(self.arms, np.bool_))
        return {"reward": self.reward, "entropy": float(-(chances * np.log(chances)).sum())}

    def state_dict(self) -> State:
        return {"logs": self.logs.copy(), "reward": self.reward, "strata": self.strata.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Of another number of arms than now: it begins anew."""
        same = bool(state) and len(state["logs"]) == self.arms
        self.logs = np.array(state["logs"]) if same else np.zeros(self.arms)
        self.reward = float(state["reward"]) if same else 0.0
        self.strata.load_state_dict(state["strata"] if same else {})


class KFPF(Planner, Rule):
    """Every `every` events a few passes of the memory alone, in which only the modules that forget may move.

    Which these are is said (`modules`), or watched: those dense parameters whose weights have moved most, relative to
    their size, until `share` of all parameter tensors are taken. O(P) per event for watching, nothing else between two.
    Rows count in a finetuning as in any replay, by `replay.weight`: it can't be 0.

    Source:
        FPF and k-FPF, Zhao et al. 2023 (ICML), arXiv 2304.04158, section 4: forgetting prioritised finetuning.

    Differs from the source:
        The paper trains without replay between two finetunings; here the plan of the events stands, with
        `replay.per_event = 0` it is the paper's. Change is watched per step, decayed by `decay`, not per task.
    """

    class Options(Planner.Options):
        kind: Literal["k_fpf"] = "k_fpf"
        every: int = Stop(25, ge=0, description="steps from one finetuning to the next; 0: at signals alone")
        on: tuple[str, ...] = Stop((), description="signals that bring a finetuning too, such as drift or boundary")
        passes: int = Stop(1, ge=1, le=1000, description="of the memory, in one finetuning (count)")
        draw: int = Stop(32, ge=1, description="rows in each pass (count)")
        modules: tuple[str, ...] = Stop(
            (), description="beginnings of parameters that move; none: those that moved most"
        )
        share: float = Stop(0.3, gt=0, le=1, description="of the parameter tensors, that count as moving most")
        decay: float = Stop(0.99, ge=0, lt=1, description="of the change that is watched, per step")

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        if context.config.replay.retention == "none" or not context.config.replay.weight:
            raise PluginError(f"plugins: {self.kind}: there is nothing to replay; set replay.retention and weight")
        names = list(context.engine.dense.params)
        for wanted in self.options.modules:
            if wanted != "table" and not any(f".{wanted}" in f".{name}" for name in names):
                raise PluginError(
                    f"plugins: {self.kind}: no parameter begins with {wanted!r}; there are {', '.join(names)}"
                )
        self.steps = self.last = self.tunings = 0
        self.moved = np.zeros(len(names))
        self.flat: Tensor | None = None

    @property
    def chosen(self) -> tuple[str, ...]:
        """Parameters that a finetuning moves."""
        if self.options.modules:
            return self.options.modules
        names = list(self.context.engine.dense.params)
        count = max(1, round(self.options.share * len(names)))
        order = np.argsort(-self.moved, kind="stable")[:count]
        return tuple(names[place] for place in sorted(order.tolist()))

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        called = any(signal.kind in self.options.on for signal in signals)
        if plan.skip or not (called or (self.options.every and self.steps - self.last >= self.options.every)):
            return plan
        end = Plan(self.options.passes, self.options.draw, live=False, trainable=self.chosen)
        return replace(plan, then=end if plan.then is None else replace(plan.then, then=end))

    def before(self, step: Step) -> None:
        if step.plan.live and not self.options.modules:
            self.flat = self.context.engine.dense.flat.clone()

    def after(self, step: Step) -> None:
        self.steps = step.number + 1
        if not step.plan.live:
            self.tunings += self.last != self.steps - 1  # passes in a row are one finetuning
            self.last = self.steps
        elif self.flat is not None:
            self.moved = self.options.decay * self.moved + self._changes(self.flat)
            self.flat = None

    def _changes(self, before: Tensor) -> Floats:
        """(number of parameters,) how far each went, by its size."""
        dense = self.context.engine.dense
        parts = ((dense.part(before, name), param.detach()) for name, param in dense.params.items())
        return np.array([float((new - old).norm() / (old.norm() + 1e-12)) for old, new in parts])

    def read(self) -> dict[str, float]:
        return {"finetunings": float(self.tunings)}

    def state_dict(self) -> State:
        return {"steps": self.steps, "last": self.last, "tunings": self.tunings, "moved": self.moved.copy()}

    def load_state_dict(self, state: State) -> None:
        self.steps, self.last, self.tunings = (int(state.get(name, 0)) for name in ("steps", "last", "tunings"))
        same = bool(state) and len(state["moved"]) == len(self.moved)
        self.moved = np.array(state["moved"]) if same else np.zeros_like(self.moved)


PRESETS: dict[str, dict[str, Any]] = {
    "view_batch": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "spaced"}]},
    "replay_scheduling": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "schedule"}]},
    "k_fpf": {"replay": {"retention": "reservoir"}, "plugins": [{"kind": "k_fpf"}]},
}
