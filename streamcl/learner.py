"""The model and everything that learns with it: predict is pure, learn is one example at a time."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from streamcl.config import Config, ConfigError
from streamcl.engine import choice
from streamcl.engine.chunked import Chunked
from streamcl.engine.delayed import odds
from streamcl.engine.eager import Eager, as_tensors
from streamcl.engine.layout import Found
from streamcl.features import FLOAT32_MAX, Featurizer, RunningNorm
from streamcl.key_states import KeyStates
from streamcl.memory import ErrorMemory, Replay, Vectors
from streamcl.memory.owners import Owners
from streamcl.memory.replay import held_columns
from streamcl.models.key_state import KeyStateModel
from streamcl.plasticity import build_diagnostics
from streamcl.plugin import Context, Out, Plan, Planner, Plugin, Query, Recall, Rows, Shape, Step, build
from streamcl.protocols import State
from streamcl.records import TASK, Encoded, Event, Fate, Notes, Outcome, Scores, Selector, Signal, Ticket
from streamcl.stations import Categorical

log = logging.getLogger(__name__)


class Learner:
    """A torch model that learns from one outcome at a time, with replay and an error memory.

    Args:
        serving: It is to predict what another learned, and says nothing about how that one learns.

    Loss of a step = live example (see `loss.kind`) + `replay.weight` * mean over `replay.per_event` replayed ones, each
    times its sample weight. The draw comes before the writes, so an event never replays itself.

    Shape:
        `predict(features)` gives `Scores` with output (O,) and served (1,), or (C,) for multiclass.

    Errors:
        None are raised for data: `learn` returns False, and neither a weight nor a memory has changed (plug-ins have
        heard the signals, and planned), when the label would make the loss or the gradient non-finite or larger than
        `optimizer.max_grad_norm` (the outcome is to be quarantined). An example is left out for its own gradient only:
        when the replayed rows are what is too large, it is learned without them.
    """

    def __init__(self, config: Config, serving: bool = False, plugins: Sequence[Plugin] = ()) -> None:
        layout = Featurizer(config).layout
        self.task = config.task
        self.said = odds if config.loss.kind == "fnc" else _sigmoid
        self.staged = config.join.wait_s is not None
        # Weightless rows would still move Adam's moments and what l2 pulls at.
        self.per_event = config.replay.per_event if config.replay.weight else 0
        self.replay_weight = config.replay.weight
        self.plugins = named([*build(config.plugins), *plugins])
        self.engine = Eager(config, layout, serving, self.plugins)
        self.numerics = RunningNorm(len(layout.numerics), unscaled=layout.unscaled)
        self.target = RunningNorm(1)  # regression learns standardised labels; idle otherwise
        self.states = self._key_states(config)
        self.numbers = len(layout.numerics)  # N; behind them in `dense` stands the key's state
        columns = held_columns(self.plugins.values(), Shape(config.outputs, self.engine.widths[1]))
        self.tasks = sorted(config.tasks)
        columns = {**columns, **({"tasks": ((len(self.tasks),), np.float32)} if self.tasks else {})}
        self.memory = Replay(config.replay, config.seed, len(layout.slot_field), self.width, columns)
        self.notes_hidden = "hidden" in columns
        self.recall = ErrorMemory(config, layout, self.engine.widths)
        self.rules = self.engine.rules
        trained = self.engine.dense, self.engine.model, self.engine.layers
        self.diagnostics = None if serving else build_diagnostics(config, *trained)
        self.version = 0  # events that the current weights have learned from
        self.loss: Tensor | None = None  # () of the event that was learned last; None where no step was taken on it
        self.steps = 0  # taken; more than `version` where a planner wants several for one event
        self.tables = self.engine.tables
        key = config.events.key or ""
        self.key_field = key if isinstance(config.features.get(key), Categorical) else ""
        for plugin in self.plugins.values():
            plugin.bind(Context(config, self.engine, self.memory, self.target, self._rows, self.recall))
        self.recalls = [plugin for plugin in self.plugins.values() if isinstance(plugin, Recall)]
        self.planners = [plugin for plugin in self.plugins.values() if isinstance(plugin, Planner)]
        self.memory.take_over(self.plugins.values())
        self._refuse_keepers()
        self.obstacle = ""  # to another engine than the eager one
        self.fused: Chunked | None = choice.build(config, self, serving, plugins)

    def _refuse_keepers(self) -> None:
        """Of rows that come and go nobody else may hold anything."""
        keepers = [name for name, plugin in self.plugins.items() if plugin.keeps_rows]
        keepers += [f"{name} (weights)" for name in self.engine.sets]
        if self.tables is not None and keepers:
            raise ConfigError(
                f"features.{self.tables.names[0]}.table: dynamic, but the plug-ins hold something of each row:"
                f" {', '.join(keepers)}"
            )

    def _key_states(self, config: Config) -> KeyStates | None:
        model, recurrent = self.engine.model, config.model.recurrent
        if not isinstance(model, KeyStateModel):
            return None
        return KeyStates(recurrent.keys, model.initial().numpy(), recurrent.unit_s)

    @property
    def width(self) -> int:
        """Of `dense` in the features of a ticket and of a replayed row."""
        return self.numbers + (0 if self.states is None else len(self.states.initial))

    def described(self) -> dict[str, str]:
        """How steps are computed, and what stands in the way of the fused engine where that was open."""
        where = {} if self.engine.device.type == "cpu" else {"device": self.engine.device.type}
        if self.fused is not None:
            return {"engine": self.fused.name, **where}
        return {"engine": "eager", **where, **({"because": self.obstacle} if self.obstacle else {})}

    def answer(self, event: Event) -> tuple[Encoded, Scores]:
        """What is served, and what the ticket is to hold: features, and the state of the key before the event.

        The key takes its new state along, so two events of one key in one turn run in their order. With a fused engine
        the scores are a promise, which its `settle` keeps.
        """
        if self.fused is not None:
            return event.features, self.fused.answer(event.features)
        if self.states is None:
            return event.features, self.predict(event.features)
        before = self.states.before(event.key, event.time_s)
        features = event.features._replace(dense=np.concatenate((event.features.dense, before)))
        scores = self.predict(features)
        model = self.engine.model
        assert isinstance(model, KeyStateModel)  # noqa: S101 - as the states are there
        self.states.write(event.key, event.time_s, model.after.pop(get_ident())[0].numpy())
        return features, scores

    def predict(self, features: Encoded) -> Scores:
        """Without the state of a key in `features` it is asked about a key that has done nothing."""
        if self.fused is not None:
            return self.predict_many([features])[0]
        features = self._with_state(features)
        ids, weights, dense = as_tensors(*features)
        [scores] = self._scores([features], ids, weights, self.read_numbers(dense))
        return scores

    def predict_many(self, batch: Sequence[Encoded]) -> list[Scores]:
        """In one pass: what `predict` says of each; of the eager engine up to a matrix product's rounding."""
        if not batch:
            return []
        if self.fused is not None:
            return self._said(batch, self.fused.predict(batch))
        batch = [self._with_state(features) for features in batch]
        ids, weights, dense = (np.concatenate(column).reshape(len(batch), -1) for column in zip(*batch, strict=True))
        return self._scores(
            batch, torch.from_numpy(ids), torch.from_numpy(weights), self.read_numbers(torch.from_numpy(dense))
        )

    def _with_state(self, features: Encoded) -> Encoded:
        if self.states is None or len(features.dense) == self.width:
            return features
        return features._replace(dense=np.concatenate((features.dense, self.states.initial)))

    def _scores(self, batch: Sequence[Encoded], ids: Tensor, weights: Tensor, dense: Tensor) -> list[Scores]:
        if self.tables is not None:
            ids, weights = self.tables.resolve(ids, weights)
        given = [each.to(self.engine.device, non_blocking=True) for each in (ids, weights, dense)]
        if not (self.recall.stages or self.recalls or self.notes_hidden):
            first, tasks = self._parted(self.engine.predict(*given).cpu())
            output = first.numpy()
            said = zip(output, self.serve(output), tasks, strict=True)
            return [Scores(raw, served, self.version, (), noted) for raw, served, noted in said]
        looked = [each.cpu() for each in self.engine.look(*given)]
        first, tasks = self._parted(looked[0])
        output, notes = self._recalled(Query(self.engine, (ids, weights, dense), Out(first, looked[2])))
        served = self.serve(output)
        served, recalled = self.recall.recall(batch, served, Vectors(*(each.numpy() for each in looked[1:])))
        noted = [{**notes[b], **tasks[b]} for b in range(len(batch))]
        return [Scores(output[b], served[b], self.version, recalled[b], noted[b]) for b in range(len(batch))]

    def _parted(self, output: Tensor) -> tuple[Tensor, list[Notes]]:
        """(B, O) of the first task, and what tickets carry of the others."""
        if not self.tasks:
            return output, [{} for _ in output]
        chances = torch.sigmoid(output[:, self.engine.outputs :]).float().numpy()[:, :, None]  # (B, T, 1)
        names = [f"{TASK}{name}" for name in self.tasks]
        return output[:, : self.engine.outputs], [dict(zip(names, each, strict=True)) for each in chances]

    def _said(self, batch: Sequence[Encoded], found: Found) -> list[Scores]:
        """What the fused engine has found, put right by the error memory."""
        notes: list[Notes] = [{"served": each} for each in found.noted] or [{}] * len(batch)
        if not self.recall.stages:
            parts = zip(found.output, found.served, notes, strict=True)
            return [Scores(output, served, self.version, (), noted) for output, served, noted in parts]
        served, recalled = self.recall.recall(batch, found.served, Vectors(found.entered, found.hidden))
        return [
            Scores(*each[:2], self.version, *each[2:])
            for each in zip(found.output, served, recalled, notes, strict=True)
        ]

    def put_right(self, features: Encoded, scores: Scores, entered: NDArray[Any], hidden: NDArray[Any]) -> None:
        """Finish a score that was promised by what the error memory says; entered (1, E), hidden (1, H)."""
        served, recalled = self.recall.recall([features], scores.served[None], Vectors(entered, hidden))
        scores.put_right(served[0], recalled[0])

    def _recalled(self, query: Query) -> tuple[NDArray[np.float32], list[Notes]]:
        """(B, O) of what the plug-ins make of raw outputs, and what each ticket is to carry."""
        output = query.out().output
        for plugin in self.recalls:
            output = plugin.apply(output, query)
        if self.notes_hidden:
            query.notes["hidden"] = query.out().hidden
        columns = {name: value.numpy() for name, value in query.notes.items()}
        return output.numpy(), [{name: value[b] for name, value in columns.items()} for b in range(len(output))]

    def serve(self, output: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, P) of raw outputs (B, O)."""
        if self.task == "binary":
            return np.array([[self.said(logit)] for logit in output[:, 0].tolist()], np.float32)
        raw = output.astype(np.float64)
        if self.task == "multiclass":
            powers = np.exp(raw - raw.max(1, keepdims=True))
            served = powers / powers.sum(1, keepdims=True)
        else:
            served = self.target.mean + raw * self.target.deviation()
        return np.asarray(served, np.float32)

    def learn(self, outcome: Outcome, signals: Sequence[Signal] = ()) -> bool:
        """Learn from one outcome, and from what it has told of the stream; False when it had to be left out."""
        if self.fused is not None:
            self.fused.learn(outcome)
            return self.fused.settle()[-1]
        for signal in signals:
            for plugin in self.plugins.values():
                plugin.on_signal(signal)
        if not abs(outcome.label) <= FLOAT32_MAX:
            return False
        plan = Plan(draw=self.per_event)
        for planner in self.planners:
            plan = planner.plan(plan, outcome, signals)
        before, steps = (self.numerics.state_dict(), self.target.state_dict()), self.steps
        self.numerics.update(outcome.ticket.features.dense[: self.numbers])
        if self.task == "regression":
            self.target.update(np.array([outcome.label], np.float32))
        self.loss = None
        features, time_s = outcome.ticket.features, outcome.ticket.time_s
        if self.tables is not None:
            self.tables.admit(features, time_s)
        if not self._passes(outcome, plan):
            if self.tables is not None:
                self.tables.retract()
            self.numerics.load_state_dict(before[0])
            self.target.load_state_dict(before[1])
            return False
        if self.tables is not None:
            self._changed(self.tables.complete(features, time_s))
        self.version += 1
        owner = Owners.of(outcome.ticket)
        if self.diagnostics and self.steps > steps:  # an event that is skipped shows no gradient
            self.diagnostics.observe(self.engine.gradient_norm, owner)
        for plugin in self.recalls:
            plugin.observe(outcome)
        if not (self.staged and outcome.fate == Fate.EXPIRED):  # it was written as it was a negative for now
            self.memory.write(
                *(self._noted(outcome.ticket), outcome.label, self.steps, self._loss_of(outcome)),
                outcome.beside(len(self.tasks)),
            )
        if self.recall.stages:
            self.recall.observe(outcome.ticket.scores, outcome.label, owner=owner)
        return True

    def _changed(self, rows: Tensor) -> None:
        """Rows of dynamic tables have come or gone."""
        if self.engine.watch and len(rows):
            self.engine.watch(rows)

    def forget(self, who: Selector) -> dict[str, int]:
        """Erase what examples have left behind, by part; what the weights have learned of them stays.

        But for the row of a key that is forgotten whole, where a dynamic table has one for it: nobody else is in that.
        """
        diagnostics = {"diagnostics": self.diagnostics.forget(who)} if self.diagnostics else {}
        states = {"key_states": self.states.forget(who)} if self.states is not None else {}
        if restated := self.restated(who):
            for row in range(len(self.memory)):
                self.memory.dense[row] = restated(self.memory.dense[row])
        plugins = {name: plugin.forget(who) for name, plugin in self.plugins.items()}
        if self.tables is not None and self.key_field in self.tables.names:
            plugins["tables"] = self._forget_row(who)
        erased = {"replay": self.memory.forget(who), "error_memory": self.recall.forget(who)}
        return {**erased, **states, **diagnostics, **plugins}

    def _forget_row(self, who: Selector) -> int:
        if self.tables is None or who.key is None or who != Selector(key=who.key):
            return 0
        rows = self.tables.forget(self.key_field, who.key)
        self._changed(rows)
        return len(rows)

    def restated(self, who: Selector) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
        """What to make of the numbers of tickets and rows that stay, when events go whose keys do not go whole.

        They hold the state that their keys had by then, of which those events are part: every one begins anew.
        """
        if self.states is None or who == Selector(key=who.key):
            return None
        initial, numbers = self.states.initial, self.numbers
        return lambda dense: np.concatenate((dense[:numbers], initial))

    def _loss_of(self, outcome: Outcome) -> float:
        """In the step that it was learned in; else that of what it was answered with. 0 where nobody keeps it."""
        if "loss" not in self.memory.columns:
            return 0.0
        if self.loss is not None:
            return float(self.loss)
        y = torch.from_numpy(self.target.apply(np.array([outcome.label], np.float32)))
        output = torch.from_numpy(outcome.ticket.scores.output)[None]
        return float(
            self.engine.losses(
                output, y if self.task == "regression" else torch.tensor([outcome.label]), None, outcome
            )[0]
        )

    def _noted(self, ticket: Ticket) -> Ticket:
        """A ticket from before anybody asked for the hidden layer gets that of now."""
        if not self.notes_hidden or "hidden" in ticket.scores.notes:
            return ticket
        ids, weights, dense = as_tensors(*ticket.features)
        hidden = self.engine.out(self._rows(ids, weights, dense, torch.zeros(1))).hidden[0].numpy()
        return replace(ticket, scores=replace(ticket.scores, notes={**ticket.scores.notes, "hidden": hidden}))

    def _passes(self, outcome: Outcome, plan: Plan) -> bool:
        """The steps that are planned; False when not even the event alone can be learned."""
        if plan.skip:
            return True
        for turn in range(plan.passes):
            replayed = plan.draw if len(self.memory) else 0
            step = self.step_of(outcome, plan, replayed)
            taken = step is not None and self.engine.step(step)
            if not taken and replayed and plan.live:  # is it the event, or what is replayed?
                step = self.step_of(outcome, plan, 0)
                taken = step is not None and self.engine.step(step)
            if step is not None and taken:
                self.memory.touch(step)
                if plan.live and step.losses is not None:
                    self.loss = step.losses[0]
                self.steps += 1
            if not taken and not turn and plan.live:
                return False
        if plan.then is not None:
            self._passes(outcome, plan.then)  # whatever becomes of it, the event has been learned
        return True

    def step_of(self, outcome: Outcome, plan: Plan, replayed: int) -> Step | None:
        """None when it would have no row."""
        weight = outcome.ticket.weight
        live, served, share = None, None, torch.full((1 if plan.live else 0,), weight, dtype=self.engine.dtype)
        if plan.live:
            ids, weights, dense = as_tensors(*outcome.ticket.features)
            live = self._rows(ids, weights, dense, torch.tensor([outcome.label]))
            if self.tasks:
                live = live._replace(also=torch.tensor([outcome.beside(len(self.tasks))]))
            said = outcome.ticket.scores.served  # empty while it is a promise, of which no loss is made
            served = float(said[0]) if len(said) else None
        if not replayed:
            return Step(self.steps, plan, live, None, share, served=served, outcome=outcome) if live else None
        index, drawn = self.memory.pick(replayed, self.steps)
        replay, columns = self._rows(*self.memory.examples(index)), self.memory.columns_of(index)
        drawn = drawn.to(share) * columns["sample_weight"].to(share)
        share = torch.cat((share, drawn * (self.replay_weight / replayed)))
        replay = replay._replace(also=columns["tasks"]) if self.tasks else replay
        return Step(self.steps, plan, live, replay, share, index=index, columns=columns, served=served, outcome=outcome)

    def _rows(self, ids: Tensor, weights: Tensor, dense: Tensor, y: Tensor) -> Rows:
        """As the model reads them."""
        dense = self.read_numbers(dense)
        if self.tables is not None:
            ids, weights = self.tables.resolve(ids, weights)
        if self.task == "regression":
            y = torch.from_numpy(self.target.apply(y.unsqueeze(1).numpy())).squeeze(1)
        return Rows(ids, weights, dense, y.to(self.engine.dtype))

    def read_numbers(self, dense: Tensor) -> Tensor:
        """(B, ...) numerics standardised, a key's state as it is."""
        numbers = torch.from_numpy(self.numerics.apply(dense[:, : self.numbers].numpy())).to(self.engine.dtype)
        return numbers if self.states is None else torch.cat((numbers, dense[:, self.numbers :]), 1)

    def read(self) -> dict[str, float]:
        held = self.memory.read() | {"weights_version": float(self.version)}
        held |= {"key_states": float(len(self.states))} if self.states is not None else {}
        held |= self.tables.read() if self.tables is not None else {}
        held |= self.recall.read() | (self.diagnostics.read() if self.diagnostics else {})
        for rule in self.rules.values():
            for name, value in rule.read().items():
                held[name] = held.get(name, 0.0) + value  # see `Rule.read`
        for name, plugin in self.plugins.items():
            held |= {f"{name}_{what}": value for what, value in plugin.read().items()}
        return held

    def state_dict(self) -> State:
        return {
            "engine": self.engine.state_dict(),
            "numerics": self.numerics.state_dict(),
            "target": self.target.state_dict(),
            "memory": self.memory.state_dict(),
            "version": self.version,
            "steps": self.steps,
            **({"states": self.states.state_dict()} if self.states is not None else {}),
            **(
                {"plugins": {name: plugin.state_dict() for name, plugin in self.plugins.items()}}
                if self.plugins
                else {}
            ),
            **({"recall": self.recall.state_dict()} if self.recall.stages else {}),
            **({"diagnostics": self.diagnostics.state_dict()} if self.diagnostics else {}),
        }

    def load_state_dict(self, state: State) -> None:
        for name in ("engine", "numerics", "target"):
            getattr(self, name).load_state_dict(state[name])
        unknown = self.memory.load_state_dict(state["memory"])
        self.recall.load_state_dict(state.get("recall", {}))
        if self.diagnostics:
            self.diagnostics.load_state_dict(state.get("diagnostics", {}))
        self.version = int(state["version"])
        self.steps = int(state.get("steps", self.version))
        if unknown:
            self._fill(unknown)
        if self.states is not None:
            self.states.load_state_dict(state.get("states", {}))
        kept = state.get("plugins", {})
        for name, plugin in self.plugins.items():
            plugin.load_state_dict(kept.get(name, {}))

    def _fill(self, columns: frozenset[str]) -> None:
        """Columns that nobody needed when the rows were written: as if every row were seen now for the first time."""
        rows = self._rows(*self.memory.examples(torch.arange(len(self.memory))))
        out = self.engine.out(rows)
        steps = torch.full((len(self.memory),), self.steps)
        values = {"output": out.output, "hidden": out.hidden, "loss": self.engine.losses(out.output, rows.y)}
        for name, value in (values | {"written": steps, "last_seen": steps}).items():
            if name in columns:
                self.memory.columns[name][: len(value)] = value.numpy()


def named(plugins: Sequence[Plugin]) -> dict[str, Plugin]:
    """By kind, as it stands in states and metrics; of several of one kind the second is `kind_2`."""
    found: dict[str, Plugin] = {}
    for plugin in plugins:
        kind = re.sub(r"\W", "_", plugin.kind.rpartition(":")[2])
        count = sum(name == kind or re.fullmatch(rf"{kind}_\d+", name) is not None for name in found)
        found[f"{kind}_{count + 1}" if count else kind] = plugin
    return found


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit)) if logit > -700.0 else 0.0
