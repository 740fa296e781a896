"""Who stands beside the recipes of `bench continual`: predictors that need no net, and River's trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river import forest, tree

from streamcl.bench.continual_course import Course
from streamcl.bench.continual_run import Served


class Anchor:
    """A contender that answers with a probability of label 1, and has nothing to say of held-out examples."""

    def __init__(self, course: Course) -> None:
        self.rows = course.rows

    def predict(self, i: int) -> Served:
        return np.array([self.chance(i)], np.float32)

    def chance(self, i: int) -> float:
        raise NotImplementedError

    def learn(self, i: int) -> None:
        raise NotImplementedError

    def classify(self, segment: int) -> NDArray[np.int64]:
        raise NotImplementedError


class Constant(Anchor):
    """The rate of positives so far, with one of each beforehand: what knowing nothing of an event is worth."""

    def __init__(self, course: Course) -> None:
        super().__init__(course)
        self.positives, self.count = 1.0, 2.0

    def chance(self, i: int) -> float:
        return self.positives / self.count

    def learn(self, i: int) -> None:
        self.positives += self.rows.labels[i]
        self.count += 1.0


class ClickRate(Anchor):
    """Each item's own rate, of which an older click counts `DECAY` times the next one; `PRIOR` clicks at the mean rate.

    The item is the first category, in the order of names.
    """

    DECAY, PRIOR = 0.98, 2.0

    def __init__(self, course: Course) -> None:
        super().__init__(course)
        self.clicks: dict[int, tuple[float, float]] = {}
        self.all = Constant(course)

    def chance(self, i: int) -> float:
        clicks, shown = self.clicks.get(int(self.rows.categories[i, 0]), (0.0, 0.0))
        return (clicks + self.PRIOR * self.all.chance(i)) / (shown + self.PRIOR)

    def learn(self, i: int) -> None:
        self.all.learn(i)
        item = int(self.rows.categories[i, 0])
        clicks, shown = self.clicks.get(item, (0.0, 0.0))
        self.clicks[item] = clicks * self.DECAY + self.rows.labels[i], shown * self.DECAY + 1.0


class NoChange(Anchor):
    """The label before, again. Its scores are 0 and 1: judge it by accuracy only."""

    last = 0.0

    def chance(self, i: int) -> float:
        return self.last

    def learn(self, i: int) -> None:
        self.last = float(self.rows.labels[i])


class River(Anchor):
    """A River classifier with its own defaults, on numbers by name."""

    def __init__(self, course: Course, model: Any) -> None:
        super().__init__(course)
        self.model = model
        self.examples = [dict(enumerate(row)) for row in course.rows.dense.tolist()]

    def chance(self, i: int) -> float:
        found = self.model.predict_proba_one(self.examples[i])
        return float(found.get(True, 0.0)) if found else 0.5

    def learn(self, i: int) -> None:
        self.model.learn_one(self.examples[i], bool(self.rows.labels[i]))


ANCHORS: dict[str, Callable[[Course, int], Anchor]] = {
    "constant": lambda course, _seed: Constant(course),
    "item click rate": lambda course, _seed: ClickRate(course),
    "no-change": lambda course, _seed: NoChange(course),
    "river adaptive tree": lambda course, seed: River(course, tree.HoeffdingAdaptiveTreeClassifier(seed=seed)),
    "river adaptive forest": lambda course, seed: River(course, forest.ARFClassifier(seed=seed)),
}
"""By name: the contender of (stream, seed)."""
