"""Who is drawn from a memory, and how much each row then counts: by loss, flips, value, likeness, diversity, or learnt.

Draws are with replacement unless they say otherwise, keyed by the plug-in's name and the number of the step. Each
costs O(capacity) array work per draw.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamcl.continual.retention_scores import Strata, merged, needs_flips, needs_hidden
from streamcl.memory.replay import Replay
from streamcl.plugin import Context, Draw, Plan, Planner, PluginError, Rule, Step
from streamcl.protocols import State
from streamcl.random import bits, uniform_array
from streamcl.records import Outcome, Selector, Signal
from streamcl.stations import Stop

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def chosen(chances: Floats, lots: Floats) -> Places:
    """(n,) places, each with the chance (N,) it has beside the others, by uniform numbers (n,). O(N + n log N)."""
    edges = np.cumsum(chances)
    return np.asarray(np.minimum(np.searchsorted(edges, lots * edges[-1], side="right"), len(edges) - 1), np.int64)


class Weighted(Draw):
    """The base of draws: a priority for each row. O(capacity) per draw, with replacement.

    Rows are drawn with chance (1 - uniform) x priority / sum of priorities + uniform / N. With `correction` beta each
    row's loss counts (N x chance) ^ -beta, but no more than `max_weight`, before the weights are brought to mean 1. At
    `uniform = 1` without `max_hits` it is the memory's own draw.

    Source:
        Prioritised experience replay, Schaul et al. 2016 (ICLR), arXiv 1511.05952, equations 1 and 2, proportional
        form; the mixture with a uniform draw bounds how unlikely a row can be.
    """

    class Options(Draw.Options):
        uniform: float = Stop(0.1, ge=0, le=1, description="share of the draws that look at no priority")
        correction: float = Stop(0.0, ge=0, le=1, description="beta, exponent of importance weights; 0: none")
        max_weight: float = Stop(10.0, ge=1, description="most that importance makes of a row")
        max_hits: int | None = Stop(
            None, ge=1, description="a row replayed so often is drawn no more, unless all are (count)"
        )

    options: Any
    needs = frozenset({"hits"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.key = context.key(f"{self.kind}.draw")

    def priorities(self, memory: Replay) -> Floats:
        """(N,) at least 0, finite."""
        raise NotImplementedError

    def chances(self, memory: Replay) -> Floats:
        """(N,) of sum 1."""
        size, options = len(memory), self.options
        found = self.priorities(memory)
        total = found.sum()
        mixed = (1.0 - options.uniform) * found / total if total > 0.0 else np.full(size, 1.0 - options.uniform) / size
        mixed = mixed + options.uniform / size
        if options.max_hits is not None:
            spent = memory.columns["hits"][:size] >= options.max_hits
            mixed = np.where(spent & ~spent.all(), 0.0, mixed)
        summed = mixed.sum()
        return np.asarray(mixed / summed if summed > 0.0 else np.full(size, 1.0 / size), np.float64)

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        if self.options.uniform == 1 and self.options.max_hits is None:
            return memory.uniform(count, number)
        chances = self.chances(memory)
        places = chosen(chances, uniform_array(bits(self.key, number), count))
        if not self.options.correction:
            return torch.from_numpy(places), torch.ones(count)
        weight = (len(chances) * chances[places]) ** -self.options.correction
        weight = np.minimum(weight, self.options.max_weight)
        return torch.from_numpy(places), torch.from_numpy((weight / weight.mean()).astype(np.float32))


class ByLoss(Weighted):
    """Rows of high loss are drawn more often: priority (loss + floor) ^ power, of the loss at their last visit.

    Source:
        Schaul et al. 2016 (ICLR), arXiv 1511.05952, with the loss in the place of the TD error. CodeIt, Butt et al.
        2024, arXiv 2402.04858, replays by priority too; it relabels what missed its goal by what it reached, for which
        a stream with one label per event has no use.
    """

    class Options(Weighted.Options):
        kind: Literal["by_loss"] = "by_loss"
        power: float = Stop(0.6, ge=0, le=4, description="of the loss; 0: all rows alike")
        floor: float = Stop(0.01, gt=0, description="priority of a loss of 0 (nats)")

    options: Options
    needs = frozenset({"hits", "loss"})

    def priorities(self, memory: Replay) -> Floats:
        loss = np.maximum(memory.columns["loss"][: len(memory)].astype(np.float64), 0.0)
        return np.asarray((loss + self.options.floor) ** self.options.power, np.float64)


class ByFlips(Weighted):
    """Rows that are forgotten often are drawn more often: priority (1 + flips) ^ power. Needs `flips`.

    Source:
        Toneva et al. 2019 (ICLR), arXiv 1812.05159; the paper leaves examples out and draws the others uniformly.
    """

    class Options(Weighted.Options):
        kind: Literal["by_flips"] = "by_flips"
        power: float = Stop(1.0, ge=0, le=4, description="of 1 + flips; 0: all rows alike")

    options: Options
    needs = frozenset({"hits", "flips"})

    def bind(self, context: Context) -> None:
        needs_flips(self, context)
        super().bind(context)

    def priorities(self, memory: Replay) -> Floats:
        return np.asarray((1.0 + memory.columns["flips"][: len(memory)].astype(np.float64)) ** self.options.power)


class ByValue(Weighted):
    """Priority by how likely the model holds the label, and how often it was right: P2Value. Needs `flips`.

    value = mix x exp(-loss) + (1 - mix) x (right visits + exp(-loss)) / (visits + 1); priority = value ^ power, or
    (1 - value) ^ power with `hard`.

    Source:
        BTP, Chen et al. 2024, arXiv 2410.12236: programs are replayed by a mixture of their likelihood and pass rate.

    Differs from the source:
        The paper replays candidates that it has searched for, of which the good ones teach; rows of a stream are true,
        so what is not known yet may teach more (`hard`). A row that was never visited passes as likely as its label is.
    """

    class Options(Weighted.Options):
        kind: Literal["by_value"] = "by_value"
        mix: float = Stop(0.5, ge=0, le=1, description="share of the likelihood; the rest is success at visits")
        power: float = Stop(1.0, ge=0, le=16, description="of the value; 0: all rows alike")
        hard: bool = Stop(False, description="rows of low value first")

    options: Options
    needs = frozenset({"hits", "loss", "flips", "passes"})

    def bind(self, context: Context) -> None:
        needs_flips(self, context)
        super().bind(context)

    def priorities(self, memory: Replay) -> Floats:
        size, mix = len(memory), self.options.mix
        likely = np.exp(-np.maximum(memory.columns["loss"][:size].astype(np.float64), 0.0))
        success = (memory.columns["passes"][:size] + likely) / (memory.columns["hits"][:size] + 1.0)
        value = mix * likely + (1.0 - mix) * success
        return np.asarray((1.0 - value if self.options.hard else value) ** self.options.power, np.float64)


class ByDistance(Weighted, Rule):
    """Segments that are far from the present one are drawn more often: quotas by the distance of their hidden vectors.

    Of each segment (begun by a `boundary`) a normal density with diagonal covariance is kept, of its live events' last
    hidden layers. A segment's draws are in proportion to its 2-Wasserstein distance from the present one, and its rows
    share them by `rarity`: (mean over a row's ids of log(ids seen / seen of this one)) ^ rarity. O(H) per event, O(S x
    H) per draw for S segments, O(capacity x slots) with rarity. A forget begins all densities and counts anew.

    Source:
        InsCL, Wang et al. 2024 (NAACL), arXiv 2403.11435: equation 2, draws by Wasserstein distance; its InsInfo
        weighs instructions by how rare their tags are.

    Differs from the source:
        Last hidden layer instead of a sentence embedding; diagonal covariances. Ids stand for tags, counted in 4,096
        sums. The present segment is drawn by the uniform share alone.
    """

    class Options(Weighted.Options):
        kind: Literal["by_distance"] = "by_distance"
        segments: int = Stop(16, ge=2, le=1024, description="most segments told apart; older ones are one")
        rarity: float = Stop(0.0, ge=0, le=4, description="exponent of how rare a row's ids are; 0: all rows alike")

    options: Options
    needs = frozenset({"hits", "written"})
    keeps_rows = True
    COUNTS = 4096

    def bind(self, context: Context) -> None:
        needs_hidden(self, context)
        super().bind(context)
        self.strata = Strata("segment", self.options.segments, context, self.kind)
        self._begin()

    def _begin(self) -> None:
        shape = self.strata.count, self.context.engine.widths[1]
        self.events, self.sums, self.squares = np.zeros(shape[0]), np.zeros(shape), np.zeros(shape)
        self.ids = np.zeros(self.COUNTS)

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.strata.begin():
            self.events, self.sums, self.squares = map(merged, (self.events, self.sums, self.squares))

    def after(self, step: Step) -> None:
        self.strata.steps = step.number + 1
        if step.live is None:
            return
        now = len(self.strata.bounds)
        hidden = step.out("live").hidden[0].detach().numpy().astype(np.float64)
        self.events[now] += 1
        self.sums[now] += hidden
        self.squares[now] += hidden**2
        np.add.at(self.ids, step.live.ids[0].numpy() % self.COUNTS, step.live.weights[0].numpy() != 0)

    def distances(self) -> Floats:
        """(S,) of each segment from the present one; 0 of one without events."""
        events = np.maximum(self.events, 1.0)[:, None]
        means = self.sums / events
        deviations = np.sqrt(np.maximum(self.squares / events - means**2, 0.0))
        now = len(self.strata.bounds)
        found = np.sqrt(((means - means[now]) ** 2 + (deviations - deviations[now]) ** 2).sum(1))
        return np.asarray(np.where((self.events > 0) & (self.events[now] > 0), found, 0.0), np.float64)

    def priorities(self, memory: Replay) -> Floats:
        parts = self.strata.of(memory)
        weight = self._rarity(memory) if self.options.rarity else np.ones(len(memory))
        whole = np.bincount(parts, weights=weight, minlength=self.strata.count)
        return np.asarray(self.distances()[parts] * weight / np.maximum(whole[parts], 1e-300), np.float64)

    def _rarity(self, memory: Replay) -> Floats:
        size = len(memory)
        there = memory.weights[:size] != 0
        seen = self.ids[memory.ids[:size] % self.COUNTS]
        rare = np.where(there, np.log((self.ids.sum() + 1.0) / (seen + 1.0)), 0.0)
        return np.asarray((rare.sum(1) / np.maximum(there.sum(1), 1)) ** self.options.rarity, np.float64)

    def forget(self, who: Selector) -> int:
        self._begin()
        return 0

    def state_dict(self) -> State:
        arrays = {"events": self.events, "sums": self.sums, "squares": self.squares, "ids": self.ids}
        return {**{name: array.copy() for name, array in arrays.items()}, "strata": self.strata.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Of another number of segments or units than now: it begins anew."""
        self.strata.load_state_dict({})
        self._begin()
        if state and state["sums"].shape == self.sums.shape:
            self.strata.load_state_dict(state["strata"])
            self.events, self.sums = np.array(state["events"]), np.array(state["sums"])
            self.squares, self.ids = np.array(state["squares"]), np.array(state["ids"])


