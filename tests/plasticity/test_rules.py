import copy
import math
from typing import Any

import pytest
import torch
from torch import fx

from streamcl.config import Config, ConfigError, changes
from streamcl.learner import Learner
from streamcl.methods import PLASTICITY, Diagnostics
from streamcl.plasticity import LayerError, WeightClipping, check
from streamcl.state import digest
from tests.test_learner import config, learned, stream

LIVELY: dict[str, dict[str, Any]] = {
    "l2": {"strength": 0.1},
    "l2_init": {"strength": 0.1},
    "shrink_and_perturb": {"strength": 0.01, "sigma": 0.01},
    "weight_clipping": {"bound": 0.3},
    "upgd": {"decay": 0.9},
    "continual_backprop": {"replacement_rate": 0.02, "maturity": 10},
    "redo": {"tau": 0.6, "every_steps": 10},
    "self_normalized_resets": {"shortest_steps": 2, "initial_steps": 3, "longest_steps": 50, "revisit_steps": 30},
}
IDLE: dict[str, dict[str, Any]] = {
    "l2": {"strength": 0.0},
    "l2_init": {"strength": 0.0},
    "shrink_and_perturb": {"strength": 0.0, "sigma": 0.0},
    "weight_clipping": {"bound": 1e30},
    "upgd": {"sigma": 0.0, "strength": 0.0, "protecting": False},
    "continual_backprop": {"replacement_rate": 0.0},
    "redo": {"every_steps": 1_000_000},
    "self_normalized_resets": {"initial_steps": 1_000_000, "longest_steps": 1_000_000},
}


def plastic(kind: str, settings: dict[str, Any], optimizer: str = "sgd") -> Config:
    rules = [{"kind": kind, **settings}] if kind else []
    return config(
        plasticity=rules,
        optimizer={"kind": optimizer},
        replay={"per_event": 2},
        model={"hidden": [6, 5]},
        worker={"engine": "eager"},
    )


@pytest.mark.parametrize("kind", PLASTICITY)
def test_a_learner_goes_on_from_a_snapshot_bit_for_bit(kind: str) -> None:
    outcomes, made = stream("binary", 90), plastic(kind, LIVELY[kind])
    whole, plain = learned(made, outcomes), learned(plastic("", {}), outcomes)
    state, other = learned(made, outcomes[:44]).state_dict(), learned(made, outcomes[70:])
    other.load_state_dict(copy.deepcopy(state))
    for item in outcomes[44:]:
        other.learn(item)
    assert digest(other.state_dict()) == digest(whole.state_dict())
    assert not torch.equal(whole.engine.dense.flat, plain.engine.dense.flat)


@pytest.mark.parametrize("kind", PLASTICITY)
def test_a_rule_with_nothing_to_do_leaves_training_bit_for_bit_as_it_was(kind: str) -> None:
    outcomes = stream("binary", 60)
    made, plain = learned(plastic(kind, IDLE[kind]), outcomes), learned(plastic("", {}), outcomes)
    assert torch.equal(made.engine.dense.flat, plain.engine.dense.flat)
    assert torch.equal(made.engine.table, plain.engine.table)


@pytest.mark.parametrize("kind", PLASTICITY)
def test_a_snapshot_from_before_a_rule_begins_it(kind: str) -> None:
    old, new = learned(plastic("", {}), stream("binary", 20)), Learner(plastic(kind, LIVELY[kind]))
    new.load_state_dict(old.state_dict())
    for item in stream("binary", 30)[20:]:
        assert new.learn(item)


