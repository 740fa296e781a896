"""How much a learner keeps, and how fast it takes up, while the stream moves on from segment to segment.

The figures here are made of a `Trace`: held-out accuracy on every segment, evaluated every k learning steps, not only
where a segment ends, for what is lost and won back in between is seen by nobody else. From it comes the matrix R:
R[i, j] is the accuracy on segment j when segment i had just been learned (both counted from 0; L segments have been
learned, T >= L can be evaluated).

Transfer goes by several definitions, which give different numbers for one matrix. Ours is the first:

| who | backward | forward |
|---|---|---|
| Lopez-Paz & Ranzato 2017 (GEM), arXiv 1706.08840, eq. 3 and 4: `backward_transfer`, `forward_transfer` | mean over earlier j of R[last, j] - R[j, j] | mean over j > 0 of R[j - 1, j] - untrained[j] |
| Díaz-Rodríguez et al. 2018, arXiv 1810.13166 | mean over all i > j of R[i, j] - R[j, j]: every row counts, not the last alone | mean over all i < j of R[i, j]: no untrained model is subtracted |
| Garg et al. 2023 (TiC-CLIP), arXiv 2310.16226: `time_buckets` | mean over all i > j of R[i, j]: an accuracy, no difference | mean over all i < j of R[i, j], likewise |
| Chaudhry et al. 2018, arXiv 1801.10112: `forgetting` | mean over earlier j of max over i < last of R[i, j], less R[last, j]: the best counts, not what it was when learned; its sign is turned | none |

Where a figure is undefined (transfer with a single segment) it is NaN.
"""  # noqa: E501 - a row of a table

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from streamcl.metrics.losses import ratio
from streamcl.protocols import State
from streamcl.records import Outcome

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """Evaluations of one run in their order.

    Args:
        accuracy: Of evaluation n on the held-out examples of segment j, in [0, 1].
        during: Which segment was being learned at evaluation n. A segment that comes back has a number of its own, and
            a column with the same held-out examples.

    Shape:
        accuracy (E, T), during (E,) integers that ascend from 0 without a hole.

    Raises:
        ValueError: shapes or numbers are otherwise.
    """

    accuracy: Floats
    during: NDArray[np.int64]

    def __post_init__(self) -> None:
        accuracy, during = np.asarray(self.accuracy, np.float64), np.asarray(self.during, np.int64)
        object.__setattr__(self, "accuracy", accuracy)
        object.__setattr__(self, "during", during)
        if accuracy.ndim != 2 or during.shape != accuracy.shape[:1] or not len(during):
            raise ValueError(f"accuracy {accuracy.shape} must be (E, T) and during {during.shape} (E,), E >= 1")
        steps = np.diff(during, prepend=-1)
        if steps[0] != 1 or (steps < 0).any() or (steps > 1).any() or during[-1] >= accuracy.shape[1]:
            raise ValueError("during: segments must be learned in the order of their columns, from 0, without a hole")
        if not ((accuracy >= 0) & (accuracy <= 1)).all():
            raise ValueError("accuracy: outside of [0, 1]")

    @property
    def learned(self) -> int:
        """L: how many segments have been learned, the last one perhaps in part."""
        return int(self.during[-1]) + 1

    @property
    def ends(self) -> NDArray[np.int64]:
        """(L,) the last evaluation of each segment's own learning."""
        return np.searchsorted(self.during, np.arange(self.learned), side="right") - 1

    def matrix(self) -> Floats:
        """R, (L, T)."""
        return self.accuracy[self.ends]


def average_accuracy(matrix: ArrayLike) -> float:
    """ACC: mean accuracy, at the end, on all segments learned. GEM, eq. 2."""
    r = np.asarray(matrix, np.float64)
    return float(r[-1, : len(r)].mean())


def backward_transfer(matrix: ArrayLike) -> float:
    """BWT: what learning later segments did to earlier ones, from -1 to 1; negative for forgetting. GEM, eq. 3."""
    r = np.asarray(matrix, np.float64)
    return _mean(r[-1, : len(r) - 1] - r.diagonal()[: len(r) - 1])


