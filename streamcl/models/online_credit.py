"""Credit for the whole past at a constant cost per event: traces beside the state of an element-wise recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.models.linear_state import ElementWise, KeyState, Recurrent, to_complex, to_parts


class OnlineCredit(nn.Module):
    """A backbone whose gradient at one event runs through everything that its key has done.

    `loss.backward()` on one event's h gives each parameter of the cell the gradient that backpropagation through the
    key's whole history would, as long as the parameters have stood still; nothing of the history is kept. The key's
    state holds, beside s, one trace per parameter: E_t = ds_t/dtheta, detached. In a unit that reads nobody else's
    past it is as large as the parameter, and

        E_t = a_t * E_(t-1) + (ds_t/dtheta with s_(t-1) held),    dL/dtheta = sum over keys and units of dL/ds_t * E_t.

    While parameters move, a trace mixes derivatives at old and new values; the error is of the order of the step.

    Args:
        cell: Its own units read x alone (`ElementWise`). x may come from a layer below and takes its share of the
            gradient, of this event only.
        decay: None for the exact trace. A number lambda in [0, 1) instead of a_t for all units: a fixed feedback,
            E_t = lambda E_(t-1) + (the same), biased but the same for any gate; 0 is truncated backpropagation
            of one step.

    State: those of the cell, and "trace.NAME" (B, parts * N) or (B, parts * N, in) for each traced parameter. For a
    minGRU that is 2 N (in + 1) numbers per key, far more than the N of its state: where keys are many, that is the
    price.

    Source:
        Exact traces: real-time recurrent learning, Williams & Zipser 1989, for element-wise recurrence: Mozer 1989;
        Irie et al. 2023, arXiv 2305.19044, "Exploring the promise and limits of real-time recurrent learning", section
        3.1. Fixed feedback: Caillon et al. 2025, arXiv 2503.23104, "Fast training of recurrent neural networks with
        stationary state feedbacks".

    Differs from the source:
        Irie et al. give the traces of an eLSTM, whose gates read their own state, and learn by reinforcement; here
        the gates read x only. Caillon et al. send the error back in time through a fixed matrix; the same sum is
        made forward here, so that no event waits for a later one, with lambda times the identity as the matrix.
    """

    def __init__(self, cell: ElementWise, decay: float | None = None) -> None:
        super().__init__()
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: {decay} is not in [0, 1)")
        self.cell, self.decay = cell, decay

    @property
    def width(self) -> int:
        return self.cell.width

    def init_state(self, n: int) -> KeyState:
        state = self.cell.init_state(n)
        for name in self.cell.traced:
            units, *rest = self.cell.param(name).shape
            state[f"trace.{name}"] = state["s"].new_zeros(n, self.cell.parts * units, *rest)
        return state

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        past = state["s"].detach()
        params = [self.cell.param(name) for name in self.cell.traced]
        with torch.no_grad():
            carry, immediate = self.cell.influence(x, past, dt)
            if self.decay is not None:
                carry = torch.full_like(carry, self.decay)
            carried = [_times(state[f"trace.{name}"], carry) for name in self.cell.traced]
            traces = [_plus(old, immediate[name], x) for name, old in zip(self.cell.traced, carried, strict=True)]
        s = self.cell.advance(x, past, dt)  # its graph holds this event only
        if torch.is_grad_enabled():
            s = _Past.apply(s, carried, *params)  # type: ignore[no-untyped-call]
        new: KeyState = {"s": s.detach()}
        new |= {f"trace.{name}": trace for name, trace in zip(self.cell.traced, traces, strict=True)}
        return self.cell.read(x, s), new

    def grow(self, units: int) -> None:
        """See `ElementWise.grow`; traces follow with `grown`, and stay exact: new units have no past."""
        self.cell.grow(units)

    def grown(self, state: KeyState) -> KeyState:
        return self.cell.grown(state)


class _Past(torch.autograd.Function):
    """The state as it is; on the way back, what older events did to it reaches the parameters through their traces."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, carried: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.carried = carried  # detached, and not written to: `step` makes new ones
        ctx.shapes = [param.shape for param in params]
        return s.view_as(s)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        return g, None, *(_summed(g, *pair) for pair in zip(ctx.carried, ctx.shapes, strict=True))


def _summed(g: Tensor, trace: Tensor, shape: torch.Size) -> Tensor:
    """dL/dtheta (N, ...) of dL/ds (B, parts * N) and ds/dtheta (B, parts * N, ...)."""
    by_part = (g * trace).sum(0) if trace.dim() == 2 else torch.einsum("bn,bni->ni", g, trace)
    return by_part.view(-1, *shape).sum(0)


def _times(trace: Tensor, carry: Tensor) -> Tensor:
    """carry (B, N) * trace (B, parts * N, ...), complex if carry is."""
    carry = carry if trace.dim() == 2 else carry.unsqueeze(2)
    return to_parts(carry * to_complex(trace)) if carry.is_complex() else carry * trace


def _plus(carried: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
    """Adds (B, N) the derivative by the weighted sum: as it is for a number per unit, times x for weights of x."""
    parts = to_parts(derivative) if derivative.is_complex() else derivative
    return carried + parts if carried.dim() == 2 else torch.addcmul(carried, parts.unsqueeze(2), x.unsqueeze(1))


class Stack(nn.Module):
    """Layers one above the other: each reads what the one below gives of the same event.

    With layers of `OnlineCredit` each layer's own past is credited exactly, and what the layer above remembers of this
    layer's earlier outputs is not: the gradient is truncated across layers, exact for the top layer only. Exact
    traces across layers cost as much as those of a dense recurrence (Irie et al. 2023, section 5).

    State: layer i's under "i.NAME".
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def width(self) -> int:
        return self._layer(-1).width

    def _layer(self, place: int) -> Recurrent:
        layer: Any = self.layers[place]
        return layer  # type: ignore[no-any-return]

    def init_state(self, n: int) -> KeyState:
        return {
            f"{place}.{name}": value
            for place in range(len(self.layers))
            for name, value in self._layer(place).init_state(n).items()
        }

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        new: KeyState = {}
        for place in range(len(self.layers)):
            own = {k.split(".", 1)[1]: v for k, v in state.items() if k.split(".", 1)[0] == str(place)}
            x, after = self._layer(place).step(x, own, dt)
            new |= {f"{place}.{name}": value for name, value in after.items()}
        return x, new