class Diverse(Weighted):
    """Rows that the model was unsure of when it served them, and far from one another: no row twice in a draw.

    `spread` x n candidates are drawn by priority, 1 - (best chance - second best) of the stored output; of these n are
    taken one by one, each the one furthest from those taken, by stored hidden vectors. O(capacity + spread x n^2 x H).

    Source:
        CAL, Das et al. 2023, arXiv 2305.06408: its SDS2 form replays what is uncertain and diverse; margins.

    Differs from the source:
        Greedy furthest points (k-centre) among candidates, where the paper maximises a submodular sum. Margins are of
        the time when a row was served. A draw of more rows than candidates takes the last ones again.
    """

    class Options(Weighted.Options):
        kind: Literal["diverse"] = "diverse"
        spread: int = Stop(4, ge=1, le=64, description="candidates per row that is drawn (count)")

    options: Options
    needs = frozenset({"hits", "output", "hidden"})

    def bind(self, context: Context) -> None:
        if context.config.task == "regression":
            raise PluginError(f"plugins: {self.kind}: a regression has no margin between classes")
        needs_hidden(self, context)
        super().bind(context)

    def priorities(self, memory: Replay) -> Floats:
        return 1.0 - margins(memory.columns["output"][: len(memory)])

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        lots = uniform_array(bits(self.key, number), count * self.options.spread)
        candidates = np.unique(chosen(self.chances(memory), lots), return_index=True)
        places = candidates[0][np.argsort(candidates[1])]  # in the order in which they were drawn
        hidden = memory.columns["hidden"][places].astype(np.float64)
        taken, nearest = [0], ((hidden - hidden[0]) ** 2).sum(1)
        while len(taken) < min(count, len(places)):
            nearest[taken[-1]] = -1.0
            taken.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, ((hidden - hidden[taken[-1]]) ** 2).sum(1))
        index = places[np.resize(np.array(taken), count)]
        return torch.from_numpy(index), torch.ones(count)


