"""Weights between those of two times: live ones that are drawn back, means of all steps, and sets that are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from streamcl.engine.eager import Eager
from streamcl.engine.weights import Average, WeightSet, shared
from streamcl.plugin import Context, Grads, PluginError, Rows, Rule, Step
from streamcl.protocols import State
from streamcl.random import below
from streamcl.records import Signal
from streamcl.stations import Stop


class Reptile(Rule):
    """Every k steps: slow <- slow + rate (live - slow), and the live weights go on from there.

    Rows of the table do so too, at the cost of those that were touched in the k steps. The slow weights are the set
    `slow`. The optimiser's slots stay, but for FTRL's, which its weights are made of. Where the weights of k steps are
    in the end drawn back, learning is slower by `rate`.

    Source:
        Nichol, Achiam & Schulman 2018, arXiv 1803.02999, algorithm 1; over a stream with replay: Riemer et al. 2019
        (MER), arXiv 1810.11910, algorithm 1, the outer interpolation.

    Differs from the source:
        MER's inner interpolation over the rows of one batch is left out: a step here is one gradient of all its rows.
    """

    class Options(Rule.Options):
        kind: Literal["reptile"] = "reptile"
        every: int = Stop(10, ge=1, description="k, steps between two interpolations")
        rate: float = Stop(0.3, ge=0, le=1, description="how far the slow weights follow; 1: off")

    options: Options
    provides = frozenset({"slow"})

    def bind(self, context: Context) -> None:
        self.engine = context.engine
        self.slow = WeightSet(context.engine, "slow")
        self.steps = 0  # since the last interpolation
        self.touched = torch.zeros(0, dtype=torch.int64)  # in them

    def after(self, step: Step) -> None:
        if self.options.rate == 1.0:
            return
        self.steps += 1
        self.touched = torch.unique(torch.cat((self.touched, step.touched)))
        if self.steps >= self.options.every:
            self._interpolate(self.touched)
            self.steps, self.touched = 0, self.touched[:0]

    def _interpolate(self, rows: Tensor) -> None:
        self.slow.flat.lerp_(self.engine.dense.flat, self.options.rate)
        self.slow.table[rows] = torch.lerp(self.slow.table[rows], self.engine.table[rows], self.options.rate)
        self.engine.dense.put(self.slow.flat)
        self.engine.put_rows(rows, self.slow.table[rows])

    def state_dict(self) -> State:
        return {**self.slow.state_dict(), "steps": self.steps, "touched": self.touched.clone()}

    def load_state_dict(self, state: State) -> None:
        self.slow.load_state_dict(state)
        self.steps = int(state.get("steps", 0))
        self.touched = state["touched"].clone() if state else self.touched[:0]


class Mean(Average):
    """The mean of the weights after each step, every step alike; rows as in `Average`."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__(context.engine, name, 0.0)

    def kept(self, at: Tensor) -> Tensor:
        return at.double() / max(self.step, 1)

    def begin(self) -> None:
        """Here: what was before counts no more. O(table)."""
        self.copy_live()
        self.step = 0
        self.at.zero_()


class RunningMean(Rule):
    """Keeps the mean of the weights after all steps as the set `mean`: served (see `served`), or a teacher.

    With `restart` it is of the steps since the last `boundary`: on a stream that drifts, old weights drag.

    Source:
        Polyak & Juditsky 1992, doi 10.1137/0330046; over fine-tuning against forgetting: Zheng et al. 2023 (ZSCL),
        arXiv 2303.06628, weight ensemble.

    Differs from the source:
        Every step counts, not every so-manyth.
    """

    class Options(Rule.Options):
        kind: Literal["running_mean"] = "running_mean"
        restart: bool = Stop(False, description="begin anew at each boundary")

    options: Options
    provides = frozenset({"mean"})

    def bind(self, context: Context) -> None:
        self.mean = Mean(context, "mean")

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary" and self.options.restart:
            self.mean.begin()

    def before(self, step: Step) -> None:
        self.mean.before(step.touched)

    def after(self, step: Step) -> None:
        self.mean.after(step.touched)

    def state_dict(self) -> State:
        return self.mean.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.mean.load_state_dict(state)


