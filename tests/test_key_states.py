from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl.config import Config, ConfigError
from streamcl.engine.eager import as_tensors
from streamcl.features import Featurizer
from streamcl.key_states import KeyStates
from streamcl.learner import Learner
from streamcl.models.key_state import KeyStateModel
from streamcl.records import EVENTS, Event, Fate, Origin, Outcome, Selector, Ticket
from streamcl.state import digest

CELLS = [("min_gru", "exact"), ("min_lstm", "fixed"), ("lssl", "exact"), ("retnet", "detached"), ("legs", "detached")]


def states(capacity: int = 3, width: int = 2) -> KeyStates:
    return KeyStates(capacity, np.array([*[0.5] * (width - 1), 1.0], np.float32), 2.0)


def test_a_key_brings_what_it_took_along_and_the_time_since() -> None:
    held = states()
    assert held.before("a", 10.0).tolist() == [0.5, 1.0]
    held.write("a", 10.0, np.array([7.0], np.float32))
    assert held.before("a", 13.0).tolist() == [7.0, 1.5]
    assert held.before("a", 9.0).tolist() == [7.0, 0.0]


def test_the_key_seen_longest_ago_gives_way() -> None:
    held = states(capacity=2)
    for n, key in enumerate("abac"):
        held.write(key, float(n), np.array([n], np.float32))
    assert list(held.slots) == ["a", "c"]
    assert held.before("b", 9.0).tolist() == [0.5, 1.0]


def test_a_state_that_is_not_finite_begins_anew() -> None:
    held = states()
    held.write("a", 1.0, np.array([np.nan], np.float32))
    assert held.before("a", 1.0).tolist() == [0.5, 0.0]


class Slow:
    """The same by lists."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[tuple[str, float]] = []

    def write(self, key: str, value: float) -> None:
        self.held = [*((k, v) for k, v in self.held if k != key), (key, value)][-self.capacity :]


@settings(deadline=None)
@given(
    capacity=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40),
    cut=st.integers(0, 40),
)
def test_it_holds_what_a_list_would_through_forgetting_and_restarts(
    capacity: int, steps: list[tuple[str, bool]], cut: int
) -> None:
    held, slow = states(capacity), Slow(capacity)
    for n, (key, forget) in enumerate(steps):
        if n == cut:
            again = states(capacity)
            again.load_state_dict(held.state_dict())
            assert digest(again.state_dict()) == digest(held.state_dict())
            held = again
        if forget:
            assert held.forget(Selector(key=key)) == sum(k == key for k, _ in slow.held)
            slow.held = [(k, v) for k, v in slow.held if k != key]
        else:
            held.write(key, float(n), np.array([n], np.float32))
            slow.write(key, float(n))
        assert [(k, float(held.before(k, 0.0)[0])) for k in held.slots] == slow.held


def config(cell: str = "min_gru", credit: str = "exact", **more: Any) -> Config:
    recurrent = {"cell": cell, "units": 4, "credit": credit, **more.pop("recurrent", {})}
    model = {"kind": "recurrent", "embedding_dim": 8, "hidden": [6], "recurrent": recurrent, "init_scale": 0.3}
    base = {"name": "t", "events": {"url": "memory://a/b", "label": "y"}, "model": model}
    return Config.parse({**base, "features": {"item": {"kind": "categorical", "buckets": 9}, "n": "numeric"}, **more})


def events(made: Config, count: int, seed: int = 0) -> list[tuple[Event, float]]:
    """The label is whether the user's number before was positive: only a memory can tell."""
    rng, encoder = np.random.default_rng(seed), Featurizer(made)
    last: dict[str, float] = {}
    found = []
    for i in range(count):
        user, number = f"u{rng.integers(3)}", float(rng.choice([-1.0, 1.0]))
        features = encoder.encode({"item": int(rng.integers(6)), "n": number})
        found.append((Event(str(i), user, float(i), features, Origin(EVENTS, 0, i)), float(last.get(user, 0.0) > 0.0)))
        last[user] = number
    return found


def live(learner: Learner, stream: list[tuple[Event, float]]) -> list[float]:
    served = []
    for event, label in stream:
        features, scores = learner.answer(event)
        ticket = Ticket(event.id, event.time_s, features, scores, event.origin, key=event.key)
        assert learner.learn(Outcome(ticket, label, Fate.INLINE, 0.0))
        served.append(float(scores.served[0]))
    return served


@pytest.mark.parametrize(("cell", "credit"), CELLS)
def test_a_restored_learner_goes_on_to_the_bit(cell: str, credit: str) -> None:
    made = config(cell, credit, replay={"retention": "reservoir", "capacity": 20, "per_event": 2})
    stream = events(made, 40)
    whole, other = Learner(made), Learner(made)
    live(whole, stream[:20])
    live(other, stream[5:17])
    other.load_state_dict(whole.state_dict())
    assert live(whole, stream[20:]) == live(other, stream[20:])
    assert digest(whole.state_dict()) == digest(other.state_dict())


