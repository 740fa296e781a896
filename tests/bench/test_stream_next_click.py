from pathlib import Path

import numpy as np
import pytest

from streamcl.bench import run
from streamcl.bench.next_click_events import examples_of, ranked, ranking_of
from streamcl.bench.next_click_neighbours import Said
from streamcl.bench.options import Options
from streamcl.bench.quality import auc
from streamcl.bench.stream_next_click import BLOCKS, FEATURES, POWERS, SETTINGS, ahead, judge, ours, power_of
from streamcl.bench.streams import DataError
from streamcl.state import digest
from tests.bench.next_click_data import made, write
from tests.bench.test_report import assert_contract

SMALL = {
    **SETTINGS,
    "features": {
        name: {**each, "table": {**each["table"], "max_rows": 1 << 14}} if "table" in each else each
        for name, each in FEATURES.items()
    },
}
CLICKS = made(4000)
EXAMPLES = examples_of(CLICKS, history=2000)
RANKING = ranking_of(CLICKS, EXAMPLES, every=20)


def test_ours_learns_and_being_asked_to_rank_changes_no_score() -> None:
    asked, unasked = (ours("x", SMALL, EXAMPLES, some, 0) for some in (RANKING, RANKING.first(0)))
    assert (asked.scores == unasked.scores).all()
    assert auc(EXAMPLES.labels, asked.scores.ravel()) > 0.7
    assert np.isfinite(asked.ranks).all()
    assert len(np.unique(asked.ranks)) > len(asked.ranks)


def test_no_score_of_a_click_knows_which_was_clicked() -> None:
    count = 300
    told = EXAMPLES.first(count)
    place = told.place.copy()
    place[-1] = (place[-1] + 1) % told.shown.shape[1]
    other = type(told)(told.step, told.session, told.recent, told.shown, place)
    one, another = (ours("x", SMALL, each, RANKING.first(0), 0) for each in (told, other))
    assert digest({"s": one.scores}) == digest({"s": another.scores})


def said(scores: np.ndarray, ranks: np.ndarray) -> Said:
    return Said("x", scores, ranks, 1.0)


def test_who_is_ahead_everywhere_is_ahead_by_more_than_chance() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=EXAMPLES.shown.shape)
    clicked = EXAMPLES.labels.reshape(EXAMPLES.shown.shape)
    ranks = rng.normal(size=RANKING.candidates.shape)
    ranks[:, 0] += 2.0
    better, worse = said(noise + 2.0 * clicked, ranks), said(noise + clicked, ranks - np.eye(1, ranks.shape[1]))
    judged = [judge(each, EXAMPLES, RANKING) for each in (better, worse)]
    assert len(judged[0].blocks["auc"]) == BLOCKS
    found = ahead([judged[0]], judged[1])
    back = ahead([judged[1]], judged[0])
    for name in ("auc", "recall_20", "mrr_20"):
        assert found[name] > 2 * found[f"{name}_se"] > 0
        assert back[name] == -found[name]
    same = ahead([judged[0]], judged[0])
    assert not any(same.values())


def test_popularity_counts_as_much_as_was_best_on_the_first_fifth() -> None:
    logits = np.random.default_rng(0).normal(size=RANKING.candidates.shape)
    logits -= 0.5 * np.log1p(RANKING.clicks)
    logits[:, 0] += 2.0
    scores = said(np.zeros(EXAMPLES.shown.shape), logits)
    first = len(RANKING.example) // 5
    best = {power: sum(ranked(logits[:first] + power * np.log1p(RANKING.clicks[:first])).values()) for power in POWERS}
    assert best[power_of(scores, RANKING)] == max(best.values()) > best[0.0]
    power = power_of(scores, RANKING)
    assert judge(scores, EXAMPLES, RANKING).whole.items() >= ranked(logits + power * np.log1p(RANKING.clicks)).items()


def test_everybody_is_measured_on_the_same_clicks(tmp_path: Path) -> None:
    write(made(3000), tmp_path)
    report = run("stream", Options(quick=True, task="next-click", data=tmp_path, events=3000))
    assert_contract(report.to_json())
    names = [row.name for row in report.rows if not row.table]
    assert names[:3] == ["streamcl, seed 0", "popularity by recency", "item-kNN, power 0.25"]
    assert len({row.values["events"] for row in report.rows if not row.table}) == 1
    assert {bar.name.split()[0] for bar in report.bars} == {"auc"}
    assert len(report.bars) == len(names) - 1


def test_the_folder_of_the_clicks_has_to_be_named() -> None:
    with pytest.raises(DataError, match="--data DIR"):
        run("stream", Options(task="next-click"))
