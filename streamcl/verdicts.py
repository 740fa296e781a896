"""What an outcome is good for: to be learned from, to be measured, both, or neither."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from streamcl.config import Config
from streamcl.random import bits, key_of
from streamcl.records import Fate, Outcome, mark

LEARN_VERDICTS = ("dfm", "es_dfm")
"""Losses that learn from a window's end too, although its event has been learned from as a negative for now."""

_HEARD = frozenset(Fate) - {Fate.LATE, Fate.PROVISIONAL}


class Verdicts:
    """By fate, and for negatives by a draw. Pure: a draw hangs on the seed and the event's id alone.

    Metrics hear of each event once, and of what its window came to: neither of negatives for now, nor of labels behind
    the window.
    """

    def __init__(self, config: Config) -> None:
        self.staged = config.join.wait_s is not None
        self.window_s = config.join.attribution_window_s
        self.share = config.sample.negatives
        self.key = key_of(config.seed, "sample.negatives")
        self.learns_all = not self.staged or config.loss.kind in LEARN_VERDICTS

    def of(self, outcome: Outcome) -> Outcome | None:
        """The outcome, with the share that it was drawn from; None: it is a negative that was not drawn."""
        if self.share == 1.0 or outcome.label != 0.0:
            return outcome
        drawn = bits(self.key, mark(outcome.ticket.id) & (1 << 64) - 1) < self.share * 2.0**64
        return replace(outcome, drawn=self.share) if drawn else None

    def teaches(self, outcome: Outcome) -> bool:
        return self.learns_all or outcome.fate != Fate.EXPIRED

    def counts(self, outcome: Outcome) -> bool:
        """In metrics."""
        if outcome.fate == Fate.LATE:
            return self.staged and outcome.delay_s <= self.window_s
        return outcome.fate != Fate.PROVISIONAL

    def counted(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Those of which metrics hear."""
        if _HEARD.issuperset([outcome.fate for outcome in outcomes]):
            return outcomes
        return [outcome for outcome in outcomes if self.counts(outcome)]
