"""The others, on the same events, with the same duties: predict, then learn, one example at a time, one core.

Each returns a `Trace`. Rates count processor seconds of this process, so that a busy machine does not lie.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from river import compose, linear_model, optim, preprocessing

from streamcl.bench.quality import Trace
from streamcl.bench.streams import LABEL, Dataset

VW_BASE = "--loss_function logistic --link logistic -b 20 --quiet"


def vowpal_wabbit_installed() -> bool:
    return importlib.util.find_spec("vowpalwabbit") is not None


def vowpal_wabbit(name: str, data: Dataset, arguments: str = "") -> Trace:
    """VW's Python API: parse a line, predict, learn. `arguments` come after `VW_BASE`."""
    from vowpalwabbit import Workspace

    lines = [vw_line(data.features, payload) for payload in data.payloads]
    vw = Workspace(f"{VW_BASE} {arguments}")
    scores = np.empty(len(lines))
    start = time.process_time()
    for i, line in enumerate(lines):
        example = vw.parse(line)
        scores[i] = vw.predict(example)
        vw.learn(example)
        vw.finish_example(example)
    cpu_s = time.process_time() - start
    vw.finish()
    return Trace(name, scores, cpu_s)


def vw_line(features: Mapping[str, Any], payload: Mapping[str, Any]) -> str:
    """A labelled example in VW's text format, one namespace for each feature, named by its first letter where unique.

    Which row of the 2^20 a value hashes to depends on the namespace's name: collisions move the fourth digit of an AUC.
    """
    parts = [f"|{_namespace(features, name)} {_vw_value(kind, payload.get(name))}" for name, kind in features.items()]
    return " ".join(["1" if payload[LABEL] else "-1", *parts])


def _namespace(features: Mapping[str, Any], name: str) -> str:
    return name[0] if sum(other[0] == name[0] for other in features) == 1 else name


def _vw_value(kind: Any, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{item}:{weight}" for item, weight in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"x:{value}" if kind == "numeric" and value is not None else str(value)


RIVER_OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd .1": lambda: optim.SGD(0.1),
    "ftrl": lambda: optim.FTRLProximal(alpha=0.1, beta=1.0, l1=0.0, l2=1.0),
}


def river_logistic(optimizer: str, data: Dataset) -> Trace:
    """River's LogisticRegression on `{"user=1": 1}` dicts made beforehand; numbers pass its StandardScaler."""
    return river(f"river logistic {optimizer}", data, RIVER_OPTIMIZERS[optimizer]())


def river(name: str, data: Dataset, optimizer: Any, **settings: Any) -> Trace:
    """The same with any optimiser; `settings` are those of River's LogisticRegression."""
    examples = [river_example(data.features, payload) for payload in data.payloads]
    model: Any = linear_model.LogisticRegression(optimizer=optimizer, **settings)
    if numbers := [name for name, kind in data.features.items() if kind == "numeric"]:
        scaled: Any = preprocessing.StandardScaler()
        if len(numbers) < len(data.features):  # a category would be scaled away where it stands: there it is always 1
            own = compose.FuncTransformer(lambda x: {name: x[name] for name in numbers if name in x})
            scaled = (own | scaled) + compose.Discard(*numbers)
        model = compose.Pipeline(scaled, model)
    labels = [bool(payload[LABEL]) for payload in data.payloads]
    scores = np.empty(len(labels))
    start = time.process_time()
    for i, (x, y) in enumerate(zip(examples, labels, strict=True)):
        scores[i] = model.predict_proba_one(x).get(True, 0.5)
        model.learn_one(x, y)
    return Trace(name, scores, time.process_time() - start)


def river_example(features: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, float]:
    """A value of each feature, `name=value`: 1; a number under its name. What is missing is a value, `name=None`."""
    x: dict[str, float] = {}
    for name, kind in features.items():
        value = payload.get(name)
        if kind == "numeric" and value is not None:
            x[name] = float(value)
        elif isinstance(value, Mapping):
            x |= {f"{name}={item}": float(weight) for item, weight in value.items()}
        else:
            x |= {f"{name}={one}": 1.0 for one in (value if isinstance(value, list) else [value])}
    return x


def constant(labels: Sequence[float] | NDArray[np.float64]) -> Trace:
    """The rate of positives so far (with one of each beforehand): what knowing nothing about an event is worth."""
    y = np.asarray(labels, dtype=np.float64)
    before = np.concatenate([[0.0], np.cumsum(y)[:-1]])
    scores = (before + 1) / (np.arange(len(y)) + 2)
    return Trace("constant rate", scores)


def no_change(labels: Sequence[float] | NDArray[np.float64]) -> Trace:
    """The label before, again. Its scores are 0 and 1: judge it by accuracy only."""
    y = np.asarray(labels, dtype=np.float64)
    return Trace("no-change", np.concatenate([[0.0], y[:-1]]))
