"""The fused engine: a learner's work in compiled code, a chunk of the stream at a time, one example after another.

It holds no state. Weights, optimiser slots, replayed rows and running means lie where the eager engine has them, seen
through views, so either engine may go on where the other has stopped. What is seldom due (a unit made anew, a report
of the diagnostics) ends the compiled loop, is done by the eager engine's own code, and the loop goes on behind it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamcl.engine import field_rows, layout
from streamcl.engine.chunked import UNSAID, Chunked, Job, stacked
from streamcl.engine.layout import ANSWER, LEARN
from streamcl.engine.scan import scan
from streamcl.engine.views import (
    NO_ROWS,
    SETS,
    Arrays,
    average_of,
    net_of,
    norms_of,
    plan_of,
    powers_of,
    renewal_of,
    rows_of,
    scratch_of,
    serving_of,
    watch_of,
)
from streamcl.engine.weights import Average
from streamcl.features import ID
from streamcl.records import Encoded

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

log = logging.getLogger(__name__)

COMPILED = frozenset(("logistic", "fm", "mlp", "deepfm", "dcnv2"))
"""Kinds of models."""

_loaded: set[str] = set()
"""Of which numbers this process has the machine code."""


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration has no compiled form, by its path; None when all of it has."""
    if config.river is not None:
        return f"river: {config.river}"
    if config.tasks:
        return f"tasks: {', '.join(config.tasks)}"
    others = [_kind(each) for each in (*config.plugins, *plugins) if each in plugins or not _averages(each)]
    if others:
        return "plugins: " + ", ".join(others)
    if len(config.plugins) > len({_kind(each) for each in config.plugins}):
        return "plugins: two of one kind"
    if config.model.kind not in COMPILED:
        return f"model.kind: {config.model.kind}"
    if config.model.layer_norm and config.model.deep:
        return "model.layer_norm"
    for index, rule in enumerate(config.plasticity):
        if rule.kind != "continual_backprop" or rule.exact:
            return f"plasticity.{index}: {rule.kind}{', exact' if rule.kind == 'continual_backprop' else ''}"
    if setting := field_rows.said(config):
        return setting
    if config.loss.kind in ("dfm", "es_dfm"):
        return f"loss.kind: {config.loss.kind}"
    if config.loss.kind == "reloop" and config.error_memory:
        return "loss.kind: reloop, on what an error memory has put right"
    return None


def _kind(plugin: object) -> str:
    return str(getattr(plugin, "kind", plugin))


def _averages(station: Any) -> bool:
    """Whether it has a compiled form: an average of the weights, and whether that or the live ones answer."""
    return _kind(station) == "ema" or (_kind(station) == "served" and set(station.sets) <= SETS.keys())


