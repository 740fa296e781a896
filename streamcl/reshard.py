"""Another number of shards, offline: the snapshots of N shards become the first snapshots of M.

What belongs to a partition follows it (partition p goes to shard p % M), the rest goes with its shard:

| part | where it goes |
|---|---|
| positions, tickets, orphans, closed ids, alarms, newest event times | to the shard that now holds their partition |
| watermark | the least of those it is made from: no window closes before its labels could come |
| model, optimiser, replay memory, metrics, signals | from the old shard that held most of the new one's partitions |
| states of keys (a recurrent model's) | with the model: those of its shard's keys go on, the other keys begin anew |
| rounds of a group | nowhere: a group of another size has not met yet |
| number of the newest outcome | the highest of all: a topic of outcomes may have had another shard's before |
| records, counts, learned hash | old shard i's are added to new shard i % M, so that their sums stay what they were |

So no event is lost or learned twice, and the sum of the learned hashes is the hash of all that was ever learned. What
is *not* kept is what the models of the other shards knew: when two shards become one, one model and its replay memory
go on, and the rows of the other memory are never replayed again. When one becomes two, both begin as copies of it.
Waiting tickets keep the scores that were served. What the new partitions of a grown topic hold is read from its start;
but a producer that hashes keys over more partitions sends some labels elsewhere than their events went: those events
expire without them, unless the labels had all come before the topic grew.

In order, so that a crash at any point can be answered by the same command again:

1. Read every old shard's newest snapshot. Refused: one that is missing, not clean, or not the end of its control log.
2. Claim the old shards: refused while a worker lives. Open their control logs, which fences a frozen one; look again.
3. Write the new shards' snapshots, behind whatever their control logs hold.
4. Write each old shard's state once more with the mark `resharded_to`: no worker starts from it any more.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from streamcl import connect
from streamcl.config import Config, ConfigError, changes
from streamcl.join import Joiner
from streamcl.progress import Counts, Progress
from streamcl.protocols import State, StreamclError
from streamcl.records import COMMANDS, Position, Stream, position_to_json
from streamcl.recovery import Keeper, lease_on, store_of
from streamcl.segments import Named
from streamcl.snapshot import Loaded
from streamcl.worker import build, keeps_order, logged


class ReshardError(StreamclError):
    """Why the shards stay as they are. The text names the shard, and the cure."""


@dataclass(frozen=True)
class Old:
    """A shard as it was left."""

    config: Config
    loaded: Loaded
    progress: Progress

    @property
    def index(self) -> int:
        return self.config.shard.index

    @property
    def end(self) -> int:
        """Of its control log."""
        return int(self.loaded.manifest["control_offset"])


@dataclass(frozen=True)
class New:
    """A shard as it is to begin. `fresh` are the streams that no old shard knew, with their first offsets."""

    config: Config
    state: State
    model_of: int
    fresh: Position
    waiting: int

    def describe(self) -> dict[str, Any]:
        progress = self.state["progress"]
        return {
            "shard": self.config.shard.index,
            "model_of": self.model_of,
            "position": progress["position"],
            "new_partitions": position_to_json(self.fresh),
            "records": progress["records"],
            "learned_hash": progress["learned"],
            "tickets": self.waiting,
        }


@dataclass(frozen=True)
class Plan:
    """What `carry_out` would do; nothing has been written or fenced yet."""

    olds: Sequence[Old]
    news: Sequence[New]

    def describe(self) -> dict[str, Any]:
        learned = sum(old.progress.learned for old in self.olds) % (1 << 128)
        return {
            "from": len(self.olds),
            "to": len(self.news),
            "records": sum(old.progress.records for old in self.olds),
            "learned_hash": f"{learned:032x}",
            "shards": [new.describe() for new in self.news],
        }


def plan(config: Config, old: int, new: int) -> Plan:
    """Look at everything, change nothing.

    Raises:
        ReshardError: an old shard is not at rest, or a new one would not fit.
        ConfigError: the config differs from the snapshots' in what means other state.
        ConnectorError: more shards than partitions, offsets that are gone, brokers away.
    """
    if old != new:
        for index in range(new):
            _free(config.of_shard(index, new))
    olds = [_old(config.of_shard(index, old)) for index in range(old)]
    for each in olds:
        _at_rest(each)
    taken: dict[Stream, int] = {stream: o for each in olds for stream, o in each.progress.position.items()}
    positions = [_positions(config.of_shard(index, new), taken) for index in range(new)]
    lost = sorted(taken.keys() - {stream for position in positions for stream in position})
    if lost:
        raise ReshardError(f"{lost[0].input} partition {lost[0].partition} has a position, but is there no more")
    return Plan(olds, list(_news(config, olds, positions)))


def carry_out(plan: Plan) -> None:
    """Fence, write the new snapshots, and mark the old ones.

    Raises:
        Held: a worker of an old shard lives.
        StreamclError: as `plan` does.
    """
    with ExitStack() as leases:
        for old in plan.olds:
            lease = lease_on(store_of(old.config), old.config.checkpoint.lease_s)
            leases.callback(lease.release)
            lease.claim()  # before the fence, which would end a worker that lives
        for old in plan.olds:
            _fence(old)
        ends = {old.config.control_url: old.end for old in plan.olds}
        for new in plan.news:
            _begin(new, ends.get(new.config.control_url, 0), len(plan.olds))
        for old in plan.olds if len(plan.olds) != len(plan.news) else ():
            marked = {**old.loaded.manifest, "resharded_to": len(plan.news)}
            store_of(old.config).save(old.loaded.state, marked)


def _begin(new: New, control_offset: int, old_count: int) -> None:
    """Write a new shard's first snapshot, behind what its control log holds from `control_offset` on."""
    with closing(build(new.config)) as worker:
        keeper = Keeper(worker, store_of(new.config))
        worker.joiner.keep_in(keeper.store.chunks)
        worker.load_state_dict(new.state)
        keeper.lease.claim()
        try:
            if worker.control:
                worker.control.open()
                worker.control_offset = control_offset
                for end, _ in worker.control.read(control_offset):
                    worker.control_offset = end
            keeper.store.save(worker.state_dict(), keeper.manifest(clean=True) | {"resharded_from": old_count})
        finally:
            keeper.close()


