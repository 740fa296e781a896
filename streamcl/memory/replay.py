"""A table of past examples, from which each live example draws a few to be learned again beside it.

Beside the example and whose it is, a row holds the columns that plug-ins need, and no others:

    output      (O,) raw output that the event was answered with
    hidden      (H,) what entered the model's last layer then
    loss        () of the task in the last step that the row took part in, nats
    hits        () how often it has been replayed
    written     () number of learning steps before it was written
    last_seen   () the same of the last step that it took part in
    tasks       (T,) labels of the further tasks; there, whoever asks, where there are such

and what plug-ins keep there of their own (`Plugin.columns`), 0 in a fresh row. `time_s`, of the event, and `key`, a
64-bit mark of the event's key, and `sample_weight` (see `Ticket.weight`) are there for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.memory.owners import Owners, close_ranks
from streamcl.memory.retention import RETENTIONS
from streamcl.plugin import Draw, Plugin, PluginError, Retention, Shape, Step, builtin
from streamcl.protocols import State
from streamcl.random import below, key_of
from streamcl.records import Selector, Ticket
from streamcl.state import cut
from streamcl.stations import Replay as ReplayConfig

EXAMPLE = ("ids", "weights", "dense", "y")
HELD = (*EXAMPLE, "sample_weights")
COLUMNS = ("output", "hidden", "loss", "hits", "written", "last_seen")

ALWAYS = ("key", "time_s", "sample_weight", "live")

Spec = Mapping[str, tuple[tuple[int, ...], type[np.generic]]]
"""Shape of a row and dtype of the columns beside the example, by name."""


def held_columns(plugins: Iterable[Plugin], shape: Shape) -> Spec:
    """The columns that these plug-ins need. Raises PluginError for what nobody provides."""
    plugins = list(plugins)
    own = {name: size for plugin in plugins for name, size in plugin.columns(shape).items()}
    wanted = frozenset[str]().union(*(plugin.needs for plugin in plugins))
    # Weight sets that could be there are for whoever reads them to miss: which it wants may hang on its options.
    there = {*COLUMNS, *own, *ALWAYS}.union(*(plugin.provides for plugin in plugins))
    if wanted - there:
        there |= frozenset[str]().union(*(each.provides for each in builtin().values()))
    for plugin in plugins:
        if missing := plugin.needs - there:
            raise PluginError(f"plugins: {plugin.kind} needs {', '.join(sorted(missing))}, which nobody provides")
    shapes = {"output": (shape.outputs,), "hidden": (shape.hidden,)}
    kinds: dict[str, type[np.generic]] = dict.fromkeys(("hits", "written", "last_seen"), np.int64)
    found = {name: (shapes.get(name, ()), kinds.get(name, np.float32)) for name in COLUMNS if name in wanted}
    return found | {name: (size, np.float32) for name, size in own.items()}


class Replay:
    """Preallocated columns of examples (raw features, label, and whose they are), filled by a retention policy.

    Args:
        config: `capacity` rows (count); 20,000 rows of 12 ids, 12 weights and 10 numerics take 4.3 MB.

    Shape:
        `draw(n, step)` returns ids (n, S) int64, weights (n, S), dense (n, N), y (n,) float32; n may exceed what is
        held, for it draws with replacement.

    Raises:
        IndexError: `draw` from an empty memory.
    """

    def __init__(
        self, config: ReplayConfig, seed: int, slots: int, numerics: int, columns: Spec = MappingProxyType({})
    ) -> None:
        self.capacity = capacity = config.capacity if config.retention != "none" else 0
        built_in = capacity and config.retention != "plugin"
        self.policy = RETENTIONS[config.retention](capacity, seed) if built_in else None
        self.keeper: Retention | None = None
        self.drawer: Draw | None = None
        self.key = key_of(seed, "replay.draw")
        self.ids = np.zeros((capacity, slots), np.int64)
        self.weights = np.zeros((capacity, slots), np.float32)
        self.dense = np.zeros((capacity, numerics), np.float32)
        self.y = np.zeros(capacity, np.float32)
        self.sample_weights = np.ones(capacity)
        self.owners = Owners(capacity)
        made = {name: np.zeros((capacity, *size), kind) for name, (size, kind) in columns.items()}
        self.columns: dict[str, NDArray[Any]] = made
        self.kept = 0  # rows held, where a plug-in says who stays

    def take_over(self, plugins: Iterable[Plugin]) -> None:
        """Let those of the plug-ins say who stays and who is drawn that are there for it."""
        for plugin in plugins:
            if isinstance(plugin, Retention):
                self.keeper = plugin
            if isinstance(plugin, Draw):
                self.drawer = plugin

    def __len__(self) -> int:
        return len(self.policy) if self.policy is not None else self.kept

    def pick(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """(n,) places of rows, and what each row's loss is multiplied by beside the others', mean 1."""
        if not len(self):
            raise IndexError("nothing is held that could be replayed")
        return self.uniform(n, step) if self.drawer is None else self.drawer.pick(n, step, self)

    def uniform(self, n: int, step: int) -> tuple[Tensor, Tensor]:
        """`pick` of a memory for which no plug-in draws."""
        return torch.tensor([below(len(self), self.key, step, i) for i in range(n)]), torch.ones(n)

    def examples(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n, S), (n, S), (n, N), (n,) raw features and labels of these rows."""
        rows = index.numpy()
        ids, weights, dense, y = (torch.from_numpy(getattr(self, name)[rows]) for name in EXAMPLE)
        return ids, weights, dense, y

    def columns_of(self, index: Tensor) -> dict[str, Tensor]:
        rows = index.numpy()
        own = {"key": self.owners.keys, "time_s": self.owners.times, "sample_weight": self.sample_weights}
        return {name: torch.from_numpy(column[rows]) for name, column in (own | self.columns).items()}

    def draw(self, n: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.examples(self.pick(n, step)[0])

    def write(self, ticket: Ticket, label: float, step: int = 0, loss: float = 0.0, also: Sequence[float] = ()) -> None:
        slot = self._place(label)
        if slot is None:
            return
        self.ids[slot], self.weights[slot], self.dense[slot] = ticket.features
        self.y[slot], self.sample_weights[slot] = label, ticket.weight
        for name, column in self.columns.items():
            column[slot] = 0
            match name:
                case "output":
                    column[slot] = ticket.scores.output
                case "hidden":
                    column[slot] = ticket.scores.notes.get("hidden", 0.0)  # an old ticket has none
                case "loss":
                    column[slot] = loss
                case "tasks":
                    column[slot] = also
                case "written" | "last_seen":
                    column[slot] = step
        self.owners.write(slot, Owners.of(ticket))

    def forget(self, who: Selector) -> int:
        """Erase rows, and close the ranks; returns how many. What the retention policy says of the rest still holds."""
        size = len(self)
        erased = self.owners.meant(who, size)
        if erased.any():
            kept = self.policy.forget(erased) if self.policy is not None else self._closed(erased)
            for column in (*(getattr(self, name) for name in HELD), *self.columns.values()):
                close_ranks(column, kept, size)
            self.owners.close_ranks(kept, size)
        return int(erased.sum())

    def _closed(self, erased: NDArray[np.bool_]) -> NDArray[np.int64]:
        kept = np.flatnonzero(~erased) if self.keeper is None else self.keeper.closed(erased)
        self.kept = len(kept)
        return kept

    def _place(self, label: float) -> int | None:
        if self.keeper is not None:
            slot = self.keeper.place(label, self) if self.capacity else None
            self.kept = self.kept if slot is None else max(self.kept, slot + 1)
            return slot
        return self.policy.place(label) if self.policy is not None else None

    def touch(self, step: Step) -> None:
        """These rows have taken part in a step."""
        if step.index is None or step.losses is None:
            return
        rows = step.index.numpy()
        if "hits" in self.columns:
            np.add.at(self.columns["hits"], rows, 1)
        if "last_seen" in self.columns:
            self.columns["last_seen"][rows] = step.number
        if "loss" in self.columns:
            self.columns["loss"][rows] = step.losses[-len(rows) :].numpy()

    def read(self) -> dict[str, float]:
        """How many rows, and how old they are in event time; the newest is as good a now as any."""
        size = len(self)
        told = {"replay_rows": float(size)} | ({"replay_fill": size / self.capacity} if self.capacity else {})
        times = self.owners.times[:size]
        times = times[np.isfinite(times)]  # rows of old snapshots have none
        return told | ({"replay_age_s": float(times.max() - times.mean())} if len(times) else {})

    def state_dict(self) -> State:
        size = len(self)
        held = {name: cut(getattr(self, name)[:size]) for name in HELD}
        columns = {name: cut(column[:size]) for name, column in self.columns.items()}
        held |= {"columns": columns} if columns else {}
        held |= self.owners.state_dict(size)
        held |= {} if self.keeper is None else {"kept": self.kept}
        return {**held, "policy": self.policy.state_dict() if self.policy is not None else {}}

    def load_state_dict(self, state: State) -> frozenset[str]:
        """Returns the columns that the state hasn't: they begin at 0, and whoever knows the rows may say more."""
        if self.policy is not None:  # an empty one is false
            self.policy.load_state_dict(state["policy"])
        self.kept = int(state.get("kept", 0))
        for name in HELD:
            # An old snapshot has no sample weights.
            getattr(self, name)[: len(self)] = state[name] if name in EXAMPLE else state.get(name, 1.0)
        self.owners.load_state_dict(state, len(self))
        kept = state.get("columns", {})
        for name, column in self.columns.items():
            column[: len(self)] = kept.get(name, 0)
        return frozenset(self.columns.keys() - kept.keys()) if len(self) else frozenset()
