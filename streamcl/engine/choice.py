"""Which engine a configuration comes to: what is asked for, and what stands in its way.

| `worker.device` | `auto` | `fused` | `graph` |
|---|---|---|---|
| `cpu`, `auto` | `fused`, else `eager` | numba (`fused`), else an error | an error |
| `cuda` | `eager` | Triton (`triton_scan`), else an error | CUDA graphs (`graph`), else `eager` |

No GPU has been measured yet, so `auto` chooses none: neither as a device, nor one of its own engines on one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streamcl.config import Config, ConfigError
from streamcl.engine import fused, graph, triton_scan
from streamcl.engine.chunked import Chunked

if TYPE_CHECKING:
    from streamcl.learner import Learner

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """An engine, and what stands in the way of the one that was wished for, by its path; empty where nothing does."""

    engine: str
    because: str = ""


def engine_of(config: Config, plugins: Sequence[object] = ()) -> Choice:
    """The engine that a configuration comes to. `fused` is not refused here where it has no form."""
    wanted, on_cuda = config.worker.engine, config.worker.device == "cuda"
    if config.river is not None:
        return Choice("river")
    if on_cuda and wanted in ("auto", "eager"):
        return Choice("eager")
    kind = (graph if wanted == "graph" else triton_scan) if on_cuda else fused
    because = kind.obstacle(config, plugins) or ""
    if because or wanted == "eager":
        return Choice("eager", because)
    return Choice("graph" if wanted == "graph" else "fused")


def build(config: Config, learner: Learner, serving: bool, plugins: Sequence[object] = ()) -> Chunked | None:
    """What does a learner's work a chunk at a time; None where the eager engine does it.

    Raises:
        ConfigError: `worker.engine` is fused, and something has no form there.
    """
    engine, because = choice = engine_of(config, plugins)
    learner.obstacle = because
    wanted = config.worker.engine
    if because and wanted == "fused":
        raise ConfigError(f"worker.engine: fused has no form of {because}; set auto or eager")
    if because and wanted in ("auto", "graph") and not serving:
        log.info("steps are computed by the eager engine: %s has no compiled form", because)
    if choice.engine == "eager" or (serving and config.worker.device == "cuda"):
        return None
    if config.worker.device != "cuda":
        return fused.Fused(config, learner)
    try:
        return graph.Graph(config, learner) if engine == "graph" else triton_scan.TritonScan(config, learner)
    except ValueError as error:
        raise ConfigError(f"worker.engine: {engine}: {error}") from error
