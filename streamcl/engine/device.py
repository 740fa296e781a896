"""Where steps are computed: a CPU, or a CUDA device where torch has one and all that is configured has a form there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streamcl.config import Config, ConfigError
from streamcl.engine import field_rows

CPU = torch.device("cpu")


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration is computed on the CPU alone, by its path; None when nothing is."""
    if named := [str(getattr(each, "kind", each)) for each in plugins or config.plugins]:
        return f"plugins: {', '.join(named)}"
    for name, feature in config.features.items():
        if getattr(feature, "table", None) is not None:
            return f"features.{name}.table: dynamic"
    if setting := field_rows.said(config):
        return str(setting)
    if config.model.kind == "recurrent" or ":" in config.model.kind:
        return f"model.kind: {config.model.kind}"
    return None


def device_of(config: Config, serving: bool = False, plugins: Sequence[object] = ()) -> torch.device:
    """The device of a learner's tensors. What only serves does it on the CPU: an answer is too small for a launch.

    Raises:
        ConfigError: CUDA is asked for, and torch has none, or something is configured that has no form there.
    """
    if config.worker.device != "cuda" or serving:
        return CPU
    if because := obstacle(config, plugins):
        raise ConfigError(f"worker.device: cuda has no form of {because}; set cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"worker.device: cuda, and torch {torch.__version__} finds no CUDA device; set cpu")
    return torch.device("cuda", torch.cuda.current_device())
