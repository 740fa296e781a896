import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.continual.bias_free_head import PRESETS, supcon
from streamcl.continual.classes import NEVER, direction
from streamcl.learner import Learner
from streamcl.plugin import PluginError
from streamcl.records import Selector
from tests.continual.incremental import (
    BOUNDARY,
    CLASSES,
    Case,
    Params,
    accuracy,
    assert_loss,
    assert_resumes,
    config,
    events,
    named,
    net,
    outcome,
    smooth,
    teach,
)


def among(scores: Tensor, label: int, allowed: list[int]) -> Tensor:
    """-log of the label's share among the allowed classes."""
    return torch.stack([scores[c] for c in allowed]).logsumexp(0) - scores[label]


def cosines(case: Case, x: Tensor) -> Tensor:
    h = net(case.params, x[None])[1][0]
    return torch.stack([smooth(h).dot(smooth(row)) for row in case.params["head.weight"]])


def labels(case: Case) -> list[int]:
    return [int(y) for y in case.y]


def er_ace(case: Case) -> Tensor:
    """22 events: two classes until the eleventh, then two others; the window of 5 holds none of the first two."""
    total = among(net(case.params, case.x[:1])[0][0], labels(case)[0], [2, 3])
    for x, y, share in zip(case.x[1:], labels(case)[1:], case.share[1:], strict=True):
        total = total + share * among(net(case.params, x[None])[0][0], y, list(range(CLASSES)))
    return total


def pcr(case: Case, t: float = 0.09) -> Tensor:
    total, ys = torch.zeros(()), labels(case)
    for x, y in zip(case.x, ys, strict=True):
        logits = cosines(case, x) / t
        total = total + torch.stack([logits[other] for other in ys]).logsumexp(0) - logits[y]
    return total / len(ys)


def contrast(vectors: list[Tensor], ys: list[int], t: float, views: list[Tensor] | None = None) -> Tensor:
    z = [smooth(v) for v in vectors + (views or [])]
    everybody, found = ys * (2 if views else 1), []
    for i, y in enumerate(ys):
        logits = [z[i].dot(z[a]) / t for a in range(len(z)) if a != i]
        company = [p for p in range(len(z)) if p != i and everybody[p] == y]
        if company:
            whole = torch.stack(logits).logsumexp(0)
            found.append(sum((whole - z[i].dot(z[p]) / t for p in company), torch.zeros(())) / len(company))
    return torch.stack(found).mean() if found else torch.zeros(())


def hiddens(case: Case, params: Params) -> list[Tensor]:
    return list(net(params, case.x)[1])


def hpcr(case: Case, scale: float | None = None) -> Tensor:
    """What is stored was served: dot products, or with a cosine head `scale` x cosines, and so is what is said now."""
    loss = pcr(case, 0.2) + 0.3 * contrast(hiddens(case, case.params), labels(case), 0.2)
    stay = torch.zeros(())
    for x, z in zip(case.x[1:], case.stored["output"], strict=True):
        now = net(case.params, x[None])[0][0] if scale is None else scale * cosines(case, x)
        p, q = torch.softmax(z, 0), torch.softmax(now, 0)
        stay = stay + (p * (p / q).log()).sum() / (len(case.x) - 1)
    return loss * 2.0 + 0.4 * stay


def hpcr_of_cosines(case: Case) -> Tensor:
    assert case.stored["output"].abs().max() <= 7.0  # 7 x a cosine
    return hpcr(case, 7.0)


def uer(case: Case) -> Tensor:
    everybody = list(range(CLASSES))
    total = among(4.0 * cosines(case, case.x[0]), labels(case)[0], everybody)
    for x, y, share in zip(case.x[1:], labels(case)[1:], case.share[1:], strict=True):
        total = total + share * among(net(case.params, x[None])[0][0], y, everybody)
    return total


def scr(case: Case) -> Tensor:
    return contrast(hiddens(case, case.params), labels(case), 0.1)


def scr_of_two_views(case: Case) -> Tensor:
    return contrast(hiddens(case, case.params), labels(case), 0.1, hiddens(case, case.previous))


HPCR = {"kind": "hpcr", "temperature": 0.2, "gradient_temperature": 0.1, "least": 5, "alpha": 0.3, "beta": 0.4}
LOSSES: list[tuple[list[Any], Callable[[Case], Tensor]]] = [
    ([{"kind": "er_ace", "window": 5}], er_ace),
    (["pcr"], pcr),
    ([HPCR], hpcr),
    ([HPCR, {"kind": "cosine_head", "scale": 7.0}], hpcr_of_cosines),
    ([{"kind": "uer", "scale": 4.0}], uer),
    (["scr"], scr),
    (["previous", {"kind": "scr", "teacher": "previous"}], scr_of_two_views),
]


@pytest.mark.parametrize(("plugins", "oracle"), LOSSES, ids=named)
def test_a_loss_and_its_gradient_are_those_written_out(plugins: list[Any], oracle: Callable[[Case], Tensor]) -> None:
    assert assert_loss(config(plugins), oracle) > 0.0


def test_contrast_among_rows_waits_until_there_are_enough() -> None:
    alone = {**HPCR, "least": 6, "beta": 0.0}
    assert_loss(config([alone]), lambda case: 2.0 * pcr(case, 0.2))


@pytest.mark.parametrize("plugin", ["er_ace", "pcr", "hpcr", "uer", "scr"])
def test_without_memory_every_event_is_learned(plugin: str) -> None:
    made = config([plugin], replay={"retention": "none"})
    learner = teach(Learner(made), events(12))
    assert learner.version == 12
    assert torch.isfinite(learner.engine.dense.flat).all()


