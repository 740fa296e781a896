"""Two threads at one state, in turn: neither can keep the other out by coming back at once."""

from __future__ import annotations

import threading


class Gate:
    """A lock whose waiter is next. `with gate:` around every look at the state and every change of it.

    A plain lock that is let go and taken again in one breath, as a loop over records does, is nearly always won by the
    thread that had it. Here whoever waits for the state stands in the doorway, which everybody else must pass first.
    """

    def __init__(self) -> None:
        self._doorway = threading.Lock()
        self._state = threading.Lock()

    def __enter__(self) -> None:
        with self._doorway:
            self._state.acquire()

    def __exit__(self, *_: object) -> None:
        self._state.release()
