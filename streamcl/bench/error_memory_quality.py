"""What an error memory adds to what was served, for one seed of one stream: by serving mode, form, gamma and lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.error_memory_agreement import same_sign
from streamcl.bench.error_memory_serving import Compensated, Setting, Stream, compensate, record
from streamcl.bench.quality import Floats, auc, calibration, calibration_error, grouped_auc, losses
from streamcl.memory.compensation import GRID, LEAST

NONE = "none"
KNN, SKETCH = "kNN", "sketch"

Memories = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Bed:
    """A stream, the model that learns it, and what stands for a user in it.

    `keys` are the features whose values have memories of their own, the main one first; `group` is what gAUC stays
    within. `chosen` says on which slice the hyper-parameters were chosen, and among which.
    """

    group: str
    keys: tuple[str, ...]
    base: Mapping[str, Any]
    chosen: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One memory on one setting. `strength` is how lambda was found: `chosen` on the tuning slice, or `auto`."""

    setting: Setting
    form: str = NONE
    gamma: int = 0
    strength: str = ""
    kept: bool = False  # not reset when other weights serve
    asked: bool = False  # as in a replica: see `Setting.asked`

    def __str__(self) -> str:
        parts = [self.setting.mode, self.form]
        parts += [] if self.form == NONE else [f"gamma {self.gamma}", f"lambda {self.strength}"]
        parts += ["never reset"] if self.kept else []
        parts += ["replica"] if self.asked else []
        return ", ".join([*parts, f"labels {self.setting.delay:,} late"] if self.setting.delay else parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which memories are run on which settings: all with labels at once, the main ones with late labels too.

    Without `stacks` single forms only. All stacks are run where copies are renewed, elsewhere only key + kNN.
    """

    modes: tuple[str, ...]
    late_modes: tuple[str, ...] = ()
    delays: tuple[int, ...] = ()
    stacks: bool = True

    @property
    def late(self) -> list[Setting]:
        return [Setting(mode, delay) for delay in self.delays for mode in self.late_modes]

    @property
    def served(self) -> list[Setting]:
        return [*(Setting(mode) for mode in self.modes), *self.late]

    @property
    def recorded(self) -> list[Setting]:
        return [*self.served, *(replace(setting, asked=True) for setting in self.late)]


@dataclass(frozen=True, slots=True)
class Judged:
    """One seed's figures by variant, and how often sketch and kNN would move a score the same way, by setting."""

    figures: Mapping[Variant, Mapping[str, float]]
    same_sign: Mapping[Setting, float]


def key_form(key: str) -> str:
    return f"key {key}"


def forms(bed: Bed) -> dict[str, Memories]:
    """By name, single ones first. Of several stages each puts right what the one before it left."""
    knn, sketch = {"kind": "knn"}, {"kind": "sketch"}
    by_key = {key_form(key): {"kind": "key", "key": key} for key in bed.keys}
    main, *others = by_key
    return {
        **{name: [memory] for name, memory in by_key.items()},
        KNN: [knn],
        SKETCH: [sketch],
        f"{main} + {KNN}": [by_key[main], knn],
        f"{KNN} + {main}": [knn, by_key[main]],
        **{f"{main} + {other}": [by_key[main], by_key[other]] for other in others},
    }


def measure(stream: Stream, bed: Bed, plan: Plan, seed: int) -> Judged:
    """A live run, and every memory of the plan on what it served."""
    run = Run(stream, bed, plan.recorded, seed)
    first = f"{key_form(bed.keys[0])} + {KNN}"
    for setting in plan.served:
        run.keep(Variant(setting), run.base(setting), 0.0, 0.0)
    for mode in plan.modes:
        for form, memories in forms(bed).items():
            if len(memories) > 1 and not (plan.stacks and (form == first or Setting(mode).every > 1)):
                continue
            # Sums by key have no mean label of their own; of the stacks, one shows what gamma does.
            both = form in (KNN, SKETCH, first)
            for gamma in (0, 1) if both else (0,):
                run.add(Setting(mode), form, gamma=gamma)
    for setting in plan.late:
        for form in (key_form(bed.keys[0]), KNN, SKETCH):
            run.add(setting, form, gamma=0)
            run.add(setting, form, gamma=0, kept=True)
            run.add(setting, form, gamma=0, asked=True)
    settings = [Setting(mode) for mode in plan.modes]
    return Judged(run.figures, {setting: run.same_sign(setting) for setting in settings})


class Run:
    """One seed of one stream, and what was found so far: lambda is chosen on the first half of what was served, and
    the second half is judged."""

    def __init__(self, stream: Stream, bed: Bed, settings: Sequence[Setting], seed: int) -> None:
        self.stream, self.forms, self.seed = stream, forms(bed), seed
        self.served = record(stream, {**bed.base, "seed": seed}, settings)
        self.labels = stream.labels[stream.start :]
        half = len(self.labels) // 2
        self.tuning, self.judged = slice(0, half), slice(half, len(self.labels))
        groups = [str(payload[bed.group]) for payload in stream.data.payloads[stream.start :]]
        self.groups: NDArray[np.int64] = np.unique(groups, return_inverse=True)[1]
        self.figures: dict[Variant, dict[str, float]] = {}
        self.known: dict[Variant, Compensated] = {}
        self.behind: dict[tuple[Setting, str], Compensated] = {}

    def base(self, setting: Setting) -> Floats:
        return self.served[setting].base[:, 0].astype(np.float64)

    def add(self, setting: Setting, form: str, *, gamma: int, kept: bool = False, asked: bool = False) -> None:
        """Run one form, with lambda by itself and with lambda as chosen on the tuning slice."""
        memories = [self._settled(memory, setting, gamma, kept) for memory in self.forms[form]]
        others = self.served[replace(setting, asked=True)] if asked else None
        auto = compensate(self.stream, setting, self.served[setting], memories, self.seed, others)
        variant = Variant(setting, form, gamma, "auto", kept, asked)
        self.known[variant] = auto
        self.keep(variant, auto.served, float(auto.strength[self.judged].mean()), float((auto.support > 0).mean()))
        last = auto if len(memories) == 1 else self._behind_fixed(setting, form, memories)
        own = int(memories[-1].get("gamma", 0))
        best = self._best(last, own)
        support = float((last.support > 0).mean())
        self.keep(replace(variant, strength="chosen"), put_right(last, own, best), best, support)

    def _settled(self, memory: Mapping[str, Any], setting: Setting, gamma: int, kept: bool) -> dict[str, Any]:
        more: dict[str, Any] = {} if memory["kind"] == "key" else {"gamma": gamma}
        return {**memory, **more, **({"on_new_weights": "keep"} if kept or setting.every == 1 else {})}

    def _behind_fixed(self, setting: Setting, form: str, memories: Memories) -> Compensated:
        """What the second stage knows when the first one's lambda is the one that was best for it alone.

        That does not depend on the second one's gamma, so it is run once.
        """
        if (setting, form) not in self.behind:
            first, second = memories
            gamma = int(first.get("gamma", 0))
            single = next(name for name, of in self.forms.items() if len(of) == 1 and of[0].items() <= first.items())
            best = self._best(self.known[Variant(setting, single, gamma, "auto")], gamma)
            stages = [{**first, "lambda": best}, {**second, "lambda": 0.0}]
            self.behind[setting, form] = compensate(self.stream, setting, self.served[setting], stages, self.seed)
        return self.behind[setting, form]

    def _best(self, of: Compensated, gamma: int) -> float:
        """Lambda of the lowest log-loss on the tuning slice; a tie goes to the lower."""
        labels = self.labels[self.tuning]
        return min(GRID, key=lambda each: float(losses(labels, put_right(of, gamma, each)[self.tuning]).mean()))

    def keep(self, variant: Variant, scores: Floats, strength: float, support: float) -> None:
        """Judge scores (n,); only of the slice that chose nothing."""
        labels, scores = self.labels[self.judged], scores[self.judged]
        self.figures[variant] = {
            "auc": auc(labels, scores),
            "gauc": grouped_auc(labels, scores, self.groups[self.judged]),
            "log_loss": float(losses(labels, scores).mean()),
            "calibration": calibration(labels, scores),
            "ece": calibration_error(labels, scores),
            "lambda": strength,
            "support": support,
        }

    def same_sign(self, setting: Setting) -> float:
        return same_sign(*(self.known[Variant(setting, form, 0, "auto")] for form in (SKETCH, KNN)))


def put_right(of: Compensated, gamma: int, strength: float) -> Floats:
    """(n,) what the last stage would have served with a fixed lambda: what it knew does not depend on it."""
    error = of.label_mean - (of.given if gamma else of.given_mean)
    moved = np.clip(of.given + strength * error, LEAST, 1.0 - LEAST)
    return np.where((of.support > 0) & (strength > 0), moved, of.given)
