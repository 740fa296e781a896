"""What a sample of the labelled events says: how far features have moved, and what frozen weights would have served.

Beside the worker, never part of its state: both compare with what stood when this process began to run the shard, so a
restart begins the comparison anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.features import Layout
from streamcl.learner import Learner
from streamcl.metrics import Examples, Prequential
from streamcl.metrics.examples import rows
from streamcl.protocols import State
from streamcl.records import Encoded, Outcome, Turn
from streamcl.verdicts import Verdicts
from streamcl.worker import Worker

log = logging.getLogger(__name__)

MOST_FEATURES = 64
ROWS = 1024
"""Of the sample that features are compared with, and of that which they are compared by."""
LABELS = 1000
"""Sampled labels behind the figures of live and frozen weights."""
FIRST = 1000
"""Sampled labels before those: first steps are no harm, and labels that come late begin with positives alone."""
BATCH = 512
MOST_BYTES = 256 << 20
"""Of a state that is copied in order to be frozen."""
_CODES = 16
_FEWEST = 128


class FeatureDrift:
    """Population stability index of each feature: of its last `ROWS` sampled values against the first.

    Numbers are cut at the deciles of the first values, categories are hashed into 16 codes; of a bag its first item
    stands for all. Each share is taken with half a count more, so that an empty cell costs little. Without any drift
    the index is about (cells - 1) x (1 / n + 1 / m): .03 for 16 codes and full samples.

    Args:
        layout: The first `MOST_FEATURES` of its fields and numerics are watched.

    Source:
        Yurdakul 2018, Statistical Properties of Population Stability Index, Western Michigan University, chapter 2.
    """

    def __init__(self, layout: Layout) -> None:
        fields, numerics = layout.fields[:MOST_FEATURES], layout.numerics
        self.names = (*fields, *numerics)[:MOST_FEATURES]
        self._slots = np.array([int(np.argmax(layout.slot_field == f)) for f in range(len(fields))], np.int64)
        self._missing = layout.slot_base[self._slots]
        self._numbers = len(self.names) - len(fields)
        self._first = np.full((ROWS, len(self.names)), np.nan)
        self._last = np.full((ROWS, len(self.names)), np.nan)
        self._taken = 0

    def add(self, batch: Sequence[Encoded]) -> None:
        ids = np.array([features.ids for features in batch])[:, self._slots]
        codes = np.where(ids != self._missing, ids % _CODES, np.nan)
        rows = np.concatenate((codes, np.array([features.dense[: self._numbers] for features in batch])), 1)
        for row in rows:
            (self._first if self._taken < ROWS else self._last)[self._taken % ROWS] = row
            self._taken += 1

    def read(self) -> dict[str, float]:
        """PSI once both samples have enough rows; the missing ratio of the last there are."""
        first, last = self._first[: self._taken], self._last[: max(0, self._taken - ROWS)]
        if len(newest := last if len(last) else first) < _FEWEST:
            return {}
        told = dict(zip(self.names, np.isnan(newest).mean(0).tolist(), strict=True))
        said = {f"feature:{name}:missing_ratio": share for name, share in told.items()}
        if len(last) >= _FEWEST:
            categories = len(self._slots)
            for at, name in enumerate(self.names):
                index = psi(first[:, at], last[:, at], None if at < categories else 10)
                said |= {} if index is None else {f"feature:{name}:psi": index}
        return said


def psi(first: NDArray[np.float64], last: NDArray[np.float64], cells: int | None) -> float | None:
    """Of two samples, NaN left out; None where one is empty. `cells`: None, they hold codes below 16."""
    first, last = first[~np.isnan(first)], last[~np.isnan(last)]
    if not len(first) or not len(last):
        return None
    if cells is None:
        codes, cells = [each.astype(np.int64) for each in (first, last)], _CODES
    else:
        edges = np.unique(np.quantile(first, np.arange(1, cells) / cells))
        codes, cells = [np.searchsorted(edges, each) for each in (first, last)], len(edges) + 1
    counts = [np.bincount(each, minlength=cells) + 0.5 for each in codes]
    p, q = (each / each.sum() for each in counts)
    return float(((q - p) * np.log(q / p)).sum())


class Frozen:
    """The weights that a process began with, asked about the same events as the live ones, and never taught.

    Of a fresh start they are untrained: what has to be beaten is a constant.
    """

    def __init__(self, config: Config, state: State) -> None:
        self.learner = Learner(config)
        self.learner.load_state_dict(state)
        self.metrics = {
            weights: Prequential(config.task, LABELS, config.model.classes) for weights in ("live", "frozen")
        }

    def add(self, outcomes: Sequence[Outcome]) -> None:
        told = Examples.of(outcomes)
        frozen = [scores.served for scores in self.learner.predict_many([each.features for each in told.tickets])]
        self.metrics["frozen"].add(told.labels, rows(frozen), told.weights)
        self.metrics["live"].add(told.labels, told.served, told.weights)

    def read(self) -> dict[str, float]:
        """Nothing before there are enough labels."""
        if self.metrics["live"].read()["examples"] < FIRST + LABELS:
            return {}
        return {
            f"sampled:{weights}:{name.removesuffix('_window')}": value
            for weights, metrics in self.metrics.items()
            for name, value in metrics.read().items()
            if name.endswith("_window")
        }


class Sampled:
    """One labelled event in `telemetry.sample_every`, by its number in the order of labels.

    They are looked at `BATCH` at a time, or at a reading: a pass of the model costs more than the events in it.
    """

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.every = config.telemetry.sample_every
        self.verdicts = Verdicts(config)
        self.features = FeatureDrift(worker.decoder.featurizer.layout)
        self.frozen: Frozen | None = None
        if self.every and config.telemetry.frozen and isinstance(worker.learner, Learner):
            state = worker.learner.state_dict()
            if (size := _bytes(state)) <= MOST_BYTES:
                self.frozen = Frozen(config, state)
            else:
                log.info("no frozen baseline: a state of %d bytes is not copied (%d at most)", size, MOST_BYTES)
        self._passed = 0
        self._waiting: list[Outcome] = []

    def add(self, turn: Turn) -> None:
        if not self.every:
            return
        self._waiting += turn.outcomes[-self._passed % self.every :: self.every]
        self._passed += len(turn.outcomes)
        if len(self._waiting) >= BATCH:
            self._look()

    def _look(self) -> None:
        some, self._waiting = self._waiting, []
        self.features.add([outcome.ticket.features for outcome in some])
        if self.frozen and (counted := self.verdicts.counted(some)):
            self.frozen.add(counted)

    def read(self) -> dict[str, float]:
        if self._waiting:
            self._look()
        return self.features.read() | (self.frozen.read() if self.frozen else {})


def _bytes(state: object) -> int:
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes, state))
    return int(getattr(state, "nbytes", 0))
