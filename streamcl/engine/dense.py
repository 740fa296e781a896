"""The dense parameters of a module: end to end in one tensor, with their optimiser's slots, and what follows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from streamcl.engine.optimizers import Update
from streamcl.protocols import State
from streamcl.state import cut

OPTIONAL = "plugins."
"""How the names of parameters begin that may come and go at a clean stop."""


class Dense:
    """Every parameter of a module as a view of one tensor, so that an optimiser does one update, not many.

    Rules that change weights (see `streamcl.plasticity`) do it here. What belongs to a weight follows it when it is
    made anew: the optimiser's slots start as those of a new weight, `sets` and `anchors` take the fresh value, `traces`
    go to zero.

    Attributes:
        flat: (P,) the parameters that learn, in the order of `named_parameters`.
        spans: Where each lies in it, by name.
        params: The same by name, as views.
        slots: What the optimiser holds, (P,) each: one step count for each weight, so that a fresh one is
            bias-corrected as fresh.
        sets: Other weights of the same module by name (an average, a teacher), (P,) each.
        anchors: What weights are pulled to by name, (P,) each.
        traces: What rules have gathered about each weight by name, (P,) each.
    """

    def __init__(self, module: nn.Module, update: Update) -> None:
        self.params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self.flat = _flatten(list(self.params.values()))
        self.first = self.flat.clone()
        self.update = update
        self.slots = update.slots(self.flat)
        self.sets: dict[str, Tensor] = {}
        self.anchors: dict[str, Tensor] = {}
        self.traces: dict[str, Tensor] = {}
        sizes = [param.numel() for param in self.params.values()]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.spans = {name: slice(a, a + n) for name, a, n in zip(self.params, starts, sizes, strict=True)}
        self._saved = self.spans  # of the state that was loaded last

    def gradient(self, by_param: Sequence[Tensor]) -> Tensor:
        """(P,) of gradients in the order of `params`."""
        return torch.cat([g.reshape(-1) for g in by_param])

    def step(self, gradient: Tensor, only: Tensor | None = None) -> None:
        """One update by the optimiser; the gradient is (P,), and `only` (P,) bool says which weights move at all."""
        with torch.no_grad():
            flat, slots = self.update.step(self.flat, gradient, self.slots)
            for column, new in zip((self.flat, *self.slots), (flat, *slots), strict=True):
                column.copy_(new if only is None else torch.where(only, new, column))

    def part(self, column: Tensor, name: str) -> Tensor:
        """What a column of shape (P,) holds of one parameter, as a view of the parameter's shape."""
        return column[self.spans[name]].view_as(self.params[name])

    def copies(self, name: str) -> Iterator[Tensor]:
        """A parameter, and its counterparts in the weight sets."""
        yield self.params[name].data
        for column in self.sets.values():
            yield self.part(column, name)

    def settle(self, name: str, before: Tensor) -> None:
        """A parameter has been changed beside the optimiser: let it go on from what each weight is that has moved."""
        now, slots = self.params[name].detach(), [self.part(column, name) for column in self.slots]
        for slot, new in zip(slots, self.update.moved(now, slots), strict=True):
            slot.copy_(torch.where(now != before, new, slot))

    def put(self, flat: Tensor) -> None:
        """Give the weights these values (P,) beside the optimiser, which goes on from there where one has moved."""
        moved = flat != self.flat
        for slot, new in zip(self.slots, self.update.moved(flat, self.slots), strict=True):
            slot.copy_(torch.where(moved, new, slot))
        self.flat.copy_(flat)

    def renew(self, name: str, index: Tensor, fresh: Tensor, dim: int = 0, shape: Sequence[int] | None = None) -> None:
        """Make slices of a parameter anew: as if they had these values and had never been learned.

        Args:
            index: (k,) int64 along `dim` of the parameter, seen in `shape` if given.
            fresh: What they are to be; k along `dim`.
        """
        shape = shape or self.params[name].shape
        slots = [slot.view_as(fresh) for slot in self.update.slots(fresh.reshape(-1))]
        with torch.no_grad():
            for column in (self.flat, *self.sets.values(), *self.anchors.values()):
                self.part(column, name).view(shape).index_copy_(dim, index, fresh)
            for column, slot in zip(self.slots, slots, strict=True):
                self.part(column, name).view(shape).index_copy_(dim, index, slot)
            for column in self.traces.values():
                self.part(column, name).view(shape).index_fill_(dim, index, 0.0)

    def state_dict(self) -> State:
        """Sets, anchors and traces are left to the rules that own them."""
        return {
            "params": {name: cut(p) for name, p in self.params.items()},
            "slots": {str(i): cut(s) for i, s in enumerate(self.slots)},
        }

    def load_state_dict(self, state: State) -> None:
        """Parameters of a plug-in that the state doesn't know begin here; those of one that has gone are left out."""
        missing = [name for name in self.params if name not in state["params"] and not name.startswith(OPTIONAL)]
        if missing:
            raise KeyError(f"params: the state has no {missing[0]}")
        self._saved, at = dict[str, slice](), 0
        for name, value in state["params"].items():
            self._saved[name] = slice(at, at + value.numel())
            at += value.numel()
        flat = torch.cat([value.reshape(-1) for value in state["params"].values()])
        # Copied into the tensors that exist: their alignment, on which kernels may depend, stays what it was.
        with torch.no_grad():
            self.flat.copy_(self.fitted(flat, self.first))
            for i, (slot, fresh) in enumerate(zip(self.slots, self.update.slots(self.first), strict=True)):
                slot.copy_(self.fitted(state["slots"][str(i)], fresh))

    def fitted(self, saved: Tensor, fresh: Tensor) -> Tensor:
        """A column (..., P') of the state that was loaded last, for the parameters that are here now (..., P).

        What belongs to a plug-in's parameters that the state doesn't know is `fresh` (P,) or (..., P).
        """
        if self._saved == self.spans:
            return saved
        column = fresh.expand(*saved.shape[:-1], len(self.flat)).clone()
        for name, span in self.spans.items():
            if name in self._saved:
                column[..., span] = saved[..., self._saved[name]]
        return column


def _flatten(params: list[nn.Parameter]) -> Tensor:
    """Lay parameters end to end and make each a view of its part."""
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    for param, part in zip(params, torch.split(flat, [param.numel() for param in params]), strict=True):
        param.data = part.view_as(param)
    return flat
