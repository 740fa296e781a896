"""What keeps a net able to learn, on a stream that never ends: rules beside the optimiser, and how it fares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from streamcl import methods
from streamcl.features import Featurizer
from streamcl.models import build_model
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.plasticity.diagnostics import Diagnostics
from streamcl.plasticity.l2 import L2
from streamcl.plasticity.l2_init import L2Init
from streamcl.plasticity.layers import Hidden, LayerError, Taps, among, find, named, of_tower, of_towers
from streamcl.plasticity.redo import ReDo
from streamcl.plasticity.self_normalized_resets import SelfNormalizedResets
from streamcl.plasticity.shrink_and_perturb import ShrinkAndPerturb
from streamcl.plasticity.upgd import UPGD
from streamcl.plasticity.weight_clipping import WeightClipping
from streamcl.plugin import Rule

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.engine.dense import Dense

__all__ = [
    "L2",
    "UPGD",
    "ContinualBackprop",
    "Diagnostics",
    "Hidden",
    "L2Init",
    "LayerError",
    "ReDo",
    "SelfNormalizedResets",
    "ShrinkAndPerturb",
    "Taps",
    "WeightClipping",
    "build_diagnostics",
    "build_rules",
    "check",
    "find",
    "named",
    "of_tower",
    "of_towers",
]


def check(config: Config) -> None:
    """Raises LayerError for hidden layers that a rule names and the configured model hasn't."""
    model = build_model(config, Featurizer(config).layout)
    for place, station in enumerate(config.plasticity):
        if isinstance(station, methods.Resetting):
            try:
                among(of_towers(model, model.towers), station.layers or ())
            except LayerError as error:
                raise LayerError(f"plasticity.{place}.{error}") from error


def build_diagnostics(config: Config, dense: Dense, module: nn.Module, layers: Sequence[Hidden]) -> Diagnostics | None:
    """None when they are switched off, and for a module without hidden layers."""
    station = config.diagnostics
    if not layers or not station.sample_every_steps:
        return None
    every = station.sample_every_steps, station.report_every_steps
    return Diagnostics(dense, Taps(module, layers), sample_every=every[0], report_every=every[1], window=station.window)


def build_rules(config: Config, dense: Dense, module: nn.Module, layers: Sequence[Hidden]) -> dict[str, Rule]:
    """The configured rules by kind, in order. Raises LayerError for hidden layers that are named and not there."""
    return {station.kind: _build(station, config.seed, dense, module, layers) for station in config.plasticity}


def _taps(station: methods.Resetting, module: nn.Module, layers: Sequence[Hidden]) -> Taps:
    if not layers:
        raise LayerError("plasticity: the model has no hidden units that could be made anew")
    places = among(layers, station.layers) if station.layers else list(range(len(layers)))
    return Taps(module, [layers[place] for place in places], places)


def _build(station: methods.AnyRule, seed: int, dense: Dense, module: nn.Module, layers: Sequence[Hidden]) -> Rule:
    match station:
        case methods.L2():
            return L2(dense, station.strength)
        case methods.L2Init():
            return L2Init(dense, station.strength)
        case methods.ShrinkAndPerturb():
            return ShrinkAndPerturb(dense, station.strength, station.sigma, scaled=station.scaled, seed=seed)
        case methods.WeightClipping():
            hidden = [layer.incoming for layer in layers]
            return WeightClipping(dense, module, station.bound, None if station.output_layer else hidden)
        case methods.UPGD():
            return UPGD(
                dense,
                decay=station.decay,
                sigma=station.sigma,
                strength=station.strength,
                local=station.local,
                protecting=station.protecting,
                seed=seed,
            )
        case methods.ReDo():
            taps = _taps(station, module, layers)
            return ReDo(dense, module, taps, tau=station.tau, every=station.every_steps, seed=seed)
        case methods.SelfNormalizedResets():
            return SelfNormalizedResets(
                dense,
                module,
                _taps(station, module, layers),
                percentile=station.percentile,
                expansion=station.expansion,
                revisit=station.revisit_steps,
                initial=station.initial_steps,
                shortest=station.shortest_steps,
                longest=station.longest_steps,
                seed=seed,
            )
        case methods.ContinualBackprop():
            return ContinualBackprop(
                dense,
                module,
                _taps(station, module, layers),
                rate=station.replacement_rate,
                maturity=station.maturity,
                decay=station.decay,
                utility=station.utility,
                exact=station.exact,
                transfer=station.bias_transfer,
                seed=seed,
            )