def margins(output: NDArray[np.float32]) -> Floats:
    """(N,) of raw outputs (N, O): how much likelier the best class is than the second."""
    raw = output.astype(np.float64)
    if raw.shape[1] == 1:
        raw = np.concatenate((raw, np.zeros_like(raw)), 1)
    powers = np.exp(raw - raw.max(1, keepdims=True))
    best = np.sort(powers / powers.sum(1, keepdims=True), 1)
    return np.asarray(best[:, -1] - best[:, -2], np.float64)


class Ask(Planner):
    """Says which events' labels are worth their price: those served with a margin below a bar that a budget sets.

    The bar moves by `rate` x (budget - asked) per event, so the share of events asked for settles at the budget. With
    `skip` the others are not learned: a budget of steps. They may still be kept for replay. O(1) per event.

    Source:
        CAL, Das et al. 2023, arXiv 2305.06408: margin sampling under a budget of labels.

    Differs from the source:
        One event at a time instead of rounds. Labels come as they come: the answer is a reading (`asked`, `share`), and
        decides about steps alone.
    """

    class Options(Planner.Options):
        kind: Literal["ask"] = "ask"
        budget: float = Stop(0.5, gt=0, le=1, description="share of the events that are to be asked for")
        rate: float = Stop(0.05, gt=0, le=1, description="how fast the bar follows")
        skip: bool = Stop(False, description="leave the others unlearned")

    options: Options

    def bind(self, context: Context) -> None:
        if context.config.task == "regression":
            raise PluginError(f"plugins: {self.kind}: a regression has no margin between classes")
        super().bind(context)
        self.bar, self.asked, self.events, self.wanted = self.options.budget, True, 0, 0

    def plan(self, plan: Plan, outcome: Outcome, signals: Any) -> Plan:
        budget = self.options.budget
        self.asked = budget == 1 or bool(margins(outcome.ticket.scores.output[None])[0] <= self.bar)
        self.bar = min(max(self.bar + self.options.rate * (budget - self.asked), 0.0), 1.0)
        self.events, self.wanted = self.events + 1, self.wanted + self.asked
        skipped = self.options.skip and not self.asked
        return Plan(plan.passes, plan.draw, plan.live, True, plan.trainable, plan.then) if skipped else plan

    def read(self) -> dict[str, float]:
        return {"asked": float(self.asked), "share": self.wanted / max(self.events, 1), "bar": self.bar}

    def state_dict(self) -> State:
        return {"bar": self.bar, "asked": self.asked, "events": self.events, "wanted": self.wanted}

    def load_state_dict(self, state: State) -> None:
        self.bar, self.asked = float(state.get("bar", self.options.budget)), bool(state.get("asked", True))
        self.events, self.wanted = int(state.get("events", 0)), int(state.get("wanted", 0))


