"""What travels: from a record of the source to the turn that the worker yields.

Everything here is frozen: a ticket that waits a week for its label says the same as on the day it was written. The
structs are msgspec's, which are made ten times faster than dataclasses; several are made for each event. They hold no
cycles, so the garbage collector need not look at them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import xxhash
from msgspec import Struct, field
from msgspec.structs import force_setattr
from numpy.typing import NDArray

EVENTS = "events"
LABELS = "labels"
COMMANDS = "commands"


class Stream(NamedTuple):
    """One ordered sequence of records: a partition of an input (`events`, `labels`, `commands`)."""

    input: str
    partition: int


Position = Mapping[Stream, int]
"""Per stream the offset that is read next. A snapshot without its position would learn things twice."""


class Origin(NamedTuple):
    """Where a record stands in the log. Unique for ever; the identity of everything made from the record."""

    input: str
    partition: int
    offset: int

    @property
    def stream(self) -> Stream:
        return Stream(self.input, self.partition)

    def __str__(self) -> str:
        return f"{self.input}:{self.partition}:{self.offset}"


Headers = tuple[tuple[str, bytes], ...]

Traits = Mapping[str, str]
"""Fields that metrics tell events apart by, as texts; see `streamcl.traits`."""


class Record(Struct, frozen=True, gc=False):
    """What a source delivers, undecoded.

    `time_s` is the record's own timestamp (Kafka's create time), in seconds; an event whose payload carries no
    time takes it. `topic` is for people (errors, headers); state is keyed by the input's name instead.
    """

    origin: Origin
    topic: str
    time_s: float
    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()


class Message(Struct, frozen=True, gc=False):
    """What a sink sends, encoded. Without `time_s` the record's timestamp is the time of sending.

    An answer must not take its event's time: a broker deletes what is older than its retention, however new it is.
    """

    value: bytes | None
    key: bytes | None = None
    headers: Headers = ()
    time_s: float | None = None
    partition: int | None = None
    """Where it must go; else the key says."""


class Encoded(NamedTuple):
    """The features of one event as arrays of fixed size (S slots, N numerics; see `streamcl.features`)."""

    ids: NDArray[np.int64]  # (S,) rows of the embedding table
    weights: NDArray[np.float32]  # (S,) 0 where the slot is empty
    dense: NDArray[np.float32]  # (N,) raw; NaN where missing


class Event(Struct, frozen=True, gc=False):
    """A decoded, valid, featurized event. `label` is set when it came inline, `segment` when it names a part of the
    stream (a task, a season): a hint for boundaries and evaluators alone, never for the model.
    """

    id: str
    key: str
    time_s: float
    features: Encoded
    origin: Origin
    label: float | None = None
    segment: str = ""
    also: tuple[float, ...] = ()
    """Labels of the further tasks, in the order of their names, NaN where one is not known."""
    weight: float = 1.0
    traits: Traits = {}


class Label(Struct, frozen=True, gc=False):
    """A label on its own stream, joined to its event by `id`."""

    id: str
    value: float
    time_s: float
    origin: Origin
    also: tuple[float, ...] = ()  # see `Event`


class Recalled(NamedTuple):
    """What one stage of the error memory knew of an event; P numbers are served."""

    key: NDArray[Any]  # (d,)
    given: NDArray[np.float32]  # (P,) the score before this stage
    label_mean: NDArray[np.float32]  # (P,) of the records nearby
    given_mean: NDArray[np.float32]  # (P,) their scores before this stage
    support: float  # how much that rests on; 0 for nothing
    version: int  # of the memory: records of other weights are not read


Notes = Mapping[str, NDArray[Any]]
"""What a plug-in wants to hear of again when the label comes, by name."""


TASK = "task."
"""How a score of a further task is noted: `task.NAME`, (1,)."""


class Scores(Struct, frozen=True, gc=False):
    """What the model said. `output` is raw (O,): logits, or a standardised value for regression.

    `served` is what was published: (1,) a probability or a value, (C,) class probabilities. `recalled` is what the
    error memory's stages put it right by, in their order.
    """

    output: NDArray[np.float32]
    served: NDArray[np.float32]
    version: int
    recalled: tuple[Recalled, ...] = ()
    notes: Notes = field(default_factory=dict)

    @property
    def base(self) -> NDArray[np.float32]:
        """What would have been served without the error memory."""
        return self.recalled[0].given if self.recalled else self.served

    def fulfil(self, output: NDArray[np.float32], served: NDArray[np.float32], version: int, notes: Notes) -> None:
        """Say what was promised: of scores that nobody has read yet, and by whoever has made them."""
        force_setattr(self, "output", output)
        force_setattr(self, "served", served)
        force_setattr(self, "version", version)
        force_setattr(self, "notes", notes)

    def put_right(self, served: NDArray[np.float32], recalled: tuple[Recalled, ...]) -> None:
        """Likewise, by what the error memory says."""
        force_setattr(self, "served", served)
        force_setattr(self, "recalled", recalled)


class Ticket(Struct, frozen=True, gc=False):
    """What was seen and served, waiting for its label: learning never sees fresher features than predicting did."""

    id: str
    time_s: float
    features: Encoded
    scores: Scores
    origin: Origin
    segment: str = ""  # see `Event`
    key: str = ""
    """Whose event it is; "" where that is not known, as in a ticket of an old snapshot."""
    weight: float = 1.0
    """How much it counts, in learning and in metrics."""
    traits: Traits = {}


class Selector(Struct, frozen=True, gc=False):
    """Whose events are to be forgotten. All conditions that are given must hold; at least one is.

    What does not say whose it is, or of when, meets every condition on that: too much is erased, never too little.
    Times are event times, from `from_s` on and before `until_s`.
    """

    key: str | None = None
    ids: frozenset[str] = frozenset()
    from_s: float | None = None
    until_s: float | None = None

    def meets(self, key: str, id: str, time_s: float) -> bool:
        """Whether an event of this key ("" if that is not known), id and time is meant."""
        return (self.key is None or key in ("", self.key)) and self.of_id(id) and self.in_time(time_s)

    @property
    def owners(self) -> frozenset[int] | None:
        """Marks of the keys that are meant: the given one's and nobody's. None: everybody's."""
        return None if self.key is None else frozenset((0, mark(self.key)))

    def of_id(self, id: str) -> bool:
        return not self.ids or id in self.ids

    def in_time(self, time_s: float) -> bool:
        """True for NaN."""
        early = self.from_s is not None and time_s < self.from_s
        late = self.until_s is not None and time_s >= self.until_s
        return not (early or late)


