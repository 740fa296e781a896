"""Losses that keep the last layer from leaning towards the classes that are live now; classes that grow.

In place of the task's loss. The model has an output for every class from the beginning; one that there hasn't been yet
is left out of every sum over classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from streamcl.continual.classes import (
    Seen,
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
from streamcl.continual.replay_distill import divergence
from streamcl.plugin import Context, Out, Query, Recall, Step, Term
from streamcl.stations import Stop


class ERACE(Seen, Term):
    """Live rows compete among the classes that are live now, replayed rows among all that there have been.

    live: -log softmax over C_now; replayed: `replay.weight` x mean of -log softmax over C_seen. So a new class doesn't
    push old ones away by itself; they meet in the replayed rows.

    Source:
        ER-ACE, Caccia et al. 2022 (ICLR), arXiv 2104.05025, section 4.

    Differs from the source:
        A stream of single events has no batch whose classes could be C_now: they are the classes of the last
        `window` learned events, and of this one.
    """

    class Options(Term.Options):
        kind: Literal["er_ace"] = "er_ace"
        window: int = Stop(20, ge=1, description="a class is live now if it was within so many learning steps")

    options: Options
    replaces_task = True

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_classes(context, self.kind)

    def loss(self, step: Step) -> Tensor:
        known, total = self.known(step), step.share.new_zeros(())
        for which in parts(step):
            y = rows_of(step, which).y.long()
            allowed = known if which == "replay" else self._now(step, y)
            losses = functional.cross_entropy(among(step.out(which).output, allowed), y, reduction="none")
            total = total + losses.dot(step.share[:1] if which == "live" else step.share[-len(y) :])
        return total

    def _now(self, step: Step, y: Tensor) -> Tensor:
        """(C,) bool"""
        now = (self.last >= 0) & (self.last >= step.number - self.options.window)
        now[y] = True
        return now


class PCR(Seen, Term):
    """Every row is told apart from the proxies of the classes of its fellow rows: the rows of the last layer.

    mean over live and replayed rows i of -log exp(cos(h_i, w_yi) / t) / sum over rows j of exp(cos(h_i, w_yj) / t).
    All rows weigh alike, so `replay.weight` and the draw's weights say nothing. The live row alone has nobody to be
    told apart from, and teaches nothing: it needs replay.

    Source:
        Proxy-based contrastive replay, Lin et al. 2023 (CVPR), arXiv 2304.04408, section 4.

    Differs from the source:
        Directions are smooth at 0, for the last layer's rows begin there (see `classes.direction`). Its bias isn't
        learned. Without `cosine_head` it is served by dot products, as the task would be.
    """

    class Options(Term.Options):
        kind: Literal["pcr"] = "pcr"
        temperature: float = Stop(0.09, gt=0, description="t, that cosines are divided by")

    options: Options
    replaces_task = True

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.head = needs_head(context, self.kind)

    def loss(self, step: Step) -> Tensor:
        return self.contrast(step, self.options.temperature)

    def contrast(self, step: Step, temperature: float) -> Tensor:
        y = step.rows.y.long()
        often = torch.bincount(y, minlength=self.classes)  # a class of several rows has as many proxies
        logits = cosine(whole(step).hidden, self.head.weight) / temperature
        own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        return ((logits + often.log()).logsumexp(1) - own).mean()


class HPCR(PCR):
    """PCR, where enough rows have fellows of their class contrast among rows, two temperatures, and stored answers.

    (t / t_g) PCR_t + (t / t_g) alpha SupCon_t + beta KL(stored || now) of replayed rows. In the gradient of a contrast,
    (p - y) / t, t says how sharp p is and how large the step; t_g takes the second part.

    Source:
        Holistic proxy-based contrastive replay, Lin et al. 2023, arXiv 2309.15038: contrastive, temperature and
        distillation component.

    Differs from the source:
        Contrast among rows comes in when at least `least` rows are there (the paper: a step function of the batch
        size). One distillation, of the answers that were stored when the event was live, among classes that there have
        been: of scaled cosines if `cosine_head` serves, of dot products otherwise. A Recall behind it that serves
        anything else, such as `ncm`, leaves answers that it is not made for.
    """

    class Options(PCR.Options):
        kind: Literal["hpcr"] = "hpcr"  # type: ignore[assignment]
        gradient_temperature: float = Stop(0.09, gt=0, description="t_g, that the gradient is divided by")
        least: int = Stop(8, ge=2, description="rows, the live one with them, from which on they contrast with another")
        alpha: float = Stop(0.1, ge=0, description="of the contrast among rows")
        beta: float = Stop(0.1, ge=0, description="of the distillation")

    options: Options
    needs = frozenset({"output"})

    def bind(self, context: Context) -> None:
        super().bind(context)
        heads = [each for each in context.config.plugins if isinstance(each, CosineHead.Options)]
        self.scale = heads[-1].scale if heads else None

    def loss(self, step: Step) -> Tensor:
        given, temperature = self.options, self.options.temperature
        loss = self.contrast(step, temperature)
        if len(step.rows.y) >= given.least:
            loss = loss + given.alpha * supcon(whole(step).hidden, step.rows.y, temperature)
        loss = loss * (temperature / given.gradient_temperature)
        if step.replay is None:
            return loss
        known = self.known(step)
        now, stored = self._answers(step.out("replay"))[:, known], step.columns["output"][:, known]
        return loss + given.beta * mean(step, "replay", divergence("multiclass", now, stored, 1.0))

    def _answers(self, out: Out) -> Tensor:
        """(n, C) as they would be stored today."""
        return out.output if self.scale is None else self.scale * cosine(out.hidden, self.head.weight)


class UER(Seen, Term):
    """The live row is learned by its angle alone, replayed rows by dot products, among classes that there have been.

    live: cross-entropy of scale x cos(h, w_c); replayed: `replay.weight` x mean cross-entropy of the model's output.

    Source:
        Unbias experience replay, Lin et al. 2023, arXiv 2309.04081.

    Differs from the source:
        Directions are smooth at 0 (see `classes.direction`).
    """

    class Options(Term.Options):
        kind: Literal["uer"] = "uer"
        scale: float = Stop(5.0, gt=0, description="of the cosines of the live row")

    options: Options
    replaces_task = True

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.head = needs_head(context, self.kind)

    def loss(self, step: Step) -> Tensor:
        known, total = self.known(step), step.share.new_zeros(())
        for which in parts(step):
            out, y = step.out(which), rows_of(step, which).y.long()
            live = which == "live"
            logits = self.options.scale * cosine(out.hidden, self.head.weight) if live else out.output
            losses = functional.cross_entropy(among(logits, known), y, reduction="none")
            total = total + losses.dot(step.share[:1] if live else step.share[-len(y) :])
        return total


def supcon(hidden: Tensor, y: Tensor, temperature: float, views: Tensor | None = None) -> Tensor:
    """Scalar: rows (B, H) are drawn to others of their class, and away from the rest.

    mean over rows i with company P(i), the others of their class, of
    mean over p in P(i) of -log exp(z_i z_p / t) / sum over a != i of exp(z_i z_a / t), z a row's direction.
    0, with a gradient of 0, when no row has company. `views` (B, H): other views of the same rows, as further company.

    Source:
        Khosla et al. 2020, arXiv 2004.11362, equation 2.
    """
    z, count = direction(hidden), len(hidden)
    others, labels = (z, y) if views is None else (torch.cat((z, direction(views))), torch.cat((y, y)))
    logits = (z @ others.T / temperature).masked_fill(torch.eye(count, len(labels)).bool(), -torch.inf)
    company = (labels == y.unsqueeze(1)) & ~torch.eye(count, len(labels)).bool()
    found = company.any(1)
    if not found.any():
        return (hidden * 0.0).sum()
    logs = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~company, 0.0)
    return -(logs.sum(1)[found] / company.sum(1)[found]).mean()


class SupCon(Term):
    """Live and replayed rows of one class are drawn together in the last hidden layer, those of others apart.

    Beside the task's loss (see `scr` for in its place). With a `teacher`, what that weight set makes of the same rows
    is a second view of each.

    Source:
        Supervised contrastive loss, Khosla et al. 2020, arXiv 2004.11362. With a teacher, the rehearsed rows of
        COCONUT, Cappellazzo et al. 2024, arXiv 2310.02699.

    Differs from the source:
        No augmented views and no projection head: the views are other rows of the class, and the teacher's. COCONUT's
        alignment of two modalities is left out: an event has one.
    """

    class Options(Term.Options):
        kind: Literal["supcon"] = "supcon"
        weight: float = Stop(0.1, ge=0, description="of this loss; 0: as if it were not there")
        temperature: float = Stop(0.1, gt=0, description="that cosines are divided by")
        teacher: str | None = Stop(None, description="weight set that gives a second view; none: there is none")

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        needs_hidden(context, self.kind)
        classes_of(context, self.kind)
        self.teacher = self.options.teacher and needs_set(context, self.kind, self.options.teacher)

    def loss(self, step: Step) -> Tensor:
        views = None
        if self.options.teacher and self.teacher and self.teacher.ready:
            views = torch.cat([step.out(which, self.options.teacher).hidden for which in parts(step)])
        return supcon(whole(step).hidden, step.rows.y, self.options.temperature, views)


class SCR(SupCon):
    """Supervised contrastive replay: nothing but `supcon`, served by class means (see `ncm`). It needs replay.

    Source:
        Mai et al. 2021 (CVPR workshops), arXiv 2103.13885.

    Differs from the source:
        As `supcon`; class means are running ones.
    """

    class Options(SupCon.Options):
        kind: Literal["scr"] = "scr"  # type: ignore[assignment]
        weight: float = Stop(1.0, ge=0, description="of this loss; 0: as if it were not there")

    options: Options
    replaces_task = True


class CosineHead(Recall):
    """Serves scale x cosine of the hidden vector and each class's row of the last layer, instead of dot products.

    A class's norm, which grows with how often and how lately it was learned, has no say. What a weight set makes of
    the event is served if `weights` names one.
    """

    class Options(Recall.Options):
        kind: Literal["cosine_head"] = "cosine_head"
        scale: float = Stop(10.0, gt=0, description="of the cosines, as they are served and stored")
        weights: str = Stop("live", description="live, or a weight set that a plug-in before this one keeps")

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.head = needs_head(context, self.kind)
        self.name = name_of(context.engine, self.head.weight)
        self.held = None if self.options.weights == "live" else needs_set(context, self.kind, self.options.weights)

    def apply(self, output: Tensor, query: Query) -> Tensor:
        with torch.no_grad():
            proxies = self.head.weight if self.held is None else self.held.params()[self.name]
            return self.options.scale * cosine(query.out(self.options.weights).hidden, proxies)


REPLAY = {"retention": "class_balanced", "per_event": 10}

PRESETS: dict[str, dict[str, Any]] = {
    "er_ace": {"replay": REPLAY, "plugins": ["er_ace"]},
    "pcr": {"replay": REPLAY, "plugins": ["pcr", "cosine_head"]},
    "hpcr": {"replay": REPLAY, "plugins": ["hpcr", "cosine_head"]},
    "uer": {"replay": REPLAY, "plugins": ["uer"]},
    "scr": {"replay": REPLAY, "plugins": ["scr", "ncm"]},
    "coconut": {"replay": REPLAY, "plugins": ["previous", {"kind": "supcon", "teacher": "previous"}]},
}
