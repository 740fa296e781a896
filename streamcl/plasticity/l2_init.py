"""Weights are pulled to where they began, which is where a net could learn anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamcl.plugin import Grads, Rule, Step
from streamcl.protocols import State

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class L2Init(Rule):
    """g <- g + lambda (w - w0), so with SGD w <- w - lr (g + lambda (w - w0)), biases included.

    w0 is what a weight was when the rule began; of a weight that is made anew, what it was made. The optimiser scales
    the pull as it does that of `L2`.

    Args:
        strength: lambda, 1 / step. 0 leaves training bit for bit as it was.

    Source:
        Kumar, Marklund & Van Roy 2023, arXiv 2308.11958, "L2 Init" (regenerative regularisation): the loss plus
        lambda |theta - theta0|^2.

    Differs from the source:
        lambda is of the gradient, twice that of a penalty. A checkpoint that was learned without the rule has lost
        its w0: the rule begins there, and w0 is what its weights were.
    """

    def __init__(self, dense: Dense, strength: float = 1e-2) -> None:
        self.dense, self.strength = dense, strength
        self.anchor = dense.anchors["l2_init"] = dense.flat.clone()  # (P,) w0

    def transform(self, grads: Grads, step: Step) -> Grads:
        if not self.strength:
            return grads
        return grads.with_dense(grads.dense.add(self.dense.flat - self.anchor, alpha=self.strength))

    def state_dict(self) -> State:
        return {"anchor": self.anchor.clone()}

    def load_state_dict(self, state: State) -> None:
        self.anchor.copy_(self.dense.fitted(state["anchor"], self.dense.flat) if state else self.dense.flat)
