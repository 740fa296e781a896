"""Snapshots of a group: those that its ranks cut at one meeting, and the newest of which every rank has its own.

All ranks cut at the same meetings, each its own shard in its own time, beside learning. A group's snapshot is
*complete* once every rank's part is durable, which the ranks tell each other when they meet next; only then is a
manifest written that names them all, and only then may older ones go. What is complete at a start is asked anew, of
what every rank can read then: a manifest may be as old, or its machine as dead, as anything else. Parts fit together if
they bear the same seal (see `streamcl.group.rounds`), which a round that was met at other positions does not have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from streamcl.checkpoint import Store
from streamcl.chunks import sync
from streamcl.config import Config, ConfigError
from streamcl.group.ranks import Ranks
from streamcl.group.rounds import BEGUN
from streamcl.protocols import StreamclError
from streamcl.remote import Remote
from streamcl.snapshot import Loaded, Snapshot

log = logging.getLogger(__name__)

Meeting = tuple[int, str]
"""A round's number and seal. A shard's snapshots from before it was a rank are of the meeting that never was."""


def meeting_of(snapshot: Snapshot) -> Meeting:
    return int(snapshot.manifest.get("round", 0)), str(snapshot.manifest.get("seal", BEGUN))


def refuse_group(snapshot: Snapshot) -> None:
    """For who would change one shard, or look on: a rank's model is the others' too. Raises ConfigError."""
    if "round" in snapshot.manifest:
        raise ConfigError(f"{snapshot.path}: this shard is a rank of a group, which has one model: it stays as it is")


def part_of(snapshot: Snapshot | None) -> dict[str, Any] | None:
    """What a rank tells the others of its newest snapshot."""
    if snapshot is None:
        return None
    number, seal = meeting_of(snapshot)
    told = {name: snapshot.manifest[name] for name in ("position", "control_offset", "records")}
    return {"round": number, "seal": seal, "snapshot": snapshot.name, "digest": snapshot.digest, **told}


def newest_common(ranks: Ranks, store: Store) -> Loaded | None:
    """This rank's part of the newest complete snapshot; collective. None where it has to begin afresh.

    A rank without any snapshot fits to others that have not met: it has died before its first one was written.

    Raises:
        StreamclError: there are snapshots, and none is complete.
    """
    mine: dict[Meeting, str] = {}  # newest first; of several of one meeting the newest
    for snapshot in reversed(store.everywhere()):
        mine.setdefault(meeting_of(snapshot), snapshot.name)
    empty = not mine
    while True:
        found = [[(int(n), str(seal)) for n, seal in each] for each in ranks.gather(list(mine))]
        if not any(found):
            return None  # whoever has had some refuses to begin without them
        common = set.intersection(*(set(each) if each else {(0, BEGUN)} for each in found))
        if not common:
            raise StreamclError(f"{store.folder}: no round of which every rank has a snapshot; {_told(found)}")
        best = min(common, key=next(each for each in found if each).index)  # all ranks look at the same one's order
        loaded = store.sound(mine[best]) if best in mine else None
        if all(ranks.gather(loaded is not None or empty)):
            return loaded
        mine.pop(best, None)


def _told(found: Sequence[Sequence[Meeting]]) -> str:
    return "; ".join(f"rank {rank} has rounds {[n for n, _ in each]}" for rank, each in enumerate(found))


def write(config: Config, parts: Sequence[Mapping[str, Any]]) -> None:
    """Put on record that a snapshot is complete: what each rank's part is called and where it stands, by rank.

    What can't be written is missed by nobody who recovers: it is for people, and for tools that copy snapshots.
    """
    name, number = f"{config.name}-group-of-{len(parts)}", int(parts[0]["round"])
    text = orjson.dumps({"name": config.name, "round": number, "seal": parts[0]["seal"], "ranks": list(parts)})
    folder, file = config.checkpoint.folder / name, f"{number:010d}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{file}"
        with unfinished.open("wb") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())
        unfinished.rename(folder / file)
        sync(folder)
        for old in sorted(folder.glob("*.json"))[: -config.checkpoint.retain]:
            old.unlink()
        if config.checkpoint.remote:
            Remote(f"{config.checkpoint.remote.rstrip('/')}/{name}").put("newest.json", text)
    except OSError as error:
        log.warning("%s: the group's manifest could not be written: %s", folder / file, error)
