from typing import Any

import pytest
import torch

from streamcl.continual.merged_sets import FastSlow, LayerMerge
from streamcl.learner import Learner
from streamcl.plugin import Grads, PluginError, Step
from streamcl.state import digest, flatten, unflatten
from tests.continual.rows import config
from tests.continual.test_grad_align import REPLAY, conflicting, lived, made
from tests.test_learner import stream

REPTILE = {"kind": "reptile", "every": 4, "rate": 0.25}
KINDS: dict[str, list[Any]] = {
    "reptile": [REPTILE, "ema"],
    "running_mean": ["running_mean"],
    "restart": [{"kind": "running_mean", "restart": True}],
    "fast_slow": ["fast_slow"],
    "discount": ["discount"],
    "layer_merge": [{"kind": "layer_merge", "every": 5, "sample": 8}],
}


def weights(learner: Learner) -> tuple[torch.Tensor, torch.Tensor]:
    return learner.engine.dense.flat.clone(), learner.engine.table.clone()


@pytest.mark.parametrize("rule", ["sgd", "adam", "ftrl"])
def test_every_k_steps_reptile_draws_the_live_weights_back(rule: str) -> None:
    optimizer = {"kind": rule, "learning_rate": 0.1}
    learner, plain = made([REPTILE], optimizer=optimizer), made([], optimizer=optimizer)
    slow, told = weights(plain), set[int]()
    learner.engine.watch = lambda ids: told.update(ids.tolist())
    for number, item in enumerate(stream("binary", 22), 1):
        assert learner.learn(item)
        assert plain.learn(item)
        if not number % 4:  # the oracle is a loop around plain learning
            live = weights(plain)
            slow = tuple(torch.lerp(one, two, 0.25) for one, two in zip(slow, live, strict=True))  # type: ignore[assignment]
            plain.engine.dense.put(slow[0])
            plain.engine.put_rows(torch.arange(len(slow[1])), slow[1])
        for one, two in zip(weights(learner), weights(plain), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    moved = (weights(learner)[1] != Learner(config()).engine.table).any(1).nonzero()[:, 0]
    assert told >= set(moved.tolist())


def test_at_rate_1_reptile_is_off() -> None:
    events = conflicting("binary", 20, 10)
    off, without = lived(made([{**REPTILE, "rate": 1.0}]), events), lived(made([]), events)
    assert torch.equal(off.engine.dense.flat, without.engine.dense.flat)
    assert torch.equal(off.engine.table, without.engine.table)


@pytest.mark.parametrize("restart", [False, True])
def test_the_running_mean_is_that_of_the_weights_after_every_step(restart: bool) -> None:
    learner = made([{"kind": "running_mean", "restart": restart}])
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for item, signals in conflicting("binary", 25, 9):
        if signals and restart:
            held.clear()
        assert learner.learn(item, signals)
        held.append(weights(learner))
        mean = learner.engine.sets["mean"]
        for part, value in enumerate((mean.flat, mean.rows(torch.arange(len(mean.table))))):
            torch.testing.assert_close(value, torch.stack([each[part] for each in held]).mean(0), rtol=1e-4, atol=1e-6)


def test_averages_stay_exact_where_rows_are_moved_beside_the_optimiser() -> None:
    learner = made([REPTILE, "running_mean", {"kind": "ema", "decay": 0.8}])
    held, ema = list[torch.Tensor](), learner.engine.table.clone()
    for item in stream("binary", 18):
        assert learner.learn(item)
        held.append(learner.engine.table.clone())
        ema = 0.8 * ema + 0.2 * held[-1]
    sets, ids = learner.engine.sets, torch.arange(len(ema))
    torch.testing.assert_close(sets["ema"].rows(ids), ema, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sets["mean"].rows(ids), torch.stack(held).mean(0), rtol=1e-4, atol=1e-6)


def test_slow_weights_follow_at_a_boundary_and_then_slowly_by_their_stability() -> None:
    learner = made([{"kind": "fast_slow", "rate": 0.2}])
    rule = learner.plugins["fast_slow"]
    assert isinstance(rule, FastSlow)
    inner, squares = rule.transform, list[torch.Tensor]()

    def transform(grads: Grads, step: Step) -> Grads:
        squares.append(grads.dense**2)
        return inner(grads, step)

    rule.transform = transform  # type: ignore[method-assign]
    slow, rows = weights(learner)
    stability = torch.zeros_like(slow)
    for item, signals in conflicting("binary", 30, 10):
        if signals:
            live, rows = weights(learner)
            slow = slow + (live - slow) / (1.0 + stability)
            total = torch.stack(squares).sum(0)
            stability = stability + total / total.mean()
            squares.clear()
        assert learner.learn(item, signals)
        live, table = weights(learner)
        slow, rows = slow + 0.2 * (live - slow) / (1.0 + stability), torch.lerp(rows, table, 0.2)
        torch.testing.assert_close(rule.slow.flat, slow, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rule.slow.rows(torch.arange(len(rows))), rows, rtol=1e-4, atol=1e-6)
    assert float(rule.slow.stability.mean()) == pytest.approx(2.0)  # two boundaries, relative to the mean each


def test_a_discounted_set_is_a_part_of_the_way() -> None:
    learner = made([{"kind": "discount", "lambdas": [0.0, 0.3, 1.0]}])
    begin = weights(learner)
    lived(learner, conflicting("binary", 20, 10))
    ids = torch.arange(len(begin[1]))
    for share in (0.0, 0.3, 1.0):
        found = learner.engine.sets[f"discount_{share:g}"]
        torch.testing.assert_close(found.rows(ids), torch.lerp(begin[1], learner.engine.table, share))
        flat = torch.cat([part.flatten() for part in found.params().values()])
        torch.testing.assert_close(flat, torch.lerp(begin[0], learner.engine.dense.flat, share))


def test_the_best_of_several_discounts_is_served() -> None:
    sets = ["live", "discount_0.5"]
    learner = made(["discount", {"kind": "served", "sets": sets}])
    for item in stream("binary", 12):
        scores = learner.predict(item.ticket.features)
        assert learner.learn(item)
        assert len(scores.notes["served"]) == 2


@pytest.mark.parametrize("kind", ["discount", "layer_merge"])
def test_an_origin_that_nobody_provides_is_an_error(kind: str) -> None:
    with pytest.raises(PluginError, match=f"{kind}: no weights 'nobody'"):
        made([{"kind": kind, "origin": "nobody"}], replay=REPLAY)


def test_layers_that_see_things_otherwise_take_more_of_the_live_weights() -> None:
    learner = made(KINDS["layer_merge"], replay=REPLAY)
    rule, begin = learner.plugins["layer_merge"], weights(learner)
    assert isinstance(rule, LayerMerge)
    lived(learner, conflicting("binary", 45, 50))
    assert all(0.5 <= share < 1.0 for share in rule.live)
    merged = learner.engine.sets["merged"].params()
    for name, share in zip(rule.layers, rule.live, strict=True):
        old = learner.engine.dense.part(begin[0], f"{name}.weight")
        live = learner.engine.dense.params[f"{name}.weight"].detach()
        torch.testing.assert_close(merged[f"{name}.weight"], torch.lerp(old, live, share))
    rows = rule.context.rows(learner.memory, torch.arange(len(learner.memory)))
    assert learner.engine.out(rows, "merged").output.isfinite().all()


@pytest.mark.parametrize("cut", [4, 23])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_set_goes_on_to_the_bit(kind: str, cut: int) -> None:
    events = conflicting("binary", 30, 10)
    whole = lived(made(KINDS[kind], replay=REPLAY), events)
    resumed = lived(made(KINDS[kind], replay=REPLAY), events[5:17])
    resumed.load_state_dict(unflatten(*flatten(lived(made(KINDS[kind], replay=REPLAY), events[:cut]).state_dict())))
    assert digest(lived(resumed, events[cut:]).state_dict()) == digest(whole.state_dict())
