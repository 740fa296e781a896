"""A vector for each class in the last hidden layer: rows are drawn to it, told apart by it, or served by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.continual.bias_free_head import supcon
from streamcl.continual.classes import (
    Grouped,
    among,
    classes_of,
    cosine,
    direction,
    mean,
    name_of,
    needs_classes,
    needs_head,
    needs_hidden,
    needs_set,
    parts,
    rows_of,
    whole,
)
from streamcl.plugin import Context, Plan, Planner, Plugin, Query, Recall, Rule, Shape, Step, Term
from streamcl.protocols import State
from streamcl.records import Outcome, Signal
from streamcl.stations import Stop

UNKNOWN = 10.0
"""By how much the logit of a class without a mean lies below the lowest of the others."""


class Centres:
    """A vector for each class, (C, H), and how many rows it was made of, (C,)."""

    def __init__(self, classes: int, width: int) -> None:
        self.vectors = torch.zeros(classes, width)
        self.counts = torch.zeros(classes, dtype=torch.int64)

    @property
    def known(self) -> Tensor:
        """(C,) bool"""
        return self.counts > 0

    def state_dict(self) -> State:
        return {"vectors": self.vectors.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: State) -> None:
        for name, tensor in (("vectors", self.vectors), ("counts", self.counts)):
            tensor.copy_(state[name]) if state else tensor.zero_()


class CenterLoss(Term, Rule):
    """Hidden vectors are drawn to the centre of their class: mean over rows of |h - c_y|^2 / 2.

    After each step a centre follows its rows: c <- c + alpha sum(h - c) / (1 + their number). At the signals `freeze`
    the centres of classes that there have been stop for good, so that later rows are drawn to where the class was.
    Centres are parameters, learned by a rule of their own: a `forget` leaves them as it leaves the weights.

    Source:
        Wen et al. 2016 (ECCV), "A discriminative feature learning approach for deep face recognition", equations 2 to
        4. Centres that stand still for later data: continual use of the loss.

    Differs from the source:
        A centre begins where its first row is; before, that class has no loss. Of the live row and of the mean of the
        replayed ones.
    """

    class Options(Term.Options):
        kind: Literal["center_loss"] = "center_loss"
        weight: float = Stop(0.01, ge=0, description="of this loss; 0: as if it were not there")
        alpha: float = Stop(0.5, gt=0, le=1, description="how fast a centre follows its rows")
        freeze: tuple[str, ...] = Stop((), description="signals at which centres stop: boundary; none: they never do")

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)
        self.classes = classes_of(context, self.kind)
        self.centres = Centres(self.classes, context.engine.widths[1])
        self.frozen = torch.zeros(self.classes, dtype=torch.bool)

    def on_signal(self, signal: Signal) -> None:
        if signal.kind in self.options.freeze:
            self.frozen |= self.centres.known

    def loss(self, step: Step) -> Tensor:
        total = step.share.new_zeros(())
        for which in parts(step):
            y, hidden = rows_of(step, which).y.long(), step.out(which).hidden
            away = 0.5 * ((hidden - self.centres.vectors[y]) ** 2).sum(1)
            total = total + mean(step, which, away * self.centres.known[y])
        return total

    def after(self, step: Step) -> None:
        hidden, y = whole(step).hidden.detach(), step.rows.y.long()
        rows = functional.one_hot(y, self.classes).to(hidden.dtype)  # (B, C)
        number, sums = rows.sum(0).unsqueeze(1), rows.T @ hidden
        old = self.centres.vectors
        moved = old + self.options.alpha * (sums - number * old) / (1.0 + number)
        fresh = sums / number.clamp_min(1.0)
        moves = (number[:, 0] > 0) & ~self.frozen
        self.centres.vectors = torch.where(
            moves.unsqueeze(1), torch.where(self.centres.known.unsqueeze(1), moved, fresh), old
        )
        self.centres.counts += number[:, 0].long()

    def state_dict(self) -> State:
        return {**self.centres.state_dict(), "frozen": self.frozen.clone()}

    def load_state_dict(self, state: State) -> None:
        self.centres.load_state_dict(state)
        self.frozen = state["frozen"].clone() if state else torch.zeros(self.classes, dtype=torch.bool)


class Prototypes(nn.Module):
    """(C, H) vectors, 0 at first."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))


