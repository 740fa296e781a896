import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.continual.replay_distill import PRESETS, OldClasses, beyond, divergence
from streamcl.learner import Learner
from streamcl.plugin import PluginError
from streamcl.records import Selector
from streamcl.state import digest
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
    layers,
    named,
    net,
    smooth,
    task_loss,
    teach,
)

Oracle = Callable[[Case], Tensor]


def average(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def kl(now: Tensor, then: Tensor, t: float) -> Tensor:
    p, q = torch.softmax(then / t, 0), torch.softmax(now / t, 0)
    return t * t * (p * (p / q).log()).sum()


def of_rows(case: Case, apart: Callable[[Tensor], Tensor], rows: str) -> Tensor:
    """Of a row's distance: the live row's, and the replayed ones' mean."""
    found = [apart(x) for x in case.x]
    parts = ([found[0]] if rows != "replay" else []) + ([average(found[1:])] if rows != "live" else [])
    return sum(parts, torch.zeros(()))


def stored_logits(case: Case) -> Tensor:
    pairs = zip(case.x[1:], case.stored["output"], strict=True)
    return average([((net(case.params, x[None])[0][0] - z) ** 2).sum() / CLASSES for x, z in pairs])


def live_loss(case: Case) -> Tensor:
    return -torch.log_softmax(net(case.params, case.x[:1])[0][0], 0)[int(case.y[0])]


def hidden(params: Params, x: Tensor) -> Tensor:
    return net(params, x[None])[1][0]


def bfp(case: Case) -> Tensor:
    a = case.params["plugins.bfp.weight"]
    return of_rows(case, lambda x: ((a @ hidden(case.params, x) - hidden(case.previous, x)) ** 2).mean(), "both")


def pod(case: Case) -> Tensor:
    def apart(x: Tensor) -> Tensor:
        (a1, a2, _), (b1, b2, _) = (layers(params, x[None]) for params in (case.params, case.previous))
        first = [torch.stack([v[0, :4].mean(), v[0, 4:].mean()]) for v in (a1, b1)]  # of six units, four and two
        pairs = [first, [a2[0], b2[0]]]
        return sum((((smooth(a) - smooth(b)) ** 2).sum() for a, b in pairs), torch.zeros(())) / 2

    return of_rows(case, apart, "both")


def margin(case: Case) -> Tensor:
    total = torch.zeros(())
    for x, stored in zip(case.x[1:], case.stored["hidden"], strict=True):
        middle, half = stored.mean(), 0.5 * stored.std(correction=0)
        for h, s in zip(hidden(case.params, x), stored, strict=True):
            if s > middle + half:
                total = total + (middle + half - h).clamp_min(0.0)
            elif s < middle - half:
                total = total + (h - (middle - half)).clamp_min(0.0)
            else:
                total = total + (h - middle - half).clamp_min(0.0) + (middle - half - h).clamp_min(0.0)
    return total / case.stored["hidden"].numel()


LOSSES: list[tuple[list[Any], Oracle]] = [
    (["stored_logits"], lambda c: task_loss(c) + 0.5 * stored_logits(c)),
    (
        [{"kind": "stored_logits", "measure": "kl", "temperature": 3.0}],
        lambda c: (
            task_loss(c)
            + 0.5
            * average(
                [kl(net(c.params, x[None])[0][0], z, 3.0) for x, z in zip(c.x[1:], c.stored["output"], strict=True)]
            )
        ),
    ),
    ([{"kind": "der", "alpha": 0.3}], lambda c: live_loss(c) + 0.3 * stored_logits(c)),
    (
        ["previous", {"kind": "distill", "rows": "live"}],
        lambda c: (
            task_loss(c)
            + of_rows(c, lambda x: ((net(c.params, x[None])[0] - net(c.previous, x[None])[0]) ** 2).mean(), "live")
        ),
    ),
    (
        ["previous", {"kind": "distill", "weight": 2.0, "measure": "kl"}],
        lambda c: (
            task_loss(c)
            + 2.0 * of_rows(c, lambda x: kl(net(c.params, x[None])[0][0], net(c.previous, x[None])[0][0], 2.0), "both")
        ),
    ),
    (
        ["previous", {"kind": "hidden_distill", "rows": "replay"}],
        lambda c: (
            task_loss(c) + of_rows(c, lambda x: ((hidden(c.params, x) - hidden(c.previous, x)) ** 2).mean(), "replay")
        ),
    ),
    (["previous", "bfp"], lambda c: task_loss(c) + bfp(c)),
    (["previous", "pod"], lambda c: task_loss(c) + pod(c)),
    (["margin"], lambda c: task_loss(c) + margin(c)),
]


@pytest.mark.parametrize(("plugins", "oracle"), LOSSES, ids=named)
def test_a_loss_and_its_gradient_are_those_written_out(plugins: list[Any], oracle: Oracle) -> None:
    assert assert_loss(config(plugins), oracle) > 0.0


def test_replayed_rows_count_as_the_draw_has_weighed_them() -> None:
    made = config([{"kind": "stored_logits", "weight": 1.0}])
    learner = teach(Learner(made), events(20))
    memory = learner.memory

    def pick(n: int, step: int) -> tuple[Tensor, Tensor]:
        assert (n, step) == (4, 20)
        return torch.tensor([0, 1]), torch.tensor([1.5, 0.5])

    memory.pick = pick  # type: ignore[method-assign]
    found: list[float] = []
    step_taken = learner.engine.step

    def watching(step: Any) -> bool:
        taken = step_taken(step)
        z = step.out("replay").output - step.columns["output"]
        apart = (z.detach() ** 2).mean(1)
        found.extend([float(learner.engine.terms[0].loss(step)), float(0.75 * apart[0] + 0.25 * apart[1])])
        return taken

    learner.engine.step = watching  # type: ignore[method-assign]
    teach(learner, events(1, 9))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["stored_logits", "der", "margin"])
