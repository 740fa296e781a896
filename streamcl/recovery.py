"""The one recovery path, and the checkpoints that it starts from: kept beside the loop, not inside it.

1. Claim the shard, which a worker that lives does not give up; open the control log: every predecessor is fenced.
2. Load the newest valid snapshot; without one start afresh, and write a first snapshot at once, so that the starting
   position itself is recoverable.
3. Seek to its position; `Worker.run` then repeats the logged order up to the control log's end and goes on from there.
   At-least-once delivery sends again what it sent before (same ids, same values); exactly-once sends nothing, for the
   answers stand in the same transaction as the order. Dead letters are sent again in both.

P is the position that the control log leads to.

| death | P | what comes of it |
|---|---|---|
| before the fence, behind it; first start before its snapshot | 0 | a first start |
| behind the first snapshot, behind loading, behind the seek | any | the same recovery once more |
| in the middle of a re-run | any | the re-run begins again |
| polled, order not logged | before this turn | it never happened; its order may be taken anew |
| exactly-once: anywhere before the commit | before this turn | as above |
| order or transaction on its way, lost | before this turn | as above |
| order or transaction durable, nobody was told | behind this turn | re-run; at-least-once sends |
| at-least-once: answers, outcomes unsent, half sent, unacknowledged | behind this turn | re-run, sent again |
| dead letters sent, nothing else | either | sent again, same origin in the headers |
| a checkpoint: before, in or behind its flush, in its writing | behind it | a longer re-run from the one before |
| behind a checkpoint, before or behind showing progress | behind it | a shorter re-run; progress is a gauge |
| a delta cut, not sent or not acknowledged | behind it | cut and sent again, the same bytes |
| disk lost, an old backup | far behind it | a longer re-run, the same state |
| two workers with one identity | behind the newer | the older is fenced at its next order or beat, saves nothing |

`tests/test_crash_points.py` dies at each of these, and before and behind every call that crosses the boundary.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from streamcl.audit import Audit
from streamcl.bootstrap import Bootstrap
from streamcl.checkpoint import Store
from streamcl.config import Config, ConfigError, changes
from streamcl.evolve import MAY_CHANGE, evolve
from streamcl.group.manifest import meeting_of, newest_common, part_of
from streamcl.group.manifest import write as write_manifest
from streamcl.lease import Lease
from streamcl.protocols import Gap, State, StreamclError
from streamcl.records import COMMANDS, EVENTS, Order, Position, Turn, Was
from streamcl.remote import Remote
from streamcl.snapshot import CheckpointError, Loaded, Snapshot, difference, environment
from streamcl.warm_start import begun_with, warm_start
from streamcl.worker import Worker, logged
from streamcl.writer import Writer, Written

log = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 60.0

FAILURES = {errno.ENOSPC: "disk_full", errno.EACCES: "denied", errno.EROFS: "read_only", errno.EIO: "io"}
_OS_ERROR = re.compile(r"os error (\d+)")


def cause_of(error: CheckpointError) -> str:
    """Why a snapshot could not be written, in a word: a label of few values."""
    cause = error.__cause__
    told = _OS_ERROR.search(str(cause))  # safetensors says it in its text only
    number = cause.errno if isinstance(cause, OSError) else int(told[1]) if told else None
    return FAILURES.get(number or 0, "other")


class Keeper:
    """Restores a worker and saves it while it runs.

    Args:
        accept_changes: Start from a snapshot although the environment or a setting of kind `stop` differs and the last
            run didn't end cleanly: what it did after the snapshot will not repeat exactly.
        bootstrap: How a first start learns from history before it publishes. A later start goes on with what the first
            one began.
        beside: Write snapshots on a thread of their own (see `Writer`).
        lease_s: Instead of `checkpoint.lease_s`: 0 where a group says who holds a shard.

    Attributes:
        last: The newest snapshot, read or written.
        seconds: That the last write took.
        failures: Writes that failed, by cause (count). The worker goes on, and tries again after a back-off.
        deferred: Snapshots put off because the one before was still being written (count).
        forgotten: Commands that were obeyed and are not on record yet. Each makes a snapshot due at once; as soon as it
            stands, every older one is retired, and only then the command goes on record (see `audit`). The list
            travels in the manifest, so a death anywhere on that way ends with the same.
    """

    def __init__(
        self,
        worker: Worker,
        store: Store,
        accept_changes: bool = False,
        bootstrap: Bootstrap | None = None,
        beside: bool = True,
        lease_s: float | None = None,
    ) -> None:
        self.worker = worker
        self.store = store
        self.accept_changes = accept_changes
        self.bootstrap = bootstrap
        self.lease = lease_on(store, worker.config.checkpoint.lease_s if lease_s is None else lease_s)
        self.writer = Writer(store, self.lease, beside)
        self.audit = Audit(store.folder, store.remote)
        self.since = 0
        self.last: Snapshot | None = None
        self.seconds = 0.0
        self.failures: Counter[str] = Counter()
        self.deferred = 0
        self.forgotten: list[dict[str, Any]] = []
        self._owed = False  # a snapshot, to retire those from before a forget
        self._outage, self._retry_at = 0, 0.0
        if worker.rounds:
            worker.rounds.wish = self._wish

    def restore(self) -> Snapshot | None:
        """Bring the worker to where its shard stood; returns the snapshot it began from, None for a first start."""
        worker = self.worker
        self.lease.claim()  # before the fence: a worker that lives is not to be fenced by mistake
        if worker.control:
            worker.control.open()
        self.store.probe()
        worker.joiner.keep_in(self.store.chunks)
        rounds = worker.rounds
        loaded = newest_common(rounds.ranks, self.store) if rounds else self.store.newest()
        if loaded is None:
            self._start_afresh()
            log.info("began afresh at %d records", worker.progress.records)
            return None
        self._still_a_shard(loaded)
        self._compatible(loaded)
        worker.load_state_dict(self._evolved(loaded))
        worker.control_offset = int(loaded.manifest["control_offset"])
        worker.lineage.find = self._learner_of
        begun_with(worker)
        self.last = loaded.snapshot
        self.store.pinned = loaded.snapshot.name if rounds else ""
        self._refuse_new_partitions()
        self._still_owed(loaded)
        log.info("restored %s at %d records", loaded.snapshot.name, worker.progress.records)
        try:
            found = worker.source.seek(worker.progress.position)
        except Gap as gap:
            self._leap(gap)
        else:
            self._adopt(found)
        return loaded.snapshot

    def _start_afresh(self) -> None:
        worker = self.worker
        _refuse_other_counts(worker.config)
        if self.store.damaged:
            names = ", ".join(name for name, _ in self.store.damaged)
            where = self.store.folder
            raise StreamclError(f"{where}: every snapshot is damaged ({names}); restore one or move them away")
        if worker.control and next(iter(worker.control.read(0)), None) is not None:
            raise StreamclError(
                f"{self.store.folder} holds no snapshot, but {worker.config.control_url} says that this shard has "
                "learned before; restore its snapshots, or start under another name"
            )
        warm_start(worker)
        if worker.rounds:
            worker.rounds.begin()
        if self.bootstrap:
            self.bootstrap.begin(worker)
        else:
            worker.progress.position = dict(worker.source.seek({}))
        self.save()

    def _still_a_shard(self, loaded: Loaded) -> None:
        count = loaded.manifest.get("resharded_to")
        if count is not None:
            raise ConfigError(f"{self.store.folder}: this shard has become a part of others: set shard.count = {count}")

    def _refuse_new_partitions(self) -> None:
        progress, found = self.worker.progress, self.worker.source.streams()
        # Of commands that are read no more.
        progress.position = {s: o for s, o in progress.position.items() if s in found or s.input != COMMANDS}
        known = progress.position.keys()
        new = sorted(stream for stream in set(found) - known if stream.input != COMMANDS)
        if new:
            names = ", ".join(f"{stream.input} partition {stream.partition}" for stream in new)
            raise StreamclError(
                f"{self.store.folder}: {names} came after the snapshot was written. Keys may have moved between "
                "partitions, and their tickets with them: stop every worker and run `streamcl reshard`"
            )

    def _adopt(self, position: Position) -> None:
        """Commands that came into the configuration since the snapshot: where they begin must be recoverable too."""
        if position.keys() - self.worker.progress.position.keys():
            self.worker.progress.position = dict(position)
            self.save()

    def _still_owed(self, loaded: Loaded) -> None:
        told = loaded.manifest.get("forgotten", ())
        on_record = self.audit.lines() if told else ()
        known = {(line["request"], line["position"]) for line in on_record}
        self.forgotten = [each for each in told if (each["request"], each["position"]) not in known]
        self._owed = bool(self.forgotten)

    def _leap(self, gap: Gap) -> None:
        """Go on behind records that are gone, as `kafka.on_gap` says: counted, and a fact of the control log."""
        worker, policy = self.worker, self.worker.config.kafka.on_gap
        if policy == "fail":
            raise gap
        position = {**worker.progress.position, **gap.available}
        worker.source.seek(position)
        if policy == "latest":
            lag = worker.source.lag()
            position |= {stream: offset + lag.get(stream, 0) for stream, offset in gap.available.items()}
        skipped = sum(position[stream] - offset for stream, offset in gap.wanted.items())
        log.error("%s; kafka.on_gap is %s: %d records are skipped, going on at %s", gap, policy, skipped, position)
        if worker.control:
            since = worker.control_offset
            if worker.config.exactly_once:  # what the void orders have answered is learned anew, and not answered again
                for _, order in worker.control.read(since):
                    worker.progress.publish_from |= {s: o for s, o in order.position.items() if s.input == EVENTS}
            worker.control_offset = worker.control.append(Order((), position, leap=since))
        worker.progress.leap(worker.source.seek(position))
        worker.counts["skipped"] += skipped
        self.save()

    def _compatible(self, loaded: Loaded) -> None:
        changed = changes(loaded.manifest["config"], self.worker.config)
        new = [path for path, change in changed if change == "new" and path not in MAY_CHANGE]
        if new:
            raise ConfigError(
                f"{self.store.folder}: {', '.join(new)} changed since the snapshot was written, which means other "
                "state; change back, or start in another checkpoint.folder under another name"
            )
        differences = [path for path, change in changed if change == "stop" or path in MAY_CHANGE]
        differences += difference(loaded.manifest["environment"], self._environment())
        if not differences:
            return
        if not (loaded.manifest["clean"] or self.accept_changes):
            raise ConfigError(
                f"{self.store.folder}: changed since a snapshot that no clean stop wrote: {', '.join(differences)}; "
                "what followed the snapshot would not repeat exactly. Stop cleanly first, or pass --accept-changes"
            )
        log.warning("going on although these changed: %s", ", ".join(differences))

    def _evolved(self, loaded: Loaded) -> State:
        """The snapshot's state, carried over to other features or more classes."""
        config = loaded.manifest["config"]
        moved = sorted(MAY_CHANGE & {path for path, _ in changes(config, self.worker.config)})
        if not moved:
            return loaded.state
        before = Config.parse(config, str(loaded.snapshot.path))
        came, gone = (
            self.worker.config.features.keys() - before.features.keys(),
            before.features.keys() - self.worker.config.features.keys(),
        )
        log.warning("carried over to other %s; came: %s; gone: %s", ", ".join(moved), sorted(came), sorted(gone))
        return evolve(loaded.state, before, self.worker.config)

    def run(self) -> Iterator[Turn]:
        """The worker's turns, with a snapshot every `checkpoint.every_events` records and one at a clean end.

        Raises:
            CheckpointError: only the one at the end could not be written; those before are tried again.
            Fenced: another worker has claimed the shard.
        """
        for turn in self.worker.run():
            yield turn
            self.lease.heed()
            self.since += turn.records
            self.forgotten += [each.to_json() for each in turn.forgotten]
            self._owed |= bool(turn.forgotten)
            self._settle()
            if self._may_cut():
                self._cut()
        self._settle(wait=True)
        self.save(clean=self.worker.caught_up)
        if rounds := self.worker.rounds:
            rounds.note_saved(rounds.ranks.gather(part_of(self.last)))
            self._completed()

    def _may_cut(self) -> bool:
        """A rank of a group cuts where all do."""
        rounds, wanted = self.worker.rounds, self._due or self._owed
        if not rounds:
            return wanted and time.monotonic() >= self._retry_at
        rounds.urgent = self._owed and time.monotonic() >= self._retry_at
        self._completed()
        agreed, rounds.saves = rounds.saves, False
        return agreed

    def _wish(self) -> dict[str, Any]:
        """Told to the others at every meeting."""
        self._settle()
        due = (self._due or self._owed) and time.monotonic() >= self._retry_at
        return {"due": due, "busy": self.writer.busy, "saved": part_of(self.last)}

    def _completed(self) -> None:
        """Once every rank has its part of a snapshot, what is older may go."""
        rounds, last = self.worker.rounds, self.last
        if not rounds or not last or rounds.complete != meeting_of(last) or self.store.pinned == last.name:
            return
        self.store.pinned = last.name
        if rounds.ranks.rank == 0:
            write_manifest(self.worker.config, rounds.parts)
        try:
            self._retire(last)
        except CheckpointError as error:
            self._failed(error)

    def catch_up(self) -> None:
        """Behind `restore`: repeat what is logged and take nothing new. What a forget owes is paid at once.

        Raises:
            StreamclError: as `run` does.
        """
        worker = self.worker
        for turn in worker.rerun(logged(worker.control, worker.control_offset)) if worker.control else ():
            self.forgotten += [each.to_json() for each in turn.forgotten]
        worker.caught_up = True
        if self.forgotten:
            self.save(clean=True)

    def _learner_of(self, was: Was) -> State | None:
        for snapshot in reversed(self.store.ls()):  # a shadow's stands behind the one that it has taken the place of
            told = snapshot.manifest
            if (told["control_offset"], told["records"]) == was:
                found: State = self.store.load(snapshot.name).state["learner"]
                return found
        return None

    @property
    def _due(self) -> bool:
        return self.since >= self.worker.config.checkpoint.every_events

    def save(self, clean: bool = False) -> Snapshot:
        """Cut a snapshot here and write it before going on. Raises CheckpointError."""
        self.worker.flush()
        position = dict(self.worker.progress.position)
        self.writer.begin(self.worker.state_dict, self.manifest(clean), position, at_once=True)
        self.since, self._owed = 0, False
        written = self.writer.taken(wait=True)
        assert written is not None  # noqa: S101 - it was begun two lines above
        return self._keep(written)

    def close(self) -> None:
        """Wait for a write under way, and let go of the shard."""
        self.writer.close()
        self.lease.release()

    def _cut(self) -> None:
        """Cut a snapshot here and let it be written beside learning.

        Everything sent so far is durable first: a snapshot is of use only if nothing before it can be missing later.
        """
        if self.writer.busy:
            if self._due:
                self.deferred += 1
                self.since = 0  # the next one is due an interval later
            return
        self.worker.flush()
        try:
            self.writer.begin(self.worker.state_dict, self.manifest(False), dict(self.worker.progress.position))
            self.since, self._owed = 0, False
        except CheckpointError as error:
            self._failed(error)
        self._settle()

    def _settle(self, wait: bool = False) -> None:
        try:
            written = self.writer.taken(wait)
            if written:
                self._keep(written)
        except CheckpointError as error:
            self._failed(error)

    def _keep(self, written: Written) -> Snapshot:
        if self._outage:
            log.warning("%s: written again, after %d failures", written.snapshot.path, self._outage)
        if not self.worker.rounds:  # else older ones are needed until every rank has its part
            self._retire(written.snapshot)
        self._outage, self.last, self.seconds = 0, written.snapshot, written.seconds
        if written.position:
            self.worker.source.commit(written.position)
        if self.worker.outlets.deltas:
            self.worker.outlets.deltas.retain(min(int(each.manifest["records"]) for each in self.store.ls()))
        return written.snapshot

    def _retire(self, snapshot: Snapshot) -> None:
        """What was written before a forget goes, now that this one stands behind it. Raises CheckpointError."""
        told = snapshot.manifest.get("forgotten", ())
        if not told:
            return
        retired = self.store.retire(snapshot.name)
        self.audit.add([{**each, "retired": retired} for each in told])
        for each in told:
            rows = sum(each["rows"].values())
            log.info("%s: request %s: %d rows erased, older snapshots retired", snapshot.path, each["request"], rows)
        self.forgotten = [each for each in self.forgotten if each not in told]

    def _failed(self, error: CheckpointError) -> None:
        """Serving goes on: what was lost is only time, should the worker die before the next snapshot."""
        self.failures[cause_of(error)] += 1
        # One warning for each outage, however many attempts it takes.
        log.log(logging.INFO if self._outage else logging.WARNING, "%s; going on without, trying again", error)
        self._outage += 1
        self._retry_at = time.monotonic() + min(2.0**self._outage, LONGEST_BACKOFF_S) / 2
        self.since = self.worker.config.checkpoint.every_events

    def manifest(self, clean: bool) -> dict[str, Any]:
        """What a snapshot cut here says about itself."""
        return {
            "name": self.worker.config.name,
            "records": self.worker.progress.records,
            "position": self.worker.progress.state_dict()["position"],
            "control_offset": self.worker.control_offset,
            "clean": clean,
            "delta": self.worker.deltas.last if self.worker.deltas else "",
            "epoch": self.lease.epoch,
            "forgotten": list(self.forgotten),
            "forgets": self.worker.counts["forget_requests"],
            "metrics": self.worker.metrics.read(),
            "lineage": [dict(fact) for fact in self.worker.lineage.facts],
            "config": self.worker.config.model_dump(mode="json"),
            "environment": self._environment(),
            **({"round": rounds.number, "seal": rounds.seal} if (rounds := self.worker.rounds) else {}),
        }

    def _environment(self) -> dict[str, Any]:
        how = self.worker.learner.described()
        return environment(how["engine"], how.get("device", "cpu"))


