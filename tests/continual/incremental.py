"""Classes that come two at a time, and losses of plug-ins beside the same written out on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.plugin import Plan, Step
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Signal, Ticket
from streamcl.state import digest, flatten, unflatten

NUMBERS, CLASSES = 5, 4
FEATURES = {f"x{i}": {"kind": "numeric", "scale": "none"} for i in range(NUMBERS)}
BOUNDARY = Signal("boundary", "segment", Origin(EVENTS, 0, 0))

Params = Mapping[str, Tensor]
Plugins = Sequence[str | dict[str, Any]]


class Event(NamedTuple):
    features: Encoded
    label: float


def config(plugins: Plugins = (), task: str = "multiclass", **more: Any) -> Config:
    base = {
        "name": "t",
        "task": task,
        "events": {"url": "memory://a/b", "label": "y"},
        "features": FEATURES,
        "model": {"kind": "mlp", "hidden": [6, 5], "classes": CLASSES},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        "replay": {"retention": "reservoir", "capacity": 12, "per_event": 4, "weight": 0.75},
        "plugins": plugins,
        "worker": {"engine": "eager"},  # without plug-ins too: bits are compared
    }
    return Config.parse({**base, **more})


def events(count: int, seed: int = 0, task: str = "multiclass") -> list[Event]:
    """Classes 0 and 1 in the first half, 2 and 3 in the second; each lies about a middle of its own."""
    middles = np.random.default_rng(77).normal(size=(CLASSES, NUMBERS)) * 2.0
    rng, featurizer, found = np.random.default_rng(seed), Featurizer(config()), []
    for i in range(count):
        label = int(rng.integers(2)) + (2 if 2 * i >= count else 0)
        x = middles[label] + 0.7 * rng.normal(size=NUMBERS)
        features = featurizer.encode({f"x{n}": float(x[n]) for n in range(NUMBERS)})
        found.append(Event(features, float(label % 2 if task == "binary" else label)))
    return found


def outcome(learner: Learner, event: Event, number: int) -> Outcome:
    scores = learner.predict(event.features)
    ticket = Ticket(str(number), float(number), event.features, scores, Origin(EVENTS, 0, number), key=f"k{number % 3}")
    return Outcome(ticket, event.label, Fate.JOINED, 0.0)


def teach(learner: Learner, stream: Sequence[Event], boundary: int | None = None, first: int = 0) -> Learner:
    """Each is answered, then learned; a boundary is told with event number `boundary`."""
    for number, event in enumerate(stream, first):
        assert learner.learn(outcome(learner, event, number), [BOUNDARY] if number == boundary else [])
    return learner


def accuracy(learner: Learner, stream: Sequence[Event], labels: Sequence[int]) -> float:
    asked = [event for event in stream if event.label in labels]
    scores = learner.predict_many([event.features for event in asked])
    return float(np.mean([s.served.argmax() == e.label for s, e in zip(scores, asked, strict=True)]))


def assert_resumes(made: Config, count: int = 24, task: str = "multiclass") -> None:
    """A state that is saved before any eighth event, and loaded into a used learner, goes on to the same bytes."""
    stream = events(count, 1, task)
    whole = teach(Learner(made), stream, count // 2)
    for cut in range(0, count, 8):
        part = teach(Learner(made), stream[:cut], count // 2)
        used = teach(Learner(made), events(9, 5, task), 4)
        used.load_state_dict(unflatten(*flatten(part.state_dict())))
        teach(used, stream[cut:], count // 2, cut)
        assert digest(used.state_dict()) == digest(whole.state_dict())


class Case(NamedTuple):
    """One step that is about to be taken, on plain tensors: the live row first."""

    x: Tensor  # (1 + n, N)
    y: Tensor  # (1 + n,)
    params: Params
    previous: Params
    stored: dict[str, Tensor]  # columns, (n, ...)
    share: Tensor


def net(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, O) outputs and (B, H) what entered the last layer, of a model of two hidden layers."""
    return layers(params, x)[2], layers(params, x)[1]


def layers(params: Params, x: Tensor) -> list[Tensor]:
    first = (x @ params["hidden.0.weight"].T + params["hidden.0.bias"]).clamp_min(0.0)
    second = (first @ params["hidden.1.weight"].T + params["hidden.1.bias"]).clamp_min(0.0)
    return [first, second, second @ params["head.weight"].T + params["head.bias"]]


def assert_loss(
    made: Config, oracle: Callable[[Case], Tensor], count: int = 22, replayed: int = 4, boundary: int | None = 11
) -> float:
    """What the engine pulls down in one more step, and its gradient, are the oracle's; returns the loss."""
    stream = events(count, 3, made.task)
    learner = teach(Learner(made), stream[:-1], boundary)
    step = learner.step_of(outcome(learner, stream[-1], count), Plan(draw=replayed), replayed)
    assert step is not None
    step.engine = engine = learner.engine
    loss, rows = engine._loss(step)
    found = engine._grads(loss, rows, step.rows.ids, step.touched).dense
    case = _case(learner, step)
    expected = oracle(case)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    by_param = torch.autograd.grad(expected, list(case.params.values()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, engine.dense.gradient(by_param), rtol=1e-3, atol=1e-5)
    assert found.abs().max() > 0.0 or float(loss) == 0.0
    return float(loss)


def _case(learner: Learner, step: Step) -> Case:
    params = {name: value.detach().clone().requires_grad_() for name, value in learner.engine.dense.params.items()}
    held = learner.engine.sets.get("previous")
    previous = {name: value.clone() for name, value in held.params().items()} if held else {}
    return Case(step.rows.dense, step.rows.y, params, previous, dict(step.columns), step.share)


def task_loss(case: Case) -> Tensor:
    """Cross-entropy of the live row, and the replayed ones' by their share."""
    losses = [
        -torch.log_softmax(net(case.params, x[None])[0][0], 0)[int(y)] for x, y in zip(case.x, case.y, strict=True)
    ]
    return sum((loss * share for loss, share in zip(losses, case.share, strict=True)), torch.zeros(()))


def smooth(vector: Tensor) -> Tensor:
    """A direction that is defined at 0."""
    return vector / (vector.dot(vector) + 0.01) ** 0.5


def named(value: object) -> str:
    """Of a case, the same in every process."""
    return "by_hand" if callable(value) else str(value)[:60]
