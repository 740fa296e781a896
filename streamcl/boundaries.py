"""Who says that one part of the stream has ended and another begun: an id, a clock, a detector, surprise, a new label.

A method that does something "at the end of a task" listens for the signal `boundary` and never asks who sent it, so it
runs alike with and without ids. Each source is a small monitor: `update` takes an outcome, in the order of learning and
before it is learned from, and returns the signals that it raises. All of them judge what was served.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from streamcl.config import Config
from streamcl.drift import DriftDetector
from streamcl.metrics import Prequential
from streamcl.metrics.window import Window
from streamcl.protocols import State, Stateful
from streamcl.records import Outcome, Signal
from streamcl.signalling import (
    AnyBoundary,
    ClockBoundary,
    DetectorBoundary,
    NewClass,
    SegmentBoundary,
    SurpriseBoundary,
)

Loss = Callable[[Outcome], float]


class Source(Stateful, Protocol):
    """One source of signals."""

    def update(self, outcome: Outcome) -> tuple[Signal, ...]: ...


class Segments:
    """Sends a signal at the first outcome of another segment than the current one.

    The first segment of all is no boundary; an event without a segment changes nothing. Labels come late, so outcomes
    of two segments may take turns: one whose event is older than the first event seen of the current segment is a
    straggler of an earlier one, and no boundary. A segment that comes back later is one.
    """

    def __init__(self, config: SegmentBoundary) -> None:
        self._config = config
        self._current = ""
        self._since_s = -math.inf  # event time of the first outcome of the current segment

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        ticket = outcome.ticket
        if ticket.segment in ("", self._current) or ticket.time_s < self._since_s:
            return ()
        first = not self._current
        self._current, self._since_s = ticket.segment, ticket.time_s
        return () if first else (Signal(self._config.signal, self._config.source, ticket.origin),)

    def state_dict(self) -> State:
        return {"current": self._current, "since_s": self._since_s}

    def load_state_dict(self, state: State) -> None:
        self._current, self._since_s = str(state["current"]), float(state["since_s"])


class Clock:
    """Sends a signal every `every_events` outcomes, or at the first outcome at least `every_s` behind the last signal.

    Time is the event's own; the first outcome starts the clock. Events that come out of order neither ring it twice nor
    set it back, and a gap of several periods is one signal.
    """

    def __init__(self, config: ClockBoundary) -> None:
        self._config = config
        self._outcomes = 0  # since the last signal
        self._due_s: float | None = None

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        if not (self._counted() if self._config.every_events else self._timed(outcome.ticket.time_s)):
            return ()
        return (Signal(self._config.signal, self._config.source, outcome.ticket.origin),)

    def _counted(self) -> bool:
        self._outcomes += 1
        if self._outcomes < (self._config.every_events or 0):
            return False
        self._outcomes = 0
        return True

    def _timed(self, time_s: float) -> bool:
        first, due = self._due_s is None, self._due_s is None or time_s >= self._due_s
        if due:
            self._due_s = time_s + (self._config.every_s or 0.0)
        return due and not first

    def state_dict(self) -> State:
        return {"outcomes": self._outcomes, "due_s": self._due_s}

    def load_state_dict(self, state: State) -> None:
        self._outcomes, self._due_s = int(state["outcomes"]), state["due_s"]


class Detected:
    """Sends the alarms of a drift detector (see `DriftDetector`) under another name: a boundary that nobody marked."""

    def __init__(self, config: DetectorBoundary, loss: Loss) -> None:
        self._config = config
        self._loss = loss
        self._detector = DriftDetector(config.drift, config.source)

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        alarms = self._detector.update(self._loss(outcome), outcome.ticket.origin)
        return tuple(Signal(self._config.signal, alarm.source, alarm.origin) for alarm in alarms)

    def state_dict(self) -> State:
        return self._detector.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._detector.load_state_dict(state)


class Surprise:
    """Sends a signal when a loss is above mean + gamma x deviation of the `window` losses before it.

    Single losses are noisy: on a stream whose labels are, say, clicks, every rare label is a surprise. Where the mean
    loss is what matters use a detector. Nothing is sent before the window is full. One loss costs O(window).

    Source:
        EM-LLM, Fountas et al. 2024, arXiv 2407.09450: -log p of a token above mu + gamma sigma of the last
        tau of them.

    Differs from the source:
        The loss of a label instead of a token's; a refractory period instead of a refinement of the boundaries
        afterwards, which a stream has no time for. A loss that is not finite is passed over.
    """

    def __init__(self, config: SurpriseBoundary, loss: Loss) -> None:
        self._config = config
        self._loss = loss
        self._window = Window(config.window, 1)
        self._quiet = 0  # outcomes until it may speak

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        loss = self._loss(outcome)
        if not math.isfinite(loss):
            return ()
        before = self._window.columns()[0]
        self._window.append((loss,))
        if self._quiet:
            self._quiet -= 1
            return ()
        if len(before) < self._config.window or loss <= before.mean() + self._config.gamma * before.std():
            return ()
        self._quiet = self._config.refractory_events
        return (Signal(self._config.signal, self._config.source, outcome.ticket.origin),)

    def state_dict(self) -> State:
        return {"window": self._window.state_dict(), "quiet": self._quiet}

    def load_state_dict(self, state: State) -> None:
        self._window.load_state_dict(state["window"])
        self._quiet = int(state["quiet"])


class NewClasses:
    """Sends a signal when a label comes for the first time; the very first one too, for no class is known before.

    Args:
        classes: of the task (count); what it remembers is a bit for each.
    """

    def __init__(self, config: NewClass, classes: int) -> None:
        self._config = config
        self._seen = np.zeros(classes, np.bool_)

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        label = int(outcome.label)
        if self._seen[label]:
            return ()
        self._seen[label] = True
        return (Signal(self._config.signal, self._config.source, outcome.ticket.origin),)

    def state_dict(self) -> State:
        return {"seen": self._seen.copy()}

    def load_state_dict(self, state: State) -> None:
        self._seen[:] = state["seen"]


def build_boundaries(config: Config) -> dict[str, Source]:
    """The configured sources by name, in the order of the configuration; each has seen nothing yet."""
    return {station.source: _build(station, config) for station in config.boundaries}


def _build(station: AnyBoundary, config: Config) -> Source:
    if isinstance(station, SegmentBoundary):
        return Segments(station)
    if isinstance(station, ClockBoundary):
        return Clock(station)
    if isinstance(station, NewClass):
        return NewClasses(station, config.model.classes if config.task == "multiclass" else 2)
    loss = Prequential(config.task, 1, config.model.classes).loss
    return Detected(station, loss) if isinstance(station, DetectorBoundary) else Surprise(station, loss)


class Boundaries:
    """All configured sources of signals; what the worker holds.

    A snapshot that doesn't know a source, or knows it with other settings, is no obstacle: that source begins anew.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = {station.source: station.model_dump(mode="json") for station in config.boundaries}
        self._begin()

    def _begin(self) -> None:
        self.sources = build_boundaries(self._config)
        self._sent = dict.fromkeys(self.sources, 0)

    def update(self, outcome: Outcome) -> tuple[Signal, ...]:
        """The signals of one outcome, in the order of the configuration."""
        if not self.sources:
            return ()
        signals = tuple(signal for source in self.sources.values() for signal in source.update(outcome))
        for signal in signals:
            self._sent[signal.source] += 1
        return signals

    def read(self) -> dict[str, float]:
        """By place in the configuration, how many signals each has sent since it began."""
        return {f"boundary_{place}_signals": float(count) for place, count in enumerate(self._sent.values())}

    def state_dict(self) -> State:
        return {
            name: {"settings": dict(self._settings[name]), "sent": self._sent[name], "source": source.state_dict()}
            for name, source in self.sources.items()
        }

    def load_state_dict(self, state: State) -> None:
        self._begin()
        for name, source in self.sources.items():
            kept = state.get(name)
            if kept and kept["settings"] == self._settings[name]:
                source.load_state_dict(kept["source"])
                self._sent[name] = int(kept["sent"])