class Learnt(Draw, Rule):
    """Uniform draws, whose weights are learned so that the step helps the live event and the other rows drawn.

    w = n x softmax(phi x), x of each row: loss, log age, replays, likeness of its stored hidden vector to the stream's;
    each standardised within the draw. Before a step, phi climbs the look-ahead gain, by the gradient of

        sum_i w_i / n x gain_i,   gain_i = sum_j v_j <g_i, g_j>,  j: the live event (`toward`) and the other rows,

    that is how far a step on row i lowers the loss of j. Gradients are of the last layer alone: <g_i, g_j> =
    <dL/do_i, dL/do_j> (<h_i, h_j> + 1). O(n^2 (O + H)) per step.

    Source:
        RER, Wang et al. 2021, arXiv 2112.15402, in its idea: bi-level learned weights of replayed rows, from the
        relation of tasks and the importance of samples; one-step look-ahead as in Ren et al. 2018 (ICML), arXiv
        1803.09050.

    Differs from the source:
        Log-linear in four features instead of a network. The held-out slice is the live event, which no replayed row
        has taught yet, and the other rows. Gradients of the last layer instead of a hypergradient through all.
    """

    class Options(Draw.Options):
        kind: Literal["learnt"] = "learnt"
        rate: float = Stop(0.01, ge=0, le=1, description="step size of phi; 0: all rows weigh alike")
        toward: float = Stop(0.5, ge=0, le=1, description="share of the live event in what is to be helped")
        decay: float = Stop(1e-3, ge=0, lt=1, description="of phi per step, towards equal weights")
        bound: float = Stop(2.0, gt=0, le=8, description="no exponent is larger: weights differ by e^(2 bound) at most")

    options: Options
    needs = frozenset({"loss", "written", "hits", "hidden"})

    def bind(self, context: Context) -> None:
        needs_hidden(self, context)
        super().bind(context)
        self.phi = np.zeros(4)
        self.mean = np.zeros(context.engine.widths[1])  # of live hidden vectors, over some hundred events

    def pick(self, count: int, number: int, memory: Replay) -> tuple[Tensor, Tensor]:
        index, _ = memory.uniform(count, number)
        weight = count * self.shares(self.features(memory.columns_of(index), number))
        return index, torch.from_numpy(weight.astype(np.float32))

    def features(self, columns: Any, number: int) -> Floats:
        """(n, 4)"""
        loss, written, hits, hidden = (columns[name].double().numpy() for name in ("loss", "written", "hits", "hidden"))
        length = np.linalg.norm(hidden, axis=1) * np.linalg.norm(self.mean)
        likeness = hidden @ self.mean / np.maximum(length, 1e-12)
        age, often = np.log1p(np.maximum(number - written, 0.0)), np.log1p(hits)
        found = np.stack((np.log1p(np.maximum(loss, 0.0)), age, often, likeness), 1)
        return np.asarray((found - found.mean(0)) / (found.std(0) + 1e-6), np.float64)

    def shares(self, features: Floats) -> Floats:
        """(n,) of sum 1."""
        powers = np.exp(np.clip(features @ self.phi, -self.options.bound, self.options.bound))
        return np.asarray(powers / powers.sum(), np.float64)

    def before(self, step: Step) -> None:
        if step.live is not None:
            hidden = step.out("live").hidden[0].detach().numpy().astype(np.float64)
            rest = self.mean
            self.mean = rest + 0.01 * (hidden - rest)
        else:
            rest = self.mean
        if step.replay is None or len(step.replay.y) < 2:
            return
        self.mean, moved = rest, self.mean  # features as they were at the draw
        features = self.features(step.columns, step.number)
        share, gain = self.shares(features), self.gains(step)
        gain = gain / (np.abs(gain).mean() + 1e-12)
        slope = (share * (gain - share @ gain)) @ features
        self.phi = (1.0 - self.options.decay) * self.phi + self.options.rate * slope
        self.mean = moved

    def gains(self, step: Step) -> Floats:
        """(n,) by how much a step on each row would lower the others' losses, per step size."""
        errors, hidden = self._gradients(step)
        live = 0 if step.live is None else 1
        kernel = (errors @ errors.T) * (hidden @ hidden.T + 1.0)
        count = len(kernel) - live
        others = kernel[live:, live:].sum(1) - np.diag(kernel)[live:]
        toward = self.options.toward if live else 0.0
        found = (1.0 - toward) * others / max(count - 1, 1)
        return np.asarray(found + toward * kernel[live:, 0] if live else found, np.float64)

    def _gradients(self, step: Step) -> tuple[Floats, Floats]:
        """(1 + n, O) of the losses by raw outputs, and (1 + n, H) what entered the last layer."""
        outs = [step.out(which) for which in ("live", "replay") if getattr(step, which) is not None]
        output = torch.cat([out.output for out in outs]).detach().requires_grad_()
        with torch.enable_grad():
            loss = self.context.engine.losses(output, step.rows.y).sum()
        [errors] = torch.autograd.grad(loss, [output])
        hidden = torch.cat([out.hidden for out in outs]).detach()
        return errors.double().numpy(), hidden.double().numpy()

    def read(self) -> dict[str, float]:
        names = ("loss", "age", "hits", "likeness")
        return {f"of_{name}": float(value) for name, value in zip(names, self.phi, strict=True)}

    def forget(self, who: Selector) -> int:
        self.mean = np.zeros_like(self.mean)
        return 0

    def state_dict(self) -> State:
        return {"phi": self.phi.copy(), "mean": self.mean.copy()}

    def load_state_dict(self, state: State) -> None:
        self.phi = np.array(state["phi"]) if state else np.zeros(4)
        same = bool(state) and len(state["mean"]) == len(self.mean)
        self.mean = np.array(state["mean"]) if same else np.zeros_like(self.mean)


PRESETS: dict[str, dict[str, Any]] = {
    "codeit": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "by_loss"}]},
    "btp": {
        "replay": {"retention": "reservoir", "per_event": 10},
        "plugins": [{"kind": "flips"}, {"kind": "by_value"}],
    },
    "inscl": {
        "replay": {"retention": "reservoir", "per_event": 10},
        "plugins": [{"kind": "by_distance", "rarity": 1.0}],
    },
    "cal": {
        "replay": {"retention": "reservoir", "per_event": 10},
        "plugins": [{"kind": "ask", "skip": True}, {"kind": "diverse"}],
    },
    "rer": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "learnt"}]},
}
