"""A shadow takes the place of the live shard that it has learned beside, or is dropped.

Both workers have stopped. In order, so that a crash at any point is answered by the same command:

1. The live shard is held and brought to the end of its log (see `streamcl.standing`), the shadow to the same place.
2. The shadow's state is written as the live shard's next snapshot, under the shadow's settings, with the number of the
   newest outcome and of the records that were the shard's. From here on it is the shard, which a worker with the
   former settings can't start any more.
3. The control log is told, so that a recovery from an older snapshot stops instead of going on with the old model.
   A death right before it leaves that to the settings alone, where they mean other state.
4. The shadow's own checkpoints are deleted.

Events that wait for their label in the live shard, and that came before the shadow began, would be lost: that is
refused, unless told otherwise.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from typing import Any

from streamcl.config import Config, ConfigError, changes
from streamcl.protocols import State, StreamclError
from streamcl.records import Order, position_from_json
from streamcl.recovery import Keeper, lease_on, store_of
from streamcl.shadow import Shadow, beside
from streamcl.snapshot import Snapshot
from streamcl.standing import standing
from streamcl.worker import Worker


def promote(live: Config, other: Config, accept_loss: bool = False, accept_changes: bool = False) -> dict[str, Any]:
    """Make the shadow of one shard the shard; returns what came of it.

    Raises:
        Held: the live worker, or the shadow's, lives.
        StreamclError: there is no shadow, or it can't take the shard's place without a loss.
    """
    config = beside(live, other)
    shadows = store_of(config).ls()
    if done := _promoted(store_of(live).ls(), shadows, other):
        drop(config)
        return _told(done)
    if not shadows:
        raise StreamclError(f"{store_of(config).folder}: there is no shadow to promote")
    untried = [path for path, change in changes(shadows[-1].manifest["config"], config) if change != "free"]
    if untried:
        raise ConfigError(f"{store_of(config).folder}: the shadow has not learned with this {', '.join(untried)}")
    with standing(live, accept_changes) as keeper, closing(Shadow.open(config, live)) as shadow:
        own = Keeper(shadow, store_of(config), beside=False)
        try:
            restored = own.restore()
            assert restored is not None  # noqa: S101 - there are some
            worker = keeper.worker
            for _ in shadow.follow(worker.control_offset, worker.progress.position):
                pass
            _refuse_loss(worker, shadow, accept_loss)
            saved = _take_place(keeper, own, other, restored.digest)
        finally:
            own.close()
    drop(config)
    return _told(saved)


def _promoted(lives: list[Snapshot], shadows: list[Snapshot], other: Config) -> Snapshot | None:
    """The live shard's newest snapshot, if this shadow has taken its place already, or did and is gone by now."""
    if not lives:
        return None
    newest, digests = lives[-1], {each.digest for each in shadows}
    promoted = [fact["shadow"] for fact in newest.manifest.get("lineage", ()) if fact["kind"] == "promoted"]
    if shadows:
        return newest if digests.intersection(promoted) else None
    same = all(change == "free" for _, change in changes(newest.manifest["config"], other))
    return newest if promoted and same else None


def _refuse_loss(worker: Worker, shadow: Shadow, accepted: bool) -> None:
    begun = shadow.lineage.last("shadow") or {}
    if begun.get("begun") == "state":
        return
    first = position_from_json(begun.get("position", {}))
    unknown = sum(origin.offset < first.get(origin.stream, 0) for origin in worker.joiner.origins())
    if unknown and not accepted:
        raise StreamclError(
            f"{unknown} events wait for their label that came before the shadow began, and would be lost: let it "
            "learn for join.attribution_window_s more, or pass --accept-loss"
        )


def _take_place(keeper: Keeper, own: Keeper, other: Config, digest: str) -> Snapshot:
    worker, shadow = keeper.worker, own.worker
    shadow.lineage.add("promoted", records=worker.progress.records, shadow=digest)
    state: State = shadow.state_dict()
    now = worker.progress.state_dict()
    # What is numbered by them goes on; what has been learned is what this state has learned.
    state["progress"] = {**now, "learned": state["progress"]["learned"]}
    manifest = own.manifest(clean=False) | {  # not clean: other settings than its own would not repeat what follows
        "name": other.name,
        "records": worker.progress.records,
        "position": now["position"],
        "control_offset": worker.control_offset,
        "epoch": keeper.lease.epoch,
        "forgotten": [],
        "forgets": worker.counts["forget_requests"],
        "config": other.of_shard(worker.config.shard.index).model_dump(mode="json"),
    }
    saved = keeper.store.save(state, manifest)
    if worker.control:
        worker.control.append(Order((), dict(worker.progress.position), promoted=digest))
    return saved


def _told(saved: Snapshot) -> dict[str, Any]:
    told = saved.manifest
    return {"snapshot": saved.name, "records": told["records"], "position": told["position"], "digest": saved.digest}


def drop(config: Config) -> bool:
    """Delete a shadow's checkpoints; False when there are none. Raises Held while it lives."""
    store = store_of(config)
    grave, there = store.folder.with_name(f".{store.folder.name}.dropped"), store.folder.exists()
    if there:
        lease = lease_on(store, config.checkpoint.lease_s)
        lease.claim()
        lease.release()
    try:
        if grave.exists():
            shutil.rmtree(grave)
        if there:  # at once: half of its snapshots would be another shadow
            store.folder.rename(grave)
            shutil.rmtree(grave)
    except OSError as error:
        raise StreamclError(f"{store.folder}: can't be deleted: {error}") from error
    return there