@pytest.mark.parametrize("plugin", ["pcr", "scr"])
def test_a_live_row_alone_has_nobody_to_be_told_apart_from(plugin: str) -> None:
    learner = Learner(config([plugin], replay={"retention": "none"}))
    before = learner.engine.dense.flat.clone()
    teach(learner, events(6))
    assert torch.equal(learner.engine.dense.flat, before)


def test_a_class_that_has_not_been_there_is_left_out() -> None:
    learner = teach(Learner(config(["uer"])), events(40)[:20])
    weight, bias = learner.engine.dense.params["head.weight"], learner.engine.dense.params["head.bias"]
    assert not weight[2:].any()
    assert not bias[2:].any()
    assert weight[:2].any()


def test_rows_without_company_say_nothing_and_keep_a_gradient() -> None:
    hidden = torch.rand(3, 4, requires_grad=True)
    loss = supcon(hidden, torch.tensor([0, 1, 2]), 0.1)
    [gradient] = torch.autograd.grad(loss, hidden)
    assert (float(loss), float(gradient.abs().max())) == (0.0, 0.0)


def test_a_direction_is_smooth_at_nought_and_of_length_one_far_away() -> None:
    nought = torch.zeros(3, requires_grad=True)
    [gradient] = torch.autograd.grad(direction(nought).sum(), nought)
    assert gradient.tolist() == pytest.approx([10.0] * 3)
    assert float(direction(torch.tensor([30.0, 40.0])).norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_cosine_head_serves_cosines() -> None:
    learner = teach(Learner(config(["pcr", {"kind": "cosine_head", "scale": 7.0}])), events(20))
    event = events(1, 8)[0]
    h = net(learner.engine.dense.params, torch.from_numpy(event.features.dense)[None])[1][0]
    expected = [7.0 * float(smooth(h).dot(smooth(row))) for row in learner.engine.dense.params["head.weight"]]
    scores = learner.predict(event.features)
    assert scores.output.tolist() == pytest.approx(expected, abs=1e-5)
    powers = [math.exp(value) for value in expected]
    assert scores.served.tolist() == pytest.approx([power / sum(powers) for power in powers], abs=1e-5)


def test_a_cosine_head_serves_another_weight_set() -> None:
    learner = teach(Learner(config(["previous", {"kind": "cosine_head", "weights": "previous"}])), events(12), 6)
    event = events(1, 8)[0]
    before = learner.predict(event.features).output.tolist()
    teach(learner, events(6, 4), None, 12)
    assert learner.predict(event.features).output.tolist() == before


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_resumes_to_the_bit(name: str) -> None:
    assert_resumes(config(PRESETS[name]["plugins"]))


@pytest.mark.parametrize("who", [Selector(ids=frozenset({"3"})), Selector(key="nobody")], ids=["3", "nobody"])
def test_classes_that_there_have_been_outlive_a_forget(who: Selector) -> None:
    learner = teach(Learner(config(["er_ace"])), events(24))
    plugin = learner.plugins["er_ace"]
    before = plugin.state_dict()["last"]
    assert (before != NEVER).all()
    assert learner.forget(who)["er_ace"] == 0
    assert torch.equal(plugin.state_dict()["last"], before)


@pytest.mark.parametrize("plugins", [["pcr"], ["previous", {"kind": "supcon", "teacher": "previous"}]])
def test_a_loss_of_no_weight_is_not_there(plugins: list[Any]) -> None:
    last = plugins[-1] if isinstance(plugins[-1], dict) else {"kind": plugins[-1]}
    off = [*plugins[:-1], {**last, "weight": 0.0}]
    one, two = (teach(Learner(config(each)), events(16), 8) for each in (off, plugins[:-1]))
    assert torch.equal(one.engine.dense.flat, two.engine.dense.flat)


@pytest.mark.parametrize(
    ("plugins", "more", "reason"),
    [
        (["er_ace"], {"task": "binary"}, "er_ace: for a multiclass task, not binary"),
        (["er_ace"], {"task": "regression"}, "er_ace: a regression has no classes"),
        (["uer"], {"model": {"kind": "deepfm", "classes": 4}}, "uer: the last layer of deepfm isn't all of its output"),
        (["pcr"], {"model": {"kind": "logistic", "classes": 4}}, "pcr: a logistic model has no hidden vector"),
        (["supcon"], {"task": "regression"}, "supcon: a regression has no classes"),
        ([{"kind": "supcon", "teacher": "ema"}], {}, "supcon: no weights 'ema' before it"),
        (["cosine_head"], {"task": "binary"}, "cosine_head: for a multiclass task, not binary"),
    ],
)
def test_what_a_method_cannot_do_is_said(plugins: list[Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        Learner(config(plugins, **more))


def test_two_classes_are_drawn_apart_too() -> None:
    learner = Learner(config(["supcon"], task="binary"))
    for number, event in enumerate(events(16, 0, "binary")):
        assert learner.learn(outcome(learner, event, number), [BOUNDARY])


@pytest.mark.parametrize("name", ["er_ace", "pcr"])
def test_classes_that_are_gone_are_known_still(name: str) -> None:
    stream, gone = events(120, 2), events(100, 11)
    replay = {"retention": "reservoir", "capacity": 20, "per_event": 4, "weight": 0.5}
    without = teach(Learner(config(replay={"retention": "none"})), stream)
    learner = teach(Learner(config(PRESETS[name]["plugins"], replay=replay)), stream)
    assert accuracy(learner, gone, [0, 1]) > accuracy(without, gone, [0, 1]) + 0.2
    assert accuracy(learner, gone, [2, 3]) > 0.7
