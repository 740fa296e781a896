"""Predict and learn with plain autograd: any nn.Module, any optimiser, only the touched rows of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from threading import get_ident
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from streamcl.config import Config
from streamcl.engine.delayed import Delayed
from streamcl.engine.dense import Dense
from streamcl.engine.device import CPU, device_of
from streamcl.engine.field_rows import FieldRows, said
from streamcl.engine.optimizers import Slots, build_update
from streamcl.engine.reloop import self_corrected
from streamcl.engine.tables import DynamicTables
from streamcl.engine.weights import WeightSet
from streamcl.features import Layout
from streamcl.models import build_model
from streamcl.models.key_state import KeyStateModel
from streamcl.plasticity import build_rules, of_towers
from streamcl.plasticity.layers import unheard
from streamcl.plugin import Grads, Out, Plugin, PluginError, Rows, Rule, Shape, Step, Term
from streamcl.protocols import State
from streamcl.random import key_of, normal_array
from streamcl.records import Outcome
from streamcl.state import cut

BLOCK = 1 << 20  # numbers drawn at once for a fresh table: bounds what its start needs besides the table

Plugins = Mapping[str, Plugin]
NO_PLUGINS: Plugins = MappingProxyType({})

ROWS_FASTER = 2.0
"""A row is touched by few events, dense weights by all: see "Learning" in DECISIONS.md."""


class Eager:
    """The table of rows, the model, the optimiser's slots, and one step of learning.

    A row of the table holds the O first-order weights (zero at first), then the D numbers of the embedding (normal,
    `model.init_scale`), as far as the model reads them.

    Args:
        serving: There will be no step: no rule of plasticity is there.
        plugins: Whose terms and rules take part; bound by whoever made them.

    Attributes:
        device: Where all of it lies (`worker.device`). A step is sent there, and asks it one thing: whether the
            gradient is one to learn from.

    Shape:
        ids (B, S) int64, weights (B, S) float32, dense (B, N) float32 standardised, y (B,) float32, share (B,)
        float32: the weight of each row's loss.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        serving: bool = False,
        plugins: Plugins = NO_PLUGINS,
    ) -> None:
        torch.set_num_threads(config.worker.threads)  # of the process: two are 10 to 40 times slower on a busy box
        self.device = device_of(config, serving, tuple(plugins.values()))
        self.task = config.task
        self.outputs, self.heads = config.outputs, config.heads
        self.task_weights = torch.tensor([each.weight for _, each in sorted(config.tasks.items())], device=self.device)
        self.fields = len(layout.fields)
        self.slot_field = torch.from_numpy(layout.slot_field).to(self.device)
        self.numbers = len(layout.numerics)
        self.one_slot_each = len(layout.slot_field) == self.fields
        self.alpha = config.loss.alpha if config.loss.kind == "reloop" else 0.0
        self.delayed = Delayed(config) if config.loss.kind in ("fnw", "fnc", "dfm", "es_dfm") else None
        self.shift = -math.log(config.sample.negatives)  # of the logit, among the negatives that stay
        weights = config.loss.class_weights
        self.class_weights = torch.tensor(weights, device=self.device) if weights else None  # (C,)
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.dtype = torch.float64 if config.model.dtype == "float64" else torch.float32
        self.model = build_model(config, layout).to(self.device, self.dtype)
        self.dim = self.model.dim
        self._hidden: dict[int, Tensor] = {}  # by thread: a replica predicts for requests and for its memory
        if self.model.tower is not None:
            self.model.tower.head.register_forward_pre_hook(self._note_hidden)
        self.own = self._modules_of(plugins)
        self.first = self.heads if self.model.first_order else 0
        self.table = self._fresh_table(config, layout.rows)  # (R, W)
        rate = config.optimizer.learning_rate
        self.dense = Dense(self.model, build_update(config.optimizer, rate))
        self.row_rate = config.optimizer.embedding_learning_rate or ROWS_FASTER * rate
        self.row_update = build_update(config.optimizer, self.row_rate)
        self.by_field: FieldRows | None = None
        if said(config):
            self.by_field = FieldRows(config, layout, self.table, self.first, self.row_rate)
            self.by_field.narrow(self.table)
        self.row_slots = self.fresh_slots(self.table)
        self.tables = self._dynamic(config, layout) if layout.dynamic else None
        self.layers = of_towers(self.model, self.model.towers)
        self.rules: dict[str, Rule] = {} if serving else build_rules(config, self.dense, self.model, self.layers)
        # Continual backpropagation and its like come last, so that nothing is done to units made anew.
        self.around = [plugin for plugin in plugins.values() if isinstance(plugin, Rule)] + list(self.rules.values())
        self.terms = [plugin for plugin in plugins.values() if isinstance(plugin, Term) and plugin.options.weight]
        self.asked = bool(self.terms) or any(isinstance(each, Rule) for each in plugins.values())  # for outputs
        self.task_weight = 0.0 if any(term.replaces_task for term in self.terms) else 1.0
        self.sets: dict[str, WeightSet] = {}  # other weights of this model; see `streamcl.engine.weights`
        self.gradient_norm = torch.zeros((), device=self.device)  # of the dense parameters, in the last step
        self.watch: Callable[[Tensor], None] | None = None  # told which rows steps have changed, once for each step

    def _modules_of(self, plugins: Plugins) -> dict[str, nn.Module]:
        """Modules of the plug-ins' own, by name: on the model, behind its own parameters."""
        shape = Shape(self.outputs, self.widths[1])
        made = {name: plugin.module(shape) for name, plugin in plugins.items()}
        own = {name: module for name, module in made.items() if module is not None}
        if own:
            self.model.add_module("plugins", nn.ModuleDict(own))
        return own

    def _fresh_table(self, config: Config, rows: int) -> Tensor:
        dim = self.dim if self.model.embedding else 0
        table = torch.zeros(rows, self.first + dim, dtype=self.dtype, device=self.device)
        self.draw = partial(_normal, key_of(config.seed, "table"), config.model.init_scale)
        block = BLOCK // max(dim, 1)
        for start in range(0, rows if dim else 0, block):
            part = table[start : start + block, self.first :]
            part.copy_(self.draw(part.numel(), start * dim).view_as(part))
        return table

    def _dynamic(self, config: Config, layout: Layout) -> DynamicTables:
        """Their rows are zero, and take no memory before they are used."""
        numbers = sum(column[:1].numel() for column in (self.table, *self.row_slots))
        rates = np.array([self.row_rate, config.optimizer.l1, config.optimizer.l2], self.table.numpy().dtype)
        tables = DynamicTables(config, layout, numbers * self.table.element_size(), self.first, rates)

        def with_theirs(column: Tensor) -> Tensor:
            longer = column.new_zeros(layout.rows + tables.rows, *column.shape[1:])
            longer[: layout.rows] = column
            return longer

        self.table, self.row_slots = with_theirs(self.table), tuple(map(with_theirs, self.row_slots))
        tables.attach((self.table, *self.row_slots))
        if self.by_field is not None:
            self.by_field.attach((layout.rows + tables.of.base).tolist())
            tables.keep = self.by_field.keep
        return tables

    def fresh_slots(self, table: Tensor) -> Slots:
        """Of a table (R, W) that nothing has been learned of."""
        return (self.by_field or self.row_update).slots(table)

    def fresh_rows(self, ids: Tensor) -> Tensor:
        """(n, W) what these rows held before anything was learned; those of dynamic tables were not there."""
        rows = self.table.new_zeros(len(ids), self.table.shape[1])
        dim = rows.shape[1] - self.first
        for row, id in zip(rows, ids.tolist() if dim else (), strict=False):
            if self.tables is None or id < self.tables.first:
                row[self.first :] = self.draw(dim, id * dim)
        return rows if self.by_field is None else rows * self.by_field.keep(ids)

    def predict(self, ids: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        """(B, O), and behind it the logits of T further tasks: (B, O + T)."""
        with torch.inference_mode():
            output = self.forward(self.table[ids], weights, dense)
        self.take_hidden(output)
        return output

    def forward(self, rows: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        """(B, O + T) of rows (B, S, W)."""
        output: Tensor = self.model(*self._given(rows, weights, dense))
        return output

    def out(self, rows: Rows, weights: str = "live") -> Out:
        """What `live` weights, or those of a weight set, make of rows; no gradient.

        Raises:
            PluginError: there is no set of this name.
        """
        states = self.model.after if isinstance(self.model, KeyStateModel) else {}
        kept = states.get(get_ident())  # what a key takes along is what the live weights made of its event
        with torch.inference_mode():
            if weights == "live":
                output = self.forward(self.table[rows.ids], rows.weights, rows.dense)
            else:
                given = self._given(self._set(weights).rows(rows.ids), rows.weights, rows.dense)
                output = functional_call(self.model, self._set(weights).params(), given)
        if kept is not None:
            states[get_ident()] = kept
        hidden = self.take_hidden(output)
        return Out(
            output[:, : self.outputs].clone(), hidden.clone()
        )  # a tensor of inference mode can't be learned from

    def _set(self, name: str) -> WeightSet:
        if name not in self.sets:
            raise PluginError(f"there are no weights {name!r}; there are {', '.join(['live', *self.sets])}")
        return self.sets[name]

    @property
    def widths(self) -> tuple[int, int]:
        """(E, H) of what `look` finds; 0 for what the model hasn't."""
        tower = self.model.tower
        entered = self.fields * self.dim + self.numbers if self.model.embedding else 0
        return entered, 0 if tower is None else tower.head.in_features

    def look(self, ids: Tensor, weights: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`predict`, and what may be a key: embeddings and numerics (B, E), and the last hidden layer (B, H)."""
        with torch.inference_mode():
            given = self._given(self.table[ids], weights, dense)
            output = self.model(*given)
            if not self.model.embedding:
                return output, output[:, :0], output[:, :0]
            entered = torch.cat((given[1].flatten(1), dense[:, : self.numbers]), 1)
            return output, entered, self.take_hidden(output)

    def inputs(self, rows: Rows, weights: str = "live") -> list[Tensor]:
        """(B, in) what enters each layer of the tower, the head last; no gradient, and none without a tower."""
        tower = self.model.tower
        heard: list[Tensor] = []
        layers = [*tower.hidden, tower.head] if tower is not None else []
        listening = [layer.register_forward_pre_hook(lambda _, given: heard.append(given[0])) for layer in layers]
        try:
            self.out(rows, weights)
        finally:
            for handle in listening:
                handle.remove()
        return [value.clone() for value in heard]

    def _note_hidden(self, _head: nn.Module, inputs: tuple[Tensor]) -> None:
        self._hidden[get_ident()] = inputs[0]

    def take_hidden(self, output: Tensor) -> Tensor:
        """(B, H) of the forward pass that has just been made; it holds the graph of a step, so it is not left there."""
        return self._hidden.pop(get_ident(), output[:, :0])

    def _given(self, rows: Tensor, weights: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
        """What the model's `forward` takes, of rows (B, S, W)."""
        slots = (rows[:, :, self.first :], weights.to(rows)) if self.model.slots else ()
        return (*self._pooled(rows, weights), dense, *slots)

    def _pooled(self, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """First-order weights (B, F, O) and embeddings (B, F, D)."""
        weighted = rows * weights.unsqueeze(2)  # (B, S, W)
        if not self.one_slot_each and self.device != CPU:  # index_add would add in another order each time
            weighted = self._pooling() @ weighted  # (B, F, W)
        elif not self.one_slot_each:
            pooled = weighted.new_zeros(len(rows), self.fields, rows.shape[2])
            weighted = pooled.index_add(1, self.slot_field, weighted)  # (B, F, W)
        return weighted[:, :, : self.first], weighted[:, :, self.first :]

    def _pooling(self) -> Tensor:
        """(F, S) 1 where a slot is of a field."""
        fields = torch.arange(self.fields, device=self.device)
        return (self.slot_field == fields.unsqueeze(1)).to(self.dtype)

    def losses(self, output: Tensor, y: Tensor, served: float | None = None, outcome: Outcome | None = None) -> Tensor:
        """(B,) in nats: binary and multiclass cross-entropy; half the squared error for regression.

        `served` is the score that the first row was answered with, `outcome` what became of it; the others (replayed)
        have none.
        """
        if self.delayed is not None:
            return self.delayed.losses(output, y, outcome)
        if self.task == "binary":
            output = output + self.shift if self.shift else output
            losses = functional.binary_cross_entropy_with_logits(output[:, 0], y, reduction="none")
            if self.alpha and served is not None:
                losses = torch.cat((self_corrected(losses[:1], output[:1, 0], y[:1], served, self.alpha), losses[1:]))
            return losses
        if self.task == "multiclass":
            return functional.cross_entropy(output, y.long(), reduction="none")
        return 0.5 * (output[:, 0] - y) ** 2

    def further(self, output: Tensor, also: Tensor) -> Tensor:
        """(B,) in nats: weighted cross-entropies of the further tasks, of output (B, O + T) and labels (B, T).

        One that is not known counts nothing, and moves nothing.
        """
        known = ~torch.isnan(also)
        y = torch.where(known, also, 0.0).to(output)
        losses = functional.binary_cross_entropy_with_logits(output[:, self.outputs :], y, reduction="none")
        return (losses * known * self.task_weights).sum(1).to(output)

    def step(self, step: Step) -> bool:
        """One update on the plan's rows.

        Returns False when the gradient is unusable, or nothing is to be learned; then no weight has moved, and unless a
        rule has made the gradient what it is, no rule has heard of it.
        """
        step.engine = self
        if self.device != CPU:
            step.send(self.device)
        loss, rows = self._loss(step)
        if not loss.requires_grad:
            return False
        grads = self._grads(loss, rows, step.rows.ids, step.touched)
        self.gradient_norm = torch.linalg.vector_norm(grads.dense)
        norm = torch.hypot(torch.linalg.vector_norm(grads.rows), self.gradient_norm)
        if not self._usable(norm):
            return False
        with torch.no_grad():
            return self._update(grads, step)

    def _usable(self, norm: Tensor) -> bool:
        """Of the gradient () of all weights; the one question of a step to its device."""
        return float(norm) <= self.max_grad_norm  # False also when the norm is NaN

    def _loss(self, step: Step) -> tuple[Tensor, Tensor]:
        """What is pulled down, and the rows (B, S, W) of the table that it was computed from."""
        read = step.rows
        rows = self.table[read.ids].requires_grad_()
        output = self.forward(rows, read.weights, read.dense)
        hidden = self.take_hidden(output)
        outcome = step.outcome if step.live is not None else None
        losses = self.losses(self._corrected(output, read), read.y, step.served, outcome)
        step.losses = losses.detach()
        share = step.share if self.class_weights is None else step.share * self.class_weights.to(losses)[read.y.long()]
        loss = losses.dot(share) if self.task_weight else losses.new_zeros(())
        loss = loss if read.also is None else loss + self.further(output, read.also).dot(step.share)
        if self.asked:
            live = 0 if step.live is None else 1
            of_first = output[:, : self.outputs]
            step.outs["live", "live"] = Out(of_first[:live], hidden[:live])
            step.outs["replay", "live"] = Out(of_first[live:], hidden[live:])
        for term in self.terms:
            loss = loss + term.options.weight * term.loss(step)
        return loss, rows

    def _corrected(self, output: Tensor, read: Rows) -> Tensor:
        """As it is learned from; see `Network.correction`."""
        correction = self.model.correction(read.dense)
        return output if correction is None else output + correction

    def _grads(self, loss: Tensor, rows: Tensor, ids: Tensor, touched: Tensor) -> Grads:
        by_slot, *by_param = torch.autograd.grad(
            loss, [rows, *self.dense.params.values()], allow_unused=True, materialize_grads=True
        )
        width = self.table.shape[1]
        gradient = self.table.new_zeros(len(touched), width)  # (U, W): one sum for a row's every use
        place, by_slot = torch.searchsorted(touched, ids.reshape(-1)), by_slot.reshape(-1, width)
        if self.device == CPU:
            gradient.index_add_(0, place, by_slot)
        else:  # which sorts, and adds in one order
            gradient.index_put_((place,), by_slot, accumulate=True)
        if self.tables is not None and len(touched) and touched[-1] == self.tables.of.void:
            touched, gradient = touched[:-1], gradient[:-1]  # what stands for no row stays zero
        if self.by_field is not None:
            gradient *= self.by_field.keep(touched)
        return Grads(self.dense.gradient(by_param), touched, gradient)

    def gradient(self, read: Rows) -> Grads:
        """Of the mean task loss of these rows; asked within a step, it leaves no trace in what is known of that."""
        with torch.enable_grad(), unheard(self.model):
            rows = self.table[read.ids].requires_grad_()
            output = self.forward(rows, read.weights, read.dense)
            self.take_hidden(output)
            losses = self.losses(self._corrected(output, read), read.y)
            losses = losses if read.also is None else losses + self.further(output, read.also)
            return self._grads(losses.mean(), rows, read.ids, torch.unique(read.ids))

    def _update(self, grads: Grads, step: Step) -> bool:
        for rule in self.around:
            rule.before(step)
        given = grads
        for rule in self.around:
            grads = rule.transform(grads, step)
        if grads is not given and not bool(torch.isfinite(grads.norm())):
            return False
        trainable = step.plan.trainable
        if trainable is None or "table" in trainable:
            self.move_rows(grads.touched, grads.rows)
        self.dense.step(grads.dense, None if trainable is None else self._mask(trainable))
        for rule in self.around:
            rule.after(step)
        if self.watch:
            self.watch(grads.touched.cpu())
        return True

    def put_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Change rows (n, W) of the table beside the optimiser, each once; whoever follows them is told."""
        for each in self.sets.values():
            each.before(ids)
        ids, rows = ids.to(self.device), rows.to(self.device)
        given = rows, [slot[ids] for slot in self.row_slots]
        slots = self.row_update.moved(*given) if self.by_field is None else self.by_field.moved(ids, *given)
        for column, new in zip((self.table, *self.row_slots), (rows, *slots), strict=True):
            column.index_copy_(0, ids, new)
        if self.watch:
            self.watch(ids.cpu())

    def move_rows(self, touched: Tensor, gradient: Tensor) -> None:
        given = self.table[touched], gradient, [slot[touched] for slot in self.row_slots]
        by_field = self.by_field
        rows, row_slots = self.row_update.step(*given) if by_field is None else by_field.step(touched, *given)
        for column, new in zip((self.table, *self.row_slots), (rows, *row_slots), strict=True):
            column.index_copy_(0, touched, new)

    def _mask(self, trainable: tuple[str, ...]) -> Tensor:
        """(P,) bool: dense parameters whose names begin so, or have a part that does."""
        moves = [any(f".{each}" in f".{name}" for each in trainable) for name in self.dense.params]
        sizes = [param.numel() for param in self.dense.params.values()]
        return torch.tensor(moves).repeat_interleave(torch.tensor(sizes))

    def state_dict(self) -> State:
        saved = cut if self.tables is None else self.tables.pack
        return {
            "table": saved(self.table),
            "row_slots": {str(i): saved(s) for i, s in enumerate(self.row_slots)},
            **({"tables": self.tables.state_dict()} if self.tables else {}),
            **self.dense.state_dict(),
            **({"delays_ripe": self.delayed.ripe} if self.delayed is not None else {}),
            **({"rules": {kind: rule.state_dict() for kind, rule in self.rules.items()}} if self.rules else {}),
        }

    def load_state_dict(self, state: State) -> None:
        if self.tables is not None:
            self.tables.load_state_dict(state["tables"])
        put = Tensor.copy_ if self.tables is None else self.tables.unpack
        put(self.table, state["table"])  # into the tensor that exists, as `Dense` does it
        for i, slot in enumerate(self.row_slots):
            put(slot, state["row_slots"][str(i)])
        self.dense.load_state_dict(state)
        if self.delayed is not None:
            self.delayed.ripe = bool(state.get("delays_ripe", False))
        kept = state.get("rules", {})
        for kind, rule in self.rules.items():
            rule.load_state_dict(kept.get(kind, {}))


def _normal(key: int, scale: float, count: int, start: int) -> Tensor:
    return torch.from_numpy(normal_array(key, count, start) * scale)


def as_tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """Zero-copy views of NumPy arrays with a batch axis in front."""
    return tuple(torch.from_numpy(a).unsqueeze(0) for a in arrays)
