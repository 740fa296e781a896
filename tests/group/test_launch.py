"""What `torchrun` says, and what it makes of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamcl.config import Config, ConfigError
from streamcl.group.launch import of_rank
from tests.journey import settings


def placed(folder: Path, rank: int, world: int, local: int = 0, **changes: Any) -> Config:
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}
    return of_rank(settings(folder, **changes), environment=environment)


def test_rank_k_of_n_has_shard_k_of_n(tmp_path: Path) -> None:
    assert placed(tmp_path, 2, 4).shard.here == (2,)
    assert placed(tmp_path, 2, 4).shard.count == 4
    assert placed(tmp_path, 2, 4, shard={"count": 4}).shard.here == (2,)


def test_without_ranks_or_with_one_a_config_stays_as_it_is(tmp_path: Path) -> None:
    config = settings(tmp_path, shard={"count": 3, "index": 1})
    assert of_rank(config, environment={}) is config
    assert of_rank(config, environment={"RANK": "0", "WORLD_SIZE": "1"}) is config


def test_where_nothing_is_merged_a_rank_may_have_several_shards(tmp_path: Path) -> None:
    config = placed(tmp_path, 1, 2, shard={"count": 5}, group={"merge": "none"})
    assert config.shard.here == (1, 3)


def test_ports_of_ranks_on_one_machine_follow_one_another(tmp_path: Path) -> None:
    config = placed(tmp_path, 5, 8, local=1, telemetry={"port": 9000}, serve={"port": 0})
    assert (config.telemetry.port, config.serve.port) == (9001, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shard": {"count": 3}}, "there are 2 ranks"),
        ({"shard": {"count": 2, "indices": [0, 1]}}, "torchrun hands out the shards"),
        ({"shard": {"count": 2, "assignment": "group"}}, "torchrun hands out the shards"),
        ({"deltas": {"url": "memory://journey/deltas"}}, "deltas.url"),
        ({"river": "module:model", "trust_pickle": True}, "River"),
    ],
)
def test_what_a_group_can_not_share_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(tmp_path, 0, 2, **changes)


def test_a_group_does_not_learn_a_recorded_history(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--history"):
        of_rank(settings(tmp_path), history=True, environment={"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"round_events": 5, "round_s": 5.0}, "set one of the two"),
        ({"merge": "gradient", "round_events": 5}, "behind every event"),
        ({"merge": "gradient", "round_s": 5.0}, "behind every event"),
    ],
)
def test_rounds_have_one_measure(tmp_path: Path, group: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, group=group)


def test_a_round_is_of_a_hundred_events_and_ten_times_as_many_records_unless_told(tmp_path: Path) -> None:
    group = settings(tmp_path).group
    assert (group.learned, group.most) == (100, 1000)
    group = settings(tmp_path, group={"round_s": 60.0}).group
    assert (group.learned, group.most) == (None, None)
    assert settings(tmp_path, group={"merge": "gradient"}).group.learned == 1
