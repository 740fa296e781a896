"""A polynomial of everything that a key has done: HiPPO-LegS, a memory with nothing to train."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from streamcl.models.linear_state import KeyState


class LegS(nn.Module):
    """The history of each input, as the polynomial nearest to it on the whole of the key's time, old and new alike.

    After an event at time t the coefficients c (in, N) are those of the projection of x(0..t) onto the first N
    normalised Legendre polynomials of u = time / t. Nothing is forgotten and no time scale is chosen; what is long ago
    is seen ever more coarsely. There is no parameter, so that credit through the past is exact without any trace.

    x is taken to have had its value since the key's last event. With dt None an event lasts one unit of time (the
    event-index form). A gap in which x stands still may be one event or many: the coefficients are the same.

    Args:
        inputs: in, numbers per event.
        order: N, coefficients per input.
        dtype: Of the state. A later `double()` would not bring back the nodes' lost digits.

    Shape:
        h (B, in * N), the coefficients of the first input first. State: "c" (B, in, N), "t" (B,).

    Source:
        Gu et al. 2020, arXiv 2008.07669, theorem 2 (scaled Legendre): dc/dt = -A c / t + B x / t,
        A_nk = sqrt(2n + 1) sqrt(2k + 1) for n > k and n + 1 for n = k, B_n = sqrt(2n + 1).

    Differs from the source:
        The equation is solved exactly for an x that stands still between events, where the paper takes Euler's or
        the bilinear rule: squeezing the old polynomial into [0, t / (t + dt)] and projecting again is done by
        Gauss-Legendre quadrature, which is exact for polynomials and, unlike powers of A's eigenvalues, stable for
        any N. The work per event is N^2 per input. The paper feeds the coefficients back into a gated recurrence;
        here they are what the head reads.
    """

    def __init__(self, inputs: int, order: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inputs, self.order, self.width = inputs, order, inputs * order
        nodes, weights = np.polynomial.legendre.leggauss(order)  # of degree 2N - 1: exact for products of two
        u = torch.from_numpy((nodes + 1.0) / 2.0)  # (Q,) in [0, 1]
        self.nodes: Tensor
        self.register_buffer("nodes", u.to(dtype))
        self.basis: Tensor
        self.register_buffer("basis", legendre(u, order).to(dtype))  # (Q, N)
        self.weights: Tensor
        self.register_buffer("weights", torch.from_numpy(weights / 2.0).to(dtype))  # (Q,)

    def init_state(self, n: int) -> KeyState:
        return {"c": self.nodes.new_zeros(n, self.inputs, self.order), "t": self.nodes.new_zeros(n)}

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        t = state["t"] + (1.0 if dt is None else dt)  # (B,)
        share = torch.where(t > 0.0, state["t"] / t, 0.0)[:, None]  # (B, 1) r, the part of time that is old
        c = state["c"] - _constant(x, self.order)  # of the past less x: behind r nothing is left to add
        values = c @ self.basis.T  # (B, in, Q) at the nodes
        squeezed = legendre(share * self.nodes, self.order) * (share * self.weights)[..., None]  # (B, Q, N)
        c = values @ squeezed + _constant(x, self.order)
        return c.flatten(1), {"c": c, "t": t}


def _constant(x: Tensor, order: int) -> Tensor:
    """(B, in, N) coefficients of a history that was always x."""
    return nn.functional.pad(x.unsqueeze(-1), (0, order - 1))


def legendre(u: Tensor, order: int) -> Tensor:
    """(..., N) the polynomials sqrt(2n + 1) P_n(2u - 1), n < N, orthonormal on [0, 1]."""
    z = 2.0 * u - 1.0
    found = [torch.ones_like(z), z]
    for n in range(2, order):
        found.append(((2 * n - 1) * z * found[-1] - (n - 1) * found[-2]) / n)
    norms = torch.sqrt(2.0 * torch.arange(order, dtype=u.dtype, device=u.device) + 1.0)
    return torch.stack(found[:order], -1) * norms
