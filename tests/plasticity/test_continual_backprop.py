import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from streamcl.config import Config, ConfigError
from streamcl.learner import Learner
from streamcl.plasticity.continual_backprop import ContinualBackprop, default_rate
from streamcl.plasticity.reset import bound
from streamcl.random import key_of, uniform_array
from streamcl.state import digest
from tests.plasticity.nets import STEP, Net, convolutional, example, mlp
from tests.test_learner import config, learned, stream

UTILITIES = ["contribution", "mean_corrected", "adaptable", "adaptation", "weight"]
KINDS = ["sgd", "adagrad", "adam", "ftrl"]


def still(net: Net, steps: int, x: Tensor | None = None) -> None:
    """Steps of gradient 0: what is asked for is what is said."""
    for i in range(steps):
        seen = example(net.module, i)[0] if x is None else x
        net.step(seen, net.module(seen).detach())


def fresh_row(seed: int, place: int, replaced: int, weight: Tensor) -> Tensor:
    size = weight[0].numel()
    draw = uniform_array(key_of(seed, f"continual_backprop.{place}"), size, replaced * size)
    return torch.from_numpy((2.0 * draw - 1.0) * math.sqrt(6.0 / size)).view(weight.shape[1:]).to(weight.dtype)


def hand_made() -> Net:
    """4-8-1: unit i says i + .5 to the input (1, 2, 0, -1), and counts for what stands in the outgoing row."""
    net = Net(mlp(4, 8, 1))
    with torch.no_grad():
        net.dense.flat.zero_()
        net.weight("0")[:, 0] = torch.arange(8.0)
        net.bias("0").fill_(0.5)
        net.weight("2")[0] = torch.tensor([4.0, -1.0, 0.25, 2.0, -0.125, 1.0, 1.0, -0.25])
        net.bias("2").fill_(7.0)
    return net


def test_one_reset_number_by_number() -> None:
    net = hand_made()
    rule = net.continual_backprop(rate=1 / 16, maturity=1, decay=0.5, seed=3)
    x = torch.tensor([[1.0, 2.0, 0.0, -1.0]], dtype=torch.float64)
    before = float(net.module(x).detach())
    # 4*.5 - 1.5 + .25*2.5 + 2*3.5 - .125*4.5 + 5.5 + 6.5 - .25*7.5 + 7
    assert before == pytest.approx(24.6875)
    still(net, 2, x)
    # From step 2 on all eight are older than 1: 8/16, then 16/16 at step 3.
    assert (rule.replaced, rule.eligible_steps) == ([0], [8])
    assert rule.mean.tolist() == [(i + 0.5) * 0.75 for i in range(8)]  # 1 - .5^2 of the mean
    still(net, 1, x)
    # Utilities h |w|: 2, 1.5, .625, 7, .5625, 5.5, 6.5, 1.875. The lowest is unit 4, which said 4.5 and counted -.125.
    assert (rule.replaced, rule.eligible_steps) == ([1], [16])
    assert net.weight("2")[0].tolist() == [4.0, -1.0, 0.25, 2.0, 0.0, 1.0, 1.0, -0.25]
    assert float(net.bias("2")) == pytest.approx(7.0 - 0.125 * 4.5)
    assert net.bias("0").tolist() == [0.5, 0.5, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5]
    row = (2.0 * uniform_array(key_of(3, "continual_backprop.0"), 4) - 1.0) * math.sqrt(6.0 / 4.0)
    assert net.weight("0")[4].tolist() == row.tolist()
    assert net.weight("0")[[0, 1, 2, 3, 5, 6, 7], 0].tolist() == [0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0]
    assert (rule.step - rule.born).tolist() == [3, 3, 3, 3, 0, 3, 3, 3]
    assert (float(rule.mean[4]), float(rule.mean_use[4])) == (0.0, 0.0)
    assert float(net.module(x).detach()) == pytest.approx(before, abs=1e-12)
    # Seven are eligible now: 23/16 at step 4, 30/16 at step 5 (unit 4 is 2 old then and eligible: 31/16), 39/16 at 6.
    still(net, 2, x)
    assert (rule.replaced, rule.eligible_steps) == ([1], [31])
    still(net, 1, x)
    # Unit 4 counts for nothing now, so it goes again, with the next draw.
    assert (rule.replaced, rule.eligible_steps) == ([2], [39])
    assert torch.equal(net.weight("0")[4], fresh_row(3, 0, 1, net.weight("0")))


