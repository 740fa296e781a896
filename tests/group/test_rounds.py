"""What a group of ranks comes to: the same at every run, and after every death."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from connectors import memory
from streamcl.group.ranks import RankLost
from streamcl.protocols import StreamclError
from streamcl.recovery import Keeper, store_of
from streamcl.testing import learned_hash
from streamcl.records import Origin
from streamcl.worker import build
from tests.group.lives import Died, closed, digests, ended, group, live, produce, watched
from tests.journey import BROKER


def test_rounds_close_behind_their_count_and_short_at_the_end(tmp_path: Path) -> None:
    produce([12, 7])
    keepers = ended(group(tmp_path))
    config = keepers[0].worker.config
    assert closed(config, 0) == [(1, 5, False), (2, 10, False), (3, 12, True)]
    assert closed(config, 1) == [(1, 5, False), (2, 7, True), (3, 7, True)]


def test_ranks_meet_with_the_same_dense_weights(tmp_path: Path) -> None:
    produce([12, 7])
    weights = [[*k.worker.learner.engine.model.parameters()] for k in ended(group(tmp_path))]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@given(
    counts=st.lists(st.integers(0, 23), min_size=2, max_size=3),
    polls=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    measure=st.sampled_from([{"round_events": 4}, {"round_s": 3.5}, {"round_events": 50, "most_records": 3}]),
    mode=st.sampled_from(["at_least_once", "exactly_once"]),
)
@hypothesis_settings(max_examples=15, deadline=None)
def test_a_group_is_a_function_of_its_streams_however_they_are_polled(
    counts: list[int], polls: tuple[int, int], measure: dict[str, float], mode: str
) -> None:
    found = []
    for most in polls:
        with tempfile.TemporaryDirectory() as folder:
            produce(counts)
            worker = {"max_records": most, "poll_timeout_s": 0.01}
            changes = {"group": measure, "delivery": {"mode": mode}, "worker": worker}
            found.append(digests(ended(group(Path(folder), len(counts), **changes))))
    assert found[0] == found[1]


def test_a_partition_without_records_holds_nobody_up(tmp_path: Path) -> None:
    produce([12, 0])
    keepers = ended(group(tmp_path))
    assert [keeper.worker.progress.records for keeper in keepers] == [12, 0]
    assert [number for number, _, _ in closed(keepers[0].worker.config, 1)] == [1, 2, 3]


def deaths(folder: Path, mode: str) -> list[tuple[int, str, str, int]]:
    """(rank, when, call, nth) of every call of a whole life."""
    made: Counter[tuple[int, str, str]] = Counter()

    def told(rank: int, when: str, call: str) -> None:
        made[rank, when, call] += 1

    produce([12, 7])
    ended(config_of(folder, mode), lambda rank, keeper: watched(rank, keeper, told))
    return [(*where, nth) for where, count in sorted(made.items()) for nth in range(count)]


def config_of(folder: Path, mode: str):  # type: ignore[no-untyped-def]
    return group(folder, delivery={"mode": mode}, checkpoint={"folder": str(folder), "every_events": 4, "lease_s": 0})


@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
def test_whoever_dies_wherever_the_group_goes_on_as_if_nobody_had(tmp_path: Path, mode: str) -> None:
    points = deaths(tmp_path / "counted", mode)
    undisturbed = digests(ended(config_of(tmp_path / "counted", mode)))
    for at, (dying, when, call, nth) in enumerate(points):
        folder, made = tmp_path / str(at), Counter[tuple[int, str, str]]()

        def told(rank: int, now: str, called: str) -> None:
            if (rank, now, called) == (dying, when, call):  # noqa: B023
                made[rank, now, called] += 1  # noqa: B023
                if made[rank, now, called] == nth + 1:  # noqa: B023
                    raise Died

        produce([12, 7])
        found = live(config_of(folder, mode), lambda rank, keeper: watched(rank, keeper, told))  # noqa: B023
        assert isinstance(found[dying], Died)
        with pytest.raises(memory.Crash):
            memory.broker(BROKER).die()
        keepers = ended(config_of(folder, mode))
        assert digests(keepers) == undisturbed, (dying, when, call, nth)
        _answered_once(mode)
        shutil.rmtree(folder)


def _answered_once(mode: str) -> None:
    answers: dict[str, list[bytes | None]] = {}
    for message in memory.broker(BROKER).messages("scores"):
        answers.setdefault(json.loads(message.value or b"")["id"], []).append(message.value)
    assert len(answers) == 19
    assert all(len(set(values)) == 1 for values in answers.values())
    if mode == "exactly_once":
        assert all(len(values) == 1 for values in answers.values())
