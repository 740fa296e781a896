"""`bench worker --task clicks`: events a second of a worker that learns, from the record's bytes to the sent answer.

The same worker, connector, codec and metrics with three ways to compute a step: the fused engine, the eager one, and
plain torch (see `step_plain`), which anybody might write. Beside them others' models on the same bytes, with the same
duties: decode, predict, learn, encode.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import orjson
from river import linear_model

from streamcl import connect, garbage
from streamcl.bench import peers, step_plain
from streamcl.bench.clock import Clock, Taken, timed
from streamcl.bench.report import Bar, Row, progress
from streamcl.bench.step_feed import ON, REPLAYED, Stream
from streamcl.bench.step_plain import DIM, FIELDS, HIDDEN
from streamcl.bench.streams import LABEL
from streamcl.config import Config
from streamcl.protocols import State
from streamcl.records import Encoded, Event, Message, Outcome, Scores, Signal
from streamcl.worker import Worker, build

NOTES = (
    f"clicks: {FIELDS} categories x {DIM} -> {' -> '.join(map(str, HIDDEN))} -> 1, Adagrad, label inside the event, one"
    " partition in memory, answers to a sink that counts and forgets them; cpu_us_per_event: of one thread, from the"
    " first record polled to the last answer sent; ratios: median over rounds of the quotient within a round",
    "plain torch: the same worker, whose learner is an nn.Module and autograd (bench/step_plain.py)",
    "stages: of the fused worker, each timed around its calls, which costs tenths of a microsecond a call",
)

_names = itertools.count()


class Drain:
    """A sink that counts what it is sent and forgets it, as a producer does once a broker has it.

    On a broker in this process the answers of all rounds would pile up, and every later round be a third slower for it.
    """

    def __init__(self) -> None:
        self.count = self.bytes = 0
        self.rejected: Callable[[Message, str], None] | None = None  # nothing is

    def send(self, messages: Sequence[Message]) -> None:
        self.count += len(messages)
        self.bytes += sum(len(message.value or b"") for message in messages)

    def flush(self) -> None:
        """There is nothing on its way."""

    def close(self) -> None:
        """There is nothing to close."""


class PlainLearner:
    """Stands in a worker; see `step_plain.Torch`."""

    def __init__(self, replay: int) -> None:
        self.model = step_plain.Torch(replay, renewing=replay > 0)
        self.version = 0

    def answer(self, event: Event) -> tuple[Encoded, Scores]:
        served = np.array([self.model.predict(self._rows(event.features))], np.float32)
        return event.features, Scores(served, served, self.version)

    def learn(self, outcome: Outcome, _signals: Sequence[Signal] = ()) -> bool:
        self.model.learn(self._rows(outcome.ticket.features), outcome.label)
        self.version += 1
        return True

    def _rows(self, features: Encoded) -> step_plain.Ids:
        rows: step_plain.Ids = features.ids % step_plain.ROWS
        return rows

    def read(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        """There is none."""


def measure(quick: bool, names: Sequence[str] = ()) -> tuple[list[Row], list[Bar]]:
    """Rows and bars; without names all contenders."""
    count, rounds = (6_000, 3) if quick else (30_000, 5)
    stage = Clicks(count)
    passes: dict[str, tuple[Callable[[int], Taken], int]] = {}
    for name, settings in (("no replay", {}), (f"{REPLAYED} rows and cbp", ON)):
        few = count // 6
        passes |= {
            f"{name}: plain torch": (partial(stage.worker, "eager", settings, plain=True), few),
            f"{name}: streamcl eager": (partial(stage.worker, "eager", settings), few),
            f"{name}: streamcl fused": (partial(stage.worker, "fused", settings), count),
        }
    passes |= {"river logistic regression": (stage.river, count // 3)}
    if peers.vowpal_wabbit_installed():
        passes |= {"vowpal wabbit, python": (stage.vowpal_wabbit, count)}
    taken: dict[str, list[float]] = {name: [] for name in passes if not names or name in names}
    for number in range(rounds):
        progress(f"clicks, round {number + 1} of {rounds}")
        for name, times in taken.items():
            run_pass, n = passes[name]
            times.append(run_pass(n).cpu_s / n)
    cost = {name: statistics.median(times) for name, times in taken.items()}
    rows = [
        Row(f"clicks, {name}", {"cpu_us_per_event": 1e6 * s, "events_per_s": 1.0 / s}, table="clicks")
        for name, s in cost.items()
    ]
    rows += [Row(f"stage, {name}", {"us_per_event": us}, table="stages") for name, us in stage.stages(count).items()]
    limits = {"no replay": 20.0, f"{REPLAYED} rows and cbp": 7.0}
    pairs = {name: (taken[f"{name}: plain torch"], taken[f"{name}: streamcl fused"]) for name in limits}
    return rows, [
        Bar(
            f"clicks, {name}: streamcl fused / plain torch",
            statistics.median(b / a for b, a in zip(*pairs[name], strict=True)),
            limit,
        )
        for name, limit in limits.items()
    ]


def _in_memory() -> str:
    return f"memory://bench-clicks-{next(_names)}/events"


class Clicks:
    """One topic of click events, and everything that runs over them.

    Args:
        new_topic: Makes a topic and returns its URL; in memory unless told otherwise.
        shown: How many events of a `request` follow one another; 0: nothing is said of requests.
    """

    def __init__(self, count: int, new_topic: Callable[[], str] = _in_memory, shown: int = 0) -> None:
        made = Stream(count)
        self.names = [f"c{field:02}" for field in range(FIELDS)]
        self.messages = [  # by msgspec: what orjson returns sits in the 8 KB that it was written to
            msgspec.json.encode(
                {"id": str(i), "user": f"u{row[0]}", "time": i / 100, LABEL: int(y)}
                | {name: f"v{value}" for name, value in zip(self.names, row, strict=True)}
                | ({"request": f"r{i // shown}"} if shown else {})
            )
            for i, (row, y) in enumerate(zip(made.categories.tolist(), made.y.tolist(), strict=True))
        ]
        self.new_topic, self.url = new_topic, new_topic()
        sink = connect.open_sink(self.url, self.config({}))
        for start in range(0, count, 1000):
            sink.send([Message(value) for value in self.messages[start : start + 1000]])
            sink.flush()
        sink.close()

    def config(self, settings: Mapping[str, Any]) -> Config:
        table = {
            "name": f"bench-clicks-{next(_names)}",
            "events": {"url": self.url, "id": "id", "key": "user", "time": "time", "label": LABEL},
            "features": {name: {"kind": "categorical", "buckets": 1000} for name in self.names},
            "model": {"kind": "mlp", "hidden": list(HIDDEN), "embedding_dim": DIM},
            "optimizer": {"kind": "adagrad", "learning_rate": step_plain.RATE},
        }
        return Config.parse({**table, **settings}, "bench")

    def built(self, engine: str, settings: Mapping[str, Any], plain: bool = False) -> Worker:
        worker = build(self.config({**settings, "worker": {"engine": engine}, "predictions": self.new_topic()}))
        if self.url.startswith("memory:") and worker.outlets.predictions:
            worker.outlets.predictions.close()
            worker.outlets.predictions = Drain()
        if plain:
            worker.learner = PlainLearner(REPLAYED if "replay" in settings else 0)  # type: ignore[assignment]
        worker.progress.position = dict(worker.source.seek({}))
        return worker

    def worker(self, engine: str, settings: Mapping[str, Any], count: int, plain: bool = False) -> Taken:
        """With `plain`, another learner stands in the eager worker; see `PlainLearner`."""
        worker = self.built(engine, settings, plain)
        garbage.spare()
        try:
            return timed(worker, count)
        finally:
            worker.close()

    def river(self, count: int) -> Taken:
        """River's logistic regression on one-hot dicts."""
        model: Any = linear_model.LogisticRegression()
        clock = Clock()
        for message in self.messages[:count]:
            payload = orjson.loads(message)
            x = {f"{name}={payload[name]}": 1.0 for name in self.names}
            score = model.predict_proba_one(x).get(True, 0.5)
            model.learn_one(x, bool(payload[LABEL]))
            orjson.dumps({"id": payload["id"], "score": score})
        return clock.read()

    def vowpal_wabbit(self, count: int) -> Taken:
        """A linear model again: VW's text format, its Python API."""
        from vowpalwabbit import Workspace

        vw = Workspace(peers.VW_BASE)
        features = dict.fromkeys(self.names, "categorical")
        clock = Clock()
        for message in self.messages[:count]:
            payload = orjson.loads(message)
            example = vw.parse(peers.vw_line(features, payload))
            score = vw.predict(example)
            vw.learn(example)
            vw.finish_example(example)
            orjson.dumps({"id": payload["id"], "score": score})
        taken = clock.read()
        vw.finish()
        return taken

    def stages(self, count: int) -> dict[str, float]:
        """Microseconds per event of each part of a fused worker without replay."""
        worker = self.built("fused", {})
        spent: dict[str, float] = {}

        def watch(part: Any, method: str, stage: str) -> None:
            call = getattr(part, method)

            def watched(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                try:
                    return call(*args, **kwargs)
                finally:
                    spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start

            setattr(part, method, watched)

        watch(worker.decoder, "decode", "decode and featurize")
        watch(worker.decoder.featurizer, "encode", "of which featurize")
        watch(worker.joiner, "advance", "join")
        watch(worker.fused, "settle", "predict and learn")
        watch(worker.metrics, "add", "metrics")
        watch(worker.drift, "watch", "drift detection")
        watch(worker.outlets, "send", "encode and send")
        watch(worker.source, "poll", "poll")
        try:
            start = time.perf_counter()
            timed(worker, count)
            total = time.perf_counter() - start
        finally:
            worker.close()
        rest = total - sum(seconds for stage, seconds in spent.items() if not stage.startswith("of which"))
        return {name: 1e6 * seconds / count for name, seconds in {**spent, "the loop itself": rest}.items()}
