from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from streamcl.continual.grad_align import AGEM, GEM, dual, nonnegative
from streamcl.learner import Learner
from streamcl.plugin import Grads, PluginError, Rule, Step
from streamcl.records import EVENTS, Origin, Outcome, Selector, Signal
from streamcl.state import digest, flatten, unflatten
from tests.continual.rows import config
from tests.test_learner import learned, stream

BOUNDARY = Signal("boundary", "segment", Origin(EVENTS, 0, 0))
REPLAY = {"retention": "reservoir", "per_event": 4}
GEMS = {"kind": "gem", "memory_per_segment": 6, "segments": 2, "sample": 0, "margin": 0.0}


def conflicting(task: str, count: int, every: int) -> list[tuple[Outcome, Sequence[Signal]]]:
    """Segments of `every` events; in each second one the labels are turned, so gradients disagree."""
    found: list[tuple[Outcome, Sequence[Signal]]] = []
    for i, item in enumerate(stream(task, count)):
        segment, starts = divmod(i, every)
        label = 1.0 - item.label if task == "binary" and segment % 2 else item.label
        found.append((replace(item, label=label), [BOUNDARY] if i and not starts else []))
    return found


def lived(learner: Learner, events: list[tuple[Outcome, Sequence[Signal]]]) -> Learner:
    for item, signals in events:
        assert learner.learn(item, signals)
    return learner


class Watching(Rule):
    """What goes into another rule and what comes out of it."""

    def __init__(self, watched: Rule) -> None:
        self.seen: list[tuple[Grads, Grads, Step]] = []
        inner = watched.transform

        def transform(grads: Grads, step: Step) -> Grads:
            found = inner(grads, step)
            self.seen.append((grads, found, step))
            return found

        watched.transform = transform  # type: ignore[method-assign]


def made(plugins: list[Any], task: str = "binary", **more: Any) -> Learner:
    return Learner(config(task, plugins=plugins, **{"optimizer": {"kind": "sgd", "learning_rate": 0.1}, **more}))


def test_agem_leaves_no_conflict_with_the_replayed_rows_and_changes_nothing_else() -> None:
    learner = made(["agem"], replay=REPLAY)
    rule = learner.plugins["agem"]
    assert isinstance(rule, AGEM)
    inner = rule.transform

    def transform(grads: Grads, step: Step) -> Grads:
        if step.replay is None:
            return inner(grads, step)
        found, reference = inner(grads, step), step.gradient("replay")
        before, after = float(grads.dot(reference)), float(found.dot(reference))
        if before >= 0.0:
            assert found is grads
        else:  # the closest one that doesn't conflict: on the border, moved along the reference alone
            scale = float(reference.norm()) * float(grads.norm())
            assert abs(after) <= 1e-5 * scale
            moved = found.plus(grads, -1.0)
            assert float(moved.dot(reference)) == pytest.approx(float(moved.norm()) * float(reference.norm()), rel=1e-4)
        return found

    rule.transform = transform  # type: ignore[method-assign]
    lived(learner, conflicting("binary", 60, 15))
    assert rule.projected > 3


def test_agem_alone_learns_the_live_event_and_leaves_rows_be_that_only_the_memory_reads() -> None:
    plain = made([], optimizer={"kind": "adam"})
    alone = made(["live_only"], replay=REPLAY, optimizer={"kind": "adam"})
    for item, _ in conflicting("binary", 40, 10):
        assert plain.learn(item)
        assert alone.learn(item)
    torch.testing.assert_close(alone.engine.dense.flat, plain.engine.dense.flat, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alone.engine.table, plain.engine.table, rtol=1e-4, atol=1e-6)


def test_without_weight_live_only_is_not_there() -> None:
    with_it = made([{"kind": "live_only", "weight": 0.0}], replay=REPLAY)
    without = made([], replay=REPLAY)
    events = conflicting("binary", 20, 5)
    for learner in (with_it, without):
        lived(learner, events)
    assert torch.equal(with_it.engine.dense.flat, without.engine.dense.flat)


@pytest.mark.parametrize("plugin", [{"kind": "agem", "strength": 0.0}, {**GEMS, "strength": 0.0}])
def test_without_strength_a_rule_is_off(plugin: dict[str, Any]) -> None:
    events = conflicting("binary", 30, 10)
    off, without = lived(made([plugin], replay=REPLAY), events), lived(made([], replay=REPLAY), events)
    assert torch.equal(off.engine.dense.flat, without.engine.dense.flat)
    assert torch.equal(off.engine.table, without.engine.table)


@pytest.mark.parametrize("replay", [{"retention": "none"}, {**REPLAY, "per_event": 0}, {**REPLAY, "weight": 0.0}])
def test_agem_without_replayed_rows_is_an_error(replay: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="agem"):
        made(["agem"], replay=replay)


