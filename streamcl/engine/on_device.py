"""A learner's work on a device, a chunk of the stream at a time: one copy there, one question back.

What a step reads hangs on no weight, so it is gathered ahead (`ahead`) and sent at once; the steps then follow one
another on the device, and the host asks only when they are done. A step whose gradient is unusable stops those behind
it: the host makes up its mind about that event, and gathers anew from there. What is seldom due (a unit made anew, a
report of the diagnostics) ends a chunk, for the host counts when; the eager engine's own code does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamcl.engine import ahead, layout
from streamcl.engine.ahead import Ahead
from streamcl.engine.chunked import Arrays, Chunked, Job, stacked
from streamcl.engine.device import CPU
from streamcl.engine.layout import ANSWER, LEARN, REFUSE, Chunk, Found
from streamcl.engine.views import norms_of, rows_of
from streamcl.memory.owners import Owners
from streamcl.plugin import Plan
from streamcl.records import Encoded

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

ROWS = 1 << 16
"""Most rows of examples that are gathered at once: with hundreds replayed for each event a chunk comes in parts."""


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration has no form here, by its path; None when all of it has."""
    if named := [str(getattr(each, "kind", each)) for each in plugins or config.plugins]:
        return f"plugins: {', '.join(named)}"
    if config.tasks:
        return f"tasks: {', '.join(config.tasks)}"
    if config.loss.kind != "task":
        return f"loss.kind: {config.loss.kind}"
    for index, rule in enumerate(config.plasticity):
        if rule.kind != "continual_backprop" or rule.exact:
            return f"plasticity.{index}: {rule.kind}{', exact' if rule.kind == 'continual_backprop' else ''}"
        if rule.utility in ("mean_corrected", "adaptable"):
            return f"plasticity.{index}.utility: {rule.utility}"
    return None


class Said(NamedTuple):
    """What the operations of a chunk have said, on the host; of one that was not done, anything."""

    output: Arrays  # (n, O)
    entered: Arrays  # (n, E), or (n, 0) where nobody asks
    hidden: Arrays  # (n, U) of all hidden layers, or (n, 0)
    norm: Arrays  # (n,) of the dense gradient
    done: int


