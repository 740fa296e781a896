"""Metrics of the tasks beside the first, each of what was served of it, over the events whose label is known."""

from __future__ import annotations

import math
from collections.abc import Iterable

from streamcl.metrics.prequential import Prequential
from streamcl.protocols import State
from streamcl.records import TASK, Outcome
from streamcl.stations import HALF_LIFE


class TaskMetrics:
    """By name; each is what `Prequential` is to the first. A ticket without a score of a task is left out."""

    def __init__(self, names: Iterable[str], window: int, half_life: float = HALF_LIFE) -> None:
        self.by_name = {name: Prequential("binary", window, 2, half_life) for name in sorted(names)}

    def update(self, outcomes: Iterable[Outcome]) -> None:
        told = [(outcome.beside(len(self.by_name)), outcome.ticket.scores.notes) for outcome in outcomes]
        for at, (name, metrics) in enumerate(self.by_name.items()):
            pairs = [(labels[at], notes.get(f"{TASK}{name}")) for labels, notes in told]
            known = [(y, served) for y, served in pairs if served is not None and not math.isnan(y)]
            metrics.add([y for y, _ in known], [served for _, served in known])

    def read(self) -> dict[str, float]:
        """Under `task_NAME.`"""
        told = ((name, metrics.read()) for name, metrics in self.by_name.items())
        return {f"task_{name}.{what}": value for name, values in told for what, value in values.items()}

    def state_dict(self) -> State:
        return {name: metrics.state_dict() for name, metrics in self.by_name.items()}

    def load_state_dict(self, state: State) -> None:
        for name, metrics in self.by_name.items():
            metrics.load_state_dict(state[name])
