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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl.engine import layout
from streamcl.engine.dense import Dense
from streamcl.engine.kernels import KINDS
from streamcl.engine.layout import ANSWER, LEARN, REFUSE
from streamcl.engine.scan import scan
from streamcl.engine.weights import Average
from streamcl.features import FLOAT32_MAX, RunningNorm
from streamcl.memory.owners import Owners
from streamcl.models import FM, MODELS, DCNv2, DeepFM, Logistic
from streamcl.models.tower import MLP
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.records import Encoded, Outcome, Scores

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

log = logging.getLogger(__name__)

TASKS = {"binary": layout.BINARY, "multiclass": layout.MULTICLASS, "regression": layout.REGRESSION}
NOTHING = np.zeros((0, 0), np.float32)
NO_ROWS = np.zeros(0, np.int64)
POWERS = 4096
SETS = {"live": 0, "ema": 1}
UNSAID = Scores(NOTHING[0:0], NOTHING[0:0], 0)

Arrays = NDArray[Any]

_loaded: set[str] = set()
"""Of which numbers this process has the machine code."""


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration has no compiled form, by its path; None when all of it has."""
    if config.river is not None:
        return f"river: {config.river}"
    others = [_kind(each) for each in (*config.plugins, *plugins) if each in plugins or not _averages(each)]
    if others:
        return "plugins: " + ", ".join(others)
    if len(config.plugins) > len({_kind(each) for each in config.plugins}):
        return "plugins: two of one kind"
    if config.model.kind not in MODELS:
        return f"model.kind: {config.model.kind}"
    if config.model.layer_norm and config.model.deep:
        return "model.layer_norm"
    for index, rule in enumerate(config.plasticity):
        if rule.kind != "continual_backprop" or rule.exact:
            return f"plasticity.{index}: {rule.kind}{', exact' if rule.kind == 'continual_backprop' else ''}"
    if config.loss.kind == "reloop" and config.error_memory:
        return "loss.kind: reloop, on what an error memory has put right"
    return None


def _kind(plugin: object) -> str:
    return str(getattr(plugin, "kind", plugin))


def _averages(station: Any) -> bool:
    """Whether it has a compiled form: an average of the weights, and whether that or the live ones answer."""
    return _kind(station) == "ema" or (_kind(station) == "served" and set(station.sets) <= SETS.keys())


def engine_of(config: Config) -> tuple[str, str]:
    """The engine that a configuration comes to, and what stands in the way of the fused one where that was open."""
    if config.river is not None:
        return "river", ""
    because = obstacle(config) or ""
    return ("eager" if because or config.worker.engine == "eager" else "fused"), because


class Job(NamedTuple):
    """One operation: an answer that is promised, or an outcome that is to be learned."""

    kind: int
    features: Encoded
    scores: Scores
    outcome: Outcome | None = None


class Fused:
    """Takes a learner's work, and does it when asked to.

    `predict` may be called by several threads while nothing is learned; it is to the bit what `answer` promises under
    the same weights, whatever else is asked at once.

    Args:
        learner: Its engine has the weights; nobody else changes them while work is waiting.

    Attributes:
        drawn: If it is made a list, each outcome's replayed rows are put into it, (draw,) each.

    Errors:
        IndexError from `settle` and `predict`: features that point outside the table.
    """

    drawn: list[Arrays] | None = None

    def __init__(self, config: Config, learner: Learner) -> None:
        self.learner = learner
        self.engine = learner.engine
        self.jobs: list[Job] = []
        self.renewal_rule = next((r for r in learner.rules.values() if isinstance(r, ContinualBackprop)), None)
        self.powers = _powers(self.renewal_rule)
        plugins: dict[str, Any] = {plugin.kind: plugin for plugin in learner.plugins.values()}  # see `obstacle`
        self.average: Average | None = plugins["ema"].average if "ema" in plugins else None
        self.served = plugins.get("served")
        self.plan = self._plan(config)
        self.net = self._net()
        self.scratch = _scratch(self.plan, 1 + self.plan.draw, self.engine.numbers, self.net)
        self._asked = threading.local()
        self._prepare()

    def _plan(self, config: Config) -> layout.Plan:
        engine, model = self.engine, self.engine.model
        dense, dtype = engine.dense, engine.dense.flat.numpy().dtype
        rate = config.optimizer.learning_rate
        rates = [[r, config.optimizer.l1, config.optimizer.l2] for r in (rate, engine.row_rate)]
        linear = model if isinstance(model, Logistic) else getattr(model, "linear", None)
        paired = isinstance(model, FM | DeepFM)
        projected = isinstance(model, FM | DeepFM) and model.pairs is not None
        at = {name: span.start for name, span in dense.spans.items()}
        layers = _layers(model.tower, "" if isinstance(model, MLP) else "deep.", dense)
        crosses = range(len(model.cross)) if isinstance(model, DCNv2) else ()
        memory = self.learner.memory
        return layout.Plan(
            task=TASKS[config.task],
            optimizer=KINDS[config.optimizer.kind],
            outputs=config.outputs,
            first=engine.first,
            fields=engine.fields,
            dim=engine.dim if model.embedding else 0,
            linear=-1 if linear is None else at["weight" if linear is model else "linear.weight"],
            pairs=layout.NO_PAIRS if not paired else layout.PROJECTED if projected else layout.SUMMED,
            projection=at["pairs.weight"] if projected else 0,
            crosses=np.array(
                [[at[f"cross.{i}.{part}"] for part in ("weight", "bias")] for i in crosses], np.int64
            ).reshape(-1, 2),
            layers=np.array(layers, np.int64).reshape(-1, 4),
            slot_field=engine.slot_field.numpy(),
            key=np.uint64(memory.key),
            draw=self.learner.per_event if memory.capacity else 0,
            share=self.learner.replay_weight / max(self.learner.per_event, 1),
            label_scaled=np.ones(1, np.bool_),
            alpha=engine.alpha,
            class_weights=np.array(config.loss.class_weights, np.float64),
            largest=float(engine.max_grad_norm),
            rates=np.array(rates[0], dtype),
            row_rates=np.array(rates[1], dtype),
        )

    def _net(self) -> layout.Net:
        """Views of what the engine holds."""
        dense, table = self.engine.dense, self.engine.table.numpy()
        flat = dense.flat.numpy()
        slots = [[slot.numpy().reshape(-1) for slot in each] for each in (dense.slots, self.engine.row_slots)]
        return layout.Net(flat, _three(slots[0], flat[:0]), table, table.reshape(-1), _three(slots[1], flat[:0]))

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

    def answer(self, features: Encoded) -> Scores:
        """What will be answered: empty until the work is done."""
        scores = Scores(UNSAID.output, UNSAID.served, self.learner.version + len(self.jobs))
        self.jobs.append(Job(ANSWER, features, scores))
        return scores

    def predict(self, batch: Sequence[Encoded]) -> layout.Found:
        """What is said of each of a batch now."""
        scratch = getattr(self._asked, "scratch", None)
        if scratch is None:
            scratch = self._asked.scratch = _scratch(self.plan, 1, self.engine.numbers, self.net)
        jobs = [Job(ANSWER, features, UNSAID) for features in batch]
        found, nobody = self._found(jobs), self._renewal(on=False)
        rows, watch, average, serving = self._rows(), self._watch(on=False), self._average(), self._serving()
        chunk, norms = self._chunk(jobs), self._norms()
        scan(0, 0, chunk, found, self.net, self.plan, norms, rows, nobody, average, serving, watch, NO_ROWS, scratch)
        return found

    def learn(self, outcome: Outcome) -> None:
        """Learn from it when the work is done."""
        label = outcome.label
        good = abs(label) <= FLOAT32_MAX
        if self.plan.task == layout.MULTICLASS:
            good = good and 0 <= label < self.plan.outputs
        self.jobs.append(Job(LEARN if good else REFUSE, outcome.ticket.features, outcome.ticket.scores, outcome))

    def settle(self) -> list[bool]:
        """Do the work that is waiting; for each outcome, in their order, whether it could be learned."""
        jobs, self.jobs = self.jobs, []
        return self._run(jobs) if jobs else []

    def _run(self, jobs: Sequence[Job]) -> list[bool]:
        chunk, found = self._chunk(jobs), self._found(jobs)
        refused: set[int] = set()
        policy = self.learner.memory.policy
        before = policy.state_dict() if policy is not None else {}
        self._place(jobs, chunk, refused)
        norms, renewal, watch, rows = self._norms(), self._renewal(), self._watch(), self._rows()
        average, serving = self._average(), self._serving()
        moved = np.empty(len(jobs) * len(self.scratch.touched), np.int64) if self.engine.watch else NO_ROWS
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
                self.engine.watch(torch.from_numpy(np.unique(moved[:logged])))
            if why == layout.REFUSED and policy is not None:
                policy.load_state_dict(before)
                self._place(jobs, chunk, refused)
            if why == layout.DUE:
                renewal = self._due(watch)
        self._hand_out(jobs, found, refused)
        self._own(jobs, chunk, refused)
        if self.drawn is not None:
            self.drawn += [found.drawn[i] for i, job in enumerate(jobs) if job.kind != ANSWER]
        return [i not in refused for i, job in enumerate(jobs) if job.kind != ANSWER]

    def _chunk(self, jobs: Sequence[Job]) -> layout.Chunk:
        n = len(jobs)
        ids, weights, dense = (
            np.concatenate(column).reshape(n, -1) for column in zip(*(job.features for job in jobs), strict=True)
        )
        if ids.size and not (ids.min() >= 0 and ids.max() < len(self.net.table)):
            raise IndexError(f"features point to row {ids.min()} or {ids.max()} of a table of {len(self.net.table)}")
        label, served = np.zeros(n, np.float32), np.zeros(n)
        source = np.full(n, -1, np.int64)
        asks = self.plan.alpha or self.served is not None  # of what was said
        promised = {id(job.scores): i for i, job in enumerate(jobs) if job.kind == ANSWER} if asks else {}
        noted, known = self._nothing_noted(n), np.zeros(n, np.bool_)
        for i, job in enumerate(jobs):
            if job.outcome is not None:
                label[i] = job.outcome.label if job.kind == LEARN else np.nan
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
        return layout.Chunk(kinds, ids, weights, dense, label, served, source, noted, known, again, zeros, zeros - 1)

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

    def _place(self, jobs: Sequence[Job], chunk: layout.Chunk, refused: set[int]) -> None:
        """Which place each outcome will have in memory: what its policy says does not hang on weights."""
        memory = self.learner.memory
        if memory.policy is None:
            return
        for i, job in enumerate(jobs):
            if job.kind == ANSWER:
                continue
            chunk.held[i] = len(memory)
            slot = None
            if job.kind == LEARN and job.outcome is not None and i not in refused:
                slot = memory.policy.place(job.outcome.label)
            chunk.slot[i] = -1 if slot is None else slot

    def _norms(self) -> layout.Norms:
        numerics, target = self.learner.numerics, self.learner.target
        width = len(numerics.count)
        scaled = np.ones(width, np.bool_) if numerics.scaled is None else numerics.scaled
        clip = np.broadcast_to(np.asarray(numerics.clip, np.float64), (width,)).copy()
        return layout.Norms(*_copied(numerics), clip, scaled, *_copied(target))

    def _rows(self) -> layout.Rows:
        memory = self.learner.memory
        return layout.Rows(memory.ids, memory.weights, memory.dense, memory.y)

    def _renewal(self, on: bool = True) -> layout.Renewal:
        rule = self.renewal_rule
        if not on or rule is None or not any(rule.rates):
            whole, real = np.zeros(0, np.int64), np.zeros(0)
            none = np.zeros(0, self.net.flat.dtype)
            return layout.Renewal(False, False, 0.0, 0, whole, real, whole, whole, whole, none, none, whole, real)
        levels = len(self.plan.layers) - 1
        starts, rates = np.full(levels, -1, np.int64), np.zeros(levels)
        replaced, eligible = np.zeros(levels, np.int64), np.zeros(levels, np.int64)
        for i, (place, span) in enumerate(zip(rule.taps.places, rule.spans, strict=True)):
            starts[place], rates[place] = span.start, rule.rates[i]
            replaced[place], eligible[place] = rule.replaced[i] - rule.replaced_before[i], rule.eligible_steps[i]
        return layout.Renewal(
            on=True,
            corrected=rule.utility in ("mean_corrected", "adaptable"),
            decay=rule.decay,
            maturity=rule.maturity,
            starts=starts,
            rates=rates,
            replaced=replaced,
            eligible=eligible,
            step=np.array([rule.step], np.int64),
            mean_use=rule.mean_use.numpy(),
            mean=rule.mean.numpy(),
            born=rule.born.numpy(),
            powers=self.powers,
        )

    def _average(self) -> layout.Average:
        average, net = self.average, self.net
        if average is None:
            return layout.Average(False, 0.0, np.zeros(1, np.int64), net.flat[:0], net.table[:0], NO_ROWS)
        flat, table, at = average.flat.numpy(), average.table.numpy(), average.at.numpy()
        return layout.Average(True, average.decay, np.array([average.step], np.int64), flat, table, at)

    def _serving(self) -> layout.Serving:
        if self.served is None:
            return layout.Serving(NO_ROWS, np.zeros(0), 0.0)
        options = self.served.options
        sets = np.array([SETS[name] for name in options.sets], np.int64)
        return layout.Serving(sets, self.served.losses.copy(), 0.5 ** (1.0 / options.half_life_events))

    def _watch(self, on: bool = True) -> layout.Watch:
        diagnostics = self.learner.diagnostics
        if not on or diagnostics is None:
            return layout.Watch(0, 1, np.zeros(2, np.int64), NOTHING.astype(self.net.flat.dtype))
        steps = np.array([diagnostics.steps, diagnostics.sampled], np.int64)
        return layout.Watch(diagnostics.sample_every, diagnostics.report_every, steps, diagnostics.ring.numpy())

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
        return self._renewal()

    def _hand_out(self, jobs: Sequence[Job], found: layout.Found, refused: set[int]) -> None:
        """Fill the answers that were promised; and with an error memory let it see all in the order of the stream."""
        version, recall = (
            self.learner.version - sum(job.kind != ANSWER for job in jobs) + len(refused),
            self.learner.recall,
        )
        output, served = found.output, found.served
        for i, job in enumerate(jobs):
            if job.kind != ANSWER:
                version += i not in refused
                continue
            # Copies: a ticket that waits for long must not hold the whole chunk's.
            notes = {"served": found.noted[i].copy()} if self.served is not None else {}
            job.scores.fulfil(output[i].copy(), served[i].copy(), version, notes)
        if recall.stages:
            self._recall(jobs, found, refused)

    def _recall(self, jobs: Sequence[Job], found: layout.Found, refused: set[int]) -> None:
        for i, job in enumerate(jobs):
            if job.kind == ANSWER:
                self.learner.put_right(job.features, job.scores, found.entered[i : i + 1], found.hidden[i : i + 1])
            elif i not in refused and job.outcome is not None:
                ticket = job.outcome.ticket
                self.learner.recall.observe(ticket.scores, job.outcome.label, owner=Owners.of(ticket))

    def _own(self, jobs: Sequence[Job], chunk: layout.Chunk, refused: set[int]) -> None:
        """Whose the rows are that were written; and of whom the diagnostics have heard."""
        memory, diagnostics = self.learner.memory, self.learner.diagnostics
        learned = [i for i, job in enumerate(jobs) if job.kind == LEARN and i not in refused]
        for i in np.flatnonzero(chunk.slot >= 0).tolist():
            memory.owners.write(chunk.slot[i], Owners.of(jobs[i].outcome.ticket))  # type: ignore[union-attr]
        if diagnostics is None:
            return
        every, first = diagnostics.sample_every, diagnostics.steps - len(learned)
        sampled = diagnostics.sampled - (diagnostics.steps // every - first // every)
        for step in range(first + every - first % every, diagnostics.steps + 1, every):
            ticket = jobs[learned[step - first - 1]].outcome.ticket  # type: ignore[union-attr]
            diagnostics.owners.write(sampled % diagnostics.window, Owners.of(ticket))
            sampled += 1


def _layers(tower: MLP | None, prefix: str, dense: Dense) -> list[tuple[int, int, int, int]]:
    """Inputs, units, and where weights and bias begin, of each layer."""
    if tower is None:
        return []
    names = [*(f"{prefix}hidden.{i}" for i in range(len(tower.hidden))), f"{prefix}head"]
    shapes = [dense.params[f"{name}.weight"].shape for name in names]
    starts = [[dense.spans[f"{name}.{part}"].start for part in ("weight", "bias")] for name in names]
    return [(shape[1], shape[0], w, b) for shape, (w, b) in zip(shapes, starts, strict=True)]


def _three(slots: Sequence[Arrays], like: Arrays) -> tuple[Arrays, Arrays, Arrays]:
    """Slots; for those that the optimiser hasn't `like`, from which nothing is read."""
    a, b, c = (*slots, like, like, like)[:3]
    return a, b, c