class Oracle:
    """Section by section what the paper says, unit by unit, in Python's own floats."""

    def __init__(self, net: Net, rate: float, maturity: int, decay: float, utility: str, seed: int) -> None:
        self.net, self.rate, self.maturity, self.decay, self.utility, self.seed = (
            net,
            rate,
            maturity,
            decay,
            utility,
            seed,
        )
        self.sizes = [layer.units for layer in net.taps.layers]
        self.age = [[0] * n for n in self.sizes]
        self.u, self.f = ([[0.0] * n for n in self.sizes] for _ in range(2))
        self.debt, self.replaced = [0.0 for _ in self.sizes], [0 for _ in self.sizes]
        self.steps = [0 for _ in self.sizes]
        self.log: list[tuple[int, int]] = []

    def names(self, place: int) -> tuple[str, str]:
        layer = self.net.taps.layers[place]
        return layer.incoming, layer.outgoing[0]

    def after(self) -> None:
        chosen = [(place, r) for place in range(len(self.sizes)) for r in self.observe(place)]
        for place, r in chosen:
            self.reset(place, r)

    def observe(self, place: int) -> list[int]:
        below, above = self.names(place)
        h = self.net.taps.vectors()[place]
        out, into = self.net.weight(above).abs().sum(0), self.net.weight(below).abs().sum(1)
        unbiased = []
        for i in range(self.sizes[place]):
            self.age[place][i] += 1
            unbias = 1.0 - self.decay ** self.age[place][i]
            rows = [float(v) for v in h[:, i]]
            self.f[place][i] = self.decay * self.f[place][i] + (1 - self.decay) * sum(rows) / len(rows)
            mean = self.f[place][i] / unbias
            corrected = sum(abs(v - mean) for v in rows) / len(rows)
            y = {
                "contribution": sum(abs(v) for v in rows) / len(rows) * float(out[i]),
                "mean_corrected": corrected * float(out[i]),
                "adaptable": corrected * float(out[i]) / float(into[i]),
                "adaptation": 1.0 / float(into[i]),
                "weight": float(out[i]),
            }[self.utility]
            self.u[place][i] = self.decay * self.u[place][i] + (1 - self.decay) * y
            instant = self.utility in ("adaptation", "weight")
            unbiased.append(y if instant else self.u[place][i] / unbias)
        eligible = [i for i, age in enumerate(self.age[place]) if age > self.maturity]
        self.steps[place] += len(eligible)
        found: list[int] = []
        while math.floor(self.rate * self.steps[place]) > self.replaced[place] + len(found) and eligible:
            r = min(eligible, key=lambda i: (unbiased[i], i))
            eligible.remove(r)
            found.append(r)
        return found

    def reset(self, place: int, r: int) -> None:
        below, above = self.names(place)
        self.log.append((place, r))
        self.net.bias(above).add_(
            self.net.weight(above)[:, r] * (self.f[place][r] / (1.0 - self.decay ** self.age[place][r]))
        )
        self.net.weight(below)[r] = fresh_row(self.seed, place, self.replaced[place], self.net.weight(below))
        self.net.bias(below)[r] = 0.0
        self.net.weight(above)[:, r] = 0.0
        self.u[place][r] = self.f[place][r] = 0.0
        self.age[place][r] = 0
        self.replaced[place] += 1


def with_oracle(
    utility: str, rate: float, maturity: int, rows: int, exact: bool, moving: bool, steps: int = 60
) -> None:
    made = {"rate": rate, "maturity": maturity, "decay": 0.9, "utility": utility, "seed": 5}
    net, slow = (Net(mlp(4, 7, 6, 1, activation=nn.Tanh), rate=0.05) for _ in range(2))
    rule = net.continual_backprop(exact=exact, **made)
    oracle = Oracle(slow, **made)  # type: ignore[arg-type]
    for i in range(steps):
        x, y = example(net.module, i, rows)
        for each in (net, slow):
            each.step(x, y if moving else each.module(x).detach())
        oracle.after()
        assert rule.replaced == oracle.replaced
        torch.testing.assert_close(net.dense.flat, slow.dense.flat, rtol=1e-10, atol=1e-12)
    assert sum(rule.replaced) > 0


