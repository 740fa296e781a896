"""Losses that hold what was said of old rows, or what older weights say of new ones: distillation beside replay."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.continual.classes import (
    Grouped,
    among,
    direction,
    mean,
    name_of,
    needs_classes,
    needs_hidden,
    needs_set,
    parts,
    rows_of,
)
from streamcl.plugin import Context, PluginError, Shape, Step, Term
from streamcl.protocols import State
from streamcl.records import Signal
from streamcl.stations import Stop

Rows = Literal["replay", "live", "both"]
Measure = Literal["squared", "kl"]

TEACHER = Stop("previous", description="weight set that is matched; a plug-in before this one keeps it (previous, ema)")


def squared(output: Tensor, other: Tensor) -> Tensor:
    """(B,) mean over the outputs of squared differences."""
    return ((output - other) ** 2).mean(1)


def divergence(task: str, output: Tensor, other: Tensor, temperature: float) -> Tensor:
    """(B,) T^2 KL(other / T || output / T) of class probabilities; half the squared difference for regression."""
    if task == "regression":
        return 0.5 * (output[:, 0] - other[:, 0]) ** 2
    if task == "binary":  # a logit of 0 for the other class
        output, other = (torch.cat((torch.zeros_like(z), z), 1) for z in (output, other))
    log_p, log_q = (functional.log_softmax(z / temperature, 1) for z in (output, other))
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)


class _Match(Term):
    """What two ways of matching outputs have in common."""

    class Options(Term.Options):
        measure: Measure = Stop("squared", description="of outputs: squared difference, or KL of class probabilities")
        temperature: float = Stop(2.0, gt=0, description="kl only: outputs are divided by it first")

    def match(self, output: Tensor, other: Tensor) -> Tensor:
        """(B,)"""
        if self.options.measure == "squared":
            return squared(output, other)
        return divergence(self.context.config.task, output, other, self.options.temperature)


class StoredLogits(_Match):
    """Replayed rows are to be answered as they were when they were live: weight x mean of (z - z_stored)^2.

    With the task's loss of the same rows (`replay.weight` is the paper's beta) it is DER++, and the half of SER that
    looks back.

    Source:
        DER++: Buzzega et al. 2020 (NeurIPS), arXiv 2004.07211, section 3. SER: Zhuo et al. 2023, arXiv 2305.13622.

    Differs from the source:
        The mean over outputs instead of their sum, so that the weight doesn't depend on how many there are. One draw
        serves both losses, where DER++ draws twice. What is stored is what the event was answered with, after every
        Recall. A regression's outputs are standardised, as of the day they were made.
    """

    class Options(_Match.Options):
        kind: Literal["stored_logits"] = "stored_logits"
        weight: float = Stop(0.5, ge=0, description="of this loss; 0: as if it were not there")

    options: Options
    needs = frozenset({"output"})

    def loss(self, step: Step) -> Tensor:
        if step.replay is None:
            return step.share.new_zeros(())
        return mean(step, "replay", self.match(step.out("replay").output, step.columns["output"]))


class DER(StoredLogits):
    """Dark experience replay: live loss + alpha x (z - z_stored)^2 of replayed rows, whose labels aren't used.

    Source:
        Buzzega et al. 2020 (NeurIPS), arXiv 2004.07211, section 3.

    Differs from the source:
        As `stored_logits`. `replay.weight` says nothing here, but at 0 nothing is drawn.
    """

    class Options(_Match.Options):
        kind: Literal["der"] = "der"
        alpha: float = Stop(0.5, ge=0, description="of the replayed rows' loss; the live one's is 1")

    options: Options  # type: ignore[assignment]
    replaces_task = True

    def loss(self, step: Step) -> Tensor:
        loss = self.options.alpha * super().loss(step)
        if step.live is None:
            return loss
        return loss + self.context.engine.losses(step.out("live").output, step.live.y, step.served).mean()


class _Taught(Term):
    """Matches what another weight set makes of the same rows. Until that set is ready it is 0."""

    needs = frozenset({"previous"})

    class Options(Term.Options):
        teacher: str = TEACHER
        rows: Rows = Stop("both", description="which rows are matched; of both, the live one and the others' mean")

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.teacher = needs_set(context, self.kind, self.options.teacher)

    def loss(self, step: Step) -> Tensor:
        total = step.share.new_zeros(())
        for which in parts(step) if self.teacher.ready else ():
            if self.options.rows in (which, "both"):
                total = total + mean(step, which, self.apart(step, which))
        return total

    def apart(self, step: Step, which: str) -> Tensor:
        """(n,) how far each row is from where the teacher has it."""
        raise NotImplementedError


class Distill(_Taught, _Match):
    """Outputs stay near those of an older or averaged set of weights, of replayed rows, the live one, or both.

    Source:
        KL with a temperature: Hinton et al. 2015, arXiv 1503.02531; on new rows, Li & Hoiem 2017 (LwF), arXiv
        1606.09282. An EMA as teacher of replayed rows: I-LoRA, Ren et al. 2024, arXiv 2402.18865; BiRT, Jeeveswaran
        et al. 2023, arXiv 2305.04769. `previous` on live rows, squared: the half of SER that looks ahead, Zhuo et al.
        2023, arXiv 2305.13622.

    Differs from the source:
        All outputs are matched, not those of old classes alone. I-LoRA and BiRT also change the memory; here it is as
        it is.
    """

    class Options(_Taught.Options, _Match.Options):
        kind: Literal["distill"] = "distill"

    options: Options

    def apart(self, step: Step, which: str) -> Tensor:
        return self.match(step.out(which).output, step.out(which, self.options.teacher).output)


class HiddenDistill(_Taught):
    """What enters the last layer stays near what an older set of weights makes of the same rows.

    mean over units of (h - h_teacher)^2. With `distill` on replayed rows it is "rehearsal + KD".

    Source:
        Feature distillation on rehearsed rows, as in the survey of rehearsal with knowledge distillation; the squared
        difference is FitNets', Romero et al. 2015, arXiv 1412.6550, without their regressor.
    """

    class Options(_Taught.Options):
        kind: Literal["hidden_distill"] = "hidden_distill"

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)

    def apart(self, step: Step, which: str) -> Tensor:
        return squared(step.out(which).hidden, step.out(which, self.options.teacher).hidden)


class Map(nn.Module):
    """A square matrix, the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors @ self.weight.T


