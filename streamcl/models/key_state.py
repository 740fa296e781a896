"""A model that remembers what each key has done: a recurrent backbone between the features and the hidden layers."""

from __future__ import annotations

from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn

from streamcl.architectures import Recurrent as Config
from streamcl.models.legs import LegS
from streamcl.models.linear_state import Gated, KeyState, MinGRU, MinLSTM, Recurrent
from streamcl.models.lssl import DiagonalLSSL
from streamcl.models.online_credit import OnlineCredit
from streamcl.models.retnet import RetNet
from streamcl.models.tower import MLP, Network, Shape


class Packed(NamedTuple):
    """Where a tensor of a key's state lies in the row of numbers that stands for it."""

    name: str
    start: int
    shape: tuple[int, ...]


class KeyStateModel(Network):
    """Embeddings and numerics x, what the event's key has done before it, then hidden ReLU layers over both.

    h, state' = cell(x, state, dt); output = tower([x, h]). `forward` reads the state where the numerics end: `width`
    numbers, the last of them the event time since the key's event before (1 at first). What the state is afterwards is
    left in `after` by a pass without gradient; a step leaves nothing, for the event has been answered already.

    Args:
        cell: See `streamcl.models.linear_state.Recurrent`.
        timed: The cell is told of the time between events; otherwise one event is one step.
    """

    def __init__(self, shape: Shape, cell: nn.Module, timed: bool) -> None:
        super().__init__(shape)
        self.numbers, self.timed = shape.numerics, timed
        self.cell = cell
        self.deep = MLP(shape._replace(numerics=shape.numerics + self._recurrent.width))
        self.packed: list[Packed] = []
        at = 0
        for name, value in self._recurrent.init_state(1).items():
            self.packed.append(Packed(name, at, tuple(value.shape[1:])))
            at += value[0].numel()
        self.width = at + 1
        self.after: dict[int, Tensor] = {}  # by thread

    @property
    def _recurrent(self) -> Recurrent:
        cell: object = self.cell
        return cell  # type: ignore[return-value]

    @property
    def tower(self) -> MLP:
        return self.deep

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        numbers, row = dense[:, : self.numbers], dense[:, self.numbers :]
        dt = row[:, -1] if self.timed else None
        x = torch.cat((vectors.flatten(1), numbers), 1)  # (B, F*D + N)
        h, after = self._recurrent.step(x, self.unpack(row), dt)
        if not torch.is_grad_enabled():
            parts = [after[each.name].reshape(len(x), -1) for each in self.packed]
            self.after[get_ident()] = torch.cat(parts, 1)
        out: Tensor = self.deep(first, vectors, torch.cat((numbers, h), 1))
        return out

    def unpack(self, row: Tensor) -> KeyState:
        """Of (B, width)."""
        found = {}
        for name, start, shape in self.packed:
            size = torch.Size(shape).numel()
            found[name] = row[:, start : start + size].reshape(len(row), *shape)
        return found

    def initial(self) -> Tensor:
        """(width,) of a key that has done nothing."""
        state = self._recurrent.init_state(1)
        return torch.cat([*(state[each.name].reshape(-1) for each in self.packed), torch.ones(1)]).detach()


def build_cell(config: Config, inputs: int, seed: int) -> nn.Module:
    """The configured backbone, with exact traces or without."""
    cell: nn.Module
    match config.cell:
        case "min_gru" | "min_lstm":
            made: type[Gated] = MinGRU if config.cell == "min_gru" else MinLSTM
            cell = made(inputs, config.units, seed=seed, horizon=config.horizon, timed=config.timed)
        case "lssl":
            cell = DiagonalLSSL(inputs, config.units, config.units, seed=seed)
        case "retnet":
            cell = RetNet(inputs, config.units, seed=seed, mimetic=True)
        case "legs":
            cell = LegS(inputs, config.units)
    if config.credit == "detached":
        return cell
    return OnlineCredit(cell, None if config.credit == "exact" else config.feedback)  # type: ignore[arg-type]
