"""The plug-in points: where a method of continual learning takes part, and what it is told.

A method is a class in one file: `Options` say how it is configured, and the points that it stands on, by inheritance,
what it does. `class EWC(Term, Rule)` stands on two. In the order of an event's journey:

    Recall      reads what it has gathered while predicting, learns from outcomes
    Planner     what this event is worth: passes, rows drawn, nothing at all
    Draw        which rows of the memory are learned again
    Term        a loss beside the task's own, or in its place
    Rule        around the optimiser's step: before it, on the gradient, after it
    Retention   which rows stay in the memory

Monitors are the worker's: `streamcl.metrics`, `streamcl.drift`, `streamcl.boundaries`; what these find in the stream
reaches every plug-in as a signal. A model's parts are in `streamcl.models`.

It is named in `[[plugins]]` by its `kind`, if it stands in `streamcl.continual` or a package has registered it in the
entry-point group `streamcl.plugins`; any other by `module:Class`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn

from streamcl.protocols import State, StreamclError
from streamcl.random import key_of
from streamcl.records import Outcome, Selector, Signal
from streamcl.stations import Station, Stop

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.engine.eager import Eager
    from streamcl.features import RunningNorm
    from streamcl.memory.error import ErrorMemory
    from streamcl.memory.replay import Replay

GROUP = "streamcl.plugins"
PACKAGE = "streamcl.continual"


class PluginError(StreamclError):
    """A plug-in can't do what it is asked for with this model, task or memory; the text names it and says why."""


class Shape(NamedTuple):
    """What a module of a plug-in's own is built for: O outputs, H units of the last hidden layer (0: there is none)."""

    outputs: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Context:
    """What a plug-in is bound to, once.

    Attributes:
        errors: The error memory, for what moves or makes its keys.
    """

    config: Config
    engine: Eager
    memory: Replay
    target: RunningNorm
    read: Callable[[Tensor, Tensor, Tensor, Tensor], Rows]
    errors: ErrorMemory

    def rows(self, memory: Replay, index: Tensor) -> Rows:
        """Of a table of examples, as the model reads them today."""
        return self.read(*memory.examples(index))

    def y(self, label: float) -> float:
        """A label as the model's outputs are judged by it: standardised if the task is regression."""
        if self.config.task != "regression":
            return label
        return float(self.target.apply(np.array([label], np.float32))[0])

    def key(self, component: str) -> int:
        """Of counter-based draws; give it the plug-in's own name first: `ewc.sample`."""
        return key_of(self.config.seed, component)


