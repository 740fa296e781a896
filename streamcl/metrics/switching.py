"""Regret on sources that switch: how much worse a learner is than one who knows the source.

A source of bits has a constant chance of a 1 for a while, then another. Whoever knows the chance loses its entropy; who
must learn it loses more, and how much more the best can be is known. A learner whose regret lies near that adapts as
well as can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import binom

from streamcl.random import key_of, uniform_array

Bits = NDArray[np.int64]
Floats = NDArray[np.float64]


def switching_bernoulli(seed: int, lengths: Sequence[int], chances: Sequence[float]) -> tuple[Bits, Floats]:
    """Bits and the chance that each had of being 1: (N,) and (N,), N the sum of the lengths."""
    chance = np.repeat(np.asarray(chances, np.float64), lengths)
    return (uniform_array(key_of(seed, "switching"), len(chance)) < chance).astype(np.int64), chance


def bit_losses(bits: ArrayLike, chance: ArrayLike) -> Floats:
    """(N,) nats that each bit costs who said it would be 1 with this chance, in (0, 1)."""
    p = np.asarray(chance, np.float64)
    return np.asarray(-np.log(np.where(np.asarray(bits) == 1, p, 1.0 - p)))


def regret(losses: ArrayLike, best: ArrayLike) -> Floats:
    """(N,) after each example what a learner has lost beyond the known best, in the losses' unit."""
    return np.asarray(np.cumsum(np.asarray(losses, np.float64) - np.asarray(best, np.float64)))


def kt_chances(bits: ArrayLike, starts: Sequence[int] = (0,)) -> Floats:
    """(N,) the chance of a 1 that the KT estimator gives each bit from those before it: (ones + 1/2) / (bits + 1).

    Args:
        starts: Where it is told to begin anew; the first is 0. At the switches it is the best that is possible without
            knowing the chances.

    Source:
        Krichevsky & Trofimov 1981, doi 10.1109/TIT.1981.1056331.
    """
    b, found = np.asarray(bits, np.int64), []
    for start, end in pairwise([*starts, len(b)]):
        ones = np.concatenate(([0], b[start : end - 1].cumsum()))[: end - start]
        found.append((ones + 0.5) / (np.arange(end - start) + 1.0))
    return np.concatenate(found)


def kt_regret(length: int, chance: float) -> float:
    """Expected regret, in nats, of the KT estimator on `length` bits of a constant chance. Exact.

    It approaches ln(length) / 2 + ln(pi / (2 e)) / 2 = ln(length) / 2 - .274 for a chance inside (0, 1), so that a
    switching source costs about ln(length) / 2 a segment even who knows where it switches.

    Source:
        Xie & Barron 2000, doi 10.1109/18.825803, for the limit.
    """
    ones = np.arange(length + 1)
    nats = 2 * gammaln(0.5) + gammaln(length + 1) - gammaln(ones + 0.5) - gammaln(length - ones + 0.5)
    entropy = -(chance * np.log(chance) + (1 - chance) * np.log(1 - chance))
    return float(binom.pmf(ones, length, chance) @ nats - length * entropy)


def switching_chances(bits: ArrayLike, hazard: float) -> Floats:
    """(N,) the chance of a 1 that Bayes' rule gives when every bit may be a segment's first with chance `hazard`.

    The mixture of the KT estimators that began at each bit so far, weighed by how well they have done. It loses at most
    -ln(prior) more than the one told where the switches are: with m segments in n bits the prior is
    hazard^(m - 1) (1 - hazard)^(n - m). Takes O(N^2).

    Source:
        Willems 1996, IEEE Trans. Inf. Theory 42:2210-2217; as a filter over run lengths Adams & MacKay 2007,
        arXiv 0710.3742.
    """
    b, found = np.asarray(bits, np.int64), np.zeros(len(np.asarray(bits)))
    weight, ones = np.ones(1), np.zeros(1)  # of the estimators, by the bit that they began at
    for t, bit in enumerate(b):
        if t:
            weight, ones = np.append(weight * (1.0 - hazard), hazard), np.append(ones, 0.0)
        chance = (ones + 0.5) / (np.arange(t + 1, 0, -1))
        found[t] = weight @ chance
        weight *= chance if bit else 1.0 - chance
        weight /= weight.sum()
        ones += bit
    return found
