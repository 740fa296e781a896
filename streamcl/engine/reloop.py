"""The loss of ReLoop: what the model was better at when it served an event."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

NOISE = 1e-6
"""A probability that is no further from what was served has not moved: the difference is one of rounding."""


def self_corrected(loss: Tensor, logit: Tensor, y: Tensor, served: float, alpha: float) -> Tensor:
    """(1 - alpha) x cross-entropy + alpha x what the probability is worse by than the one that was served. # (B,)

    Source:
        ReLoop, Cai et al. 2022 (SIGIR), arXiv 2204.11165: y max(p' - p, 0) + (1 - y) max(p - p', 0).

    Differs from the source:
        p' is what was served, compensation and all, one label delay ago, instead of last day's model's. Replayed rows
        carry cross-entropy alone: nobody has served them lately. Within `NOISE` of p' nothing is worse: a label that
        comes with its event finds p where it was served, and the sign of a rounding error would be the gradient.
    """
    p = logit.sigmoid()
    lost = functional.threshold(served - p, NOISE, 0.0)
    gained = functional.threshold(p - served, NOISE, 0.0)
    return (1.0 - alpha) * loss + alpha * (y * lost + (1.0 - y) * gained)
