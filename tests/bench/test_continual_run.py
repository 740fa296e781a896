from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from streamcl.bench.continual_anchors import ANCHORS
from streamcl.bench.continual_course import Course, Rows
from streamcl.bench.continual_recipes import RECIPES
from streamcl.bench.continual_run import Looks, Ours, Served, held_out_figures, measure
from streamcl.bench.continual_streams import STREAMS
from streamcl.metrics.continual import Trace
from tests.bench.continual_data import tiny_course


class Told:
    """Answers with what it is given; notes the order in which it is asked and told."""

    def __init__(self, served: NDArray[np.float64], answers: Iterator[NDArray[np.int64]] | None = None) -> None:
        self.served, self.answers = served, answers
        self.log: list[str] = []

    def predict(self, i: int) -> Served:
        self.log.append(f"predict {i}")
        return np.asarray(self.served[i], np.float32)

    def learn(self, i: int) -> None:
        self.log.append(f"learn {i}")

    def classify(self, segment: int) -> NDArray[np.int64]:
        assert self.answers is not None
        return next(self.answers)


def drifting(labels: list[float], delay: int = 0, start: int = 0) -> Course:
    chances = np.array([0.75 if label else 0.5 for label in labels])
    return Course(
        name="made",
        settings={},
        memory={},
        rows=Rows.of(labels),
        segments=np.zeros(len(labels), np.int64),
        delay=delay,
        chances=chances,
        drifts=(2,),
        near=2,
        start=start,
    )


def test_an_event_is_answered_before_its_label_comes_which_is_delay_events_later() -> None:
    contender = Told(np.full((4, 1), 0.5))
    measure(drifting([1.0, 0.0, 1.0, 0.0], delay=2), contender)
    assert contender.log == ["predict 0", "predict 1", "predict 2", "learn 0", "predict 3", "learn 1"]


def test_who_knows_the_true_probabilities_has_no_regret() -> None:
    course = drifting([1.0, 0.0, 1.0, 0.0])
    assert course.chances is not None
    figures = measure(course, Told(course.chances[:, None])).figures
    assert figures["regret"] == pytest.approx(0.0, abs=1e-9)
    assert figures["regret_after_drift"] == pytest.approx(0.0, abs=1e-9)


def test_regret_is_the_log_loss_above_that_of_the_true_probabilities_from_the_start_on() -> None:
    course = drifting([0.0, 0.0, 1.0, 1.0], start=2)
    figures = measure(course, Told(np.array([[0.9], [0.9], [0.5], [0.25]]))).figures
    assert figures["regret"] == pytest.approx((np.log(0.75 / 0.5) + np.log(0.75 / 0.25)) / 2)
    assert figures["accuracy"] == 50.0


def test_the_recommenders_bayes_predictor_has_no_regret() -> None:
    course = STREAMS["recommender"](None, 0, True)
    assert course.chances is not None
    assert measure(course, Told(course.chances[:, None])).figures["regret"] == pytest.approx(0.0, abs=1e-6)


def test_held_out_figures_are_those_of_the_definitions() -> None:
    looks = Looks(
        untrained=np.array([0.5, 0.0, 0.1]),
        events=np.array([5, 10, 15, 20, 30]),
        trace=Trace(
            np.array([[0.7, 0.0, 0.0], [0.9, 0.2, 0.0], [0.3, 0.6, 0.0], [0.6, 0.8, 0.4], [0.4, 0.7, 1.0]]),
            np.array([0, 0, 1, 1, 2]),
        ),
    )
    found = held_out_figures(looks, [1, 1, 2])
    assert found["final"] == pytest.approx((40 + 70 + 2 * 100) / 4)
    assert found["acc"] == pytest.approx((40 + 70 + 100) / 3)
    assert found["bwt"] == pytest.approx((40 - 90 + 70 - 80) / 2)
    assert found["fwt"] == pytest.approx((20 - 0 + 40 - 10) / 2)
    assert found["min_acc"] == pytest.approx((30 + 70) / 2)


def test_the_product_learns_the_tiny_stream_and_without_memory_forgets_it() -> None:
    course = tiny_course(0)
    memory, none = (measure(course, Ours(course, RECIPES[name], 0)) for name in ("balanced", "no memory"))
    assert memory.figures["final"] > 40.0  # who knows nothing but the last two classes is right in 20
    assert none.figures["final"] < 30.0
    assert memory.figures["min_acc"] > none.figures["min_acc"]
    assert memory.figures["final"] == pytest.approx(memory.curve[1][-1], abs=2.0)  # segments of about equal size


def test_a_run_is_the_same_twice() -> None:
    course = tiny_course(1)
    runs = [measure(course, Ours(course, RECIPES["reservoir"], 1)) for _ in range(2)]
    one, two = ({name: value for name, value in run.figures.items() if name != "ms_per_event"} for run in runs)
    assert one == two


def test_a_look_stands_at_the_end_of_each_segment() -> None:
    course = tiny_course(0)
    run = measure(course, Ours(course, RECIPES["no memory"], 0))
    ends = set((np.flatnonzero(np.diff(course.segments)) + 1).tolist())
    assert ends <= set(run.curve[0].tolist())
    assert run.curve[0][-1] == len(course.rows)


def test_a_constant_says_the_rate_and_the_click_rate_follows_the_item() -> None:
    course = STREAMS["recommender"](None, 0, True)
    constant, rate = (measure(course, ANCHORS[name](course, 0)).figures for name in ("constant", "item click rate"))
    assert rate["regret"] < constant["regret"]


def test_no_change_says_the_label_before() -> None:
    course = drifting([1.0, 1.0, 0.0, 1.0])
    assert measure(course, ANCHORS["no-change"](course, 0)).figures["accuracy"] == 25.0
