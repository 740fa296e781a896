import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from streamcl.config import Config, ConfigError
from streamcl.learner import Learner
from streamcl.plasticity import ContinualBackprop, Diagnostics, Taps, find
from streamcl.plasticity.diagnostics import ranks
from streamcl.plasticity.layers import Tap
from streamcl.readings import LAYERS, PARTS, PERCENTILES
from streamcl.state import digest, flatten, unflatten
from tests.plasticity.nets import Net, convolutional, example, mlp
from tests.test_learner import config, learned, stream

RANKS = ("effective_rank", "approximate_rank", "stable_rank", "absolute_rank")


class Watched:
    """A net that is looked at while it learns, and what it has said, step by step."""

    def __init__(self, module: nn.Module, **settings: int) -> None:
        self.net = Net(module)
        self.diagnostics = Diagnostics(self.net.dense, Taps(module, find(module)), **settings)
        self.said: list[list[Tensor]] = []  # (n, S) of each layer, of the live example
        self.norms: list[float] = []

    def learn(self, steps: int, rows: int = 1, start: int = 0) -> None:
        for i in range(start, start + steps):
            x, y = example(self.net.module, i, rows)
            self.step(x, y)

    def step(self, x: Tensor, y: Tensor, norm: float | None = None) -> None:
        self.net.step(x, y)
        self.said.append([value[0].clone() for value in self.net.taps])
        self.norms.append(norm if norm is not None else float(len(self.norms)))
        self.diagnostics.observe(torch.tensor(self.norms[-1]))

    def read(self) -> dict[str, float]:
        return self.diagnostics.read()

    def layer(self, name: str) -> list[float]:
        found = self.read()
        return [found[f"layer_{i}_{name}"] for i in range(len(self.diagnostics.taps.layers))]


def slow_ranks(matrix: NDArray[np.float64]) -> tuple[float, ...]:
    """As the definitions read."""
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    entropy = -sum(each * math.log(each) for each in p if each > 0)
    squares = s**2 / (s**2).sum()
    approximate = next(k for k in range(1, len(s) + 1) if squares[:k].sum() >= 0.99)
    absolute = next(k for k in range(1, len(s) + 1) if p[:k].sum() >= 0.99)
    stable = float(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    return math.exp(entropy), approximate, stable, absolute


def with_spectrum(rows: int, spectrum: list[float], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(spectrum))))
    right, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return torch.from_numpy(left @ np.diag(spectrum) @ right)


def rank_figures(matrix: Tensor) -> list[float]:
    found = ranks(matrix)
    return [found[name] for name in RANKS]


@pytest.mark.parametrize(
    ("spectrum", "wanted"),
    [
        ([1.0], (1.0, 1, 1.0, 1)),
        ([2.0, 2.0, 2.0, 2.0], (4.0, 4, 4.0, 4)),
        ([3.0, 3.0, 0.0, 0.0], (2.0, 2, 2.0, 2)),
        # Squares 10000 and 9 x 1: .9991 of their sum is the first. Of the sum 109 the first nine are .9908.
        (
            [100.0, *[1.0] * 9],
            (math.exp(-(100 / 109 * math.log(100 / 109) + 9 / 109 * math.log(1 / 109))), 1, 1.0009, 9),
        ),
        # Halves: exp(1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8) = 2^1.75.
        ([4.0, 2.0, 1.0, 1.0], (2**1.75, 4, 22 / 16, 4)),
    ],
)
def test_ranks_of_known_spectra(spectrum: list[float], wanted: tuple[float, ...]) -> None:
    assert rank_figures(with_spectrum(30, spectrum)) == pytest.approx(wanted, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(2, 30),
    columns=st.integers(1, 30),
    rank=st.integers(1, 30),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e18]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ranks_are_what_numpy_s_singular_values_say(
    rows: int, columns: int, rank: int, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) * scale
    assert rank_figures(torch.from_numpy(matrix)) == pytest.approx(slow_ranks(matrix), rel=1e-6)


