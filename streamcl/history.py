"""The last hour as the status page draws it: samples of what shards have published, by the clock on the wall.

Nothing here is state of a shard: a restart begins an empty history.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamcl.readings import Reported
from streamcl.records import Turn

Floats = NDArray[np.float64]

INTERVAL_S = 2.0
SAMPLES = 1_800
"""An hour of them."""
MARKS = 100
"""Drift alarms of a shard that are kept, the newest (count)."""


class Column(NamedTuple):
    """One line: how shards come together, and the reading that it is, the first of these that is there."""

    combine: Literal["sum", "mean", "max"]
    readings: tuple[str, ...] = ()


def _windowed(prefix: str) -> Column:
    return Column("mean", (f"{prefix}log_loss_window", f"{prefix}rmse_window"))


COLUMNS = {
    "events_per_s": Column("sum"),
    "lag_records": Column("sum"),
    "lag_s": Column("max", ("lag_s",)),
    "loss": _windowed(""),
    "loss_frozen": Column("mean", ("sampled:frozen:log_loss", "sampled:frozen:rmse")),
    "loss_sampled": Column("mean", ("sampled:live:log_loss", "sampled:live:rmse")),
    "loss_constant": Column("mean", ("baseline_rmse_window",)),
    "loss_without_memory": _windowed("base_"),
    "loss_live": _windowed("live_"),
    "ne": Column("mean", ("ne_window",)),
    "auc": Column("mean", ("auc_window",)),
    "calibration": Column("mean", ("calibration_window",)),
    "dormant": Column("max"),
    "joined": Column("mean", ("join_hit_ratio",)),
}
"""What is sampled. Readings are of the recent window; a loss is log-loss, or the root mean squared error."""
_DORMANT = re.compile(r"layer_\d+_dormant_ratio")


@dataclass(slots=True)
class Facts:
    """Of a shard, since this process has it. Times are those of `History.now`."""

    records: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    alarms: int = 0
    alarm_times: deque[float] = field(default_factory=lambda: deque(maxlen=MARKS))
    saved_at: float | None = None
    saved_bytes: int = 0
    sampled_records: int = 0


class History:
    """A ring of samples for each shard, 230 kB. `observe`, `saved` and `left` are for the loop, the rest for one other.

    Args:
        samples: That are kept, the newest (count).

    Attributes:
        facts: By shard.
        began: When it was made (s).
    """

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.facts: dict[int, Facts] = {}
        self.began = time.time()
        self._lead_s = self.began - time.monotonic()
        self._times = np.full(samples, np.nan)
        self._rows: dict[int, Floats] = {}
        self._taken = 0

    def now(self) -> float:
        """Seconds since 1970, by the clock on the wall when this was made; it never jumps or goes back."""
        return self._lead_s + time.monotonic()

    def observe(self, shard: int, turn: Turn) -> None:
        facts = self._of(shard)
        facts.records += turn.records
        for letter in turn.dead_letters:
            facts.dead_letters[letter.reason] += 1
        for signal in turn.signals:
            if signal.kind == "drift":
                facts.alarms += 1
                facts.alarm_times.append(self.now())

    def saved(self, shard: int, size_bytes: int) -> None:
        facts = self._of(shard)
        facts.saved_at, facts.saved_bytes = self.now(), size_bytes

    def left(self, shard: int) -> None:
        self.facts.pop(shard, None)

    def _of(self, shard: int) -> Facts:
        return self.facts.get(shard) or self.facts.setdefault(shard, Facts())

    def sample(self, now: float, told: Mapping[int, Reported]) -> None:
        """Take in what each shard has said last; `now` is later than the time before."""
        place, before = self._taken % self.samples, self._times[self._taken % self.samples - 1]
        for shard in self._rows.keys() - told.keys():
            del self._rows[shard]
        self._times[place] = now
        self._taken += 1
        for shard, reported in told.items():
            if shard not in self._rows:
                self._rows[shard] = np.full((self.samples, len(COLUMNS)), np.nan)
            facts = self._of(shard)
            values = _values(reported)
            values["events_per_s"] = (facts.records - facts.sampled_records) / (now - before)
            facts.sampled_records = facts.records
            self._rows[shard][place] = [values.get(name, math.nan) for name in COLUMNS]

    def _order(self) -> NDArray[np.int64]:
        """Places of the rows that there are, the oldest first."""
        return np.arange(max(0, self._taken - self.samples), self._taken) % self.samples

    def series(self, shards: Iterable[int], since: float = -math.inf) -> dict[str, Floats]:
        """`time` and every column, (n,) each, of the samples after `since`; NaN where nothing was known."""
        order = self._order()
        order = order[self._times[order] > since]
        rows = [self._rows[shard][order] for shard in shards if shard in self._rows]
        stacked = np.stack(rows) if rows else np.full((1, len(order), len(COLUMNS)), np.nan)
        made = {"time": self._times[order]}
        for at, (name, column) in enumerate(COLUMNS.items()):
            made[name] = _combined(column.combine, stacked[:, :, at])
        return made


def _values(reported: Reported) -> dict[str, float]:
    readings = reported.readings
    found = {
        name: next((readings[r] for r in column.readings if r in readings), None) for name, column in COLUMNS.items()
    }
    values = {name: value for name, value in found.items() if value is not None}
    if values.get("ne") and "log_loss_window" in readings:
        values["loss_constant"] = readings["log_loss_window"] / values["ne"]  # the entropy of the base rate
    dormant = [value for name, value in readings.items() if _DORMANT.fullmatch(name)]
    return values | ({"dormant": max(dormant)} if dormant else {}) | {"lag_records": sum(reported.lag.values())}


def _combined(how: str, values: Floats) -> Floats:
    """(shards, n) to (n,); what is NaN counts for nothing."""
    there = ~np.isnan(values)
    if how == "max":
        made = np.where(there, values, -np.inf).max(axis=0)
    else:
        made = np.where(there, values, 0.0).sum(axis=0) / (np.maximum(there.sum(axis=0), 1) if how == "mean" else 1)
    return np.where(there.any(axis=0), made, np.nan)