def test_without_a_replayed_row_the_live_row_is_learned_as_ever(kind: str) -> None:
    made, plain = (config(plugins, replay={"per_event": 0, "retention": "reservoir"}) for plugins in ([kind], []))
    one, two = (teach(Learner(each), events(10)) for each in (made, plain))
    assert torch.equal(one.engine.dense.flat, two.engine.dense.flat)


@pytest.mark.parametrize("plugin", ["distill", "hidden_distill", "pod", "bfp"])
def test_nobody_is_taught_before_the_first_boundary(plugin: str) -> None:
    taught = teach(Learner(config(["previous", plugin])), events(12))
    plain = teach(Learner(config()), events(12))
    for name, value in plain.engine.dense.params.items():
        assert torch.equal(value, taught.engine.dense.params[name])


def test_the_map_begins_anew_as_the_identity_at_a_boundary() -> None:
    learner = teach(Learner(config(["previous", "bfp"])), events(20), 8)
    found = learner.engine.dense.params["plugins.bfp.weight"]
    assert not torch.equal(found, torch.eye(5))
    learner.plugins["bfp"].on_signal(BOUNDARY)
    assert torch.equal(learner.engine.dense.params["plugins.bfp.weight"], torch.eye(5))


def test_pod_leaves_no_graph_behind_and_hears_no_prediction() -> None:
    learner = teach(Learner(config(["previous", "pod"])), events(20), 8)
    learner.predict(events(1)[0].features)
    assert learner.plugins["pod"].entered == [None, None]  # type: ignore[attr-defined]


def test_the_divergence_of_two_classes_is_that_of_one_logit() -> None:
    now, then, t = 0.3, -1.2, 2.0
    p, q = (1.0 / (1.0 + math.exp(-z / t)) for z in (then, now))
    expected = t * t * (p * math.log(p / q) + (1.0 - p) * math.log((1.0 - p) / (1.0 - q)))
    found = divergence("binary", torch.tensor([[now]]), torch.tensor([[then]]), t)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(divergence("regression", torch.tensor([[now]]), torch.tensor([[then]]), t)) == pytest.approx(1.125)


def test_a_hidden_vector_that_stays_where_it_was_costs_nothing() -> None:
    stored = torch.rand(3, 8)
    assert float(beyond(stored, stored, 0.5).abs().max()) == 0.0


def grouped(case: Case, replay: bool) -> Tensor:
    """Classes 0 and 1 are old; the live row is of a new class."""
    z, z_before = net(case.params, case.x[:1])[0][0], net(case.previous, case.x[:1])[0][0]
    total = (
        -torch.log_softmax(z[2:], 0)[int(case.y[0]) - 2]
        + ((z - z_before)[:2] ** 2 / VARIANCE[:2].clamp_min(2.0)).mean()
    )
    for x, y, share in zip(case.x[1:], case.y[1:], case.share[1:], strict=True) if replay else ():
        total = total - share * torch.log_softmax(net(case.params, x[None])[0][0], 0)[int(y)]
    return total


VARIANCE = torch.tensor([0.5, 4.0, 1.0, 1.0])  # the first is below the floor of 2


