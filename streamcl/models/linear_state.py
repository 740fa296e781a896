"""Recurrent backbones whose state is a linear, element-wise recurrence; of them minGRU and minLSTM.

A backbone turns what a key does into a state of constant size: `step` takes one event of each of B keys and the keys'
states, and gives what the head reads and the new states. Its work and its state don't grow with the stream. What one
key carries over is a `KeyState`: tensors with the keys as first axis, so that a row can be stored, aged and forgotten.

`online_credit` carries exact gradients beside such a state; `lssl` is element-wise too; `legs` and `retnet` are not;
`context` stands around any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.random import key_of, uniform_array

KeyState = dict[str, Tensor]
"""What keys carry from event to event: name to (B, ...), one row per key."""


class Recurrent(Protocol):
    """A backbone with a memory per key.

    `width` is the size H of what it gives. `init_state(n)` is the state of n keys that have done nothing. `step` takes
    x (B, in), the state of these B keys and dt (B,), the event time since each key's last event (None: not known, one
    event is one step); it returns h (B, H) and the new state, and changes neither x nor the old state. Its cost is
    the same for the first event and the millionth.
    """

    @property
    def width(self) -> int: ...

    def init_state(self, n: int) -> KeyState: ...

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]: ...


def uniform_rows(key: int, start: int, count: int, width: int, bound: float) -> Tensor:
    """(count, width) float32 rows from `start` on of an endless table, uniform in (-bound, bound).

    A row depends on its number alone, so a layer that grows has the rows of one that was built larger.
    """
    draw = uniform_array(key, count * width, start * width)
    return torch.from_numpy((bound * (2.0 * draw - 1.0)).astype(np.float32)).view(count, width)


def unit_bound(fan_in: int) -> float:
    """The bound of uniform weights that keep the variance of their input."""
    return math.sqrt(3.0 / max(fan_in, 1))


class ElementWise(nn.Module):
    """A backbone of units that never read each other: s_t = a_t * s_(t-1) + b_t, where a and b depend on x alone.

    A unit reads its own past only, so the influence of a parameter on the state is as large as the parameter, and the
    exact gradient through the whole past costs a constant (see `online_credit`).

    Subclasses give `advance` (the recurrence), `influence` (its derivatives), `read` (state to h) and `rows` (fresh
    values of parameters). Every parameter named in `by_unit` has one row per unit, and so grows.

    State: "s" (B, parts * N). With `parts` 2 the state is complex: N real parts, then N imaginary parts.
    """

    parts: ClassVar[int] = 1
    by_unit: tuple[str, ...] = ()
    traced: tuple[str, ...] = ()  # of these, what the recurrence reads: (N,) a number per unit, (N, in) weights of x

    def __init__(self, inputs: int, units: int, width: int, seed: int, name: str) -> None:
        super().__init__()
        self.inputs, self.units, self.width = inputs, units, width
        self.seed, self.name = seed, name

    def param(self, name: str) -> nn.Parameter:
        """By name; many times cheaper than torch's `get_parameter`, and asked for at every event."""
        found: nn.Parameter = getattr(self, name)
        return found

    def init_state(self, n: int) -> KeyState:
        like = self.param(self.traced[0])
        return {"s": like.new_zeros(n, self.parts * self.units)}

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        s = self.advance(x, state["s"], dt)
        return self.read(x, s), {"s": s}

    def advance(self, x: Tensor, s: Tensor, dt: Tensor | None) -> Tensor:
        """(B, parts * N) the state after x."""
        raise NotImplementedError

    def influence(self, x: Tensor, s: Tensor, dt: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N) a, and for each traced parameter (B, N) how the new state moves with it, the old state held.

        Of a parameter with weights of x it is the derivative by the weighted sum; a and it are complex if `parts` is 2.
        """
        raise NotImplementedError

    def read(self, x: Tensor, s: Tensor) -> Tensor:
        """(B, H) what the head sees."""
        raise NotImplementedError

    def rows(self, start: int, count: int) -> Mapping[str, Tensor]:
        """Fresh rows `start` to `start + count` of all parameters in `by_unit`."""
        raise NotImplementedError

    def grow(self, units: int) -> None:
        """Add so many units: what was read before is read on unchanged.

        The new parameters are new objects: an optimiser and its moments must follow. A state from before takes
        `grown`. `width` grows too where units are read directly; then a head must give the new entries weight 0.

        Source:
            StateX, Shen et al. 2025, arXiv 2509.22630: a trained recurrence is given a larger state and trained on.

        Differs from the source:
            Units are added where it enlarges the key dimension of a linear attention or state-space layer, and old
            outputs are kept to the last bit, so that a live stream notices nothing.
        """
        fresh = self.rows(self.units, units)
        for name in self.by_unit:
            old = self.param(name)
            more = fresh[name] if name in self.traced else self.silent(name, fresh[name])
            setattr(self, name, nn.Parameter(torch.cat((old.detach(), more.to(old)))))
        self.units += units

    def silent(self, _name: str, rows: Tensor) -> Tensor:
        """What new units' readouts start as."""
        return rows

    def grown(self, state: KeyState) -> KeyState:
        """A state from before a growth, at the present size: new units have seen nothing."""
        return {name: self.padded(value) for name, value in state.items()}

    def padded(self, value: Tensor) -> Tensor:
        """(B, parts * N, ...) of a (B, parts * n, ...) with n <= N."""
        cut = value.view(len(value), self.parts, -1, *value.shape[2:])
        missing = cut.new_zeros(*cut.shape[:2], self.units - cut.shape[2], *cut.shape[3:])
        return torch.cat((cut, missing), 2).flatten(1, 2)

    def _create(self) -> None:
        for name, value in self.rows(0, self.units).items():
            self.register_parameter(name, nn.Parameter(value))

    def _key(self, name: str) -> int:
        return key_of(self.seed, f"model.{self.name}.{name}")

    def _log_uniform(self, name: str, start: int, count: int, low: float, high: float) -> Tensor:
        """(count,) logarithms, uniform between those of `low` and `high`."""
        middle, half = math.log(low * high) / 2, math.log(high / low) / 2
        return middle + uniform_rows(self._key(name), start, count, 1, half).view(-1)