def test_gem_raises_the_loss_of_no_past_segment_and_is_the_closest_gradient_that_does_not() -> None:
    learner = made([GEMS])
    rule = learner.plugins["gem"]
    assert isinstance(rule, GEM)
    watching = Watching(rule)
    checked = 0
    for item, signals in conflicting("binary", 60, 15):
        tables = [*rule.tables[:-1]]
        if signals:
            tables = [*rule.tables][-2:]
        watching.seen.clear()
        old: list[Grads] = []
        inner = rule.transform

        def transform(grads: Grads, step: Step, inner: Any = inner, tables: Any = tables, old: Any = old) -> Grads:
            for table in tables:
                rows = rule.context.rows(table, torch.arange(len(table)))
                old.append(rule.context.engine.gradient(rows).on(grads.touched))
            found: Grads = inner(grads, step)
            return found

        rule.transform = transform  # type: ignore[method-assign]
        assert learner.learn(item, signals)
        rule.transform = inner  # type: ignore[method-assign]
        [(before, after, _)] = watching.seen
        if after is before:
            assert all(float(before.dot(each)) >= 0.0 for each in old)
            continue
        checked += 1
        scale = float(before.norm()) * max(float(each.norm()) for each in old)
        assert all(float(after.dot(each)) >= -1e-5 * scale for each in old)
        basis = torch.stack([each.flat() for each in old]).double()
        moved = after.flat().double() - before.flat().double()
        v = torch.linalg.lstsq(basis.T, moved[:, None]).solution[:, 0]
        torch.testing.assert_close(v @ basis, moved, rtol=1e-3, atol=1e-6)
        assert bool((v > -1e-4).all())
        assert all(abs(float(w)) < 1e-4 or abs(float(after.dot(g))) < 1e-4 * scale for w, g in zip(v, old, strict=True))
    assert checked > 5


def test_gem_without_a_boundary_is_plain_learning() -> None:
    outcomes = stream("binary", 30)
    with_it, without = learned(config(plugins=[GEMS]), outcomes), learned(config(), outcomes)
    assert torch.equal(with_it.engine.dense.flat, without.engine.dense.flat)
    assert torch.equal(with_it.engine.table, without.engine.table)


def test_gem_keeps_the_last_rows_of_the_last_segments() -> None:
    learner = made([GEMS], "regression", optimizer={"kind": "adam"})
    events = conflicting("regression", 40, 10)
    lived(learner, events)
    rule = learner.plugins["gem"]
    assert isinstance(rule, GEM)
    kept = [sorted(table.y.tolist()) for table in rule.tables]
    labels = np.array([item.label for item, _ in events], np.float32)
    assert kept == [sorted(labels[end - 6 : end].tolist()) for end in (20, 30, 40)]


def test_gem_forgets_a_key() -> None:
    learner = made([GEMS])
    events = [
        (replace(item, ticket=replace(item.ticket, key=f"k{i % 3}")), signals)
        for i, (item, signals) in enumerate(conflicting("binary", 36, 12))
    ]
    lived(learner, events)
    assert learner.forget(Selector(key="k1"))["gem"] == 6
    assert learner.forget(Selector(key="k1"))["gem"] == 0
    lived(learner, conflicting("binary", 5, 10))


@pytest.mark.parametrize("cut", [3, 17, 31])
@pytest.mark.parametrize("plugin", ["agem", {**GEMS, "sample": 3}])
def test_a_resumed_rule_goes_on_to_the_bit(plugin: Any, cut: int) -> None:
    events = conflicting("binary", 40, 10)
    whole = lived(made([plugin], replay=REPLAY), events)
    resumed = lived(made([plugin], replay=REPLAY), events[5:12])
    resumed.load_state_dict(unflatten(*flatten(lived(made([plugin], replay=REPLAY), events[:cut]).state_dict())))
    assert digest(lived(resumed, events[cut:]).state_dict()) == digest(whole.state_dict())


def brute(gram: NDArray[np.float64], linear: NDArray[np.float64]) -> float:
    """The least of 1/2 u'Qu + c'u over u >= 0: that over every set of free ones whose least is not negative."""
    size, best = len(linear), 0.0
    for count in range(1, size + 1):
        for free in map(list, combinations(range(size), count)):
            u = np.zeros(size)
            u[free] = np.linalg.lstsq(gram[np.ix_(free, free)], -linear[free], rcond=None)[0]
            if (u >= -1e-12).all():
                best = min(best, float(0.5 * u @ gram @ u + linear @ u))
    return best


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 6), wide=st.integers(1, 8), seed=st.integers(0, 10**6), twice=st.booleans())
def test_the_solution_is_the_best_of_all_active_sets_and_meets_the_conditions_of_kuhn_and_tucker(
    size: int, wide: int, seed: int, twice: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(size, wide)) * 10.0 ** rng.integers(-3, 3)
    if twice and size > 1:
        rows[-1] = rows[0]  # Q is singular
    g = rng.normal(size=wide)
    gram, linear = rows @ rows.T, rows @ g
    u = nonnegative(gram, linear)
    slope, scale = gram @ u + linear, np.abs(linear).max() + 1e-30
    assert (u >= 0.0).all()
    assert (slope >= -1e-6 * scale).all()
    assert np.abs(u * slope).max() <= 1e-6 * scale * max(1.0, u.max())
    value = 0.5 * u @ gram @ u + linear @ u
    assert value <= brute(gram, linear) + 1e-8 * (1.0 + abs(value))


def test_a_margin_is_the_least_v() -> None:
    rng = np.random.default_rng(3)
    rows, g = rng.normal(size=(4, 9)), rng.normal(size=9)
    v = dual(rows @ rows.T, rows @ g, 0.5)
    assert v.min() == 0.5
    shifted = g + 0.5 * rows.sum(0)
    np.testing.assert_allclose(v - 0.5, nonnegative(rows @ rows.T, rows @ shifted))
