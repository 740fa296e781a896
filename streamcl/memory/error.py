"""Which errors the served scores made a short time ago, and the compensation of the next score by them.

Weights that lag the labels repeat an error until they are renewed; a memory without gradients puts it right at once.
It pays where serving lags (a read replica between snapshots), and gives about nothing on top of weights that learn
from every example: see `streamcl bench error-memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamcl.config import Config, ConfigError
from streamcl.features import Layout
from streamcl.memory.compensation import GRID, Choice
from streamcl.memory.forms import FORMS, Floats, Form
from streamcl.memory.keys import Keys, keys_of
from streamcl.memory.owners import NOBODY, Owner
from streamcl.methods import KeyMemory, KNNMemory, SketchMemory
from streamcl.protocols import State
from streamcl.random import key_of
from streamcl.records import Encoded, Recalled, Scores, Selector
from streamcl.stations import Task

COUNTS = ("reads", "hits", "support", "moved", "stale", "refused", "resets")
"""Over labelled events: those that looked, that found something, sums of its support and of what it moved; labels of
tickets of older weights, keys without direction, and resets."""


Recalls = tuple[Recalled, ...]


class Vectors(NamedTuple):
    """What a model saw of a batch: embedding (B, E), which enters the hidden layers, and the last of them (B, H)."""

    embedding: Floats
    hidden: Floats


class Stage:
    """One form, what it is keyed by, and how its findings are used."""

    def __init__(self, config: KNNMemory | SketchMemory | KeyMemory, keys: Keys, form: Form, task: Task) -> None:
        self.config = config
        self.keys = keys
        self.form = form
        self.task = task
        gamma = getattr(config, "gamma", 0)  # sums by key have no mean label of their own
        gammas = (0.0, 1.0) if gamma == "auto" else (float(gamma),)
        strengths = GRID if config.lambda_ == "auto" else (config.lambda_,)
        self.choice = Choice(gammas, strengths, config.lambda_half_life_events, task)
        self.version = 0
        self.counts = dict.fromkeys(COUNTS, 0.0)

    def recall(self, batch: Sequence[Encoded], given: Floats, vectors: Vectors) -> list[Recalled]:
        """What is known near each of a batch, given its scores (B, P)."""
        keys = _rows([self.keys(f, e, h) for f, e, h in zip(batch, *vectors, strict=True)])
        found = self.form.read(keys)
        means, half = found[:, 1:].astype(np.float32), given.shape[1]
        return [
            Recalled(keys[b], given[b], means[b, :half], means[b, half:], float(found[b, 0]), self.version)
            for b in range(len(batch))
        ]

    def observe(self, recalled: Recalled, target: Floats, judged: Recalled | None, owner: Owner) -> None:
        """`judged` is what lambda's losses are of; None: of nothing."""
        counts = self.counts
        counts["reads"] += 1
        if recalled.support > 0.0:
            counts["hits"] += 1
            counts["support"] += recalled.support
            counts["moved"] += float(abs(self.choice.serve(recalled) - recalled.given).max())
        if judged:
            self.choice.observe(judged, target)
        self.write(recalled, target, owner)

    def write(self, recalled: Recalled, target: Floats, owner: Owner) -> None:
        counts = self.counts
        if recalled.version != self.version:
            counts["stale"] += 1
        elif not self.form.write(recalled.key, np.concatenate((target, recalled.given)), owner):
            counts["refused"] += 1

    def renew(self, version: int) -> None:
        """The weights have been swapped: what was written under others is not read any more."""
        if self.config.on_new_weights == "reset":
            self.form.reset()
            self.version = version
            self.counts["resets"] += 1

    def read(self) -> dict[str, float]:
        counts = self.counts
        hits = max(counts["hits"], 1.0)
        [[gamma, strength]] = self.choice.pair.tolist()
        return {
            "rows": float(len(self.form)),
            "lambda": strength,
            "gamma": gamma,
            "hit_ratio": counts["hits"] / max(counts["reads"], 1.0),
            "support": counts["support"] / hits,
            "compensation": counts["moved"] / hits,
            **{name: counts[name] for name in ("stale", "refused", "resets")},
        }

    def state_dict(self) -> State:
        return {
            "config": self.config.model_dump(mode="json"),
            "form": self.form.state_dict(),
            "losses": self.choice.losses.copy(),
            "chosen": self.choice.chosen,
            "version": self.version,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: State) -> None:
        self.form.load_state_dict(state["form"])
        self.choice.losses = np.array(state["losses"], np.float64)
        self.choice.chosen = int(state["chosen"])
        self.version = int(state["version"])
        self.counts = {name: float(state["counts"][name]) for name in COUNTS}


