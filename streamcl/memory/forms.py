"""Three ways to remember which errors were made where: rows, a sketch, and sums by key.

A form takes `write(key, values)` and answers `read(keys)`: for each key a support and the weighted means of the values
written near it (V numbers: the label, then the score that was given). It forgets all by `reset`, and what
somebody's events have left behind by `forget`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streamcl.memory.kernels import read_rows, read_sketch, write_sketch
from streamcl.memory.owners import NOBODY, Owner, Owners, close_ranks
from streamcl.methods import KeyMemory, KNNMemory, SketchMemory
from streamcl.protocols import State
from streamcl.random import key_of, normal_array
from streamcl.records import Selector
from streamcl.state import cut

Floats = NDArray[np.float32]
CENTRE_RATE = 0.001
NO_KEY = -1


class Form(Protocol):
    """How an error memory remembers. `width` V is the number of values of a record."""

    def read(self, keys: NDArray[Any], /) -> NDArray[np.float64]:
        """(B, 1 + V): the support, 0 for none, and the means."""
        ...

    def write(self, key: NDArray[Any], values: Floats, owner: Owner = NOBODY, /) -> bool:
        """False, and nothing has changed, for a key that can't be used."""
        ...

    def reset(self) -> None: ...

    def forget(self, who: Selector, /) -> int:
        """Erase what is meant, and whatever can't be told apart from it; returns how many rows or sums that was."""
        ...

    def __len__(self) -> int:
        """Records that a read may still see (count); of a sketch, those written since the reset."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


class Centre:
    """The running mean of keys: raw ReLU outputs all lie in one orthant, where SimHash tells little apart."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim, np.float32)

    def update(self, key: Floats) -> bool:
        """False for a key of no finite length: a mean would never recover from it."""
        moved = key - self.mean
        if not math.isfinite(moved.dot(moved)):
            return False
        self.count += 1
        self.mean = self.mean + np.float32(max(CENTRE_RATE, 1.0 / self.count)) * moved
        return True

    def state_dict(self) -> State:
        return {"count": self.count, "mean": self.mean.copy()}

    def load_state_dict(self, state: State) -> None:
        self.count = int(state["count"])
        self.mean = np.array(state["mean"], np.float32)


class KNN:
    """The last `capacity` records, compared one by one: exact, and fast for some thousands.

    Shape:
        keys (B, d) float32, raw; rows are centred and of unit length.

    Source:
        ReLoop2, Zhu et al. 2023 (KDD), arXiv 2306.08808: its kNN form; softmax over cosine similarity.

    Differs from the source:
        First in, first out, where the paper thins at random to bound memory. Centred. Optional half-life.

    After a forget the others keep their order; ages are counted in rows, so they are younger by those erased between.
    The mean that centres keys stays, unless no row is left: it is of all records, and nobody's.
    """

    def __init__(self, config: KNNMemory, dim: int, width: int, _seed: int) -> None:
        self.config = config
        self.fade = math.log(2.0) / config.half_life_events if config.half_life_events else 0.0
        self.centre = Centre(dim)
        self.rows = np.zeros((config.capacity, dim), np.float32)
        self.values = np.zeros((config.capacity, width), np.float32)
        self.owners = Owners(config.capacity)
        self.writes = 0  # since the reset

    def __len__(self) -> int:
        return min(self.writes, self.config.capacity)

    def read(self, keys: NDArray[Any]) -> NDArray[np.float64]:
        out = np.zeros((len(keys), 1 + self.values.shape[1]))
        size, head = len(self), self.writes % self.config.capacity
        if size >= self.config.min_support:
            k = min(self.config.neighbours, size)
            read_rows(keys, self.centre.mean, self.rows, self.values, size, head, k, self.config.tau, self.fade, out)
        return out

    def write(self, key: NDArray[Any], values: Floats, owner: Owner = NOBODY, /) -> bool:
        threshold, half = self.config.error_threshold, len(values) // 2
        if threshold and float(np.abs(values[:half] - values[half:]).max()) <= threshold:
            return True
        moved = key - self.centre.mean
        norm = math.sqrt(float(moved.dot(moved)))
        self.centre.update(key)
        if not 0.0 < norm < math.inf:
            return False
        slot = self.writes % self.config.capacity
        np.divide(moved, norm, out=self.rows[slot])
        self.values[slot] = values
        self.owners.write(slot, owner)
        self.writes += 1
        return True

    def move(self, linear: NDArray[np.float64], shift: NDArray[np.float64], share: NDArray[np.float64]) -> None:
        """Let keys follow the model that made them: what was key k would now be `linear @ k + shift`.

        Shape:
            linear (d, d), shift (d,), share (len(self),): by slot, how much of the way a record has to go.
        """
        size = len(self)
        rows = self.rows[:size].astype(np.float64)
        moved = rows + share[:, None] * (rows @ linear.T - rows)  # rows are centred, so the shift is the centre's alone
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        self.rows[:size] = np.where(length > 0.0, moved / np.maximum(length, np.finfo(np.float64).tiny), rows)
        self.centre.mean = (linear @ self.centre.mean.astype(np.float64) + shift).astype(np.float32)

    def reset(self) -> None:
        self.writes = 0

    def forget(self, who: Selector, /) -> int:
        size = len(self)
        erased = self.owners.meant(who, size)
        if erased.any():
            order = np.roll(np.arange(size), -(self.writes % size))  # the oldest first
            kept = order[~erased[order]]
            for column in (self.rows, self.values):
                close_ranks(column, kept, size)
            self.owners.close_ranks(kept, size)
            self.writes = len(kept)
            if not self.writes:
                self.centre = Centre(self.rows.shape[1])
        return int(erased.sum())

    def state_dict(self) -> State:
        size = len(self)
        held = {"rows": cut(self.rows[:size]), "values": cut(self.values[:size])}
        held |= self.owners.state_dict(size)
        return {**held, "centre": self.centre.state_dict(), "writes": self.writes}

    def load_state_dict(self, state: State) -> None:
        self.writes = int(state["writes"])
        self.centre.load_state_dict(state["centre"])
        self.rows[: len(self)], self.values[: len(self)] = state["rows"], state["values"]
        self.owners.load_state_dict(state, len(self))


