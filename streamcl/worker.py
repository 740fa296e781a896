"""START HERE: the loop. Poll, log the order, then record by record: decode, predict, join, learn, answer.

State is a pure function of (config, seed, the ordered sequence of records): no clock, no poll boundary, no thread
enters it. The loop is a generator of turns: checkpoints, metrics, progress bars and tests watch it from outside.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import orjson
from msgspec.structs import replace

from streamcl import connect
from streamcl.boundaries import Boundaries
from streamcl.commands import command_of
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.delta import Deltas
from streamcl.drift import DriftDetector
from streamcl.gate import Gate
from streamcl.group.ranks import Ranks
from streamcl.group.rounds import Rounds
from streamcl.join import Joiner
from streamcl.learner import Learner
from streamcl.lineage import Lineage
from streamcl.metrics import Examples, Lists, Prequential, Slices, TaskMetrics
from streamcl.metrics.examples import rows
from streamcl.outlets import Outlets
from streamcl.past import past_of
from streamcl.progress import Counts, Due, Pace, Progress, Work
from streamcl.protocols import (
    BadInput,
    Codecs,
    ConnectorError,
    ControlLog,
    Source,
    State,
    Stateful,
    StreamclError,
)
from streamcl.records import (
    COMMANDS,
    Closed,
    DeadLetter,
    Event,
    Fate,
    Forgotten,
    Learned,
    Order,
    Outcome,
    Position,
    Prediction,
    Record,
    Run,
    Signal,
    Stream,
    Ticket,
    Turn,
)
from streamcl.river_learner import RiverLearner
from streamcl.verdicts import Verdicts

STRIDE, ASKED_STRIDE = 512, 32
"""Records that are taken at once where the learner's engine works on a chunk of them: some milliseconds, or a tenth."""

RANK_POLL_S = 0.02
"""A rank of a group waits no longer for a record: it may be the one that the others wait for."""


