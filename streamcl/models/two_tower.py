"""A user's vector times an item's: the score of every item is one product with a vector that was computed before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from streamcl.architectures import TwoTower as Config
from streamcl.models.tower import MLP, Network, Shape


class TwoTower(Network):
    """logit = exp(s) <user, item> + b; each vector is made by hidden ReLU layers of the features of its side alone.

    exp(-s) is the temperature, learned from 1 on. With negatives that are drawn at random, ln q(item) is taken off the
    logit in learning, `two_tower.sampled` being q: what is learned and served is then how likely the item is for the
    user, up to a constant, however often it has been drawn.

    Source:
        Yi et al. 2019 (RecSys), doi 10.1145/3298689.3346996, section 3: the product, the correction, the temperature.

    Differs from the source:
        One example at a time, so the loss is logistic and negatives are events, not the rest of a batch; q is the
        event's own number, not estimated. Vectors have their length. The item's last layer begins at 0, so that the
        first scores are the prior, and the user's is drawn, or neither would ever move.
    """

    def __init__(self, shape: Shape, config: Config) -> None:
        super().__init__(shape)
        self.sampled = None if config.sampled is None else shape.numbers.index(config.sampled)
        self.reads = {side: _places(shape, getattr(config, side)) for side in ("user", "item")}
        user, item = (
            shape._replace(fields=len(fields), numerics=len(numbers), outputs=config.width)
            for fields, numbers in self.reads.values()
        )
        self.project_user, self.item_tower = MLP(user), MLP(item)
        self.scale = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1))

    @property
    def towers(self) -> tuple[MLP, ...]:
        return self.project_user, self.item_tower

    @property
    def base(self) -> nn.Parameter:
        return self.bias

    def user(self, vectors: Tensor, dense: Tensor) -> Tensor:
        """(B, width)"""
        return self._read(self.project_user, "user", vectors, dense)

    def item(self, vectors: Tensor, dense: Tensor) -> Tensor:
        """(B, width)"""
        return self._read(self.item_tower, "item", vectors, dense)

    def _read(self, tower: MLP, side: str, vectors: Tensor, dense: Tensor) -> Tensor:
        fields, numbers = self.reads[side]
        return tower.of(torch.cat((vectors[:, fields].flatten(1), dense[:, numbers]), 1))

    def forward(self, _first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        product = (self.user(vectors, dense) * self.item(vectors, dense)).sum(1, keepdim=True)
        return torch.exp(self.scale) * product + self.bias

    def correction(self, dense: Tensor) -> Tensor | None:
        """(B, 1) -ln q(item); nothing where q is no probability: missing numbers read as 0."""
        if self.sampled is None:
            return None
        q = dense[:, self.sampled, None]
        return torch.where((q > 0) & (q <= 1), -torch.log(q.clamp(min=torch.finfo(q.dtype).tiny)), 0.0)


def _places(shape: Shape, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of fields, and of numerics, in their own order."""
    fields = [place for place, name in enumerate(shape.names) if name in names]
    return fields, [place for place, name in enumerate(shape.numbers) if name in names]
