"""What stands around a recurrent backbone: the last few events, and a memory per category."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.models.linear_state import KeyState, Recurrent, uniform_rows, unit_bound
from streamcl.random import key_of


class ShortMemory(nn.Module):
    """Corrects a backbone's input by the last few inputs, gated: it binds neighbours, as a key and then its value.

    x' = x + sigmoid(W x + b) * (K_1 * x_(t-1) + ... + K_w * x_(t-w)), K per input. K starts at `start` for the last
    event and 0 for older ones; with `start` 0 the backbone is at first as it is alone. dt goes to the backbone.

    Args:
        cell: The backbone that reads x'.
        inputs: in, numbers per event.
        window: w, events looked back, >= 1.
        start: Of K_1.
        seed: Of W.
        name: Of this layer among others of the model; enters the draws.

    State: "recent" (B, w, in), newest first, and the backbone's own. Credit for K, W and b is that of the event
    itself, as for a layer below (`online_credit.Stack`).

    Source:
        SMR, Qi et al. 2024, arXiv 2405.17534, "State memory replay for long sequence modeling": learnable memories of
        earlier inputs, through a gated convolution, adjust a state-space model's input where sampling is uneven.

    Differs from the source:
        Our reading of its abstract: a depth-wise convolution over the past inputs under a gate of the present one,
        added to the input. The steps between events enter through dt, which the paper's convolutional form can't take.
    """

    def __init__(
        self,
        cell: nn.Module,
        inputs: int,
        window: int = 3,
        *,
        start: float = 0.0,
        seed: int = 0,
        name: str = "short_memory",
    ) -> None:
        super().__init__()
        self.cell, self.inputs, self.window = cell, inputs, window
        kernel = torch.zeros(window, inputs)
        kernel[0] = start
        self.kernel = nn.Parameter(kernel)
        key = key_of(seed, f"model.{name}.weight")
        self.weight = nn.Parameter(uniform_rows(key, 0, inputs, inputs, unit_bound(inputs)))
        self.bias = nn.Parameter(torch.zeros(inputs))

    @property
    def _inner(self) -> Recurrent:
        cell: Recurrent = self.cell  # type: ignore[assignment]
        return cell

    @property
    def width(self) -> int:
        return self._inner.width

    def init_state(self, n: int) -> KeyState:
        return {**self._inner.init_state(n), "recent": self.kernel.new_zeros(n, self.window, self.inputs)}

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        recent = state["recent"]
        gate = torch.sigmoid(functional.linear(x, self.weight, self.bias))
        corrected = x + gate * (self.kernel * recent).sum(1)
        h, new = self._inner.step(corrected, {k: v for k, v in state.items() if k != "recent"}, dt)
        recent = torch.cat((x.detach().unsqueeze(1), recent[:, :-1]), 1)
        return h, {**new, "recent": recent}


class LongContext(nn.Module):
    """A backbone's state per key and category, for what is long ago, and attention over the last events of all.

    An event moves the state of its category alone, so that what happened in one category survives any number of events
    in others; the last `window` events are seen one by one. Work per event: one step of the backbone and window x d.

    Args:
        cell: A backbone whose state has tensors alone, such as `DiagonalLSSL`, with or without `OnlineCredit`.
        inputs: in, numbers per event.
        categories: C. x begins with C numbers of which the category's is the largest (a one-hot).
        window: w, events attended to, this one among them.
        attention: d, width of queries, keys and values.
        seed: Of the weights.
        name: Of this layer among others of the model; enters the draws.

    Shape:
        h (B, H of the backbone + d).

    State: the backbone's tensors with a second axis of C, "elapsed" (B, C) event time since the category's last event,
        "window" (B, w, in) newest first, "filled" (B,) events in it. Credit for the attention's weights is that of the
        event itself, exact: its inputs are events, not states.

    Source:
        Po et al. 2025, arXiv 2505.20171, "Long-context state-space video world models": a block-wise scan, so that
        within a block the state is shared by few tokens, with dense attention over neighbouring frames.

    Differs from the source:
        Blocks are categories of events in place of patches of a picture; one layer; no rotary positions.
    """

    def __init__(
        self,
        cell: nn.Module,
        inputs: int,
        categories: int,
        *,
        window: int = 8,
        attention: int = 16,
        seed: int = 0,
        name: str = "long_context",
    ) -> None:
        super().__init__()
        self.cell, self.inputs, self.categories = cell, inputs, categories
        self.window, self.attention = window, attention
        for part in ("weight_q", "weight_k", "weight_v"):
            key = key_of(seed, f"model.{name}.{part}")
            rows = uniform_rows(key, 0, attention, inputs, unit_bound(inputs))
            self.register_parameter(part, nn.Parameter(rows))

    @property
    def _inner(self) -> Recurrent:
        cell: Recurrent = self.cell  # type: ignore[assignment]
        return cell

    @property
    def width(self) -> int:
        return self._inner.width + self.attention

    def init_state(self, n: int) -> KeyState:
        inner = self._inner.init_state(n * self.categories)
        state = {name: value.view(n, self.categories, *value.shape[1:]) for name, value in inner.items()}
        like: Tensor = self.get_parameter("weight_q")
        state["elapsed"] = like.new_zeros(n, self.categories)
        state["window"] = like.new_zeros(n, self.window, self.inputs)
        state["filled"] = like.new_zeros(n)
        return state

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        old = dict(state)
        window, filled, elapsed = old.pop("window"), old.pop("filled"), old.pop("elapsed")
        rows, block = torch.arange(len(x), device=x.device), x[:, : self.categories].argmax(1)
        elapsed = elapsed + (1.0 if dt is None else dt[:, None])
        since = None if dt is None else elapsed[rows, block]
        h, moved = self._inner.step(x, {name: value[rows, block] for name, value in old.items()}, since)
        new = {name: value.index_put((rows, block), moved[name]) for name, value in old.items()}
        new["elapsed"] = elapsed.index_put((rows, block), elapsed.new_zeros(()))
        new["window"] = torch.cat((x.detach().unsqueeze(1), window[:, :-1]), 1)
        new["filled"] = (filled + 1.0).clamp_max(self.window)
        return torch.cat((h, self.attend(x, new["window"], new["filled"])), 1), new

    def attend(self, x: Tensor, window: Tensor, filled: Tensor) -> Tensor:
        """(B, d) softmax attention of x to the last events."""
        q, k, v = (self.get_parameter(f"weight_{part}") for part in "qkv")
        scores = torch.einsum("bd,bwd->bw", x @ q.T, window @ k.T) / math.sqrt(self.attention)
        empty = torch.arange(self.window, device=x.device) >= filled[:, None]
        weights = scores.masked_fill(empty, -math.inf).softmax(1)
        return torch.einsum("bw,bwd->bd", weights, window @ v.T)
