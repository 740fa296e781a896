"""The plug-in points, by methods small enough to see through."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streamcl import plugin
from streamcl.config import Config, ConfigError, changes
from streamcl.engine.eager import as_tensors
from streamcl.learner import Learner, named
from streamcl.memory import Replay
from streamcl.plugin import Draw, Grads, Plan, Planner, PluginError, Query, Recall, Retention, Rule, Shape, Step, Term
from streamcl.records import Origin, Outcome, Signal
from streamcl.state import digest
from streamcl.stations import Stop
from streamcl.testing import plugin_checks
from tests.test_learner import config, learned, outcome, stream

HERE = __name__


class Half(Planner):
    """Every second event is left out, every third is taken twice."""

    class Options(Planner.Options):
        kind: Literal["half"] = "half"

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        number = outcome.ticket.origin.offset
        return Plan(passes=2 if number % 3 == 0 else 1, draw=plan.draw, skip=number % 2 == 1)


class HeadOnly(Planner):
    class Options(Planner.Options):
        kind: Literal["head_only"] = "head_only"

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        return Plan(draw=plan.draw, trainable=("head",))


class ReplayAlone(Planner):
    class Options(Planner.Options):
        kind: Literal["replay_alone"] = "replay_alone"

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        return Plan(draw=plan.draw, live=False)


class First(Draw, Retention):
    """Keeps the first rows for ever, and draws the very first one."""

    class Options(Draw.Options):
        kind: Literal["first"] = "first"

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        return torch.zeros(count, dtype=torch.int64), torch.ones(count)

    def place(self, label: float, memory: Replay) -> int | None:
        return len(memory) if len(memory) < memory.capacity else None


class Shift(Term):
    """Adds `weight` x the mean logit to the loss, through a parameter of its own."""

    class Options(Term.Options):
        kind: Literal["shift"] = "shift"

    options: Options
    own: nn.Linear

    def module(self, shape: Shape) -> nn.Module:
        self.own = nn.Linear(shape.outputs, 1, bias=False)
        nn.init.ones_(self.own.weight)
        return self.own

    def loss(self, step: Step) -> Tensor:
        loss: Tensor = self.own(step.out("live").output).mean()
        return loss


class Instead(Term):
    class Options(Term.Options):
        kind: Literal["instead"] = "instead"

    replaces_task = True

    def loss(self, step: Step) -> Tensor:
        return (step.out("live").output ** 2).sum()


class Listener(Rule):
    class Options(Rule.Options):
        kind: Literal["listener"] = "listener"
        loudness: float = Stop(1.0, gt=0)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heard: list[str] = []

    def on_signal(self, signal: Signal) -> None:
        self.heard.append(signal.kind)

    def before(self, step: Step) -> None:
        self.heard.append("before")

    def transform(self, grads: Grads, step: Step) -> Grads:
        self.heard.append("transform")
        return grads

    def after(self, step: Step) -> None:
        self.heard.append("after")


class Noting(Recall):
    """Adds 1 to every logit; wants to hear the logit of before."""

    class Options(Recall.Options):
        kind: Literal["noting"] = "noting"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.heard: list[float] = []

    def apply(self, output: Tensor, query: Query) -> Tensor:
        query.notes["before"] = output
        return output + 1.0

    def observe(self, outcome: Outcome) -> None:
        self.heard.append(float(outcome.ticket.scores.notes["before"][0]))


def with_plugins(*kinds: Any, task: str = "binary", **more: Any) -> Config:
    named = [{"kind": f"{HERE}:{each}"} if isinstance(each, str) else each for each in kinds]
    return config(task, plugins=named, **more)


def test_a_planner_says_how_much_an_event_is_worth() -> None:
    learner = learned(with_plugins("Half"), stream("binary", 12))
    assert learner.version == 12
    assert learner.steps == sum(0 if n % 2 else 2 if n % 3 == 0 else 1 for n in range(12))


def test_an_event_that_is_skipped_moves_no_weight_and_is_kept() -> None:
    learner = Learner(with_plugins("Half"))
    before = learner.engine.dense.flat.clone()
    assert learner.learn(stream("binary", 2)[1])
    assert torch.equal(learner.engine.dense.flat, before)
    assert len(learner.memory) == 1


def test_only_what_is_trainable_moves() -> None:
    for kind in ("sgd", "adam"):
        made = with_plugins("HeadOnly", optimizer={"kind": kind}, replay={"per_event": 2})
        learner = Learner(made)
        start = {name: param.detach().clone() for name, param in learner.engine.dense.params.items()}
        table, slots = learner.engine.table.clone(), [slot.clone() for slot in learner.engine.dense.slots]
        for item in stream("binary", 5):
            assert learner.learn(item)
        moved = {n for n, p in learner.engine.dense.params.items() if not torch.equal(p, start[n])}
        assert moved == {"deep.head.weight", "deep.head.bias"}
        assert torch.equal(learner.engine.table, table)
        for slot, old in zip(learner.engine.dense.slots, slots, strict=True):
            for name in start.keys() - moved:
                assert torch.equal(learner.engine.dense.part(slot, name), learner.engine.dense.part(old, name))


def test_a_pass_may_be_of_replay_alone() -> None:
    """The event itself then teaches nothing: whatever its label, the weights are the same."""
    made = with_plugins("ReplayAlone", replay={"per_event": 2})
    ends = []
    for label in (0.0, 1.0):
        learner = learned(made, stream("binary", 3))
        assert learner.learn(outcome(stream("binary", 4)[3].ticket.features, label, 3))
        ends.append(learner.engine.dense.flat.clone())
    assert torch.equal(*ends)


def test_plugins_say_who_stays_and_who_is_drawn() -> None:
    made = with_plugins("First", replay={"retention": "plugin", "capacity": 4, "per_event": 2})
    learner, items = learned(made, stream("binary", 9)), stream("binary", 9)
    assert len(learner.memory) == 4
    np.testing.assert_array_equal(learner.memory.ids[:4], [item.ticket.features.ids for item in items[:4]])
    ids, *_ = learner.memory.draw(3, 7)
    np.testing.assert_array_equal(ids.numpy(), [items[0].ticket.features.ids] * 3)


def test_a_term_adds_to_the_loss_and_learns_parameters_of_its_own() -> None:
    """One step of SGD on loss + w a z: the logit's bias falls by rate x (p - y + w a), a by rate x w z."""
    made = with_plugins({"kind": f"{HERE}:Shift", "weight": 0.25}, optimizer={"kind": "sgd"})
    plain = Learner(config("binary", optimizer={"kind": "sgd"}))
    learner, [item] = Learner(made), stream("binary", 1)
    params = learner.engine.dense.params
    with torch.no_grad():
        params["linear.bias"].fill_(0.3)
        plain.engine.dense.params["linear.bias"].fill_(0.3)
    z = float(learner.predict(item.ticket.features).output[0])
    assert learner.learn(item)
    assert plain.learn(item)
    rate = made.optimizer.learning_rate
    moved = float(plain.engine.dense.params["linear.bias"].detach()) - float(params["linear.bias"].detach())
    assert moved == pytest.approx(rate * 0.25, rel=1e-4)
    own = float(params["plugins.Shift.weight"].detach())
    assert own == pytest.approx(1.0 - rate * 0.25 * z, rel=1e-4)