@pytest.mark.parametrize("utility", UTILITIES)
# At age 1 what is corrected by the mean is 0 but for rounding, so who of the newest goes would be a matter of that.
@given(rate=st.sampled_from([0.013, 0.05, 0.4]), maturity=st.integers(1, 12), rows=st.sampled_from([1, 3]))
@settings(max_examples=5, deadline=None)
def test_the_exact_form_is_the_papers_on_a_net_that_learns(utility: str, rate: float, maturity: int, rows: int) -> None:
    with_oracle(utility, rate, maturity, rows, exact=True, moving=True)


@pytest.mark.parametrize("utility", UTILITIES)
@given(rate=st.sampled_from([0.013, 0.05]), maturity=st.integers(4, 12), rows=st.sampled_from([1, 3]))
@settings(max_examples=5, deadline=None)
def test_the_cheap_form_is_the_papers_on_a_net_that_stands_still(
    utility: str, rate: float, maturity: int, rows: int
) -> None:
    # Until the first reset: afterwards the paper's average remembers the weights that are no more.
    steps = maturity + math.ceil(1.0 / (rate * 7))
    with_oracle(utility, rate, maturity, rows, exact=False, moving=False, steps=steps)


@given(rate=st.floats(0.0, 1.0), maturity=st.integers(0, 30), units=st.integers(1, 9), steps=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_resets_are_the_whole_part_of_rate_times_eligible_steps_and_never_of_the_young(
    rate: float, maturity: int, units: int, steps: int
) -> None:
    net = Net(mlp(2, units, 1))
    rule = net.continual_backprop(rate=rate, maturity=maturity, utility="random")
    ages, eligible_steps = np.zeros(units, np.int64), 0
    x, y = example(net.module, 0)
    for _ in range(steps):
        born = rule.born.clone()
        net.step(x, y)
        ages += 1
        eligible = ages > maturity
        eligible_steps += int(eligible.sum()) if rate else 0
        reset = (rule.born != born).numpy()
        assert not (reset & ~eligible).any()
        ages[reset] = 0
        assert int(reset.sum()) == min(
            int(eligible.sum()), math.floor(rate * eligible_steps) - (rule.replaced[0] - int(reset.sum()))
        )
    assert rule.eligible_steps == [eligible_steps]
    assert rate == 0.0 or ages.tolist() == (rule.step - rule.born).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [lambda: mlp(4, 6, 5, 1), convolutional], ids=["linear", "convolutional"])
def test_optimiser_state_of_exactly_the_units_own_weights_is_that_of_new_ones(
    kind: str, build: Callable[[], nn.Module]
) -> None:
    net, twin = (Net(build(), kind) for _ in range(2))
    rule = net.continual_backprop(rate=1 / 200, maturity=20, transfer=False)
    for i in range(1000):
        for each in (net, twin):
            each.learn(1, i)
        if sum(rule.replaced):
            break
    [(place, r)] = [(p, int(i)) for p, part in enumerate(rule._parts) for i in torch.nonzero(part.born[0] == rule.step)]
    below, above = net.taps.layers[place].incoming, net.taps.layers[place].outgoing[0]
    mine = torch.zeros(len(net.dense.flat), dtype=torch.bool)
    net.dense.part(mine, f"{below}.weight")[r] = True
    net.dense.part(mine, f"{below}.bias")[r] = True
    outgoing = net.dense.part(mine, f"{above}.weight")
    outgoing.view(len(outgoing), rule.layers[place].units, -1)[:, r] = True
    columns = zip((net.dense.flat, *net.dense.slots), (twin.dense.flat, *twin.dense.slots), strict=True)
    for ours, theirs in columns:
        assert torch.equal(ours[~mine], theirs[~mine])
    for slot, new in zip(net.dense.slots, net.dense.update.slots(net.dense.flat[mine]), strict=True):
        assert torch.equal(slot[mine], new)
    # The step that came before the reset has left nothing on them.
    assert not net.weight(above).view(len(outgoing), rule.layers[place].units, -1)[:, r].any()


def test_a_new_units_first_step_is_adams_first() -> None:
    net = Net(mlp(4, 6, 1), "adam", 0.01)
    rule = net.continual_backprop(rate=1 / 300, maturity=50)
    net.learn(100)
    assert rule.replaced == [1]
    [r] = [int(i) for i in torch.nonzero(rule.born == rule.step)]
    x, y = example(net.module, 0)
    x = x * torch.sign(net.weight("0")[r] @ x[0])  # so that it fires
    twin = nn.Parameter(net.weight("2").clone())
    output = twin[0] @ torch.relu(net.module[0](x)[0].detach()) + net.bias("2")[0]  # type: ignore[index]
    ((output - y[0, 0]) ** 2).backward()  # type: ignore[no-untyped-call]
    torch.optim.Adam([twin], 0.01).step()
    net.rules.clear()
    net.step(x, y)
    assert abs(float(net.weight("2")[0, r])) == pytest.approx(0.01, rel=1e-4)
    assert float(net.weight("2")[0, r]) == pytest.approx(
        float(twin[0, r].detach()), rel=2e-7
    )  # corrections are float32


