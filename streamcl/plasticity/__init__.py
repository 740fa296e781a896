"""What keeps a net able to learn, on a stream that never ends: rules beside the optimiser, and how it fares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from streamcl.methods import ContinualBackprop as ContinualBackpropConfig
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.plasticity.diagnostics import Diagnostics
from streamcl.plasticity.layers import Hidden, LayerError, Taps, find, named
from streamcl.plasticity.rule import Rule

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.engine.dense import Dense

__all__ = [
    "ContinualBackprop",
    "Diagnostics",
    "Hidden",
    "LayerError",
    "Rule",
    "Taps",
    "build_diagnostics",
    "build_rules",
    "find",
    "named",
]


def build_diagnostics(config: Config, dense: Dense, module: nn.Module) -> Diagnostics | None:
    """None when they are switched off, and for a module without hidden layers."""
    station = config.diagnostics
    layers = find(module) if station.sample_every_steps else []
    if not layers:
        return None
    every = station.sample_every_steps, station.report_every_steps
    return Diagnostics(dense, Taps(module, layers), sample_every=every[0], report_every=every[1], window=station.window)


def build_rules(config: Config, dense: Dense, module: nn.Module, taps: Taps) -> dict[str, Rule]:
    """The configured rules by kind, in order. Raises LayerError for hidden layers that are named and not there."""
    return {station.kind: _build(station, config.seed, dense, module, taps) for station in config.plasticity}


def _build(station: ContinualBackpropConfig, seed: int, dense: Dense, module: nn.Module, taps: Taps) -> Rule:
    if station.layers:
        taps = Taps(module, [named(module, incoming, [outgoing]) for incoming, outgoing in station.layers])
    return ContinualBackprop(
        dense,
        module,
        taps,
        rate=station.replacement_rate,
        maturity=station.maturity,
        decay=station.decay,
        utility=station.utility,
        exact=station.exact,
        transfer=station.bias_transfer,
        seed=seed,
    )