class Consolidated(Average):
    """A set that follows each dense weight at `1 - decay` / (1 + its stability), and rows as `Average` does."""

    def __init__(self, context: Context, name: str, decay: float) -> None:
        super().__init__(context.engine, name, decay)
        self.stability = context.engine.dense.traces[name] = torch.zeros_like(self.flat)  # (P,)

    def after(self, touched: Tensor) -> None:
        before = self.flat.clone()
        super().after(touched)
        self.flat.copy_(before).add_(self._moved(1.0 - self.decay))

    def _moved(self, rate: float) -> Tensor:
        return rate * (self.engine.dense.flat - self.flat) / (1.0 + self.stability)

    def consolidate(self, importance: Tensor) -> None:
        """At once as far as stability lets it; what mattered (P,), relative to the mean, is more stable after it."""
        self.flat.add_(self._moved(1.0))
        self.table.copy_(self.engine.table)
        self.at.fill_(self.step)
        self.stability.add_(importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny))

    def state_dict(self) -> State:
        return {**super().state_dict(), "stability": self.stability.clone()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if state:
            dense = self.engine.dense
            self.stability.copy_(dense.fitted(state["stability"], torch.zeros_like(self.stability)))
        else:
            self.stability.zero_()


class FastSlow(Rule):
    """Fast weights, the live ones, learn each event; slow ones, `consolidated`, follow where nothing is at risk.

    In two steps: at a `boundary` by 1 / (1 + s) of the way, s being a weight's stability, and from then on by `rate` /
    (1 + s) of it at every step. s begins at 0 and grows at each boundary by the squared gradients of the segment,
    relative to their mean over all weights. Rows of the table have no stability: they are taken over at a boundary.

    Source:
        Wang, Li, Zhong & Zhu 2021, arXiv 2104.09034: fast and slow weights, two-step consolidation, and stability as
        what slows a weight's change.

    Differs from the source:
        After its idea, not its equations: few-shot episodes and losses of its own are left out, the fast weights are
        not drawn to the slow ones, and stability is that of squared gradients along the way.
    """

    class Options(Rule.Options):
        kind: Literal["fast_slow"] = "fast_slow"
        rate: float = Stop(0.01, gt=0, le=1, description="of the second step, for a weight without stability")

    options: Options
    provides = frozenset({"consolidated"})

    def bind(self, context: Context) -> None:
        self.slow = Consolidated(context, "consolidated", 1.0 - self.options.rate)
        self.sum = context.engine.dense.traces["fast_slow"] = torch.zeros_like(self.slow.flat)  # (P,) of squares

    def on_signal(self, signal: Signal) -> None:
        if signal.kind == "boundary":
            self.slow.consolidate(self.sum)
            self.sum.zero_()

    def before(self, step: Step) -> None:
        self.slow.before(step.touched)

    def transform(self, grads: Grads, step: Step) -> Grads:
        self.sum.add_(grads.dense.square())
        return grads

    def after(self, step: Step) -> None:
        self.slow.after(step.touched)

    def state_dict(self) -> State:
        return {**self.slow.state_dict(), "sum": self.sum.clone()}

    def load_state_dict(self, state: State) -> None:
        self.slow.load_state_dict(state)
        if state:
            self.sum.copy_(self.slow.engine.dense.fitted(state["sum"], torch.zeros_like(self.sum)))
        else:
            self.sum.zero_()


class Between(WeightSet):
    """origin + share x (live - origin), computed when it is read: it holds nothing.

    Attributes:
        shares: of the live weights, by the name of a dense parameter; any other's, and that of rows, is `share`.
    """

    def __init__(self, engine: Eager, name: str, origin: WeightSet, share: float) -> None:
        self.engine, self.origin, self.share = engine, origin, share
        self.shares: Mapping[str, float] = {}
        engine.sets[name] = self

    def rows(self, ids: Tensor) -> Tensor:
        return torch.lerp(self.origin.rows(ids), self.engine.table[ids], self.share)

    def params(self) -> dict[str, Tensor]:
        live = self.engine.dense.params
        return {
            name: torch.lerp(old, live[name].detach(), self.shares.get(name, self.share))
            for name, old in self.origin.params().items()
        }


class Discount(Rule):
    """Takes back a part of what was learned: sets theta0 + lambda (theta - theta0), computed when they are read.

    One for each lambda, `discount_0.5` and so on; `served` can choose among them and `live` by recent loss. theta0 is
    the set `origin`: `initial`, the weights of the beginning, which are kept for this, or one that a plug-in before it
    provides. A read costs one more pass over all dense weights.

    Source:
        Wortsman et al. 2022 (WiSE-FT), arXiv 2109.01903, equation 2; a discounted LoRA against forgetting in spoken
        language models is the same on its factors' product.

    Differs from the source:
        Where theta0 is untrained, as `initial` is in a stream from scratch, a small lambda is no model at all.
    """

    class Options(Rule.Options):
        kind: Literal["discount"] = "discount"
        lambdas: tuple[float, ...] = Stop((0.5, 0.75), min_length=1, description="shares of what was learned, 0 to 1")
        origin: str = Stop("initial", description="weight set that stands for theta0")

    options: Options
    provides = frozenset({"initial", "discount_0.5", "discount_0.75"})  # with other lambdas others

    def bind(self, context: Context) -> None:
        self.origin = _origin(context, self.options.kind, self.options.origin)
        self.sets = [Between(context.engine, f"discount_{each:g}", self.origin, each) for each in self.options.lambdas]

    def state_dict(self) -> State:
        return self.origin.state_dict() if self.options.origin == "initial" else {}

    def load_state_dict(self, state: State) -> None:
        if self.options.origin == "initial":
            self.origin.load_state_dict(state)


class LayerMerge(Rule):
    """The set `merged`: old and live weights, layer by layer, the old ones counting more where they see things alike.

    Every `every` steps `sample` rows of the memory pass through both. With s the mean cosine of what a layer makes of
    them, its share of the live weights is 1 / (1 + exp((s - 1) / temperature)): half where both agree, more where they
    don't. What is outside the tower, rows of the table as well, takes the mean of the layers' shares.

    Source:
        RECALL (2025), "hierarchical model merging": weights merged by the similarity of representations, by layer.

    Differs from the source:
        Two models, the live one and the set `origin`; softmax of cosines of outputs, instead of a kernel of hidden
        states at cluster centres; rows are drawn from the memory without clustering.
    """

    class Options(Rule.Options):
        kind: Literal["layer_merge"] = "layer_merge"
        origin: str = Stop("initial", description="weight set of the old weights; provided before it, or `initial`")
        every: int = Stop(200, ge=1, description="steps between two looks at the memory")
        sample: int = Stop(64, ge=1, description="rows of the memory of a look")
        temperature: float = Stop(0.5, gt=0, description="of the softmax; small: where in doubt, live")

    options: Options
    provides = frozenset({"initial", "merged"})

    def bind(self, context: Context) -> None:
        self.context = context
        tower = context.engine.model.tower
        if tower is None or context.config.replay.retention == "none":
            raise PluginError("plugins: layer_merge: it compares layers on rows of the memory; there are none")
        self.origin = _origin(context, self.options.kind, self.options.origin)
        names = {id(part): name for name, part in context.engine.model.named_modules()}
        self.layers = [names[id(layer)] for layer in (*tower.hidden, tower.head)]
        self.merged = Between(context.engine, "merged", self.origin, 1.0)
        self.key = context.key("layer_merge.sample")
        self._share([1.0] * len(self.layers))

    def _share(self, shares: list[float]) -> None:
        """The share of the live weights by layer."""
        self.live = shares
        pairs = zip(self.layers, shares, strict=True)
        self.merged.shares = {f"{name}.{part}": share for name, share in pairs for part in ("weight", "bias")}
        self.merged.share = sum(shares) / len(shares)

    def after(self, step: Step) -> None:
        memory = self.context.memory
        if (step.number + 1) % self.options.every or not len(memory):
            return
        drawn = [below(len(memory), self.key, step.number, i) for i in range(self.options.sample)]
        rows = self.context.rows(memory, torch.tensor(drawn))
        pairs = zip(self._made("live", rows), self._made(self.options.origin, rows), strict=True)
        alike = torch.stack([functional.cosine_similarity(ours, theirs, dim=1).mean() for ours, theirs in pairs])
        self._share(torch.sigmoid((1.0 - alike.double()) / self.options.temperature).tolist())

    def _made(self, weights: str, rows: Rows) -> list[Tensor]:
        """(B, out) of each layer."""
        engine = self.context.engine
        return [*engine.inputs(rows, weights)[1:], engine.out(rows, weights).output]

    def read(self) -> dict[str, float]:
        return {f"layer_{place}_live": share for place, share in enumerate(self.live)}

    def state_dict(self) -> State:
        return {"live": list(self.live), **(self.origin.state_dict() if self.options.origin == "initial" else {})}

    def load_state_dict(self, state: State) -> None:
        if self.options.origin == "initial":
            self.origin.load_state_dict(state)
        self._share(list(state["live"]) if state else [1.0] * len(self.layers))


def _origin(context: Context, kind: str, name: str) -> WeightSet:
    if name != "initial" and name not in context.engine.sets:
        known = ", ".join(["initial", *context.engine.sets])
        raise PluginError(f"plugins: {kind}: no weights {name!r} before it; there are {known}")
    return shared(context.engine, name)


PRESETS: dict[str, dict[str, Any]] = {
    "mer": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "reptile"}]},
    "fast_slow": {"plugins": [{"kind": "fast_slow"}, {"kind": "served", "sets": ["consolidated"]}]},
    "zscl_mean": {"plugins": [{"kind": "running_mean"}, {"kind": "served", "sets": ["mean"]}]},
    "discount": {
        "plugins": [
            {"kind": "discount", "lambdas": [0.5, 0.75, 0.9]},
            {"kind": "served", "sets": ["live", "discount_0.9", "discount_0.75", "discount_0.5"]},
        ]
    },
    "recall_merge": {
        "replay": {"retention": "reservoir", "per_event": 10},
        "plugins": [
            {"kind": "l2_anchor", "strength": 0.0},
            {"kind": "layer_merge", "origin": "anchor"},
            {"kind": "served", "sets": ["merged"]},
        ],
    },
}
