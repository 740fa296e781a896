"""What serving needs of everything that changed in a while: base + deltas = the full snapshot, bit for bit.

A delta is cut behind every `deltas.every_events`th record, so that the same log makes the same deltas however it is
polled and wherever a worker died; what was touched since the last cut is part of the state for that. It holds values,
never differences: rows of the table that were updated, of dynamic tables with the ids that have them; rows that are
gone (they read as fresh ones again, those of dynamic tables as zero); the dense parameters whole, the statistics of
numerics and target. Optimiser slots, filters, replay and error memory stay at home.

A base that stands at r records and knows the cut `previous` may take a delta with since <= r < records; whatever it
has already taken of it does no harm. `previous` is the checksum of the delta before, which contains the one before
that: so a chain is one history of one shard, and a hole, another run and a history that became void are seen.

Bytes: a line of JSON with the format and the SHA-256 of all that follows; a line of JSON; safetensors. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, serialize
from safetensors.torch import load

from streamcl.config import Config, fingerprint
from streamcl.progress import Progress
from streamcl.protocols import State, StreamclError
from streamcl.records import Delta, position_to_json
from streamcl.snapshot import spec
from streamcl.state import StateError, flatten, to_json, unflatten

if TYPE_CHECKING:
    from streamcl.learner import Learner

FORMAT = 1
_HEAD = b'{"streamcl_delta":%d,"sha256":"%s"}\n'
_SPARE = 1 << 16  # ids noted before they are sorted out


class Torn(StreamclError):
    """Not a whole delta: half written, damaged, or something else altogether."""


class Newer(StreamclError):
    """A delta of a format that this version does not know."""


class Unfit(StreamclError):
    """A delta of another table or model."""


@dataclass(frozen=True, slots=True)
class Change:
    """A delta, opened. `id` is its checksum; `position` as in a snapshot's manifest; `state` what `collect` gave."""

    id: str
    previous: str
    fingerprint: str
    since: int
    records: int
    outcomes: int
    position: Any
    state: State

    @property
    def version(self) -> int:
        return int(self.state["version"])