def _old(config: Config) -> Old:
    store, shard = store_of(config), config.shard
    loaded = store.newest()
    if loaded is None:
        raise ReshardError(f"{store.folder}: no snapshot of shard {shard.index} of {shard.count}; is --from right?")
    if not loaded.manifest["clean"]:
        raise ReshardError(
            f"{store.folder}: the newest snapshot, {loaded.snapshot.name}, is not that of a clean stop: start shard"
            f" {shard.index} of {shard.count} and stop it with SIGTERM"
        )
    other = [path for path, change in changes(loaded.manifest["config"], config) if change == "new"]
    if other:
        raise ConfigError(f"{store.folder}: {', '.join(other)} changed since the snapshot was written; change back")
    progress = Progress()
    progress.load_state_dict(loaded.state["progress"])
    return Old(config, loaded, progress)


def _at_rest(old: Old) -> None:
    """Refuse a control log that goes on behind the snapshot."""
    if not keeps_order(old.config, list(old.progress.position)):
        return
    with closing(connect.open_control(old.config)) as control:
        if next(logged(control, old.end), None) is not None:
            raise ReshardError(
                f"{old.config.control_url} goes on behind the newest snapshot of shard {old.index} of"
                f" {old.config.shard.count}: a worker has run since, or still runs; start it and stop it cleanly"
            )


def _fence(old: Old) -> None:
    if not keeps_order(old.config, list(old.progress.position)):
        return
    with closing(connect.open_control(old.config)) as control:
        control.open()
    _at_rest(old)


def _free(config: Config) -> None:
    """A new shard's folder must not hold what a worker has learned."""
    store = store_of(config)
    newest = store.newest()
    known = ("resharded_from", "resharded_to")
    if newest and not any(name in newest.manifest for name in known) and newest.manifest["config"]["shard"]:
        raise ReshardError(
            f"{store.folder} holds {newest.snapshot.name}, which a worker wrote: that shard runs already"
        )


def _positions(config: Config, taken: Position) -> dict[Stream, int]:
    """Of a new shard. Streams that nobody has read yet begin at the start of their log."""
    first = config.model_copy(update={"kafka": config.kafka.model_copy(update={"start_at": "earliest"})})
    with closing(connect.open_source(first)) as source:
        found = dict(source.seek({stream: taken[stream] for stream in source.streams() if stream in taken}))
        lag = source.lag()
        # One went to the partitions of the old shards, not to all of the new ones'.
        if any(lag[stream] for stream in found if stream.input == COMMANDS and stream in taken):
            raise ReshardError(f"{config.commands}: a command waits; start the workers, which obey it, and stop them")
        return found


