"""A state that was made with other features or fewer classes, for those that are configured now.

Everything goes by name: the rows of a field, its columns of what enters the first layer, its slots in replayed rows
and in tickets that wait, a number's running mean, what the past keeps for it. What is there before and after is moved
to the bit. What is new enters with weight zero (its embeddings as on the first day): the model says what it said
before, but for what pairs of embeddings make of new ones, and goes on from there. What has gone is dropped. A feature
that reads something else than before is a new one, whatever its name.

An old event knows nothing of a new feature: there it is missing. Buckets may become a whole multiple of what they were:
then each value's row is made of the row that it had, and what the past keeps by such a field begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config, ConfigError
from streamcl.derived import History
from streamcl.features import Featurizer, Field
from streamcl.learner import Learner
from streamcl.past import past_of
from streamcl.protocols import State
from streamcl.stations import Bag, Categorical

MAY_CHANGE = frozenset({"features", "model.classes"})
"""Settings whose change means other state, and that are carried over nevertheless."""

NEW_CLASS = 4.0
"""By how much the bias of a new class is below the least of the others, so that it takes little from them."""

MEANS = (
    "kind",
    "of",
    "by",
    "when",
    "part",
    "cyclic",
    "bins",
    "scale",
    "rows",
    "half_life_s",
    "half_life_events",
    "form",
)
"""Settings of a feature by whose change it becomes another one."""

RULES = ("continual_backprop", "weight_clipping", "l2", "shrink_and_perturb")
PLUGINS = ("ema", "served")
"""Methods that keep nothing of single weights, or whose weights are moved here."""

Array = NDArray[Any]


def evolve(state: State, old: Config, new: Config) -> State:
    """A worker's state, as if it had been made by `new`. The old one is not changed.

    Raises:
        ConfigError: what of the change, or of the configuration, is not carried over; it names the field.
    """
    _refuse(old, new)
    layouts = _Layouts(old, new)
    learner = _learner(state["learner"], old, new, layouts)
    joiner = {**state["joiner"], "tickets": _tickets(state["joiner"]["tickets"], old, new, layouts)}
    found = {**state, "learner": learner, "joiner": joiner}
    for name in ("metrics", "base_metrics"):
        if name in found and old.outputs != new.outputs:
            metrics = found[name]["metrics"]
            counted = np.pad(metrics["classes"], (0, new.outputs - old.outputs))
            found[name] = {**found[name], "metrics": {**metrics, "classes": counted}}
    found.pop("deltas", None)  # they begin anew: replicas wait for the next snapshot
    past = found.pop("past", None)
    if past_of(new, Featurizer(new)) is not None:
        kept = {name: each for name, each in (past or {}).get("kept", {}).items() if layouts.keeps(name)}
        found["past"] = {**(past or {}), "kept": kept}
    return found


def _refuse(old: Config, new: Config) -> None:
    if new.river is not None:
        raise ConfigError("features: a River model has no rows by field; start in another checkpoint.folder")
    if new.model.kind == "recurrent":
        raise ConfigError("features: the states of a recurrent model's keys are not carried over")
    for station in new.plugins:
        kind = str(getattr(station, "kind", ""))
        if kind not in PLUGINS:
            raise ConfigError(f"features: plugins.{kind} keeps what belongs to single weights; stop without it first")
    for rule in new.plasticity:
        if rule.kind not in RULES:
            raise ConfigError(f"features: plasticity {rule.kind} keeps what belongs to single weights")
    for name, feature in (*old.features.items(), *new.features.items()):
        if getattr(feature, "table", None) is not None:
            raise ConfigError(f"features.{name}: rows of a dynamic table are not carried over")
    if new.outputs < old.outputs:
        raise ConfigError(
            f"model.classes: {new.outputs} are fewer than {old.outputs}; give the others no labels instead"
        )


def meaning(name: str, config: Config) -> Any:
    """What a feature reads: equal for features of which one may go on with what was learned of the other."""
    feature = config.features[name]
    found = {each: getattr(feature, each) for each in MEANS if hasattr(feature, each)}
    if not isinstance(feature, Categorical | Bag):
        of = [at for each in ("of", "by") for at in _listed(getattr(feature, each, ()))]
        found["from"] = {at: (meaning(at, config), getattr(config.features[at], "buckets", 0)) for at in of}
        found["buckets"] = getattr(feature, "buckets", 0)
    return found


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


class _Layouts:
    """Where the rows, slots and numbers of now were before."""

    def __init__(self, old: Config, new: Config) -> None:
        before, after = Featurizer(old), Featurizer(new)
        self.old, self.new = before.layout, after.layout
        self.same = {n for n in new.features if n in old.features and meaning(n, old) == meaning(n, new)}
        self.before, self.after = before.fields, after.fields
        self.rows = np.full(self.new.rows, -1, np.int64)  # (R,) of the old table; -1: fresh
        for name, field in self.after.items():
            feature = new.features[name]
            shares = isinstance(feature, History) and feature.rows == "shared"
            if name in self.same and not shares:
                self.rows[field.base : field.base + field.buckets + 1] = _rows_of(self.before[name], field)
        self.fields = [self.old.fields.index(f) if f in self.same else -1 for f in self.new.fields]
        owner = {n: n if n in new.features else n.rpartition(".")[0] for n in self.new.numerics}
        self.numbers = [self.old.numerics.index(n) if owner[n] in self.same else -1 for n in self.new.numerics]

    def keeps(self, name: str) -> bool:
        """Whether what the past keeps under a name is what is read now."""
        return name.removesuffix(".bins") in self.same

    def entered(self, dim: int) -> Array:
        """(F x dim + N,) where each of the numbers that enter the first layer was; -1: nowhere."""
        fields = [np.arange(dim) + f * dim if f >= 0 else np.full(dim, -1) for f in self.fields]
        numbers = [n + len(self.old.fields) * dim if n >= 0 else -1 for n in self.numbers]
        return np.concatenate([*fields, np.array(numbers)]).astype(np.int64)

    def features(self, ids: Array, weights: Array, dense: Array) -> dict[str, Array]:
        """(n, S), (n, S), (n, N) of old events, as they would be encoded now but for what they don't know."""
        now = np.repeat(self.new.slot_base[None], len(ids), 0)
        absent = np.array([f.slots == 1 and f.pooling == "sum" for f in self.after.values()], np.float32)
        weighed = np.repeat(absent[self.new.slot_field][None], len(ids), 0)  # a bag's empty slots weigh nothing
        for name in self.same & self.after.keys():
            before, field = self.before[name], self.after[name]
            slots = min(before.slots, field.slots)
            then, at = slice(before.slot, before.slot + slots), slice(field.slot, field.slot + slots)
            now[:, at], weighed[:, at] = ids[:, then] - before.base + field.base, weights[:, then]
        numbers = np.full((len(dense), len(self.numbers)), np.nan, np.float32)
        for at_number, then_number in enumerate(self.numbers):
            if then_number >= 0:
                numbers[:, at_number] = dense[:, then_number]
        return {"ids": now, "weights": weighed, "dense": numbers}


