"""What every model is, and hidden layers, which several have."""

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
    names: tuple[str, ...] = ()  # (F,) of the fields
    numbers: tuple[str, ...] = ()  # (N,) of the numerics
    slots: tuple[int, ...] = ()  # (S,) field of each slot: those of a bag stand side by side, in its order
    tasks: int = 1  # the outputs are of so many tasks


class Network(nn.Module):
    """What the engine asks of a model; the base of the built-in ones and of a user's.

    `forward(first, vectors, dense)`: first (B, F, O) first-order weights, vectors (B, F, D) embeddings, each field's
    slots pooled, dense (B, N) standardised numerics; it returns (B, O) logits, or standardised values for regression.
    With `slots` it is given two more: the embeddings of all slots (B, S, D), unweighted, and their weights (B, S), 0
    where a slot is empty.

    Attributes:
        first_order, embedding: Which of the two it reads, and so what a row of the table holds.
        slots: Whether it reads slots that are not pooled.
        beside: Whether its output is more than what its `tower` says.
        dim: D, numbers of a row's embedding.
    """

    first_order = False
    embedding = True
    slots = False
    beside = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dim = shape.dim

    @property
    def tower(self) -> MLP | None:
        """Its hidden layers, the last of which may be a key; None where it has no such."""
        return None

    @property
    def towers(self) -> tuple[MLP, ...]:
        """All hidden layers whose units may be made anew, in the order of the computation."""
        return () if self.tower is None else (self.tower,)

    @property
    def base(self) -> nn.Parameter:
        """The bias of its output (O,) or more: what is answered where nothing else is known."""
        if self.tower is None:
            raise AttributeError(f"{type(self).__name__} does not say what its bias is")
        return self.tower.head.bias

    def correction(self, dense: Tensor) -> Tensor | None:
        """(B, 1) or (B, O) that is added to the output in learning alone, of raw numbers among the numerics."""
        return None


class MLP(Network):
    """Embeddings and numerics through hidden ReLU layers.

    Source:
        Layer norm without parameters before the activation: Elsayed et al. 2024, arXiv 2410.14606, section 3; theirs
        is Leaky ReLU.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
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
