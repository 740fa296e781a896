"""Memories that fade and are reinforced by use: a forgetting curve, and engrams with lifespans and links.

What counts as use is the point. A row that is drawn has not been useful by that: reinforcing each draw keeps what is
kept already. A recall was useful if, at the row's next visit, its loss is lower than it was at the last one.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.memory.replay import Replay
from streamcl.plugin import Context, Draw, Retention, Rule, Shape, Step
from streamcl.protocols import State
from streamcl.random import bits, uniform_array
from streamcl.stations import Stop

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def useful_recalls(step: Step, margin: float) -> tuple[Places, NDArray[np.bool_]]:
    """Rows of the step, each once, (n,); and (n,) whether their last visit helped: the loss fell by more than `margin`.

    `margin` is a share of the loss at the last visit, or when the row was written. Needs the column `loss`.
    """
    if step.index is None or step.losses is None:
        return np.zeros(0, np.int64), np.zeros(0, np.bool_)
    rows, first = np.unique(step.index.numpy(), return_index=True)
    now, before = step.losses[-len(step.index) :].numpy()[first], step.columns["loss"].numpy()[first]
    return rows, now < (1.0 - margin) * before


class Fading(Retention, Rule):
    """The base: the row of the lowest score leaves, the newest row is always admitted. O(capacity) per event."""

    class Options(Retention.Options):
        reinforce: Literal["useful", "draw"] = Stop(
            "useful", description="what strengthens a row: a visit that helped, or any; the latter is for comparison"
        )
        margin: float = Stop(0.05, ge=0, lt=1, description="share of its loss that a visit must take away to help")

    options: Any
    needs = frozenset({"written", "loss"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.steps = self.recalls = self.visits = 0
        self.time_s = 0.0  # of the newest event

    def scores(self, memory: Replay) -> Floats:
        """(N,) of the rows held."""
        raise NotImplementedError

    def strengthen(self, rows: Places) -> None:
        """These rows (n,), each once, have been recalled to use."""
        raise NotImplementedError

    def place(self, label: float, memory: Replay) -> int | None:
        size = len(memory)
        return size if size < memory.capacity else int(self.scores(memory).argmin())

    def before(self, step: Step) -> None:
        if step.outcome is not None:
            self.time_s = max(self.time_s, step.outcome.ticket.time_s)

    def after(self, step: Step) -> None:
        self.steps = step.number + 1
        rows, helped = useful_recalls(step, self.options.margin)
        used = rows if self.options.reinforce == "draw" else rows[helped]
        self.visits, self.recalls = self.visits + len(rows), self.recalls + len(used)
        if len(used):
            self.strengthen(used)

    def read(self) -> dict[str, float]:
        return {"useful": self.recalls / max(self.visits, 1)}

    def state_dict(self) -> State:
        names = ("steps", "recalls", "visits", "time_s")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: State) -> None:
        self.steps, self.recalls, self.visits = (int(state.get(name, 0)) for name in ("steps", "recalls", "visits"))
        self.time_s = float(state.get("time_s", 0.0))


class ForgettingCurve(Fading):
    """Rows fade by e^(-dt / S): dt since the last useful recall, or since it was written; S = 1 + growth x recalls.

    What leaves is the row of the lowest e^(-dt / S), that is of the largest dt / S; the unit of dt does not matter.

    Source:
        MemoryBank, Zhong et al. 2024 (AAAI), arXiv 2305.10250, section 2.3: R = e^(-t / S), S + 1 and t = 0 at each
        recall.

    Differs from the source:
        A recall is a replay after which the row's loss had fallen; in the paper any mention counts (`reinforce =
        "draw"`), which is worse than no memory where the stream drifts. No summaries and no portrait of a user.
    """

    class Options(Fading.Options):
        kind: Literal["forgetting_curve"] = "forgetting_curve"
        clock: Literal["steps", "event_time"] = Stop("steps", description="what dt is counted in")
        growth: float = Stop(1.0, ge=0, description="what a useful recall adds to S; 0: recency of use alone")

    options: Options

    def columns(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """`recalls` (count), and when the last one was: `recalled`, behind the time the row is of (steps or s)."""
        return {"recalls": (), "recalled": ()}

    def _born(self, rows: Any) -> Floats:
        memory = self.context.memory
        times = memory.columns["written"] if self.options.clock == "steps" else memory.owners.times
        return np.asarray(np.nan_to_num(times[rows].astype(np.float64)), np.float64)

    @property
    def now(self) -> float:
        return float(self.steps) if self.options.clock == "steps" else self.time_s

    def strengthen(self, rows: Places) -> None:
        held = self.context.memory.columns
        held["recalls"][rows] += 1
        held["recalled"][rows] = np.maximum(self.now - self._born(rows), 0.0)

    def scores(self, memory: Replay) -> Floats:
        size = len(memory)
        recalls, recalled = (memory.columns[name][:size].astype(np.float64) for name in ("recalls", "recalled"))
        age = np.maximum(self.now - self._born(slice(0, size)) - recalled, 0.0)
        return np.asarray(-age / (1.0 + self.options.growth * recalls), np.float64)


class Engrams(Fading, Draw):
    """Rows live for `lifespan` steps and longer for each useful recall; recalled together, they call each other.

    A row's life falls by 1 with each step. A useful recall adds `gain`, and ties it to the next row of the same draw
    that was useful too. Half of a draw is uniform, and each of these rows calls the one that it has the strongest tie
    to, or else a uniform one. The row with the least life left leaves. O(capacity) per event, O(n) per draw.

    Source:
        Memoria, Park & Bak 2024 (ICML), arXiv 2310.03052: engrams with lifespans, links by co-recall (Hebb), recall
        along the links.

    Differs from the source:
        One table stands for its three stores: new rows compete by lifespan at once. A link counts co-recalls, four for
        each row, in the manner of Misra & Gries (1982), where the paper counts all pairs. What lengthens a life is that
        a visit helped, instead of attention weights.
    """

    class Options(Fading.Options):
        kind: Literal["engrams"] = "engrams"
        lifespan: float = Stop(1000.0, gt=0, description="of a new row (steps)")
        gain: float = Stop(100.0, ge=0, description="life that a useful recall adds (steps)")

    options: Options
    TIES = 4

    def columns(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """`life` beyond the lifespan, and ties: the other row, a mark of when that was written, strength."""
        return {"life": (), "tie": (self.TIES,), "tie_written": (self.TIES,), "tie_count": (self.TIES,)}

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.key = context.key("engrams.draw")

    def scores(self, memory: Replay) -> Floats:
        size = len(memory)
        end = memory.columns["written"][:size] + memory.columns["life"][:size].astype(np.float64)
        return np.asarray(end + self.options.lifespan - self.steps, np.float64)

    def strengthen(self, rows: Places) -> None:
        held = self.context.memory.columns
        held["life"][rows] += self.options.gain
        for one, other in zip(rows.tolist(), np.roll(rows, -1).tolist(), strict=True):
            if one != other:
                self._tie(one, other)

    def _tie(self, one: int, other: int) -> None:
        held = self.context.memory.columns
        ties, written, counts = (held[name][one] for name in ("tie", "tie_written", "tie_count"))
        born = _age_mark(held["written"][other])
        same = np.flatnonzero((ties == other) & (written == born))
        if len(same):
            counts[same[0]] += 1
            return
        weakest = int(counts.argmin())
        if counts[weakest] > 0:
            counts -= 1  # Misra and Gries: a newcomer costs all the others one
            return
        ties[weakest], written[weakest], counts[weakest] = other, born, 1

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        size = len(memory)
        lots = (uniform_array(bits(self.key, number), count) * size).astype(np.int64)
        seeds, called = lots[: (count + 1) // 2], lots[(count + 1) // 2 :]
        from_ = seeds[: len(called)]
        ties, written, counts = (memory.columns[name][from_] for name in ("tie", "tie_written", "tie_count"))
        other = np.minimum(ties.astype(np.int64), size - 1)
        valid = (counts > 0) & (written == _age_mark(memory.columns["written"][other]))
        strongest = np.where(valid, counts, 0).argmax(1)
        rank = np.arange(len(from_))
        called = np.where(valid[rank, strongest], other[rank, strongest], called)
        return torch.from_numpy(np.concatenate((seeds, called))), torch.ones(count)

    def closed(self, erased: NDArray[np.bool_]) -> Places:
        """Ties follow rows to their new places; those to erased rows are cut."""
        kept, held, size = super().closed(erased), self.context.memory.columns, len(erased)
        place = np.full(size, -1)
        place[kept] = np.arange(len(kept))
        other = np.minimum(held["tie"][:size].astype(np.int64), size - 1)
        moved = place[other]
        lives = (moved >= 0) & (held["tie_written"][:size] == _age_mark(held["written"][other]))
        held["tie"][:size] = np.where(lives, moved, 0)
        for name in ("tie_written", "tie_count"):
            held[name][:size] = np.where(lives, held[name][:size], 0)
        return kept


def _age_mark(written: Any) -> Any:
    """By which a tie knows its row from a later one in its place: 1 + steps, as far as float32 counts exactly."""
    return 1 + written % (1 << 23)


PRESETS: dict[str, dict[str, Any]] = {
    "memorybank": {
        "replay": {"retention": "plugin", "per_event": 10},
        "plugins": [{"kind": "forgetting_curve", "clock": "event_time"}],
    },
    "memoria": {"replay": {"retention": "plugin", "per_event": 10}, "plugins": [{"kind": "engrams"}]},
}