@pytest.mark.parametrize("replay", [False, True])
def test_old_classes_regress_and_new_ones_compete_among_themselves(
    replay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = OldClasses.after

    def known_variance(self: OldClasses, step: Any) -> None:
        after(self, step)
        self.moments = torch.stack((torch.zeros(CLASSES), VARIANCE))

    monkeypatch.setattr(OldClasses, "after", known_variance)
    optimizer = {"kind": "sgd", "learning_rate": 0.02}
    made = config(["previous", {"kind": "old_classes", "floor": 2.0}], optimizer=optimizer)
    assert_loss(made, lambda c: grouped(c, replay), count=30, replayed=4 if replay else 0, boundary=15)


def test_the_variance_of_an_old_logit_is_a_decayed_one() -> None:
    optimizer = {"kind": "sgd", "learning_rate": 0.01}
    none = {"retention": "none"}
    made = config(["previous", {"kind": "old_classes", "decay": 0.5}], replay=none, optimizer=optimizer)
    learner, stream = Learner(made), events(24)
    teach(learner, stream[:12])
    teach(learner, stream[12:13], 12, 12)
    params = learner.engine.sets["previous"].params()
    middle, square = torch.zeros(CLASSES), torch.ones(CLASSES)  # about the running middle
    for number, event in enumerate(stream[12:]):
        z = net(params, torch.from_numpy(event.features.dense)[None])[0][0]
        square = 0.5 * (square + 0.5 * (z - middle) ** 2)
        middle = 0.5 * middle + 0.5 * z
        if number:
            teach(learner, [event], None, 12 + number)
    found = learner.plugins["old_classes"].moments  # type: ignore[attr-defined]
    torch.testing.assert_close(found, torch.stack((middle, square)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_resumes_to_the_bit(name: str) -> None:
    assert_resumes(preset(name))


def preset(name: str) -> Config:
    return config(list(PRESETS[name]["plugins"]))


def test_presets_are_found_by_their_names() -> None:
    for name in PRESETS:
        base = {
            "name": "t",
            "task": "multiclass",
            "events": {"url": "memory://a/b", "label": "y"},
            "features": {"x": "numeric"},
        }
        assert Config.parse({**base, "preset": name}).plugins


@pytest.mark.parametrize("plugins", [["stored_logits"], ["previous", "bfp"], ["der"], ["previous", "old_classes"]])
def test_a_loss_of_no_weight_is_not_there(plugins: list[Any]) -> None:
    off = [*plugins[:-1], {"kind": plugins[-1], "weight": 0.0}]
    one, two = (teach(Learner(config(each)), events(20), 10) for each in (off, plugins[:-1]))
    assert digest(one.engine.state_dict()) == digest(two.engine.state_dict())


def test_old_classes_and_their_variances_outlive_a_forget() -> None:
    learner = teach(Learner(config(["previous", "old_classes"])), events(24), 12)
    plugin = learner.plugins["old_classes"]
    before = plugin.state_dict()
    assert before["old"].any()
    assert learner.forget(Selector(key="k1"))["old_classes"] == 0
    assert all(torch.equal(value, before[name]) for name, value in plugin.state_dict().items())


@pytest.mark.parametrize(
    ("plugins", "more", "reason"),
    [
        (["distill"], {}, "distill: no weights 'previous' before it; there are none"),
        (["distill", "previous"], {}, "distill: no weights 'previous' before it"),
        (["margin"], {"model": {"kind": "logistic", "classes": 4}}, "margin: a logistic model has no hidden vector"),
        (["previous", "pod"], {"model": {"kind": "mlp", "hidden": []}}, "pod: a mlp model has no hidden layers"),
        (["previous", "old_classes"], {"task": "binary"}, "old_classes: for a multiclass task, not binary"),
    ],
)
def test_what_a_method_cannot_do_is_said(plugins: list[Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        Learner(config(plugins, **more))


@pytest.mark.parametrize("name", ["ser", "er_ema"])
def test_classes_that_are_gone_are_known_still(name: str) -> None:
    stream, gone = events(120, 2), events(100, 11)
    replay = {"retention": "reservoir", "capacity": 20, "per_event": 4, "weight": 0.5}
    without = teach(Learner(config(replay={"retention": "none"})), stream, 60)
    learner = teach(Learner(config(PRESETS[name]["plugins"], replay=replay)), stream, 60)
    assert accuracy(learner, gone, [0, 1]) > accuracy(without, gone, [0, 1]) + 0.2
    assert accuracy(learner, gone, [2, 3]) > 0.7
