from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from streamcl.continual.weighted_draws import ByDistance, Learnt, Weighted, margins
from streamcl.learner import Learner
from streamcl.plugin import Plan, PluginError, Step
from streamcl.state import digest
from tests.continual.rows import BOUNDARY, bound, chi_square, config, held, made, resumes
from tests.test_learner import learned, stream

LOSS = np.linspace(0.0, 3.0, 20)


def drawn(plugin: Any, learner: Learner, count: int = 8, times: int = 500) -> np.ndarray:
    picks = [plugin.pick(count, number, learner.memory)[0].numpy() for number in range(times)]
    return np.bincount(np.concatenate(picks), minlength=len(learner.memory))


@pytest.mark.parametrize(
    ("plugins", "columns", "priority"),
    [
        ([{"kind": "by_loss", "power": 0.5, "floor": 0.1}], {"loss": LOSS}, (LOSS + 0.1) ** 0.5),
        (["flips", {"kind": "by_flips"}], {"flips": np.arange(20) % 4}, 1.0 + np.arange(20) % 4),
        (
            ["flips", {"kind": "by_value", "mix": 0.25}],
            {"loss": LOSS, "hits": 4, "passes": np.arange(20) % 5},
            0.25 * np.exp(-LOSS) + 0.75 * (np.arange(20) % 5 + np.exp(-LOSS)) / 5.0,
        ),
    ],
)
def test_rows_are_drawn_by_their_priorities_and_a_uniform_share(plugins: Any, columns: Any, priority: Any) -> None:
    plugin, learner = held(plugins, **columns)
    expected = 0.9 * priority / priority.sum() + 0.1 / 20
    assert isinstance(plugin, Weighted)
    np.testing.assert_allclose(plugin.chances(learner.memory), expected, rtol=1e-5)
    assert chi_square(drawn(plugin, learner), expected) < bound(20)


def test_importance_weights_undo_the_priorities_in_the_mean() -> None:
    plugin, learner = held([{"kind": "by_loss", "correction": 1.0}], loss=LOSS)
    values, found = np.arange(20.0), []
    for number in range(2000):
        index, weight = plugin.pick(50, number, learner.memory)  # type: ignore[attr-defined]
        assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)
        found.append(float((weight.double().numpy() * values[index.numpy()]).mean()))
    # self-normalised: a bias of O(1 / 50) of the values' deviation of 5.8, beside the error of 2,000 means
    assert np.mean(found) == pytest.approx(values.mean(), abs=0.2 + 5 * np.std(found) / np.sqrt(2000))


def test_a_row_of_tiny_chance_weighs_no_more_than_it_may() -> None:
    settings = {"kind": "by_loss", "correction": 1.0, "uniform": 0.001, "max_weight": 2.0, "power": 4.0}
    plugin, learner = held([settings], loss=LOSS)
    for number in range(50):
        _, weight = plugin.pick(8, number, learner.memory)  # type: ignore[attr-defined]
        assert float(weight.max() / weight.min()) <= 2.0 / (20.0 * plugin.chances(learner.memory).max()) ** -1 + 1e-4  # type: ignore[attr-defined]


def test_rows_that_were_replayed_too_often_are_left_alone_until_all_are() -> None:
    plugin, learner = held([{"kind": "by_loss", "max_hits": 3}], loss=1.0, hits=np.where(np.arange(20) < 15, 3, 0))
    assert drawn(plugin, learner, times=50)[:15].sum() == 0
    learner.memory.columns["hits"][:] = 3
    assert (drawn(plugin, learner) > 0).all()


def test_a_uniform_share_of_one_is_the_memory_s_own_draw() -> None:
    outcomes = stream("multiclass", 40)
    plain = learned(made([]), outcomes)
    other = learned(made([{"kind": "by_loss", "uniform": 1.0}]), outcomes)
    assert digest(plain.engine.state_dict()) == digest(other.engine.state_dict())


def test_segments_are_drawn_by_their_distance_from_the_present_one() -> None:
    plugin, learner = held(
        ["by_distance"], written=np.where(np.arange(20) < 12, 5, np.where(np.arange(20) < 16, 15, 25))
    )
    assert isinstance(plugin, ByDistance)
    plugin.strata.bounds, width = [10, 20], plugin.sums.shape[1]
    plugin.events[:3] = 10.0
    means = np.zeros((3, width))
    means[0, 0], means[1, 0] = 3.0, 1.0  # 3 and 1 away from the present one, at equal deviations
    plugin.sums[:3], plugin.squares[:3] = 10.0 * means, 10.0 * (means**2 + 1.0)
    expected = np.where(np.arange(20) < 12, 0.75 / 12, np.where(np.arange(20) < 16, 0.25 / 4, 0.0))
    np.testing.assert_allclose(plugin.chances(learner.memory), 0.9 * expected + 0.1 / 20, rtol=1e-9)


def test_rows_of_rare_ids_weigh_more_inside_a_segment() -> None:
    plugin, learner = held([{"kind": "by_distance", "rarity": 1.0}])
    assert isinstance(plugin, ByDistance)
    rare = plugin._rarity(learner.memory)
    there = learner.memory.weights[:20] != 0
    total = plugin.ids.sum()
    for row in range(20):
        ids = learner.memory.ids[row][there[row]]
        expected = np.mean([np.log((total + 1.0) / (plugin.ids[each % 4096] + 1.0)) for each in ids])
        assert rare[row] == pytest.approx(expected)