@pytest.mark.parametrize("utility", UTILITIES)
def test_a_unit_that_counts_for_nothing_is_replaced_without_a_trace_in_the_function(utility: str) -> None:
    net = Net(mlp(4, 6, 5, 2))
    with torch.no_grad():
        net.weight("2")[:, 3] = 0.0
        net.weight("0")[3] *= 1000.0  # of no use by its adaptation either
    rule = net.continual_backprop(rate=1 / 24, maturity=3, utility=utility)
    x = torch.randn(20, 4, dtype=torch.float64)
    before = net.module(x).detach()
    rule.rates[1] = 0.0
    still(net, 7)
    assert rule.replaced == [1, 0]
    assert int(rule._parts[0].born[0, 3]) == 7
    assert torch.equal(net.module(x).detach(), before)


def test_the_output_layer_has_no_units_and_its_rows_are_never_drawn_anew() -> None:
    net, twin = (Net(mlp(3, 4, 2)) for _ in range(2))
    net.continual_backprop(rate=1.0, maturity=0)
    for each in (net, twin):
        still(each, 1)
    assert not net.weight("2").any()  # all four units are new: only columns went
    assert twin.weight("2").all()


def test_units_of_neighbouring_layers_are_chosen_before_anything_changes() -> None:
    net = Net(mlp(3, 4, 3, 1))
    before = net.weight("2").clone()
    x = torch.ones(1, 3, dtype=torch.float64)
    h = torch.relu(net.module[0](x)).detach()[0]  # type: ignore[index]
    rule = net.continual_backprop(rate=1.0, maturity=0, seed=1)
    rule.rates = [0.25, 1 / 3]
    still(net, 1, x)
    assert rule.replaced == [1, 1]
    r, s = (int(part.born[0].argmax()) for part in rule._parts)
    # The overlapping entry ends as drawn: front to back, so the column of r goes before the row of s comes.
    assert torch.equal(net.weight("2")[s], fresh_row(1, 1, 0, before))
    assert float(net.weight("2")[s, r]) != 0.0
    others = [i for i in range(3) if i != s]
    assert not net.weight("2")[others, r].any()
    # What r contributed went into the bias of all, but s has a new bias.
    assert float(net.bias("2")[s]) == 0.0
    assert r == int((h * before.abs().sum(0)).argmin())


def test_of_equally_useless_units_the_first_goes() -> None:
    net = hand_made()
    with torch.no_grad():
        net.weight("2")[0, [2, 5, 6]] = 0.0
    rule = net.continual_backprop(rate=1 / 8, maturity=0)
    still(net, 1)
    assert rule.born.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    net = hand_made()
    with torch.no_grad():
        net.weight("2")[0, [2, 5, 6]] = 0.0
    rule = net.continual_backprop(rate=2 / 8, maturity=0)
    still(net, 1)
    assert rule.born.tolist() == [0, 0, 1, 0, 0, 1, 0, 0]


def test_without_a_rate_training_is_bit_for_bit_what_it_was() -> None:
    net, twin = (Net(mlp(3, 5, 4, 1), "adam") for _ in range(2))
    net.continual_backprop(rate=0.0)
    for each in (net, twin):
        each.learn(50)
    assert torch.equal(net.dense.flat, twin.dense.flat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 37, 60])
def test_resuming_in_the_middle_of_accumulation_changes_no_bit(kind: str, cut: int) -> None:
    made: dict[str, Any] = {"rate": 0.013, "maturity": 7, "utility": "adaptable", "seed": 2}
    whole = Net(mlp(3, 6, 5, 1, dtype=torch.float32), kind)
    rule = whole.continual_backprop(**made)
    whole.learn(cut)
    weights, kept = whole.dense.state_dict(), copy.deepcopy(rule.state_dict())
    whole.learn(80, cut)
    other = Net(mlp(3, 6, 5, 1, dtype=torch.float32, seed=9), kind)
    again = other.continual_backprop(**made)
    other.learn(11)  # dirtied
    other.dense.load_state_dict(weights)
    again.load_state_dict(kept)
    other.learn(80, cut)
    assert sum(rule.replaced) > 2
    assert digest({"w": whole.dense.state_dict(), "r": rule.state_dict()}) == digest(
        {"w": other.dense.state_dict(), "r": again.state_dict()}
    )