def test_a_term_may_stand_for_the_tasks_loss() -> None:
    """Then the label teaches nothing."""
    ends = []
    for label in (0.0, 1.0):
        learner = Learner(with_plugins("Instead"))
        assert learner.learn(outcome(stream("binary", 1)[0].ticket.features, label))
        ends.append(learner.engine.dense.flat.clone())
    assert torch.equal(*ends)


def test_a_rule_hears_of_a_step_in_order_and_signals_come_first() -> None:
    learner = Learner(with_plugins("Listener"))
    rule = learner.plugins["Listener"]
    assert isinstance(rule, Listener)
    assert learner.learn(stream("binary", 1)[0], [Signal("boundary", "clock", Origin("events", 0, 0))])
    assert rule.heard == ["boundary", "before", "transform", "after"]


def test_what_is_noted_comes_back_with_the_label_and_what_is_recalled_is_served() -> None:
    learner, plain = Learner(with_plugins("Noting")), Learner(config())
    [item] = stream("binary", 1)
    scores = learner.predict(item.ticket.features)
    raw = float(plain.predict(item.ticket.features).output[0])
    assert float(scores.output[0]) == pytest.approx(raw + 1.0)
    assert float(scores.served[0]) == pytest.approx(1.0 / (1.0 + np.exp(-raw - 1.0)), rel=1e-6)
    ticket = item.ticket.__class__("x", 0.0, item.ticket.features, scores, item.ticket.origin)
    assert learner.learn(Outcome(ticket, 1.0, item.fate, 0.0))
    recall = learner.plugins["Noting"]
    assert isinstance(recall, Noting)
    assert recall.heard == [pytest.approx(raw)]


