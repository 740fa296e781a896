"""Which configurations are worth more of the log: successive halving over its prefixes.

Source: Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS,
arXiv 1502.07943, algorithm 1, with eta in the place of 2 and rounds of `first * eta^k` events as in Hyperband (Li et
al. 2018, arXiv 1603.06560).

Differs from the source: what survives goes on from its state, so a round costs only the events that are new; what
decides is the objective over the whole prefix, the prequential loss of a learner rather than a loss at its end; and the
base is carried along to the end whatever its rank, for all others are compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamcl.config import ConfigError
from streamcl.sweep.space import Halving

MORE_IS_BETTER = {"auc", "gauc", "accuracy"}


@dataclass(frozen=True, slots=True)
class Cut:
    """All that are left run up to `events`; then the best `keep` go on, and the base. None: the end."""

    events: int
    keep: int | None


def cuts(candidates: int, events: int, halving: Halving | None, choose_on: float | None, where: str) -> list[Cut]:
    """For so many candidates, the base among them.

    Raises:
        ConfigError: a round would take no fewer events than the choice as a whole.
    """
    last = max(1, round(choose_on * events)) if choose_on else events
    found, left = [], candidates
    if halving:
        if halving.first >= last:
            raise ConfigError(f"{where}: halving.first: the choice has {last} events, a round must have fewer")
        at = halving.first
        while at < last and left > 1:
            left = -(-left // halving.eta)
            found.append(Cut(at, left))
            at *= halving.eta
    if choose_on and last < events:
        found.append(Cut(last, 1))
    return [*found, Cut(events, None)]


def ranked(objective: str, values: Mapping[str, float | None]) -> list[str]:
    """Names, the best first; those without a value last, equals in the order given."""
    sign = -1.0 if objective in MORE_IS_BETTER else 1.0
    return sorted(values, key=lambda name: (values[name] is None, sign * (values[name] or 0.0)))
