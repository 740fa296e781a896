"""The compiled arithmetic of the metrics: many examples at once, to the bit as if they had come one by one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamcl.compiled import entry, exact
from streamcl.metrics.losses import CLIP

EXAMPLES, LOSS, SCORES, LABELS, HITS, PAIRS, REPEATS, WEIGHT = range(8)
"""Places in the sums of `binary_rows`."""

PAST_WEIGHT, PAST_LOSS, PAST_SCORES, PAST_LABELS = range(4)
"""Places in its decayed sums."""

LIMIT = 16.0
"""Logits beyond +-16 (probabilities below 1.2e-7) share the outermost bins of a histogram."""


@exact
def _place(score: Any, bins: int) -> int:
    if score <= 0.0 or score >= 1.0:
        return 0 if score <= 0.0 else bins - 1
    logit = math.log(score) - math.log1p(-score)
    return min(max(int((logit + LIMIT) * (bins / (2 * LIMIT))), 0), bins - 1)


@entry
def count_rows(positive: Any, scores: Any, weights: Any, counts: Any) -> None:
    """Count scores (n,), each as its weight, by their logit in counts (2, bins): of negatives, of positives."""
    for i in range(len(scores)):
        counts[np.int64(positive[i]), _place(scores[i], counts.shape[1])] += weights[i]


@entry
def binary_rows(
    labels: Any,
    scores: Any,
    weights: Any,
    losses: Any,
    sums: Any,
    previous: Any,
    counts: Any,
    ring: Any,
    written: Any,
    decayed: Any,
    keep: float,
) -> None:
    """Add examples to the sums (8,), the decayed sums (4,), a histogram's counts (2, bins), a window's ring (size, 4).

    labels, scores, weights (n,) float64; their losses come back in `losses` (n,); what is not finite enters nothing.
    previous, written (1,): the label before, NaN if there is none, and the rows that the ring has seen. Before each
    example the decayed sums are multiplied by `keep`.
    """
    for i in range(len(labels)):
        label, score, weight = labels[i], scores[i], weights[i]
        p = min(max(score, CLIP), 1.0 - CLIP) if score == score else score
        loss = -(label * math.log(p) + (1.0 - label) * math.log(1.0 - p))
        losses[i] = loss
        if not math.isfinite(loss):
            continue
        repeats = label == previous[0]
        sums[EXAMPLES] += 1.0
        sums[WEIGHT] += weight
        sums[LOSS] += weight * loss
        sums[SCORES] += weight * score
        sums[LABELS] += weight * label
        sums[HITS] += weight * ((score >= 0.5) == (label >= 0.5))
        sums[PAIRS] += weight * (previous[0] == previous[0])
        sums[REPEATS] += weight * repeats
        decayed[PAST_WEIGHT] = keep * decayed[PAST_WEIGHT] + weight
        decayed[PAST_LOSS] = keep * decayed[PAST_LOSS] + weight * loss
        decayed[PAST_SCORES] = keep * decayed[PAST_SCORES] + weight * score
        decayed[PAST_LABELS] = keep * decayed[PAST_LABELS] + weight * label
        counts[np.int64(label >= 0.5), _place(score, counts.shape[1])] += weight
        row = written[0] % len(ring)
        ring[row, 0], ring[row, 1], ring[row, 2], ring[row, 3] = label, score, repeats, weight
        written[0] += 1
        previous[0] = label


@entry
def write_rows(
    written: int, labels: Any, scores: Any, weights: Any, marks: Any, places: Any, ring: Any, marked: Any, placed: Any
) -> None:
    """Add examples to the ring of `slices.Slices` that has seen `written`: labels, scores, weights (n,), marks (2, n),
    places (F, n); ring (N, 3), marked (N, 2), or (0, 2) where nothing is, placed (N, F).
    """
    for i in range(len(labels)):
        row = (written + i) % len(ring)
        ring[row, 0], ring[row, 1], ring[row, 2] = labels[i], scores[i], weights[i]
        if len(marked):
            marked[row, 0], marked[row, 1] = marks[0, i], marks[1, i]
        for field in range(len(places)):
            placed[row, field] = places[field, i]


@entry
def pack_lists(labels: Any, bits: Any, sizes: Any, packed: Any) -> None:
    """Integers that sort as items do: by list, from the highest score, and of equal ones 0 before 1.

    labels (N,), bits (N,) int32 of float32 scores, sizes of the lists that lie one behind the other, packed (N,) int64.
    """
    start = 0
    for row in range(len(sizes)):
        for i in range(start, start + sizes[row]):
            rising = np.int64(bits[i]) if bits[i] >= 0 else np.int64(bits[i]) ^ 0x7FFFFFFF  # negative ones too
            packed[i] = (np.int64(row) << 33) + ((0x7FFFFFFF - rising) << 1) + np.int64(labels[i] >= 0.5)
        start += sizes[row]


@entry
def judge_lists(ranked: Any, sizes: Any, ks: Any, gains: Any, most: Any, found: Any) -> None:
    """Judge lists, of which `pack_lists` has packed the items; `ranked` (N,) are those, sorted. sizes, ks int64.

    gains (max k,): of a positive at each rank; most: their running sums. The rows of `found` (L, 2 + 3 K), all 0, come
    out as `lists.first_of_lists` says.
    """
    start = 0
    for row in range(len(sizes)):
        size, positives = sizes[row], 0
        for i in range(start, start + size):
            positives += ranked[i] & 1
        found[row, 0], found[row, 1] = size, 0 < positives < size
        for j in range(len(ks)) if 0 < positives < size else range(0):
            gain, count, first = 0.0, 0, 0.0
            for rank in range(min(ks[j], size)):
                if ranked[start + rank] & 1:
                    gain += gains[rank]
                    first = first if count else 1.0 / (rank + 1)
                    count += 1
            found[row, 2 + 3 * j] = gain / most[min(ks[j], positives) - 1]
            found[row, 3 + 3 * j] = count / positives
            found[row, 4 + 3 * j] = first
        start += size