def test_a_refused_step_reaches_no_rule() -> None:
    learner = Learner(with_plugins("Listener", optimizer={"max_grad_norm": 1e-9}))
    rule = learner.plugins["Listener"]
    assert isinstance(rule, Listener)
    assert not learner.learn(stream("binary", 1)[0])
    assert rule.heard == []


def test_objects_of_python_are_plugins_too() -> None:
    by_name = learned(with_plugins("Half"), stream("binary", 8))
    by_object = Learner(config(), plugins=[Half()])
    for item in stream("binary", 8):
        assert by_object.learn(item)
    assert digest(by_object.engine.state_dict()) == digest(by_name.engine.state_dict())


def test_two_of_a_kind_have_two_names() -> None:
    assert list(named([Half(), Half(), HeadOnly(), Half()])) == ["half", "half_2", "head_only", "half_3"]


def test_options_are_checked_and_the_fault_is_named() -> None:
    with pytest.raises(ConfigError, match=r"plugins\.0: loudness: .*greater than 0"):
        with_plugins({"kind": f"{HERE}:Listener", "loudness": -1})
    with pytest.raises(ConfigError, match=r"plugins\.0: lowdness: "):
        with_plugins({"kind": f"{HERE}:Listener", "lowdness": 1})
    with pytest.raises(ConfigError, match=r"plugins\.1: kind 'nothing' is not known"):
        with_plugins("Half", {"kind": "nothing"})


def test_a_configuration_goes_through_json_with_its_plugins() -> None:
    made = with_plugins({"kind": f"{HERE}:Listener", "loudness": 2.5}, "Half")
    again = Config.parse(made.model_dump(mode="json", by_alias=True))
    assert again == made
    assert list(again.settings()) == list(made.settings())


@pytest.mark.parametrize(
    ("kinds", "replay", "text"),
    [
        (["First"], {"retention": "recency"}, "1 of the plugins say who stays"),
        (["Half"], {"retention": "plugin"}, "0 of the plugins say who stays"),
        (["First", "First"], {"retention": "plugin"}, "2 of the plugins say who stays"),
    ],
)
def test_the_memory_has_one_keeper(kinds: list[str], replay: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        with_plugins(*kinds, replay=replay)


def test_deltas_do_not_carry_what_plugins_recall() -> None:
    with pytest.raises(ConfigError, match="snapshots alone"):
        with_plugins("Noting", deltas={"url": "file:///deltas"})


def test_every_preset_is_a_configuration() -> None:
    base = {"name": "t", "task": "multiclass", "events": {"url": "memory://a/b", "label": "y"}}
    base |= {"features": {"n": "numeric"}, "model": {"kind": "mlp", "classes": 3}}
    for name, fragment in plugin.presets().items():
        retention = fragment.get("replay", {}).get("retention", "recency")
        made = Config.parse({**base, "replay": {"retention": retention, "per_event": 2}, "preset": name})
        assert len(made.plugins) >= len(fragment.get("plugins", [])), name
        assert Config.parse(made.model_dump(mode="json", by_alias=True)) == made


def test_what_is_written_goes_before_a_preset_and_its_plugins_follow() -> None:
    kinds = [each["kind"] for each in plugin.presets()["temporal_ensembles"]["plugins"]]
    made = with_plugins("Half", preset="temporal_ensembles")
    assert [each.kind for each in made.plugins] == [*kinds, f"{HERE}:Half"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"preset: 'nobody' is not known; there are .*temporal_ensembles"):
        config(preset="nobody")


def test_a_plugin_that_is_left_out_or_added_at_a_stop_begins_there() -> None:
    items = stream("binary", 20)
    without, with_ = learned(config(), items), learned(with_plugins({"kind": f"{HERE}:Shift"}), items)
    added = Learner(with_plugins({"kind": f"{HERE}:Shift"}))
    added.load_state_dict(without.state_dict())
    own = added.engine.dense.params["plugins.Shift.weight"]
    assert own.item() == 1.0
    left = Learner(config())
    left.load_state_dict(with_.state_dict())
    for learner in (added, left):
        assert learner.learn(items[0])
    for name, param in left.engine.dense.params.items():
        assert param.shape == with_.engine.dense.params[name].shape


GRADS = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)


