"""Models that weigh before they sum: fields by fields, and a user's history by the item in question."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcl.architectures import DIN as DINConfig
from streamcl.architectures import AutoInt as AutoIntConfig
from streamcl.models.tower import MLP, Network, Shape


class AutoInt(Network):
    """Fields and numbers attend to each other, several times over; beside it hidden ReLU layers (AutoInt+).

    Source:
        Song et al. 2019 (CIKM), arXiv 1810.11921: equation 4 (a number times a vector of its own), 5 and 6 (attention
        of each head, softmax over all fields), 7 (heads side by side), 8 (ReLU of that plus W_Res e), 9 (a weight for
        each number of the last layer); AutoInt+ in section 5.5: the outputs of both parts are added.

    Differs from the source:
        Nothing known; heads aren't divided by a root of their width, as in the equations.
    """

    beside = True

    def __init__(self, shape: Shape, config: AutoIntConfig) -> None:
        super().__init__(shape)
        self.heads = config.heads
        width, units = shape.dim, config.heads * config.units
        self.project_numbers = nn.Embedding(shape.numerics, shape.dim)
        self.project = nn.ModuleList()
        for _ in range(config.layers):
            parts = {name: nn.Linear(width, units, bias=False) for name in ("query", "key", "value", "rest")}
            self.project.append(nn.ModuleDict(parts))
            width = units
        self.head = nn.Linear((shape.fields + shape.numerics) * width, shape.outputs)
        self.deep = MLP(shape)

    @property
    def tower(self) -> MLP:
        return self.deep

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        e = torch.cat((vectors, dense.unsqueeze(2) * self.project_numbers.weight), 1)  # (B, F + N, D)
        for layer in self.project:
            e = self._interacted(e, layer)
        out: Tensor = self.head(e.flatten(1)) + self.deep(first, vectors, dense)
        return out

    def _interacted(self, e: Tensor, layer: Any) -> Tensor:
        """(B, M, heads x units) of (B, M, width)."""
        query, key, value = (
            layer[name](e).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )  # (B, heads, M, units)
        attention = torch.softmax(query @ key.transpose(2, 3), 3)  # (B, heads, M, M)
        attended: Tensor = (attention @ value).transpose(1, 2).flatten(2)
        return torch.relu(attended + layer["rest"](e))


class DIN(Network):
    """What a user has done counts by how it fits the item in question; then hidden ReLU layers over everything.

    The vector of a history is the sum of w_j (1 + a(e_j, t)) e_j over its items: w_j the weight of a slot, t the
    target's embedding, a a small net of [e_j, t, e_j - t, e_j * t]. It stands where the pooled bag would. Where history
    and target share rows (feature kind `history`) they are compared in one space.

    Source:
        Zhou et al. 2018 (KDD), arXiv 1706.06978, equation 3 and figure 2: no softmax, so that how much was done counts.

    Differs from the source:
        ReLU instead of PReLU or Dice. e_j - t and e_j * t, as in the authors' code, instead of an outer product. The 1
        lets it begin as pooling does, for a's last layer begins at 0. A bag's own weights stay: 1 with
        `pooling = "sum"`, as in the equation, 1 / n with "mean".
    """

    slots = True

    def __init__(self, shape: Shape, config: DINConfig) -> None:
        super().__init__(shape)
        self.units = nn.ModuleList()
        self.places = []
        pair = shape._replace(fields=4, numerics=0, outputs=1, hidden=config.hidden)
        for history, target in sorted(config.attends.items()):
            field = shape.names.index(history)
            start, count = shape.slots.index(field), shape.slots.count(field)
            self.places.append((field, shape.names.index(target), slice(start, start + count)))
            self.units.append(MLP(pair))
        self.deep = MLP(shape)

    @property
    def tower(self) -> MLP:
        return self.deep

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor, items: Tensor, weights: Tensor) -> Tensor:
        fields = list(vectors.unbind(1))
        units: list[Any] = list(self.units)
        for (field, target, of), unit in zip(self.places, units, strict=True):
            fields[field] = self._attended(unit, items[:, of], weights[:, of], vectors[:, target])
        out: Tensor = self.deep(first, torch.stack(fields, 1), dense)
        return out

    @staticmethod
    def _attended(unit: MLP, items: Tensor, weights: Tensor, target: Tensor) -> Tensor:
        """(B, D) of items (B, H, D), weights (B, H), target (B, D)."""
        against = target.unsqueeze(1).expand_as(items)
        pair = torch.cat((items, against, items - against, items * against), 2)  # (B, H, 4D)
        share = weights * (1.0 + unit.of(pair)[:, :, 0])
        return (share.unsqueeze(2) * items).sum(1)
