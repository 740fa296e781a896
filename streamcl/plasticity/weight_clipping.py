"""No weight goes further from zero than a multiple of where it could have begun."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from streamcl.plugin import Rule, Step

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense


class WeightClipping(Rule):
    """After each step of the optimiser every weight and bias is brought into +-zeta / sqrt(fan_in) of its layer.

    1 / sqrt(fan_in) is the bound of PyTorch's initial weights and biases; a convolution's fan_in counts its kernel. A
    module whose weight has no two axes (a norm, a PReLU) is left alone. FTRL makes its weights of sums of gradients, so
    a clipped weight would be back with its next step; it can't be combined.

    Args:
        bound: zeta; infinity leaves training bit for bit as it was.
        only: Names of modules whose parameters are clipped; None: all. Output layers that must reach far logits (of a
            rare class) want to be left out.

    Source:
        Elsayed, Lan, Lyle & Mahmood 2024, arXiv 2407.01704.

    Differs from the source:
        The bound is always that of PyTorch's initial uniform distribution; the authors' code takes 1 / sqrt(fan_in +
        fan_out) for weights and 1 for biases in one of its versions.
    """

    def __init__(
        self, dense: Dense, module: nn.Module, bound: float = 2.0, only: Collection[str] | None = None
    ) -> None:
        self.dense, self.bound = dense, bound
        self.upper = torch.full_like(dense.flat, math.inf)  # (P,)
        for name, layer in module.named_modules():
            weight = dense.params.get(f"{name}.weight" if name else "weight")
            if weight is None or weight.dim() < 2 or not weight.numel() or (only is not None and name not in only):
                continue
            for part, _ in layer.named_parameters(name, recurse=False):
                dense.part(self.upper, part).fill_(bound / math.sqrt(weight[0].numel()))
        self.lower = -self.upper

    def after(self, step: Step) -> None:
        torch.clamp(self.dense.flat, self.lower, self.upper, out=self.dense.flat)
