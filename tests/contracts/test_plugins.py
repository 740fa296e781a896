"""Every built-in plug-in keeps the contract, found by itself; and the contract notices who doesn't."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from streamcl import plugin as points
from streamcl.plugin import Context, Grads, Query, Recall, Rule, Step, Term
from streamcl.protocols import State
from streamcl.records import Outcome
from streamcl.stations import Stop
from streamcl.testing import PluginCheck, plugin_checks

SETTINGS: dict[str, dict[str, Any]] = {
    "cuber": {"segments": 3, "sample": 16},
    "gem": {"segments": 3, "memory_per_segment": 8},
    "layer_merge": {"every": 10},
    "tag": {"segments": 3},
}
"""Beside the defaults, for methods whose own would do nothing, or grow, within a hundred events."""


@pytest.mark.parametrize("check", plugin_checks(), ids=str)
@pytest.mark.parametrize("kind", sorted(points.builtin()))
def test_a_built_in_plugin_keeps_the_contract(kind: str, check: PluginCheck) -> None:
    check({"kind": kind, **SETTINGS.get(kind, {})})


RECURRENT = {"kind": "recurrent", "hidden": [6], "recurrent": {"units": 4, "keys": 64}}
STATEFUL = [check for check in plugin_checks() if check.name in ("resumes_to_the_bit", "takes_late_labels", "forgets")]


@pytest.mark.parametrize("check", STATEFUL, ids=str)
@pytest.mark.parametrize("kind", sorted(points.builtin()))
def test_a_built_in_plugin_keeps_the_contract_on_a_model_with_a_memory_of_each_key(
    kind: str, check: PluginCheck
) -> None:
    # The steps of tag are as long as its rate, whatever the gradient.
    slow = {"optimizer": {"learning_rate": 0.005}} if kind == "tag" else {}
    check({"kind": kind, **SETTINGS.get(kind, {}), **slow, "model": RECURRENT})


@pytest.mark.parametrize("check", plugin_checks(), ids=str)
@pytest.mark.parametrize(
    "settings", [{"kind": "ema"}, {"kind": "served"}, {"kind": "served", "sets": ["ema"]}], ids=str
)
def test_what_has_a_compiled_form_keeps_the_contract_in_it(settings: dict[str, Any], check: PluginCheck) -> None:
    check({**settings, "engine": "fused"})


def test_the_settings_are_of_plugins_that_exist() -> None:
    assert SETTINGS.keys() <= points.builtin().keys()


class Options(Rule.Options):
    kind: str
    weight: float = Stop(1.0)


class Forgetful(Rule):
    """Counts, and doesn't save it."""

    Options = Options
    count = 0

    def transform(self, grads: Grads, step: Step) -> Grads:
        self.count += 1
        return grads.with_dense(grads.dense * (1.0 + 0.01 * self.count))


class Clocked(Rule):
    Options = Options

    def after(self, step: Step) -> None:
        time.time()


class Random(Rule):
    Options = Options

    def transform(self, grads: Grads, step: Step) -> Grads:
        return grads.with_dense(grads.dense + 1e-3 * torch.randn(len(grads.dense)))


class Hoarder(Rule):
    """Keeps every event for ever, and looks at all of them."""

    Options = Options

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.held: list[Tensor] = []

    def after(self, step: Step) -> None:
        self.held.append(step.rows.dense.clone())

    def read(self) -> dict[str, float]:
        return {f"row_{n}": float("nan") for n in range(len(self.held))}

    def state_dict(self) -> State:
        return {"held": torch.cat(self.held) if self.held else torch.zeros(0, 3)}

    def load_state_dict(self, state: State) -> None:
        self.held = [state["held"]] if state else []


class Raw(Recall):
    """Notes raw features, and keeps what it has noted."""

    Options = Options

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.last = torch.zeros(3)

    def apply(self, output: Tensor, query: Query) -> Tensor:
        return output

    def observe(self, outcome: Outcome) -> None:
        if "key-2" in outcome.ticket.key:
            self.last = torch.from_numpy(outcome.ticket.features.dense)

    def state_dict(self) -> State:
        return {"last": self.last.clone()}

    def load_state_dict(self, state: State) -> None:
        self.last = state["last"] if state else torch.zeros(3)


class Loud(Term):
    """Moves weights although its weight is 0."""

    class Options(Term.Options):
        kind: str

    def bind(self, context: Context) -> None:
        with torch.no_grad():
            context.engine.dense.flat.add_(0.01)

    def loss(self, step: Step) -> Tensor:
        return step.out("live").output.sum() * 0.0


class Poisoned(Rule):
    """Averages what it sees, whatever it is."""

    Options = Options
    mean: ClassVar[float] = 0.0

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.total = torch.zeros(1)

    def before(self, step: Step) -> None:
        assert step.outcome is not None
        self.total = self.total + float(step.outcome.ticket.features.dense[1])
        self.total = self.total * float("inf") if abs(float(self.total)) > 1e30 else self.total

    def state_dict(self) -> State:
        return {"total": self.total.clone()}

    def load_state_dict(self, state: State) -> None:
        self.total = state["total"] if state else torch.zeros(1)


class Undeclared(Term):
    """Reads weights that nobody makes for it."""

    class Options(Term.Options):
        kind: str

    def loss(self, step: Step) -> Tensor:
        return step.out("live", "ema").output.sum() * step.out("live").output.sum()


@pytest.mark.parametrize(
    ("name", "check", "promise"),
    [
        ("Forgetful", "resumes_to_the_bit", "resumed at"),
        ("Clocked", "is_a_pure_function", "a clock was read"),
        ("Random", "is_a_pure_function", "global generator"),
        ("Hoarder", "is_bounded", "is bounded"),
        ("Hoarder", "says_finite_things", "finite"),
        ("Raw", "forgets", "forgotten key"),
        ("Loud", "off_is_off", "weight 0"),
        ("Poisoned", "stays_finite", "not finite"),
    ],
)
def test_the_contract_notices(name: str, check: str, promise: str) -> None:
    checks = {each.name: each for each in plugin_checks()}
    with pytest.raises(AssertionError, match=promise):
        checks[check]({"kind": f"{__name__}:{name}"})


def test_weights_that_nobody_makes_are_an_error() -> None:
    checks = {each.name: each for each in plugin_checks()}
    with pytest.raises(points.PluginError, match="no weights 'ema'"):
        checks["needs_no_ids"]({"kind": f"{__name__}:Undeclared"})


def test_a_kind_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match=r"kind 'nobody' is not known; there are .*ema"):
        points.resolve("nobody")


def test_a_plugin_may_be_named_by_its_path() -> None:
    assert points.resolve(f"{__name__}:Clocked") is Clocked
    with pytest.raises(ValueError, match="can't be imported"):
        points.resolve(f"{__name__}:Nobody")
    with pytest.raises(ValueError, match="is no Plugin"):
        points.resolve(f"{__name__}:SETTINGS")
