import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamcl.plasticity import SelfNormalizedResets
from streamcl.random import key_of, uniform_array
from tests.plasticity.nets import Net, convolutional, example, mlp


def made(*widths: int, kind: str = "sgd", rate: float = 0.05, **settings: Any) -> tuple[Net, SelfNormalizedResets]:
    net = Net(mlp(*widths), kind, rate)
    rule = SelfNormalizedResets(net.dense, net.module, net.taps, **settings)
    net.rules.append(rule)
    return net, rule


class Scalar:
    """One unit, with a list of the silences that it has had; thresholds are the ends of bins."""

    def __init__(self, percentile: float, expansion: float, initial: int, shortest: int, longest: int) -> None:
        self.percentile, self.expansion, self.shortest, self.longest = percentile, expansion, shortest, longest
        self.threshold, self.silence, self.heard = initial, 0, list[int]()

    def step(self, fires: bool) -> bool:
        """Whether it is made anew."""
        if fires:
            if self.silence:
                self.heard.append(self.silence)
            self.silence = 0
        else:
            self.silence += 1
        if self.silence < self.threshold:
            return False
        self.heard.append(self.silence)
        self.silence = 0
        return True

    def revisit(self) -> None:
        if self.heard:
            heard = sorted(self.end(s) for s in self.heard)
            q = next(
                s for k, s in enumerate(heard) if (k + 1 + heard[k + 1 :].count(s)) >= self.percentile * len(heard)
            )
            wider = int(self.threshold * self.expansion)
            self.threshold = min(max(q if q < self.threshold else wider, self.shortest), self.longest)
        self.heard = []

    def end(self, silence: int) -> int:
        ends = (math.ceil(math.pow(2.0, j / 8)) for j in range(1000))
        return min(next(end for end in ends if end >= min(silence, self.longest)), self.longest)


def spoken(net: Net, pattern: list[bool]) -> None:
    """A step in which unit i fires or doesn't, as `pattern` has it: input i is its alone."""
    x = torch.tensor([[1.0 if fires else -1.0 for fires in pattern]], dtype=torch.float64)
    with torch.no_grad():
        net.weight("0").copy_(torch.eye(len(pattern)))
        net.bias("0").zero_()
    net.step(x, net.module(x).detach())