class ErrorMemory:
    """Forms in a row, each of which puts right what the one before left over. Without any it changes nothing.

    Key, score and label are those of prediction time: they come from `Scores.recalled`, which waits in the ticket.

    Args:
        vectors: widths (E, H) of what the model offers as keys; 0 for what it hasn't.

    Shape:
        P numbers are served: 1, or C class probabilities.

    Raises:
        ConfigError: `key` names a function that can't be found, or that does not return a vector.
    """

    def __init__(self, config: Config, layout: Layout, vectors: tuple[int, int]) -> None:
        self.task = config.task
        self.width = config.outputs  # P
        self.stages: list[Stage] = []
        for index, each in enumerate(config.error_memory):
            keys = keys_of(each, config, layout, f"error_memory.{index}.key")
            empty = Encoded(layout.slot_base, np.zeros(len(layout.slot_base), np.float32), np.zeros(0, np.float32))
            dim = len(keys(empty._replace(dense=np.zeros(len(layout.numerics), np.float32)), *map(_zeros, vectors)))
            if not dim:
                raise ConfigError(f"error_memory.{index}.key: the model has no {each.key!r}")
            form = FORMS[each.kind](each, dim, 2 * self.width, key_of(config.seed, f"error_memory.{index}"))  # type: ignore[arg-type]
            self.stages.append(Stage(each, keys, form, self.task))

    def recall(self, batch: Sequence[Encoded], given: Floats, vectors: Vectors) -> tuple[Floats, list[Recalls]]:
        """Scores (B, P) put right, and for each of the batch what every stage found. One by one it gives the same."""
        found: list[list[Recalled]] = []
        for stage in self.stages:
            found.append(stage.recall(batch, given, vectors))
            given = _rows([stage.choice.serve(recalled) for recalled in found[-1]])
        return given, [tuple(of_event) for of_event in zip(*found, strict=True)] if found else [()] * len(batch)

    def observe(self, scores: Scores, label: float, judged: Recalls | None = None, owner: Owner = NOBODY) -> None:
        """A label has come: first lambda's losses, then the write, of what the ticket says, as served.

        `judged`: what was known when the event was served, where the ticket can't say it; () judges nothing.
        """
        if len(scores.recalled) != len(self.stages):  # served before the configuration was changed
            for stage in self.stages:
                stage.counts["stale"] += 1
            return
        target = self._target(label)
        known = scores.recalled if judged is None else judged or [None] * len(self.stages)
        for stage, recalled, each in zip(self.stages, scores.recalled, known, strict=True):
            stage.observe(recalled, target, each, owner)

    def write(self, recalls: Recalls, label: float, owner: Owner = NOBODY) -> None:
        """Without any judgement."""
        for stage, recalled in zip(self.stages, recalls, strict=True):
            stage.write(recalled, self._target(label), owner)

    def forget(self, who: Selector) -> int:
        """Erase rows, and sums that may hold some; returns how many. Lambda's losses stay: they are nobody's."""
        return sum(stage.form.forget(who) for stage in self.stages)

    def recall_again(self, asked: Recalls, choices: Sequence[Choice]) -> Recalls:
        """What this memory knows under the same keys, its stages' scores put right as `choices` say."""
        found: list[Recalled] = []
        given = asked[0].given
        for stage, recalled, choice in zip(self.stages, asked, choices, strict=True):
            [row] = stage.form.read(recalled.key[None])
            labels, scores = np.split(row[1:].astype(np.float32), 2)
            found.append(recalled._replace(given=given, label_mean=labels, given_mean=scores, support=float(row[0])))
            given = choice.serve(found[-1])
        return tuple(found)

    def keyed_by(self, key: str) -> list[Stage]:
        """Stages whose records are found by this vector (`hidden`, ...): for what makes or moves their keys."""
        return [stage for stage in self.stages if stage.config.key == key]

    def _target(self, label: float) -> Floats:
        if self.width == 1:
            return np.array([label], np.float32)
        target = np.zeros(self.width, np.float32)
        target[int(label)] = 1.0
        return target

    def renew(self, version: int) -> None:
        """Other weights serve from now on, of this version."""
        for stage in self.stages:
            stage.renew(version)

    def inherit(self, before: ErrorMemory) -> None:
        """Take over what outlives a version of the weights: lambda's losses, and the counts."""
        for mine, theirs in zip(self.stages, before.stages, strict=False):
            if mine.config == theirs.config:
                mine.choice.losses, mine.choice.chosen = theirs.choice.losses.copy(), theirs.choice.chosen
                mine.counts = dict(theirs.counts)

    def read(self) -> dict[str, float]:
        """By stage, under `error_memory_N_`."""
        told = ((index, stage.read()) for index, stage in enumerate(self.stages))
        return {f"error_memory_{index}_{name}": value for index, values in told for name, value in values.items()}

    def state_dict(self) -> State:
        return {str(index): stage.state_dict() for index, stage in enumerate(self.stages)}

    def load_state_dict(self, state: State) -> None:
        """A stage that was configured otherwise begins empty, and takes no ticket of that time."""
        for index, stage in enumerate(self.stages):
            saved = state.get(str(index), {})
            if saved and saved["config"] == stage.config.model_dump(mode="json"):
                stage.load_state_dict(saved)
            else:
                stage.version = 1 + int(saved.get("version", 0))


def _rows(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """(B, ...): `np.stack`, but for one row, which most batches are, without its cost."""
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


def _zeros(width: int) -> Floats:
    return np.zeros(width, np.float32)