class Worker:
    """One shard's journey from records to predictions.

    What remembers is found, not listed: every attribute with `state_dict` and `load_state_dict` is part of the state.

    Args:
        source: Stands where it was sought to; `run` begins there.
        control: The control log, needed when the source has several streams and for exactly-once delivery; already
            open. None: the order that the source gives is repeatable by itself (one stream, or recorded files).
        outlets: None for a backtest that only wants metrics.
        ranks: The group that it learns with, in rounds (see `streamcl.group.rounds`). None, or one: it is alone.

    Raises:
        ConnectorError: from `run`; the turn under way is lost, and recovery takes it up again.
        StreamclError: from `run`, when more than `worker.max_bad_ratio` of the last 1,000 records were bad.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        codecs: Codecs,
        outlets: Outlets | None = None,
        control: ControlLog | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.outlets = outlets or Outlets(config, codecs.predictions)
        self.control = control
        self.control_offset = 0
        self.poll_timeout_s = config.worker.poll_timeout_s
        self.stopping = False
        self.caught_up = False
        self.gate = Gate()
        self.rest: Sequence[Record] = ()  # polled, and behind the end of a round
        self.recent_faults: deque[bool] = deque(maxlen=1000)

        self.decoder = Decoder(config, codecs.events, codecs.labels)
        self.past = past_of(config, self.decoder.featurizer)
        self.counts = Counts()
        self.progress = Progress()
        self.pace = Pace()
        self.outlets.answers = self.progress.published
        self.joiner = Joiner(config.join, self.counts)
        self.learner = RiverLearner(config) if config.river else Learner(config)
        judge = config.task, config.metrics.window, config.model.classes, config.metrics.half_life
        self.metrics = Prequential(*judge)
        self.task_metrics = TaskMetrics(config.tasks, judge[1], judge[3]) if config.tasks else None
        self.slices, self.lists = Slices(config), Lists(config)
        # Of what would have been served without the error memory.
        self.base_metrics = Prequential(*judge) if config.error_memory else None
        self.drift = DriftDetector(config.drift)
        self.boundaries = Boundaries(config)
        self.verdicts = Verdicts(config)
        self.lineage = Lineage()
        self.tells = config.outcomes_url is not None  # of what it has learned
        known = self.learner if config.deltas.url and isinstance(self.learner, Learner) else None
        self.deltas = Deltas(config, known) if known else None
        meets = ranks is not None and ranks.world > 1 and config.group.merge != "none"
        known = self.learner if meets and isinstance(self.learner, Learner) else None
        self.rounds = Rounds(config, known, self.past, ranks) if ranks and known else None
        # Whoever works on a chunk at a time is told what to do first, and asked for all of it then.
        self.fused = self.learner.fused if isinstance(self.learner, Learner) else None
        # With an endpoint of its own a worker lets others look at the state more often.
        self.stride = (ASKED_STRIDE if config.serve.in_worker else STRIDE) if self.fused else 1

    def run(self) -> Iterator[Turn]:
        """Yields a turn per poll, an empty one when nothing came; ends when stopped or when the source is exhausted."""
        if self.control:
            yield from self.rerun(logged(self.control, self.control_offset))
        self.caught_up = not self._stops()
        while self.caught_up and not self._over():
            self.pace.stages.clear()
            began = time.perf_counter()
            records = self.rest or self.source.poll(self.config.worker.max_records, self._patience())
            self.pace.took("poll", began)
            turn = self._commit(records) if self.config.exactly_once else self._log(records)
            self._meet()
            yield turn

    def _patience(self) -> float:
        """How long a poll may wait (s)."""
        return min(self.poll_timeout_s, RANK_POLL_S) if self.rounds else self.poll_timeout_s

    def _stops(self) -> bool:
        """A rank of a group leaves at a meeting, where all do."""
        return self.rounds.left if self.rounds else self.stopping

    def _over(self) -> bool:
        return self.rounds.over if self.rounds else self.stopping or self.source.exhausted()

    def _log(self, records: Sequence[Record]) -> Turn:
        """At least once: the order is a fact before anything comes of it; in a group, before anything of it leaves."""
        if not self.rounds and self.control and records:
            self._append(self._order(records))
        turn = self.turn(records)
        if self.rounds:  # only now is it known where it has ended
            self._append(self._order(records[: turn.records], self._closes(turn)))
        began = time.perf_counter()
        self.outlets.send(turn)
        self.outlets.send_deltas(turn)
        self.pace.took("send", began)
        return turn

    def _append(self, order: Order) -> None:
        began = time.perf_counter()
        if self.control and (order.runs or order.closes):
            self.control_offset = self.control.append(order)
        self.pace.took("log", began)

    def _commit(self, records: Sequence[Record]) -> Turn:
        """Exactly once: the order and the answers become facts together."""
        turn = self.turn(records)
        order = self._order(records[: turn.records], self._closes(turn))
        began = time.perf_counter()
        self.outlets.send_dead_letters(turn)
        if self.control and (order.runs or order.closes):
            self.control_offset = self.control.append(order, self.outlets.published(turn))
        self.outlets.send_deltas(turn)
        self.pace.took("send", began)
        return turn

    def _closes(self, turn: Turn) -> Closed | None:
        """How the round of the group ends behind this turn, if it does."""
        if not self.rounds:
            return None
        done = not self.rest and not (turn.records and any(self.source.lag().values()))
        return self.rounds.ends(done, not self.rest and self.source.exhausted(), self.stopping)

    def _meet(self) -> None:
        """At the end of a round, which is a fact: so whoever sees what comes of it can repeat it."""
        began = time.perf_counter()
        if self.rounds and self.rounds.closing:
            self.rounds.meet(self.progress, self.gate, self.stopping)
            self.pace.took("meet", began)

    def rerun(self, orders: Iterable[tuple[int, Order]]) -> Iterator[Turn]:
        """Take records in a logged order: recovery, and the backtest of a log with several inputs."""
        for next_offset, order in orders:
            self.pace.stages.clear()
            # One order is one turn: a snapshot lies between two orders, never inside one.
            if order.leap is not None:
                self.progress.leap(self.source.seek(order.position))
            self.lineage.heed(order, self)
            if order.closes and not self.rounds:
                raise StreamclError(
                    f"the control log says that at {order.position} this shard met the others of its group: run it"
                    " under torchrun, with as many ranks, until it has stopped cleanly"
                )
            records = [record for stream, length in order.runs for record in self._exactly(stream, length)]
            self.control_offset = next_offset
            turn = self.turn(records, recovering=True)
            # Exactly once: the answers are out already, in the order's transaction. Dead letters may not be.
            self.outlets.send_dead_letters(turn) if self.config.exactly_once else self.outlets.send(turn)
            self.outlets.send_deltas(turn)
            if self.rounds:
                self.rounds.closing = order.closes
                self._meet()
            yield turn
            wrong = {s: o for s, o in order.position.items() if self.progress.position.get(s) != o}
            if wrong:
                raise ConnectorError(f"the control log leads to {wrong}, the inputs to {self.progress.position}")
            if self._stops():
                return

    def turn(self, records: Sequence[Record], recovering: bool = False) -> Turn:
        """Work through some records; the cut into turns never changes a state or a prediction."""
        before, work = Counter(self.counts), Work()
        began, inside = time.perf_counter(), self.pace.stages.get("engine", 0.0)
        self.joiner.settle = partial(self._settle, work)
        taken, ends = 0, False
        while taken < len(records) and not ends:
            with self.gate:  # in between others may look at the state
                for record in records[taken : taken + self.stride]:
                    self._take(record, work)
                    taken += 1
                    if self.deltas and self.deltas.due(self.progress):
                        self._settle(work)
                        work.deltas.append(self.deltas.cut(self.progress))
                    if self.rounds and self.rounds.took(self.joiner.watermark.value) and not recovering:
                        ends = True  # the round's, and the turn's with it
                        break
                self._settle(work)
        self.rest = records[taken:]
        if taken:
            self.pace.newest_s = records[taken - 1].time_s
        self.pace.took("work", began + self.pace.stages.get("engine", 0.0) - inside)
        return Turn(
            records=taken,
            position=dict(self.progress.position),
            predictions=tuple(work.predictions),
            outcomes=tuple(work.outcomes),
            learned=tuple(work.learned),
            dead_letters=tuple(work.dead_letters),
            signals=tuple(work.signals),
            deltas=tuple(work.deltas),
            forgotten=tuple(work.forgotten),
            counts=self.counts - before,
            recovering=recovering,
        )

    def _take(self, record: Record, work: Work) -> None:
        work.history = self.progress.bootstrapping()
        stream = record.origin.stream
        self.progress.advance(stream, record.origin.offset)
        if stream.input == COMMANDS:
            self._obey(record, work)
            return
        try:
            item = self.decoder.decode(record)
        except BadInput as error:
            self._refuse(record, error.reason, str(error), work)
            return
        self.recent_faults.append(False)
        for outcome in self.joiner.advance(stream, item.time_s):
            self._learn(outcome, work)
        if isinstance(item, Event) and self.joiner.knows(item.id):
            self._refuse(record, "duplicate_ticket", f"event id of {record.origin} is known already", work)
            return
        joined = self._answer(item, work) if isinstance(item, Event) else self.joiner.label(item)
        if joined:
            self._learn(joined, work)

    def _obey(self, record: Record, work: Work) -> None:
        """No event time passes: a stream of commands, which is idle for months, must not hold the watermark."""
        try:
            command = command_of(record, self.config.events.max_bytes)
        except BadInput as error:
            self._refuse(record, error.reason, str(error), work)
            return
        self.recent_faults.append(False)
        self._settle(work)
        restated = self.learner.restated(command.who)
        rows = self.joiner.forget(command.who, restated) | self.learner.forget(command.who)
        rows |= {"past": self.past.forget(command.who)} if self.past else {}
        rows |= self.slices.forget(command.who) | self.lists.forget(command.who)
        self.counts["forget_requests"] += 1
        self.counts["forgotten_rows"] += sum(rows.values())
        work.forgotten.append(Forgotten(command.id, record.origin, command.time_s, rows))

    def _answer(self, event: Event, work: Work) -> Outcome | None:
        if self.past:
            event = replace(event, features=self.past.complete(event.features, event.time_s))
            self.past.saw(event.features, event.time_s, event.key)
        features, scores = self.learner.answer(event)
        work.predictions.append(Prediction(event.id, event.key, event.time_s, scores, event.origin))
        self.counts["predicted"] += 1
        told = event.segment, event.key, event.weight, event.traits
        ticket = Ticket(event.id, event.time_s, features, scores, event.origin, *told)
        if event.label is not None:
            self.counts["inline"] += 1
            return Outcome(ticket, event.label, Fate.INLINE, 0.0, event.also)
        if self.config.labels is None:
            self.counts["unlabelled"] += 1
            return None
        return self.joiner.add(ticket)

    def _learn(self, outcome: Outcome, work: Work) -> None:
        if self.past and self.verdicts.counts(outcome):  # of all negatives, drawn or not: a rate is the stream's
            self.past.heard(outcome)
        judged = self.verdicts.of(outcome)
        if judged is None:
            self.counts["not_drawn"] += 1
            return
        due = Due(judged, self.progress.records, work.history, self.verdicts.teaches(outcome))
        if self.rounds:
            self.rounds.learned += due.teaches
        if self.fused:
            if due.teaches:
                self.fused.learn(judged)
            work.due.append(due)
            return
        signals = self._watch([judged], work)
        if due.teaches:
            self._conclude([due], [self.learner.learn(judged, signals)], work)

    def _settle(self, work: Work) -> None:
        """Let the learner do what it has put off; then everything is as if it had been done record by record."""
        if not self.fused:
            return
        began = time.perf_counter()
        learned = self.fused.settle()
        self.pace.took("engine", began)
        due, work.due = work.due, []
        if due:
            self._watch([each.outcome for each in due], work)
            self._conclude([each for each in due if each.teaches], learned, work)

    def _watch(self, outcomes: Sequence[Outcome], work: Work) -> Sequence[Signal]:
        work.outcomes += outcomes
        outcomes = self.verdicts.counted(outcomes)
        risen, signals = self.drift.watch(self.measure(outcomes)), []
        if risen or self.boundaries.sources:
            for at, outcome in enumerate(outcomes):
                signals += [self.drift.signal(outcome.ticket.origin)] if at in risen else []
                signals += self.boundaries.update(outcome)
        work.signals += signals
        return signals

    def measure(self, outcomes: Sequence[Outcome]) -> Sequence[float]:
        """Enter them in all metrics; their losses."""
        if not outcomes:
            return ()
        examples = Examples.of(outcomes)
        labels, weights = examples.labels, examples.weights
        losses = self.metrics.add(labels, examples.served, weights)
        scored = examples.scored(losses)
        self.slices.update(scored)
        self.lists.update(scored)
        if self.task_metrics:
            self.task_metrics.update(outcomes)
        if self.base_metrics:
            self.base_metrics.add(labels, rows([ticket.scores.base for ticket in examples.tickets]), weights)
        return losses

    def _conclude(self, due: Sequence[Due], learned: Sequence[bool], work: Work) -> None:
        if not all(learned):
            work.dead_letters += [_quarantined(d.outcome) for d, taken in zip(due, learned, strict=True) if not taken]
            self.counts["quarantined"] += learned.count(False)
            due = [each for each, taken in zip(due, learned, strict=True) if taken]
        if due:
            first = self.progress.outcomes + 1
            self.progress.learn([each.outcome.ticket.origin for each in due])
            self.counts["learned"] += len(due)
            if self.tells:
                work.learned += [_learned(n, each) for n, each in enumerate(due, first) if not each.history]

    def _refuse(self, record: Record, reason: str, error: str, work: Work) -> None:
        self._settle(work)  # dead letters stand in the order of what they are of
        self.counts["dead_letter"] += 1
        work.dead_letters.append(DeadLetter(record, reason, error))
        self.recent_faults.append(True)
        bad, limit = sum(self.recent_faults), self.config.worker.max_bad_ratio
        if len(self.recent_faults) == self.recent_faults.maxlen and bad > limit * len(self.recent_faults):
            raise StreamclError(
                f"{bad} of the last {len(self.recent_faults)} records were bad (worker.max_bad_ratio {limit}); "
                f"the last one: topic {record.topic}, {record.origin}: {reason}: {error}"
            )

    def _order(self, records: Sequence[Record], closes: Closed | None = None) -> Order:
        groups = itertools.groupby(record.origin.stream for record in records)
        after: Position = {record.origin.stream: record.origin.offset + 1 for record in records}
        runs = tuple(Run(stream, len(list(g))) for stream, g in groups)
        return Order(runs, {**self.progress.position, **after}, closes=closes)

    def _exactly(self, stream: Stream, count: int) -> Iterator[Record]:
        idle_s = 0.0
        while count:
            records = self.source.poll(count, self.config.worker.poll_timeout_s, only=stream)
            count -= len(records)
            idle_s = 0.0 if records else idle_s + self.config.worker.poll_timeout_s
            if not records and (idle_s > 60.0 or self.source.exhausted()):
                raise ConnectorError(f"{stream.input} partition {stream.partition}: {count} logged records are missing")
            yield from records

    def stop(self) -> None:
        """End `run` after the turn under way. Safe to call from a signal handler."""
        self.stopping = True

    def flush(self) -> None:
        """Return once everything sent is durable."""
        self.outlets.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as closing:  # what fails to close keeps none of the others open
            for part in (self.source, self.control, self.outlets):
                if part:
                    closing.callback(part.close)

    def parts(self) -> dict[str, Stateful]:
        """Everything that remembers, by name."""
        return {name: part for name, part in sorted(vars(self).items()) if isinstance(part, Stateful)}

    def state_dict(self) -> State:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: State) -> None:
        parts = self.parts()
        # They come and go with the error memory, which may be configured after a clean stop.
        state = {"base_metrics": self.base_metrics.state_dict()} | state if self.base_metrics else state
        state = {name: part for name, part in state.items() if name in parts or name not in ("base_metrics", "deltas")}
        state = {"deltas": {}} | state if self.deltas else state  # without: they begin here
        unknown: State = {"boundaries": {}, "lineage": {}, "slices": {}, "lists": {}}
        state = unknown | state  # so do those that a snapshot doesn't know
        state = {"past": {}} | state if self.past else state
        # A shard may go on in a group, or alone.
        state = {"rounds": {}} | state if self.rounds else {k: part for k, part in state.items() if k != "rounds"}
        if parts.keys() != state.keys():
            raise StreamclError(f"the snapshot holds {sorted(state)}, this worker {sorted(parts)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def readings(self) -> dict[str, float]:
        """What the parts say about themselves, for telemetry and people. Never part of the state."""
        judges = self.metrics, self.slices, self.lists, self.drift, self.boundaries
        readers = (*judges, self.joiner, self.learner, *filter(None, [self.past]))
        merged = {name: value for part in readers for name, value in part.read().items()}
        out = self.outlets
        connectors = {"sink": out.predictions, "outcomes_sink": out.outcomes, "source": self.source}
        told = {  # by those connectors that have it to tell
            f"{kind}_{name}": float(getattr(part, name))
            for kind, part in connectors.items()
            for name in TOLD_BY_CONNECTORS
            if hasattr(part, name)
        }
        told |= out.deltas.read() if out.deltas else {}
        base = self.base_metrics.read() if self.base_metrics else {}
        merged |= {f"base_{name}": value for name, value in base.items()}
        merged |= self.task_metrics.read() if self.task_metrics else {}
        merged |= self.rounds.read() if self.rounds else {}
        return merged | told | {"lag_records": float(sum(self.source.lag().values()))}


TOLD_BY_CONNECTORS = (
    *("inflight_records", "inflight_bytes", "rebuilds", "rejections"),
    *("retries", "commit_failures", "away"),
)
"""Attributes of a source or a sink that are readings too, under `source_`, `sink_` or `outcomes_sink_`."""


def _quarantined(outcome: Outcome) -> DeadLetter:
    ticket = outcome.ticket
    stub = orjson.dumps({"id": ticket.id, "label": outcome.label})
    error = "learning from this label would have made the weights non-finite or the gradient too large"
    return DeadLetter(Record(ticket.origin, ticket.origin.input, ticket.time_s, stub), "quarantined_label", error)


def _learned(number: int, due: Due) -> Learned:
    outcome, ticket = due.outcome, due.outcome.ticket
    told = (ticket.id, ticket.origin, ticket.features, outcome.label, outcome.fate, ticket.time_s, outcome.delay_s)
    return Learned(number, due.records, *told)


def logged(control: ControlLog, start: int) -> Iterator[tuple[int, Order]]:
    """The orders of a control log from `start` on, less the void ones (see `Order.leap`)."""
    leaps, kept, end, before = [], Counter[int](), start, start
    for end, order in control.read(start):
        leaps += [] if order.leap is None else [(order.leap, end)]
        kept.update(() if order.was is None else (order.was.offset,))
    for at, order in control.read(start):
        if at <= end and not any(since < at < leap for since, leap in leaps):
            yield at, replace(order, keep=kept[before]) if before in kept else order
            before = at


def build(config: Config, ranks: Ranks | None = None) -> Worker:
    """A worker on the configured URLs, its control log not yet opened; see `recovery` for where it starts.

    Raises:
        ConnectorError: nothing of it is left open.
    """
    codecs = connect.codecs(config)
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(contextlib.closing(connect.open_source(config)))
        outlets = opened.enter_context(contextlib.closing(Outlets.open(config, codecs.predictions)))
        control = connect.open_control(config) if keeps_order(config, source.streams()) else None
        worker = Worker(config, source, codecs, outlets, control, ranks)
        opened.pop_all()
        return worker


def keeps_order(config: Config, streams: Sequence[Stream]) -> bool:
    """Whether a shard has a control log: for the order of its inputs, for its answers, or for the fence alone.

    A single stream has an order by itself; but where shards may move, the log keeps the former holder out.
    """
    moves = config.shard.count > 1 or config.shard.assignment == "group"
    return len(streams) > 1 or config.exactly_once or moves
