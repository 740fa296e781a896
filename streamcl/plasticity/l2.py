"""Weights are pulled to zero, so that none grows for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamcl.plugin import Grads, Rule, Step

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class L2(Rule):
    """g <- g + lambda w, so with SGD w <- w - lr (g + lambda w), biases included.

    Other optimisers scale the pull as they scale the gradient: Adagrad and Adam make it weaker where gradients are
    large, and FTRL adds it to the sums that its weights are made of.

    Args:
        strength: lambda, 1 / step. 0 leaves training bit for bit as it was.

    Source:
        Ridge regularisation; its use against the loss of plasticity: Dohare et al. 2024, Nature 632:768-774.

    Differs from the source:
        lambda is of the gradient, not of a penalty: of lambda / 2 |w|^2. `optimizer.l2` does the same and pulls the
        rows of the table as well, and has a closed form for FTRL.
    """

    def __init__(self, dense: Dense, strength: float = 1e-3) -> None:
        self.dense, self.strength = dense, strength

    def transform(self, grads: Grads, step: Step) -> Grads:
        return grads.with_dense(grads.dense.add(self.dense.flat, alpha=self.strength)) if self.strength else grads