def forward_transfer(matrix: ArrayLike, untrained: ArrayLike) -> float:
    """FWT: what a segment gains, before it is learned, from those before it. GEM, eq. 4.

    Args:
        untrained: (T,) accuracy on each segment before anything was learned.
    """
    r, b = np.asarray(matrix, np.float64), np.asarray(untrained, np.float64)
    return _mean(r.diagonal(1)[: len(r) - 1] - b[1 : len(r)])


def forgetting(matrix: ArrayLike) -> float:
    """Mean over earlier segments of the best accuracy at any earlier segment's end less that at the end.

    Source:
        Chaudhry et al. 2018, arXiv 1801.10112: the best may have been before the segment was learned.
    """
    r = np.asarray(matrix, np.float64)
    earlier = len(r) - 1
    return _mean(r[:-1, :earlier].max(0) - r[-1, :earlier]) if earlier else math.nan


class TimeBuckets(NamedTuple):
    """Means of a matrix of training times and test buckets: on the diagonal, below it, above it."""

    in_domain: float
    backward: float
    forward: float


def time_buckets(matrix: ArrayLike) -> TimeBuckets:
    """Accuracy on the present, the past and the future: of the model of time i on the test bucket of time j.

    Source:
        TiC-CLIP, Garg et al. 2023, arXiv 2310.16226. Later models count as often as early ones; the past of
        a late model is longer, so it weighs more.
    """
    r = np.asarray(matrix, np.float64)
    trained, tested = np.indices(r.shape)
    return TimeBuckets(_mean(r.diagonal()), _mean(r[trained > tested]), _mean(r[trained < tested]))


def min_accuracy(trace: Trace) -> float:
    """min-ACC: mean over earlier segments of their lowest accuracy at any evaluation since they were learned.

    Source:
        De Lange, van de Ven & Tuytelaars 2023, arXiv 2205.13452.
    """
    earlier = zip(trace.ends[:-1], trace.accuracy.T, strict=False)
    return _mean([column[end + 1 :].min() for end, column in earlier])


def worst_case_accuracy(trace: Trace) -> float:
    """WC-ACC: accuracy on the last segment and min-ACC, weighed by how many segments each stands for.

    Source:
        As `min_accuracy`.
    """
    learned, last = trace.learned, float(trace.accuracy[-1, trace.learned - 1])
    return last if learned == 1 else last / learned + (1.0 - 1.0 / learned) * min_accuracy(trace)


def windowed_forgetting(trace: Trace, window: int) -> float:
    """WF: mean over segments of the largest fall of accuracy within any `window` consecutive evaluations.

    Source:
        As `min_accuracy`.

    Differs from the source:
        A segment's evaluations count from the first one of its own learning on. One that never falls has 0.

    Raises:
        ValueError: window < 2.
    """
    return _mean([_largest_fall(column, window) for column in _since_begun(trace)])


def windowed_plasticity(trace: Trace, window: int) -> float:
    """WP: as `windowed_forgetting`, the largest rise."""
    return _mean([_largest_fall(-column, window) for column in _since_begun(trace)])


def _since_begun(trace: Trace) -> list[Floats]:
    begins = np.searchsorted(trace.during, np.arange(trace.learned))
    return [column[begin:] for begin, column in zip(begins, trace.accuracy.T, strict=False)]


def _largest_fall(values: Floats, window: int) -> float:
    if window < 2:
        raise ValueError(f"window: {window} must be at least 2 evaluations")
    padded = np.concatenate((np.full(window - 1, -np.inf), values))
    return float((sliding_window_view(padded, window).max(1) - values).max())


def stability_gap(trace: Trace) -> float:
    """How far accuracy on earlier segments dips while a new one is learned, and comes back: at least 0.

    Of an earlier segment j and a new one k: the lower of its accuracies before k and after k, less its lowest
    while k is learned, or 0. What doesn't come back is forgetting and no part of it. The mean is over all pairs j < k.

    Source:
        De Lange et al. name and show the gap, but give no figure for it; this one is ours.
    """
    ends, gaps = trace.ends, []
    for k in range(1, trace.learned):
        earlier = trace.accuracy[ends[k - 1] : ends[k] + 1, :k]  # from before k to after it
        gaps += np.maximum(np.minimum(earlier[0], earlier[-1]) - earlier[1:].min(0), 0.0).tolist()
    return _mean(gaps)


