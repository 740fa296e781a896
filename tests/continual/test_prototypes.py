from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from streamcl.continual.prototypes import PRESETS, UNKNOWN
from streamcl.learner import Learner
from streamcl.plugin import Plan, PluginError, Step
from streamcl.records import Selector
from tests.continual.incremental import (
    BOUNDARY,
    CLASSES,
    Case,
    accuracy,
    assert_loss,
    assert_resumes,
    config,
    events,
    net,
    outcome,
    smooth,
    task_loss,
    teach,
)
from tests.continual.test_bias_free_head import among, contrast, hiddens, labels

LIVE_ALONE = {"retention": "none"}


def hidden_of(learner: Learner, event: Any) -> Tensor:
    return net(learner.engine.dense.params, torch.from_numpy(event.features.dense)[None])[1][0].detach()


def test_rows_are_drawn_to_the_centres_of_their_classes() -> None:
    made = config([{"kind": "center_loss", "weight": 0.3}])
    seen: list[Tensor] = []
    learner = teach(Learner(made), events(22, 3)[:-1], 11)
    seen.append(learner.plugins["center_loss"].centres.vectors.clone())  # type: ignore[attr-defined]

    def oracle(case: Case) -> Tensor:
        away = [
            0.5 * ((h - seen[0][y]) ** 2).sum() for h, y in zip(hiddens(case, case.params), labels(case), strict=True)
        ]
        return task_loss(case) + 0.3 * (away[0] + torch.stack(away[1:]).mean())

    assert assert_loss(made, oracle) > 0.0


def test_a_centre_follows_its_rows_as_the_paper_says() -> None:
    learner = Learner(config([{"kind": "center_loss", "alpha": 0.4}], replay=LIVE_ALONE))
    centres: dict[int, Tensor] = {}
    for number, event in enumerate(events(16)):
        h, y = hidden_of(learner, event), int(event.label)
        centres[y] = centres[y] - 0.4 * (centres[y] - h) / 2.0 if y in centres else h  # one row of the class
        teach(learner, [event], None, number)
    found = learner.plugins["center_loss"].centres.vectors  # type: ignore[attr-defined]
    torch.testing.assert_close(found, torch.stack([centres[c] for c in range(CLASSES)]))


def test_frozen_centres_stay_where_they_were_at_the_boundary() -> None:
    learner = teach(Learner(config([{"kind": "center_loss", "freeze": ["boundary"]}])), events(24)[:12])
    plugin = learner.plugins["center_loss"]
    before = plugin.centres.vectors[:2].clone()  # type: ignore[attr-defined]
    teach(learner, events(24)[12:], 12, 12)
    assert torch.equal(plugin.centres.vectors[:2], before)  # type: ignore[attr-defined]
    assert plugin.centres.vectors[2:].any()  # type: ignore[attr-defined]


def prd(case: Case) -> Tensor:
    mine, before, ys = hiddens(case, case.params), hiddens(case, case.previous), labels(case)
    proxies, old = case.params["plugins.prd.weight"], case.previous["plugins.prd.weight"]
    total, relations = contrast(mine, ys, 0.1), torch.zeros(())
    for h, y in zip(mine, ys, strict=True):
        scores = torch.stack([smooth(h.detach()).dot(smooth(p)) / 0.1 for p in proxies])
        total = total + among(scores, y, list(range(CLASSES))) / len(ys)
    for c in (0, 1):
        was = torch.softmax(torch.stack([smooth(old[c]).dot(smooth(h)) / 0.1 for h in before]), 0)
        now = torch.softmax(torch.stack([smooth(proxies[c]).dot(smooth(h)) / 0.1 for h in mine]), 0)
        relations = relations + (was * (was / now).log()).sum() / 2.0
    return total + 0.7 * relations


def test_old_prototypes_keep_how_they_were_related_to_rows() -> None:
    assert assert_loss(config(["previous", {"kind": "prd", "alpha": 0.7}]), prd) > 0.0


