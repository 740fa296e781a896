"""A step of the engine, from tensors."""

from torch import Tensor

from streamcl.engine.eager import Eager
from streamcl.plugin import Plan, Rows, Step


def take(
    engine: Eager, ids: Tensor, weights: Tensor, dense: Tensor, y: Tensor, share: Tensor, served: float | None = None
) -> bool:
    """One update on these rows, all of them live."""
    return engine.step(Step(0, Plan(), Rows(ids, weights, dense, y), None, share, served=served))
