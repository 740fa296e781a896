"""What a sweep runs: `sweep.toml`, and the configurations that it stands for.

A path is a setting's place in the worker's configuration (`optimizer.learning_rate`, `plugins.0.weight`); its tables
may be written nested or with dots. Grid, random and list stand side by side, beside the base.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from pydantic import Field, ValidationError

from streamcl.backtest import redirected
from streamcl.config import Config, ConfigError, explain, fingerprint, table_of
from streamcl.random import key_of, uniform_array
from streamcl.stations import Station

BASE = "base"
Objective = Literal["ne", "log_loss", "auc", "gauc", "accuracy", "rmse", "mae"]
OBJECTIVES = {
    "binary": ("ne", "log_loss", "auc", "gauc", "accuracy"),
    "multiclass": ("ne", "log_loss", "accuracy"),
    "regression": ("rmse", "mae"),
}
"""By task; the first is the default."""

_READ, _SAID = "decides what is read", "changes nothing that a backtest does"
FIXED = {
    **dict.fromkeys(("events", "labels", "commands", "shard", "kafka", "registry"), _READ),
    **dict.fromkeys(("name", "predictions", "predictions_codec", "outcomes", "dead_letters", "control"), _SAID),
    **dict.fromkeys(("delivery", "deltas", "checkpoint", "telemetry", "serve", "trust_pickle"), _SAID),
    "task": "decides what a label is",
    "seed": "is set by the sweep's `seeds`",
}
"""Tables and settings of a configuration that are the same in all of a sweep, and why."""


class Halving(Station):
    """After `first`, `first * eta`, `first * eta^2`, ... events the best 1/eta go on, rounded up."""

    eta: int = Field(3, ge=2, description="one in so many goes on")
    first: int = Field(ge=1, description="events of the first round")


class Random(Station):
    """Draws of {uniform | log_uniform | integers | choice = [...]} for each path of `space`."""

    draws: int = Field(ge=1, description="configurations drawn (count)")
    seed: int = Field(0, ge=0, description="of the draws")
    space: dict[str, Any] = Field(min_length=1, description="by path: {log_uniform = [low, high]}, ...")


class Sweep(Station):
    """The content of `sweep.toml`.

    Raises:
        ConfigError: from `load`, `parse` and `candidates`; names the fault's path.
    """

    base: Path | None = Field(None, description="a worker's configuration; relative to this file")
    seeds: tuple[int, ...] = Field((), description="each configuration runs with each; default: the base's own")
    events: int | None = Field(None, ge=1, description="events of the log that are taken; default: all")
    objective: Objective | None = Field(None, description="what decides; default: ne, or rmse")
    choose_on: float | None = Field(
        None, gt=0.0, lt=1.0, description="share of the events on which the choice is made; it and the base go on"
    )
    halving: Halving | None = None
    grid: dict[str, Any] = Field({}, description="by path: a list of values; every combination")
    random: Random | None = None
    listed: tuple[dict[str, Any], ...] = Field((), alias="list", description="settings by path, and a `name`")

    @classmethod
    def load(cls, path: Path) -> Self:
        """`base` is taken as relative to the file."""
        data = table_of(path)
        if isinstance(data.get("base"), str):
            data["base"] = str(path.parent / data["base"])
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "sweep") -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error, cls))) from error

    def candidates(self, where: str, base: Path | None = None, inputs: Mapping[str, str] | None = None) -> Candidates:
        """The base, then everything that differs from it in what it learns, each once.

        Args:
            where: Stands before every fault.
            base: Instead of the sweep's own.
            inputs: By name the URL that is read instead.
        """
        path = base or self.base
        if path is None:
            raise ConfigError(f"{where}: base: no configuration to start from")
        config = Config.load(path)
        objective = self.objective or OBJECTIVES[config.task][0]
        if objective not in OBJECTIVES[config.task]:
            raise ConfigError(f"{where}: objective: task {config.task} has {', '.join(OBJECTIVES[config.task])}")
        seeds = self.seeds or (config.seed,)
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"{where}: seeds: one stands twice")
        data = table_of(path)
        found: dict[tuple[str, ...], Candidate] = {}
        for source, name, settings in [(BASE, BASE, {}), *self._points(where)]:
            place = f"{where}: {source}" if settings else str(path)
            parsed = Config.parse(_placed(data, settings, place), place)
            configs = tuple(_seeded(redirected(parsed, inputs or {}), seed) for seed in seeds)
            found.setdefault(tuple(map(fingerprint, configs)), Candidate(name, settings, configs))
        made = tuple(found.values())
        names = [candidate.name for candidate in made]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{where}: list: two different configurations are named {twice!r}")
        return Candidates(made, tuple(seeds), objective)

    def _points(self, where: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(table, name, settings by path)"""
        grid = dict(_leaves(self.grid))
        for path, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{where}: grid.{path}: expected a list of values")
        drawn = dict(_leaves(self.random.space)) if self.random else {}
        for path, values in drawn.items():
            _check_range(values, f"{where}: random.space.{path}")
        for table, paths in (("grid", grid), ("random.space", drawn)):
            _refuse_fixed(paths, f"{where}: {table}.")
        for values in itertools.product(*grid.values()) if grid else ():
            settings = dict(zip(grid, values, strict=True))
            yield "grid", _name(settings), settings
        for draw in range(self.random.draws if self.random else 0):
            assert self.random is not None  # noqa: S101 - else there are no draws
            settings = {path: _drawn(each, self.random.seed, path, draw) for path, each in drawn.items()}
            yield "random.space", _name(settings), settings
        for index, entry in enumerate(self.listed):
            settings = dict(_leaves({path: value for path, value in entry.items() if path != "name"}))
            _refuse_fixed(settings, f"{where}: list.{index}.")
            if not settings:
                raise ConfigError(f"{where}: list.{index}: sets nothing")
            yield f"list.{index}", str(entry.get("name") or _name(settings)), settings


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration of a sweep; `configs` holds it once for each seed. The base has no settings of its own."""

    name: str
    settings: Mapping[str, Any]
    configs: tuple[Config, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """All of a sweep; the base comes first."""

    all: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    objective: str

    @property
    def base(self) -> Config:
        return self.all[0].configs[0]


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value); a range is a value, any other table goes on."""
    for name, value in table.items():
        if isinstance(value, Mapping) and not (len(value) == 1 and next(iter(value)) in RANGES):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse_fixed(paths: Mapping[str, Any], prefix: str) -> None:
    for path in paths:
        top = path.partition(".")[0]
        if top in FIXED:
            raise ConfigError(f"{prefix}{path}: {top} {FIXED[top]}; it is the same in all of a sweep")


