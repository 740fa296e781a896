import math
from typing import Any

import pytest
import torch

from streamcl.continual.segment_gradients import CUBER, TAG
from streamcl.learner import Learner
from streamcl.plugin import Grads, PluginError, Step
from streamcl.state import digest, flatten, unflatten
from tests.continual.rows import config
from tests.continual.test_grad_align import BOUNDARY, REPLAY, conflicting, lived, made
from tests.test_learner import stream

TAGS = {"kind": "tag", "segments": 2, "b": 3.0}
CUBERS = {"kind": "cuber", "segments": 2, "sample": 40}


def test_tag_divides_by_the_squares_of_all_segments_that_count_by_how_they_relate() -> None:
    learner = made([TAGS], optimizer={"kind": "sgd", "learning_rate": 1e-3})
    rule, dense = learner.plugins["tag"], learner.engine.dense
    assert isinstance(rule, TAG)
    segments = [(torch.zeros_like(dense.flat), torch.zeros_like(dense.flat))]
    inner = rule.transform

    def transform(grads: Grads, step: Step) -> Grads:
        found = inner(grads, step)
        g, (m, v) = grads.dense, segments[-1]
        segments[-1] = (0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g)
        for name in dense.params:
            first, second = (dense.part(each, name) for each in segments[-1])
            total = second * (math.exp(-3.0) if len(segments) > 1 else 1.0)
            for old_first, old_second in segments[-3:-1]:
                cosine = torch.cosine_similarity(first.flatten(), dense.part(old_first, name).flatten(), dim=0)
                total = total + torch.exp(-3.0 * cosine) * dense.part(old_second, name)
            expected = dense.part(g, name) / (total.sqrt() + 1e-8)
            torch.testing.assert_close(dense.part(found.dense, name), expected, rtol=2e-3, atol=1e-4)
        assert found.rows is grads.rows
        return found

    rule.transform = transform  # type: ignore[method-assign]
    for item, signals in conflicting("binary", 44, 11):
        if signals:
            segments.append((torch.zeros_like(dense.flat), torch.zeros_like(dense.flat)))
        assert learner.learn(item, signals)
    assert learner.read()["tag_past_segments"] == 2.0


def test_tag_beside_an_optimiser_that_divides_too_is_an_error() -> None:
    with pytest.raises(PluginError, match="tag"):
        Learner(config(plugins=["tag"], optimizer={"kind": "adam"}))


def test_a_step_spares_what_a_layer_makes_of_old_inputs() -> None:
    settings = {**CUBERS, "energy": 1.0, "share": 1.0, "agreement": 1.0}
    model = {"kind": "mlp", "hidden": [16, 12]}
    learner = made([settings], replay={**REPLAY, "capacity": 4, "retention": "recency"}, model=model)
    rule, engine = learner.plugins["cuber"], learner.engine
    assert isinstance(rule, CUBER)
    for item in stream("binary", 12):
        assert learner.learn(item)
    rows = rule.context.rows(learner.memory, torch.arange(4))
    [item] = stream("binary", 1, seed=4)
    old = [torch.cat((each, torch.ones(4, 1)), 1) for each in engine.inputs(rows)]
    before = [rule._weights(engine.dense.flat.clone(), name) for name in rule.layers]
    assert learner.learn(item, [BOUNDARY])
    for name, was, inputs in zip(rule.layers, before, old, strict=True):
        moved = rule._weights(engine.dense.flat, name) - was
        assert float((moved @ inputs.T).abs().max()) <= 1e-5 + 1e-3 * float(moved.abs().max())
    assert float((rule._weights(engine.dense.flat, rule.layers[0]) - before[0]).abs().max()) > 1e-5


def test_a_gradient_that_agrees_with_the_old_ones_is_left_whole() -> None:
    learner = made([{**CUBERS, "agreement": 0.0}], replay=REPLAY)
    lived(learner, conflicting("binary", 24, 12))
    rule = learner.plugins["cuber"]
    assert isinstance(rule, CUBER)
    agreeing = Grads(rule.old[0].clone(), torch.zeros(0, dtype=torch.int64), learner.engine.table[:0])
    against = agreeing.with_dense(-agreeing.dense)
    with torch.no_grad():
        kept, turned = (rule.transform(each, None) for each in (agreeing, against))  # type: ignore[arg-type]
    assert float(rule.old[0].abs().max()) > 0.0
    torch.testing.assert_close(kept.dense, agreeing.dense)
    assert float(turned.norm()) < float(against.norm())


def test_a_basis_is_orthonormal_and_keeps_to_its_share() -> None:
    learner = made([{**CUBERS, "share": 0.5}], replay=REPLAY)
    lived(learner, conflicting("binary", 60, 10))
    rule = learner.plugins["cuber"]
    assert isinstance(rule, CUBER)
    for basis in rule.bases:
        assert 0 < basis.shape[1] <= 0.5 * len(basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def test_without_strength_or_boundary_cuber_is_off() -> None:
    events = conflicting("binary", 30, 10)
    without = lived(made([], replay=REPLAY), events)
    off = lived(made([{**CUBERS, "strength": 0.0}], replay=REPLAY), events)
    calm = lived(made([CUBERS], replay=REPLAY), [(item, ()) for item, _ in events])
    for learner in (off, calm):
        assert torch.equal(learner.engine.dense.flat, without.engine.dense.flat)
        assert torch.equal(learner.engine.table, without.engine.table)


@pytest.mark.parametrize(
    "more", [{"replay": {"retention": "none"}}, {"replay": REPLAY, "model": {"kind": "logistic"}}], ids=str
)
def test_cuber_without_memory_or_layers_is_an_error(more: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="cuber"):
        made([CUBERS], **more)


@pytest.mark.parametrize("cut", [4, 26])
@pytest.mark.parametrize("plugin", [TAGS, CUBERS], ids=["tag", "cuber"])
def test_a_resumed_rule_goes_on_to_the_bit(plugin: Any, cut: int) -> None:
    events = conflicting("binary", 40, 10)
    whole = lived(made([plugin], replay=REPLAY), events)
    resumed = lived(made([plugin], replay=REPLAY), events[5:17])
    resumed.load_state_dict(unflatten(*flatten(lived(made([plugin], replay=REPLAY), events[:cut]).state_dict())))
    assert digest(lived(resumed, events[cut:]).state_dict()) == digest(whole.state_dict())