def _news(config: Config, olds: Sequence[Old], positions: Sequence[dict[Stream, int]]) -> Iterator[New]:
    count = len(positions)
    holder = {stream: old for old in olds for stream in old.progress.position}
    joiners = _joiners(config, olds, count)
    for index, position in enumerate(positions):
        votes = Counter(holder[stream].index for stream in position if stream in holder)
        most = min(votes, key=lambda old: (-votes[old], old)) if votes else index % len(olds)
        heirs_of = [old for old in olds if old.index % count == index]
        sums = _sums(heirs_of, position, olds)
        numbered = heirs_of if len(olds) == count else olds
        sums["progress"]["outcomes"] = max(old.progress.outcomes for old in numbered)
        state = {**olds[most].loaded.state, "joiner": joiners[index].state_dict(), **sums}
        state.pop("deltas", None)  # counted by an old shard's records: they begin anew
        state.pop("rounds", None)  # those of another group, which had others to meet
        fresh = {stream: offset for stream, offset in position.items() if stream not in holder}
        yield New(config.of_shard(index, count), state, most, fresh, joiners[index].waiting)


def _sums(heirs_of: Sequence[Old], position: dict[Stream, int], olds: Sequence[Old]) -> State:
    progress, counts = Progress(), Counts()
    progress.position = position
    published = {stream: offset for old in olds for stream, offset in old.progress.publish_from.items()}
    progress.publish_from = {stream: offset for stream, offset in published.items() if stream in position}
    for old in heirs_of:
        progress.records += old.progress.records
        progress.learned = (progress.learned + old.progress.learned) % (1 << 128)
        counts.update(old.loaded.state["counts"])
    return {"progress": progress.state_dict(), "counts": counts.state_dict()}


def _joiners(config: Config, olds: Sequence[Old], count: int) -> list[Joiner]:
    """What waits, by the partition that it came from. A recording's streams (below 0) stay with their shard's heir.

    What waits on disk is written anew, among the chunks of the new shard.
    """
    news = [Joiner(config.join, Counter()) for _ in range(count)]
    sources: list[list[Joiner]] = [[] for _ in range(count)]
    for index, new in enumerate(news):
        new.keep_in(store_of(config.of_shard(index, count)).chunks)
    for old in olds:
        joiner = Joiner(config.join, Counter())
        joiner.keep_in(store_of(old.config).chunks)
        joiner.load_state_dict(old.loaded.state["joiner"])
        homes = _deal(joiner, news, old.index)
        homes |= {stream.partition % count for stream in old.progress.position}
        for home in homes:
            sources[home].append(joiner)
    for new, made_of in zip(news, sources, strict=True):
        new.watermark.value = min((joiner.watermark.value for joiner in made_of), default=float("-inf"))
        heapq.heapify(new.alarms)
        if len(made_of) > 1:  # the order of coming decides who is dropped first when there are too many
            new.tickets = OrderedDict(sorted(new.tickets.items(), key=lambda item: (item[1].time_s, item[1].origin)))
        if new.waiting > config.join.max_tickets:
            raise ReshardError(f"join.max_tickets: a new shard would begin with {new.waiting}; raise it, or --to")
    return news


def _deal(old: Joiner, news: Sequence[Joiner], index: int) -> set[int]:
    """Hand everything in `old` to its new home; returns the homes."""
    homes: set[int] = set()

    def home(partition: int) -> int:
        found = (partition if partition >= 0 else index) % len(news)
        homes.add(found)
        return found

    home_of: dict[str, Joiner] = {}
    for ticket in old.tickets.values():
        home_of[ticket.id] = new = news[home(ticket.origin.partition)]
        new.tickets[ticket.id] = ticket
        if ticket.id in old.early:
            new.early.add(ticket.id)
    for label in old.orphans.values():
        home_of[label.id] = new = news[home(label.origin.partition)]
        new.orphans[label.id] = label
    for id, closed in old.closed.items():
        new = news[home(closed.origin.partition)]
        new.closed[id] = closed
        if id in old.kept:
            new.kept[id] = old.kept[id]
    for entry in old.alarms:
        news[home(entry[1].partition)].alarms.append(entry)
    for stream, time_s in old.watermark.newest.items():
        news[home(stream.partition)].watermark.newest[stream] = time_s
    for shelf in old.archive.in_order():
        rows: dict[int, list[tuple[Named, int]]] = {}
        for status, row in old.archive.rows(shelf):
            place = home(row.origin.partition)
            rows.setdefault(place, []).append((row.entry(), status))
            home_of.update({row.id: news[place]} if row.id in old.observed else {})
        for place, found in rows.items():
            news[place].archive.add([entry for entry, _ in found], [status for _, status in found])
    for id, observed in old.observed.items():
        home_of[id].observed[id] = observed
    return homes