@given(
    chance=st.sampled_from([0.05, 0.3, 0.8]),
    percentile=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    expansion=st.sampled_from([1.0, 1.5, 2.0]),
    initial=st.integers(3, 30),
    shortest=st.integers(1, 3),
    revisit=st.integers(1, 25),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_each_unit_follows_its_own_threshold(
    chance: float, percentile: float, expansion: float, initial: int, shortest: int, revisit: int, seed: int
) -> None:
    shape = {"percentile": percentile, "expansion": expansion, "initial": initial, "shortest": shortest, "longest": 40}
    net, rule = made(4, 4, 1, kind="sgd", rate=0.05, revisit=revisit, **shape)
    units = [Scalar(**shape) for _ in range(4)]  # type: ignore[arg-type]
    draws, replaced = uniform_array(seed, 4 * 120).reshape(120, 4), 0
    for t, draw in enumerate(draws, 1):
        pattern = [bool(u < chance) for u in draw]
        if t > 60:
            pattern[2] = False  # it falls silent
        spoken(net, pattern)
        replaced += sum([unit.step(fires) for unit, fires in zip(units, pattern, strict=True)])
        if t % revisit == 0:
            for unit in units:
                unit.revisit()
        assert rule.silence.tolist() == [unit.silence for unit in units]
        assert rule.threshold.tolist() == [unit.threshold for unit in units]
        assert rule.replaced == [replaced]


def still(net: Net, x: Tensor) -> None:
    net.step(x, net.module(x).detach())


def test_a_unit_that_falls_silent_is_made_anew_number_by_number() -> None:
    net, rule = made(3, 4, 2, initial=5, shortest=2, longest=50, revisit=1000, seed=6)
    with torch.no_grad():
        net.weight("0").zero_()
        net.bias("0").copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    x, out = torch.ones(1, 3, dtype=torch.float64), net.bias("2").clone()
    for _ in range(4):
        still(net, x)
    assert (rule.silence.tolist(), rule.replaced) == ([0, 4, 0, 0], [0])
    still(net, x)
    assert (rule.silence.tolist(), rule.replaced) == ([0, 0, 0, 0], [1])
    row = (2.0 * uniform_array(key_of(6, "self_normalized_resets.0"), 3) - 1.0) * math.sqrt(2.0)
    assert net.weight("0")[1].tolist() == pytest.approx(row.tolist(), abs=1e-15)
    assert net.bias("0").tolist() == [1.0, 0.0, 1.0, 1.0]
    assert not net.weight("2")[:, 1].any()
    assert torch.equal(net.bias("2"), out)
    assert rule.histogram.sum(1).tolist() == [0, 1, 0, 0]
    assert rule.read() == {"layer_0_replacements": 1.0}


def test_a_threshold_contracts_to_what_a_unit_does_and_expands_when_it_was_too_short() -> None:
    net, rule = made(2, 2, 1, initial=20, shortest=1, longest=1000, revisit=40)
    for t in range(1, 41):
        spoken(net, [t % 4 == 0, False])  # silences of 3; and never
    assert rule.replaced == [2]
    assert rule.threshold.tolist() == [3, 40]


def test_a_unit_that_always_fires_keeps_its_threshold() -> None:
    net, rule = made(2, 2, 1, initial=20, shortest=1, longest=1000, revisit=10)
    for _ in range(30):
        spoken(net, [True, True])
    assert rule.threshold.tolist() == [20, 20]


def test_a_unit_that_fires_for_any_row_is_not_silent() -> None:
    net, rule = made(2, 3, 1)
    with torch.no_grad():
        net.weight("0").copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        net.bias("0").zero_()
    still(net, torch.eye(2, dtype=torch.float64))
    assert rule.silence.tolist() == [0, 0, 1]


@pytest.mark.parametrize("longest", [1, 7, 1000, 10_000])
def test_bins_reach_the_longest_threshold_in_steps_of_a_twelfth(longest: int) -> None:
    _, rule = made(2, 2, 1, initial=1, shortest=1, longest=longest)
    ends = rule.bins.tolist()
    assert (ends[0], ends[-1]) == (1, longest)
    assert ends[:11] == list(range(1, min(longest, 11) + 1))
    assert all(b <= max(a + 1, 1.0906 * a + 1) for a, b in itertools.pairwise(ends))


def test_channels_are_units() -> None:
    net = Net(convolutional())
    rule = SelfNormalizedResets(net.dense, net.module, net.taps, initial=3, shortest=1, longest=100)
    net.rules.append(rule)
    with torch.no_grad():
        net.bias("3")[1] = -1e3
        net.bias("6").fill_(9.0)
    net.learn(3)
    assert rule.replaced == [0, 1, 0]
    assert not net.weight("6").view(5, 4, 16)[:, 1].any()


def test_adam_starts_over_for_the_weights_of_a_unit_made_anew() -> None:
    net, rule = made(3, 6, 1, kind="adam", rate=0.001, initial=8, shortest=1, longest=100)
    with torch.no_grad():
        net.bias("0")[2] = -1e3
    net.learn(7)
    before = list(rule.replaced)
    net.learn(1, 7)
    assert rule.replaced[0] > before[0]
    assert not net.dense.part(net.dense.slots[2], "0.weight")[2].any()
    assert not net.dense.part(net.dense.slots[2], "2.weight")[:, 2].any()


def test_a_threshold_out_of_reach_leaves_training_bit_for_bit_as_it_was() -> None:
    net, rule = made(3, 5, 1, kind="adam")
    twin = Net(mlp(3, 5, 1), "adam", 0.05)
    for each in (net, twin):
        each.learn(100)
    assert rule.replaced == [0]
    assert torch.equal(net.dense.flat, twin.dense.flat)


@pytest.mark.parametrize("cut", [3, 41, 50])
def test_a_restart_changes_no_bit(cut: int) -> None:
    shape = {"initial": 6, "shortest": 2, "longest": 30, "revisit": 20, "percentile": 0.8}
    whole, rule = made(3, 9, 8, 1, kind="adam", **shape)
    whole.learn(cut)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(60, cut)
    other, again = made(3, 9, 8, 1, kind="adam", **shape)
    other.learn(11)
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(60, cut)
    assert sum(rule.replaced) > 3
    assert torch.equal(whole.dense.flat, other.dense.flat)
    assert torch.equal(rule.histogram, again.histogram)
    again.load_state_dict({})
    assert (again.step, again.replaced, set(again.threshold.tolist())) == (0, [0, 0], {6})


def test_the_device_is_asked_only_when_a_threshold_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    net, rule = made(3, 6, 1, rate=0.0001, initial=50, shortest=50, longest=500, revisit=10_000)
    asked: list[int] = []
    look = rule._look_at

    def noted() -> None:
        asked.append(rule.step)
        look()

    monkeypatch.setattr(rule, "_look_at", noted)
    for i in range(400):
        net.step(*example(net.module, i))
    assert len(asked) <= 10