class Touched:
    """Rows that were updated or removed, each once, whichever happened to it last.

    Memory: 9 bytes for each such row, and as much again for what has not been sorted out yet.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._ids: list[NDArray[np.int64]] = []
        self._alive: list[bool] = []
        self._kept = (np.zeros(0, np.int64), np.zeros(0, np.bool_))
        self._noted = 0

    def add(self, ids: torch.Tensor) -> None:
        """These were updated; the tensor is kept as it is."""
        self._note(ids, True)

    def remove(self, ids: torch.Tensor) -> None:
        """These are gone from the table."""
        self._note(ids, False)

    def _note(self, ids: torch.Tensor, alive: bool) -> None:
        self._ids.append(ids.numpy())
        self._alive.append(alive)
        self._noted += len(ids)
        if self._noted > _SPARE + len(self._kept[0]):
            self._sort_out()

    def _sort_out(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if self._ids:
            lengths = [len(ids) for ids in self._ids]
            ids = np.concatenate((self._kept[0], *self._ids))[::-1]  # the newest first
            alive = np.concatenate((self._kept[1], np.repeat(np.array(self._alive), lengths)))[::-1]
            unique, first = np.unique(ids, return_index=True)
            self._kept, self._ids, self._alive, self._noted = (unique, alive[first]), [], [], 0
        return self._kept

    def rows(self) -> NDArray[np.int64]:
        """Sorted ids of those that are there."""
        ids, alive = self._sort_out()
        return ids[alive]

    def gone(self) -> NDArray[np.int64]:
        """Sorted ids of those that are not."""
        ids, alive = self._sort_out()
        return ids[~alive]

    def state_dict(self) -> State:
        ids, alive = self._sort_out()
        return {"ids": ids.copy(), "alive": alive.copy()}

    def load_state_dict(self, state: State) -> None:
        self.clear()
        self._kept = (np.array(state["ids"], np.int64), np.array(state["alive"], np.bool_))


class Deltas:
    """Notes what is touched, and cuts. Part of a worker's state, if it publishes deltas.

    Attributes:
        since: Records at the last cut; None before the first record.
        last: Checksum of the last delta, "" before the first.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        self.every = config.deltas.every_events
        self.lineage = lineage(config)
        self.learner = learner
        self.touched = Touched()
        self.since: int | None = None
        self.last = ""
        learner.engine.watch = self.touched.add

    def due(self, progress: Progress) -> bool:
        """Behind every record: whether a delta is to be cut here."""
        if self.since is None:
            self.since = progress.records - 1
        return progress.records % self.every == 0

    def cut(self, progress: Progress) -> Delta:
        head = {
            "previous": self.last,
            "fingerprint": self.lineage,
            "since": self.since,
            "records": progress.records,
            "outcomes": progress.outcomes,
            "position": position_to_json(progress.position),
        }
        data = encode(head, collect(self.learner, self.touched))
        self.since, self.last = progress.records, _checksum_of(data)
        self.touched.clear()
        return Delta(progress.records, data)

    def state_dict(self) -> State:
        return {"since": self.since, "last": self.last, "touched": self.touched.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """An empty one begins here: the snapshot knew no deltas."""
        self.since, self.last = state.get("since"), state.get("last", "")
        self.touched.clear()
        if state:
            self.touched.load_state_dict(state["touched"])


def lineage(config: Config) -> str:
    """A hash of all that a table and a model are made by; what may change at a stop is no part of it."""
    return fingerprint(config, ["new"])


def collect(learner: Learner, touched: Touched) -> State:
    """Everything that serving needs and that may have changed."""
    engine, ids, gone = learner.engine, torch.from_numpy(touched.rows()), torch.from_numpy(touched.gone())
    if engine.tables is None:
        return {"rows": {"ids": ids, "values": engine.table[ids]}, "gone": gone, **_dense(learner)}
    left = engine.tables.gone(ids)  # since it was touched
    ids, gone = ids[~left], torch.cat((gone, ids[left])).sort().values
    rows = {"ids": ids, "values": engine.table[ids], "keys": engine.tables.keys_at(ids)}
    return {"rows": rows, "gone": gone, **_dense(learner)}


def served(learner: Learner) -> State:
    """All that predicting reads, error memory apart: what base and deltas agree on with the full snapshot."""
    tables = learner.engine.tables
    return {"table": learner.engine.table, **({"keys": tables.keys()} if tables else {}), **_dense(learner)}


def become(learner: Learner, other: Learner) -> None:
    """Predict as the other does, error memory apart; both of one configuration."""
    state, engine = served(other), learner.engine
    with torch.no_grad():
        engine.table.copy_(state["table"])
        for name, param in engine.dense.params.items():
            param.copy_(state["params"][name])
    if engine.tables is not None:
        engine.tables.put_keys(engine.tables.first + torch.arange(len(state["keys"])), state["keys"])
    learner.numerics.load_state_dict(state["numerics"])
    learner.target.load_state_dict(state["target"])
    learner.version = state["version"]


def _dense(learner: Learner) -> State:
    return {
        "params": {name: param.detach() for name, param in learner.engine.dense.params.items()},
        "numerics": learner.numerics.state_dict(),
        "target": learner.target.state_dict(),
        "version": learner.version,
    }


def apply(learner: Learner, state: State) -> None:
    """Bring a learner that stood at the cut before, or between it and this one, to this one.

    Raises:
        Unfit: nothing has been changed.
    """
    engine, rows, gone = learner.engine, state["rows"], state["gone"]
    _refuse_unfit(learner, state)
    with torch.no_grad():
        engine.table.index_copy_(0, rows["ids"], rows["values"])
        if engine.tables is not None:
            changed = torch.cat((rows["ids"], gone))
            engine.tables.put_keys(changed, torch.cat((rows["keys"], torch.zeros_like(gone))))
        if len(gone):
            engine.table.index_copy_(0, gone, engine.fresh_rows(gone))
        for name, param in engine.dense.params.items():
            param.copy_(state["params"][name])
    learner.numerics.load_state_dict(state["numerics"])
    learner.target.load_state_dict(state["target"])
    learner.version = int(state["version"])


def _refuse_unfit(learner: Learner, state: State) -> None:
    engine, rows = learner.engine, state["rows"]
    length, width = engine.table.shape
    for name, ids in (("rows", rows["ids"]), ("gone", state["gone"])):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < length:
            raise Unfit(f"{name}: ids outside 0 .. {length - 1}")
    if rows["values"].shape != (len(rows["ids"]), width):
        raise Unfit(f"rows: {list(rows['values'].shape)} values, {len(rows['ids'])} rows of {width} numbers here")
    if engine.tables is not None and not engine.tables.fits(rows["ids"], rows.get("keys", rows["ids"][:0])):
        raise Unfit("rows: no ids of dynamic tables, or some of rows that are hashed here")
    mine = {name: param.shape for name, param in engine.dense.params.items()}
    theirs = {name: param.shape for name, param in state["params"].items()}
    if mine != theirs:
        raise Unfit(f"params: {theirs}, here {mine}")


def encode(head: dict[str, Any], state: State) -> bytes:
    """As in the module's last paragraph."""
    rest, arrays = flatten(state)
    body = to_json({"head": head, "state": rest}) + b"\n" + serialize({path: spec(a) for path, a in arrays.items()})
    return _HEAD % (FORMAT, hashlib.sha256(body).hexdigest().encode()) + body


def _checksum_of(data: bytes) -> str:
    return str(json.loads(data.partition(b"\n")[0])["sha256"])


def decode(data: bytes) -> Change:
    """The inverse of what `Deltas.cut` made, every byte checked.

    Raises:
        Torn, Newer: nothing is to be read from it.
    """
    line, _, body = data.partition(b"\n")
    try:
        opening = json.loads(line)
        if opening["streamcl_delta"] > FORMAT:
            raise Newer(f"a delta of format {opening['streamcl_delta']}; this version reads up to {FORMAT}")
        if hashlib.sha256(body).hexdigest() != opening["sha256"]:
            raise Torn("a delta does not have its own checksum")
        text, _, arrays = body.partition(b"\n")
        told = json.loads(text)
        return Change(id=opening["sha256"], state=unflatten(told["state"], load(arrays)), **told["head"])
    except (SafetensorError, StateError, ValueError, LookupError, TypeError) as error:
        raise Torn(f"no delta: {error!r}") from error
