"""Watches the loss of what was served, and says when it has risen for good.

A detector of River does the watching (Bifet and Gavaldà 2007, ADWIN, doi 10.1137/1.9781611972771.42; Page 1954,
doi 10.1093/biomet/41.1-2.100). Both see a change of either sign; a falling loss is a model that learns, so only
a rise is an alarm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from river import drift as river_drift

from streamcl import stations
from streamcl.protocols import State
from streamcl.records import Origin, Signal

_river: Any = river_drift  # typed only in parts
_VERSION = version("river")

_log = logging.getLogger(__name__)


class Adwin:
    """River's ADWIN with the direction of a change.

    Differs from the source: River starts an empty window after a change, the paper keeps its newer part.
    """

    def __init__(self, delta: float | None) -> None:
        self._adwin = _river.ADWIN() if delta is None else _river.ADWIN(delta=delta)

    def update(self, loss: float) -> int:
        """1 when the mean has risen, -1 when it has fallen, else 0."""
        adwin = self._adwin
        if adwin._drift_detected:  # as ADWIN.update does, whose properties would take longer than its work
            adwin._reset()
        window = adwin._helper
        total, width = window.get_total(), window.get_width()
        adwin._drift_detected = changed = window.update(loss)
        if not changed:
            return 0
        dropped = width + 1 - adwin.width
        return 1 if self._adwin.estimation > (total + loss - self._adwin.total) / dropped else -1

    @property
    def mean(self) -> float:
        return float(self._adwin.estimation)

    def state_dict(self) -> State:
        window = np.frombuffer(self._adwin._helper.__getstate__(), dtype=np.uint8).copy()
        return {"window": window, "detected": self._adwin.drift_detected}

    def load_state_dict(self, state: State) -> None:
        self._adwin._helper.__setstate__(np.asarray(state["window"], dtype=np.uint8).tobytes())
        self._adwin._drift_detected = bool(state["detected"])


class PageHinkley:
    """River's two-sided Page-Hinkley test with the direction of a change.

    Two-sided although only rises are alarms: it compares with the mean of everything since the last change, so it must
    start anew after a fall too, or a later rise would hide below the old, high mean.
    """

    def __init__(self, delta: float | None, threshold: float) -> None:
        settings = {"threshold": threshold} | ({} if delta is None else {"delta": delta})
        self._test = _river.PageHinkley(**settings)

    def update(self, loss: float) -> int:
        """1 when the mean has risen, -1 when it has fallen, else 0."""
        self._test.update(loss)
        if not self._test.drift_detected:
            return 0
        return 1 if self._test._sum_increase - self._test._min_increase > self._test.threshold else -1

    @property
    def mean(self) -> float:
        return float(self._test._x_mean.get())

    def state_dict(self) -> State:
        t = self._test
        sums = [t._sum_increase, t._sum_decrease, t._min_increase, t._max_decrease]  # may hold an infinity
        return {
            "sums": np.array([t._x_mean.n, t._x_mean._mean, *sums], dtype=np.float64),
            "detected": t.drift_detected,
        }

    def load_state_dict(self, state: State) -> None:
        t = self._test
        count, mean, *sums = (float(value) for value in state["sums"])
        t._x_mean.n, t._x_mean._mean = count, mean
        t._sum_increase, t._sum_decrease, t._min_increase, t._max_decrease = sums
        t._drift_detected = bool(state["detected"])


class DriftDetector:
    """Turns a rise of the mean loss into a `drift` signal, at most one per refractory period.

    Args:
        name: `source` of the signals.

    Six streams each, 100,000 stable losses and then a rise. Bernoulli .20 to .35: ADWIN never false, 191 to 415
    examples late; Page-Hinkley 2 to 4 false. Log-loss of calibrated scores: ADWIN never false, 95 to 383 late;
    Page-Hinkley 5 to 10 false, so set its threshold for the stream. Both take the loss as it is and expect it to be of
    order 1: on squared errors of order 1e-4 both are deaf, on those of order 1e4 or with heavy tails ADWIN is false
    1 to 5 and about 35 times. For regression, choose the label's unit accordingly.

    A restored detector continues bit for bit. What River holds is saved as bytes that only the same version of River
    reads: under another version the detector starts afresh, says so once, and counts it in `drift_restarts`.
    """

    def __init__(self, config: stations.Drift, name: str = "loss") -> None:
        self._config = config
        self._name = name
        self._detector = _detector(config)
        self._examples = 0
        self._last_alarm: int | None = None  # in examples
        self._counts = {"alarms": 0, "suppressed": 0, "improvements": 0, "restarts": 0}

    def update(self, loss: float, origin: Origin) -> tuple[Signal, ...]:
        """One signal when the mean loss has risen, else (). A loss that is not finite is passed over."""
        return (self.signal(origin),) if self.watch((loss,)) else ()

    def signal(self, origin: Origin) -> Signal:
        """What is sent of a rise at an outcome."""
        return Signal("drift", self._name, origin)

    def watch(self, losses: Sequence[float]) -> list[int]:
        """Take losses one after another; at which of them there is a signal."""
        if self._detector is None:
            return []
        found, update = [], self._detector.update
        for at, loss in enumerate(losses):
            if math.isfinite(loss):
                self._examples += 1
                if (direction := update(loss)) and self._raises(direction):
                    found.append(at)
        return found

    def _raises(self, direction: int) -> bool:
        """Count a change."""
        if direction < 0:
            self._counts["improvements"] += 1
            return False
        if self._refractory():
            self._counts["suppressed"] += 1
            return False
        self._counts["alarms"] += 1
        self._last_alarm = self._examples
        return True

    def _refractory(self) -> bool:
        if self._last_alarm is None:
            return False
        return self._examples - self._last_alarm <= self._config.refractory_events

    def read(self) -> dict[str, float]:
        """`drift_` counts since the start, and the mean loss since the last change; empty for detector "none"."""
        if self._detector is None:
            return {}
        counts = {f"drift_{name}": float(count) for name, count in self._counts.items()}
        return counts | {"drift_mean_loss": self._detector.mean}

    def state_dict(self) -> State:
        return {
            "river": _VERSION,
            "detector": None if self._detector is None else self._detector.state_dict(),
            "examples": self._examples,
            "last_alarm": self._last_alarm,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: State) -> None:
        self._examples = int(state["examples"])
        self._last_alarm = state["last_alarm"]
        self._counts = dict(state["counts"])
        self._detector = _detector(self._config)
        if self._detector is None:
            return
        if state["river"] == _VERSION:
            self._detector.load_state_dict(state["detector"])
            return
        self._counts["restarts"] += 1
        _log.warning(
            "drift detector %s starts afresh: it was saved by River %s, this is River %s",
            self._name, state["river"], _VERSION,
        )  # fmt: skip


def _detector(config: stations.Drift) -> Adwin | PageHinkley | None:
    if config.detector == "adwin":
        return Adwin(config.delta)
    if config.detector == "page_hinkley":
        return PageHinkley(config.delta, config.threshold)
    return None
