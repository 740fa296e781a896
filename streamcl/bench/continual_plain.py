"""The reference of `bench continual`: replay and GEM in plain torch, with nothing of ours but the stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn import functional

from streamcl.bench.continual_course import Course
from streamcl.bench.continual_run import Served
from streamcl.bench.quality import Floats

MARGIN = 0.5  # GEM's gamma, as published
GEM_MEMORY = 256  # examples of each task


class Plain:
    """Experience replay: cross-entropy of the live examples + that of replayed ones.

    Steps of SGD on `batch` live examples, answered before the batch is learned from; a reservoir (algorithm R) of the
    stream's capacity; torch's own initial weights. With one live example as many are replayed as the stream says, and
    with the stream's weight; with more of them as many as are live, with weight 1.

    Args:
        masked: The live examples compete among the classes of their batch only.

    Source:
        Chaudhry et al. 2019, arXiv 1902.10486 (ER); Caccia et al. 2022, arXiv 2104.05025, equation 4 (ER-ACE, masked).

    Differs from the source:
        Weights for the mean of the live and for the mean of the replayed examples, where ER has the mean of both.
    """

    def __init__(
        self, course: Course, seed: int, batch: int = 1, masked: bool = False, learning_rate: float | None = None
    ) -> None:
        torch.set_num_threads(1)  # as ours: two are slower at this size
        self.course, self.batch, self.masked = course, batch, masked
        self.replayed = course.memory["per_event"] if batch == 1 else batch
        self.replay_weight = course.memory.get("weight", 1.0) if batch == 1 else 1.0
        self.x = torch.from_numpy(course.rows.dense)
        self.y = torch.from_numpy(course.rows.labels).long()
        self.held_out = [torch.from_numpy(rows.dense) for rows in course.held_out]
        widths = (self.x.shape[1], *course.settings["model"]["hidden"], course.settings["model"]["classes"])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = mlp(widths)
        self.parameters = list(self.net.parameters())
        self.learning_rate = learning_rate or float(course.settings["optimizer"]["learning_rate"])
        self.rng = np.random.default_rng([seed, *b"plain"])
        self.kept: list[int] = []  # places of the examples in memory
        self.waiting: list[int] = []

    def predict(self, i: int) -> Served:
        with torch.inference_mode():
            return np.asarray(functional.softmax(self.net(self.x[i]), 0).numpy())

    def classify(self, segment: int) -> NDArray[np.int64]:
        with torch.inference_mode():
            return np.asarray(self.net(self.held_out[segment]).argmax(1).numpy())

    def learn(self, i: int) -> None:
        self.waiting.append(i)
        if len(self.waiting) == self.batch or i == len(self.y) - 1:
            self.step(self.waiting)
            self.remember(self.waiting)
            self.waiting = []

    def step(self, live: list[int]) -> None:
        loss = self.loss(live, self.masked)
        if self.kept:
            drawn = self.rng.integers(0, len(self.kept), self.replayed)
            loss = loss + self.replay_weight * self.loss([self.kept[place] for place in drawn])
        self.move(torch.autograd.grad(loss, self.parameters))

    def move(self, gradients: Sequence[Tensor]) -> None:
        """Torch's SGD, without what its optimisers do besides."""
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=self.learning_rate)

    def loss(self, places: list[int], masked: bool = False) -> Tensor:
        y = self.y[places]
        logits = self.net(self.x[places])
        if masked:
            outside = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, y, False)
            logits = logits.masked_fill(outside, -torch.inf)
        return functional.cross_entropy(logits, y)

    def remember(self, live: list[int]) -> None:
        capacity = self.course.memory["capacity"]
        for i in live:
            if len(self.kept) < capacity:
                self.kept.append(i)
            elif (place := int(self.rng.integers(0, i + 1))) < capacity:
                self.kept[place] = i


def mlp(widths: Iterable[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Gem(Plain):
    """Gradient episodic memory: a step may not raise the loss on what is remembered of any earlier task.

    It is told the task of each example.

    Source:
        Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equations 10 and 11; the last 256 examples of each task are
        remembered, gamma is .5, the learning rate .1, ten examples a step, as in the paper's experiment.

    Differs from the source:
        The dual is solved by non-negative least squares on the Gram matrix's Cholesky factor.
    """

    def step(self, live: list[int]) -> None:
        gradient = self.gradient(live)
        past = [self.gradient(places) for places in self.tasks(before=int(self.course.segments[live[0]]))]
        if past:
            gradient = projected(gradient, torch.stack(past))
        parts = torch.split(gradient, [parameter.numel() for parameter in self.parameters])
        self.move([part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)])

    def tasks(self, before: int) -> list[list[int]]:
        ends = np.searchsorted(self.course.segments, np.arange(before), side="right").tolist()
        starts = np.searchsorted(self.course.segments, np.arange(before), side="left").tolist()
        return [list(range(max(start, end - GEM_MEMORY), end)) for start, end in zip(starts, ends, strict=True)]

    def gradient(self, places: list[int]) -> Tensor:
        """(P,)"""
        parts = torch.autograd.grad(self.loss(places), self.parameters)
        return torch.cat([part.flatten() for part in parts])


def projected(gradient: Tensor, past: Tensor) -> Tensor:
    """The gradient (P,) nearest to it that makes no acute angle with minus any of `past` (T, P), and `MARGIN` more."""
    products = past @ gradient  # (T,)
    if bool((products >= 0).all()):
        return gradient
    v = dual((past @ past.T).double().numpy(), products.double().numpy())
    return gradient + torch.from_numpy(v + MARGIN).to(past.dtype) @ past


def dual(gram: Floats, products: Floats) -> Floats:
    """v >= 0 (T,) that makes v gram v / 2 + products v least."""
    ridge = 1e-6 * max(float(np.trace(gram)) / len(gram), 1e-12)  # gradients of like tasks are nearly dependent
    lower = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
    target = -solve_triangular(lower, products, lower=True)
    return np.asarray(nnls(lower.T, target)[0], np.float64)


PLAIN: dict[str, Callable[[Course, int], Plain]] = {
    "plain torch er": Plain,
    "plain torch er, batch 10": lambda course, seed: Plain(course, seed, batch=10, learning_rate=0.1),
    "plain torch er-ace, batch 10": lambda course, seed: Plain(course, seed, 10, masked=True, learning_rate=0.1),
    "plain torch gem, batch 10": lambda course, seed: Gem(course, seed, batch=10, learning_rate=0.1),
}
"""By name: the contender of (stream, seed)."""