class Command(Struct, frozen=True, gc=False):
    """An order to a shard, in its stream: to forget `who`. `id` is the request's; every shard gets it once or more."""

    id: str
    who: Selector
    origin: Origin
    time_s: float


class Forgotten(Struct, frozen=True, gc=False):
    """What a command has come to: rows erased, by part. It does not say whose."""

    id: str
    origin: Origin
    time_s: float
    rows: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"request": self.id, "position": str(self.origin), "time_s": self.time_s, "rows": dict(self.rows)}


def mark(text: str) -> int:
    """A hash by which a row knows its owner's key or id again: 64 bits, signed; 0 stands for "", which is nobody's."""
    if not text:
        return 0
    value: int = xxhash.xxh3_64_intdigest(text.encode())
    return (value if value < 1 << 63 else value - (1 << 64)) or 1


def marks(texts: Sequence[str]) -> NDArray[np.int64]:
    """`mark` of each, in a third of the time."""
    digests = b"".join(map(xxhash.xxh3_64_digest, map(str.encode, texts)))
    found = np.frombuffer(digests, ">u8").astype(np.uint64).view(np.int64)
    found[found == 0] = 1
    found[found == _OF_NOTHING] = 0
    return found


_OF_NOTHING = np.uint64(xxhash.xxh3_64_intdigest(b"")).view(np.int64)


class Fate(StrEnum):
    """How a ticket became an outcome.

    A ticket may become several: one that has been taken for a negative for now (PROVISIONAL) is LATE when its label
    comes after all, or EXPIRED when none does; and one that had EXPIRED may be LATE.
    """

    INLINE = "inline"
    JOINED = "joined"
    EXPIRED = "expired"
    PROVISIONAL = "provisional"
    LATE = "late"


class Outcome(Struct, frozen=True, gc=False):
    """A ticket and its label: what metrics, drift detection and learning consume. `delay_s` is in event time, >= 0."""

    ticket: Ticket
    label: float
    fate: Fate
    delay_s: float
    also: tuple[float, ...] = ()  # see `Event`
    drawn: float = 1.0
    """The share of its kind that it was drawn from: it stands for 1 / drawn of them in metrics."""

    def beside(self, count: int) -> tuple[float, ...]:
        """Labels of so many further tasks. A window that has closed without any label says 0 of all of them."""
        return self.also or (0.0 if self.fate is Fate.EXPIRED else math.nan,) * count

    @property
    def weight(self) -> float:
        """In metrics."""
        return self.ticket.weight / self.drawn


