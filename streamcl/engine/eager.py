"""Predict and learn with plain autograd: any nn.Module, any optimiser, only the touched rows of the table."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from streamcl.config import Config
from streamcl.engine.optimizers import build_rule
from streamcl.features import Layout
from streamcl.models import build_model
from streamcl.protocols import State
from streamcl.random import key_of, normal_array

BLOCK = 1 << 20  # numbers drawn at once for a fresh table: bounds what its start needs besides the table

ROWS_FASTER = 2.0
"""A row is touched by few events, dense weights by all: see "Learning" in DECISIONS.md."""


class Eager:
    """The table of rows, the model, the optimiser's slots, and one step of learning.

    A row of the table holds the O first-order weights (zero at first), then the D numbers of the embedding (normal,
    `model.init_scale`), as far as the model reads them.

    Shape:
        ids (B, S) int64, weights (B, S) float32, dense (B, N) float32 standardised, y (B,) float32, share (B,)
        float32: the weight of each row's loss. `predict` takes B = 1 and returns (O,).
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        torch.set_num_threads(config.worker.threads)  # of the process: two are 10 to 40 times slower on a busy box
        self.task = config.task
        self.outputs = config.outputs
        self.fields = len(layout.fields)
        self.slot_field = torch.from_numpy(layout.slot_field)
        self.one_slot_each = len(layout.slot_field) == self.fields
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.model = build_model(config, layout)
        self.first = self.outputs if self.model.first_order else 0
        self.table = self._fresh_table(config, layout.rows)  # (R, W)
        self.params = dict(self.model.named_parameters())
        self.flat = _flatten(list(self.params.values()))  # (P,)
        rate = config.optimizer.learning_rate
        self.rule = build_rule(config.optimizer, rate)
        self.row_rule = build_rule(config.optimizer, config.optimizer.embedding_learning_rate or ROWS_FASTER * rate)
        self.slots = self.rule.slots(self.flat)
        self.row_slots = self.row_rule.slots(self.table)

    def _fresh_table(self, config: Config, rows: int) -> Tensor:
        dim = config.model.embedding_dim if self.model.embedding else 0
        table = torch.zeros(rows, self.first + dim)
        key, block = key_of(config.seed, "table"), BLOCK // max(dim, 1)
        for start in range(0, rows if dim else 0, block):
            part = table[start : start + block, self.first :]
            draw = normal_array(key, part.numel(), start * dim) * config.model.init_scale
            part.copy_(torch.from_numpy(draw).view_as(part))
        return table

    def predict(self, ids: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._forward(self.table[ids], weights, dense)[0]

    def _forward(self, rows: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        weighted = rows * weights.unsqueeze(2)  # (B, S, W)
        if not self.one_slot_each:
            pooled = weighted.new_zeros(len(rows), self.fields, rows.shape[2])
            weighted = pooled.index_add(1, self.slot_field, weighted)  # (B, F, W)
        out: Tensor = self.model(weighted[:, :, : self.first], weighted[:, :, self.first :], dense)
        return out

    def losses(self, output: Tensor, y: Tensor) -> Tensor:
        """(B,) in nats: binary and multiclass cross-entropy; half the squared error for regression."""
        if self.task == "binary":
            return functional.binary_cross_entropy_with_logits(output[:, 0], y, reduction="none")
        if self.task == "multiclass":
            return functional.cross_entropy(output, y.long(), reduction="none")
        return 0.5 * (output[:, 0] - y) ** 2

    def step(self, ids: Tensor, weights: Tensor, dense: Tensor, y: Tensor, share: Tensor) -> bool:
        """One update on sum(share * loss). Returns False, and changes nothing, when the gradient is unusable."""
        rows = self.table[ids].requires_grad_()  # (B, S, W)
        loss = self.losses(self._forward(rows, weights, dense), y).dot(share)
        by_slot, *by_param = torch.autograd.grad(loss, [rows, *self.params.values()], materialize_grads=True)
        touched, inverse = torch.unique(ids, return_inverse=True)
        row_gradient = self.table.new_zeros(len(touched), self.table.shape[1])  # (U, W): one sum for a row's every use
        row_gradient.index_add_(0, inverse.view(-1), by_slot.reshape(-1, self.table.shape[1]))
        gradient = torch.cat([g.reshape(-1) for g in by_param])  # (P,)
        norm = torch.hypot(torch.linalg.vector_norm(row_gradient), torch.linalg.vector_norm(gradient))
        if not float(norm) <= self.max_grad_norm:  # also when the norm is NaN
            return False
        with torch.no_grad():
            self._update(touched, row_gradient, gradient)
        return True

    def _update(self, touched: Tensor, row_gradient: Tensor, gradient: Tensor) -> None:
        rows, row_slots = self.row_rule.step(
            self.table[touched], row_gradient, [slot[touched] for slot in self.row_slots]
        )
        for column, new in zip((self.table, *self.row_slots), (rows, *row_slots), strict=True):
            column.index_copy_(0, touched, new)
        flat, slots = self.rule.step(self.flat, gradient, self.slots)
        for column, new in zip((self.flat, *self.slots), (flat, *slots), strict=True):
            column.copy_(new)

    def state_dict(self) -> State:
        return {
            "table": self.table.clone(),
            "row_slots": {str(i): s.clone() for i, s in enumerate(self.row_slots)},
            "params": {name: p.detach().clone() for name, p in self.params.items()},
            "slots": {str(i): s.clone() for i, s in enumerate(self.slots)},
        }

    def load_state_dict(self, state: State) -> None:
        # Copied into the tensors that exist: their alignment, on which kernels may depend, stays what it was.
        with torch.no_grad():
            self.table.copy_(state["table"])
            for name, param in self.params.items():
                param.copy_(state["params"][name])
        for own, slots in ((self.row_slots, state["row_slots"]), (self.slots, state["slots"])):
            for i, slot in enumerate(own):
                slot.copy_(slots[str(i)])


def _flatten(params: list[torch.nn.Parameter]) -> Tensor:
    """Lay parameters end to end and make each a view of its part, so that an optimiser does one update, not many."""
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    for param, part in zip(params, torch.split(flat, [param.numel() for param in params]), strict=True):
        param.data = part.view_as(param)
    return flat


def as_tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """Zero-copy views of NumPy arrays with a batch axis in front."""
    return tuple(torch.from_numpy(a).unsqueeze(0) for a in arrays)
