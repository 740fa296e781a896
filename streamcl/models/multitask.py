"""What several tasks have in common is learned once: a shared bottom, or experts that each task mixes for itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamcl.architectures import MultiTask as Config
from streamcl.models.tower import MLP, Network, Shape


class MultiTask(Network):
    """x of embeddings and numerics -> experts f_i(x) -> for each task its mixture sum_i g_i(x) f_i(x) -> its own tower.

    g of a task is a softmax over experts of a linear map of x. With one expert there is no gate: the shared bottom.

    Source:
        Ma et al. 2018 (KDD), doi 10.1145/3219819.3220007: equation 1 (shared bottom), 6 to 8 (multi-gate mixture of
        experts).

    Differs from the source:
        Gates begin at 0: every expert counts alike until one is worth more. A multiclass task is one task.

    Args:
        experts: `shape.hidden` is the units of each.
    """

    def __init__(self, shape: Shape, config: Config, experts: int) -> None:
        super().__init__(shape)
        *hidden, width = shape.hidden
        self.experts = nn.ModuleList(MLP(shape._replace(outputs=width, hidden=tuple(hidden))) for _ in range(experts))
        entered = shape.fields * shape.dim + shape.numerics
        per_task = shape.outputs // shape.tasks
        self.gates = nn.ModuleList(nn.Linear(entered, experts, bias=False) for _ in range(shape.tasks * (experts > 1)))
        own = shape._replace(fields=1, dim=width, numerics=0, outputs=per_task, hidden=config.hidden)
        self.own = nn.ModuleList(MLP(own) for _ in range(shape.tasks))

    @property
    def tower(self) -> MLP:
        """Of the first task."""
        return self.towers[len(self.experts)]

    @property
    def towers(self) -> tuple[MLP, ...]:
        return *_layers(self.experts), *_layers(self.own)

    def forward(self, _first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        x = torch.cat((vectors.flatten(1), dense), 1)  # (B, E)
        said = torch.stack([torch.relu(expert.of(x)) for expert in _layers(self.experts)], 1)
        mixed = [torch.softmax(gate(x), 1).unsqueeze(1) @ said for gate in self.gates] or [said] * len(self.own)
        return torch.cat([own.of(h[:, 0]) for own, h in zip(_layers(self.own), mixed, strict=True)], 1)


def _layers(modules: nn.ModuleList) -> list[MLP]:
    return [module for module in modules if isinstance(module, MLP)]
