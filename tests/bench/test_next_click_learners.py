import numpy as np
import pytest

from streamcl.bench.next_click_events import examples_of, payloads, ranking_of
from streamcl.bench.next_click_learners import ROWS, _columns, retrained, vowpal_wabbit, vw_line
from streamcl.bench.peers import vowpal_wabbit_installed
from streamcl.bench.quality import auc
from tests.bench.next_click_data import made

CLICKS = made(6000)
EXAMPLES = examples_of(CLICKS, history=2000)
RANKING = ranking_of(CLICKS, EXAMPLES, every=20)


def test_a_line_of_vw_holds_every_field() -> None:
    payload = payloads(EXAMPLES, 0, np.array([3], np.int32))[0]
    line = vw_line({**payload, "prev": 7, "seen": [7, 5], "again": 0, "pair": "3~7", "pairs": ["3~7", "3~5"]}, "-1 ")
    assert line == "-1 |i 3 |p 7 |a 0 |x 3~7 |s 7 5 |w 3~7 3~5 "


@pytest.mark.skipif(not vowpal_wabbit_installed(), reason="vowpalwabbit is not installed")
def test_vw_learns_and_being_asked_to_rank_changes_no_score() -> None:
    first = EXAMPLES.first(600)
    asked, unasked = (
        vowpal_wabbit("vw", first, some, "--ftrl -q ip") for some in (RANKING.first(600), RANKING.first(0))
    )
    assert (asked.scores == unasked.scores).all()
    assert auc(first.labels, asked.scores.ravel()) > 0.6
    assert (asked.ranks != 0).any()


def test_the_net_reads_what_the_others_are_told() -> None:
    recent = np.zeros((1, 10), np.int32)
    recent[0, :2] = 7, 5
    rows = _columns(recent, np.array([[5, 9]], np.int32)).numpy()
    assert rows[:, :5].tolist() == [[2, 5, 7, 5, 0], [0, 9, 7, 5, 0]]
    pairs = rows[:, 5:]
    assert (pairs[:, 2] == 0).all()
    assert ((pairs[:, :2] > 0) & (pairs[:, :2] < ROWS)).all()
    other = _columns(recent[:, ::-1].copy(), np.array([[5, 9]], np.int32)).numpy()
    assert not other[:, 5:].any()
    swapped = np.zeros((1, 10), np.int32)
    swapped[0, 0] = 9
    assert _columns(swapped, np.array([[7]], np.int32)).numpy()[0, 5] == pairs[1, 0]  # either comes first


@pytest.mark.parametrize("warm", [False, True])
def test_a_period_is_scored_by_what_came_before_it_alone(warm: bool) -> None:
    second = int(np.searchsorted(EXAMPLES.step, CLICKS.starts[1]))
    shorter = EXAMPLES.first(second + 200)
    whole, cut = (
        retrained("x", CLICKS, each, RANKING.first(len(each)), periods=1, warm=warm, epochs=8, rate=0.01)
        for each in (EXAMPLES, shorter)
    )
    assert (whole.scores[:second] == 0.5).all()
    assert np.allclose(whole.scores[: len(shorter)], cut.scores, atol=1e-6)
    width = EXAMPLES.shown.shape[1]
    assert auc(EXAMPLES.labels[width * second :], whole.scores[second:].ravel()) > 0.6