def _rows_of(before: Field, field: Field) -> Array:
    """(buckets + 1,) the old row of each of a field's rows."""
    if field.buckets % before.buckets:
        raise ConfigError(
            f"features.{field.name}.buckets: {before.buckets} may become a multiple of that, not {field.buckets}"
        )
    hashed = np.arange(field.buckets, dtype=np.int64) % before.buckets
    return np.concatenate(([0], hashed + 1)) + before.base


class _Moves:
    """Lays what is known of weights, or of what belongs to each of them, over what is fresh."""

    def __init__(self, old: Config, new: Config, layouts: _Layouts) -> None:
        self.rows = torch.from_numpy(layouts.rows)
        self.entered = torch.from_numpy(layouts.entered(new.model.embedding_dim))
        self.numbers = torch.tensor(layouts.numbers, dtype=torch.int64)
        self.outputs = old.outputs, new.outputs
        self.shallow = not new.model.hidden

    def table(self, known: Tensor, fresh: Tensor) -> Tensor:
        """(R, W) first-order weights of each output, then the embedding; or (R, 1), a number for each row."""
        found, there = fresh.clone(), self.rows >= 0
        wider = fresh.shape[1] - known.shape[1]  # by the first-order weights of new classes
        old, new = self.outputs if wider else (0, 0)
        columns = torch.cat((torch.arange(old), torch.arange(new, fresh.shape[1])))
        found[there.nonzero(), columns] = known[self.rows[there]]
        return found

    def param(self, name: str, known: Tensor, fresh: Tensor) -> Tensor:
        """In the shape that it has now."""
        found, came = fresh.detach().clone(), self._came(name)
        if came is None:
            found[: len(known)] = known
            return found
        now, then = torch.nonzero(came >= 0)[:, 0], came[came >= 0]
        if "cross." in name and known.dim() == 2:  # what enters is also what comes out
            found[now[:, None], now] = known[then[:, None], then]
        elif "cross." in name:
            found[now] = known[then]
        else:
            found[: len(known), now] = known[:, then]
        return found

    def _came(self, name: str) -> Tensor | None:
        """Where the inputs of a parameter were, if they are those of the model."""
        first = "head.weight" if self.shallow else "hidden.0.weight"
        if "cross." in name or name.removeprefix("deep.") == first:
            return self.entered
        return self.numbers if name in ("weight", "linear.weight") else None