class Sketch:
    """K arrays of 2^L buckets, each with a count and sums: constant memory, for when the rows are too many.

    Shape:
        keys (B, d) float32, raw. sums (K, 2^L, 1 + V): count, sums of the values.

    Source:
        ReLoop2, Zhu et al. 2023, arXiv 2306.08808, after RACE, Coleman & Shrivastava 2020 (WWW).

    Differs from the source:
        Read-outs are pooled (sum of sums by sum of counts), for how the paper weighs them is not clear. It decays by a
        half-life, lazily. Keys are centred by a mean that is latched, for a moving one would re-map the buckets: at
        every reset, and after 1, 2, 4, 8, ... keys.

    A record can't be taken out of a sum, nor is it known whose are in: every forget, of whomever, begins it anew.
    """

    def __init__(self, config: SketchMemory, dim: int, width: int, seed: int) -> None:
        shape = (config.arrays, config.bits, dim)
        key = key_of(seed, "error_memory.planes")
        self.config = config
        self.fade = math.log(2.0) / config.half_life_events if config.half_life_events else 0.0
        self.planes = normal_array(key, math.prod(shape)).astype(np.float32).reshape(shape)
        self.centre = Centre(dim)
        self.latched = np.zeros(dim, np.float32)
        self.sums = np.zeros((config.arrays, 1 << config.bits, 1 + width), np.float32)
        self.touched = np.zeros(self.sums.shape[:2], np.int64)
        self.writes = self.since = 0

    def __len__(self) -> int:
        return self.writes - self.since

    def read(self, keys: NDArray[Any]) -> NDArray[np.float64]:
        out = np.zeros((len(keys), self.sums.shape[2]))
        where = self.latched, self.planes, self.sums, self.touched
        read_sketch(keys, *where, self.writes, self.since, self.fade, float(self.config.min_support), out)
        return out

    def write(self, key: NDArray[Any], values: Floats, _owner: Owner = NOBODY, /) -> bool:
        where = self.latched, self.planes, self.sums, self.touched
        written = write_sketch(key, *where, self.writes + 1, self.since, self.fade, values)
        self.writes += written
        if self.centre.update(key) and self.centre.count.bit_count() == 1:
            self.latched = self.centre.mean.copy()
        return bool(written)

    def reset(self) -> None:
        """O(1): what was touched before reads as empty."""
        self.since = self.writes
        self.latched = self.centre.mean.copy()

    def forget(self, _who: Selector, /) -> int:
        erased = len(self)
        for each in (self.sums, self.touched, self.latched):
            each[:] = 0
        self.centre = Centre(len(self.latched))
        self.writes = self.since = 0
        return erased

    def state_dict(self) -> State:
        arrays = {"sums": cut(self.sums), "touched": cut(self.touched), "latched": self.latched.copy()}
        return {**arrays, "centre": self.centre.state_dict(), "writes": self.writes, "since": self.since}

    def load_state_dict(self, state: State) -> None:
        self.sums[:], self.touched[:], self.latched[:] = state["sums"], state["touched"], state["latched"]
        self.centre.load_state_dict(state["centre"])
        self.writes, self.since = int(state["writes"]), int(state["since"])


