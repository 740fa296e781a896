"""What methods of several modules here ask of a stream of classes: which there have been, and how a row fits each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from streamcl.engine.eager import Eager
from streamcl.engine.weights import WeightSet
from streamcl.plugin import Context, Out, PluginError, Rows, Rule, Step
from streamcl.protocols import State
from streamcl.records import Signal
from streamcl.stations import Stop

NEVER = -1

SMALLEST = 0.1
"""A vector counts as no shorter than about this when its direction is asked for; see `direction`."""


class Seen(Rule):
    """Remembers which classes have been live, and when last. Base of methods whose classes grow.

    That there has been a class is nobody's, so a `forget` leaves it.

    Attributes:
        last: (C,) number of the step in which a class was live last; `NEVER`.
    """

    def bind(self, context: Context) -> None:
        """Raises PluginError for a regression."""
        super().bind(context)
        self.classes = classes_of(context, self.kind)
        self.last = torch.full((self.classes,), NEVER)

    def known(self, step: Step) -> Tensor:
        """(C,) bool: classes that there have been, with those of this step."""
        known = self.last != NEVER
        known[step.rows.y.long()] = True
        return known

    def after(self, step: Step) -> None:
        if step.live is not None:
            self.last[step.live.y.long()] = step.number

    def state_dict(self) -> State:
        return {"last": self.last.clone()}

    def load_state_dict(self, state: State) -> None:
        if state:
            self.last.copy_(state["last"])
        else:
            self.last.fill_(NEVER)


class Grouped(Seen):
    """Knows old classes from new: those that had been live before the last of the signals `on`.

    Attributes:
        old: (C,) bool
    """

    class Options(Seen.Options):
        on: tuple[str, ...] = Stop(
            ("boundary",),
            min_length=1,
            description="signals that part old from new; those of `previous`",
        )

    options: Options

    def bind(self, context: Context) -> None:
        super().bind(context)
        self.old = torch.zeros(self.classes, dtype=torch.bool)

    def on_signal(self, signal: Signal) -> None:
        if signal.kind in self.options.on:
            self.old = self.last != NEVER

    def state_dict(self) -> State:
        return {**super().state_dict(), "old": self.old.clone()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.old = state["old"].clone() if state else torch.zeros(self.classes, dtype=torch.bool)


def parts(step: Step) -> Iterator[str]:
    """`live` and `replay`, as far as the step has them."""
    for which in ("live", "replay"):
        if getattr(step, which) is not None:
            yield which


def rows_of(step: Step, which: str) -> Rows:
    rows: Rows = getattr(step, which)
    return rows


def mean(step: Step, which: str, values: Tensor) -> Tensor:
    """Of what a term finds for each row of one part (n,); replayed rows count as the draw has weighed them."""
    if which == "live":
        return values.mean()
    share = step.share[-len(values) :]
    return values.dot(share / share.sum())


def whole(step: Step) -> Out:
    """What live weights make of all rows, the live one first, with gradient."""
    outs = [step.out(which) for which in parts(step)]
    return Out(torch.cat([out.output for out in outs]), torch.cat([out.hidden for out in outs]))


def direction(vectors: Tensor) -> Tensor:
    """(..., H) of (..., H), of length v / sqrt(v^2 + `SMALLEST`^2) for length v: nearly 1, and smooth at 0.

    The rows of the head are 0 at first, and a hidden layer can be.
    """
    square = (vectors * vectors).sum(-1, keepdim=True)
    return vectors / torch.sqrt(square + SMALLEST * SMALLEST)


def cosine(hidden: Tensor, proxies: Tensor) -> Tensor:
    """(B, C) of (B, H) and (C, H)."""
    return direction(hidden) @ direction(proxies).T


def among(logits: Tensor, allowed: Tensor) -> Tensor:
    """(B, C) logits that leave out classes which aren't `allowed`, (C,) or (B, C)."""
    return logits.masked_fill(~allowed, -torch.inf)


def needs_hidden(context: Context, kind: str) -> None:
    if not context.engine.widths[1]:
        raise PluginError(f"plugins: {kind}: a {context.config.model.kind} model has no hidden vector")


def classes_of(context: Context, kind: str) -> int:
    """How many classes there can be. Raises PluginError for a regression."""
    if context.config.task == "regression":
        raise PluginError(f"plugins: {kind}: a regression has no classes")
    return 2 if context.config.task == "binary" else context.config.outputs


def needs_classes(context: Context, kind: str) -> None:
    if context.config.task != "multiclass":
        raise PluginError(f"plugins: {kind}: for a multiclass task, not {context.config.task}")


def needs_head(context: Context, kind: str) -> nn.Linear:
    """The last layer, whose rows stand for the classes."""
    needs_hidden(context, kind)
    needs_classes(context, kind)
    tower = context.engine.model.tower
    if tower is None or context.engine.model.beside:
        raise PluginError(f"plugins: {kind}: the last layer of {context.config.model.kind} isn't all of its output")
    return tower.head


def needs_set(context: Context, kind: str, name: str) -> WeightSet:
    """A weight set that a plug-in before this one keeps."""
    if name not in context.engine.sets:
        known = ", ".join(context.engine.sets) or "none"
        raise PluginError(f"plugins: {kind}: no weights {name!r} before it; there are {known}")
    return context.engine.sets[name]


def name_of(engine: Eager, param: Tensor) -> str:
    return next(name for name, each in engine.dense.params.items() if each is param)