def _copied(norm: RunningNorm) -> tuple[Arrays, Arrays, Arrays]:
    return norm.count.copy(), norm.mean.copy(), norm.m2.copy()


def _powers(rule: ContinualBackprop | None) -> Arrays:
    """decay ** age of the first ages: a power takes as long as ten other operations."""
    wanted = rule is not None and rule.utility in ("mean_corrected", "adaptable")
    return np.asarray((rule.decay if rule else 0.0) ** np.arange(POWERS if wanted else 0, dtype=np.float64))


def _scratch(plan: layout.Plan, rows: int, numbers: int, net: layout.Net) -> layout.Scratch:
    """For steps of at most so many rows."""
    dtype, slots = net.flat.dtype, len(plan.slot_field)
    entering, units = plan.fields * plan.dim + numbers, plan.layers[:-1, 1].sum()
    widest = max(entering, *plan.layers[:, :2].ravel().tolist(), 1)
    buckets = 1 << (2 * rows * max(slots, 1)).bit_length()

    def zeros(*shape: int) -> Arrays:
        return np.zeros(shape, dtype)

    return layout.Scratch(
        x=zeros(rows, entering),
        dx=zeros(rows, entering),
        crossed=zeros(len(plan.crosses), rows, entering),
        factors=zeros(len(plan.crosses), rows, entering),
        turned=zeros(len(plan.crosses), rows, entering),
        own=zeros(entering),
        back=zeros(rows if len(plan.crosses) else 0, entering),
        acts=zeros(rows * units),
        deltas=zeros(rows * units),
        z=zeros(rows, plan.outputs),
        dz=zeros(rows, plan.outputs),
        total=zeros(rows, plan.dim),
        pull=zeros(rows, plan.dim),
        products=zeros(rows, plan.dim),
        y=zeros(rows),
        numbers=zeros(rows, numbers),
        place=np.zeros((rows, slots), np.int64),
        ids=np.zeros((rows, slots), np.int64),
        weights=np.zeros((rows, slots), np.float32),
        touched=np.zeros(rows * slots, np.int64),
        row_grads=zeros(rows * slots, net.table.shape[1]),
        grads=zeros(len(net.flat)),
        g=zeros(widest),
        mix=np.zeros(max(widest, rows + 3), np.int64),
        buckets=np.zeros((2, buckets), np.int64),
        stamps=np.zeros(buckets, np.int64),
        stamp=np.zeros(1, np.int64),
    )
