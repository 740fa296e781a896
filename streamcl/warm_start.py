"""First weights from elsewhere: an offline model's in a file, or those of a snapshot of another application.

`model.warm_start` (or `streamcl run --warm-start`) names it. It is read at a start that finds no checkpoint, before the
first snapshot is written, and never again: what it held is in every snapshot, and its SHA-256 is a fact of the state
(see `streamcl.lineage`). So state stays a function of config, seed, this file and the events; a configuration that
names another file is refused. `replay` reads it likewise. Optimiser, memories and plug-ins begin afresh at these
weights.

A file is in safetensors' format; `save` writes one. All of it must fit; what it doesn't hold is drawn as ever.

| tensor | shape | what it is |
|---|---|---|
| `dense.NAME` | as in the model | a parameter, by the name that torch knows it by, such as `deep.hidden.0.weight` |
| `ids.FIELD`, `ends.FIELD` | (bytes,) uint8, (n,) int64 | n categories: UTF-8 end to end, and where each ends |
| `rows.FIELD` | (n, D) | their embeddings |
| `first.FIELD` | (n, O) | their first-order weights, of models that have any |
| `numeric.NAME` | (3,) | how many values the running statistics begin with (count), their mean, their deviation |
| `target` | (3,) | the same of the labels of a regression |

Categories are hashed as events' are. Of several that meet in one row the mean is taken.

A snapshot is named by its folder, `.../NAME-0-of-1/0000000123-456`. It gives all of its dense parameters, which must
fit, the rows of those fields that both have, with as many buckets, and the running statistics of those numerics.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl.checkpoint import Store
from streamcl.config import Config, ConfigError
from streamcl.engine.eager import Eager
from streamcl.features import Featurizer, Field, category
from streamcl.learner import Learner
from streamcl.protocols import State
from streamcl.snapshot import MANIFEST

if TYPE_CHECKING:
    from streamcl.worker import Worker

log = logging.getLogger(__name__)

Moments = tuple[float, float, float]
"""Count, mean and standard deviation."""
FORMAT = {"format": "streamcl.warm_start/1"}


def save(
    path: Path,
    dense: Mapping[str, Tensor],
    categories: Mapping[str, Sequence[str | int | bool]] | None = None,
    rows: Mapping[str, Tensor] | None = None,
    first: Mapping[str, Tensor] | None = None,
    numerics: Mapping[str, Moments] | None = None,
    target: Moments | None = None,
) -> str:
    """Write a file of weights; returns its SHA-256.

    Args:
        dense: Parameters by torch's names: the `state_dict` of a model that is built alike.
        categories: By field the n values that its rows are of, as they stand in events.
        rows: By field (n, D) embeddings.
        first: By field (n, O) first-order weights.

    Raises:
        ValueError: there are not as many rows as categories; names the tensor and its shape.
        BadInput: a category is neither text nor integer nor boolean.
    """
    tensors = {f"dense.{name}": value.detach().contiguous() for name, value in dense.items()}
    texts = {name: [category(name, each).encode() for each in given] for name, given in (categories or {}).items()}
    for name, given in texts.items():
        tensors[f"ids.{name}"] = torch.tensor(list(b"".join(given)), dtype=torch.uint8)
        tensors[f"ends.{name}"] = torch.tensor([len(each) for each in given], dtype=torch.int64).cumsum(0)
    for kind, tables in (("rows", rows or {}), ("first", first or {})):
        for name, value in tables.items():
            if value.ndim != 2 or len(value) != len(texts.get(name, ())):
                raise ValueError(f"{kind}.{name}: {_told(value)}, for {len(texts.get(name, ()))} categories")
            tensors[f"{kind}.{name}"] = value.detach().contiguous()
    moments = {f"numeric.{name}": each for name, each in (numerics or {}).items()}
    moments |= {"target": target} if target else {}
    tensors |= {name: torch.tensor(each, dtype=torch.float64) for name, each in moments.items()}
    save_file(tensors, path, FORMAT)
    return sha256(path)


@dataclass
class Weights:
    """What is to be begun with. `parts` are columns of rows of the table: (name, ids, values, whether first-order)."""

    dense: dict[str, Tensor] = field(default_factory=dict)
    parts: list[tuple[str, Tensor, Tensor, bool]] = field(default_factory=list)
    numerics: dict[str, Moments] = field(default_factory=dict)
    target: Moments | None = None


def warm_start(worker: Worker) -> None:
    """Give a worker that has learned nothing the weights that its config names, if it names any.

    Raises:
        ConfigError: they can't be read or don't fit; names the tensor, its shape and the one that is wanted.
    """
    config, learner = worker.config, worker.learner
    path = config.model.warm_start
    if path is None:
        return
    if not isinstance(learner, Learner):
        raise ConfigError("model.warm_start: a River model has no weights to be given")
    weights = _of_snapshot(path, config) if path.is_dir() else _of_file(path, config)
    _fill(learner, config, weights, path)
    if worker.deltas:  # the first snapshot has it all
        worker.deltas.load_state_dict({})
    worker.lineage.add("warm_start", sha256=sha256(path))
    rows = sum(len(ids) for _, ids, _, _ in weights.parts)
    log.info("warm start: %d parameters by name and %d rows of %s", len(weights.dense), rows, path)


def begun_with(worker: Worker) -> None:
    """Refuse a snapshot that began with other weights than its config names. A file that is gone by now is believed."""
    path, fact = worker.config.model.warm_start, worker.lineage.last("warm_start")
    if path is None or (fact and (not path.exists() or fact["sha256"] == sha256(path))):
        return
    began = f"that began with {fact['sha256'][:16]}..." if fact else "that began without one"
    raise ConfigError(
        f"model.warm_start: {path}: there is a checkpoint already, {began}; a warm start is for a shard's first one: "
        "leave it out, or begin under another name"
    )


def sha256(path: Path) -> str:
    """Of a file, or of a snapshot's manifest, which holds the checksums of the rest. Raises ConfigError."""
    try:
        with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"model.warm_start: {path}: {error.strerror}") from error


