"""The error memory of a read replica, and the topic of outcomes that it is made of.

Contract: what a replica remembers is a pure function of the snapshot S that it serves and of the outcomes after S, up
to the number that it has come to. Key and score of each are computed under S's own weights. So late labels, several
replicas and a load balancer need no care; two replicas at the same snapshot and number remember the same, bit for bit,
whatever they served before. One thing lives longer than a snapshot: the losses by which `lambda = "auto"` is chosen
(and, by it, what the stages behind see), for they take thousands of labels to mean anything. With fixed strengths
nothing depends on how long a replica has lived.

Where reading begins. A worker numbers outcomes without a hole, and at-least-once delivery repeats some after a crash:
the topic's numbers climb by one, and now and then fall back. Let N be the number that S says. Any offset whose
predecessor has a number <= N (or that has none) is a valid start: behind it the numbers can only pass from N to N + 1,
N + 2, ... one by one, and what was seen before is a repeat and dropped. So a binary search finds a start although the
numbers are not sorted: it keeps "what stands before `low` is <= N". What retention has removed, or was not told, is a
gap: counted, and memory goes on behind it.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from streamcl import connect
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.memory import ErrorMemory
from streamcl.memory.error import Recalls
from streamcl.messages import outcome_number, outcome_of
from streamcl.protocols import BadInput, ConnectorError, Source, Unavailable
from streamcl.records import Learned, Record, Stream

log = logging.getLogger(__name__)

INPUT = "outcomes"
BATCH = 500  # records a poll
NEAR = 1000  # reading so many again costs less than another look: kafka-python decodes a whole fetch for one record
LATE = 100_000  # outcomes whose label was late that wait to be known; the first gives way
LONGEST_BACKOFF_S = 10.0
LOOK_S = 2.0  # what one look of the search waits for an answer

Numbering = Callable[[Record], int | None]


class Memory:
    """The error memory of one model, from its snapshot's outcome on.

    Prediction reads what `take` writes: whoever predicts holds `lock`, which `take` holds for a prediction at most.

    Lambda is judged by what was known when an event came, not by what is known when its label does: by then the memory
    has the labels of the same minutes, and would trust itself too much. So a second memory of the same kind takes each
    outcome only once an event of later than its label is judged. An outcome is judged once, whatever snapshots come.

    Whose an outcome is, is not told. What the worker forgets is gone from here with the snapshot that is due then.

    Args:
        config: The snapshot's own.
        number: Of the last outcome that the snapshot has learned from.

    Attributes:
        number: Of the outcome taken last.
        taken: Outcomes since the snapshot (count): the memory's age.
    """

    def __init__(self, config: Config, learner: Learner, number: int, lock: threading.Lock) -> None:
        self.config = config
        self.layout = Featurizer(config).layout
        self.learner = learner
        self.number = number
        self.lock = lock
        self.taken = 0
        self.judged = number  # the last outcome that lambda was judged by
        self._then = ErrorMemory(config, self.layout, learner.engine.widths)
        self._late: deque[tuple[float, Recalls, float]] = deque()  # for `_then`: time of the label, and the record

    def begin(self, before: Memory | None) -> None:
        """Forget what was written under other weights; lambda's losses go on."""
        if before:
            self.learner.recall.inherit(before.learner.recall)
            self.judged = max(self.judged, before.judged)
        self.learner.recall.renew(self.learner.version)
        self._then.load_state_dict(self.learner.recall.state_dict())

    def decode(self, record: Record) -> Learned:
        """Raises BadInput."""
        learned = outcome_of(record.value, self.layout)
        if not self.config.allows(learned.label):
            raise BadInput("schema", f"no label of task {self.config.task}")
        return learned

    def take(self, learned: Learned) -> None:
        """Write an outcome as if it had been predicted under these weights; nothing, if the snapshot knows it."""
        if learned.number <= self.number:
            return
        recall = self.learner.recall
        with self.lock:  # a pass under other weights than the live ones puts them in the model's place for its time
            scores = self.learner.predict(learned.features)
        while self._late and (self._late[0][0] <= learned.time_s or len(self._late) > LATE):
            self._then.write(*self._late.popleft()[1:])
        known: Recalls = ()
        if learned.number > self.judged and recall.stages:
            known = self._then.recall_again(scores.recalled, [stage.choice for stage in recall.stages])
            self.judged = learned.number
        with self.lock:
            recall.observe(scores, learned.label, known)
        self._late.append((learned.time_s + learned.delay_s, scores.recalled, learned.label))
        self.number = learned.number
        self.taken += 1


