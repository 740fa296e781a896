"""Shards in one process: their turns in rotation, the recovery of one while the others go on, and who holds which.

| what a shard raises | what becomes of it |
|---|---|
| `Unavailable` | closed, and after a back-off built anew and restored: the one recovery path |
| `Fenced`, shards assigned by hand | every other shard stops cleanly, then it is raised |
| `Fenced` or `Held`, shards handed out by a group | its state is dropped; it comes back if the group says so |
| any other error | every other shard stops cleanly, then it is raised |
| any error in a rank of a group | raised: the others can't go on without it, and all begin anew |

Until a shard has stood once, `Unavailable` is raised like any other error: a wrong address looks the same.
"""

from __future__ import annotations

import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from streamcl.bootstrap import Bootstrap
from streamcl.config import Config
from streamcl.group.ranks import Ranks
from streamcl.lease import Held
from streamcl.protocols import Fenced, Membership, StreamclError, Unavailable
from streamcl.records import Turn
from streamcl.recovery import Keeper, store_of
from streamcl.sampled import Sampled
from streamcl.snapshot import Snapshot
from streamcl.telemetry import Telemetry
from streamcl.traces import Traces
from streamcl.worker import Worker
from streamcl.worker import build as build_worker

log = logging.getLogger(__name__)

_READINGS_EVERY_S, _READINGS_SHARE = 1.0, 1 / 300
"""Windowed metrics sort their window: once a second is often enough, and less often where that takes long."""


class Stoppable(Protocol):
    def stop(self) -> None: ...


@contextmanager
def stopping(runs: Stoppable) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C end the loop after its turn; a second Ctrl-C interrupts."""

    def stop(number: int, _frame: object) -> None:
        runs.stop()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FixedShards:
    """Static assignment: what the configuration names, for as long as the process lives."""

    rebalances = 0

    def __init__(self, config: Config) -> None:
        self._held = dict.fromkeys(config.shard.here, 0)

    def held(self) -> Mapping[int, int]:
        return self._held

    def settled(self) -> bool:
        return True

    def fenced(self, shard: int) -> bool:
        return False

    def close(self) -> None:
        """Nobody else would take them."""


@dataclass(slots=True)
class Life:
    """A shard from its recovery to its end, or to the next recovery. Times are of the monotonic clock."""

    worker: Worker
    keeper: Keeper
    turns: Iterator[Turn]
    saved: Snapshot | None
    since: float
    sampled: Sampled | None = None
    tells_at: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)


class Seat:
    """One shard in this process: running, or waiting to be built anew, or ended.

    Attributes:
        last: The worker that it ran last, closed once the shard has ended.
        readings: Of that worker at its end.
        error: What it is being recovered from.
    """

    def __init__(self, config: Config, tenure: int) -> None:
        self.config = config
        self.index = config.shard.index
        self.tenure = tenure
        self.life: Life | None = None
        self.last: Worker | None = None
        self.readings: dict[str, float] = {}
        self.error: StreamclError | None = None
        self.ended = False
        self.busy = True  # the last turn had records
        self.failures, self.retry_at = 0, 0.0

    def hears(self) -> bool:
        """It runs, and an empty turn means that nothing has come; a source that can't tell has no `away`."""
        return self.life is not None and not getattr(self.life.worker.source, "away", False)

    def close(self) -> None:
        """Let go at once: nothing is flushed or saved, for recovery needs nothing of it."""
        if self.life:
            with suppress(Exception):  # whatever it is, this worker is not used again
                self.life.worker.close()
            self.life.keeper.close()
        self.life = None


