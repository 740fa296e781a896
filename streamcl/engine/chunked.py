"""Work on a chunk of the stream at a time: what is promised and put off, and what is done with it in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamcl.engine.layout import ANSWER, LEARN, REFUSE, Found
from streamcl.features import FLOAT32_MAX
from streamcl.memory.owners import Owners
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.records import Encoded, Outcome, Scores

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

Arrays = NDArray[Any]

NOTHING = np.zeros((0, 0), np.float32)
UNSAID = Scores(NOTHING[0:0], NOTHING[0:0], 0)


def stacked(arrays: list[Arrays]) -> Arrays:
    """(n, K) of n (K,); often they are all one and the same."""
    n, first = len(arrays), arrays[0]
    if all(array is first for array in arrays):
        return np.tile(first, (n, 1))
    return np.concatenate(arrays).reshape(n, -1)


class Job(Struct, frozen=True, gc=False):
    """One operation: an answer that is promised, or an outcome that is to be learned."""

    kind: int
    features: Encoded
    scores: Scores
    outcome: Outcome | None = None


class Chunked:
    """Takes a learner's work, and does it when asked to; how, its kinds say.

    Args:
        learner: Its engine has the weights; nobody else changes them while work is waiting.

    Attributes:
        drawn: If it is made a list, each outcome's replayed rows are put into it, (draw,) each.
    """

    name = "fused"
    drawn: list[Arrays] | None = None
    served: Any = None  # the plug-in that chooses among weight sets, if there is one

    def __init__(self, config: Config, learner: Learner) -> None:
        self.task = config.task
        self.learner = learner
        self.engine = learner.engine
        self.jobs: list[Job] = []
        self.renewal_rule = next((r for r in learner.rules.values() if isinstance(r, ContinualBackprop)), None)

    def predict(self, batch: Sequence[Encoded]) -> Found:
        """What is said of each of a batch now."""
        raise NotImplementedError

    def _run(self, jobs: Sequence[Job]) -> list[bool]:
        """Do them, in their order; for each outcome, whether it could be learned."""
        raise NotImplementedError

    def answer(self, features: Encoded) -> Scores:
        """What will be answered: empty until the work is done."""
        scores = Scores(UNSAID.output, UNSAID.served, self.learner.version + len(self.jobs))
        self.jobs.append(Job(ANSWER, features, scores))
        return scores

    def learn(self, outcome: Outcome) -> None:
        """Learn from it when the work is done."""
        label = outcome.label
        good = abs(label) <= FLOAT32_MAX
        if self.task == "multiclass":
            good = good and 0 <= label < self.engine.outputs
        self.jobs.append(Job(LEARN if good else REFUSE, outcome.ticket.features, outcome.ticket.scores, outcome))

    def settle(self) -> list[bool]:
        """Do the work that is waiting; for each outcome, in their order, whether it could be learned."""
        jobs, self.jobs = self.jobs, []
        return self._run(jobs) if jobs else []

    def _place(self, jobs: Sequence[Job], slot: Arrays, held: Arrays, refused: set[int]) -> None:
        """Which place each outcome will have in memory: what its policy says does not hang on weights."""
        memory = self.learner.memory
        if memory.policy is None:
            return
        for i, job in enumerate(jobs):
            if job.kind == ANSWER:
                continue
            held[i], place = len(memory), None
            if job.kind == LEARN and job.outcome is not None and i not in refused:
                place = memory.policy.place(job.outcome.label)
            slot[i] = -1 if place is None else place

    def _hand_out(self, jobs: Sequence[Job], found: Found, refused: set[int]) -> None:
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

    def _recall(self, jobs: Sequence[Job], found: Found, refused: set[int]) -> None:
        for i, job in enumerate(jobs):
            if job.kind == ANSWER:
                self.learner.put_right(job.features, job.scores, found.entered[i : i + 1], found.hidden[i : i + 1])
            elif i not in refused and job.outcome is not None:
                ticket = job.outcome.ticket
                self.learner.recall.observe(ticket.scores, job.outcome.label, owner=Owners.of(ticket))

    def _own(self, jobs: Sequence[Job], slot: Arrays, refused: set[int]) -> None:
        """Whose the rows are that were written; and of whom the diagnostics have heard."""
        memory, diagnostics = self.learner.memory, self.learner.diagnostics
        learned = [i for i, job in enumerate(jobs) if job.kind == LEARN and i not in refused]
        for i in np.flatnonzero(slot >= 0).tolist():
            memory.owners.write(slot[i], Owners.of(jobs[i].outcome.ticket))  # type: ignore[union-attr]
        if diagnostics is None:
            return
        every, first = diagnostics.sample_every, diagnostics.steps - len(learned)
        sampled = diagnostics.sampled - (diagnostics.steps // every - first // every)
        for step in range(first + every - first % every, diagnostics.steps + 1, every):
            ticket = jobs[learned[step - first - 1]].outcome.ticket  # type: ignore[union-attr]
            diagnostics.owners.write(sampled % diagnostics.window, Owners.of(ticket))
            sampled += 1