class Outcomes:
    """Reads the topic on, into the memory of the model that serves. One thread; `read` may be called from any.

    Brokers that are away cost nothing but freshness: reading backs off, and finds its place anew by the number.

    Args:
        config: The replica's; its `outcomes_url` is read.
        tail: Outcomes kept, so that a new snapshot's memory can be made without reading again (count).
        patience_s: How long a new snapshot waits for its memory, when that has to be read from the topic.
    """

    def __init__(self, url: str, config: Config, tail: int = 20_000, patience_s: float = 30.0) -> None:
        self.url = url
        kafka = config.kafka.model_copy(update={"start_at": "earliest"})
        self.config = config.of_shard(0, 1).model_copy(update={"kafka": kafka})  # its topic has one partition
        self.patience_s = patience_s
        self.memory: Memory | None = None
        self.applied = self.gaps = self.repeats = self.undecodable = self.failures = 0
        self._source: Source | None = None
        self._tail: deque[Learned] = deque()
        self._longest = tail
        self._first = -1  # what comes up to it is no repeat: reading began there
        self._since = self._newest = -1  # the tail holds what there is behind `_since`, up to `_newest`
        self._lag, self._away = 0, False
        self._row, self._retry_at = 0, 0.0  # failures in a row

    def adopt(self, memory: Memory | None) -> None:
        """Make a new model's memory, before it serves: all outcomes after its snapshot, as far as they can be had.

        None: that model has none, and nothing is read.
        """
        before, self.memory = self.memory, memory
        if memory is None:
            self.close()
            return
        memory.begin(before)
        while self._tail and self._tail[0].number <= memory.number:  # may have been forgotten since
            self._since = self._tail.popleft().number
        if before and memory.number >= self._since:
            for learned in self._tail:
                self._apply(learned)
            return
        self._restart(memory.number)
        deadline = time.monotonic() + self.patience_s
        while self.step(0.1) and not self._row and time.monotonic() < deadline:
            if not self._lag or self._away:
                break

    def step(self, timeout_s: float) -> bool:
        """Take what has come; False, at once, when there is nothing to wait for."""
        if self.memory is None or time.monotonic() < self._retry_at:
            return False
        try:
            self._source = self._source or self._open()
            for record in self._source.poll(BATCH, timeout_s):
                self._take(record)
            self._lag = sum(self._source.lag().values())
            self._away = bool(getattr(self._source, "away", False))
        except ConnectorError as error:
            self._failed(error)
            return False
        if self._row:
            log.warning("%s: outcomes arrive again", self.url)
            self._row = 0
        return True

    def close(self) -> None:
        """Read no more, and forget what was read."""
        self._restart(-1)

    def read(self) -> dict[str, float]:
        """Counts since the replica began, but `memory_age_outcomes`: since the snapshot that it serves."""
        memory = self.memory
        return {
            "outcomes_applied": float(self.applied),
            "outcomes_lag": float(self._lag),
            "outcomes_gaps": float(self.gaps),
            "outcomes_repeats": float(self.repeats),
            "outcomes_undecodable": float(self.undecodable),
            "outcomes_failures": float(self.failures),
            "outcomes_away": float(self._away or self._row > 0),
            "memory_age_outcomes": float(memory.taken if memory else 0),
        }

    def _open(self) -> Source:
        source = connect.connector(self.url).open_source({INPUT: self.url}, self.config)
        try:
            if len(source.streams()) != 1:
                raise ConnectorError(f"{self.url}: outcomes have one order: 1 partition, not {len(source.streams())}")
            [stream] = source.streams()
            start = first_after(source, stream, self._newest)
            self._first = self._newest
            source.seek({stream: start})
        except BaseException:
            source.close()
            raise
        log.info("%s: read from offset %d on, behind outcome %d", self.url, start, self._newest)
        return source

    def _take(self, record: Record) -> None:
        memory, number = self.memory, outcome_number(record)
        assert memory is not None  # noqa: S101 - `step` looks first
        if number is None:
            self._undecodable(record, "no number in its headers")
            return
        if number <= self._newest:
            self.repeats += number > self._first
            return
        known = max(self._newest, memory.number)
        if number > known + 1:
            self.gaps += 1
            log.warning("%s, %s: outcomes %d to %d are missing", self.url, record.origin, known + 1, number - 1)
        self._newest = number
        try:
            learned = memory.decode(record)
        except BadInput as error:
            self._undecodable(record, str(error))
            return
        self._tail.append(learned)
        if len(self._tail) > self._longest:
            self._since = self._tail.popleft().number
        self._apply(learned)

    def _apply(self, learned: Learned) -> None:
        assert self.memory is not None  # noqa: S101 - as above
        before = self.memory.taken
        self.memory.take(learned)
        self.applied += self.memory.taken - before

    def _undecodable(self, record: Record, error: str) -> None:
        self.undecodable += 1
        # A topic of something else has millions of them.
        if self.undecodable.bit_count() == 1:
            log.warning("%s, %s: skipped, the %d. so far: %s", self.url, record.origin, self.undecodable, error)

    def _failed(self, error: ConnectorError) -> None:
        """Read again later, from the same number. One warning for each outage."""
        log.log(logging.INFO if self._row else logging.WARNING, "%s; serving without new outcomes", error)
        self._shut()
        wait_s = min(LONGEST_BACKOFF_S, 0.1 * 2.0 ** min(self._row, 16)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        self._row, self._retry_at = self._row + 1, time.monotonic() + wait_s
        self.failures += 1

    def _restart(self, number: int) -> None:
        self._shut()
        self._tail.clear()
        self._since = self._newest = number
        self._row, self._retry_at, self._lag, self._away = 0, 0.0, 0, False

    def _shut(self) -> None:
        if self._source:
            with suppress(Exception):  # whatever it is, this source is not used again
                self._source.close()
        self._source = None


def first_after(
    source: Source, stream: Stream, number: int, number_of: Numbering = outcome_number, near: int = NEAR
) -> int:
    """An offset from which on every outcome behind `number` can be read; fewer than `near`, and repeats, come before.

    See the module. Numbers mostly climb with the offsets, so two looks in three are where the number would stand if all
    did: two or three are usual, 3 log2(n) the most. `source` stands anywhere afterwards.
    """
    low = guess = source.seek({})[stream]
    high = low + source.lag()[stream]
    for look in itertools.count():
        if low >= high:
            break
        middle = guess if look % 3 < 2 and low <= guess < high else (low + high) // 2
        found = _numbered(source, stream, middle, number_of)
        if found is None or found[0] >= high or found[1] > number:
            high = middle
            continue
        at, told = found
        low, guess = at + 1, at + number - told
        if number - told < near:
            break
    return low


def _numbered(source: Source, stream: Stream, offset: int, number_of: Numbering) -> tuple[int, int] | None:
    """(offset, number) of the first outcome from `offset` on; None when none can be seen yet.

    Offsets may be empty, of markers and of transactions that were aborted. Raises Unavailable.
    """
    source.seek({stream: offset})
    deadline = time.monotonic() + LOOK_S
    while time.monotonic() < deadline:
        records = source.poll(1, 0.1)
        for record in records:
            number = number_of(record)
            if number is not None:
                return record.origin.offset, number
        if not records and not source.lag()[stream]:
            break
    if getattr(source, "away", False):
        raise Unavailable(f"{stream}: no broker is connected")
    return None
