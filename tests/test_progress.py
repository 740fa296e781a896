"""Where a shard stands survives a round trip, and the learned hash depends on what was learned, not on the order."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.progress import Counts, Progress
from streamcl.protocols import ConnectorError
from streamcl.records import Origin, Stream

ORIGINS = st.lists(st.builds(Origin, st.sampled_from(["events", "labels"]), st.integers(0, 3), st.integers(0, 99)))


def learned(origins: list[Origin]) -> int:
    progress = Progress()
    for origin in origins:
        progress.learn([origin])
    return progress.learned


@given(ORIGINS, st.randoms(use_true_random=False))
def test_the_learned_hash_knows_no_order_but_every_repetition(origins: list[Origin], random: Random) -> None:
    shuffled = origins[:]
    random.shuffle(shuffled)
    assert learned(shuffled) == learned(origins)
    assert all(learned([*origins, origin]) != learned(origins) for origin in origins)


def test_progress_and_counts_survive_a_round_trip_through_json() -> None:
    progress, counts = Progress(), Counts({"learned": 2, "dead_letter": 1})
    progress.publish_from = {Stream("events", 1): 5}
    for offset in (3, 4, 9):
        progress.advance(Stream("events", 1), offset)
        progress.learn([Origin("events", 1, offset)])
    same, again = Progress(), Counts({"left": 1})
    same.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    again.load_state_dict(json.loads(json.dumps(counts.state_dict())))
    assert vars(same) == vars(progress)
    assert again == counts


def test_what_stands_before_the_handover_is_history_and_not_published() -> None:
    progress = Progress()
    progress.publish_from = {Stream("events", 0): 2}
    assert progress.bootstrapping()
    progress.advance(Stream("events", 0), 1)
    assert not progress.bootstrapping()
    assert [progress.published(Origin("events", 0, offset)) for offset in (1, 2)] == [False, True]
    assert progress.published(Origin("events", 1, 0))


def test_a_record_that_comes_again_is_an_error() -> None:
    progress = Progress()
    progress.advance(Stream("events", 0), 1)
    with pytest.raises(ConnectorError, match="events:0:1 was delivered again; expected offset 2"):
        progress.advance(Stream("events", 0), 1)
    assert progress.records == 1