def _placed(data: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The configuration's tables with each setting in its place; missing tables are made."""
    made = copy.deepcopy(dict(data))
    for path, value in settings.items():
        node: Any = made
        parts = path.split(".")
        for at, part in enumerate(parts):
            last = at == len(parts) - 1
            if isinstance(node, list):
                if not (part.isdigit() and int(part) < len(node)):
                    there = ".".join(parts[:at])
                    raise ConfigError(f"{where}: {path}: {there} has {len(node)} tables in the base, from 0 on")
                part = int(part)  # type: ignore[assignment]
            elif part not in node:
                node[part] = [] if not last and parts[at + 1].isdigit() else {}
            if last:
                node[part] = value
            elif isinstance(node[part], str):  # a table that says no more than its kind
                node[part] = {"kind": node[part]}
            elif not isinstance(node[part], dict | list):
                raise ConfigError(f"{where}: {path}: {'.'.join(parts[: at + 1])} is no table in the base")
            node = node[part]
    return made


def _seeded(config: Config, seed: int) -> Config:
    data = config.model_dump(mode="json")
    return Config.parse({**data, "seed": seed, "deltas": {}}, "seeds")


RANGES = ("uniform", "log_uniform", "integers", "choice")


def _check_range(value: Any, where: str) -> None:
    kind, limits = next(iter(value.items())) if isinstance(value, Mapping) else ("", None)
    if kind not in RANGES or not isinstance(limits, list) or not limits:
        raise ConfigError(f"{where}: expected {{{' | '.join(RANGES)} = [...]}}")
    if kind == "choice":
        return
    number = int if kind == "integers" else (int, float)
    fits = len(limits) == 2 and all(isinstance(x, number) and not isinstance(x, bool) for x in limits)
    if not fits or not limits[0] <= limits[1] or not all(math.isfinite(x) for x in limits):
        raise ConfigError(f"{where}: {kind}: expected [low, high], two numbers")
    if kind == "log_uniform" and limits[0] <= 0:
        raise ConfigError(f"{where}: log_uniform: low must be above 0")


def _drawn(value: Mapping[str, Any], seed: int, path: str, draw: int) -> Any:
    """The `draw`th value of a path, whatever else is drawn; real numbers have four significant digits."""
    kind, limits = next(iter(value.items()))
    u = float(uniform_array(key_of(seed, f"sweep.{path}"), 1, draw)[0])
    if kind == "choice":
        return limits[int(u * len(limits))]
    low, high = limits
    if kind == "integers":
        return low + int(u * (high - low + 1))
    found = low + u * (high - low) if kind == "uniform" else low * (high / low) ** u
    return min(max(float(f"{found:.4g}"), low), high)


def _name(settings: Mapping[str, Any]) -> str:
    """The settings, by the last part of their path where that tells them apart."""
    short = [path.rpartition(".")[2] for path in settings]
    names = [last if short.count(last) == 1 else path for path, last in zip(settings, short, strict=True)]
    return ", ".join(f"{name}={_text(value)}" for name, value in zip(names, settings.values(), strict=True))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