@pytest.mark.parametrize("kind", PLASTICITY)
def test_the_defaults_of_the_config_are_those_of_the_rule(kind: str) -> None:
    rule = Learner(plastic(kind, {})).engine.rules[kind]
    names = {
        "strength": "strength",
        "sigma": "sigma",
        "scaled": "scaled",
        "bound": "bound",
        "decay": "decay",
        "local": "local",
        "protecting": "protecting",
        "tau": "tau",
        "every_steps": "every",
        "percentile": "percentile",
        "expansion": "expansion",
        "revisit_steps": "revisit",
        "initial_steps": "initial",
        "shortest_steps": "shortest",
        "longest_steps": "longest",
        "maturity": "maturity",
    }
    defaults = type(rule).__init__.__kwdefaults__ or {}
    for name, value in PLASTICITY[kind]().model_dump().items():
        if name in names:
            assert getattr(rule, names[name]) == value
            assert defaults.get(names[name], value) == value


def test_clipping_can_leave_what_makes_the_logits_alone() -> None:
    made = plastic("weight_clipping", {"bound": 0.01, "output_layer": False})
    engine = learned(made, stream("binary", 60)).engine
    params, rule = engine.dense.params, engine.rules["weight_clipping"]
    assert isinstance(rule, WeightClipping)
    assert params["deep.hidden.0.weight"].abs().max() <= 0.01 / math.sqrt(7) + 1e-9
    for name in ("deep.head.weight", "deep.head.bias", "linear.weight", "linear.bias"):
        assert engine.dense.part(rule.upper, name).tolist() == torch.full_like(params[name], math.inf).tolist()
    assert params["linear.bias"].abs().max() > 0.01


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"plasticity": ["redo", "continual_backprop"]}, "one rule makes units anew, not redo and continual_backprop"),
        ({"plasticity": ["self_normalized_resets", "l2"]}, "self_normalized_resets comes last"),
        ({"plasticity": ["l2", "l2"]}, "each kind once"),
        ({"plasticity": ["redo"], "model": {"kind": "logistic"}}, "model.kind: logistic has no hidden units"),
        ({"plasticity": ["continual_backprop"], "model": {"hidden": []}}, "model.hidden: no hidden units"),
        ({"plasticity": ["upgd"], "optimizer": {"kind": "adam"}}, "optimizer.kind: upgd"),
        ({"plasticity": ["weight_clipping"], "optimizer": {"kind": "ftrl"}}, "optimizer.kind: ftrl.*weight_clipping"),
        ({"plasticity": ["shrink_and_perturb"], "optimizer": {"kind": "ftrl"}}, "optimizer.kind: ftrl"),
        ({"plasticity": ["l3"]}, "plasticity.0: .*'l2', 'l2_init'"),
        ({"plasticity": [{"kind": "l2", "strenght": 1.0}]}, "plasticity.0.strenght: .*did you mean 'strength'"),
        ({"plasticity": [{"kind": "upgd", "decay": 1.0}]}, "plasticity.0.decay"),
        (
            {"plasticity": [{"kind": "self_normalized_resets", "initial_steps": 9}]},
            "plasticity.0: initial_steps: must lie between",
        ),
    ],
)
def test_bad_settings_are_named(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**more)


def test_noise_in_the_gradient_goes_with_ftrl() -> None:
    rules = [{"kind": "shrink_and_perturb", "scaled": True}]
    assert learned(config(plasticity=rules, optimizer={"kind": "ftrl"}), stream("binary", 5))


@pytest.mark.parametrize("kind", PLASTICITY)
def test_hidden_layers_are_listened_to_only_by_rules_that_reset_units(kind: str) -> None:
    learner = Learner(plastic(kind, {}).model_copy(update={"diagnostics": Diagnostics(sample_every_steps=0)}))
    assert listened_to(learner) == (kind in ("continual_backprop", "redo", "self_normalized_resets"))


@pytest.mark.parametrize("kind", PLASTICITY)
def test_a_replica_s_learner_has_no_rules_and_listens_to_nothing(kind: str) -> None:
    made = plastic(kind, {})
    state = learned(made, stream("binary", 20)).state_dict()
    replica = Learner(made, serving=True)
    replica.load_state_dict(state)
    assert (replica.engine.rules, listened_to(replica)) == ({}, False)


