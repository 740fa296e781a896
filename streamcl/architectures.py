"""The configuration of what learns: the kind of model, and the settings of each kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from streamcl.stations import FieldPath, Free, New, Numeric, Station, Stop

KINDS = (
    *("logistic", "fm", "ffm", "mlp", "deepfm", "xdeepfm", "dcnv2", "autoint", "din", "two_tower", "shared_bottom"),
    *("mmoe", "recurrent"),
)
SHALLOW = ("logistic", "fm", "ffm")
"""Without hidden layers."""

Width = Annotated[int, Field(ge=1, le=65_536)]


def _known(kind: str) -> str:
    module, colon, name = kind.partition(":")
    if kind in KINDS or (colon and module and name.isidentifier()):
        return kind
    near = [f"; did you mean {name!r}?" for name in difflib.get_close_matches(kind, KINDS, n=1)]
    raise ValueError(f"{kind!r} is neither module:Class nor one of {', '.join(KINDS)}{''.join(near)}")


class Recurrent(Station):
    """What model `recurrent` carries from one event of a key to the next; see `streamcl.models.linear_state`.

    With credit every key, waiting ticket and replayed row holds traces: about 8 x units x inputs bytes for min_gru,
    25 kB for 16 units and 192 inputs. Set `keys`, `join.max_tickets`, `replay.capacity` to suit, or credit detached.
    """

    cell: Literal["min_gru", "min_lstm", "lssl", "retnet", "legs"] = New("min_gru", description="the recurrence")
    units: int = New(16, ge=1, le=4096, description="of the recurrence (count); legs: coefficients per input")
    credit: Literal["exact", "fixed", "detached"] = New(
        "exact",
        description="for what older events did to the state: exact traces (element-wise cells), fixed feedback, none",
    )
    feedback: float = New(0.9, ge=0, lt=1, description="credit fixed: what a trace keeps from event to event")
    horizon: float = New(64.0, gt=1, description="gated cells: longest memory at first (events)")
    timed: bool = New(False, description="the time between a key's events counts, not their number alone")
    unit_s: float = New(1.0, gt=0, description="timed: of event time (seconds)")
    keys: int = New(100_000, ge=1, description="keys whose state is held; the one seen longest ago gives way (count)")

    @model_validator(mode="after")
    def _credited(self) -> Self:
        if self.cell in ("retnet", "legs") and self.credit != "detached":
            raise ValueError(f"credit: {self.cell} is no element-wise recurrence; set detached")
        return self


class XDeepFM(Station):
    """Its compressed interaction network; see `streamcl.models.XDeepFM`."""

    maps: tuple[Width, ...] = New((16, 16), min_length=1, description="feature maps of each layer (count)")


class AutoInt(Station):
    """Self-attention over fields; see `streamcl.models.attention.AutoInt`."""

    layers: int = New(2, ge=1, le=16, description="interacting layers (count)")
    heads: int = New(2, ge=1, le=64, description="of each layer (count)")
    units: int = New(16, ge=1, le=1024, description="of each head (count)")


class DIN(Station):
    """Which bags are histories, and of what; see `streamcl.models.attention.DIN`."""

    attends: dict[FieldPath, FieldPath] = New(
        {}, description="the history (a bag) and the field whose category is compared with each item of it"
    )
    hidden: tuple[Width, ...] = New((16,), description="units per hidden layer of the attention")


class TwoTower(Station):
    """What each tower reads, categories and numbers alike; see `streamcl.models.two_tower.TwoTower`."""

    user: tuple[FieldPath, ...] = New((), description="features of the user and the context")
    item: tuple[FieldPath, ...] = New((), description="features of the item")
    width: int = New(16, ge=1, le=4096, description="of the vectors whose dot product is the score (count)")
    sampled: FieldPath | None = New(
        None,
        description="numeric feature, scale none: probability that the event's item is drawn as a negative, for"
        " sampled negatives; it is read in learning alone",
    )


class MultiTask(Station):
    """Parts of shared_bottom and mmoe; see `streamcl.models.multitask.MultiTask`."""

    experts: int = New(4, ge=1, le=256, description="mmoe only (count)")
    hidden: tuple[Width, ...] = New((16,), description="units per hidden layer of each task's own tower")


class Task(Station):
    """One more thing that is learned of an event, beside `events.label` or `labels.label`: 0 or 1, or not known."""

    label: FieldPath = Stop(description="its field, in the payload that the first label comes in")
    default: Literal[0, 1] | None = Stop(None, description="when the field is absent; none: not known, not learned")
    weight: float = Stop(1.0, ge=0, description="of its loss; that of the first task is 1")


class Model(Station):
    kind: Annotated[str, AfterValidator(_known)] = New(
        "deepfm", description=f"what learns, unless river is set: {', '.join(KINDS)}, or module:Class"
    )
    recurrent: Recurrent = Recurrent()
    xdeepfm: XDeepFM = XDeepFM()
    autoint: AutoInt = AutoInt()
    din: DIN = DIN()
    two_tower: TwoTower = TwoTower()
    multitask: MultiTask = MultiTask()
    options: dict[str, Any] = New({}, description="module:Class only: keyword arguments of its constructor")
    embedding_dim: int = New(
        16, ge=1, le=1024, description="numbers of an embedding; ffm has one for each other field (count)"
    )
    hidden: tuple[Width, ...] = New((64, 32), description="units per hidden layer")
    cross_layers: int = New(2, ge=1, le=64, description="dcnv2 only (count)")
    classes: int = New(2, ge=2, description="classes of a multiclass task; labels are 0 .. classes-1")
    init_scale: float = New(0.01, gt=0, description="standard deviation of a fresh embedding")
    dtype: Literal["float32", "float64"] = New("float32", description="of weights and of what the optimiser holds")
    prior: float | None = New(
        None, gt=0, lt=1, description="rate of positives that a fresh binary model answers, by its bias; none: 1/2"
    )
    warm_start: Path | None = Free(
        None,
        description="weights that a first start begins with: a file, or a snapshot's folder; see streamcl.warm_start",
    )
    layer_norm: bool = New(False, description="each hidden layer's sums at mean 0 and deviation 1, before its ReLU")

    @property
    def deep(self) -> bool:
        """Whether there may be hidden layers."""
        return self.kind not in SHALLOW

    @property
    def keyed(self) -> bool:
        """Whether the last of them may be a key of the error memory: two towers have two."""
        return self.deep and self.kind != "two_tower" and bool(self.hidden)

    @model_validator(mode="after")
    def _own(self) -> Self:
        if self.options and ":" not in self.kind:
            raise ValueError(f"options: {self.kind} is built in and takes none; they are for module:Class")
        return self


def faults(model: Model, features: Mapping[str, Any], task: str) -> Iterator[str]:
    """What of a model's settings doesn't fit the features or the task, each with its path."""
    numeric = {name for name, feature in features.items() if isinstance(feature, Numeric)}
    if model.prior is not None and (task != "binary" or ":" in model.kind):
        yield "model.prior: " + (
            f"a {task} task has no rate" if task != "binary" else f"{model.kind} sets its own bias"
        )
    if model.kind == "din":
        yield from _of_din(model.din, features.keys() - numeric)
    if model.kind in ("shared_bottom", "mmoe") and not model.hidden:
        yield f"model.hidden: {model.kind} has one hidden layer at least"
    if model.kind == "two_tower":
        yield from _of_two_tower(model.two_tower, features, task)


def _of_din(din: DIN, categories: Iterable[str]) -> Iterator[str]:
    if not din.attends:
        yield 'model.din.attends: name a history and its target, such as {seen = "item"}'
    for history, target in din.attends.items():
        for name in (history, target):
            if name not in categories:
                yield f"model.din.attends: {name!r} is no categorical feature and no bag"
        if history == target:
            yield f"model.din.attends: {history!r} is compared with itself"


def _of_two_tower(towers: TwoTower, features: Mapping[str, Any], task: str) -> Iterator[str]:
    named = [*towers.user, *towers.item, *([towers.sampled] if towers.sampled else [])]
    if task == "multiclass":
        yield "model.kind: two_tower has one dot product; a multiclass task wants one for each class"
    for side in ("user", "item"):
        if not getattr(towers, side):
            yield f"model.two_tower.{side}: name its features"
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield f"model.two_tower: {name!r} stands there twice"
    for name in sorted(features.keys() ^ set(named)):
        told = "in neither tower" if name in features else "is no feature"
        yield f"model.two_tower: {name!r} {told}"
    sampled = features.get(towers.sampled or "")
    if sampled is not None and getattr(sampled, "scale", "") != "none":
        yield f"model.two_tower.sampled: {towers.sampled!r} must be a numeric feature with scale none"
