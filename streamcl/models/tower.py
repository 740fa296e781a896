"""Hidden layers, which several models have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Shape(NamedTuple):
    """What a model is built for: F fields, D numbers per embedding, N numerics, O outputs, units per hidden layer, and
    how many cross layers.

    With `layer_norm` a hidden layer's sums are brought to mean 0 and deviation 1 before the ReLU.
    """

    fields: int
    dim: int
    numerics: int
    outputs: int
    hidden: tuple[int, ...]
    layer_norm: bool = False
    cross: int = 0


class MLP(nn.Module):
    """Embeddings and numerics through hidden ReLU layers.

    Source:
        Layer norm without parameters before the activation: Elsayed et al. 2024, arXiv 2410.14606, section 3; theirs
        is Leaky ReLU.
    """

    first_order, embedding = False, True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = (shape.fields * shape.dim + shape.numerics, *shape.hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, shape.hidden, strict=False))
        self.head = nn.Linear(widths[-1], shape.outputs)
        self.norms = [(width,) if shape.layer_norm else None for width in shape.hidden]

    @property
    def tower(self) -> MLP:
        return self

    def forward(self, _first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        return self.of(torch.cat((vectors.flatten(1), dense), 1))

    def of(self, h: Tensor) -> Tensor:
        """Of what enters the first layer (B, F*D + N)."""
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            h = torch.relu(functional.layer_norm(layer(h), norm) if norm else layer(h))
        out: Tensor = self.head(h)
        return out