def test_no_module_is_traced_for_a_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.fx stands in for `nn.Module.__call__` meanwhile, and other threads may be predicting."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr(fx.Tracer, "trace", refuse)
    assert learned(plastic("continual_backprop", {}), stream("binary", 2)).engine.rules


def listened_to(learner: Learner) -> bool:
    return any("forward" in vars(module) for module in learner.engine.model.modules())


RESETTING = [kind for kind in LIVELY if kind in ("continual_backprop", "redo", "self_normalized_resets")]


@pytest.mark.parametrize("kind", RESETTING)
def test_other_layers_after_a_clean_stop_begin_anew(kind: str) -> None:
    """Of the same number of units, so that nothing but the names tells them apart."""
    first, second = ["deep.hidden.0", "deep.hidden.1"], ["deep.hidden.1", "deep.head"]
    settings, model = {"kind": kind, **LIVELY[kind]}, {"hidden": [6, 6]}
    old = config(model=model, plasticity=[{**settings, "layers": [first]}])
    for layers in ([second], [first, second], None):
        new = config(model=model, plasticity=[{**settings, "layers": layers}])
        assert {change for _, change in changes(old.model_dump(mode="json"), new)} == {"stop"}
        learner = Learner(new)
        begun = digest(learner.engine.rules[kind].state_dict())
        learner.load_state_dict(learned(old, stream("binary", 60)).state_dict())
        assert digest(learner.engine.rules[kind].state_dict()) == begun


def test_another_longest_threshold_begins_anew() -> None:
    kind = "self_normalized_resets"
    old, new = (config(plasticity=[{"kind": kind, "longest_steps": n}]) for n in (10_000, 20_000))
    assert changes(old.model_dump(mode="json"), new) == [("plasticity", "stop")]
    learner = Learner(new)
    begun = digest(learner.engine.rules[kind].state_dict())
    learner.load_state_dict(learned(old, stream("binary", 10)).state_dict())
    assert digest(learner.engine.rules[kind].state_dict()) == begun


@pytest.mark.parametrize("kind", RESETTING)
def test_a_named_layer_has_the_number_that_it_has_in_the_model(kind: str) -> None:
    named = {"kind": kind, **LIVELY[kind], "layers": [["deep.hidden.1", "deep.head"]]}
    told = learned(config(model={"hidden": [6, 5]}, plasticity=[named]), stream("binary", 60)).read()
    assert told["layer_1_replacements"] > 0
    assert "layer_0_replacements" not in told


@pytest.mark.parametrize(
    "pair", [["deep.hidden.0", "deep.head"], ["deep.hidden.7", "deep.head"], ["deep.head", "deep.hidden.0"]]
)
def test_a_named_pair_that_is_no_hidden_layer_and_its_reader_is_refused(pair: list[str]) -> None:
    made = config(model={"hidden": [6, 6]}, plasticity=["l2", {"kind": "redo", "layers": [pair]}])
    with pytest.raises(LayerError, match=r"no hidden layer of the model and its reader; there are \('deep.hidden.0'"):
        Learner(made)
    with pytest.raises(LayerError, match=r"plasticity\.1\.layers: "):
        check(made)
    check(config(model={"hidden": [6, 6]}, plasticity=[{"kind": "redo", "layers": [["deep.hidden.1", "deep.head"]]}]))


def test_naming_a_layer_twice_names_it_once() -> None:
    pair = ["deep.hidden.1", "deep.head"]
    once, twice = (
        learned(config(model={"hidden": [6, 5]}, plasticity=[{"kind": "redo", "layers": layers}]), stream("binary", 30))
        for layers in ([pair], [pair, pair])
    )
    assert digest(once.state_dict()) == digest(twice.state_dict())


def test_rules_may_be_combined() -> None:
    rules = ["l2_init", "shrink_and_perturb", "weight_clipping", "upgd", "redo"]
    made = config(plasticity=rules, optimizer={"kind": "sgd"}, model={"hidden": [6, 5]})
    assert list(learned(made, stream("binary", 20)).engine.rules) == rules
