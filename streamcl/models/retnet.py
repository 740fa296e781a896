"""Retention: a matrix per head that binds keys to values, read by a query."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.models.linear_state import KeyState, uniform_rows, unit_bound
from streamcl.random import key_of


class RetNet(nn.Module):
    """Multi-scale retention in its recurrent form: per head S_t = gamma S_(t-1) + k_t^T v_t, o_t = q_t S_t.

    A query finds what was stored under a key like it, which no element-wise recurrence can do. Each head's o is
    normalised, gated by swish(x W_g) and projected: h = (swish(x W_g) * norm(o)) W_o.

    With dt a head forgets by gamma^dt: a step with dt = 3 equals two steps with dt = 1 and x = 0, then one with x.

    Credit: with a detached state, queries and the readout get their exact gradient; keys and values would get that of
    their own event alone, which is worse than none (it teaches a query's own event to store nothing under its key). So
    they stay as they were drawn, unless `learn_keys` is set by a caller who unrolls. Exact traces would take
    d_k x d_v x in numbers per head and key of the stream; they aren't built.

    Args:
        inputs: in, numbers per event.
        width: H, numbers given.
        heads: Number of heads; head i forgets by gamma_i = 1 - 2^(-5 - i).
        key: d_k, rows of S.
        value: d_v, columns of S.
        seed: Of the weights.
        name: Of this layer among others of the model; enters the draws.
        mimetic: Start as linear attention to like things: queries are made by the keys' weights, whose columns are
            orthonormal (their rows, if d_k < in), so that q k^T = x_q x_k^T, and gamma_i = 1 - 2^(-10 - i). Recall
            then needs no credit through the past: only the readout must be learnt.
        learn_keys: Let gradients reach the weights of keys and values.

    State: "S" (B, heads, d_k, d_v).

    Source:
        Sun et al. 2023, arXiv 2307.08621, equations 6 (recurrent form) and 8 (heads, norm, gate). Start: Trockman et
        al. 2024, arXiv 2410.11135, "Mimetic initialization helps state space models learn to recall".

    Differs from the source:
        No rotation of keys and queries by position (their theta is 0): an event's distance is in dt. No
        chunk-wise form. Trockman et al. start Mamba's state matrix near 1 and correlate its C and B; gamma, queries
        and keys are the same things in retention.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        heads: int = 1,
        key: int = 16,
        value: int = 16,
        seed: int = 0,
        name: str = "retnet",
        mimetic: bool = False,
        learn_keys: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.width, self.heads, self.key, self.value = inputs, width, heads, key, value
        self.seed, self.name, self.mimetic = seed, name, mimetic
        self.scale = 1.0 if mimetic else 1.0 / math.sqrt(key)  # of keys; a growth leaves it as it is
        self.gamma: Tensor
        self.register_buffer("gamma", 1.0 - torch.exp2(-(10.0 if mimetic else 5.0) - torch.arange(heads)))
        keys = self._key_rows("weight_k", 0, key)
        if mimetic:
            keys = _orthonormal(keys)
        self.weight_k = nn.Parameter(keys, learn_keys)  # (heads, d_k, in)
        self.weight_q = nn.Parameter(keys.clone() if mimetic else self._key_rows("weight_q", 0, key))
        values = self._rows("weight_v", heads * value, inputs).view(heads, value, inputs)
        self.weight_v = nn.Parameter(values, learn_keys)
        self.weight_g = nn.Parameter(self._rows("weight_g", heads * value, inputs))
        self.weight_o = nn.Parameter(self._rows("weight_o", width, heads * value))

    def _rows(self, name: str, count: int, fan_in: int) -> Tensor:
        return uniform_rows(key_of(self.seed, f"model.{self.name}.{name}"), 0, count, fan_in, unit_bound(fan_in))

    def _key_rows(self, name: str, start: int, count: int) -> Tensor:
        bound = unit_bound(max(self.key, self.inputs) if self.mimetic else self.inputs)
        keys = [key_of(self.seed, f"model.{self.name}.{name}.{head}") for head in range(self.heads)]
        return torch.stack([uniform_rows(key, start, count, self.inputs, bound) for key in keys])

    def init_state(self, n: int) -> KeyState:
        return {"S": self.weight_k.new_zeros(n, self.heads, self.key, self.value)}

    def step(self, x: Tensor, state: KeyState, dt: Tensor | None = None) -> tuple[Tensor, KeyState]:
        q, k, v = (torch.einsum("bi,hdi->bhd", x, w) for w in (self.weight_q, self.weight_k, self.weight_v))
        stored = self.decay(dt) * state["S"] + self.scale * k.unsqueeze(3) * v.unsqueeze(2)
        o = torch.einsum("bhk,bhkv->bhv", q, stored)
        return self.readout(x, o), {"S": stored}

    def decay(self, dt: Tensor | None) -> Tensor:
        """(1 or B, heads, 1, 1)."""
        kept: Tensor = self.gamma[None] if dt is None else self.gamma ** dt[:, None]
        return kept[:, :, None, None]

    def readout(self, x: Tensor, o: Tensor) -> Tensor:
        """h (B, H) of x (B, in) and what the heads found (B, heads, d_v)."""
        found = functional.layer_norm(o, o.shape[-1:]).flatten(1)
        return functional.linear(functional.silu(functional.linear(x, self.weight_g)) * found, self.weight_o)

    def grow(self, key: int) -> None:
        """Give each head so many more rows; their queries start at 0, so that h doesn't change.

        The parameters are new objects: an optimiser and its moments must follow. A state from before takes `grown`.

        Source: StateX, Shen et al. 2025, arXiv 2509.22630: a larger key dimension after training.

        Differs from the source: it merges heads and draws the new layer's weights anew; nothing old changes here.
        """
        more = self._key_rows("weight_k", self.key, key).to(self.weight_k)
        self.weight_k = nn.Parameter(torch.cat((self.weight_k.detach(), more), 1), self.weight_k.requires_grad)
        self.weight_q = nn.Parameter(torch.cat((self.weight_q.detach(), torch.zeros_like(more)), 1))
        self.key += key

    def grown(self, state: KeyState) -> KeyState:
        """A state from before a growth, at the present size."""
        return {"S": functional.pad(state["S"], (0, 0, 0, self.key - state["S"].shape[2]))}


def _orthonormal(weights: Tensor) -> Tensor:
    """(heads, d_k, in) of the same span: W^T W = 1 if d_k >= in, else W W^T = 1."""
    tall = weights.shape[1] >= weights.shape[2]
    found: Tensor = torch.linalg.qr(weights.double() if tall else weights.double().mT).Q
    return (found if tall else found.mT).to(weights.dtype)