class ByKey:
    """The mean error of each user, item or session, drawn towards 0 by `shrinkage`: what the vector forms must beat.

    Shape:
        keys (B, 1) int64, `NO_KEY` for none. Means are sums by (count + shrinkage).

    The key seen longest ago gives way when more than `capacity` are held.

    A record can't be taken out of a sum. A forget by key erases the sums of records of that owner alone, and those of
    several owners; one by event ids or time erases every sum.
    """

    def __init__(self, config: KeyMemory, _dim: int, width: int, _seed: int) -> None:
        self.config = config
        self.width = width
        self.halving = 1.0 / config.half_life_events if config.half_life_events else 0.0
        self.shrinkage, self.least = config.shrinkage, config.min_support
        self.columns = range(1, 1 + width)
        self.sums: OrderedDict[int, list[float]] = (
            OrderedDict()
        )  # key -> [last touch, count, sums of values...]; oldest first
        self.owners: dict[int, int] = {}  # key -> mark of the one owner of its records; 0 for several
        self.writes = 0

    def __len__(self) -> int:
        return len(self.sums)

    def read(self, keys: NDArray[Any]) -> NDArray[np.float64]:
        out = np.zeros((len(keys), 1 + self.width))
        for b, key in enumerate(keys.ravel().tolist()):
            entry = self.sums.get(key)
            if entry is None:
                continue
            factor = 2.0 ** (-self.halving * (self.writes - entry[0]))
            count = entry[1] * factor
            if count > 0.0 and count >= self.least:
                share = factor / (count + self.shrinkage)
                out[b, 0] = count
                for v in self.columns:  # number by number: an array made of a list takes twice as long
                    out[b, v] = entry[1 + v] * share
        return out

    def write(self, key: NDArray[Any], values: Floats, owner: Owner = NOBODY, /) -> bool:
        name = key.item()
        if name == NO_KEY:
            return False
        self.writes += 1
        entry = self.sums.get(name)
        if entry is None:
            self.sums[name], self.owners[name] = [self.writes, 1.0, *values.tolist()], owner.key
            if len(self.sums) > self.config.capacity:
                gone, _ = self.sums.popitem(last=False)
                del self.owners[gone]
            return True
        if self.owners[name] != owner.key:
            self.owners[name] = 0
        factor = 2.0 ** (-self.halving * (self.writes - entry[0]))
        entry[0], entry[1] = self.writes, entry[1] * factor + 1.0
        at = 2
        for value in values.tolist():  # by hand: `zip(..., strict=True)` costs a fifth of the whole
            entry[at] = entry[at] * factor + value
            at += 1
        self.sums.move_to_end(name)
        return True

    def _erase(self, name: int) -> None:
        del self.sums[name], self.owners[name]

    def reset(self) -> None:
        self.sums.clear()
        self.owners.clear()

    def forget(self, who: Selector, /) -> int:
        meant = who.owners
        erased = [name for name, owner in self.owners.items() if meant is None or owner in meant]
        for name in erased:
            self._erase(name)
        return len(erased)

    def state_dict(self) -> State:
        return {
            "keys": np.array(list(self.sums), np.int64),
            "sums": np.array(list(self.sums.values()), np.float64).reshape(-1, 2 + self.width),
            "owners": np.array([self.owners[name] for name in self.sums], np.int64),
            "writes": self.writes,
        }

    def load_state_dict(self, state: State) -> None:
        keys = state["keys"].tolist()
        self.sums = OrderedDict(zip(keys, state["sums"].tolist(), strict=True))
        self.owners = dict(zip(keys, state.get("owners", np.zeros(len(keys), np.int64)).tolist(), strict=True))
        self.writes = int(state["writes"])


FORMS: dict[str, type[KNN] | type[Sketch] | type[ByKey]] = {"knn": KNN, "sketch": Sketch, "key": ByKey}