def _of_file(path: Path, config: Config) -> Weights:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.warm_start: {path}: {error}") from error
    featurizer = Featurizer(config)
    fields = {each.name: each for each in (*featurizer.categoricals, *featurizer.bags)}
    found = Weights()
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "dense":
            found.dense[rest] = value
        elif kind in ("rows", "first"):
            found.parts.append((name, _ids(path, name, value, tensors, fields), value, kind == "first"))
        elif kind == "numeric" or name == "target":
            moments = _moments(path, name, value)
            found.target = moments if kind == "target" else found.target
            found.numerics |= {rest: moments} if kind == "numeric" else {}
        elif kind not in ("ids", "ends"):
            raise _wrong(path, name, value, "is none of dense.*, rows.*, first.*, ids.*, ends.*, numeric.*, target")
    return found


def _ids(path: Path, name: str, value: Tensor, tensors: Mapping[str, Tensor], fields: Mapping[str, Field]) -> Tensor:
    """(n,) rows of the table."""
    of = name.partition(".")[2]
    if of not in fields:
        raise _wrong(path, name, value, f"there is no such field; the table has {', '.join(sorted(fields))}")
    if fields[of].salt is not None:
        raise _wrong(path, name, value, f"features.{of} has a dynamic table, whose rows come and go with events")
    if f"ids.{of}" not in tensors or f"ends.{of}" not in tensors:
        raise _wrong(path, name, value, f"ids.{of} and ends.{of} must say whose rows these are")
    text, ends = bytes(tensors[f"ids.{of}"].numpy()), tensors[f"ends.{of}"].tolist()
    if len(ends) != len(value) or sorted(ends) != ends or (ends and (ends[0] < 0 or ends[-1] != len(text))):
        raise _wrong(path, name, value, f"ends.{of} cuts {len(text)} bytes into {len(ends)} categories")
    starts = [0, *ends[:-1]]
    try:
        rows = [fields[of].row(text[start:end].decode()) for start, end in zip(starts, ends, strict=True)]
    except UnicodeDecodeError as error:
        raise _wrong(path, f"ids.{of}", tensors[f"ids.{of}"], "a category is no UTF-8") from error
    return torch.tensor(rows, dtype=torch.int64)


def _moments(path: Path, name: str, value: Tensor) -> Moments:
    numbers = value.double().reshape(-1).tolist()
    if value.shape != (3,) or not all(map(math.isfinite, numbers)) or min(numbers[0], numbers[2]) < 0.0:
        raise _wrong(path, name, value, "expected (3,): count, mean and deviation")
    count, mean, deviation = numbers
    return count, mean, deviation