class Plugin:
    """The base of all points. Everything may be left as it is.

    What a plug-in remembers between events is in `state_dict`, or is lost with the process. Neither a clock nor a
    global generator may enter it.

    Attributes:
        needs: Columns of the memory that it reads (see `streamcl.memory.replay.COLUMNS`), and weight sets.
        provides: Columns and weight sets that it makes.
        keeps_rows: It holds something of each row of the table, which a row that is given to another id would inherit:
            it can't work beside dynamic tables. Those that make weight sets can't either.
    """

    class Options(Station):
        kind: str

    options: Any
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    keeps_rows: ClassVar[bool] = False

    def __init__(self, options: Station | None = None, /, **settings: Any) -> None:
        self.options = self.Options(**settings) if options is None else options

    @property
    def kind(self) -> str:
        return str(self.options.kind)

    def module(self, shape: Shape) -> nn.Module | None:
        """Parameters of its own: they are learned, saved and guarded with the model's. Before `bind`.

        Their initial values must follow from the seed alone; on the model they are `plugins.NAME`, mostly
        its kind.
        """
        return None

    def columns(self, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        """What it keeps in each row of the memory, float32, by name and shape; it writes there by itself."""
        return {}

    def bind(self, context: Context) -> None:
        """Take what it needs of the learner. Raises PluginError when it can't work there."""
        self.context = context

    def on_signal(self, signal: Signal) -> None:
        """A boundary, a drift, a new class, ...: before anything else is done with the event that brought it."""

    def forget(self, who: Selector) -> int:
        """Erase what it holds of these events, but for rows of the memory; returns how many.

        What cannot be taken out of a sum begins anew, or stays like what the weights have learned: its docstring says.
        """
        return 0

    def read(self) -> Mapping[str, float]:
        """What it has to say about itself, finite; asking changes nothing. It is shown behind the plug-in's kind."""
        return {}

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        """An empty state: it begins here."""


class Rows(NamedTuple):
    """Examples as the model reads them: ids and weights (B, S), standardised numbers (B, N), targets (B,).

    `also` (B, T) are the labels of T further tasks, NaN where one is not known; None where nobody asks for them.
    """

    ids: Tensor
    weights: Tensor
    dense: Tensor
    y: Tensor
    also: Tensor | None = None


class Out(NamedTuple):
    """What a model makes of rows: raw outputs (B, O), and what entered its last layer (B, H); H 0 without a tower."""

    output: Tensor
    hidden: Tensor


@dataclass(slots=True)
class Grads:
    """A gradient of all weights.

    Attributes:
        dense: (P,)
        touched: (U,) rows of the table, each once, ascending.
        rows: (U, W)
    """

    dense: Tensor
    touched: Tensor
    rows: Tensor

    def dot(self, other: Grads) -> Tensor:
        """Over all weights; a row that one of them hasn't touched counts as 0."""
        mine, theirs = self._shared(other)
        found: Tensor = self.dense @ other.dense + (self.rows[mine] * other.rows[theirs]).sum()
        return found

    def plus(self, other: Grads, alpha: float | Tensor = 1.0) -> Grads:
        """self + alpha x other, of the rows that either has touched."""
        touched = torch.unique(torch.cat((self.touched, other.touched)))
        rows = self.rows.new_zeros(len(touched), self.rows.shape[1])
        rows[torch.searchsorted(touched, self.touched)] += self.rows
        rows[torch.searchsorted(touched, other.touched)] += alpha * other.rows
        return Grads(self.dense + alpha * other.dense, touched, rows)

    def with_dense(self, dense: Tensor) -> Grads:
        return Grads(dense, self.touched, self.rows)

    def on(self, touched: Tensor) -> Grads:
        """What it says of these rows (U,) alone, ascending; 0 where it hasn't touched one."""
        rows = self.rows.new_zeros(len(touched), self.rows.shape[1])
        mine = torch.isin(self.touched, touched)
        rows[torch.searchsorted(touched, self.touched[mine])] = self.rows[mine]
        return Grads(self.dense, touched, rows)

    def flat(self) -> Tensor:
        """(P + U x W,)"""
        return torch.cat((self.dense, self.rows.reshape(-1)))

    def norm(self) -> Tensor:
        norms = [torch.linalg.vector_norm(part) for part in (self.dense, self.rows)]
        return torch.hypot(*norms)

    def _shared(self, other: Grads) -> tuple[Tensor, Tensor]:
        """Places of the rows that both have touched."""
        mine = torch.isin(self.touched, other.touched)
        return torch.nonzero(mine)[:, 0], torch.searchsorted(other.touched, self.touched[mine])


@dataclass(frozen=True, slots=True)
class Plan:
    """What an event is worth.

    Attributes:
        passes: Steps taken on it, each with a draw of its own.
        draw: Rows that each pass replays.
        live: The event itself is learned; without it a pass replays alone.
        skip: No step at all; whatever has been learned stays. The event may still be kept for replay.
        trainable: Beginnings of the names of the dense parameters that move (`hidden`, `head`, ...) and `table` for
            rows; None: all.
        then: What follows when these passes have been taken, such as passes of the memory alone.
    """

    passes: int = 1
    draw: int = 0
    live: bool = True
    skip: bool = False
    trainable: tuple[str, ...] | None = None
    then: Plan | None = None


class Step:
    """The blackboard of one pass.

    Args:
        number: Learning steps that have been taken before; draws are keyed by it.
        live: (1, ...), or none of it if the plan leaves the event out.
        replay: (n, ...); None when nothing is replayed.
        index: (n,) where those rows are in the memory.
        share: (1 + n,) what each row's task loss is multiplied by, the live one first.
        columns: What the memory holds of the replayed rows beside the example, by name, (n, ...) each.
        served: The score that the live event was answered with.
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        live: Rows | None,
        replay: Rows | None,
        share: Tensor,
        *,
        index: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        served: float | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        self.number, self.plan = number, plan
        self.live, self.replay, self.share = live, replay, share
        self.index, self.columns = index, columns or {}
        self.served, self.outcome = served, outcome
        self.outs: dict[tuple[str, str], Out] = {}
        self.engine: Eager | None = None  # set when the step is taken
        self.losses: Tensor | None = None  # (1 + n,) of the task, in nats, once they are known

    @cached_property
    def rows(self) -> Rows:
        """The live row, then the replayed ones."""
        parts = [rows for rows in (self.live, self.replay) if rows is not None]
        if len(parts) == 1:
            return parts[0]
        joined = Rows(*(torch.cat(pair) for pair in zip(*(rows[:4] for rows in parts), strict=True)))
        also = [rows.also for rows in parts if rows.also is not None]
        return joined._replace(also=torch.cat(also)) if also else joined

    @cached_property
    def touched(self) -> Tensor:
        """(U,) rows of the table that are read, ascending: those that the optimiser moves."""
        found: Tensor = torch.unique(self.rows.ids)
        return found

    def send(self, device: torch.device) -> None:
        """What it holds of rows goes to a device, all numbers of one kind in one piece.

        Which rows of the table it touches is found before, on the host: there nobody has to wait for the answer.
        """
        rows, touched, live = self.rows, self.touched, 0 if self.live is None else len(self.live.y)
        further = [] if rows.also is None else [rows.also]
        ids, self.touched = _sent((rows.ids, touched), device)
        weights, dense, y, self.share, *also = _sent((rows.weights, rows.dense, rows.y, self.share, *further), device)
        sent = [ids, weights, dense, y, *also]
        self.rows = Rows(*sent)
        self.live = None if self.live is None else Rows(*(each[:live] for each in sent))
        self.replay = None if self.replay is None else Rows(*(each[live:] for each in sent))
        self.columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}

    def out(self, which: str = "live", weights: str = "live") -> Out:
        """What weights make of the `live` row or the `replay`ed ones; with gradient for `live` weights alone.

        Each is computed once, however many ask.
        """
        if (which, weights) not in self.outs:
            rows: Rows | None = getattr(self, which)
            assert rows is not None and self.engine is not None  # noqa: S101 - ask for what the plan has
            self.outs[which, weights] = self.engine.out(rows, weights)
        return self.outs[which, weights]

    def gradient(self, which: str = "replay") -> Grads:
        """Of the mean task loss of these rows alone, at the weights before the step."""
        rows: Rows | None = getattr(self, which)
        assert rows is not None and self.engine is not None  # noqa: S101
        return self.engine.gradient(rows)


def _sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on a device: they travel as one, in a dtype that holds all of them."""
    dtype = functools.reduce(torch.promote_types, [each.dtype for each in tensors])
    whole = torch.cat([each.reshape(-1).to(dtype) for each in tensors]).to(device, non_blocking=True)
    parts = torch.split(whole, [each.numel() for each in tensors])
    return [part.view(each.shape).to(each.dtype) for part, each in zip(parts, tensors, strict=True)]


class Query:
    """What a Recall is asked about: rows that are to be answered.

    Attributes:
        notes: What the ticket is to carry until the label comes, by name: (B, ...) arrays.
    """

    def __init__(self, engine: Eager, rows: tuple[Tensor, Tensor, Tensor], live: Out) -> None:
        self.engine, self.rows = engine, rows
        self.outs = {"live": live}
        self.notes: dict[str, Tensor] = {}

    def out(self, weights: str = "live") -> Out:
        """What these weights make of the rows; each is computed once, however many ask."""
        if weights not in self.outs:
            self.outs[weights] = self.engine.out(Rows(*self.rows, self.rows[0].new_zeros(0)), weights)
        return self.outs[weights]


class Recall(Plugin):
    """Changes raw outputs on their way out, by what it has gathered."""

    def apply(self, output: Tensor, query: Query) -> Tensor:
        """(B, O) of (B, O). It changes nothing that is remembered; what it wants to hear of again goes to the notes."""
        raise NotImplementedError

    def observe(self, outcome: Outcome) -> None:
        """The label is there and has been learned from; `outcome.ticket.scores.notes` hold what was noted."""


class Planner(Plugin):
    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        """What is to be done, of what planners before it had in mind."""
        raise NotImplementedError


class Draw(Plugin):
    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        """(n,) int64 places of rows, and (n,) weights of mean 1. `number` keys the draw; the memory is not empty."""
        raise NotImplementedError


class Retention(Plugin):
    def place(self, label: float, memory: Replay) -> int | None:
        """Where in the memory the example that has just been learned goes; None: it isn't kept.

        Called once for each, in the order of the stream. Slots fill up from 0 before any is used again.
        """
        raise NotImplementedError

    def closed(self, erased: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows (N,) are forgotten: the old slots of the others, in the order of their new ones, 0, 1, ..."""
        return np.asarray(np.flatnonzero(~erased), np.int64)


class Term(Plugin):
    """A loss beside the task's.

    Attributes:
        replaces_task: It stands for the task's own loss of live and replayed rows, which is then left out.
    """

    class Options(Plugin.Options):
        weight: float = Stop(1.0, ge=0, description="of this loss; 0: as if it were not there")

    replaces_task: ClassVar[bool] = False

    def loss(self, step: Step) -> Tensor:
        """Scalar, nats. It changes nothing: the step may still be refused."""
        raise NotImplementedError


class Rule(Plugin):
    """Around the optimiser's step, under `torch.no_grad`; never for a step that is refused before `transform`."""

    def before(self, step: Step) -> None:
        """The gradient is known and will be used; weights are as they were."""

    def transform(self, grads: Grads, step: Step) -> Grads:
        """What the optimiser is to take instead; the argument stays as it is."""
        return grads

    def after(self, step: Step) -> None:
        """The optimiser has taken its step."""


def _members(module: Any) -> Iterator[type[Plugin]]:
    for _, member in inspect.getmembers(module, inspect.isclass):
        if issubclass(member, Plugin) and member.__module__ == module.__name__ and _kind_of(member):
            yield member


def _kind_of(plugin: type[Plugin]) -> str:
    """Empty for a base class."""
    kind = plugin.Options.model_fields["kind"]
    return "" if kind.is_required() else str(kind.get_default())


@functools.cache
def _modules() -> tuple[ModuleType, ...]:
    package = importlib.import_module(PACKAGE)
    return tuple(importlib.import_module(f"{PACKAGE}.{each.name}") for each in pkgutil.iter_modules(package.__path__))


@functools.cache
def _registered() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def builtin() -> dict[str, type[Plugin]]:
    """Every method of `streamcl.continual` by kind: found, not listed."""
    return {_kind_of(member): member for module in _modules() for member in _members(module)}


def presets() -> dict[str, dict[str, Any]]:
    """Settings by the name of a paper's method: the `PRESETS` of the modules of `streamcl.continual`."""
    return {name: settings for module in _modules() for name, settings in getattr(module, "PRESETS", {}).items()}


def with_preset(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with its preset put in the place of the preset's name; its own plug-ins follow the preset's."""
    if "preset" not in data:
        return data
    known = presets()
    if data["preset"] not in known:
        raise PluginError(f"preset: {data['preset']!r} is not known; there are {', '.join(sorted(known))}")
    own = {name: value for name, value in data.items() if name != "preset"}
    return _under(known[data["preset"]], own)


def _under(preset: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    found = {**preset, **own}
    for name in preset.keys() & own.keys():
        if isinstance(preset[name], Mapping) and isinstance(own[name], Mapping):
            found[name] = {**preset[name], **own[name]}
        elif name == "plugins":
            found[name] = [*preset[name], *own[name]]
    return found


def resolve(kind: str) -> type[Plugin]:
    """The class of a kind. Raises ValueError, saying which are known."""
    if ":" in kind:
        return _imported(kind)
    known = builtin()
    if kind in known:
        return known[kind]
    if kind not in _registered():
        raise ValueError(f"kind {kind!r} is not known; there are {', '.join(sorted({*known, *_registered()}))}")
    return _plugin(_registered()[kind].load(), kind)


def _imported(path: str) -> type[Plugin]:
    module, _, name = path.partition(":")
    try:
        return _plugin(getattr(importlib.import_module(module), name), path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"kind {path!r} can't be imported: {error}") from error


def _plugin(found: Any, kind: str) -> type[Plugin]:
    if not (inspect.isclass(found) and issubclass(found, Plugin)):
        raise ValueError(f"kind {kind!r} is no Plugin")
    return found


def options(value: Any) -> Any:
    """The options of a plug-in, of its own class, from a table or the name of a kind. Raises ValueError."""
    value = {"kind": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        return value
    if not isinstance(value.get("kind"), str):
        raise ValueError("kind: which plug-in it is")
    plugin = resolve(value["kind"])
    given = {**value, "kind": _kind_of(plugin) or value["kind"]}
    try:
        return plugin.Options.model_validate(given).model_copy(update={"kind": value["kind"]})
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False))
        raise ValueError("; ".join(faults)) from error


def build(stations: Sequence[Station]) -> list[Plugin]:
    """Plug-ins in the order of the configuration, not bound to anything yet."""
    return [resolve(str(station.kind))(station) for station in stations]  # type: ignore[attr-defined]
