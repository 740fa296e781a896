"""How a score is put right by what is known nearby, and how strongly: fixed, or as would have served best lately."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streamcl.memory.forms import Floats
from streamcl.memory.kernels import follow_losses, put_right
from streamcl.records import Recalled
from streamcl.stations import Task

GRID = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
HYSTERESIS = 1e-4
"""A choice moves for a gain of more than this (nats; regression: share of the uncompensated squared error)."""

LEAST = 1e-6
"""No compensated probability is nearer to 0 or 1: log-loss would be infinite."""


class Choice:
    """Gamma and lambda by recent prequential loss: of every pair on the grid, had it been what was served.

    Losses are exponential moving averages that begin at 0, so that the start, and every tie, is no compensation.
    """

    def __init__(self, gammas: Sequence[float], lambdas: Sequence[float], half_life: float, task: Task) -> None:
        self.pairs = np.array([(gamma, strength) for strength in lambdas for gamma in gammas])  # (n, 2)
        self.task = task
        self.rate = 1.0 - 2.0 ** (-1.0 / half_life)
        self.losses = np.zeros(len(self.pairs))
        self.chosen = 0

    def serve(self, recalled: Recalled) -> Floats:
        """(P,) the score put right as chosen; the one given, bit for bit, where nothing is to be put right."""
        gamma, strength = self.pairs[self.chosen].tolist()
        if recalled.support == 0.0 or strength == 0.0:
            return recalled.given
        if len(recalled.given) > 1:
            return np.asarray(compensated(recalled, self.pair, self.task)[0], np.float32)
        low, high = (-math.inf, math.inf) if self.task == "regression" else (LEAST, 1.0 - LEAST)
        given, label, score = float(recalled.given[0]), float(recalled.label_mean[0]), float(recalled.given_mean[0])
        return np.array([put_right(given, label, score, gamma, strength, low, high)], np.float32)

    @property
    def pair(self) -> NDArray[np.float64]:
        """(1, 2): gamma and lambda."""
        return self.pairs[self.chosen : self.chosen + 1]

    def observe(self, recalled: Recalled, target: Floats) -> None:
        if len(self.pairs) == 1:
            return
        if len(target) == 1:
            means = (recalled.label_mean[0], recalled.given_mean[0]) if recalled.support else (math.nan, math.nan)
            scores = np.array((recalled.given[0], *means), np.float64)
            binary = self.task != "regression"
            follow_losses(scores, self.pairs, float(target[0]), binary, LEAST, self.rate, self.losses)
        else:
            now = losses(compensated(recalled, self.pairs, self.task), target, self.task)
            self.losses += self.rate * (now - self.losses)
        gain = self.losses[self.chosen] - self.losses
        best = int(gain.argmax())
        unit = self.losses[0] if self.task == "regression" else 1.0
        if gain[best] > HYSTERESIS * unit:
            self.chosen = best


def compensated(recalled: Recalled, pairs: NDArray[np.float64], task: Task) -> NDArray[np.float64]:
    """(n, P) the score put right, for n pairs (gamma, lambda).

    Source:
        ReLoop2, Zhu et al. 2023, arXiv 2306.08808; gamma = 0 as the residual label mean - given mean is our reading.

    Differs from the source:
        Probabilities stay within `LEAST` of 0 and 1; those of several classes are scaled to a sum of 1.
    """
    given = recalled.given.astype(np.float64)
    if recalled.support == 0.0:
        return np.repeat(given[None], len(pairs), axis=0)
    residual = recalled.label_mean.astype(np.float64) - recalled.given_mean
    gamma, strength = pairs[:, :1], pairs[:, 1:]
    scores = given + strength * (gamma * (recalled.label_mean - given) + (1.0 - gamma) * residual)
    if task != "regression":
        scores = scores.clip(LEAST, 1.0 - LEAST)
        if len(given) > 1:
            scores /= scores.sum(1, keepdims=True)
    return np.asarray(scores)


def losses(scores: NDArray[np.float64], target: Floats, task: Task) -> NDArray[np.float64]:
    """(n,) of n scores (n, P) for one target (P,): nats, or the squared error."""
    if task == "regression":
        return np.asarray(((scores - target) ** 2)[:, 0])
    two = np.hstack((1.0 - scores, scores)) if len(target) == 1 else scores
    likely = two[:, int(target[0] > 0.5) if len(target) == 1 else int(target.argmax())]
    return np.asarray(-np.log(np.maximum(likely, LEAST)))
