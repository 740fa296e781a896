"""A group of ranks in one process, on a thread each, for tests that would start processes otherwise."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from streamcl.group.ranks import RankLost, Ranks

PATIENCE_S = 60.0


class Table:
    """Where `world` ranks sit; whoever leaves it breaks it up for all."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world)
        self.slots: list[Tensor] = [torch.zeros(0)] * world
        self.notes: dict[str, str] = {}

    def seats(self) -> list[Ranks]:
        return [Seat(self, rank) for rank in range(self.world)]


class Seat(Ranks):
    """One rank of a `Table`; all that `Ranks` promises, without a process group."""

    def __init__(self, table: Table, rank: int) -> None:
        super().__init__(rank, table.world)
        self._table = table

    def tell(self, name: str, text: str) -> None:
        self._table.notes[name] = text

    def told(self, name: str) -> str:
        return self._table.notes.get(name, "")

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        table = self._table
        table.slots[self.rank] = tensor.detach().clone()
        self._meet()
        found = [each.clone() for each in table.slots]
        self._meet()  # before anyone puts down the next one
        return found

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            tensor.copy_(torch.stack(self.all_gather(tensor)).sum(0))
        return tensor

    def close(self) -> None:
        self._table.barrier.abort()

    def _meet(self) -> None:
        try:
            self._table.barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError as error:
            raise RankLost(f"rank {self.rank} has lost another one") from error