class Fused(Chunked):
    """Takes a learner's work, and does it when asked to.

    `predict` may be called by several threads while nothing is learned; it is to the bit what `answer` promises under
    the same weights, whatever else is asked at once.

    Errors:
        IndexError from `settle` and `predict`: features that point outside the table.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        self.powers = powers_of(self.renewal_rule)
        plugins: dict[str, Any] = {plugin.kind: plugin for plugin in learner.plugins.values()}  # see `obstacle`
        self.average: Average | None = plugins["ema"].average if "ema" in plugins else None
        self.served = plugins.get("served")
        self.plan = plan_of(config, learner)
        self.net = net_of(learner.engine)
        self.scratch = scratch_of(self.plan, 1 + self.plan.draw, self.engine.numbers, self.net)
        self._asked = threading.local()
        self._prepare()

    def _prepare(self) -> None:
        """Have the machine code at hand before the first event comes."""
        kind = str(self.net.flat.dtype)
        if kind in _loaded:
            return
        began = time.monotonic()
        log.info("loading the fused engine; on a machine's first start it is compiled, which takes half a minute")
        slots = len(self.plan.slot_field)
        nothing = np.zeros(slots, np.int64), np.zeros(slots, np.float32), np.zeros(self.engine.numbers, np.float32)
        self.predict([Encoded(*nothing)])
        _loaded.add(kind)
        log.info("the fused engine is ready after %.1f s", time.monotonic() - began)

    def predict(self, batch: Sequence[Encoded]) -> layout.Found:
        """What is said of each of a batch now."""
        scratch = getattr(self._asked, "scratch", None)
        if scratch is None:
            scratch = self._asked.scratch = scratch_of(self.plan, 1, self.engine.numbers, self.net)
        jobs = [Job(ANSWER, features, UNSAID) for features in batch]
        found, chunk, norms, rows = (
            self._found(jobs),
            self._chunk(jobs),
            norms_of(self.learner),
            rows_of(self.learner.memory),
        )
        nobody, nothing = renewal_of(None, self.plan, self.powers), watch_of(None, self.plan)
        around = nobody, average_of(self.average, self.net), serving_of(self.served), nothing, NO_ROWS, scratch
        scan(0, 0, chunk, found, self.net, self.plan, norms, rows, *around)
        return found

    def _run(self, jobs: Sequence[Job]) -> list[bool]:
        chunk, found = self._chunk(jobs), self._found(jobs)
        refused: set[int] = set()
        policy = self.learner.memory.policy
        before = policy.state_dict() if policy is not None else {}
        self._place(jobs, chunk.slot, chunk.held, refused)
        norms, rows, watch = (
            norms_of(self.learner),
            rows_of(self.learner.memory),
            watch_of(self.learner.diagnostics, self.plan),
        )
        renewal = renewal_of(self.renewal_rule, self.plan, self.powers)
        average, serving = average_of(self.average, self.net), serving_of(self.served)
        tables = self.engine.tables
        most = len(self.scratch.touched) + (len(tables.moved) if tables else 0)
        moved = np.empty(len(jobs) * most, np.int64) if self.engine.watch else NO_ROWS
        plan = self.plan._replace(largest=float(self.engine.max_grad_norm))
        n = 0
        while n < len(jobs):
            first, steps = n, self.learner.steps
            around = renewal, average, serving, watch, moved, self.scratch
            n, why, logged = scan(n, steps, chunk, found, self.net, plan, norms, rows, *around)
            if why == layout.REFUSED:
                refused.add(n - 1)
            taken = [i for i in range(first, n) if jobs[i].kind != ANSWER and i not in refused]
            self._take_over(norms, renewal, watch, len(taken))
            if self.average is not None:
                self.average.step = int(average.step[0])
            if self.served is not None:
                self.served.losses = serving.losses.copy()
            if self.engine.watch and logged:
                self.engine.watch(torch.from_numpy(moved[:logged].copy()))
            if why == layout.REFUSED and policy is not None:
                policy.load_state_dict(before)
                self._place(jobs, chunk.slot, chunk.held, refused)
            if why == layout.DUE:
                renewal = self._due(watch)
        self._hand_out(jobs, found, refused)
        self._own(jobs, chunk.slot, refused)
        if self.drawn is not None:
            self.drawn += [found.drawn[i] for i, job in enumerate(jobs) if job.kind != ANSWER]
        return [i not in refused for i, job in enumerate(jobs) if job.kind != ANSWER]

    def _chunk(self, jobs: Sequence[Job]) -> layout.Chunk:
        n = len(jobs)
        ids = np.concatenate([job.features.ids for job in jobs]).reshape(n, -1)
        weights, dense = stacked([job.features.weights for job in jobs]), stacked([job.features.dense for job in jobs])
        lowest = -ID if self.engine.tables else 0
        if ids.size and not (ids.min() >= lowest and ids.max() < len(self.net.table)):
            raise IndexError(f"features point to row {ids.min()} or {ids.max()} of a table of {len(self.net.table)}")
        label, served, time_s, weight = np.zeros(n, np.float32), np.zeros(n), np.zeros(n), np.ones(n)
        source = np.full(n, -1, np.int64)
        asks = self.plan.alpha or self.served is not None  # of what was said
        promised = {id(job.scores): i for i, job in enumerate(jobs) if job.kind == ANSWER} if asks else {}
        noted, known = self._nothing_noted(n), np.zeros(n, np.bool_)
        for i, job in enumerate(jobs):
            if job.outcome is not None:
                label[i] = job.outcome.label if job.kind == LEARN else np.nan
                time_s[i] = job.outcome.ticket.time_s
                weight[i] = job.outcome.ticket.weight
                if asks:
                    source[i] = promised.get(id(job.scores), -1)
                    served[i] = job.scores.served[0] if source[i] < 0 else np.nan
                if self.served is not None and source[i] < 0:
                    said = job.scores.notes.get("served")
                    known[i] = said is not None and len(said) == noted.shape[1]
                    noted[i] = said if known[i] else 0.0
        kinds = np.array([job.kind for job in jobs], np.int8)
        again = np.array([False, *(a.features is b.features for a, b in itertools.pairwise(jobs))], np.bool_)
        zeros = np.zeros(n, np.int64)
        told = label, weight, served, source, noted, known, again, zeros, zeros - 1
        return layout.Chunk(kinds, ids, weights, dense, time_s, *told)

    def _nothing_noted(self, n: int) -> Arrays:
        """(n, K, O), or (0, 0, O) where it is the live weights that answer."""
        sets = 0 if self.served is None else len(self.served.losses)
        return np.zeros((n if sets else 0, sets, self.plan.outputs), np.float32)

    def _found(self, jobs: Sequence[Job]) -> layout.Found:
        n, plan, dtype = len(jobs), self.plan, self.net.flat.dtype
        looks = bool(self.learner.recall.stages)
        entered, hidden = self.engine.widths if looks else (0, 0)
        return layout.Found(
            output=np.zeros((n, plan.outputs), np.float32),
            served=np.zeros((n, plan.outputs), np.float32),
            entered=np.zeros((n if looks else 0, entered), dtype),
            hidden=np.zeros((n if looks else 0, hidden), dtype),
            noted=self._nothing_noted(n),
            drawn=np.full((n if self.drawn is not None else 0, plan.draw), -1, np.int64),
            norm=np.zeros(n, dtype),
        )

    def _take_over(self, norms: layout.Norms, renewal: layout.Renewal, watch: layout.Watch, taken: int) -> None:
        """What the loop counts in arrays of its own."""
        learner, rule = self.learner, self.renewal_rule
        learner.steps += taken
        learner.version += taken
        for mine, theirs in ((learner.numerics, norms[:3]), (learner.target, norms[5:])):
            mine.count, mine.mean, mine.m2 = (each.copy() for each in theirs)
        if rule is not None and renewal.on:
            rule.catch_up(int(renewal.step[0]), [int(renewal.eligible[place]) for place in rule.taps.places])
        if learner.diagnostics is not None:
            learner.diagnostics.steps, learner.diagnostics.sampled = watch.steps.tolist()

    def _due(self, watch: layout.Watch) -> layout.Renewal:
        """Units to be made anew, and then a report."""
        if self.renewal_rule is not None and any(self.renewal_rule.rates):
            self.renewal_rule.replace_due()
        diagnostics = self.learner.diagnostics
        if diagnostics is not None and watch.steps[0] % watch.report == 0:
            diagnostics.report = diagnostics.reckon()
        return renewal_of(self.renewal_rule, self.plan, self.powers)