def _refuse_other_counts(config: Config) -> None:
    """A first start beside the snapshots of another number of shards would learn everything a second time."""
    where, count = config.checkpoint, config.shard.count
    try:
        names = {each.name for each in where.folder.glob("*-of-*")}
        names |= set(Remote(where.remote).folders()) if where.remote else set()
        for name in sorted(names):
            match = re.fullmatch(rf"{re.escape(config.name)}-(\d+)-of-([1-9]\d*)", name)
            if match and int(match[2]) != count and holds(store_of(config.of_shard(int(match[1]), int(match[2])))):
                raise ConfigError(
                    f"shard.count is {count}, but there are snapshots of {name} in {where.remote or where.folder}: run"
                    f" `streamcl reshard --from {match[2]} --to {count}` first, or start under another name"
                )
    except OSError as error:
        raise CheckpointError(f"{where.folder}: can't see whether there were other shards: {error}") from error


def holds(store: Store) -> bool:
    return bool(store.ls() or (store.remote and store.remote.names()))


def lease_on(store: Store, lease_s: float) -> Lease:
    """The right to write to it, where every worker of the shard sees it."""
    return Lease(store.remote.url if store.remote else str(store.folder), lease_s)


def store_of(config: Config) -> Store:
    """The shard's own folder of checkpoints, and its place in the object store if there is one."""
    shard, where = f"{config.name}-{config.shard.index}-of-{config.shard.count}", config.checkpoint
    try:
        remote = Remote(f"{where.remote.rstrip('/')}/{shard}") if where.remote else None
    except OSError as error:
        raise ConfigError(f"checkpoint.remote: {error}") from error
    return Store(where.folder / shard, where.retain, config.trust_pickle, remote=remote)
