"""Sends the simulated traffic to the topics, at a pace, never far ahead of the worker."""

from __future__ import annotations

import threading
import time
from itertools import islice

from streamcl import connect
from streamcl.config import Config
from streamcl.demo.simulator import Simulation
from streamcl.records import Message

BATCH = 20


class Traffic(threading.Thread):
    """A producer in a thread of its own.

    It holds back while `lead` records are unread: on a slow machine the demo then takes longer and its figures
    stay the same, where an open loop would drown the worker.

    Attributes:
        sent: Records on the topics so far, of `total`.
        consumed: Written by whoever watches the worker.
        error: What ended the thread early, or None.
    """

    def __init__(self, simulation: Simulation, config: Config, per_s: float, lead: int = 500) -> None:
        super().__init__(name="traffic", daemon=True)
        self._simulation = simulation
        self._sinks = {name: connect.open_sink(url, config) for name, url in config.inputs.items()}
        self._per_s = per_s
        self._lead = lead
        self._stopping = threading.Event()
        self.total = simulation.records
        self.sent = 0
        self.consumed = 0
        self.error: Exception | None = None

    @property
    def finished(self) -> bool:
        """All was sent and all was read."""
        return self.sent == self.total <= self.consumed

    def run(self) -> None:
        try:
            self._produce()
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to; the watcher asks for it
            self.error = error

    def stop(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        """Call when the thread has ended."""
        for sink in self._sinks.values():
            sink.close()

    def _produce(self) -> None:
        began, messages = time.monotonic(), self._simulation.traffic()
        while batch := list(islice(messages, BATCH)):
            due = began + self.sent / self._per_s
            while not self._stopping.is_set() and (self.sent - self.consumed > self._lead or time.monotonic() < due):
                self._stopping.wait(0.01)
            if self._stopping.is_set():
                return
            self._send(batch)

    def _send(self, batch: list[tuple[str, Message]]) -> None:
        for name, sink in self._sinks.items():
            sink.send([message for to, message in batch if to == name])
            sink.flush()
        self.sent += len(batch)
