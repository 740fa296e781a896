"""Losses for labels that come late, on a stream where an event counts as a negative until its label comes.

x is the first logit, p = sigmoid(x), z the label that an example carries. A weight that is made of the model's own
scores is a constant to the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from streamcl.config import Config
from streamcl.records import Fate, Outcome

SOONEST = 0.01
"""Units of time: a delay is no shorter, or a label that comes with its event would ask for an endless rate."""


class Delayed:
    """The losses of one configuration.

    Behind x the logits of DFM hold the head of the rate of conversion, those of ES-DFM two: whether a positive is to
    come late, and whether a negative is a real one.

    | kind | of an example, by z |
    |---|---|
    | `fnw` | z (1 + p) softplus(-x) + (1 - z) (1 - p) (1 + p) softplus(x) |
    | `fnc` | cross-entropy; what is served is p / (1 - p) |
    | `dfm` | minus the log-likelihood of what the example tells beyond those before it; see `_dfm` |
    | `es_dfm` | z (1 + dp) softplus(-x) + (1 - z) (1 + dp) tn softplus(x), and two heads' cross-entropy |

    Until the first window has closed, late positives teach neither DFM nor the heads of ES-DFM: they come before the
    negatives of their age are known as such, and every event would seem to be one of them. `ripe` says whether it has.

    Source:
        FNW and FNC: Ktena et al. 2019, arXiv 1907.06558. DFM: Chapelle 2014. ES-DFM: Yang et al. 2021, arXiv
        2012.03245; its formulas as in the authors' repository `ThyrixYang/es_dfm`.

    Differs from the source:
        ES-DFM trains its heads beforehand, on old data; here they learn beside, from what each window has come to, and
        share all of the model but the last layer. DFM is told of an event once, with what is known by then; here it
        is told bit by bit.
    """

    def __init__(self, config: Config) -> None:
        self.kind = config.loss.kind
        self.staged = config.join.wait_s is not None
        unit_s = config.loss.unit_s or config.join.attribution_window_s / 10.0
        self.wait = (config.join.wait_s or 0.0) / unit_s
        self.window = config.join.attribution_window_s / unit_s
        self.unit_s = unit_s
        self.ripe = False

    def losses(self, output: Tensor, y: Tensor, outcome: Outcome | None) -> Tensor:
        """(B,) nats of logits (B, 1 + heads) and labels (B,); `outcome` is that of the first row, if that is live."""
        x = output[:, 0]
        self.ripe |= outcome is not None and outcome.fate == Fate.EXPIRED
        if self.kind == "fnw":
            return fake_negative_weighted(x, y)
        if self.kind == "fnc":
            return functional.binary_cross_entropy_with_logits(x, y, reduction="none")
        if self.kind == "dfm":
            assert outcome is not None and len(x) == 1  # noqa: S101 - the configuration allows no replay
            return self._dfm(x, functional.softplus(output[:, 1]), output[:, 1], outcome)
        return self._es_dfm(output, y, outcome)

    def _dfm(self, x: Tensor, rate: Tensor, head: Tensor, outcome: Outcome) -> Tensor:
        """Delays are exponential of `rate`, which a label is known to have or to lack with time.

        Still nothing after e: -ln(1 - p + p exp(-rate e)). A label after d: softplus(-x) - ln rate + rate d. What an
        earlier example has said already is taken off, so that an event's examples add up to its likelihood.
        """
        positive, delay = outcome.label > 0.5, max(outcome.delay_s / self.unit_s, SOONEST)
        before = self._said_before(outcome)
        known = x.new_zeros(1) if before is None else nothing_yet(x, rate, before)
        if outcome.fate == Fate.LATE and not self.ripe:
            return 0.0 * x
        if positive:
            log_rate = torch.where(head < -20.0, head, torch.log(rate.clamp_min(1e-30)))
            return functional.softplus(-x) - log_rate + rate * delay - known
        if outcome.fate in (Fate.INLINE, Fate.JOINED):  # a label says so
            return functional.softplus(x)
        return nothing_yet(x, rate, outcome.delay_s / self.unit_s) - known

    def _said_before(self, outcome: Outcome) -> float | None:
        """How long an earlier example had waited in vain."""
        if outcome.fate == Fate.LATE:
            return self.window if not self.staged or outcome.delay_s / self.unit_s > self.window else self.wait
        return self.wait if outcome.fate == Fate.EXPIRED and self.staged else None

    def _es_dfm(self, output: Tensor, y: Tensor, outcome: Outcome | None) -> Tensor:
        x, late, real = output[:, 0], output[:, 1], output[:, 2]
        dp, tn = late.detach().sigmoid(), real.detach().sigmoid()
        losses = (1.0 + dp) * (y * functional.softplus(-x) + (1.0 - y) * tn * functional.softplus(x))
        if outcome is None or outcome.fate == Fate.PROVISIONAL or not self.ripe:
            return losses
        verdict = outcome.fate == Fate.EXPIRED
        helper = functional.softplus(-late[:1] if outcome.fate == Fate.LATE else late[:1])
        if verdict or outcome.fate == Fate.LATE:  # no immediate positive
            helper = helper + functional.softplus(-real[:1] if verdict else real[:1])
        live = helper if verdict and self.staged else losses[:1] + helper  # the negative has been learned from
        return torch.cat((live, losses[1:]))


def fake_negative_weighted(x: Tensor, y: Tensor) -> Tensor:
    """(B,) FNW of logits and labels (B,)."""
    p, rest = x.detach().sigmoid(), (-x.detach()).sigmoid()
    return (1.0 + p) * (y * functional.softplus(-x) + (1.0 - y) * rest * functional.softplus(x))


def nothing_yet(x: Tensor, rate: Tensor, elapsed: float) -> Tensor:
    """-ln(1 - p + p exp(-rate elapsed)): stable, where p is 1 to the last bit too."""
    return -torch.logaddexp(-functional.softplus(x), -functional.softplus(-x) - rate * elapsed)


def odds(logit: float) -> float:
    """p / (1 - p) of a p below 1/2; what FNC serves."""
    return min(math.exp(min(logit, 0.0)), 1.0 - 1e-6)