class BFP(_Taught):
    """The old hidden vector stays a learned linear map of the new: mean over units of (A h - h_previous)^2.

    What could be told apart by a linear layer before can be still, while the hidden layer is free to move elsewhere.

    Source:
        Backward feature projection, Gu et al. 2023 (CVPR), arXiv 2303.14595, section 3.

    Differs from the source:
        At each of the signals `on` A begins anew as the identity, which is right at that moment. A is learned by the
        model's optimiser. The mean over units, not their sum, so that the weight doesn't depend on the width. A column
        of A is not made anew when a plasticity rule makes its unit anew; the map follows.
    """

    class Options(_Taught.Options):
        kind: Literal["bfp"] = "bfp"
        on: tuple[str, ...] = Stop(
            ("boundary",),
            min_length=1,
            description="signals at which A begins anew; those of `previous`",
        )

    options: Options

    def module(self, shape: Shape) -> nn.Module | None:
        self.map = Map(shape.hidden) if self.options.weight else None
        return self.map

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)

    def on_signal(self, signal: Signal) -> None:
        if signal.kind in self.options.on and self.map is not None:
            eye, dense = torch.eye(len(self.map.weight)), self.context.engine.dense
            dense.renew(name_of(self.context.engine, self.map.weight), torch.arange(len(eye)), eye)

    def apart(self, step: Step, which: str) -> Tensor:
        assert self.map is not None  # noqa: S101 - a loss of no weight isn't asked for
        return squared(self.map(step.out(which).hidden), step.out(which, self.options.teacher).hidden)