class PRD(Grouped, Term, Recall):
    """Contrast shapes the hidden layer, prototypes follow it, and old ones keep how they were related to rows.

    SupCon(h) + mean over rows of -log softmax_c(cos(h, p_c) / t), where h is taken as given
    + alpha x mean over old classes c of KL(r'_c || r_c), r_c the softmax over this step's rows of cos(p_c, h) / t,
    r'_c the same of the set `previous`, its prototypes and its hidden vectors.
    Served are cos(h, p_c) / t: the prototypes are the head. A class is old if it had been live before the last of the
    signals `on`.

    Source:
        Prototype-sample relation distillation, Asadi et al. 2023 (ICML), arXiv 2303.14771, section 3.

    Differs from the source:
        Rows are the live one and the replayed ones, without augmented views; a step of the live row alone has neither
        contrast nor relations. Directions are smooth at 0, where prototypes begin.
    """

    class Options(Term.Options, Grouped.Options):
        kind: Literal["prd"] = "prd"
        temperature: float = Stop(0.1, gt=0, description="t, that cosines are divided by")
        alpha: float = Stop(1.0, ge=0, description="of the distilled relations")

    options: Options
    replaces_task = True
    needs = frozenset({"previous"})

    def module(self, shape: Shape) -> nn.Module | None:
        self.prototypes = Prototypes(shape.outputs, shape.hidden) if self.options.weight else None
        return self.prototypes

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)
        needs_classes(context, self.kind)
        self.teacher = needs_set(context, self.kind, "previous")
        self.name = name_of(context.engine, self.prototypes.weight) if self.prototypes else ""

    def loss(self, step: Step) -> Tensor:
        assert self.prototypes is not None  # noqa: S101 - a loss of no weight isn't asked for
        hidden, y, t = whole(step).hidden, step.rows.y.long(), self.options.temperature
        proxies = self.prototypes.weight
        logits = among(cosine(hidden.detach(), proxies) / t, self.known(step))
        total = supcon(hidden, y, t) + functional.cross_entropy(logits, y)
        if not (self.teacher.ready and self.old.any()):
            return total
        before = torch.cat([step.out(which, "previous").hidden for which in parts(step)])
        was = (cosine(self.teacher.params()[self.name][self.old], before) / t).log_softmax(1)
        now = (cosine(proxies[self.old], hidden) / t).log_softmax(1)
        return total + self.options.alpha * (was.exp() * (was - now)).sum(1).mean()

    def apply(self, output: Tensor, query: Query) -> Tensor:
        if self.prototypes is None:
            return output
        with torch.no_grad():
            return cosine(query.out().hidden, self.prototypes.weight) / self.options.temperature