class Gated(ElementWise):
    """Common to minGRU and minLSTM: s_t = keep * fade * s_(t-1) + write * candidate, gates of x alone.

    Args:
        inputs: in, numbers per event.
        units: N.
        seed: Of the weights.
        name: Of this layer among others of the model; enters the draws.
        horizon: Longest time constant at the start, in events: unit i forgets a share 1 / T_i per event, T_i drawn
            log-uniformly from 2 to this.
        timed: A unit also fades by exp(-rate * dt) between events, at a learnt rate that starts at 1 / (horizon
            units of event time). Without it (or with dt None) only the gates forget, however long the gap is.
        output_gate: h = sigmoid(W_o x + b_o) * s instead of h = s: a query can choose which units it reads.

    Source:
        Feng et al. 2024, arXiv 2410.01201, "Were RNNs all we needed?", sections 3.1 and 3.2 (their non-log form).
        Initial time constants: Tallec & Ollivier 2018, arXiv 1804.11188. Fading: GRU-D, Che et al. 2018, eq. 10 and
        11. Output gate: Irie et al. 2023, arXiv 2305.19044, the eLSTM's, here without a peephole.

    Differs from the source:
        The paper has neither fading, output gate nor spread time constants, and puts the layer between projections.
        GRU-D's rate depends on the input; here it is one number per unit.
    """

    gate_names: tuple[str, ...] = ()

    def __init__(
        self,
        inputs: int,
        units: int,
        *,
        seed: int = 0,
        name: str = "linear_state",
        horizon: float = 64.0,
        timed: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__(inputs, units, units, seed, name)
        self.horizon, self.timed, self.output_gate = horizon, timed, output_gate
        linear = [f"{kind}_{gate}" for gate in self.gate_names for kind in ("weight", "bias")]
        self.traced = (*linear, "log_rate") if timed else tuple(linear)
        self.by_unit = (*self.traced, "weight_o", "bias_o") if output_gate else self.traced
        self._create()

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) keep, write and candidate."""
        raise NotImplementedError

    def opening(self, gate: str, log_time: Tensor) -> Tensor:
        """(N,) the bias of a gate for units that forget once in exp(log_time) events."""
        raise NotImplementedError

    def rows(self, start: int, count: int) -> Mapping[str, Tensor]:
        log_time = self._log_uniform("horizon", start, count, 2.0, max(self.horizon, 2.0))
        found = {}
        for name in self.by_unit:
            kind, gate = name.split("_")
            if kind == "weight":
                found[name] = uniform_rows(self._key(name), start, count, self.inputs, unit_bound(self.inputs))
            elif kind == "bias":
                found[name] = self.opening(gate, log_time)
            else:
                found[name] = torch.full((count,), -math.log(self.horizon))
        return found

    def grow(self, units: int) -> None:
        super().grow(units)
        self.width = self.units

    def sum_of(self, gate: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.param(f"weight_{gate}"), self.param(f"bias_{gate}"))  # (B, N)

    def fade(self, dt: Tensor | None) -> Tensor | None:
        """(B, N) what a gap of dt leaves, if anything but all."""
        if dt is None or not self.timed:
            return None
        return torch.exp(-self.param("log_rate").exp() * dt[:, None])

    def advance(self, x: Tensor, s: Tensor, dt: Tensor | None) -> Tensor:
        keep, write, candidate = self.gates(x)
        fade = self.fade(dt)
        return keep * (s if fade is None else fade * s) + write * candidate

    def influence(self, x: Tensor, s: Tensor, dt: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        fade = self.fade(dt)
        faded = s if fade is None else fade * s
        keep, partials = self.by_gate(x, faded)
        found = dict(partials)
        for gate in self.gate_names:
            found[f"weight_{gate}"] = found[f"bias_{gate}"] = found.pop(gate)
        if not self.timed:
            return keep, found
        if fade is None or dt is None:
            return keep, {**found, "log_rate": torch.zeros_like(s)}
        return keep * fade, {**found, "log_rate": -keep * faded * self.param("log_rate").exp() * dt[:, None]}

    def by_gate(self, x: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, N) keep, and for each gate (B, N) the derivative of the new state by the gate's sum; s is faded."""
        raise NotImplementedError

    def read(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.sigmoid(self.sum_of("o", x)) * s if self.output_gate else s


class MinGRU(Gated):
    """z = sigmoid(W_z x + b_z), candidate = W_h x + b_h, s_t = (1 - z) s_(t-1) + z candidate. See `Gated`.

    Source: the paper's section 3.1 (minGRU, trained sequentially).
    """

    gate_names = ("z", "h")

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.sigmoid(self.sum_of("z", x))
        return 1.0 - z, z, self.sum_of("h", x)

    def opening(self, gate: str, log_time: Tensor) -> Tensor:
        return -torch.log(torch.expm1(log_time)) if gate == "z" else torch.zeros_like(log_time)

    def by_gate(self, x: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        keep, z, candidate = self.gates(x)
        return keep, {"z": z * keep * (candidate - s), "h": z}


class MinLSTM(Gated):
    """Gates f and i of x, brought to sum 1; s_t = f' s_(t-1) + i' candidate, f' = f / (f + i). See `Gated`.

    Source: the paper's section 3.2 (minLSTM, its length-independent form).
    """

    gate_names = ("f", "i", "h")

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, i = torch.sigmoid(self.sum_of("f", x)), torch.sigmoid(self.sum_of("i", x))
        keep = f / (f + i)
        return keep, 1.0 - keep, self.sum_of("h", x)

    def opening(self, gate: str, log_time: Tensor) -> Tensor:
        """With b_f = -b_i = b the gates sum to 1 as they are, so that f' = sigmoid(b)."""
        bias = torch.log(torch.expm1(log_time))
        return {"f": bias, "i": -bias}.get(gate, torch.zeros_like(log_time))

    def by_gate(self, x: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        f, i = torch.sigmoid(self.sum_of("f", x)), torch.sigmoid(self.sum_of("i", x))
        keep, candidate = f / (f + i), self.sum_of("h", x)
        turn = keep * (1.0 - keep) * (s - candidate)
        return keep, {"f": turn * (1.0 - f), "i": -turn * (1.0 - i), "h": 1.0 - keep}


def to_complex(parts: Tensor) -> Tensor:
    """(B, N, ...) complex of (B, 2N, ...): real parts, then imaginary parts."""
    return torch.complex(*parts.chunk(2, 1))


def to_parts(value: Tensor) -> Tensor:
    """(B, 2N, ...) of (B, N, ...) complex: what `to_complex` undoes."""
    return torch.cat((value.real, value.imag), 1)