@pytest.mark.parametrize(("cell", "credit"), CELLS)
def test_the_state_that_a_key_brings_is_what_its_own_events_made(cell: str, credit: str) -> None:
    """Others' events between them change nothing, as long as weights stand still."""
    made = config(cell, credit)
    alone, among = Learner(made), Learner(made)
    stream = events(made, 30)
    mine = [alone.answer(event)[0].dense for event, _ in stream if event.key == "u1"]
    theirs = [(event.key, among.answer(event)[0].dense) for event, _ in stream]
    for one, two in zip(mine, [dense for key, dense in theirs if key == "u1"], strict=True):
        np.testing.assert_array_equal(one, two)


def test_exact_credit_is_that_of_the_whole_past() -> None:
    """The gradient of one event's loss equals that of a net unrolled over all events of the key."""
    made = config(optimizer={"kind": "sgd"})
    learner, stream = Learner(made), [each for each in events(made, 60) if each[0].key == "u0"]
    engine = learner.engine
    assert isinstance(engine.model, KeyStateModel)
    asked = [learner.answer(event)[0] for event, _ in stream]
    rows = learner._rows(*as_tensors(*asked[-1]), torch.ones(1))  # type: ignore[call-arg]
    traced = engine.gradient(rows).dense

    model, params = engine.model, engine.dense.params
    state = model.unpack(model.initial()[None, :])
    cell: Any = model.cell.cell
    for features in asked:
        ids, weights, dense = as_tensors(*features)
        _, vectors = engine._pooled(engine.table[ids], weights)
        numbers = learner.read_numbers(dense)[:, : learner.numbers]
        x = torch.cat((vectors.flatten(1), numbers), 1)
        h, state = cell.step(x, {"s": state["s"]})
    output = model.deep(vectors[:, :, :0], vectors, torch.cat((numbers, h), 1))
    loss = engine.losses(output, torch.ones(1)).mean()
    unrolled = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(params.values()))])
    torch.testing.assert_close(traced, unrolled, rtol=1e-4, atol=1e-6)


def test_it_learns_what_only_a_memory_can_tell() -> None:
    made = config(optimizer={"kind": "adam", "learning_rate": 0.01}, recurrent={"units": 8, "horizon": 4.0})
    stream = events(made, 900)
    served, labels = live(Learner(made), stream), [label for _, label in stream]
    hits = np.mean([(p > 0.5) == (y > 0.5) for p, y in zip(served[-200:], labels[-200:], strict=True)])
    assert hits > 0.85  # a model of the event alone is right for one in two


def test_without_its_key_an_event_is_that_of_a_new_key() -> None:
    made = config()
    learner = Learner(made)
    [(event, _)] = events(made, 1)
    features, scores = learner.answer(event)
    assert learner.predict(event.features).served.tolist() == scores.served.tolist()
    assert len(features.dense) == learner.width


def test_a_forgotten_key_begins_anew() -> None:
    made = config()
    learner, stream = Learner(made), events(made, 20)
    fresh = learner.answer(stream[0][0])[0].dense
    live(learner, stream)
    assert learner.forget(Selector(key=stream[0][0].key))["key_states"] == 1
    np.testing.assert_array_equal(learner.answer(stream[0][0])[0].dense[1:], fresh[1:])


@pytest.mark.parametrize("field", ["deltas", "outcomes"])
def test_replicas_are_not_told_of_states(field: str) -> None:
    more: dict[str, Any] = {"deltas": {"url": "file:///d"}, "outcomes": "memory://a/o"}
    with pytest.raises(ConfigError, match="stays in the worker"):
        config(**{field: more[field]})


def test_a_cell_without_traces_says_so() -> None:
    with pytest.raises(ConfigError, match="retnet is no element-wise recurrence; set detached"):
        config("retnet", "exact")


def test_the_state_that_a_key_takes_along_is_that_of_the_live_weights() -> None:
    plain = config(optimizer={"kind": "sgd", "learning_rate": 0.5})
    served = config(optimizer={"kind": "sgd", "learning_rate": 0.5}, plugins=["ema", "served"])
    one, two = Learner(plain), Learner(served)
    stream = events(plain, 12)
    for event, label in stream:
        for learner in (one, two):
            features, scores = learner.answer(event)
            ticket = Ticket(event.id, event.time_s, features, scores, event.origin, key=event.key)
            assert learner.learn(Outcome(ticket, label, Fate.INLINE, 0.0))
    assert one.states is not None
    assert two.states is not None
    assert digest(one.states.state_dict()) == digest(two.states.state_dict())


def test_forgetting_an_event_leaves_none_of_it_in_later_states() -> None:
    made = config(replay={"retention": "recency", "capacity": 50})
    learner, stream = Learner(made), events(made, 30)
    live(learner, stream)
    assert learner.states is not None
    initial = learner.states.initial
    assert learner.forget(Selector(ids=frozenset({"0"})))["replay"] == 1
    held = learner.memory.dense[: len(learner.memory), learner.numbers :]
    assert len(held) == 29
    np.testing.assert_array_equal(held, np.broadcast_to(initial, held.shape))
    restated = learner.restated(Selector(ids=frozenset({"0"})))
    assert restated is not None
    features = learner.answer(stream[3][0])[0]
    np.testing.assert_array_equal(restated(features.dense)[learner.numbers :], initial)
    assert learner.restated(Selector(key="u1")) is None