def test_a_diverse_draw_takes_no_row_twice_and_lies_further_apart_than_a_uniform_one() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(20, 6)) * (1.0 + 4.0 * (np.arange(20)[:, None] % 5 == 0))
    plugin, learner = held(["diverse"], hidden=hidden, output=rng.normal(size=(20, 3)))

    def spread(index: torch.Tensor) -> float:
        points = hidden[index.numpy()]
        away = np.linalg.norm(points[:, None] - points[None], axis=2)
        return float((away + 1e9 * np.eye(len(points))).min())

    ours = [plugin.pick(4, number, learner.memory)[0] for number in range(50)]  # type: ignore[attr-defined]
    assert all(len(set(index.tolist())) == 4 for index in ours)
    assert np.mean([spread(index) for index in ours]) > 1.5 * np.mean(
        [spread(torch.from_numpy(rng.choice(20, 4, replace=False))) for _ in range(50)]
    )


def test_margins_are_best_less_second_best() -> None:
    assert margins(np.array([[0.0], [np.log(3.0)]], np.float32)) == pytest.approx([0.0, 0.5])
    assert margins(np.log(np.array([[0.5, 0.3, 0.2]], np.float32))) == pytest.approx([0.2])


def test_the_share_that_is_asked_for_settles_at_the_budget() -> None:
    learner = Learner(made([{"kind": "ask", "budget": 0.3, "skip": True}]))
    rng = np.random.default_rng(0)
    for item in stream("multiclass", 400):
        output = rng.normal(size=3).astype(np.float32)
        scores = replace(item.ticket.scores, output=output)
        assert learner.learn(replace(item, ticket=replace(item.ticket, scores=scores)))
    assert learner.read()["ask_share"] == pytest.approx(
        0.3, abs=0.05
    )  # the bar moves by at most 1 / (rate x 400) = .05
    assert learner.steps == round(400 * learner.read()["ask_share"])


def test_gains_are_products_of_last_layer_gradients() -> None:
    learner = learned(made([{"kind": "learnt", "toward": 0.3}]), stream("multiclass", 25))
    [plugin] = learner.plugins.values()
    assert isinstance(plugin, Learnt)
    step = learner.step_of(stream("multiclass", 1, seed=5)[0], _plan(), 4)
    assert step is not None
    step.engine = learner.engine
    head = list(learner.engine.model.tower.head.parameters())  # type: ignore[union-attr]
    flat = []
    for row in range(5):
        held = {name: value for name, value in step.rows._asdict().items() if value is not None}
        read = step.rows._replace(**{name: value[row : row + 1] for name, value in held.items()})
        output = learner.engine.forward(learner.engine.table[read.ids], read.weights, read.dense)
        grads = torch.autograd.grad(learner.engine.losses(output, read.y)[0], head)
        flat.append(torch.cat([grad.reshape(-1) for grad in grads]).double())
    g = torch.stack(flat)
    expected = [
        float(0.3 * g[i] @ g[0] + 0.7 * sum(g[i] @ g[j] for j in range(1, 5) if j != i) / 3) for i in range(1, 5)
    ]
    np.testing.assert_allclose(plugin.gains(step), expected, rtol=1e-4, atol=1e-7)


def _plan() -> Plan:
    return Plan(draw=4)


def test_learnt_weights_have_mean_one_and_follow_what_helps() -> None:
    plugin, learner = held([{"kind": "learnt", "rate": 0.5}])
    assert isinstance(plugin, Learnt)
    _, weight = plugin.pick(6, 3, learner.memory)
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-6)
    plugin.phi[:] = 0.0
    features = np.array([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    rows = learner._rows(*learner.memory.examples(torch.tensor([0, 1])))
    step = Step(0, _plan(), None, rows, torch.ones(2))
    plugin.features = lambda *_: features  # type: ignore[method-assign]
    plugin.gains = lambda step: np.array([1.0, -1.0])  # type: ignore[method-assign]  # noqa: ARG005
    plugin.before(step)
    assert plugin.shares(features)[0] > 0.5


@pytest.mark.parametrize(
    "plugins",
    [
        [{"kind": "by_loss", "correction": 0.5}],
        ["flips", {"kind": "by_value", "hard": True}],
        [{"kind": "by_distance", "rarity": 0.5, "segments": 3}],
        [{"kind": "ask", "skip": True}, "diverse"],
        ["learnt"],
    ],
)
def test_draws_are_resumed_to_the_bit(plugins: list[object]) -> None:
    assert resumes(plugins)


@pytest.mark.parametrize("kind", ["diverse", "ask"])
def test_a_regression_has_no_margins(kind: str) -> None:
    with pytest.raises(PluginError, match=kind):
        Learner(config("regression", plugins=[kind]))


@pytest.mark.parametrize("kind", ["by_flips", "by_value"])
def test_who_needs_flips_says_so(kind: str) -> None:
    with pytest.raises(PluginError, match=f"{kind}: needs the column flips"):
        Learner(made([kind]))


def test_boundaries_begin_segments() -> None:
    learner = Learner(made(["by_distance"]))
    for number, item in enumerate(stream("multiclass", 30)):
        learner.learn(item, [BOUNDARY] if number == 20 else [])
    [plugin] = learner.plugins.values()
    assert isinstance(plugin, ByDistance)
    assert plugin.events[:2].tolist() == [20.0, 10.0]
