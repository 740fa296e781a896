"""Who stays in a full memory: scores of rows, of which the lowest leaves, and quotas of classes and segments.

Each retention costs O(capacity) array work per event. Who is drawn: `streamcl.continual.weighted_draws`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streamcl.memory.replay import Replay
from streamcl.plugin import Context, Plugin, PluginError, Retention, Rule, Shape, Step
from streamcl.protocols import State
from streamcl.random import uniform_array
from streamcl.records import Selector, Signal
from streamcl.state import cut
from streamcl.stations import Stop

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

LOWEST = float(np.finfo(np.float64).min)
"""Below every score, and finite, as a state should be."""


class Strata:
    """Which part of the stream a row is of: its class, the segment that it came in, or how old it is.

    A `boundary` begins a segment. Of more than `most` segments the two oldest become one.

    Args:
        by: `age`: a part is twice as long as the next younger one, counted in steps.
    """

    def __init__(self, by: str, most: int, context: Context, kind: str) -> None:
        if by == "class" and context.config.task == "regression":
            raise PluginError(f"plugins: {kind}: by = 'class' needs classes; a regression has none")
        self.by = by
        self.count = {"class": max(2, context.config.outputs), "none": 1}.get(by, most)
        self.steps = 0  # taken
        self.bounds: list[int] = []  # steps that had been taken when each segment but the first began

    def of(self, memory: Replay) -> Places:
        """(N,) in [0, count). Needs the column `written`."""
        size = len(memory)
        match self.by:
            case "class":
                return np.asarray(memory.y[:size], np.int64)
            case "segment":
                return np.asarray(np.searchsorted(self.bounds, memory.columns["written"][:size]), np.int64)
            case "age":
                age = np.maximum(self.steps - memory.columns["written"][:size], 0)
                return np.asarray(np.minimum(np.log2(1.0 + age), self.count - 1), np.int64)
        return np.zeros(size, np.int64)

    def now(self, label: float) -> int:
        """Of an example that is about to be kept."""
        return {"class": int(label), "segment": len(self.bounds)}.get(self.by, 0)

    def begin(self) -> bool:
        """A segment begins. True: the two oldest are one, and the others' numbers are one less, from now on."""
        if self.by != "segment":
            return False
        self.bounds.append(self.steps)
        if len(self.bounds) < self.count:
            return False
        del self.bounds[0]
        return True

    def state_dict(self) -> State:
        return {"steps": self.steps, "bounds": list(self.bounds)}

    def load_state_dict(self, state: State) -> None:
        self.steps, self.bounds = int(state.get("steps", 0)), [int(each) for each in state.get("bounds", [])]


def merged(column: NDArray[Any]) -> NDArray[Any]:
    """A column by segment, the first two of which have become one."""
    return np.concatenate((column[:1] + column[1:2], column[2:], np.zeros_like(column[:1])))


