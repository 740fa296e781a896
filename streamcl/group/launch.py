"""A process that `torchrun` has started: which shards are its own, and where it listens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from streamcl.config import Config, ConfigError


def of_rank(config: Config, history: bool = False, environment: Mapping[str, str] = os.environ) -> Config:
    """The config of this process, by RANK, WORLD_SIZE and LOCAL_RANK; as it was without them, and for a group of one.

    Rank k of N has shard k of N. Where nothing is merged there may be more shards: it has those with index % N == k.
    Ports of processes on one machine follow one another, from the configured ones on.

    Args:
        history: It is to learn from a recorded history first.

    Raises:
        ConfigError: the shards can't be dealt to the ranks, or what is configured can't be shared by a group.
    """
    rank, world = (int(environment.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world == 1:
        return config
    shard, alone = config.shard, config.group.merge == "none"
    count = world if shard.count == 1 else shard.count
    if shard.assignment == "group" or shard.indices is not None:
        raise ConfigError("shard: torchrun hands out the shards; leave out indices (--shards) and assignment")
    if count < world or (count != world and not alone):
        raise ConfigError(f"shard.count is {count}, and there are {world} ranks: each has a shard of its own")
    if not alone:
        _mergeable(config, history)
    indices = list(range(rank, count, world))
    data, local = config.model_dump(mode="json"), int(environment.get("LOCAL_RANK", "0"))
    changed: dict[str, Any] = {
        "shard": {**data["shard"], "count": count, "index": rank, "indices": indices if len(indices) > 1 else None}
    }
    for table in ("telemetry", "serve"):
        port = data[table]["port"]
        changed[table] = {**data[table], "port": port + local if port else 0}
    return Config.parse({**data, **changed}, "torchrun")


def _mergeable(config: Config, history: bool) -> None:
    if config.river is not None:
        raise ConfigError("group.merge: a River model has no weights that could be merged; set none")
    if config.deltas.url:
        raise ConfigError("group.merge: deltas don't carry what is merged; leave deltas.url out, or set none")
    if history:
        raise ConfigError("group.merge: every shard would learn the same history; leave --history out, or set none")