@settings(deadline=None)
@given(one=GRADS, two=GRADS, seed=st.integers(0, 99))
def test_gradients_add_and_multiply_as_dense_ones_do(one: list[int], two: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def made(touched: list[int]) -> tuple[Grads, Tensor]:
        ids = torch.tensor(sorted(touched))
        grads = Grads(torch.randn(4, generator=rng), ids, torch.randn(len(ids), 3, generator=rng))
        table = torch.zeros(10, 3)
        table[ids] = grads.rows
        return grads, torch.cat((grads.dense, table.reshape(-1)))

    (a, slow_a), (b, slow_b) = made(one), made(two)
    torch.testing.assert_close(a.dot(b), slow_a @ slow_b)
    torch.testing.assert_close(a.norm(), slow_a.norm())
    total = a.plus(b, -0.5)
    table = torch.zeros(10, 3)
    table[total.touched] = total.rows
    torch.testing.assert_close(torch.cat((total.dense, table.reshape(-1))), slow_a - 0.5 * slow_b)


def test_a_step_on_weights_that_are_not_there_says_so() -> None:
    learner = Learner(config())
    ids, weights, dense = as_tensors(*stream("binary", 1)[0].ticket.features)
    with pytest.raises(PluginError, match="no weights 'ema'; there are live"):
        learner.engine.out(learner._rows(ids, weights, dense, torch.ones(1)), "ema")


def test_the_method_of_the_readme_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Decorrelate" in block]
    (tmp_path / "decorrelate.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    kind = {"kind": "decorrelate:Decorrelate", "weight": 0.1}
    checks = {check.name: check for check in plugin_checks()}
    for name in ("resumes_to_the_bit", "off_is_off", "says_finite_things"):
        checks[name](kind)
    plain, with_it = Learner(config()), Learner(config(plugins=[kind], replay={"per_event": 2}))
    for item in stream("binary", 10):
        assert plain.learn(item)
        assert with_it.learn(item)
    assert not torch.equal(plain.engine.dense.flat, with_it.engine.dense.flat)


COMING_AND_GOING = [
    ([], ["upgd"]),
    ([], ["l2_init"]),
    (["ema"], []),
    (["previous"], []),
    (["ewc"], []),
    (["fast_slow"], []),
    (["hold_largest"], []),
    (["tag"], []),
    (["cuber"], []),
]


@pytest.mark.parametrize(("plugins", "rules"), COMING_AND_GOING, ids=str)
def test_what_is_held_of_each_weight_follows_when_a_plugins_parameters_come_or_go(
    plugins: list[str], rules: list[str]
) -> None:
    more: dict[str, Any] = {"plasticity": rules, "optimizer": {"kind": "sgd", "learning_rate": 1e-3}}
    shift = {"kind": f"{HERE}:Shift", "weight": 0.1}
    without, with_it = config(plugins=plugins, **more), config(plugins=[*plugins, shift], **more)
    signals = [Signal("boundary", "clock", Origin("events", 0, 0))]
    for before, after in ((without, with_it), (with_it, without)):
        old, new = Learner(before), Learner(after)
        for n, item in enumerate(stream("binary", 20)):
            assert old.learn(item, signals if n % 7 == 6 else ())
        new.load_state_dict(old.state_dict())
        own = old.engine.dense.params.keys() & new.engine.dense.params.keys()
        for name in own:
            assert torch.equal(old.engine.dense.params[name], new.engine.dense.params[name])
            for key in old.engine.dense.traces:
                mine, theirs = (each.engine.dense.part(each.engine.dense.traces[key], name) for each in (old, new))
                assert torch.equal(mine, theirs), key
        for item in stream("binary", 10, seed=1):
            assert new.learn(item)


def test_a_column_that_is_new_to_a_filled_memory_is_that_of_now() -> None:
    replay = {"retention": "recency", "capacity": 20, "per_event": 2}
    made: dict[str, Any] = {"replay": replay, "model": {"kind": "mlp"}}
    old = learned(config(**made), stream("binary", 30))
    new = Learner(config(plugins=[{"kind": f"{HERE}:Curious"}], **made))
    new.load_state_dict(old.state_dict())
    for row in range(len(new.memory)):
        ids, weights, dense, y = new.memory.examples(torch.tensor([row]))
        out = new.engine.out(new._rows(ids, weights, dense, y))
        np.testing.assert_allclose(new.memory.columns["output"][row], out.output[0].numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.memory.columns["hidden"][row], out.hidden[0].numpy(), rtol=1e-5, atol=1e-6)
        loss = float(new.engine.losses(out.output, y)[0])
        assert new.memory.columns["loss"][row] == pytest.approx(loss, rel=1e-4)
    assert set(new.memory.columns["written"][: len(new.memory)]) == {old.steps}


class Curious(Rule):
    needs = frozenset({"output", "hidden", "loss", "written"})

    class Options(Rule.Options):
        kind: Literal["curious"] = "curious"


class Demanding(Rule):
    needs = frozenset({"blame"})

    class Options(Rule.Options):
        kind: Literal["demanding"] = "demanding"


class Broken(Rule):
    """Makes a gradient that no optimiser could take."""

    class Options(Rule.Options):
        kind: Literal["broken"] = "broken"

    def transform(self, grads: Grads, step: Step) -> Grads:
        return grads.with_dense(grads.dense * float("inf"))


def test_a_column_that_nobody_provides_is_an_error_at_the_start() -> None:
    with pytest.raises(PluginError, match="Demanding needs blame, which nobody provides"):
        Learner(with_plugins("Demanding"))


def test_a_gradient_that_a_rule_has_broken_moves_nothing() -> None:
    learner = Learner(with_plugins("Broken"))
    before = digest(learner.engine.state_dict())
    assert not learner.learn(stream("binary", 1)[0])
    assert digest(learner.engine.state_dict()) == before


def test_a_pass_that_has_nothing_to_learn_is_no_step() -> None:
    made = config(
        plugins=["live_only", {"kind": f"{HERE}:ReplayAlone"}], replay={"retention": "recency", "per_event": 2}
    )
    learner = Learner(made)
    before = learner.engine.dense.flat.clone()
    for item in stream("binary", 4):
        assert learner.learn(item)
    assert torch.equal(learner.engine.dense.flat, before)
    assert learner.steps == 0


def test_an_event_that_is_skipped_is_kept_with_the_loss_of_its_answer() -> None:
    learner = Learner(with_plugins("Half", "Curious", replay={"retention": "recency"}, model={"kind": "mlp"}))
    items = stream("binary", 2)
    assert learner.learn(items[0])
    scores = learner.predict(items[1].ticket.features)
    ticket = items[1].ticket.__class__("x", 1.0, items[1].ticket.features, scores, items[1].ticket.origin)
    assert learner.learn(Outcome(ticket, items[1].label, items[1].fate, 0.0))
    p = float(scores.served[0])
    expected = -np.log(p if items[1].label else 1.0 - p)
    assert learner.memory.columns["loss"][1] == pytest.approx(expected, rel=1e-4)


def test_two_that_would_make_the_same_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="plugins: ema once"):
        config(plugins=[{"kind": "ema", "decay": 0.5}, {"kind": "ema", "decay": 0.9}])
    with pytest.raises(PluginError, match="two of them make the weights 'ema'"):
        Learner(config(plugins=["ema"]), plugins=[plugin.resolve("ema")()])


def test_a_new_option_of_a_plugin_needs_a_new_start() -> None:
    old = config(plugins=[{"kind": "ewc"}]).model_dump(mode="json", by_alias=True)
    assert dict(changes(old, config(plugins=[{"kind": "ewc", "rows": False}])))["plugins.ewc.rows"] == "new"
    assert dict(changes(old, config(plugins=[{"kind": "ewc", "strength": 2.0}, "ema"]))) == {"plugins": "stop"}