def test_an_empty_state_begins_where_it_is() -> None:
    net = Net(mlp(3, 6, 1))
    rule = net.continual_backprop(rate=0.1, maturity=2)
    begun = rule.state_dict()
    net.learn(30)
    rule.load_state_dict({})
    assert digest(rule.state_dict()) == digest(begun)


def test_weight_sets_anchors_and_traces_follow_a_reset() -> None:
    net = Net(mlp(3, 4, 2))
    average, anchor, trace = net.dense.flat * 0.5, net.dense.flat.clone(), torch.ones_like(net.dense.flat)
    net.dense.sets["ema"], net.dense.anchors["initial"], net.dense.traces["upgd"] = average, anchor, trace
    rule = net.continual_backprop(rate=1 / 4, maturity=0)
    x = torch.ones(1, 3, dtype=torch.float64)
    h = torch.relu(net.module[0](x)).detach()[0]  # type: ignore[index]
    before = {name: part.clone() for name, part in (("bias", net.dense.part(average, "2.bias")),)}
    column = net.dense.part(average, "2.weight").clone()
    still(net, 1, x)
    r = int(rule.born.argmax())
    for kept in (average, anchor):
        assert torch.equal(net.dense.part(kept, "0.weight")[r], net.weight("0")[r])
        assert not net.dense.part(kept, "2.weight")[:, r].any()
    assert not net.dense.part(trace, "0.weight")[r].any()
    assert net.dense.part(trace, "0.weight").sum() == 9.0
    # Each set moves what its own weights made of the unit.
    torch.testing.assert_close(net.dense.part(average, "2.bias"), before["bias"] + column[:, r] * h[r])
    assert torch.equal(net.dense.part(anchor, "2.bias"), Net(mlp(3, 4, 2)).bias("2"))


def test_a_constant_unit_leaves_every_next_sum_as_it_was() -> None:
    net = Net(mlp(3, 4, 5, 1))
    with torch.no_grad():
        net.weight("0")[2] = 0.0
        net.bias("0")[2] = 0.7  # says .7 whatever comes
        net.weight("2")[:, 2] *= 1e-3
    rule = net.continual_backprop(rate=1 / 40, maturity=9)
    rule.rates[1] = 0.0
    x = torch.randn(10, 3, dtype=torch.float64)
    before, bias = net.module[:3](x).detach(), net.bias("2").clone()  # type: ignore[index]
    still(net, 19)
    assert (rule.replaced, int(rule._parts[0].born[0].argmax())) == ([1, 0], 2)
    torch.testing.assert_close(net.module[:3](x).detach(), before, rtol=0.0, atol=1e-12)  # type: ignore[index]
    assert (net.bias("2") != bias).all()


