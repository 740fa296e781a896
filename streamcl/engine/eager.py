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


class Eager:
    """The table of rows, the model, the optimiser's slots, and one step of learning.

    A row of the table holds the O first-order weights (zero at first), then the D numbers of the embedding (normal,
    `model.init_scale`), as far as the model reads them.

    Shape:
        ids (B, S) int64, weights (B, S) float32, dense (B, N) float32 standardised, y (B,) float32, share (B,)
        float32: the weight of each row's loss. `predict` takes B = 1 and returns (O,).
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self.task = config.task
        self.outputs = config.outputs
        self.fields = len(layout.fields)
        self.slot_field = torch.from_numpy(layout.slot_field)
        self.one_slot_each = len(layout.slot_field) == self.fields
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.model = build_model(config, layout)
        self.table = self._fresh_table(config, layout.rows)  # (R, W)
        self.params = dict(self.model.named_parameters())
        rate = config.optimizer.learning_rate
        self.rule = build_rule(config.optimizer, rate)
        self.row_rule = build_rule(config.optimizer, config.optimizer.embedding_learning_rate or rate)
        self.slots = {name: self.rule.slots(param.detach()) for name, param in self.params.items()}
        self.row_slots = self.row_rule.slots(self.table)

    def _fresh_table(self, config: Config, rows: int) -> Tensor:
        first = self.outputs if self.model.first_order else 0
        dim = config.model.embedding_dim if self.model.embedding else 0
        table = torch.zeros(rows, first + dim)
        draw = normal_array(key_of(config.seed, "table"), rows * dim) * config.model.init_scale
        table[:, first:] = torch.from_numpy(draw).view(rows, dim)
        return table

    def predict(self, ids: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._forward(self.table[ids], weights, dense)[0]

    def _forward(self, rows: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        weighted = rows * weights.unsqueeze(2)  # (B, S, W)
        if not self.one_slot_each:
            pooled = weighted.new_zeros(len(rows), self.fields, rows.shape[2])
            weighted = pooled.index_add(1, self.slot_field, weighted)  # (B, F, W)
        first = self.outputs if self.model.first_order else 0
        out: Tensor = self.model(weighted[:, :, :first], weighted[:, :, first:], dense)
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
        touched, inverse = torch.unique(ids, return_inverse=True)
        rows = self.table[touched].requires_grad_()  # (U, W): a row that stands twice gets one summed gradient
        params = list(self.params.values())
        loss = (self.losses(self._forward(rows[inverse], weights, dense), y) * share).sum()
        gradients = torch.autograd.grad(loss, [rows, *params], allow_unused=True)
        used = [g for g in gradients if g is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in used])))
        if not norm <= self.max_grad_norm:  # also when the norm is NaN
            return False
        with torch.no_grad():
            self._update(touched, rows, gradients[0], gradients[1:])
        return True

    def _update(
        self, touched: Tensor, rows: Tensor, row_gradient: Tensor | None, gradients: tuple[Tensor | None, ...]
    ) -> None:
        if row_gradient is not None and row_gradient.numel():
            value, slots = self.row_rule.step(rows, row_gradient, [s[touched] for s in self.row_slots])
            self.table.index_copy_(0, touched, value)
            for slot, new in zip(self.row_slots, slots, strict=True):
                slot.index_copy_(0, touched, new)
        for (name, param), gradient in zip(self.params.items(), gradients, strict=True):
            if gradient is None or not gradient.numel():
                continue
            value, slots = self.rule.step(param, gradient, self.slots[name])
            param.copy_(value)
            for slot, new in zip(self.slots[name], slots, strict=True):
                slot.copy_(new)

    def state_dict(self) -> State:
        return {
            "table": self.table.clone(),
            "row_slots": {str(i): s.clone() for i, s in enumerate(self.row_slots)},
            "params": {name: p.detach().clone() for name, p in self.params.items()},
            "slots": {name: {str(i): s.clone() for i, s in enumerate(slots)} for name, slots in self.slots.items()},
        }

    def load_state_dict(self, state: State) -> None:
        # Copied into the tensors that exist: their alignment, on which kernels may depend, stays what it was.
        with torch.no_grad():
            self.table.copy_(state["table"])
            for i, slot in enumerate(self.row_slots):
                slot.copy_(state["row_slots"][str(i)])
            for name, param in self.params.items():
                param.copy_(state["params"][name])
                for i, slot in enumerate(self.slots[name]):
                    slot.copy_(state["slots"][name][str(i)])


def as_tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """Zero-copy views of NumPy arrays with a batch axis in front."""
    return tuple(torch.from_numpy(a).unsqueeze(0) for a in arrays)