def test_the_prototypes_are_the_head() -> None:
    learner = teach(Learner(config(["previous", "prd"])), events(20), 10)
    event = events(1, 8)[0]
    h = hidden_of(learner, event)
    expected = [float(smooth(h).dot(smooth(p))) / 0.1 for p in learner.engine.dense.params["plugins.prd.weight"]]
    assert learner.predict(event.features).output.tolist() == pytest.approx(expected, abs=1e-4)
    off = teach(Learner(config(["previous", {"kind": "prd", "weight": 0.0}])), events(20), 10)
    plain = teach(Learner(config()), events(20), 10)
    assert np.array_equal(off.predict(event.features).output, plain.predict(event.features).output)


def proxies(case: Case) -> Tensor:
    rows = [*case.previous["head.weight"][:2], *case.params["head.weight"][2:]]
    losses = []
    for h, y in zip(hiddens(case, case.params), labels(case), strict=True):
        losses.append(among(torch.stack([smooth(h).dot(smooth(row)) / 0.1 for row in rows]), y, list(range(CLASSES))))
    return task_loss(case) + 0.1 * (losses[0] + torch.stack(losses[1:]).mean())


def test_old_rows_of_the_last_layer_are_what_later_rows_are_told_apart_from() -> None:
    assert assert_loss(config(["previous", "proxy_prototypes"]), proxies) > 0.0


def test_a_plain_mean_is_the_mean_of_the_live_rows_as_they_were_learned() -> None:
    learner = Learner(config(["frozen", {"kind": "ncm", "decay": 1.0, "measure": "euclidean", "temperature": 0.5}]))
    gathered: dict[int, list[Tensor]] = {}
    stream = events(40, 6)
    for number, event in enumerate(stream):
        gathered.setdefault(int(event.label), []).append(hidden_of(learner, event))
        teach(learner, [event], None, number)
    means = torch.stack([torch.stack(gathered[c]).mean(0) for c in range(CLASSES)])
    expected = -((hidden_of(learner, stream[0]) - means) ** 2).sum(1)
    assert learner.predict(stream[0].features).output.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_decayed_mean_weighs_late_rows_more_and_is_unbiased_from_the_first() -> None:
    learner = Learner(config(["frozen", {"kind": "ncm", "decay": 0.5}], replay=LIVE_ALONE))
    rows = [event for event in events(20) if event.label == 0.0][:3]
    h = [hidden_of(learner, row) for row in rows]
    teach(learner, rows)
    expected = (h[0] / 4 + h[1] / 2 + h[2]) / (1 / 4 + 1 / 2 + 1)
    torch.testing.assert_close(learner.plugins["ncm"].centres.vectors[0], expected)  # type: ignore[attr-defined]


def test_a_class_without_a_mean_is_the_least_likely_and_no_mean_at_all_leaves_the_output() -> None:
    learner = Learner(config(["ncm"]))
    assert learner.predict(events(1)[0].features).output.tolist() == [0.0] * CLASSES
    teach(learner, events(20)[:10])
    output = learner.predict(events(1)[0].features).output
    assert output[2] == output[3] == pytest.approx(output[:2].min() - UNKNOWN)


def test_of_two_classes_the_difference_is_served() -> None:
    learner = teach(Learner(config(["ncm"], task="binary")), events(20, 0, "binary"))
    event = events(1, 8)[0]
    h, means = hidden_of(learner, event), learner.plugins["ncm"].centres.vectors  # type: ignore[attr-defined]
    near = [float(smooth(h).dot(smooth(mean))) / 0.1 for mean in means]
    assert learner.predict(event.features).output.tolist() == pytest.approx([near[1] - near[0]], abs=1e-4)


def test_a_frozen_encoder_stays_while_the_head_learns() -> None:
    learner = Learner(config([{"kind": "frozen", "learned": ["head"]}]))
    before = {name: value.detach().clone() for name, value in learner.engine.dense.params.items()}
    teach(learner, events(8))
    for name, value in learner.engine.dense.params.items():
        assert torch.equal(value, before[name]) != name.startswith("head")


def test_passes_that_follow_are_frozen_too_and_move_what_both_name() -> None:
    tuning = {"kind": "k_fpf", "every": 5, "passes": 2, "draw": 3, "modules": ["hidden.1", "head", "table"]}
    learner = Learner(config([tuning, {"kind": "frozen", "learned": ["hidden", "head.bias"]}]))
    take, moved = learner.engine.step, list[set[str]]()

    def watching(step: Step) -> bool:
        before = {name: value.detach().clone() for name, value in learner.engine.dense.params.items()}
        taken = take(step)
        if not step.plan.live:
            params = learner.engine.dense.params.items()
            moved.append({name for name, value in params if not torch.equal(value, before[name])})
            assert step.plan.trainable == ("hidden.1.weight", "hidden.1.bias", "head.bias")
        return taken

    learner.engine.step = watching  # type: ignore[method-assign]
    teach(learner, events(14))
    assert len(moved) == 4
    assert set().union(*moved) <= {"hidden.1.weight", "hidden.1.bias", "head.bias"}
    assert "head.bias" in moved[-1]