def test_where_nothing_fires_all_ranks_are_0() -> None:
    assert rank_figures(torch.zeros(5, 3)) == [0.0] * 4


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_has_no_rank(value: float) -> None:
    matrix = torch.ones(5, 3)
    matrix[2, 1] = value
    assert ranks(matrix) == {}


def test_every_figure_is_what_a_slow_look_at_the_window_says() -> None:
    watched = Watched(mlp(4, 7, 5, 1), sample_every=3, window=10, report_every=40)
    watched.learn(120)
    sampled = watched.said[2::3][-10:]  # steps 3, 6, ..., 120
    rates = [np.mean([(layer[:, 0] > 0).numpy() for layer in column], axis=0) for column in zip(*sampled, strict=True)]
    assert watched.layer("dormant_ratio") == [float(np.mean(rate < 0.01)) for rate in rates]
    assert watched.layer("dead_ratio") == [float(np.mean(rate == 0.0)) for rate in rates]
    assert watched.read()["gradient_norm"] == np.mean(watched.norms[2::3][-10:])
    last = np.stack([said[1][:, 0].numpy() for said in sampled])
    told = watched.read()
    assert [told[f"layer_1_{name}"] for name in RANKS] == pytest.approx(slow_ranks(last), rel=1e-9)
    assert not any(f"layer_0_{name}" in told for name in RANKS)
    weights = [watched.net.weight(name).abs().mean().item() for name in ("0", "2")]
    assert watched.layer("weight_magnitude") == pytest.approx(weights)
    assert told["dense_weight_magnitude"] == pytest.approx(watched.net.dense.flat.abs().mean().item())
    assert told["diagnostics_examples"] == 10


def test_a_dead_unit_and_a_unit_exactly_at_the_threshold() -> None:
    # Unit 0 never fires; unit 1 fires on 1 of 200 examples, unit 2 on 2 of 200, which is .01 and not below it.
    watched = Watched(mlp(3, 4, 1), sample_every=1, window=200, report_every=1000)
    net = watched.net
    with torch.no_grad():
        net.dense.flat.zero_()
        net.weight("0")[:3] = torch.eye(3)
        net.bias("0")[3] = 1.0
    for i in range(200):
        x = torch.tensor([[0.0, float(i == 7), float(i in (7, 100))]], dtype=torch.float64)
        watched.step(x, net.module(x).detach())
        if i == 198:
            assert watched.read() == {"diagnostics_examples": 199.0}  # nothing is said of a part of a window
    assert (watched.layer("dormant_ratio"), watched.layer("dead_ratio")) == ([0.5], [0.25])
    for _ in range(8):  # example 7 leaves the window
        x = torch.zeros(1, 3, dtype=torch.float64)
        watched.step(x, net.module(x).detach())
    assert (watched.layer("dormant_ratio"), watched.layer("dead_ratio")) == ([0.75], [0.5])


@pytest.mark.parametrize(("activation", "dead"), [(nn.ReLU, 1.0), (nn.Tanh, 0.0), (nn.ELU, 0.0)])
def test_a_unit_fires_when_its_value_is_not_0(activation: type[nn.Module], dead: float) -> None:
    watched = Watched(mlp(2, 3, 1, activation=activation), sample_every=1, window=4, report_every=100)
    with torch.no_grad():
        watched.net.weight("0").fill_(0.0)
        watched.net.bias("0").fill_(-1.0)
        watched.net.weight("2").fill_(0.0)
    for _ in range(4):
        x = torch.ones(1, 2, dtype=torch.float64)
        watched.step(x, watched.net.module(x).detach())
    assert watched.layer("dead_ratio") == [dead]


