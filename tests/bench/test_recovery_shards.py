"""Shards under fire: what is drawn for them. The run itself is `streamcl bench recovery --task shards`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamcl.bench.brokers import Broker
from streamcl.bench.options import Options
from streamcl.bench.recovery_shards import QUICK, Outcome, _bars, _configs, _runs, troubles
from streamcl.bench.recovery_verifier import Findings, learned_hash
from streamcl.config import Config


def test_every_team_meets_every_kind_and_the_seed_decides() -> None:
    drawn = troubles(0, 30)
    assert drawn == troubles(0, 30) != troubles(1, 30)
    assert sorted(size for size, _ in drawn) == [2, 3, 4]
    assert all(trouble.slot < size for size, piece in drawn for trouble in piece)
    kinds = Counter(trouble.kind for _, piece in drawn for trouble in piece)
    assert kinds == {"kill": 10, "term": 10, "freeze": 10}


def test_few_troubles_are_for_one_team_of_two() -> None:
    [(size, piece)] = troubles(0, 3)
    assert size == 2
    assert {trouble.kind for trouble in piece} == {"kill", "term", "freeze"}


def test_a_quick_run_has_both_assignments_and_both_methods_a_full_one_all_four() -> None:
    assert list(_runs(Options(quick=True), [0])) == [("static", "exactly_once", 0), ("group", "at_least_once", 0)]
    assert len(list(_runs(Options(), [0]))) == 4
    assert list(_runs(Options(method="exactly_once"), [0, 1]))[1:3] == [
        ("static", "exactly_once", 1),
        ("group", "exactly_once", 0),
    ]


def test_the_last_worker_takes_all_shards_by_itself_whoever_handed_them_out_before(tmp_path: Path) -> None:
    names = {"events": "e", "predictions": "p", "dead_letters": "d"}
    broker = Broker("given", "kafka://localhost:1")
    team, last = map(Config.load, _configs(broker, tmp_path, names, "n", "group", "exactly_once"))
    assert (team.shard.assignment, last.shard.assignment) == ("group", "static")
    assert team.checkpoint.folder == last.checkpoint.folder
    assert team.events.label == "clicked"


@pytest.mark.parametrize(
    ("ran", "gave_way", "missed"),
    [
        ({"learned_hash": learned_hash(["events:0:0"])}, 1, "static: learned"),
        ({"learned_hash": learned_hash(["events:0:0", "events:0:1"])}, 0, "static: frozen workers that gave way"),
    ],
)
def test_one_event_too_few_and_one_worker_that_goes_on_each_miss_a_bar(
    ran: Mapping[str, Any], gave_way: int, missed: str
) -> None:
    found = Findings(good={"events:0:0", "events:0:1"})
    for origin in found.good:
        found.answers[origin].append(os.urandom(4))
    outcome = Outcome({"kill": 2, "freeze": 1}, gave_way, ran, found, 0.0)
    bars = _bars("static", "exactly_once", Broker("apache", ""), outcome, (QUICK[0], 2))
    assert [bar.name for bar in bars if not bar.ok] == [missed]
