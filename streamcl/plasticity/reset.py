"""A hidden unit made anew: its weights in and out, its normalisation, and all that the optimiser holds of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from streamcl.plasticity.layers import Hidden, Taps
from streamcl.random import key_of, uniform_array

if TYPE_CHECKING:
    from streamcl.engine.dense import Dense

Init = Literal["kaiming", "xavier", "lecun", "torch"]


class Reset:
    """Incoming weights are drawn as at first, their bias is 0, outgoing weights are 0, norms of the unit start over.

    Args:
        name: Of the rule: the draw of one row of layer i (0 = the first hidden one) is that of the key "name.i", and
            of the rows drawn there before it.
        init: The distribution that the layers were built with, see `bound`.
    """

    def __init__(self, dense: Dense, module: nn.Module, name: str, taps: Taps, seed: int, init: Init) -> None:
        self.dense, self.module, self.init = dense, module, init
        self.keys = [key_of(seed, f"{name}.{place}") for place in taps.places]

    def __call__(
        self, layer: Hidden, place: int, units: Tensor, replaced: int, contribution: Tensor | None = None
    ) -> None:
        """Make units of a layer anew.

        Args:
            place: The layer's among those that the rule listens to.
            replaced: How many of the layer have been made anew already.
            units: (k,) int64, each once.
            contribution: (k,) what the units have said on average: what the next layer made of it moves into its bias.
                Without it the next layer loses what they contributed.
        """
        for name in layer.outgoing:
            self._disconnect(name, layer, units, contribution)
        self._redraw(layer.incoming, place, units, replaced)
        for name in layer.norms:
            self._renew_norm(name, layer, units)

    def _disconnect(self, name: str, layer: Hidden, units: Tensor, contribution: Tensor | None) -> None:
        """Outgoing weights to 0, and into the bias what they have contributed on average."""
        weight, bias = f"{name}.weight", f"{name}.bias"
        shape = (len(self.dense.params[weight]), layer.units, -1)
        if contribution is not None and bias in self.dense.params:
            before = self.dense.params[bias].detach().clone()
            for w, b in zip(self.dense.copies(weight), self.dense.copies(bias), strict=True):
                b.add_((w.reshape(shape).index_select(1, units).sum(2) * contribution).sum(1))
            self.dense.settle(bias, before)
        zero = torch.zeros_like(self.dense.params[weight].detach().view(shape).index_select(1, units))
        self.dense.renew(weight, units, zero, 1, shape)

    def _redraw(self, name: str, place: int, units: Tensor, replaced: int) -> None:
        """Incoming weights as they were drawn at first, bias 0."""
        weight = self.dense.params[f"{name}.weight"]
        size = weight[0].numel()
        draw = 2.0 * uniform_array(self.keys[place], len(units) * size, replaced * size) - 1.0
        fresh = torch.from_numpy(draw * bound(self.init, weight)).to(weight).view(len(units), *weight.shape[1:])
        self.dense.renew(f"{name}.weight", units, fresh)
        if f"{name}.bias" in self.dense.params:
            self.dense.renew(f"{name}.bias", units, fresh.new_zeros(len(units)))

    def _renew_norm(self, name: str, layer: Hidden, units: Tensor) -> None:
        for part, value in (("weight", 1.0), ("bias", 0.0)):
            param = self.dense.params.get(f"{name}.{part}")
            if param is not None and len(param) == layer.units:
                self.dense.renew(f"{name}.{part}", units, torch.full_like(param[: len(units)], value))
        norm = self.module.get_submodule(name)
        for part, value in (("running_mean", 0.0), ("running_var", 1.0)):
            buffer = getattr(norm, part, None)
            if buffer is not None and len(buffer) == layer.units:
                buffer.index_fill_(0, units, value)


def bound(init: Init, weight: Tensor) -> float:
    """b of the uniform distribution on (-b, b) that a layer's weights are drawn from.

    kaiming: sqrt(6 / fan_in), for ReLU; xavier: sqrt(6 / (fan_in + fan_out)); lecun: sqrt(3 / fan_in); torch: what
    `nn.Linear` and `nn.Conv2d` do by default, sqrt(1 / fan_in).
    """
    fan_in = weight[0].numel()
    fan_out = len(weight) * fan_in // weight.shape[1]
    squares = {
        "kaiming": 6.0 / fan_in,
        "xavier": 6.0 / (fan_in + fan_out),
        "lecun": 3.0 / fan_in,
        "torch": 1.0 / fan_in,
    }
    return math.sqrt(squares[init])