@pytest.mark.parametrize("l1", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "ftrl"])  # Adam moves on without a gradient
def test_what_a_unit_contributed_stays_in_the_next_bias(kind: str, l1: float) -> None:
    """FTRL makes weights of its sums, so these must know."""
    net = Net(mlp(3, 4, 2), kind, rate=0.05, l1=l1)
    rule = net.continual_backprop(rate=1 / 4, maturity=30)
    net.learn(30)
    before, x = net.bias("2").clone(), torch.ones(1, 3, dtype=torch.float64)
    still(net, 1, x)
    assert rule.replaced == [1]
    moved = net.bias("2").clone()
    assert ((moved - before).abs() > 1e-4).all()
    rule.rates = [0.0]
    net.dense.step(torch.zeros_like(net.dense.flat))
    torch.testing.assert_close(net.bias("2"), moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_channels_are_units_of_a_convolution(norm: bool) -> None:
    net = Net(convolutional(norm=norm).eval())
    rule = net.continual_backprop(rate=0.34, maturity=0, seed=4)
    x = example(net.module, 0)[0]
    maps = [torch.relu(net.module[1](net.module[0](x)))]  # type: ignore[index]
    maps.append(net.module[5](torch.relu(net.module[3](maps[0]))).view(1, 4, 4, 4))  # type: ignore[index]
    use = [m.detach().abs().mean((0, 2, 3)) for m in maps]
    out = [net.weight("3").abs().sum((0, 2, 3)), net.weight("6").view(5, 4, 16).abs().sum((0, 2))]
    before = {name: param.detach().clone() for name, param in net.dense.params.items()}
    still(net, 1, x)
    assert rule.replaced == [1, 1, 1]
    r, s, _ = (int(part.born[0].argmax()) for part in rule._parts)
    assert (r, s) == tuple(int((u * o).argmin()) for u, o in zip(use, out, strict=True))
    assert torch.equal(net.weight("0")[r], fresh_row(4, 0, 0, before["0.weight"]))
    kept = [i for i in range(4) if i != s]
    assert not net.weight("3")[kept, r].any()
    torch.testing.assert_close(
        net.bias("3")[kept], (before["3.bias"] + before["3.weight"][:, r].sum((1, 2)) * use[0][r])[kept]
    )
    columns = net.weight("6").view(5, 4, 16)[:, s]
    fresh = int(rule._parts[2].born[0].argmax())
    assert not columns[[i for i in range(5) if i != fresh]].any()


def test_a_replaced_channels_normalisation_starts_over() -> None:
    net = Net(convolutional(norm=True))
    rule = net.continual_backprop(rate=0.1, maturity=5)
    net.learn(40, rows=2)
    norm = net.module[1]  # type: ignore[index]
    while rule.replaced[0] == 0 or not (rule._parts[0].born == rule.step).any():
        net.learn(1, rule.step, rows=2)
    r = int(rule._parts[0].born[0].argmax())
    assert (float(norm.weight[r]), float(norm.bias[r])) == (1.0, 0.0)
    assert (float(norm.running_mean[r]), float(norm.running_var[r])) == (0.0, 1.0)
    assert float(norm.running_var[(r + 1) % 3]) != 1.0


class NoQuestions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation that would make a host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("utility", [*UTILITIES, "random"])
def test_nothing_is_asked_of_the_device_in_a_step_not_even_when_a_unit_is_reset(utility: str) -> None:
    net = Net(mlp(3, 6, 5, 1), "adam")
    rule = net.continual_backprop(rate=0.05, maturity=2, utility=utility)
    net.rules.clear()
    for i in range(30):
        net.learn(1, i)
        with torch.no_grad(), NoQuestions():  # type: ignore[no-untyped-call]
            rule.after(STEP)
    assert min(rule.replaced) > 0


def test_a_dead_unit_of_an_adaptable_net_is_not_taken_for_one_that_is_safe() -> None:
    net = Net(mlp(3, 4, 1))
    with torch.no_grad():
        net.weight("0")[1] = 0.0  # 1 / S_in would be infinite
    rule = net.continual_backprop(rate=1.0, maturity=1, utility="adaptation")
    still(net, 2)
    assert (rule.born == 2).all()


@pytest.mark.parametrize(
    ("init", "square"), [("kaiming", 6 / 24), ("torch", 1 / 24), ("lecun", 3 / 24), ("xavier", 6 / 66)]
)
def test_initial_bounds_follow_the_fan_in_and_out(init: Any, square: float) -> None:
    assert bound(init, torch.zeros(7, 4, 6, 1)) == pytest.approx(math.sqrt(square))


def test_wider_layers_are_replaced_more_slowly_by_default() -> None:
    assert [default_rate(n) for n in (1, 128, 129, 1000, 1001)] == [1e-4, 1e-4, 1e-5, 1e-5, 1e-6]
    assert Net(mlp(3, 200, 5, 1)).continual_backprop().rates == [1e-5, 1e-4]


def plastic(**settings: Any) -> Config:
    rule = {"kind": "continual_backprop", "replacement_rate": 0.02, "maturity": 10, **settings}
    return config(plasticity=[rule], replay={"per_event": 2}, model={"hidden": [6, 5]})


def test_a_learner_replaces_units_and_goes_on_from_a_snapshot_bit_for_bit() -> None:
    outcomes = stream("binary", 120)
    whole = learned(plastic(), outcomes)
    part = learned(plastic(), outcomes[:55])
    state, other = part.state_dict(), learned(plastic(), outcomes[90:])
    other.load_state_dict(copy.deepcopy(state))
    for item in outcomes[55:]:
        other.learn(item)
    rule = whole.engine.rules["continual_backprop"]
    assert isinstance(rule, ContinualBackprop)
    assert min(rule.replaced) >= 5
    assert digest(other.state_dict()) == digest(whole.state_dict())


def test_a_refused_example_is_no_step() -> None:
    learner = Learner(config(plasticity=["continual_backprop"], optimizer={"max_grad_norm": 1e-9}))
    before = digest(learner.state_dict())
    assert not learner.learn(stream("binary", 1)[0])
    assert digest(learner.state_dict()) == before


def test_a_snapshot_from_before_begins_afresh() -> None:
    outcomes = stream("binary", 30)
    old = learned(config(model={"hidden": [6, 5]}), outcomes)
    new = Learner(plastic())
    new.load_state_dict(old.state_dict())
    rule = new.engine.rules["continual_backprop"]
    assert isinstance(rule, ContinualBackprop)
    assert (rule.step, rule.replaced) == (0, [0, 0])


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ([{"kind": "continual_backprop", "mt": 100}], "plasticity.0.mt: unknown key"),
        ([{"kind": "continual_backprop", "maturity": -1}], "plasticity.0.maturity"),
        (["continual_backprop", "continual_backprop"], "plasticity: each kind once"),
    ],
)
def test_bad_settings_are_named(rules: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(plasticity=rules)


def test_named_layers_are_those_that_are_replaced() -> None:
    learner = Learner(plastic(layers=[["deep.hidden.1", "deep.head"]]))
    for item in stream("binary", 60):
        learner.learn(item)
    rule = learner.engine.rules["continual_backprop"]
    assert isinstance(rule, ContinualBackprop)
    assert ([layer.units for layer in rule.layers], rule.replaced[0] > 0) == ([5], True)


def grown_old(**settings: Any) -> tuple[Net, ContinualBackprop]:
    net = Net(mlp(4, 20, 20, 1))
    rule = net.continual_backprop(**{"rate": 1e-3, "maturity": 10, **settings})
    net.learn(400)
    return net, rule


@pytest.mark.parametrize("rate", [1e-4, 1e-2])
def test_another_rate_counts_from_where_it_begins(rate: float) -> None:
    """Neither is the past made up for, nor does it count as done in advance."""
    net, rule = grown_old()
    before = list(rule.replaced)
    assert min(before) >= 7
    net.rules.clear()
    again = net.continual_backprop(rate=rate, maturity=10)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    net.learn(300, 400)
    assert again.replaced == [b + math.floor(rate * e) for b, e in zip(before, again.eligible_steps, strict=True)]
    assert all(300 * 10 < e <= 300 * 20 for e in again.eligible_steps)


@pytest.mark.parametrize("change", [{"utility": "adaptable"}, {"exact": True}, {"decay": 0.9}])
def test_when_something_else_is_averaged_all_units_are_young_again(change: dict[str, Any]) -> None:
    net, rule = grown_old()
    net.rules.clear()
    again = net.continual_backprop(**{"rate": 1e-3, "maturity": 10, **change})
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert not again.mean.any()
    assert not again.mean_use.any()
    assert (again.born == again.step).all()
    net.learn(10, 400)
    assert again.replaced == rule.replaced
    net.learn(300, 410)
    assert min(again.replaced) > min(rule.replaced)


def test_transferring_may_begin_at_any_time() -> None:
    net, rule = grown_old(transfer=False)
    assert rule.mean.any()
    net.rules.clear()
    again = net.continual_backprop(rate=1e-3, maturity=10, transfer=True)
    again.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert torch.equal(again.mean, rule.mean)


def test_a_bias_that_nothing_moves_into_keeps_what_ftrl_has_summed_up() -> None:
    """With l1, any sum below it stands for a bias of 0: the sum must not be made of the bias."""
    net = Net(mlp(3, 4, 2), "ftrl", 0.1, l1=1.0)
    sums = net.dense.part(net.dense.slots[0], "2.bias")
    with torch.no_grad():
        sums.fill_(0.9)
        net.bias("2").zero_()
        net.weight("2").zero_()
    net.dense.settle("2.bias", net.bias("2").clone())
    assert sums.tolist() == [0.9, 0.9]
    before = net.bias("2").clone()
    with torch.no_grad():
        net.bias("2")[0] = 0.5
    net.dense.settle("2.bias", before)
    assert float(sums[1]) == 0.9
    assert float(sums[0]) == pytest.approx(-0.5 * (1.0 / 0.1) - 1.0)