class Scenarios(NamedTuple):
    """Accuracy by what is asked of the learner, and what it is told."""

    task_incremental: float
    domain_incremental: float
    class_incremental: float


def scenarios(logits: ArrayLike, labels: ArrayLike, segments: ArrayLike, members: ArrayLike) -> Scenarios:
    """The same logits, judged in three ways. Each segment has classes of its own.

    - task-incremental: the segment is known, so only its classes are candidates;
    - domain-incremental: it is not, and only the role of a class in its segment is asked for (the first, the second);
    - class-incremental: it is not, and the class itself is asked for.

    Class-incremental is never the easiest. A tie goes to the class of the lowest number.

    Args:
        members: The classes of each segment; the column is a class's role.

    Shape:
        logits (N, C), labels and segments (N,), members (T, k), no class twice; others don't count.

    Source:
        van de Ven & Tolias 2019, arXiv 1904.07734, table 1.
    """
    z, y, s, classes = np.asarray(logits, np.float64), np.asarray(labels), np.asarray(segments), np.asarray(members)
    role, mine = np.full(z.shape[1], -1), np.zeros((len(classes), z.shape[1]), np.bool_)
    for segment, those in enumerate(classes):
        role[those], mine[segment, those] = np.arange(len(those)), True
    free = np.where(mine.any(0), z, -np.inf).argmax(1)
    told = np.where(mine[s], z, -np.inf).argmax(1)
    return Scenarios(_mean(told == y), _mean(role[free] == role[y]), _mean(free == y))


def prequential_accuracy(hits: ArrayLike) -> Floats:
    """(N,) after each answer the share of right ones so far, each given before its label was learned.

    Source:
        Gama, Sebastiao and Rodrigues 2013, doi 10.1007/s10994-012-5320-9, without fading.
    """
    right = np.asarray(hits, np.float64)
    return np.asarray(right.cumsum() / np.arange(1, len(right) + 1))


class BySegment:
    """Prequential accuracy of each segment of a live stream, in bounded memory.

    Args:
        most: Segments held (count); the one heard of longest ago gives way.

    Shape:
        `served` of an outcome is (1,), a probability, or (C,), class probabilities.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        # By segment [right, all]; the one heard of last is the last. The front of a plain dict fills with dummies.
        self._tallies: OrderedDict[str, list[int]] = OrderedDict()

    def update(self, outcome: Outcome) -> tuple[()]:
        served, segment = outcome.ticket.scores.served, outcome.ticket.segment
        answer = served.argmax() if len(served) > 1 else served[0] >= 0.5
        right, count = self._tallies.pop(segment, [0, 0])
        self._tallies[segment] = [right + bool(answer == outcome.label), count + 1]
        if len(self._tallies) > self._most:
            self._tallies.popitem(last=False)
        return ()

    def accuracies(self) -> dict[str, float]:
        """By segment, those held; the one heard of last is the last."""
        return {segment: ratio(right, count) for segment, (right, count) in self._tallies.items()}

    def read(self) -> dict[str, float]:
        """Names no segment. Empty at first."""
        found = list(self.accuracies().values())
        if not found:
            return {}
        named = {"current": found[-1], "worst": min(found), "mean": _mean(found)}
        return {"segments": float(len(found))} | {f"segment_accuracy_{name}": value for name, value in named.items()}

    def state_dict(self) -> State:
        return {"tallies": [[segment, *tally] for segment, tally in self._tallies.items()]}

    def load_state_dict(self, state: State) -> None:
        self._tallies = OrderedDict((segment, [right, count]) for segment, right, count in state["tallies"])


def _mean(values: ArrayLike) -> float:
    flat = np.asarray(values, np.float64)
    return float(flat.mean()) if flat.size else math.nan