class Learned(NamedTuple):
    """An outcome that the weights have learned from, as others are told of it.

    `number` counts them, in a shard, without a hole, from 1 on; `records` is how many records the shard had taken.
    """

    number: int
    records: int
    id: str
    origin: Origin  # of the event
    features: Encoded
    label: float
    fate: Fate
    time_s: float  # of the event
    delay_s: float  # of the label, behind it


class Delta(NamedTuple):
    """What changed up to the shard's `records`th record, sealed; see `streamcl.delta`."""

    records: int
    data: bytes


class Prediction(Struct, frozen=True, gc=False):
    """The answer to one event. Its identity is `origin`; a reader that saw it already may drop it."""

    id: str
    key: str
    time_s: float
    scores: Scores
    origin: Origin


class DeadLetter(Struct, frozen=True, gc=False):
    """A record that could not be used. `error` names the field and the fault, never the value."""

    record: Record
    reason: str
    error: str


class Signal(Struct, frozen=True, gc=False):
    """Something happened in the stream (`drift`, `boundary`, `clock`, `new_class`) that parts may react to."""

    kind: str
    source: str
    origin: Origin


class Run(NamedTuple):
    """`length` consecutive records of one stream: a piece of the order in which a shard took its inputs."""

    stream: Stream
    length: int


class Was(NamedTuple):
    """A model of the past: what it was when the control log stood at `offset`, after `records` records."""

    offset: int
    records: int


class Closed(NamedTuple):
    """A round of a group as one of its ranks closed it, by number; `ended`: no record can come to it any more."""

    round: int
    ended: bool = False


class Order(Struct, frozen=True, gc=False):
    """One control record: the order that a turn took its records in, and the position after it.

    With `leap` it took none: records that it wanted were gone, and it went on at `position` from the state that the
    control log's offset `leap` led to. The orders between that offset and this one are void.

    With `was` it took none either: the model went back to what it had been. With `promoted`, the digest of a shadow's
    snapshot, that shadow took the shard's place.

    With `closes` the rank of a group closed that round behind these records, which may be none.

    `keep` is not written: who reads the log knows by it how often the model before this order will be gone back to.
    """

    runs: tuple[Run, ...]
    position: Position
    leap: int | None = None
    was: Was | None = None
    promoted: str | None = None
    closes: Closed | None = None
    keep: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [[run.stream.input, run.stream.partition, run.length] for run in self.runs],
            "position": position_to_json(self.position),
            **({} if self.leap is None else {"leap": self.leap}),
            **({} if self.was is None else {"was": [*self.was]}),
            **({} if self.promoted is None else {"promoted": self.promoted}),
            **({} if self.closes is None else {"closes": [*self.closes]}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Order:
        runs = tuple(Run(Stream(str(i), int(p)), int(n)) for i, p, n in data["runs"])
        was = Was(*map(int, data["was"])) if "was" in data else None
        closes = Closed(int(data["closes"][0]), bool(data["closes"][1])) if "closes" in data else None
        return cls(runs, position_from_json(data["position"]), data.get("leap"), was, data.get("promoted"), closes)


def position_to_json(position: Position) -> dict[str, dict[str, int]]:
    """`{"events": {"0": 17}}`, inputs and partitions sorted."""
    nested: dict[str, dict[str, int]] = {}
    for stream, offset in sorted(position.items()):
        nested.setdefault(stream.input, {})[str(stream.partition)] = offset
    return nested


def position_from_json(data: Mapping[str, Mapping[str, int]]) -> dict[Stream, int]:
    return {Stream(name, int(p)): int(o) for name, parts in data.items() for p, o in parts.items()}


class Turn(Struct, frozen=True, gc=False):
    """One poll's worth of work, as seen from outside the loop. `position` stands after the turn.

    `learned` are the outcomes that others are told of: not those of a history (see `bootstrap.Bootstrap`).

    `counts` holds what happened in this turn by fate (`predicted`, `learned`, `late`, ...); summed over turns it is
    the same however the stream was cut into polls.
    """

    records: int
    position: Position
    predictions: tuple[Prediction, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    learned: tuple[Learned, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()
    signals: tuple[Signal, ...] = ()
    deltas: tuple[Delta, ...] = ()
    forgotten: tuple[Forgotten, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    recovering: bool = False
