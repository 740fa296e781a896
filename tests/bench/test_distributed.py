"""The bench of groups: its ranks are what the worker is, and what it reckons follows from its formula."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamcl.bench import distributed, distributed_model
from streamcl.bench.distributed_group import parts_of, run
from streamcl.bench.distributed_model import Measured, predict, touched
from streamcl.bench.drive import Topic
from streamcl.bench.options import Options
from streamcl.bench.streams import Dataset, synthetic
from streamcl.config import Config
from tests.bench import next_click_data

MEASURED = Measured(
    event_s=1e-4,
    say_s=1e-9,
    hear_s=2e-9,
    dense_bytes=1e5,
    row_bytes=100.0,
    held_bytes=200.0,
    reads=5.0,
    alpha_s=1e-4,
    beta=1e8,
)


def data() -> Dataset:
    return synthetic("stationary", 400, 0)


def config(made: Dataset, **group: object) -> Config:
    events = {"url": "memory://b/e", "time": "time", "label": "label", "key": "f0"}
    return Config.parse({"name": "b", "events": events, "features": made.features, "group": group}, "bench")


def test_one_rank_says_what_the_worker_says() -> None:
    made = data()
    alone = run("one", config(made), [[payload] for payload in made.payloads], 1)
    assert alone.rounds == alone.said_bytes == 0
    np.testing.assert_array_equal(alone.trace.scores, Topic(made).run("worker", {}).scores)


def test_a_groups_run_is_repeatable_and_learns_from_all_ranks() -> None:
    made = data()
    stream = [[payload] for payload in made.payloads]
    settings = config(made, round_events=20)
    first, second = (run("group", settings, stream, 3) for _ in range(2))
    np.testing.assert_array_equal(first.trace.scores, second.trace.scores)
    assert first.said_bytes == second.said_bytes > 0 and first.divergences == second.divergences
    assert first.rounds == max(-(-len(part) // 20) for part in parts_of(stream, "f0", 3))
    apart = run("apart", config(made, round_events=20, merge="none"), stream, 3)
    assert (apart.trace.scores != first.trace.scores).any()


def test_all_events_of_one_key_go_to_one_rank_in_order() -> None:
    stream = [[payload] for payload in data().payloads]
    parts = parts_of(stream, "f0", 3)
    assert sorted(itertools.chain(*parts)) == list(range(len(stream))) and all(part == sorted(part) for part in parts)
    owners = [{stream[place][0]["f0"] for place in part} for part in parts]
    assert not owners[0] & owners[1] and not owners[1] & owners[2] and not owners[0] & owners[2]


def test_the_bench_measures_against_one_learner(tmp_path: Path) -> None:
    next_click_data.write(next_click_data.made(4000), tmp_path)
    found = distributed.run(Options(data=tmp_path, stream="yoochoose", events=4000, quick=True))
    one, two = found.rows
    assert one.values["auc_loss"] == 0.0 and one.values["rounds"] == 0
    assert int(str(two.values["rounds"])) > 1 and float(str(two.values["bytes_per_event"])) > 0.0
    assert [bar.name for bar in found.bars] == ["auc loss, yoochoose, 2 ranks"]
    assert found.bars[0].value == two.values["auc_loss"]


@pytest.mark.parametrize("rows", [10, 1000, 5000, 200_000])
@pytest.mark.parametrize("reads", [1.0, 100.0, 10_000.0])
def test_touched_rows_are_those_of_zipfs_law(rows: int, reads: float) -> None:
    """Against the sum, term by term; the integral is good to a thousandth."""
    harmonic = (1.0 / np.arange(1, rows + 1)).sum()
    exact = (1.0 - (1.0 - 1.0 / (np.arange(1, rows + 1) * harmonic)) ** reads).sum()
    assert touched(reads, rows) == pytest.approx(exact, rel=0.02)


def test_a_prediction_follows_from_its_parts() -> None:
    one = predict(MEASURED, 1, 10**6, 1000)
    assert one.events_per_s == pytest.approx(1e4) and one.speed_up == pytest.approx(1.0)
    assert one.bytes_per_event == one.sent_bytes_per_s == 0.0
    said = 1e5 + 100.0 * touched(5000.0, 10**6)
    four = predict(MEASURED, 4, 10**6, 1000)
    took = 0.1 + said * 1e-9 + 3 * (1e-4 + said / 1e8) + 4 * said * 2e-9
    assert four.events_per_s == pytest.approx(4000 / took) and four.speed_up == pytest.approx(0.4 / took)
    assert four.bytes_per_event == pytest.approx(said / 1000)
    assert four.sent_bytes_per_s == pytest.approx(3 * said / took)
    slow = predict(MEASURED, 4, 10**6, 1000, rate=100.0)
    assert slow.events_per_s == 100.0 and slow.freshness_s > 10 * four.freshness_s


def test_a_heavier_step_or_a_longer_round_makes_a_group_worth_more() -> None:
    speed = predict(MEASURED, 4, 10**6, 1000).speed_up
    assert speed < predict(replace(MEASURED, event_s=1e-3), 4, 10**6, 1000).speed_up < 4.0
    assert speed < predict(MEASURED, 4, 10**6, 10_000).speed_up < 4.0


def test_what_is_reckoned_with_is_measured() -> None:
    found = distributed_model.measure(1200)
    assert 0.0 < found.event_s < 1.0 and found.beta > 0.0 and 0.0 <= found.alpha_s < 1.0
    assert found.reads == 3.0 and found.row_bytes == found.held_bytes / 2 + 16 and 0.0 < found.hear_s < 1e-3