class POD(Term):
    """Every hidden layer, pooled, stays near what an older set of weights makes of the same rows.

    mean over layers of |d(pool(a)) - d(pool(a_teacher))|^2, d a vector's direction. A layer of a multilayer perceptron
    has no height and width to pool over: what is pooled are groups of `group` neighbouring units, in the order of the
    layer, which has no meaning but stays the same. So activity may move within a group. The last hidden layer is
    compared unit by unit (the paper's POD-flat).

    Source:
        PODNet, Douillard et al. 2020 (ECCV), arXiv 2004.13513, section 3.1.

    Differs from the source:
        Groups of units for width and height, see above; squared instead of plain distances; directions that are smooth
        at 0. Its classifier of several proxies per class is not part of this.
    """

    class Options(Term.Options):
        kind: Literal["pod"] = "pod"
        teacher: str = TEACHER
        group: int = Stop(4, ge=1, description="units of a hidden layer that are averaged; 1: each for itself")

    options: Options
    needs = frozenset({"previous"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.teacher = needs_set(context, self.kind, self.options.teacher)
        tower = context.engine.model.tower
        layers = [*tower.hidden[1:], tower.head] if tower is not None and len(tower.hidden) else []
        if not layers:
            raise PluginError(f"plugins: {self.kind}: a {context.config.model.kind} model has no hidden layers")
        self.entered: list[Tensor | None] = [None] * len(layers)
        for place, layer in enumerate(layers if self.options.weight else ()):
            self._listen(place, layer)

    def _listen(self, place: int, module: nn.Module) -> None:
        """To what enters it in a step, never to predictions."""

        def note(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            if torch.is_grad_enabled():
                self.entered[place] = inputs[0]

        module.register_forward_pre_hook(note)

    def loss(self, step: Step) -> Tensor:
        mine = self._taken()
        if not self.teacher.ready:
            return step.share.new_zeros(())
        theirs = self.context.engine.inputs(step.rows, self.options.teacher)[1:]
        groups = [self.options.group] * (len(mine) - 1) + [1]
        apart = [_pod(a, b, group) for a, b, group in zip(mine, theirs, groups, strict=True)]
        values = torch.stack(apart).mean(0)
        live = 0 if step.live is None else 1
        found = {"live": values[:live], "replay": values[live:]}
        total: Tensor = sum((mean(step, which, found[which]) for which in parts(step)), step.share.new_zeros(()))
        return total

    def _taken(self) -> list[Tensor]:
        """What entered each layer in the pass that was just made; it holds the graph of a step, so it isn't left."""
        found = [value for value in self.entered if value is not None]
        self.entered = [None] * len(self.entered)
        return found


def _pod(a: Tensor, b: Tensor, group: int) -> Tensor:
    """(B,) squared distance of the directions of (B, n), by groups of units."""
    a, b = (direction(functional.avg_pool1d(v.unsqueeze(1), group, ceil_mode=True).squeeze(1)) for v in (a, b))
    return ((a - b) ** 2).sum(1)


class Margin(Term):
    """Hidden units of replayed rows stay on the side that they were on when the row was live.

    Of a stored vector s with mean m and deviation d over its units, a unit is on if s > m + margin d, off if
    s < m - margin d, and else between. It costs by how much it now lies on the wrong side of the border that it kept
    to: relu(m + margin d - h) if it was on, relu(h - m + margin d) if it was off, both overshoots if between. The mean
    over units.

    Source:
        Threshold-based margin loss of GeRe, Zhang et al. 2025, arXiv 2508.04676: our reading of the abstract and the
        method's outline.

    Differs from the source:
        Thresholds are of each row, over the units of one layer, not of each unit over a set of general texts; so
        nothing is gathered. GeRe replays a fixed set that is never evicted; here it is what the memory holds.
    """

    class Options(Term.Options):
        kind: Literal["margin"] = "margin"
        margin: float = Stop(0.5, ge=0, description="half the width of the middle, in deviations of the stored vector")

    options: Options
    needs = frozenset({"hidden"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)

    def loss(self, step: Step) -> Tensor:
        if step.replay is None:
            return step.share.new_zeros(())
        return mean(step, "replay", beyond(step.out("replay").hidden, step.columns["hidden"], self.options.margin))


def beyond(hidden: Tensor, stored: Tensor, margin: float) -> Tensor:
    """(n,) by how much the units of (n, H) lie beyond the borders that the stored (n, H) kept to."""
    middle = stored.mean(1, keepdim=True)
    half = margin * stored.std(1, correction=0, keepdim=True)
    above, below = middle + half, middle - half
    on, off = stored > above, stored < below
    too_low = torch.relu(torch.where(on, above, below) - hidden).masked_fill(off, 0.0)
    too_high = torch.relu(hidden - torch.where(off, below, above)).masked_fill(on, 0.0)
    return (too_low + too_high).mean(1)


class OldClasses(Grouped, Term):
    """Without a stored row: the live row's logits of old classes regress to what they were before the new ones came.

    live: cross-entropy among the classes of the label's own group, old or new, + alpha x mean over old classes c of
    (z_c - z'_c)^2 / v_c, z' of the set `previous` and v_c the running variance of z'_c. A class is old if it had been
    live before the last of the signals `on`. Replayed rows, where there are any, carry cross-entropy among all classes
    that there have been. The variances are statistics of the model: a `forget` leaves them as it leaves the weights.

    Source:
        RECALL, Knauer et al. 2022 (IROS), arXiv 2209.14774: regression on recorded logits, grouped heads, loss divided
        by the logits' variance.

    Differs from the source:
        Old logits come from `previous`, not from a pass over the new data beforehand, so their variance is a decayed
        one over live rows, and not below `floor`, where SGD would diverge; two groups, old and new. Nothing tells which
        group a row is of when it is served: the groups' logits were never compared, unless rows are replayed.
    """

    class Options(Term.Options, Grouped.Options):
        kind: Literal["old_classes"] = "old_classes"
        alpha: float = Stop(1.0, ge=0, description="of the regression")
        decay: float = Stop(0.99, ge=0, lt=1, description="of the running mean and variance, by step")
        floor: float = Stop(1.0, gt=0, description="a smaller variance counts as this one, which bounds the gradient")

    options: Options
    replaces_task = True
    needs = frozenset({"previous"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_classes(context, self.kind)
        self.teacher = needs_set(context, self.kind, "previous")
        self.moments = self._fresh()

    def _fresh(self) -> Tensor:
        """(2, C) mean and variance of each class's logit."""
        return torch.stack((torch.zeros(self.classes), torch.ones(self.classes)))

    def loss(self, step: Step) -> Tensor:
        allowed = self.known(step)
        total = step.share.new_zeros(())
        for which in parts(step):
            output, y = step.out(which).output, rows_of(step, which).y.long()
            group = self.old == self.old[y].unsqueeze(1) if which == "live" else torch.ones_like(output) > 0
            losses = functional.cross_entropy(among(output, allowed & group), y, reduction="none")
            share = step.share[:1] if which == "live" else step.share[-len(y) :]
            total = total + losses.dot(share)
        if step.live is None or not (self.old.any() and self.teacher.ready):
            return total
        apart = (step.out("live").output - step.out("live", "previous").output) ** 2
        apart = apart / self.moments[1].clamp_min(self.options.floor)
        return total + self.options.alpha * apart[:, self.old].mean()

    def after(self, step: Step) -> None:
        super().after(step)
        if step.live is None or not self.teacher.ready:
            return
        [new], (middle, variance) = step.out("live", "previous").output, self.moments
        d, away = self.options.decay, new - middle
        self.moments = torch.stack((middle + (1 - d) * away, d * (variance + (1 - d) * away**2)))

    def state_dict(self) -> State:
        return {**super().state_dict(), "moments": self.moments.clone()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.moments = state["moments"].clone() if state else self._fresh()


PRESETS: dict[str, dict[str, Any]] = {
    "der": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": [{"kind": "der"}]},
    "der_pp": {
        "replay": {"retention": "reservoir", "per_event": 10, "weight": 0.5},
        "plugins": [{"kind": "stored_logits", "weight": 0.5}],
    },
    "ser": {
        "replay": {"retention": "reservoir", "per_event": 10},
        "plugins": [
            "previous",
            {"kind": "stored_logits", "weight": 0.2},
            {"kind": "distill", "weight": 0.2, "rows": "live"},
        ],
    },
    "er_ema": {
        "replay": {"retention": "class_balanced", "per_event": 10},
        "plugins": ["ema", {"kind": "distill", "teacher": "ema", "rows": "replay"}],
    },
    "rehearsal_kd": {
        "replay": {"retention": "class_balanced", "per_event": 10},
        "plugins": [
            "previous",
            {"kind": "distill", "rows": "replay", "measure": "kl"},
            {"kind": "hidden_distill", "rows": "replay"},
        ],
    },
    "bfp": {
        "replay": {"retention": "reservoir", "per_event": 10, "weight": 0.5},
        "plugins": ["previous", {"kind": "stored_logits", "weight": 0.5}, "bfp"],
    },
    "podnet": {"replay": {"retention": "class_balanced", "per_event": 10}, "plugins": ["previous", "pod"]},
    "gere": {"replay": {"retention": "reservoir", "per_event": 10}, "plugins": ["margin"]},
    "recall": {"plugins": ["previous", "old_classes"]},
}
