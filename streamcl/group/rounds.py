"""Rounds: when a rank meets the others, what makes that repeatable, and what they agree on when they do.

A rank learns by itself from its own shard, one event at a time, and closes its round

1. *full*: behind the record with which it has learned from `group.round_events` events since the last meeting, or taken
   `group.most_records` records, or with `group.round_s` behind the one that takes its watermark past the round's end;
2. *short, at its end*: when no record can come to it any more (a file that has been read);
3. *short, idle*: when it has taken all that there is for now, and another rank has closed this round;
4. *short, leaving*: when it, or another rank, has been told to stop, or it owes a checkpoint that can't wait.

Then it waits for the others, and all merge. The first two are functions of the rank's own stream: no clock, no poll and
no other rank enters them, so a group that reads files comes to the same state at every run. The others depend on when
records came, as the order of several inputs does, and like it they are logged: the control log's order that ends a
round says so (`Order.closes`), and is durable *before* the rank meets anyone. So whoever has seen a merged model knows
that every rank's end of that round stands in its log, and a recovery or a replay closes each round where it was closed.
The state of a group is a function of (configuration, seed, the logged order of each shard, the logged ends of rounds).

A meeting without a new record on any rank is none: nothing is merged, and the round goes on. So a group that is started
again at the end of its files is the same afterwards.

Nobody waits for ever: a rank with records comes to its own end of the round within `group.most_records` of them, one
without comes at once. What waits for the slow ones is learning; so does answering, on the ranks that wait.

In event time a round ends for all at one multiple of `group.round_s`, agreed on when they meet: the first one behind
the rank that is farthest back, of those that closed theirs full. Ranks ahead close the next rounds behind one record
each and wait, so event times of ranks with a backlog stay within a round of one another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import orjson
import xxhash

from streamcl.config import Config
from streamcl.group.merge import Met, merge_of
from streamcl.group.ranks import Ranks
from streamcl.learner import Learner
from streamcl.past import Past
from streamcl.progress import Progress
from streamcl.protocols import State, StreamclError
from streamcl.records import Closed

BEGUN = "0" * 32
"""The seal of a group that has not met."""

NOTHING_SAVED: Mapping[str, Any] = {"due": False, "busy": False, "saved": None}

_HEED_S = 0.1
"""Of the clock: how often a busy rank looks whether another one is leaving."""


class Rounds:
    """One rank's part in the rounds of its group; what it remembers is the same on every rank but for its own counts.

    Args:
        learner, past: Whose state is merged.

    Attributes:
        number: Rounds met since the group began.
        seal: A hash over every rank's position at the end of every round: snapshots with one seal fit together.
        learned, records: Since the last meeting (count).
        closing: What the order at hand says of this round's end; None while the round goes on.
        left: A rank has been told to stop, and all of them leave.
        over: They do, or every rank has come to its end: the group has met for the last time.
        saves: All ranks cut a snapshot here.
        complete: (round, seal) of the newest round that every rank has a durable snapshot of; `parts` says which.
        heads: What each rank said at the last meeting, by rank.
        quiet: This rank would leave for want of records, if all would.
        urgent: It owes a snapshot, which only a meeting gives.
        wish: Says of this rank's snapshots whether one is `due`, one is being written (`busy`), and which was last
            `saved`.
    """

    def __init__(self, config: Config, learner: Learner, past: Past | None, ranks: Ranks) -> None:
        self.config = config.group
        self.ranks = ranks
        self.merge = merge_of(config, learner, ranks, past)
        self.number, self.seal = 0, BEGUN
        self.learned = self.records = 0
        self.meetings = 0  # of these processes, those without records too
        self.time_s = -math.inf
        self.end_s: float | None = None  # of the round, in event time
        self.full = False
        self.closing: Closed | None = None
        self.left = self.over = self.saves = self.quiet = self.urgent = False
        self.complete: tuple[int, str] | None = None
        self.parts: Sequence[Mapping[str, Any]] = ()
        self.heads: Sequence[Mapping[str, Any]] = ()
        self.wish: Callable[[], Mapping[str, Any]] = lambda: NOTHING_SAVED
        self.met = Met(0, 0, 0.0)
        self.sent_bytes = self.received_bytes = 0
        self.seconds = self.waited_s = self.merging_s = 0.0
        self._began, self._heeded = time.monotonic(), 0.0

    def took(self, time_s: float) -> bool:
        """A record has been taken, which has moved the watermark to `time_s`; whether the round is full by it."""
        self.records += 1
        self.time_s = time_s
        if self.config.round_s is not None and self.end_s is None and math.isfinite(time_s):
            self.end_s = _next(time_s, self.config.round_s)
        enough, most = self.config.learned, self.config.most
        self.full = (
            (enough is not None and self.learned >= enough)
            or (most is not None and self.records >= most)
            or (self.end_s is not None and time_s >= self.end_s)
        )
        return self.full

    def ends(self, idle: bool, ended: bool, leaving: bool) -> Closed | None:
        """Asked behind every turn: whether the round ends here, and how.

        Args:
            idle: All that there was has been taken.
            ended: No more can come.
            leaving: This rank has been told to stop.
        """
        number = self.number + 1
        if leaving:
            self.ranks.tell("leaving", str(number))
        urgent = self.urgent and not self.wish()["busy"]
        ends = self.full or ended or leaving or urgent or (idle and self.quiet)
        ends = ends or (idle and self.ranks.told("closed") == self._at()) or self._others_leave(idle)
        self.closing = Closed(number, ended) if ends else None
        return self.closing

    def _at(self) -> str:
        """Which meeting is next: one without records has the number of the one before."""
        return f"{self.number + 1}/{self.meetings}"

    def _others_leave(self, idle: bool) -> bool:
        now = time.monotonic()
        if not idle and now - self._heeded < _HEED_S:
            return False
        self._heeded = now
        return bool(self.ranks.told("leaving"))

    def meet(self, progress: Progress, gate: AbstractContextManager[None], leaving: bool = False) -> None:
        """Wait for the others, and merge. The order that ends the round is durable.

        Raises:
            RankLost: a rank has died or is silent.
            StreamclError: the ranks are at different rounds, which no logs of one group lead to.
        """
        assert self.closing is not None  # noqa: S101 - the caller has asked
        began = time.monotonic()
        self.ranks.tell("closed", self._at())
        self.meetings += 1
        heads = self.ranks.gather(self._head(progress, leaving))
        self.waited_s = time.monotonic() - began
        if any((each["round"], each["seal"]) != (self.closing.round, self.seal) for each in heads):
            said = ", ".join(f"rank {rank} is at round {each['round']}" for rank, each in enumerate(heads))
            raise StreamclError(f"the ranks do not belong together: {said}; their control logs or snapshots are mixed")
        if any(each["records"] for each in heads):
            with gate:
                self.met = self.merge.meet(self.learned)
            self.sent_bytes += self.met.bytes_out
            self.received_bytes += self.met.bytes_in
            self._count(heads)
        self._agree(heads)
        now = time.monotonic()
        self.seconds, self.merging_s, self._began = now - self._began, now - began - self.waited_s, now

    def _head(self, progress: Progress, leaving: bool) -> Mapping[str, Any]:
        assert self.closing is not None  # noqa: S101 - as above
        return {
            "round": self.closing.round,
            "seal": self.seal,
            "ended": self.closing.ended,
            "full": self.full,
            "learned": self.learned,
            "records": self.records,
            "progress": progress.state_dict(),
            "time_s": self.time_s if math.isfinite(self.time_s) else None,
            "leaving": leaving,
            "quiet": self.quiet,
            **self.wish(),
        }

    def _count(self, heads: Sequence[Mapping[str, Any]]) -> None:
        """What every rank's state takes from the same heads."""
        told = [[each[name] for name in ("round", "learned", "progress")] for each in heads]
        self.seal = f"{xxhash.xxh3_128_intdigest(orjson.dumps([self.seal, told])):032x}"
        self.number += 1
        if self.config.round_s is not None:
            # Those that were not full have no records, or are behind no one: it is not for them to hold the others.
            some = [each for each in heads if each["full"]] or heads
            behind = min((each["time_s"] for each in some if each["time_s"] is not None), default=None)
            self.end_s = None if behind is None else _next(behind, self.config.round_s)
        self.learned = self.records = 0

    def _agree(self, heads: Sequence[Mapping[str, Any]]) -> None:
        """And what they do next."""
        self.heads, self.full, self.closing = heads, False, None
        self.left = any(each["leaving"] for each in heads)
        self.over = self.left or all(each["ended"] or each["quiet"] for each in heads)
        self.saves = any(each["due"] for each in heads) and not any(each["busy"] for each in heads)
        self.note_saved([each["saved"] for each in heads])

    def note_saved(self, saved: Sequence[Mapping[str, Any] | None]) -> None:
        """By rank: its newest durable snapshot."""
        parts = [each for each in saved if each is not None]
        meetings = {(int(each["round"]), str(each["seal"])) for each in parts}
        if len(parts) == len(saved) and len(meetings) == 1:
            self.parts, self.complete = parts, meetings.pop()

    def read(self) -> dict[str, float]:
        times = [each["time_s"] for each in self.heads if each["time_s"] is not None]
        return {
            "group_ranks": float(self.ranks.world),
            "group_rounds": float(self.number),
            "group_round_s": self.seconds,
            "group_wait_s": self.waited_s,
            "group_merge_s": self.merging_s,
            "group_learned": float(sum(each["learned"] for each in self.heads)),
            "group_sent_bytes": float(self.sent_bytes),
            "group_received_bytes": float(self.received_bytes),
            "group_divergence": self.met.divergence,
            "group_skew_s": max(times) - min(times) if times else 0.0,
        }

    def state_dict(self) -> State:
        return {
            "number": self.number,
            "seal": self.seal,
            "learned": self.learned,
            "records": self.records,
            "time_s": self.time_s,
            "end_s": self.end_s,
            "merge": self.merge.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Once learner and past have theirs. An empty one is that of a shard which has learned by itself so far."""
        self.number, self.seal = int(state.get("number", 0)), state.get("seal", BEGUN)
        self.learned, self.records = int(state.get("learned", 0)), int(state.get("records", 0))
        self.time_s, self.end_s = state.get("time_s", -math.inf), state.get("end_s")
        self.merge.load_state_dict(state.get("merge", {}))

    def begin(self) -> None:
        """The learner is now what it begins with."""
        self.merge.load_state_dict(self.merge.state_dict())


def _next(time_s: float, every_s: float) -> float:
    """The first multiple behind it."""
    return (math.floor(time_s / every_s) + 1) * every_s
