"""How far a shard has come: where it stands, what became of its records, and a proof of what it has learned from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import xxhash
from msgspec import Struct

from streamcl.protocols import ConnectorError, State
from streamcl.records import (
    DeadLetter,
    Delta,
    Forgotten,
    Learned,
    Origin,
    Outcome,
    Position,
    Prediction,
    Signal,
    Stream,
    position_from_json,
    position_to_json,
)


class Counts(Counter[str]):
    """How many records met which fate, since the very first one."""

    def state_dict(self) -> State:
        return dict(sorted(self.items()))

    def load_state_dict(self, state: State) -> None:
        self.clear()
        self.update(state)


class Progress:
    """Where the shard stands, and a proof of what it has learned from.

    `learned` is a multiset hash: the sum modulo 2^128 of a hash of each learned origin. Two runs that learned from the
    same records the same number of times agree on it, in whatever order; a record lost or learned twice changes it.

    `publish_from`: events that stand before it are history. They are learned from, and nobody is told what was
    predicted (see `bootstrap.Bootstrap`).

    `outcomes`: the number of the outcome last learned from. It names one outcome for ever.
    """

    def __init__(self) -> None:
        self.position: dict[Stream, int] = {}
        self.publish_from: dict[Stream, int] = {}
        self.records = 0
        self.learned = 0
        self.outcomes = 0

    def advance(self, stream: Stream, offset: int) -> None:
        if offset < self.position.get(stream, 0):
            raise ConnectorError(
                f"{Origin(*stream, offset)} was delivered again; expected offset {self.position[stream]}"
            )
        self.position[stream] = offset + 1
        self.records += 1

    def leap(self, position: Position) -> None:
        """Go on at `position`. What had been learned behind the state's own end is void, and so are its numbers."""
        self.position = dict(position)
        self.outcomes += LEAP

    def learn(self, origins: Sequence[Origin]) -> None:
        self.outcomes += len(origins)
        seals = [xxhash.xxh3_128_intdigest(str(origin).encode()) for origin in origins]
        self.learned = (self.learned + sum(seals)) % (1 << 128)

    def bootstrapping(self) -> bool:
        """True until the last event of the history has been taken."""
        return bool(self.publish_from) and any(
            self.position.get(stream, 0) < offset for stream, offset in self.publish_from.items()
        )

    def published(self, origin: Origin) -> bool:
        return not self.publish_from or origin.offset >= self.publish_from.get(origin.stream, 0)

    def state_dict(self) -> State:
        return {
            "position": position_to_json(self.position),
            "publish_from": position_to_json(self.publish_from),
            "records": self.records,
            "learned": f"{self.learned:032x}",
            "outcomes": self.outcomes,
        }

    def load_state_dict(self, state: State) -> None:
        self.position = position_from_json(state["position"])
        self.publish_from = position_from_json(state.get("publish_from", {}))
        self.records = state["records"]
        self.learned = int(state["learned"], 16)
        self.outcomes = state.get("outcomes", 0)  # a snapshot of before they had numbers


LEAP = 1 << 32
"""More outcomes than can be void."""


class Due(Struct, frozen=True, gc=False):
    """An outcome that is to be learned. `records` had been taken; `history`: nobody is told what it teaches."""

    outcome: Outcome
    records: int
    history: bool
    teaches: bool = True  # False: it is measured alone


class Pace:
    """Where the time of the last turn went (s, of the clock), and how old its records were. Never part of the state.

    Attributes:
        stages: By name: `poll` waits for records, `log` writes their order, `engine` is what a compiled chunk takes,
            `work` all other that becomes of records (with the eager engine all of it), `send` hands answers over,
            `meet` waits for the other ranks of a group and merges.
        newest_s: The timestamp of the newest record taken.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.newest_s = 0.0

    def took(self, stage: str, began: float) -> float:
        """Books the time since `began`, of `perf_counter`; returns now."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - began
        return now


STAGES = ("poll", "log", "work", "engine", "send", "meet")


class Work:
    """What the turn under way has brought about so far. `history`: nobody is told what the record at hand teaches."""

    def __init__(self) -> None:
        self.history = False
        self.due: list[Due] = []
        self.predictions: list[Prediction] = []
        self.outcomes: list[Outcome] = []
        self.learned: list[Learned] = []
        self.dead_letters: list[DeadLetter] = []
        self.signals: list[Signal] = []
        self.deltas: list[Delta] = []
        self.forgotten: list[Forgotten] = []
