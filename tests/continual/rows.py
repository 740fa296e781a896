"""A memory with rows of known columns, for methods that score and draw them."""

from typing import Any

import numpy as np
from msgspec.structs import replace

from streamcl.config import Config
from streamcl.learner import Learner
from streamcl.plugin import Plugin
from streamcl.records import EVENTS, Origin, Outcome, Signal
from streamcl.state import digest, flatten, unflatten
from tests import test_learner
from tests.test_learner import stream

BOUNDARY = Signal("boundary", "segment", Origin(EVENTS, 0, 0))


def config(task: str = "binary", **more: Any) -> Config:
    """Of the eager engine, with plug-ins and without: bits are compared."""
    return test_learner.config(task, **{"worker": {"engine": "eager"}, **more})


def made(plugins: list[Any], retention: str = "recency", task: str = "multiclass", **replay: Any) -> Any:
    """A configuration of these plug-ins, 20 rows and 4 replayed per event unless said otherwise."""
    settings = {"retention": retention, "capacity": 20, "per_event": 4, **replay}
    return config(task, replay=settings, plugins=plugins, model={"hidden": [6]})


def held(plugins: list[Any], size: int = 20, retention: str = "recency", **columns: Any) -> tuple[Plugin, Learner]:
    """The last of the plug-ins, and its learner, whose memory holds `size` rows with these columns."""
    learner = _passed(Learner(made(plugins, retention, capacity=size)), stream("multiclass", size + 5), 0, False)
    for name, values in columns.items():
        learner.memory.columns[name][:size] = values
    return list(learner.plugins.values())[-1], learner


def resumes(plugins: list[Any], retention: str = "recency", task: str = "multiclass", cut: int = 30) -> bool:
    """Saved in the middle of a stream and loaded into a used learner, it goes on to the bit."""
    one, outcomes = made(plugins, retention, task), stream(task, 45)
    whole = _passed(Learner(one), outcomes)
    saved = unflatten(*flatten(_passed(Learner(one), outcomes[:cut]).state_dict()))
    used = _passed(Learner(one), outcomes[7:20])
    used.load_state_dict(saved)
    return digest(_passed(used, outcomes[cut:], cut).state_dict()) == digest(whole.state_dict())


def _passed(learner: Learner, outcomes: list[Outcome], start: int = 0, boundaries: bool = True) -> Learner:
    for number, item in enumerate(outcomes, start):
        assert learner.learn(answered(learner, item), [BOUNDARY] if boundaries and number % 12 == 11 else [])
    return learner


def answered(learner: Learner, item: Outcome) -> Outcome:
    """The outcome with what the learner says of it now on its ticket."""
    return replace(item, ticket=replace(item.ticket, scores=learner.predict(item.ticket.features)))


def chi_square(counts: Any, chances: Any) -> float:
    """Over its degrees of freedom: mean 1, deviation sqrt(2 / degrees)."""
    counts, chances = np.asarray(counts, np.float64), np.asarray(chances, np.float64)
    expected = counts.sum() * chances
    return float((((counts - expected) ** 2) / expected).sum() / (len(counts) - 1))


def bound(cells: int) -> float:
    """Of `chi_square`: five deviations above its mean."""
    return 1.0 + 5.0 * float(np.sqrt(2.0 / (cells - 1)))
