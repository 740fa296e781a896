"""What an error memory adds to what was served, for one seed of one stream: by serving mode, form, gamma and lambda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.bench.error_memory_agreement import same_sign
from streamcl.bench.error_memory_serving import Known, Setting, Stream, know, put_right, put_right_by_choice, record
from streamcl.bench.quality import Floats, auc, calibration, calibration_error, grouped_auc, losses
from streamcl.memory.compensation import GRID

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
        run.keep(Variant(setting), run.base(setting), 0.0, np.zeros(len(run.labels)))
    signs: dict[Setting, float] = {}
    for mode in plan.modes:
        for form, memories in forms(bed).items():
            # Sums by key have no mean label of their own; of the stacks, one shows what gamma does.
            gammas = (0, 1) if form in (KNN, SKETCH, first) else (0,)
            if len(memories) == 1 or (plan.stacks and (form == first or Setting(mode).every > 1)):
                run.add(Setting(mode), form, gammas)
        signs[Setting(mode)] = run.same_sign(Setting(mode))
        run.known.clear()  # some hundred megabytes
    for setting in plan.late:
        for form in (key_form(bed.keys[0]), KNN, SKETCH):
            run.add(setting, form)
            run.add(setting, form, kept=True)
            run.add(setting, form, asked=True)
        run.known.clear()
    return Judged(run.figures, signs)


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
        self.known: dict[tuple[Setting, str, bool], Known] = {}

    def base(self, setting: Setting) -> Floats:
        return self.served[setting].base[:, 0].astype(np.float64)

    def add(
        self, setting: Setting, form: str, gammas: Sequence[int] = (0,), *, kept: bool = False, asked: bool = False
    ) -> None:
        """Run one form, with lambda by itself and with lambda as chosen on the tuning slice."""
        first, *more = [self._settled(memory, setting, kept) for memory in self.forms[form]]
        alone = self._known(setting, first, asked=asked)
        if not more:
            for gamma in gammas:
                scores, strengths = put_right_by_choice(self.stream, setting, alone, first, gamma)
                variant = Variant(setting, form, gamma, "auto", kept, asked)
                self.keep(variant, scores, float(strengths[self.judged].mean()), alone.support)
                best = self._best(alone, gamma)
                self.keep(replace(variant, strength="chosen"), put_right(alone, gamma, best), best, alone.support)
            return
        # Each stage is given what the one before has served: with lambda by itself, or as was best for it alone.
        [second], served = more, self.served[setting]
        auto, _ = put_right_by_choice(self.stream, setting, alone, first, 0)
        fixed = put_right(alone, 0, self._best(alone, 0))
        behind_auto, behind_best = (
            know(self.stream, setting, served.behind(scores), second, self.seed) for scores in (auto, fixed)
        )
        for gamma in gammas:
            variant = Variant(setting, form, gamma, "auto")
            scores, strengths = put_right_by_choice(self.stream, setting, behind_auto, second, gamma)
            self.keep(variant, scores, float(strengths[self.judged].mean()), behind_auto.support)
            strength = self._best(behind_best, gamma)
            scores = put_right(behind_best, gamma, strength)
            self.keep(replace(variant, strength="chosen"), scores, strength, behind_best.support)

    def _settled(self, memory: Mapping[str, Any], setting: Setting, kept: bool) -> dict[str, Any]:
        return {**memory, **({"on_new_weights": "keep"} if kept or setting.every == 1 else {})}

    def _known(self, setting: Setting, memory: Mapping[str, Any], *, asked: bool) -> Known:
        """What a form alone knows; run once."""
        place = setting, str(sorted(memory.items())), asked
        if place not in self.known:
            others = self.served[replace(setting, asked=True)] if asked else None
            self.known[place] = know(self.stream, setting, self.served[setting], memory, self.seed, others)
        return self.known[place]

    def _best(self, of: Known, gamma: int) -> float:
        """Lambda of the lowest log-loss on the tuning slice; a tie goes to the lower."""
        labels = self.labels[self.tuning]
        return min(GRID, key=lambda each: float(losses(labels, put_right(of, gamma, each)[self.tuning]).mean()))

    def keep(self, variant: Variant, scores: Floats, strength: float, support: Floats) -> None:
        """Judge scores (n,); only of the slice that chose nothing."""
        labels, scores = self.labels[self.judged], scores[self.judged]
        self.figures[variant] = {
            "auc": auc(labels, scores),
            "gauc": grouped_auc(labels, scores, self.groups[self.judged]),
            "log_loss": float(losses(labels, scores).mean()),
            "calibration": calibration(labels, scores),
            "ece": calibration_error(labels, scores),
            "lambda": strength,
            "support": float((support[self.judged] > 0).mean()),
        }

    def same_sign(self, setting: Setting) -> float:
        singles = (self._settled(self.forms[form][0], setting, kept=False) for form in (SKETCH, KNN))
        return same_sign(*(self._known(setting, single, asked=False) for single in singles))
