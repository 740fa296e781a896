"""Every built-in model keeps the contract, with both engines where both can compute it."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from streamcl.stations import Model, Recurrent
from streamcl.testing import PluginCheck, model_checks

KINDS = get_args(Model.model_fields["kind"].annotation)
CELLS = get_args(Recurrent.model_fields["cell"].annotation)
UNCREDITED = {"retnet", "legs"}


def models() -> dict[str, dict[str, Any]]:
    """By name: every kind, the recurrent one with every cell."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        if kind != "recurrent":
            found[kind] = {"kind": kind, "hidden": [8, 6]}
            continue
        for cell in CELLS:
            credit = "detached" if cell in UNCREDITED else "exact"
            recurrent = {"cell": cell, "units": 4, "credit": credit, "keys": 64}
            found[cell] = {"kind": kind, "hidden": [6], "recurrent": recurrent}
    return found


@pytest.mark.parametrize("check", model_checks(), ids=str)
@pytest.mark.parametrize("model", models().values(), ids=models())
def test_a_built_in_model_keeps_the_contract(model: dict[str, Any], check: PluginCheck) -> None:
    check({"model": model})


@pytest.mark.parametrize("check", model_checks(), ids=str)
@pytest.mark.parametrize("model", [each for each in models().values() if each["kind"] != "recurrent"], ids=str)
def test_a_compiled_model_keeps_the_contract(model: dict[str, Any], check: PluginCheck) -> None:
    check({"model": model, "engine": "fused"})