def test_a_channel_fires_on_a_share_of_its_positions() -> None:
    watched = Watched(convolutional(), sample_every=2, window=6, report_every=10)
    watched.learn(20)
    sampled = watched.said[1::2][-6:]
    rates = [np.mean([(layer != 0).double().mean(1).numpy() for layer in c], 0) for c in zip(*sampled, strict=True)]
    assert watched.layer("dormant_ratio") == [float(np.mean(rate < 0.01)) for rate in rates]
    last = np.stack([said[2].mean(1).numpy() for said in sampled])
    told = watched.read()
    assert [told[f"layer_2_{name}"] for name in RANKS] == pytest.approx(slow_ranks(last), rel=1e-9)
    with torch.no_grad():  # a channel of which one position in 64 fires is not dormant, one of none is dead
        watched.diagnostics.ring[:, 0] = 1 / 64
        watched.diagnostics.ring[:, 1] = 1 / 128
        watched.diagnostics.ring[:, 2] = 0.0
    assert watched.layer("dormant_ratio")[0] == pytest.approx(2 / 3)
    assert watched.layer("dead_ratio")[0] == pytest.approx(1 / 3)


def test_maps_in_the_last_hidden_layer_enter_as_their_means() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 1)).double()
    watched = Watched(module, sample_every=1, window=5, report_every=5)
    watched.learn(5)
    last = np.stack([said[0].mean(1).numpy() for said in watched.said])
    told = watched.read()
    assert [told[f"layer_0_{name}"] for name in RANKS] == pytest.approx(slow_ranks(last), rel=1e-9)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_it_looks_at_the_steps_whose_number_divides_and_listens_to_no_other(every: int) -> None:
    watched = Watched(mlp(3, 4, 1), sample_every=every, window=8, report_every=100)
    mine = Watched(watched.net.module, sample_every=every, window=8, report_every=100).diagnostics
    heard = []
    for i in range(20):
        heard.append(watched.diagnostics.taps.listening)
        watched.learn(1, start=i)
        assert watched.diagnostics.sampled == (i + 1) // every
    assert heard == [(i + 1) % every == 0 for i in range(20)]
    assert mine.taps.taps == watched.diagnostics.taps.taps  # one ear for all who listen
    assert watched.net.taps.listening


def test_a_tap_hears_nothing_when_nobody_listens() -> None:
    net = mlp(3, 4, 1)
    one, two = Taps(net, find(net)), Taps(net, find(net))
    for first, second, heard in ((False, True, True), (False, False, False), (True, False, True), (True, True, True)):
        one.listen(first)
        two.listen(second)
        one.taps[0].value = None
        net(torch.ones(1, 3, dtype=torch.float64))
        assert (one.taps[0].value is not None) == heard
        assert ("forward" in vars(net[2])) == heard  # type: ignore[index]


def test_the_live_example_is_looked_at_and_no_other_row() -> None:
    watched = Watched(mlp(3, 4, 1), sample_every=1, window=3, report_every=100)
    watched.learn(3, rows=5)
    assert torch.equal(watched.diagnostics.ring[:, :4], torch.stack([said[0][:, 0] for said in watched.said]))


def test_ranks_come_with_the_report_and_only_of_a_full_window() -> None:
    watched = Watched(mlp(3, 4, 1), sample_every=2, window=4, report_every=6)
    watched.learn(6)
    assert watched.read().keys() == {"diagnostics_examples", "layer_0_weight_magnitude", "dense_weight_magnitude"}
    watched.learn(5, start=6)
    assert "layer_0_dead_ratio" in watched.read()
    assert "layer_0_effective_rank" not in watched.read()
    watched.learn(1, start=11)
    told = watched.read()
    assert "layer_0_effective_rank" in told
    watched.learn(5, start=12)
    assert watched.read()["layer_0_effective_rank"] == told["layer_0_effective_rank"]
    watched.learn(1, start=17)
    assert watched.read()["layer_0_effective_rank"] != told["layer_0_effective_rank"]


def test_asking_changes_nothing() -> None:
    watched = Watched(mlp(3, 6, 4, 1), sample_every=2, window=4, report_every=6)
    watched.net.continual_backprop(rate=0.1, maturity=2)
    watched.learn(20)
    parts = (watched.diagnostics, watched.net.rules[0], watched.net.dense)
    before = [digest(part.state_dict()) for part in parts]
    assert watched.read() == watched.read()
    assert watched.net.rules[0].read() == watched.net.rules[0].read()
    assert [digest(part.state_dict()) for part in parts] == before