@pytest.mark.parametrize(
    ("asked", "learned", "both"),
    [
        (None, ["table", "head"], ("table", "head")),
        (("table", "head"), ["table", "hidden"], ("table",)),
        (("head", "table"), ["head.bias"], ("head.bias",)),
        (("table",), [], ()),
    ],
)
def test_what_is_learned_is_what_every_planner_lets_move(
    asked: tuple[str, ...] | None, learned: list[str], both: tuple[str, ...]
) -> None:
    live = Learner(config([{"kind": "frozen", "learned": learned}]))
    [plugin] = live.planners
    plan = plugin.plan(Plan(3, 2, trainable=asked), outcome(live, events(1)[0], 0), ())
    assert plan == Plan(3, 2, trainable=both)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_resumes_to_the_bit(name: str) -> None:
    assert_resumes(config(PRESETS[name]["plugins"]))


@pytest.mark.parametrize("plugins", [["center_loss"], ["previous", "prd"], ["previous", "proxy_prototypes"], ["ncm"]])
@pytest.mark.parametrize("key", ["k1", "nobody"])
def test_what_is_learned_of_classes_outlives_a_forget_as_weights_do(plugins: list[str], key: str) -> None:
    learner = teach(Learner(config(plugins)), events(24), 12)
    plugin = learner.plugins[plugins[-1]]
    before = plugin.state_dict()
    assert learner.forget(Selector(key=key))[plugins[-1]] == 0
    assert all((value > 0).any() for value in before.values() if value is not before.get("frozen"))
    assert all(torch.equal(value, before[name]) for name, value in plugin.state_dict().items())


@pytest.mark.parametrize("plugin", ["center_loss", "proxy_prototypes"])
def test_a_loss_of_no_weight_is_not_there(plugin: str) -> None:
    off, plain = (
        teach(Learner(config(["previous", *more])), events(16), 8) for more in ([{"kind": plugin, "weight": 0.0}], [])
    )
    assert torch.equal(off.engine.dense.flat, plain.engine.dense.flat)


@pytest.mark.parametrize(
    ("plugins", "more", "reason"),
    [
        (["ncm"], {"task": "regression"}, "ncm: a regression has no classes"),
        (["center_loss"], {"model": {"kind": "logistic"}, "task": "binary"}, "center_loss: a logistic model has no"),
        (["previous", "prd"], {"task": "binary"}, "prd: for a multiclass task, not binary"),
        (["prd"], {}, "prd: no weights 'previous' before it; there are none"),
    ],
)
def test_what_a_method_cannot_do_is_said(plugins: list[Any], more: dict[str, Any], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        Learner(config(plugins, **more))


def test_centres_of_a_binary_task_are_two() -> None:
    learner = Learner(config(["center_loss"], task="binary"))
    for number, event in enumerate(events(12, 0, "binary")):
        assert learner.learn(outcome(learner, event, number), [BOUNDARY])
    assert learner.plugins["center_loss"].centres.vectors.shape == (2, 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "hidden"), [("prd", [6, 5]), ("class_means", [30])])
def test_classes_that_are_gone_are_known_still(name: str, hidden: list[int]) -> None:
    stream, gone = events(120, 2), events(100, 11)
    more: dict[str, Any] = {"model": {"kind": "mlp", "hidden": hidden, "classes": CLASSES}}
    replay = {"retention": "reservoir", "capacity": 20, "per_event": 4}
    without = teach(Learner(config(replay=LIVE_ALONE, **more)), stream, 60)
    learner = teach(Learner(config(PRESETS[name]["plugins"], replay=replay, **more)), stream, 60)
    assert accuracy(learner, gone, [0, 1]) > accuracy(without, gone, [0, 1]) + 0.2
    assert accuracy(learner, gone, [2, 3]) > 0.7