class Host:
    """Runs the shards that `membership` holds, each in its turn.

    Args:
        bootstrap: See `Keeper`.
        build: Makes a shard's worker.
        backoff_s: The first and the longest wait before a shard is built anew; it doubles, and half of it is random.
        ranks: The group that the shard is a rank of; it has one then.

    Attributes:
        seats: By shard; those that ended by themselves stay, for whoever wants to look at their workers.
    """

    def __init__(
        self,
        config: Config,
        membership: Membership,
        telemetry: Telemetry,
        *,
        accept_changes: bool = False,
        bootstrap: Bootstrap | None = None,
        build: Callable[[Config], Worker] | None = None,
        backoff_s: tuple[float, float] = (0.5, 30.0),
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.membership = membership
        self.telemetry = telemetry
        self.accept_changes = accept_changes
        self.bootstrap = bootstrap
        self.build = build or partial(build_worker, ranks=ranks)
        if ranks:
            ranks.waiting = telemetry.beat
        self.backoff_s = backoff_s
        self.seats: dict[int, Seat] = {}
        self.stopping = False
        self.stood = False  # some shard has
        self.error: StreamclError | None = None
        self.traces = Traces(config) if config.telemetry.trace_share else None

    def stop(self) -> None:
        """End `run` once every shard has finished its turn and saved. Safe to call from a signal handler."""
        self.stopping = True
        for seat in list(self.seats.values()):
            if seat.life:
                seat.life.worker.stop()

    def settled(self) -> bool:
        """Every shard of this process runs and hears its brokers, or has ended."""
        return self.membership.settled() and all(seat.hears() or seat.ended for seat in self.seats.values())

    def work(self, idle_exit_s: float | None) -> None:
        """`run`, until nothing has come for so long while all was settled (seconds); None: for ever."""
        quiet_since = time.monotonic()
        for turn in self.run():
            if turn.records or not self.settled():
                quiet_since = time.monotonic()
            quiet = idle_exit_s is not None and time.monotonic() - quiet_since > idle_exit_s
            grouped = [seat.life.worker.rounds for seat in self.seats.values() if seat.life and seat.life.worker.rounds]
            for rounds in grouped:
                rounds.quiet = quiet  # it leaves when all would
            if quiet and not grouped:
                self.stop()

    def run(self) -> Iterator[Turn]:
        """The turns of all shards, empty ones too; ends when stopped, or when every shard has ended by itself.

        Raises:
            StreamclError: see the module; every shard has been closed, and stopped cleanly where that could be.
        """
        try:
            self._follow()
            while not self._over():
                yield from self._round()
            if self.error:
                raise self.error
        finally:
            for seat in self.seats.values():
                seat.close()
            if self.traces:
                self.traces.close()

    def _over(self) -> bool:
        return all(seat.ended for seat in self.seats.values()) and (self.stopping or bool(self.seats))

    def _round(self) -> Iterator[Turn]:
        for seat in [self.seats[index] for index in sorted(self.seats)]:
            if self.seats.get(seat.index) is seat and not seat.ended:
                yield from self._step(seat)
                self._follow()
        if not any(seat.life for seat in self.seats.values()) and not self._over():
            time.sleep(self.config.worker.poll_timeout_s)
            self.telemetry.beat()
            self._follow()
            yield Turn(0, {})

    def _follow(self) -> None:
        """Drop the shards that are held no longer, and make room for new ones."""
        try:
            held = self.membership.held()
        except StreamclError as error:
            self._leave(error)
            return
        for seat in [each for each in self.seats.values() if not each.ended]:
            if held.get(seat.index) != seat.tenure:
                self._drop(seat, "handed to another worker")
        if not self.stopping:
            for index in held.keys() - self.seats.keys():
                self.seats[index] = Seat(self.config.of_shard(index), held[index])
        self.telemetry.ready(self.membership.settled(), "waiting for the group to hand out shards")
        self.telemetry.rebalanced(self.membership.rebalances)

    def _step(self, seat: Seat) -> Iterator[Turn]:
        """The next turn of one shard, if there is one."""
        try:
            life = seat.life or self._open(seat)
            turn = self._turn(seat, life) if life else None
        except Unavailable as error:
            self._retry(seat, error)
        except (Fenced, Held) as error:
            self._fenced(seat, error)
        except StreamclError as error:
            self._end(seat)
            self._leave(error)
        else:
            if turn:
                yield turn

    def _open(self, seat: Seat) -> Life | None:
        """Build and restore, when it is time; a failure leaves nothing open."""
        if self.stopping:
            self._end(seat)
            if seat.error:
                self._leave(seat.error)
        if seat.ended or time.monotonic() < seat.retry_at:
            return None
        self.telemetry.ready(False, "restoring", seat.index)
        worker = seat.last = self.build(seat.config)
        # A group says who holds a shard; nobody needs to be waited for.
        lease_s = 0.0 if self.config.shard.assignment == "group" else None
        keeper = Keeper(worker, store_of(seat.config), self.accept_changes, self.bootstrap, lease_s=lease_s)
        seat.life = Life(worker, keeper, keeper.run(), None, time.monotonic())
        if self.stopping:  # while it was being built
            worker.stop()
        restored = keeper.restore()
        self.telemetry.restored(len(keeper.store.damaged), "ok" if restored else "none", seat.index)
        seat.life.saved, seat.life.since, self.stood = keeper.last, time.monotonic(), True
        seat.life.sampled = Sampled(worker) if self.config.telemetry.port else None
        log.info("%s stands at %d records", self._name(seat), worker.progress.records)
        if seat.failures:
            log.warning("%s stands again, after %d failures", self._name(seat), seat.failures)
        return seat.life

    def _turn(self, seat: Seat, life: Life) -> Turn | None:
        """None at the end, which is clean."""
        life.worker.poll_timeout_s = self._patience(seat, life)
        began = time.perf_counter()
        turn = next(life.turns, None)
        if turn is None:
            self._tell_saved(seat, life)
            seat.readings = life.worker.readings()
            self._end(seat)
            return None
        seat.busy = turn.records > 0
        healthy = seat.busy and not turn.recovering
        if healthy or time.monotonic() - life.since > self.backoff_s[1]:
            seat.failures, seat.error = 0, None
        self._tell(seat, life, turn, time.perf_counter() - began)
        return turn

    def _patience(self, seat: Seat, life: Life) -> float:
        """How long the next poll may wait (s): an idle shard must not keep the busy ones waiting.

        A shard with a backlog waits for its late streams, as if it were alone.
        """
        whole = self.config.worker.poll_timeout_s
        others = [each for each in self.seats.values() if each is not seat and each.life]
        if not others or (seat.busy and any(life.worker.source.lag().values())):
            return whole
        return 0.0 if any(each.busy for each in others) else whole / (len(others) + 1)

    def _tell(self, seat: Seat, life: Life, turn: Turn, seconds: float) -> None:
        worker, readings = life.worker, {}
        lag = worker.source.lag()
        if life.sampled:
            life.sampled.add(turn)
        if (began := time.monotonic()) >= life.tells_at:
            readings = worker.readings() | _beside(life, any(lag.values()))
            now = time.monotonic()
            life.tells_at = now + max(_READINGS_EVERY_S, (now - began) / _READINGS_SHARE)
        self.telemetry.observe(
            turn, seconds=seconds, lag=lag, readings=readings, stages=worker.pace.stages, shard=seat.index
        )
        if self.traces:
            self.traces.add(turn, seconds)
        reason = "repeating the logged order" if not worker.caught_up else "no broker is connected"
        self.telemetry.ready(worker.caught_up and seat.hears(), reason, seat.index)
        for each in turn.signals:
            level = logging.WARNING if each.kind == "drift" else logging.INFO
            log.log(level, "%s signalled by %s at %s", each.kind, each.source, each.origin)
        for letter in turn.dead_letters:
            log.warning("dead letter: topic %s, %s: %s", letter.record.topic, letter.record.origin, letter.error)
        self._tell_saved(seat, life)

    def _tell_saved(self, seat: Seat, life: Life) -> None:
        last = life.keeper.last
        if last is not None and last is not life.saved:
            life.saved = last
            self.telemetry.checkpointed(life.keeper.seconds, last.size_bytes, seat.index)
            log.info("saved %s (%d bytes)", last.name, last.size_bytes)
        for cause, count in (life.keeper.failures - life.failed).items():
            self.telemetry.checkpoint_failed(cause, count)
        life.failed = life.keeper.failures.copy()

    def _retry(self, seat: Seat, error: Unavailable) -> None:
        """Close it, and build it anew when the outage may be over."""
        grouped = seat.life is not None and seat.life.worker.rounds is not None
        seat.close()
        if self.stopping or not self.stood or grouped:
            self._end(seat)
            self._leave(error)
            return
        first, longest = self.backoff_s
        wait_s = min(longest, first * 2**seat.failures) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        seat.retry_at = time.monotonic() + wait_s
        # One warning for each outage, however many attempts it takes.
        log.log(logging.INFO if seat.failures else logging.WARNING, "%s: %s; recovering", self._name(seat), error)
        seat.failures, seat.error = seat.failures + 1, error
        self.telemetry.recovers("unavailable")
        self.telemetry.ready(False, f"recovering: {error}", seat.index)

    def _fenced(self, seat: Seat, error: Fenced | Held) -> None:
        if self.membership.fenced(seat.index):
            self.telemetry.recovers("fenced")
            self._drop(seat, str(error))
            return
        self._end(seat)
        self._leave(error)

    def _drop(self, seat: Seat, why: str) -> None:
        """Forget a shard that another worker goes on with: no checkpoint is owed, the control log says everything."""
        log.warning("%s dropped: %s", self._name(seat), why)
        seat.close()
        del self.seats[seat.index]
        self.telemetry.left(seat.index)

    def _end(self, seat: Seat) -> None:
        seat.close()
        seat.ended = True

    def _leave(self, error: StreamclError) -> None:
        """Stop all; `run` raises the first error."""
        if self.error:
            log.error("while stopping: %s", error)
        self.error = self.error or error
        self.stop()

    def _name(self, seat: Seat) -> str:
        return f"{self.config.name}, shard {seat.index} of {self.config.shard.count}"


def _beside(life: Life, lags: bool) -> dict[str, float]:
    """Readings of what stands beside the worker."""
    told = {"checkpoints_deferred": float(life.keeper.deferred)} | (life.sampled.read() if life.sampled else {})
    told["lag_s"] = max(0.0, time.time() - life.worker.pace.newest_s) if lags and life.worker.pace.newest_s else 0.0
    if life.keeper.last is not None:
        since = life.worker.progress.records - life.keeper.last.manifest["records"]
        told["checkpoint_overdue"] = since / life.worker.config.checkpoint.every_events
    return told