def test_memory_does_not_grow() -> None:
    watched = Watched(mlp(3, 4, 1), sample_every=1, window=4, report_every=3)
    watched.learn(4)
    place = watched.diagnostics.ring.data_ptr()
    watched.learn(4, start=4)
    held, told = watched.diagnostics.state_dict(), watched.read()
    watched.learn(32, start=8)
    later = watched.diagnostics.state_dict()
    assert watched.diagnostics.ring.data_ptr() == place
    assert watched.read().keys() == told.keys()
    assert (later.keys(), later["ring"].shape) == (held.keys(), held["ring"].shape)


def looked_at(**more: Any) -> Config:
    settings = {"sample_every_steps": 3, "window": 8, "report_every_steps": 10, **more.pop("diagnostics", {})}
    return config(diagnostics=settings, model={"hidden": [6, 5]}, replay={"per_event": 2}, **more)


def undiagnosed(learner: Learner) -> str:
    return digest({name: part for name, part in learner.state_dict().items() if name != "diagnostics"})


@pytest.mark.parametrize("cut", [1, 23, 24, 29, 30, 55])
def test_a_learner_goes_on_from_a_snapshot_bit_for_bit(cut: int) -> None:
    outcomes = stream("binary", 70)
    whole, part, other = learned(looked_at(), outcomes), learned(looked_at(), outcomes[:cut]), Learner(looked_at())
    for item in outcomes[60:]:
        other.learn(item)
    other.load_state_dict(unflatten(*flatten(copy.deepcopy(part.state_dict()))))
    assert other.read() == part.read()
    for item in outcomes[cut:]:
        other.learn(item)
    assert digest(other.state_dict()) == digest(whole.state_dict())
    assert other.read() == whole.read()
    assert "layer_1_effective_rank" in whole.read()