def _learner(state: State, old: Config, new: Config, layouts: _Layouts) -> State:
    eager = new.worker.model_copy(update={"engine": "eager", "device": "cpu"})
    fresh = Learner(new.model_copy(update={"worker": eager}), serving=True)
    moves, memory, numerics = _Moves(old, new, layouts), state["memory"], fresh.numerics.state_dict()
    held = layouts.features(memory["ids"], memory["weights"], memory["dense"])
    if "output" in (columns := memory.get("columns", {})):
        held["columns"] = {**columns, "output": _wider(columns["output"], new.outputs)}  # type: ignore[assignment]
    for now, then in enumerate(layouts.numbers):
        for name, column in numerics.items() if then >= 0 else ():
            column[now] = state["numerics"][name][then]
    engine = _engine(state["engine"], fresh, moves)
    found = {**state, "engine": engine, "numerics": numerics, "memory": {**memory, **held}}
    found.pop("recall", None)  # keys of errors are made of rows and of what enters the first layer
    if average := state.get("plugins", {}).get("ema"):
        known = _split(average["flat"], state["engine"]["params"])
        flat = torch.cat([moves.param(name, known[name], p).reshape(-1) for name, p in engine["params"].items()])
        there, at = moves.rows >= 0, torch.full((layouts.new.rows,), int(average["step"]))
        at[there] = average["at"][moves.rows[there]]
        moved = {**average, "flat": flat, "table": moves.table(average["table"], engine["table"]), "at": at}
        found["plugins"] = {**state["plugins"], "ema": moved}
    return found


def _engine(state: State, fresh: Learner, moves: _Moves) -> State:
    dense, known = fresh.engine.dense, state["params"]
    params = {name: moves.param(name, known[name], _blank(p, known[name])) for name, p in dense.params.items()}
    slots = {}
    for i, begun in enumerate(dense.update.slots(torch.cat([p.reshape(-1) for p in params.values()]))):
        before, first = _split(state["slots"][str(i)], known), _split(begun, params)
        slots[str(i)] = torch.cat([moves.param(n, before[n], first[n]).reshape(-1) for n in params]).view_as(begun)
    table = moves.table(state["table"], fresh.engine.table)
    rows = enumerate(fresh.engine.fresh_slots(table))
    row_slots = {str(i): moves.table(state["row_slots"][str(i)], begun) for i, begun in rows}
    return {**state, "params": params, "slots": slots, "table": table, "row_slots": row_slots}


def _blank(param: Tensor, known: Tensor) -> Tensor:
    """Zero, but for the biases of classes that are new."""
    found = torch.zeros_like(param.detach())
    if param.dim() == 1 and 0 < len(known) < len(param):
        found[len(known) :] = known.min() - NEW_CLASS
    return found


def _split(flat: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A column (P,) by parameter, in its shape."""
    parts = torch.split(flat.reshape(-1), [p.numel() for p in params.values()])
    return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}


def _tickets(state: State, old: Config, new: Config, layouts: _Layouts) -> State:
    if not state["id"]:
        return state
    found = {**state, **layouts.features(state["ids"], state["weights"], state["dense"])}
    found.pop("recalled", None)
    if old.outputs != new.outputs:
        found["output"] = _wider(state["output"], new.outputs)
        found["served"] = np.pad(state["served"], ((0, 0), (0, new.outputs - old.outputs)))
        found.pop("notes", None)  # what other weights said, of fewer classes
    return found


def _wider(values: Array, outputs: int) -> Array:
    """(n, O) of logits (n, O'), of what was said before there were so many classes."""
    least = values.min(1, keepdims=True) - NEW_CLASS
    return np.concatenate((values, np.repeat(least, outputs - values.shape[1], 1)), 1).astype(values.dtype)