def _of_snapshot(path: Path, config: Config) -> Weights:
    loaded = Store(path.parent, trust_pickle=config.trust_pickle).load(path.name)
    theirs = Config.parse(loaded.manifest["config"], str(path))
    if theirs.river is not None:
        raise ConfigError(f"model.warm_start: {path}: a River model has no weights to give")
    featurizer, state = Featurizer(theirs), loaded.state["learner"]
    engine = Eager(theirs, featurizer.layout, serving=True)
    engine.load_state_dict({**state["engine"], "rules": {}})
    found = Weights({name: param.detach().clone() for name, param in engine.dense.params.items()})
    ours = Featurizer(config)
    known = {each.name: each for each in (*ours.categoricals, *ours.bags)}
    for each in (*featurizer.categoricals, *featurizer.bags):
        mine = known.get(each.name)
        if mine is None:
            continue
        rows = engine.table[each.base : each.base + each.buckets + 1]
        if each.salt is not None or mine.salt is not None:
            raise _wrong(path, f"rows.{each.name}", rows, "a dynamic table, whose rows come and go with events")
        if mine.buckets != each.buckets:
            raise _wrong(path, f"rows.{each.name}", rows, f"{each.buckets} buckets; the config has {mine.buckets}")
        ids = torch.arange(mine.base, mine.base + mine.buckets + 1)
        for name, part, first in (("first", rows[:, : engine.first], True), ("rows", rows[:, engine.first :], False)):
            if part.shape[1]:
                found.parts.append((f"{name}.{each.name}", ids, part, first))
    for at, name in enumerate(featurizer.layout.numerics):
        if name in ours.layout.numerics:
            found.numerics[name] = _of_norm(state["numerics"], at)
    found.target = _of_norm(state["target"], 0) if config.task == "regression" else None
    return found


def _of_norm(norm: State, at: int) -> Moments:
    count = float(norm["count"][at])
    return count, float(norm["mean"][at]), math.sqrt(float(norm["m2"][at]) / count) if count else 0.0


def _fill(learner: Learner, config: Config, weights: Weights, path: Path) -> None:
    engine = learner.engine
    flat = engine.dense.flat.detach().clone()
    for name, value in weights.dense.items():
        if name not in engine.dense.params:
            known = ", ".join(engine.dense.params)
            raise _wrong(path, f"dense.{name}", value, f"the model has no such parameter; it has {known}")
        wanted = engine.dense.params[name].shape
        if value.shape != wanted:
            raise _wrong(path, f"dense.{name}", value, f"the model's has shape {tuple(wanted)}")
        _finite(path, f"dense.{name}", value)
        engine.dense.part(flat, name).copy_(value)
    with torch.no_grad():
        engine.dense.put(flat)
        for name, ids, value, first in weights.parts:
            columns = slice(0, engine.first) if first else slice(engine.first, engine.table.shape[1])
            width = columns.stop - columns.start
            if value.ndim != 2 or value.shape[1] != width:
                raise _wrong(path, name, value, f"the model's rows have {width} such numbers")
            _finite(path, name, value)
            touched, place = torch.unique(ids, return_inverse=True)
            sums = torch.zeros(len(touched), width, dtype=torch.float64).index_add_(0, place, value.double())
            rows = engine.table[touched]
            rows[:, columns] = (sums / torch.bincount(place)[:, None]).to(rows.dtype)
            if engine.by_field is not None and bool(rows[~engine.by_field.keep(touched)].any()):
                raise _wrong(path, name, value, "numbers behind the field's embedding_dim must be 0")
            engine.put_rows(touched, rows)
    _standardise(learner, config, weights, path)
    # Averages, anchors and the like begin where the weights are now.
    state = learner.state_dict()
    learner.load_state_dict({**state, "plugins": {}, "engine": {**state["engine"], "rules": {}}})


def _standardise(learner: Learner, config: Config, weights: Weights, path: Path) -> None:
    names = Featurizer(config).layout.numerics
    given = [(learner.numerics, list(names), name, each) for name, each in weights.numerics.items()]
    given += [(learner.target, ["target"], "target", weights.target)] if weights.target else []
    for norm, known, name, (count, mean, deviation) in given:
        if name not in known:
            raise ConfigError(f"model.warm_start: {path}: numeric.{name}: there is no such numeric feature")
        at = known.index(name)
        state = {key: np.array(value) for key, value in norm.state_dict().items()}
        state["count"][at], state["mean"][at], state["m2"][at] = count, mean, count * deviation * deviation
        norm.load_state_dict(state)


def _finite(path: Path, name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value.double()).all()):
        raise _wrong(path, name, value, "not all of it is finite")


def _told(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"


def _wrong(path: Path, name: str, value: Tensor, why: str) -> ConfigError:
    return ConfigError(f"model.warm_start: {path}: {name}, {_told(value)}: {why}")