class Kept(Retention, Rule):
    """The base of retentions: a score for each row, quotas for each part of the stream.

    In a full memory a row leaves the part that is most rows above its quota, the newcomer's own row counted; there the
    row of the lowest score. A part's quota is in proportion to (examples seen of it) ^ `power`: 0 gives all parts the
    same number of rows, 1 the share that they have of the stream. O(capacity) per event.
    """

    class Options(Retention.Options):
        by: Literal["none", "class", "segment"] = Stop("none", description="parts of the stream that have quotas")
        power: float = Stop(
            0.0, ge=0, le=1, description="of the examples seen, in a part's quota; 0: equal, 1: as seen"
        )
        segments: int = Stop(16, ge=2, le=1024, description="most segments told apart; older ones are one")

    options: Any
    needs = frozenset({"written"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.strata = Strata(self.options.by, self.options.segments, context, self.kind)
        self.seen = np.zeros(self.strata.count)  # examples by part
        self.bar = np.full(self.strata.count, LOWEST)  # the highest score that has left, of lasting scores
        self.luck = np.zeros(context.memory.capacity)  # (N,) uniform
        self.key = context.key(f"{self.kind}.luck")

    def scores(self, memory: Replay) -> Floats:
        """(N,) of the rows held."""
        raise NotImplementedError

    @property
    def lasting(self) -> bool:
        """Scores are lots, drawn once: a newcomer needs one above all that have left, and may not be kept at all."""
        return False

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.strata.begin():
            self.seen = merged(self.seen)
            self.bar = np.concatenate(([self.bar[:2].max()], self.bar[2:], [LOWEST]))

    def after(self, step: Step) -> None:
        self.strata.steps = step.number + 1

    def place(self, label: float, memory: Replay) -> int | None:
        mine = self.strata.now(label)
        self.seen[mine] += 1
        lot = float(uniform_array(self.key, 1, int(self.seen.sum()))[0])
        if self.lasting and lot <= self.bar[mine]:
            return None
        slot = len(memory)
        if slot == memory.capacity:
            found = self._lowest(mine, lot, memory)
            if found is None:
                return None
            slot = found
        self.luck[slot] = lot
        return slot

    def _lowest(self, mine: int, lot: float, memory: Replay) -> int | None:
        """The slot of the row that leaves; None: the newcomer does."""
        parts = self.strata.of(memory)
        held = np.bincount(parts, minlength=self.strata.count).astype(np.float64)
        held[mine] += 1
        claims = np.where(self.seen > 0, np.maximum(self.seen, 1.0) ** self.options.power, 0.0)
        above = np.where(held > 0, held - (memory.capacity + 1) * claims / claims.sum(), -np.inf)
        part = int(above.argmax())
        scores = np.where(parts == part, self.scores(memory), np.inf)
        slot = int(scores.argmin())
        if parts[slot] != part:  # the newcomer alone is of this part
            return None
        if not self.lasting:
            return slot
        leaves = min(float(scores[slot]), lot) if part == mine else float(scores[slot])
        self.bar[part] = max(self.bar[part], leaves)
        return None if part == mine and lot < scores[slot] else slot

    def closed(self, erased: NDArray[np.bool_]) -> Places:
        kept = super().closed(erased)
        self.luck[: len(kept)] = self.luck[kept]
        self.luck[len(kept) :] = 0
        return kept

    def state_dict(self) -> State:
        arrays = {"seen": self.seen.copy(), "bar": self.bar.copy(), "luck": cut(self.luck)}
        return {**arrays, "by": self.strata.by, "strata": self.strata.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Of other parts of the stream than now: it counts anew."""
        self.seen[:], self.bar[:], self.luck[:] = 0, LOWEST, 0
        self.strata.load_state_dict(state.get("strata", {}))
        if state and len(state["luck"]) == len(self.luck):
            self.luck[:] = state["luck"]
        if state and state["by"] == self.strata.by and len(state["seen"]) == len(self.seen):
            self.seen[:], self.bar[:] = state["seen"], state["bar"]


class Quotas(Kept):
    """Rows by class or segment, balanced or as the stream has them; inside a part a uniform sample, or by recency.

    `keep = "random"` gives each example a lot and keeps the highest: of each part the rows held are a uniform sample of
    all its examples, without parts a reservoir. After a forget the rest stays uniform: the memory fills up as slowly as
    it changes.

    Source:
        BalConpas, Chen et al. 2024 (ECCV), arXiv 2407.16354: a memory in which classes have the share that they have
        had in the stream (`power = 1`). Repeated data, Hernandez et al. 2022, arXiv 2205.10487: rows that are repeated
        often do harm (`keep = "unused"`). Lots: weighted reservoirs, Efraimidis & Spirakis 2006, with equal weights.

    Differs from the source:
        An example has one class here, an image of BalConpas several. Its feature distillation is a Term of its own.
    """

    class Options(Kept.Options):
        kind: Literal["quotas"] = "quotas"
        keep: Literal["random", "recent", "unused"] = Stop(
            "random", description="of a part: a uniform sample, the newest, or those replayed least often"
        )

    options: Options
    needs = frozenset({"written", "hits"})

    @property
    def lasting(self) -> bool:
        return self.options.keep == "random"

    def scores(self, memory: Replay) -> Floats:
        size = len(memory)
        if self.options.keep == "random":
            return self.luck[:size]
        if self.options.keep == "recent":
            return memory.columns["written"][:size].astype(np.float64)
        return np.asarray(0.5 * self.luck[:size] - memory.columns["hits"][:size], np.float64)


class Flips(Rule):
    """Counts in each row how often what had been right was wrong at the next visit.

    Columns `flips` and `passes` (visits at which it was right) are for draws and retentions, `right` is its own: 1 or
    -1 at the last visit, 0 before any. A visit costs nothing: its outputs are those of the step. O(rows of the step).

    Source:
        Toneva et al. 2019 (ICLR), arXiv 1812.05159, section 3: forgetting and learning events.

    Differs from the source:
        A visit is a replay, where the paper looks at each example once an epoch.
    """

    class Options(Rule.Options):
        kind: Literal["flips"] = "flips"

    options: Options
    provides = frozenset({"flips", "passes"})

    def columns(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {"flips": (), "passes": (), "right": ()}

    def bind(self, context: Context) -> None:
        if context.config.task == "regression":
            raise PluginError(f"plugins: {self.kind}: a regression's answers are not right or wrong")
        super().bind(context)
        self.visits = self.flipped = 0

    def after(self, step: Step) -> None:
        if step.index is None or step.replay is None:
            return
        output, y = step.out("replay").output.detach(), step.replay.y
        right = (output[:, 0] > 0) == (y > 0.5) if output.shape[1] == 1 else output.argmax(1) == y.long()
        rows, first = np.unique(step.index.numpy(), return_index=True)
        now, held = right.numpy()[first], self.context.memory.columns
        flips = (held["right"][rows] > 0) & ~now
        held["flips"][rows] += flips
        held["right"][rows] = np.where(now, 1, -1)
        np.add.at(held["passes"], step.index.numpy(), right.numpy())
        self.visits, self.flipped = self.visits + len(rows), self.flipped + int(flips.sum())

    def read(self) -> dict[str, float]:
        held = self.context.memory.columns["flips"][: len(self.context.memory)]
        return {
            "share": self.flipped / max(self.visits, 1),
            "never": float((held == 0).mean()) if len(held) else 0.0,
        }

    def state_dict(self) -> State:
        return {"visits": self.visits, "flipped": self.flipped}

    def load_state_dict(self, state: State) -> None:
        self.visits, self.flipped = int(state.get("visits", 0)), int(state.get("flipped", 0))


def needs_flips(plugin: Plugin, context: Context) -> None:
    if "flips" not in context.memory.columns:
        raise PluginError(f"plugins: {plugin.kind}: needs the column flips; put {{kind = 'flips'}} beside it")


class Forgettable(Kept):
    """Rows that were never forgotten leave first, those that were never learned last; the others by their flips.

    A row that has not been visited yet stands between those never forgotten and those forgotten once. Needs `flips`.

    Source:
        Toneva et al. 2019 (ICLR), arXiv 1812.05159, section 5: unforgettable examples can be left out.

    Differs from the source:
        Never learned counts as most forgettable, as there; with noisy labels these are the noise, so mind `spare`.
    """

    class Options(Kept.Options):
        kind: Literal["forgettable"] = "forgettable"
        spare: int = Stop(
            8, ge=1, description="visits without one right answer that make a row leave, as a wrong label (count)"
        )

    options: Options
    needs = frozenset({"written", "hits", "flips", "passes"})

    def bind(self, context: Context) -> None:
        needs_flips(self, context)
        super().bind(context)

    def scores(self, memory: Replay) -> Floats:
        size = len(memory)
        flips, passes, hits = (memory.columns[name][:size] for name in ("flips", "passes", "hits"))
        never = np.where(hits < self.options.spare, 1.0 + flips.max(initial=0.0), -1.0)  # learned
        known = np.where(passes > 0, flips.astype(np.float64), never)
        return np.asarray(np.where(hits > 0, known, 0.5) + 0.25 * self.luck[:size], np.float64)


class Density(Kept):
    """Rows stay whose stored hidden vector is likely under a running density of what is served now.

    The density is a normal one with a diagonal covariance, of the live events' last hidden layers; O(H) per event to
    keep, O(capacity x H) to score. A forget begins it anew.

    Source:
        OER, Gai et al. 2023, arXiv 2305.13804: experience is chosen to match the states that the policy meets.

    Differs from the source:
        One normal density with exponential forgetting instead of a learned dynamics model. There is no second head for
        replay. Stored vectors are of the weights that served them; see `streamcl.continual.key_compat` to move them.
    """

    class Options(Kept.Options):
        kind: Literal["density"] = "density"
        half_life_events: float = Stop(500.0, gt=0, description="how long an event counts in the density (events)")

    options: Options
    needs = frozenset({"written", "hidden"})

    def bind(self, context: Context) -> None:
        needs_hidden(self, context)
        super().bind(context)
        self._begin()

    def _begin(self) -> None:
        self.mass = 0.0
        self.mean, self.square = (np.zeros(self.context.engine.widths[1]) for _ in range(2))

    def after(self, step: Step) -> None:
        super().after(step)
        if step.live is not None:
            hidden = step.out("live").hidden[0].detach().numpy().astype(np.float64)
            keep = 0.5 ** (1.0 / self.options.half_life_events)
            self.mass = keep * self.mass + 1.0
            self.mean += (hidden - self.mean) / self.mass
            self.square += (hidden**2 - self.square) / self.mass

    def scores(self, memory: Replay) -> Floats:
        variance = np.maximum(self.square - self.mean**2, 0.0)
        away = memory.columns["hidden"][: len(memory)] - self.mean
        return np.asarray(-(away**2 / (variance + 1e-3 * variance.mean() + 1e-12)).sum(1), np.float64)

    def forget(self, who: Selector) -> int:
        self._begin()
        return 0

    def state_dict(self) -> State:
        return {**super().state_dict(), "mass": self.mass, "mean": self.mean.copy(), "square": self.square.copy()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._begin()
        if state:
            self.mass = float(state["mass"])
            self.mean[:], self.square[:] = state["mean"], state["square"]


def needs_hidden(plugin: Plugin, context: Context) -> None:
    if not context.engine.widths[1]:
        raise PluginError(f"plugins: {plugin.kind}: model {context.config.model.kind} has no hidden layer")


PRESETS: dict[str, dict[str, Any]] = {
    "balconpas": {
        "replay": {"retention": "plugin", "per_event": 10},
        "plugins": [{"kind": "quotas", "by": "class", "power": 1.0}],
    },
    "repeated_data": {
        "replay": {"retention": "plugin", "per_event": 10},
        "plugins": [{"kind": "quotas", "keep": "unused"}],
    },
    "oer": {"replay": {"retention": "plugin", "per_event": 10}, "plugins": [{"kind": "density"}]},
    "example_forgetting": {
        "replay": {"retention": "plugin", "per_event": 10},
        "plugins": [{"kind": "flips"}, {"kind": "forgettable", "by": "class"}, {"kind": "by_flips"}],
    },
}
