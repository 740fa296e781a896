"""Contract checks for plug-ins and models: what each must keep, alone and beside everything else that learns.

A check takes settings, `{"kind": ..., ...}` of a plug-in, `{"model": {"kind": ..., ...}}`, or both, and finds by itself
a task, the retention that the plug-in needs and the plug-ins that provide the weight sets that it reads. Settings of
the `optimizer`, `features`, an `engine` and a `device` may stand there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from streamcl import plugin as points
from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.models import build_model
from streamcl.plugin import Plugin, PluginError
from streamcl.records import Encoded, Selector, mark
from streamcl.state import flatten, unflatten
from streamcl.testing.journey import (
    CLASSES,
    FIELDS,
    NUMBERS,
    Example,
    Journey,
    answers,
    counted,
    examples,
    finite,
    lived,
    loaded,
    sealed,
)
from streamcl.testing.state import check_stateful, claim, claim_same, difference

TASKS = ("multiclass", "binary", "regression")
ROWS = 24

Settings = Mapping[str, Any]
BESIDE: Settings = {
    "error_memory": [{"kind": "knn", "capacity": 16, "key": "hidden"}],
    "plasticity": [{"kind": "continual_backprop", "replacement_rate": 0.05, "maturity": 5}],
    "diagnostics": {"sample_every_steps": 2, "window": 8, "report_every_steps": 5},
}
"""What stands beside a plug-in in its second life: everything that changes weights or scores while it works."""


MODEL: Settings = {"kind": "mlp", "hidden": [8, 6]}
"""What a plug-in works on unless it is told another."""


def host(settings: Settings, beside: bool = False, *, off: bool = False, task: str = "") -> Config:
    """A configuration that the plug-in and the model work in.

    Raises:
        AssertionError: there is none.
    """
    refused = ""
    for each in (task,) if task else TASKS:
        try:
            config = _config(settings, each, beside, off)
            Learner(config)
        except (PluginError, ConfigError) as error:
            refused = str(error)
            continue
        return config
    raise AssertionError(f"broken: {settings} work with some task; the last one: {refused}")


def _config(settings: Settings, task: str, beside: bool, off: bool) -> Config:
    kind = _kind(settings)
    plugins = [*_providers(kind)] + ([_own(settings)] if "kind" in settings else [])
    keeps = any(issubclass(points.resolve(each["kind"]), points.Retention) for each in plugins)
    model = {"embedding_dim": 3, "classes": CLASSES, "init_scale": 0.3, **settings.get("model", MODEL)}
    data: dict[str, Any] = {
        "name": "contract",
        "task": task,
        "events": {"url": "memory://contract/events", "label": "y"},
        "features": {f"c{i}": {"kind": "categorical", "buckets": 20} for i in range(FIELDS)}
        | {f"n{i}": "numeric" for i in range(NUMBERS)}
        | settings.get("features", {}),
        "model": model,
        "optimizer": {"kind": "sgd", "learning_rate": 0.05} | settings.get("optimizer", {}),
        "replay": {"retention": "plugin" if keeps else "recency", "capacity": ROWS, "per_event": 3},
        # Of the one without plug-ins too: they are compared to the bit.
        "worker": {"engine": settings.get("engine", "eager"), "device": settings.get("device", "cpu")},
    }
    data |= {} if off else {"plugins": plugins}
    return Config.parse({**data, **(_beside(data) if beside else {})})


def _beside(data: Settings) -> Settings:
    """A model without hidden layers has no units to reset, and no hidden vector to be a key."""
    config = Config.parse(data)
    model = build_model(config, Featurizer(config).layout)
    by_key = {"error_memory": [{"kind": "key", "key": "c0", "capacity": 16}]}
    if not any(tower.hidden for tower in model.towers):
        return by_key
    return BESIDE if model.tower is not None else {**BESIDE, **by_key}


def _kind(settings: Settings) -> type[Plugin]:
    return points.resolve(settings["kind"]) if "kind" in settings else Plugin


def _own(settings: Settings) -> dict[str, Any]:
    """What the plug-in is told."""
    others = ("model", "optimizer", "features", "engine", "device")
    return {name: value for name, value in settings.items() if name not in others}


def _providers(kind: type[Plugin]) -> list[dict[str, Any]]:
    """Built-in plug-ins that make the weight sets that this one reads."""
    found = {name: each for each, made in points.builtin().items() for name in made.provides if made is not kind}
    wanted = {found[name] for name in sorted(kind.needs - kind.provides) if name in found}
    return [{"kind": each} for each in sorted(wanted)]


class PluginCheck(NamedTuple):
    """A promise, and how it is checked."""

    name: str
    check: Callable[[Settings], None]

    def __call__(self, settings: Settings) -> None:
        self.check(settings)

    def __str__(self) -> str:
        return self.name


def resumes_to_the_bit(settings: Settings) -> None:
    """Saved after any event and loaded into a used learner, it goes on to the same bytes and the same answers."""
    for beside in (False, True):
        config = host(settings, beside)
        stream = examples(config.task, 45)

        def exercise(journey: Journey, step: int, stream: Sequence[Example] = stream) -> Any:
            scores = [journey.take(stream[n], n) for n in range(step * 15, step * 15 + 15)]
            return [score.served for score in scores]

        check_stateful(lambda config=config: Journey(config, delay=3), exercise, steps=3)  # type: ignore[misc]


def is_a_pure_function(settings: Settings) -> None:
    """The same configuration, seed and events give the same bytes; no clock and no global generator is asked."""
    config = host(settings, beside=True)
    lived(Journey(config), examples(config.task, 10))  # what is imported or compiled at first use may read a clock
    with sealed():
        one, two = (lived(Journey(config), examples(config.task, 60)).state_dict() for _ in range(2))
    claim_same(difference(one, two), "the same events give the same state")


def keeps_the_order(settings: Settings) -> None:
    """A label changes no answer that was given before it, and no event is replayed to itself."""
    config = host(settings)
    stream = examples(config.task, 50)
    told = [answers(Journey(config), stream)]
    for at in (20, 41):
        label = 1.0 - stream[at].label if config.task == "binary" else (stream[at].label + 1.0) % CLASSES
        told.append(answers(Journey(config), [*stream[:at], stream[at]._replace(label=label), *stream[at + 1 :]]))
        claim_same(difference(told[0][: at + 1], told[-1][: at + 1]), f"label {at} changes no answer before it")
    _watch_draws(Journey(config), stream)


def _watch_draws(journey: Journey, stream: Sequence[Example]) -> None:
    memory, drawn = journey.learner.memory, list[NDArray[np.float32]]()
    read = memory.examples

    def watching(index: torch.Tensor) -> Any:
        rows = read(index)
        drawn.append(rows[2].numpy()[:, :NUMBERS])  # behind them a recurrent model has the key's state
        return rows

    memory.examples = watching  # type: ignore[method-assign]
    for n, example in enumerate(stream):
        drawn.clear()
        journey.take(example, n)
        claim(not any((rows == example.features.dense).all(1).any() for rows in drawn), "no event replays itself")


def takes_late_labels(settings: Settings) -> None:
    """Labels at once, 7 events late and never; a closing window is a negative or nothing."""
    for delay, on_close in ((0, "drop"), (7, "drop"), (None, "negative"), (None, "drop")):
        config = host(settings)
        journey = lived(Journey(config, delay, on_close), examples(config.task, 60))
        learned = {0: 60, 7: 53}.get(60 if delay is None else delay, 53 if on_close == "negative" else 0)
        claim(journey.learner.version == learned, f"of labels {delay} late, {on_close}, {learned} are learned")
        finite(journey.learner.state_dict(), f"labels {delay} late, {on_close}")


def needs_no_ids(settings: Settings) -> None:
    """It runs when nobody names a segment, with boundaries from elsewhere and without any."""
    for boundaries in (0, 7):
        config = host(settings)
        journey = lived(Journey(config, boundaries=boundaries), examples(config.task, 60))
        claim(journey.learner.version == 60, "every event is learned")


def forgets(settings: Settings) -> None:
    """Of a key that is forgotten no row and no mark is held, whatever has been learned of it in the weights."""
    for beside in (False, True):
        config = host(settings, beside)
        stream = examples(config.task, 80)
        learner = lived(Journey(config), stream).learner
        learner.forget(Selector(key="key-2"))
        theirs = [example for example in stream if example.key == "key-2"]
        _claim_no_trace(learner, theirs)
        _claim_no_trace(loaded(config, learner.state_dict()), theirs)
        journey = Journey(config)
        journey.learner = learner
        for n, example in enumerate(examples(config.task, 40, seed=1)):
            journey.take(example, 80 + n)


def _claim_no_trace(learner: Learner, theirs: Sequence[Example]) -> None:
    state = {name: part for name, part in learner.state_dict().items() if name not in ("engine", "numerics", "target")}
    numbers = {value.tobytes() for example in theirs for value in example.features.dense}
    marks = {mark("key-2")}
    for path, array in flatten(state)[1].items():
        values = np.asarray(array)
        if values.dtype == np.float32:
            found = sum(value.tobytes() in numbers for value in values.reshape(-1))
            claim(not found, f"{path} holds {found} numbers of a forgotten key")
        if values.dtype == np.int64:
            claim(not set(values.reshape(-1).tolist()) & marks, f"{path} holds the mark of a forgotten key")


def is_bounded(settings: Settings) -> None:
    """What it holds and what it does for an event are the same after 200 events as after 80: counted, not timed."""
    config = host(settings)
    journey = Journey(config)
    stream = examples(config.task, 240)
    held, calls = [], []
    for start, end in ((0, 80), (80, 120), (120, 200), (200, 240)):
        with counted() as count:
            for n in range(start, end):
                journey.take(stream[n], n)
        held.append(sum(np.asarray(array).nbytes for array in flatten(journey.learner.state_dict())[1].values()))
        calls.append(count[0] / (end - start))
    claim(held[3] <= 1.02 * held[1] + 64, f"what it holds is bounded: {held[1]} bytes, later {held[3]}")
    claim(
        calls[3] <= 1.15 * calls[1] + 5, f"what it does is bounded: {calls[1]:.0f} calls an event, later {calls[3]:.0f}"
    )


def off_is_off(settings: Settings) -> None:
    """With weight 0 the learner is what it is without the plug-in, to the bit; for those that have a weight."""
    kind = _kind(settings)
    if "weight" not in kind.Options.model_fields or issubclass(kind, points.Retention | points.Draw | points.Recall):
        return
    config = host(settings)
    without = host(settings, off=True, task=config.task)
    stream = examples(config.task, 60)
    weightless = host({**settings, "weight": 0.0}, task=config.task)
    states = [lived(Journey(each), stream).learner.state_dict() for each in (weightless, without)]
    for name in ("numerics", "version"):
        claim_same(difference(states[0][name], states[1][name]), "weight 0 is off")
    own = states[0]["engine"]["params"].keys() - states[1]["engine"]["params"].keys()
    for name, value in states[1]["engine"]["params"].items():
        claim_same(difference(states[0]["engine"]["params"][name], value), f"weight 0 leaves {name} as it is")
    claim(all(name.startswith("plugins.") for name in own), "its parameters are its own")
    claim_same(difference(states[0]["engine"]["table"], states[1]["engine"]["table"]), "weight 0 leaves the table")


def stays_finite(settings: Settings) -> None:
    """Labels that are not finite, and features that are huge or missing, leave nothing that is not finite behind."""
    config = host(settings, beside=True)
    stream = examples(config.task, 60)
    broken = Encoded(stream[0].features.ids, np.ones(FIELDS, np.float32), np.array([np.nan, 3e38, -3e38], np.float32))
    labels = [np.nan, np.inf, -np.inf] + ([3e38] if config.task == "regression" else [])
    journey = Journey(config)
    for n, example in enumerate(stream):
        journey.take(example, n)
        if n % 10 == 9:
            before = journey.learner.version
            for label in labels:
                journey.take(Example(broken, label, "key-9"), 1000 + n)
                journey.take(Example(example.features, label, "key-9"), 2000 + n)
            claim(config.task == "regression" or journey.learner.version == before, "no such label is learned")
            journey.take(Example(broken, example.label, "key-9"), 3000 + n)
    finite(journey.learner.state_dict(), "what is broken leaves no trace")


def declares_what_it_reads(settings: Settings) -> None:
    """It makes the weight sets that it says it provides, and the memory holds no column that nobody asked for."""
    config = host(settings)
    kind = _kind(settings)
    learner = Learner(config)
    providers = frozenset[str]().union(*(points.resolve(each["kind"]).provides for each in _providers(kind)))
    claim(
        set(learner.engine.sets) <= providers | kind.provides, f"weight sets {sorted(learner.engine.sets)} are declared"
    )
    asked = frozenset[str]().union(*(each.needs for each in learner.plugins.values()))
    shape = points.Shape(config.outputs, learner.engine.widths[1])
    own = {name for each in learner.plugins.values() for name in each.columns(shape)}
    claim(set(learner.memory.columns) <= asked | own, "columns are declared")
    known = {*learner.memory.columns, "key", "time_s", *learner.engine.sets, "live"}
    claim(kind.needs <= known | set(COLUMN_NAMES), f"{sorted(kind.needs - known)} are there to be read")


def has_a_plain_snapshot(settings: Settings) -> None:
    """Its state is tensors, arrays and JSON; an empty one means that it begins here."""
    config = host(settings)
    learner = lived(Journey(config), examples(config.task, 40)).learner
    again = loaded(config, unflatten(*flatten(learner.state_dict())))
    claim_same(difference(again.state_dict(), learner.state_dict()), "a state that went through a file is the same")
    bare = learner.state_dict()
    bare.pop("plugins", None)
    begun = loaded(config, bare)
    for n, example in enumerate(examples(config.task, 30, seed=3)):
        begun.predict(example.features)
        journey = Journey(config)
        journey.learner = begun
        journey.take(example, n)


def says_finite_things(settings: Settings) -> None:
    """Its readings are finite, their names do not change from event to event, and hold no ids."""
    config = host(settings)
    journey = Journey(config)
    names = set[str]()
    for n, example in enumerate(examples(config.task, 60)):
        journey.take(example, n)
        read = {name: value for each in journey.learner.plugins.values() for name, value in each.read().items()}
        claim(all(np.isfinite(value) for value in read.values()), f"readings are finite: {read}")
        claim(
            all(name.replace("_", "").isalnum() and name == name.lower() for name in read), f"names are plain: {read}"
        )
        names |= read.keys()
    claim(len(names) <= 64, f"readings are few: {len(names)}")


def answers_many_as_it_answers_one(settings: Settings) -> None:
    """A batch of events is answered as each of them is, up to the rounding of a matrix product of another height."""
    config = host(settings)
    learner = lived(Journey(config), examples(config.task, 40)).learner
    asked = [example.features for example in examples(config.task, 9, seed=2)]
    for many, features in zip(learner.predict_many(asked), asked, strict=True):
        one = learner.predict(features)
        claim(bool(np.allclose(many.served, one.served, rtol=1e-4, atol=1e-5)), "a batch says what single ones do")
        claim(many.notes.keys() == one.notes.keys(), "a batch notes what single ones do")


COLUMN_NAMES = ("output", "hidden", "loss", "hits", "written", "last_seen", "key", "time_s")

OF_MODELS = (
    *(resumes_to_the_bit, is_a_pure_function, keeps_the_order, takes_late_labels, needs_no_ids, forgets, is_bounded),
    *(stays_finite, has_a_plain_snapshot, answers_many_as_it_answers_one),
)

CHECKS = (
    *(resumes_to_the_bit, is_a_pure_function, keeps_the_order, takes_late_labels, needs_no_ids, forgets, is_bounded),
    *(off_is_off, stays_finite, declares_what_it_reads, has_a_plain_snapshot, says_finite_things),
    answers_many_as_it_answers_one,
)


def plugin_checks() -> list[PluginCheck]:
    """All of them, to be run one by one; each takes a plug-in's settings."""
    return [PluginCheck(check.__name__, check) for check in CHECKS]


def model_checks() -> list[PluginCheck]:
    """Those that say something of a model without a plug-in; each takes `{"model": {"kind": ..., ...}}`."""
    return [PluginCheck(check.__name__, check) for check in OF_MODELS]