class OnDevice(Chunked):
    """Takes a learner's work; its kinds say how a chunk of steps is computed."""

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        engine, memory = learner.engine, learner.memory
        self.draw = learner.per_event if memory.capacity else 0
        self.share = learner.replay_weight / max(learner.per_event, 1)
        self.writer = np.full(memory.capacity, -1, np.int64)
        self.looks = bool(learner.recall.stages)
        self.watches = learner.diagnostics is not None
        self.rows = 1 + self.draw
        self.most = max(min(ROWS // self.rows, 1024), 1)
        self.slots = memory.ids.shape[1]
        self.kind = np.float64 if engine.dtype == torch.float64 else np.float32

    def advance(self, a: Ahead, count: int) -> Said:
        """Do the first `count` operations that were gathered, up to the first that can't be learned."""
        raise NotImplementedError

    def predict(self, batch: Sequence[Encoded]) -> Found:
        """What is said of each of a batch now, up to a matrix product's rounding."""
        ids, weights, dense = (
            torch.from_numpy(np.concatenate(column).reshape(len(batch), -1)) for column in zip(*batch, strict=True)
        )
        self._bounded(ids.numpy())
        given = [x.to(self.engine.device) for x in (ids, weights, self.learner.read_numbers(dense))]
        output, entered, hidden = (each.cpu().numpy() for each in self.engine.look(*given))
        return self._found(len(batch), output[:, : self.engine.outputs], entered, hidden)

    def _found(self, n: int, output: Arrays, entered: Arrays, hidden: Arrays) -> Found:
        outputs = self.engine.outputs
        return Found(
            output=output.astype(np.float32),
            served=self.learner.serve(output) if n else np.zeros((0, outputs), np.float32),
            entered=entered,
            hidden=hidden,
            noted=np.zeros((0, 0, outputs), np.float32),
            drawn=np.full((n if self.drawn is not None else 0, self.draw), -1, np.int64),
            norm=np.zeros(n),
        )

    def _bounded(self, ids: Arrays) -> None:
        rows = len(self.engine.table)
        if ids.size and not (ids.min() >= 0 and ids.max() < rows):
            raise IndexError(f"features point to row {ids.min()} or {ids.max()} of a table of {rows}")

    def _run(self, jobs: Sequence[Job]) -> list[bool]:
        n, outputs, (entered, hidden) = len(jobs), self.engine.outputs, self.engine.widths
        chunk = _chunk(jobs)
        self._bounded(chunk.ids)
        empty = np.zeros((n, entered * self.looks), self.kind), np.zeros((n, hidden * self.looks), self.kind)
        found = self._found(n, np.zeros((n, outputs), np.float32), *empty)
        refused: set[int] = set()
        policy = self.learner.memory.policy
        before = policy.state_dict() if policy is not None else {}
        self._place(jobs, chunk.slot, chunk.held, refused)
        at = 0
        while at < n:
            if not self._alone(chunk, at):
                at = self._part(jobs, chunk, found, at)
                if at == n or not (chunk.kind[at] == LEARN and self._stopped):
                    continue
            if not self._by_itself(jobs[at], chunk, at):
                refused.add(at)
                if policy is not None:
                    policy.load_state_dict(before)
                    self._place(jobs, chunk.slot, chunk.held, refused)
            at += 1
        self._hand_out(jobs, found, refused)
        self._own(jobs, chunk.slot, refused)
        if self.drawn is not None:
            self.drawn += [found.drawn[i] for i, job in enumerate(jobs) if job.kind != ANSWER]
        return [i not in refused for i, job in enumerate(jobs) if job.kind != ANSWER]

    def _alone(self, chunk: Chunk, at: int) -> bool:
        """Whether an operation is none of a chunk: no label, or as yet nothing to replay."""
        kind = chunk.kind[at]
        return bool(kind == REFUSE or (kind == LEARN and self.draw and not chunk.held[at]))

    def _part(self, jobs: Sequence[Job], chunk: Chunk, found: Found, first: int) -> int:
        """As many operations as can be done in one go; returns the next."""
        stop, due = self._until(chunk, first)
        learner, norms, memory = self.learner, norms_of(self.learner), rows_of(self.learner.memory)
        a = ahead.empty(stop - first, self.rows, self.slots, learner.numbers)
        regression, one = self.task == "regression", np.ones(1, np.bool_)
        key = np.uint64(learner.memory.key)
        ahead.gather(
            *(first, stop, learner.steps, key, self.share, regression, one, chunk, norms, memory, self.writer, a)
        )
        said = self.advance(a, stop - first)
        done = first + said.done
        self._stopped = done < stop
        ahead.write(first, done, stop, chunk, memory, self.writer)
        if self._stopped:
            numbers = learner.numbers
            back = a.before[said.done]
            norms = norms._replace(
                **{name: back[i, :numbers] for i, name in enumerate(("count", "mean", "m2"))},
                **{name: back[i, numbers:] for i, name in enumerate(("y_count", "y_mean", "y_m2"))},
            )
        self._take_over(norms, a, said)
        self._tell(found, first, a, said)
        if due and not self._stopped:
            self._due()
        return done

    def _until(self, chunk: Chunk, first: int) -> tuple[int, bool]:
        """Where the operations from `first` on have to stop, and whether something is due then."""
        end = min(len(chunk.kind), first + self.most)
        stop = next((n for n in range(first, end) if self._alone(chunk, n)), end)
        learn = [n for n in range(first, stop) if chunk.kind[n] == LEARN]
        rule, diagnostics, steps = self.renewal_rule, self.learner.diagnostics, len(learn) + 1
        if rule is not None and any(rule.rates):
            steps = rule.due_within(steps)
        if diagnostics is not None:
            steps = min(steps, diagnostics.report_every - diagnostics.steps % diagnostics.report_every)
        return (learn[steps - 1] + 1, True) if steps <= len(learn) else (stop, False)

    def _take_over(self, norms: layout.Norms, a: Ahead, said: Said) -> None:
        """What the host counts of it."""
        learner, rule, diagnostics = self.learner, self.renewal_rule, self.learner.diagnostics
        learned = np.flatnonzero(a.kind[: said.done] == LEARN)
        for mine, theirs in ((learner.numerics, norms[:3]), (learner.target, norms[5:])):
            mine.count, mine.mean, mine.m2 = (each.copy() for each in theirs)
        learner.steps += len(learned)
        learner.version += len(learned)
        if rule is not None and any(rule.rates):
            rule.pass_by(len(learned))
        if diagnostics is not None:
            for i in learned:
                diagnostics.steps += 1
                if diagnostics.steps % diagnostics.sample_every == 0:
                    row = np.concatenate((said.hidden[i], said.norm[i : i + 1]))
                    diagnostics.ring[diagnostics.sampled % diagnostics.window] = torch.from_numpy(row)
                    diagnostics.sampled += 1
            diagnostics.look_ahead()
        if self.engine.watch and len(learned):
            self.engine.watch(torch.from_numpy(np.unique(a.touched[learned])))

    def _tell(self, found: Found, first: int, a: Ahead, said: Said) -> None:
        """What was answered."""
        done, here = said.done, slice(first, first + said.done)
        found.output[here] = said.output[:done]
        if self.task == "regression":
            count, mean, m2 = (a.before[:done, i, -1:] for i in range(3))
            variance = m2 / np.maximum(count, 1.0)
            deviation = np.where(variance > 0.0, np.sqrt(variance), 1.0)
            found.served[here] = mean + found.output[here].astype(np.float64) * deviation
        elif done:
            found.served[here] = self.learner.serve(found.output[here])
        if self.looks:
            last = self.engine.widths[1]
            found.entered[here] = said.entered[:done]
            found.hidden[here] = said.hidden[:done, said.hidden.shape[1] - last :]
        if self.drawn is not None:
            found.drawn[here] = a.drawn[:done]

    def _due(self) -> None:
        """Units to be made anew, and then a report."""
        rule, diagnostics = self.renewal_rule, self.learner.diagnostics
        if rule is not None and any(rule.rates):
            rule.replace_due()
        if diagnostics is not None and diagnostics.steps % diagnostics.report_every == 0:
            diagnostics.report = diagnostics.reckon()

    def _by_itself(self, job: Job, chunk: Chunk, at: int) -> bool:
        """Learn from one outcome without replay, by the eager engine; False if it can't be learned."""
        learner, outcome = self.learner, job.outcome
        if job.kind == REFUSE or outcome is None:
            return False
        before = learner.numerics.state_dict(), learner.target.state_dict()
        learner.numerics.update(job.features.dense[: learner.numbers])
        if self.task == "regression":
            learner.target.update(np.array([outcome.label], np.float32))
        step = learner.step_of(outcome, Plan(draw=0), 0)
        if step is None or not self.engine.step(step):
            learner.numerics.load_state_dict(before[0])
            learner.target.load_state_dict(before[1])
            return False
        learner.steps += 1
        learner.version += 1
        if learner.diagnostics is not None:
            learner.diagnostics.observe(self.engine.gradient_norm, Owners.of(outcome.ticket))
        ahead.write(at, at + 1, at + 1, chunk, rows_of(learner.memory), self.writer)
        return True


def sent(array: Arrays, device: torch.device) -> Tensor:
    """A copy on the device, from memory that it can read while the host goes on."""
    tensor = torch.from_numpy(array)
    return tensor if device == CPU else tensor.pin_memory().to(device, non_blocking=True)


def _chunk(jobs: Sequence[Job]) -> Chunk:
    n = len(jobs)
    ids, weights, dense = (stacked([job.features[i] for job in jobs]) for i in range(3))
    kind = np.array([job.kind for job in jobs], np.int8)
    label, time_s, weight = np.zeros(n, np.float32), np.zeros(n), np.ones(n)
    for i, job in enumerate(jobs):
        if job.outcome is not None:
            label[i] = job.outcome.label if job.kind == LEARN else np.nan
            time_s[i], weight[i] = job.outcome.ticket.time_s, job.outcome.ticket.weight
    none, zeros, no = np.zeros((0, 0, 0), np.float32), np.zeros(n, np.int64), np.zeros(n, np.bool_)
    told = label, weight, np.zeros(n), zeros - 1, none, no, no, zeros, zeros - 1
    return Chunk(kind, ids, weights, dense, time_s, *told)
