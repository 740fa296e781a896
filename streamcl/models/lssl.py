"""A state-space layer with a diagonal, complex state matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.models.linear_state import ElementWise, to_complex, to_parts, uniform_rows, unit_bound


class DiagonalLSSL(ElementWise):
    """A linear state-space layer with a diagonal, complex state matrix; all of it trainable.

    s_t = exp(lambda Delta dt) s_(t-1) + (exp(lambda Delta) - 1) / lambda * B x_t, h_t = Re(C s_t) + D x_t, with
    lambda = -exp(log_decay) + i frequency and Delta = exp(log_delta), each per unit. Without dt a step is dt = 1.

    A gap is decay without input: a step with dt = 3 equals two steps with dt = 1 and x = 0, then one with x. So a
    missed event of zeros changes nothing, and x counts as much after a long gap as after a short one.

    Args:
        inputs: in, numbers per event.
        units: N complex numbers of state.
        width: H, numbers given; `inputs` if None.
        seed: Of the weights.
        name: Of this layer among others of the model; enters the draws.
        delta: Range of Delta at the start, drawn log-uniformly; 1 / Delta is about the memory in events.

    Source:
        LSSL, Gu et al. 2021, arXiv 2110.13985, equations 1 to 5 (recurrent view) with trainable A and Delta, section
        3.2 and 4; diagonal: S4D-Lin, Gu et al. 2022, arXiv 2206.11893, section 4: lambda_n = -1/2 + i pi n.

    Differs from the source:
        One state fed by all inputs (as in S5, arXiv 2208.04933) in place of one state per channel; Delta per unit.
        Zero-order hold in place of the bilinear rule. The real part is -exp(.), so that it stays stable.
        No non-linearity behind the layer. Input weights of variance 1/in, scaled so that a unit of memory 1/Delta has
        a state of the input's size.
    """

    parts = 2
    traced = ("log_decay", "frequency", "log_delta", "in_re", "in_im")
    by_unit = (*traced, "out_re", "out_im")

    def __init__(
        self,
        inputs: int,
        units: int,
        width: int | None = None,
        *,
        seed: int = 0,
        name: str = "linear_state",
        delta: tuple[float, float] = (1e-3, 1e-1),
    ) -> None:
        super().__init__(inputs, units, inputs if width is None else width, seed, name)
        self.delta = delta
        self._create()
        self.skip = nn.Parameter(uniform_rows(self._key("skip"), 0, self.width, inputs, unit_bound(inputs)))

    def rows(self, start: int, count: int) -> Mapping[str, Tensor]:
        def weights(name: str, width: int, bound: float) -> Tensor:
            return uniform_rows(self._key(name), start, count, width, bound)

        log_delta = self._log_uniform("log_delta", start, count, *self.delta)
        scale = torch.exp(-0.5 * log_delta)[
            :, None
        ]  # a sum of 1 / Delta inputs of weight Delta has deviation sqrt(Delta)
        bound = unit_bound(2 * self.inputs)
        return {
            "log_decay": torch.full((count,), math.log(0.5)),
            "frequency": math.pi * torch.arange(start, start + count, dtype=torch.float32),
            "log_delta": log_delta,
            "in_re": scale * weights("in_re", self.inputs, bound),
            "in_im": scale * weights("in_im", self.inputs, bound),
            "out_re": weights("out_re", self.width, unit_bound(self.units)),
            "out_im": weights("out_im", self.width, unit_bound(self.units)),
        }

    def silent(self, _name: str, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)

    def _spectrum(self, dt: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """lambda (N,), Delta (N,), and exp(lambda Delta dt) as (1, N) or (B, N)."""
        rates = torch.complex(-self.param("log_decay").exp(), self.param("frequency"))
        delta = self.param("log_delta").exp()
        turn = rates * delta
        return rates, delta, torch.exp(turn if dt is None else turn * dt[:, None]).view(-1, self.units)

    def _driven(self, x: Tensor) -> Tensor:
        """(B, N) B x."""
        return torch.complex(x @ self.param("in_re").T, x @ self.param("in_im").T)

    def advance(self, x: Tensor, s: Tensor, dt: Tensor | None) -> Tensor:
        rates, delta, carry = self._spectrum(dt)
        hold = torch.expm1(rates * delta) / rates  # (N,)
        return to_parts(carry * to_complex(s) + hold * self._driven(x))

    def influence(self, x: Tensor, s: Tensor, dt: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        rates, delta, carry = self._spectrum(dt)
        hold, step = torch.expm1(rates * delta) / rates, torch.exp(rates * delta)
        span = torch.ones_like(x[:, :1]) if dt is None else dt[:, None]  # (B, 1)
        carried, driven = carry * to_complex(s), self._driven(x)
        by_rate = span * delta * carried + (delta * step - hold) / rates * driven
        by_delta = span * rates * carried + step * driven
        hold = hold.expand(len(x), -1)
        return carry.expand(len(x), -1), {
            "log_decay": by_rate * rates.real,
            "frequency": 1j * by_rate,
            "log_delta": by_delta * delta,
            "in_re": hold,
            "in_im": 1j * hold,
        }

    def read(self, x: Tensor, s: Tensor) -> Tensor:
        real, imaginary = s.chunk(2, 1)
        state = real @ self.param("out_re") - imaginary @ self.param("out_im")
        return state + functional.linear(x, self.skip)  # (B, H)
