from typing import Any

import pytest
import torch

from streamcl.continual.weight_anchors import EWC, HoldLargest, L2Anchor
from streamcl.engine.dense import Dense
from streamcl.learner import Learner
from streamcl.plugin import Grads, Step
from streamcl.records import EVENTS, Origin, Signal
from streamcl.state import digest, flatten, unflatten
from tests.continual.rows import config
from tests.continual.test_grad_align import conflicting, lived, made
from tests.test_learner import learned, stream

BOUNDARY = Signal("boundary", "segment", Origin(EVENTS, 0, 0))
KINDS: dict[str, Any] = {
    "ewc": {"kind": "ewc", "strength": 5.0, "limit": 1e9, "decay": 0.5},
    "l2_anchor": {"kind": "l2_anchor", "strength": 0.3},
    "initial": {"kind": "l2_anchor", "strength": 0.3, "to": "initial"},
    "hold_largest": {"kind": "hold_largest", "strength": 0.7, "share": 0.2},
}


def held(learner: Learner) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """strength x F and w* of dense weights and rows, as the rule has them."""
    [rule] = learner.plugins.values()
    dense, table = learner.engine.dense.flat, learner.engine.table
    if isinstance(rule, EWC):
        lam = rule.options.strength
        return lam * rule.fisher, rule.anchor, lam * rule.row_fisher, rule.row_anchor
    if isinstance(rule, L2Anchor):
        ones = rule.options.strength * rule.holds
        return torch.full_like(dense, ones), rule.anchor.flat, torch.full_like(table, ones), rule.anchor.table
    assert isinstance(rule, HoldLargest)
    return rule.options.strength * rule.held, rule.anchor, torch.zeros_like(table), table


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_the_gradient_of_the_penalty_and_nothing_before_there_is_something_to_hold(kind: str) -> None:
    learner = made([KINDS[kind]], "multiclass", replay={"retention": "recency", "per_event": 2})
    [rule] = learner.plugins.values()
    assert isinstance(rule, EWC | L2Anchor | HoldLargest)
    inner, pulls = rule.transform, []

    def transform(grads: Grads, step: Step) -> Grads:
        found = inner(grads, step)
        factor, anchor, row_factor, row_anchor = held(learner)
        dense = learner.engine.dense.flat.clone().requires_grad_()
        table = learner.engine.table.clone().requires_grad_()
        with torch.enable_grad():
            penalty = (
                0.5 * (factor * (dense - anchor) ** 2).sum() + 0.5 * (row_factor * (table - row_anchor) ** 2).sum()
            )
            by_dense, by_row = torch.autograd.grad(penalty, [dense, table])
        torch.testing.assert_close(found.dense, grads.dense + by_dense, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.rows, grads.rows + by_row[grads.touched], rtol=1e-5, atol=1e-7)
        pulls.append(float(by_dense.abs().max()))
        return found

    rule.transform = transform  # type: ignore[method-assign]
    lived(learner, conflicting("multiclass", 40, 10))
    assert max(pulls[11:]) > 0.0
    if kind != "initial":
        assert not any(pulls[:11])


def test_the_fisher_fades_at_a_boundary_and_takes_in_the_mean_of_squares_since() -> None:
    learner = made([KINDS["ewc"]])
    rule = learner.plugins["ewc"]
    assert isinstance(rule, EWC)
    squares: list[torch.Tensor] = []
    expected = torch.zeros_like(rule.fisher)
    before = rule.before

    def watching(step: Step) -> None:
        squares.append(step.gradient("live").dense ** 2)
        before(step)

    rule.before = watching  # type: ignore[method-assign]
    for item, signals in conflicting("binary", 45, 15):
        if signals:
            expected = 0.5 * expected + torch.stack(squares).mean(0)
            squares.clear()
        assert learner.learn(item, signals)
    torch.testing.assert_close(rule.fisher, expected, rtol=1e-4, atol=1e-8)


def test_a_pull_has_its_limit() -> None:
    learner = made([{**KINDS["ewc"], "strength": 1e12, "limit": 2.0}])
    lived(learner, conflicting("binary", 60, 15))
    assert bool(torch.isfinite(learner.engine.dense.flat).all())
    assert float(learner.engine.dense.flat.abs().max()) < 10.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_strength_a_rule_is_off(kind: str) -> None:
    events = conflicting("binary", 30, 10)
    off, without = lived(made([{**KINDS[kind], "strength": 0.0}]), events), lived(made([]), events)
    assert torch.equal(off.engine.dense.flat, without.engine.dense.flat)
    assert torch.equal(off.engine.table, without.engine.table)


@pytest.mark.parametrize("kind", ["ewc", "l2_anchor", "hold_largest"])
def test_without_a_boundary_it_is_plain_learning(kind: str) -> None:
    outcomes = stream("binary", 20)
    with_it, without = learned(config(plugins=[KINDS[kind]]), outcomes), learned(config(), outcomes)
    assert torch.equal(with_it.engine.dense.flat, without.engine.dense.flat)
    assert torch.equal(with_it.engine.table, without.engine.table)


@pytest.mark.parametrize("rows", [True, False])
def test_ewc_may_leave_the_table_alone(rows: bool) -> None:
    learner = made([{**KINDS["ewc"], "rows": rows}])
    lived(learner, conflicting("binary", 30, 10))
    assert bool(len(learner.state_dict()["plugins"]["ewc"]["row_fisher"])) == rows


def test_of_each_matrix_the_weights_are_held_that_moved_most() -> None:
    learner = made([KINDS["hold_largest"]])
    outcomes, before = stream("binary", 31), learner.engine.dense.flat.clone()
    for item in outcomes[:30]:
        assert learner.learn(item)
    moved = (learner.engine.dense.flat - before).abs()
    assert learner.learn(outcomes[30], [BOUNDARY])
    rule = learner.plugins["hold_largest"]
    assert isinstance(rule, HoldLargest)
    dense: Dense = learner.engine.dense
    for name, param in dense.params.items():
        chosen, delta = dense.part(rule.held, name) > 0, dense.part(moved, name)
        if param.dim() < 2:
            assert not chosen.any()
        else:
            assert int(chosen.sum()) == min(round(0.2 * param.numel()), int((delta > 0).sum()))
            assert not chosen.any() or float(delta[chosen].min()) >= float(delta[~chosen].max())


def test_a_weight_that_is_made_anew_is_free() -> None:
    learner = made([KINDS["ewc"]])
    lived(learner, conflicting("binary", 30, 10))
    rule, dense = learner.plugins["ewc"], learner.engine.dense
    assert isinstance(rule, EWC)
    name = next(name for name in dense.params if name.endswith("hidden.0.weight"))
    dense.renew(name, torch.tensor([1]), torch.full_like(dense.params[name][:1], 0.25))
    assert not dense.part(rule.fisher, name)[1].any()
    assert bool((dense.part(rule.anchor, name)[1] == 0.25).all())


@pytest.mark.parametrize("cut", [4, 15, 26])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_rule_goes_on_to_the_bit(kind: str, cut: int) -> None:
    events = conflicting("binary", 35, 10)
    whole = lived(made([KINDS[kind]]), events)
    resumed = lived(made([KINDS[kind]]), events[5:17])
    resumed.load_state_dict(unflatten(*flatten(lived(made([KINDS[kind]]), events[:cut]).state_dict())))
    assert digest(lived(resumed, events[cut:]).state_dict()) == digest(whole.state_dict())
