"""How the product is run in a bench: the real worker, from JSON bytes on, through a URL."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from streamcl import connect
from streamcl.bench.options import OptionError
from streamcl.bench.quality import Trace
from streamcl.bench.streams import LABEL, TIME, Dataset
from streamcl.config import Config
from streamcl.protocols import StreamclError
from streamcl.records import Message
from streamcl.worker import Worker, build

MEMORY = "memory://bench"

_runs = itertools.count()


class Incomplete(StreamclError):
    """A run did not answer every event with a prediction and learn from every label."""


class Topic:
    """A dataset, published once, for as many runs as wanted: each reads it from the start.

    Args:
        via: URL without a topic. The topic is new in this process, so that nothing else stands in it.
    """

    def __init__(self, data: Dataset, via: str | None = None) -> None:
        self.data = data
        self.base = (via or MEMORY).rstrip("/")
        self.name = f"bench-{data.name}-{os.getpid()}-{next(_runs)}"
        self.url = f"{self.base}/{self.name}"
        sink = connect.open_sink(self.url, self.config({}))
        times = (float(payload[TIME]) for payload in data.payloads)
        messages = (Message(value, time_s=time_s) for value, time_s in zip(data.messages(), times, strict=True))
        while some := list(itertools.islice(messages, 1000)):
            sink.send(some)
            sink.flush()
        sink.close()

    def config(self, settings: Mapping[str, Any]) -> Config:
        """`settings` (the tables model, optimizer, replay, seed, ...) completed by what the stream looks like."""
        events = {"url": self.url, "time": TIME, "label": LABEL, "weight": self.data.weight}
        shape = {"name": self.name, "events": events}
        return Config.parse({**shape, "features": self.data.features, **settings}, "bench")

    def run(self, name: str, settings: Mapping[str, Any], *, publish: bool = False) -> Trace:
        """Predict and learn event by event, on one torch thread; decoding is part of the time.

        With `publish`, predictions are encoded and sent to a topic of their own, which is part of the time too.

        Raises Incomplete when an event was refused or its label not learned from.
        """
        out = {"predictions": f"{self.base}/{self.name}-predictions-{next(_runs)}"} if publish else {}
        worker = build(self.config({**settings, **out}))
        try:
            if len(worker.source.streams()) != 1:
                raise OptionError(f"--via: topic {self.name} has several partitions; order needs one")
            return replace(self._follow(worker), name=name)
        finally:
            worker.close()

    def _follow(self, worker: Worker) -> Trace:
        expected = len(self.data.payloads)
        scores: list[float] = []
        start = time.process_time()
        for turn in worker.run():
            scores.extend(float(outcome.ticket.scores.served[0]) for outcome in turn.outcomes)
            worker.flush()
            if worker.progress.records >= expected:
                worker.stop()
        cpu_s = time.process_time() - start
        if worker.counts["learned"] != expected:
            raise Incomplete(f"{self.name}: {expected} events, but the worker counted {dict(worker.counts)}")
        return Trace(self.name, np.array(scores), cpu_s)