class ProxyPrototypes(Grouped, Term):
    """Old classes' rows of the last layer, as they stood in `previous`, are what later rows are told apart from.

    mean over rows of -log softmax_c(cos(h, q_c) / t): q_c is the row of `previous` for an old class, today's for a new
    one. It needs no stored row. A class is old if it had been live before the last of the signals `on`.

    Source:
        Proxy prototype contrastive regularisation of domain-continual face anti-spoofing, Cai et al. 2023 (ICCV),
        arXiv 2303.09914: our reading.

    Differs from the source:
        Beside the task, on the model's last hidden layer; no adapters and no face data.
    """

    class Options(Term.Options, Grouped.Options):
        kind: Literal["proxy_prototypes"] = "proxy_prototypes"
        weight: float = Stop(0.1, ge=0, description="of this loss; 0: as if it were not there")
        temperature: float = Stop(0.1, gt=0, description="t, that cosines are divided by")

    options: Options
    needs = frozenset({"previous"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.head = needs_head(context, self.kind)
        self.teacher = needs_set(context, self.kind, "previous")
        self.name = name_of(context.engine, self.head.weight)

    def loss(self, step: Step) -> Tensor:
        total = step.share.new_zeros(())
        if not (self.teacher.ready and self.old.any()):
            return total
        proxies = torch.where(self.old.unsqueeze(1), self.teacher.params()[self.name], self.head.weight)
        known = self.known(step)
        for which in parts(step):
            logits = among(cosine(step.out(which).hidden, proxies) / self.options.temperature, known)
            losses = functional.cross_entropy(logits, rows_of(step, which).y.long(), reduction="none")
            total = total + mean(step, which, losses)
        return total


class NCM(Recall, Rule):
    """Serves by the nearest class mean of the last hidden layer, instead of by the last layer.

    cos(h, m_c) / t, or -|h - m_c|^2 / (2 t). A mean follows the hidden vectors of live and replayed rows, each as the
    weights of the step had it, so means of classes that are replayed drift with the weights. `decay` 1: a plain mean
    of the live rows alone, right for an encoder that doesn't move (see `frozen`). A class without a mean lies `UNKNOWN`
    below the others; while no class has one, the model's output is served.

    Means are statistics of the model: whose events are in them isn't known, so a `forget` leaves them as it leaves the
    weights. The mean of a class of one event is that event's hidden vector, and without hidden layers its own numbers,
    standardised: where these must be erased, give each class several events, or begin anew.

    Source:
        Nearest class mean: Mensink et al. 2013; iCaRL, Rebuffi et al. 2017, arXiv 1611.07725, section 3.2. A frozen
        encoder with class means is the baseline of continual learning with pre-trained encoders, such as CLIP: with
        `model.hidden = []` the hidden vector is the event's own numbers, an embedding that it brings.

    Differs from the source:
        Running means instead of means over all stored rows, so an event costs no pass over the memory. Directions are
        taken of the mean, not of each vector in it. CLIP's zero-shot head from texts is left out.
    """

    class Options(Recall.Options):
        kind: Literal["ncm"] = "ncm"
        measure: Literal["cosine", "euclidean"] = Stop("cosine", description="how near is judged")
        temperature: float = Stop(0.1, gt=0, description="t, that nearness is divided by")
        decay: float = Stop(0.9, gt=0, le=1, description="of a mean, by row of its class; 1: plain mean of live rows")

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)
        self.classes = classes_of(context, self.kind)
        self.centres = Centres(self.classes, context.engine.widths[1])

    def after(self, step: Step) -> None:
        for which in parts(step):
            if self.options.decay < 1.0 or which == "live":
                for h, c in zip(step.out(which).hidden.detach(), rows_of(step, which).y.long().tolist(), strict=True):
                    self._add(h, c)

    def _add(self, hidden: Tensor, label: int) -> None:
        self.centres.counts[label] += 1
        count, decay = int(self.centres.counts[label]), self.options.decay
        share = 1.0 / count if decay == 1.0 else (1.0 - decay) / (1.0 - decay**count)
        self.centres.vectors[label].lerp_(hidden, share)

    def apply(self, output: Tensor, query: Query) -> Tensor:
        known = self.centres.known
        if not known.any() or (output.shape[1] == 1 and not known.all()):
            return output
        with torch.no_grad():
            logits = self.near(query.out().hidden)
            if output.shape[1] == 1:
                return logits[:, 1:] - logits[:, :1]
            floor = logits[:, known].amin(1, keepdim=True) - UNKNOWN
            return torch.where(known, logits, floor)

    def near(self, hidden: Tensor) -> Tensor:
        """(B, C)"""
        means, t = self.centres.vectors, self.options.temperature
        if self.options.measure == "cosine":
            return direction(hidden) @ direction(means).T / t
        return -0.5 * ((hidden.unsqueeze(1) - means) ** 2).sum(2) / t

    def state_dict(self) -> State:
        return self.centres.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.centres.load_state_dict(state)


class Frozen(Planner):
    """Nothing but the parts that are named is learned: an encoder that stays as it was made, or as it came.

    It holds for the plan of the planners before it, and for what follows that plan; where these leave parts out
    themselves, those move that both name. A planner behind it may let more move, so it comes last.

    Source:
        Frozen encoders under a head of class means or a linear one, the baseline beside which continual learning of a
        pre-trained model is judged.
    """

    class Options(Plugin.Options):
        kind: Literal["frozen"] = "frozen"
        learned: tuple[str, ...] = Stop((), description="beginnings of names of what is learned: head, table, ...")

    options: Options

    def plan(self, plan: Plan, outcome: Outcome, signals: Sequence[Signal]) -> Plan:
        then = None if plan.then is None else self.plan(plan.then, outcome, signals)
        return replace(plan, trainable=self._of(plan.trainable), then=then)

    def _of(self, trainable: tuple[str, ...] | None) -> tuple[str, ...]:
        """What is learned of that, as `Plan.trainable`."""
        learned = self.options.learned
        if trainable is None:
            return learned
        both = [
            name
            for name in self.context.engine.dense.params
            if all(any(f".{each}" in f".{name}" for each in named) for named in (learned, trainable))
        ]
        return (*both, *({"table"} & {*learned} & {*trainable}))


REPLAY = {"retention": "class_balanced", "per_event": 10}

PRESETS: dict[str, dict[str, Any]] = {
    "center_loss": {"replay": REPLAY, "plugins": ["center_loss"]},
    "prd": {"replay": REPLAY, "plugins": ["previous", "prd"]},
    "ncm": {"replay": REPLAY, "plugins": ["ncm"]},
    "proxy_prototypes": {"plugins": ["previous", "proxy_prototypes"]},
    "class_means": {"plugins": ["frozen", {"kind": "ncm", "decay": 1.0}]},
}