@pytest.mark.parametrize("plasticity", [[], [{"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10}]])
def test_what_is_learned_is_the_same_bit_for_bit_without_it(plasticity: list[Any]) -> None:
    outcomes = stream("binary", 80)
    on = learned(looked_at(plasticity=plasticity), outcomes)
    off = learned(looked_at(plasticity=plasticity, diagnostics={"sample_every_steps": 0}), outcomes)
    assert undiagnosed(on) == digest(off.state_dict())
    assert (on.diagnostics is None, off.diagnostics is None) == (False, True)


def test_off_nothing_is_listened_to_or_said() -> None:
    off = learned(config(diagnostics={"sample_every_steps": 0}), stream("binary", 20))
    assert "diagnostics" not in off.state_dict()
    assert off.read() == {"replay_rows": 20.0, "replay_age_s": 9.5, "replay_fill": 0.001, "weights_version": 20.0}
    assert not any(Tap in map(type, vars(module).values()) for module in off.engine.model.modules())


def test_a_model_without_hidden_layers_has_none() -> None:
    learner = learned(config(model={"kind": "logistic"}), stream("binary", 5))
    assert learner.diagnostics is None
    assert "diagnostics" not in learner.state_dict()


def test_it_is_on_unless_switched_off() -> None:
    made = config()
    settings = made.diagnostics
    assert (settings.sample_every_steps, settings.window, settings.report_every_steps) == (16, 512, 10_000)
    learner = learned(made, stream("binary", 40))
    assert learner.read()["diagnostics_examples"] == 2.0


def test_a_snapshot_from_before_begins_here() -> None:
    outcomes = stream("binary", 50)
    old = learned(looked_at(diagnostics={"sample_every_steps": 0}), outcomes).state_dict()
    learner = learned(looked_at(), outcomes[:37])
    learner.load_state_dict(old)
    assert undiagnosed(learner) == digest(old)
    assert learner.diagnostics is not None
    assert digest(learner.diagnostics.state_dict()) == digest(Learner(looked_at()).state_dict()["diagnostics"])
    assert learner.learn(stream("binary", 51)[-1])


def test_a_snapshot_with_it_loads_where_it_is_off_and_with_another_window() -> None:
    outcomes = stream("binary", 50)
    state = learned(looked_at(), outcomes).state_dict()
    off = Learner(looked_at(diagnostics={"sample_every_steps": 0}))
    off.load_state_dict(state)
    assert "diagnostics" not in off.state_dict()
    other = Learner(looked_at(diagnostics={"window": 9}))
    other.load_state_dict(state)
    assert other.read()["diagnostics_examples"] == 0.0
    assert undiagnosed(other) == digest(off.state_dict())


def test_a_refused_example_is_not_looked_at() -> None:
    learner = Learner(looked_at(diagnostics={"sample_every_steps": 1}, optimizer={"max_grad_norm": 1e-9}))
    assert not learner.learn(stream("binary", 1)[0])
    assert learner.diagnostics is not None
    assert (learner.diagnostics.steps, learner.diagnostics.sampled) == (0, 0)


def test_the_gradient_norm_is_that_of_the_dense_parameters() -> None:
    learner = Learner(looked_at(diagnostics={"sample_every_steps": 1}, optimizer={"kind": "sgd", "learning_rate": 1.0}))
    assert learner.diagnostics is not None
    before = learner.engine.dense.flat.clone()
    assert learner.learn(stream("binary", 1)[0])
    moved = torch.linalg.vector_norm(learner.engine.dense.flat - before)
    assert float(learner.diagnostics.ring[0, -1]) == pytest.approx(float(moved), rel=1e-5)


def test_a_replica_s_learner_neither_looks_nor_speaks() -> None:
    made = looked_at(plasticity=["continual_backprop"])
    state = learned(made, stream("binary", 50)).state_dict()
    learner = Learner(made, serving=True)
    learner.load_state_dict(state)
    assert learner.diagnostics is None
    assert learner.read() == {"replay_rows": 50.0, "replay_age_s": 24.5, "replay_fill": 0.0025, "weights_version": 50.0}


def test_replacements_ages_and_utilities_are_told_by_layer() -> None:
    rule = {"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10}
    learner = learned(looked_at(plasticity=[rule]), stream("binary", 100))
    told = learner.read()
    built = learner.engine.rules["continual_backprop"]
    assert isinstance(built, ContinualBackprop)
    assert [told["layer_0_replacements"], told["layer_1_replacements"]] == built.replaced
    ages = sorted((built.step - built.born[:6]).tolist())
    names = [f"layer_0_unit_age_steps_p{p}" for p in (10, 50, 90)]
    assert [told[name] for name in names] == [ages[0], ages[2], ages[4]]
    utilities = sorted(built._utility(1).tolist())
    names = [f"layer_1_unit_utility_p{p}" for p in (10, 50, 90)]
    assert [told[name] for name in names] == [utilities[0], utilities[2], utilities[3]]


def test_replacements_by_two_rules_add_up() -> None:
    rule = {"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10}
    learner = learned(looked_at(plasticity=[rule]), stream("binary", 100))
    once = learner.read()["layer_0_replacements"]
    assert once > 0
    learner.rules = {"one": learner.rules["continual_backprop"], "two": learner.rules["continual_backprop"]}
    assert learner.read()["layer_0_replacements"] == 2 * once


def test_every_reading_has_a_text_for_people() -> None:
    rule = {"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10}
    told = learned(looked_at(plasticity=[rule]), stream("binary", 100)).read()
    names = {key.split("_", 2)[2] if key.startswith("layer_") else key for key in told}
    known = {*PARTS, *LAYERS, *(f"{name}_p{p}" for name in PERCENTILES for p in (10, 50, 90))}
    assert names <= known
    assert LAYERS.keys() <= names
    assert all(math.isfinite(value) for value in told.values())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"window": 1}, "window: Input should be greater than or equal to 2"),
        (
            {"sample_every_steps": -1},
            "sample_every_steps: Input should be greater than or equal to 0",
        ),
        ({"report_every": 5}, "report_every: unknown key; did you mean 'report_every_steps'?"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"config: diagnostics.{text}")):
        config(diagnostics=settings)
