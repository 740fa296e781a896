"""The fused engine of a GPU: one Triton program walks a chunk in the order of the stream; see `triton_kernel`.

What it covers is what `obstacle` does not name: binary labels, an MLP or a DeepFM of one or two hidden layers whose
weights fit on one multiprocessor, plain SGD, Adagrad or FTRL, replay, continual backpropagation, an error memory.

Run in Triton's interpreter and compiled for compute capability 9.0; not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamcl.engine import on_device
from streamcl.engine.ahead import Ahead
from streamcl.engine.kernels import KINDS
from streamcl.engine.on_device import OnDevice, Said, sent
from streamcl.models import DeepFM

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

LARGEST = 1 << 16
"""Most weights of a layer, padded to powers of two: 256 KiB in float32, which is what a multiprocessor has registers
for."""
TILE = 32
"""Rows of the table that move at once."""


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration has no form here, by its path; None when all of it has."""
    if because := on_device.obstacle(config, plugins):
        return because
    model = config.model
    if config.task != "binary":
        return f"task: {config.task}"
    if model.kind not in ("mlp", "deepfm"):
        return f"model.kind: {model.kind}"
    if model.layer_norm:
        return "model.layer_norm"
    if len(model.hidden) not in (1, 2):
        return f"model.hidden: {len(model.hidden)} layers"
    if config.optimizer.kind == "adam":
        return "optimizer.kind: adam"
    if config.loss.class_weights:
        return "loss.class_weights"
    if importlib.util.find_spec("triton") is None:
        return "worker.engine: fused on a GPU, as Triton is not installed"
    return None


def padded(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


class TritonScan(OnDevice):
    """Hands a chunk to the program, and reads what came of it.

    Raises:
        ValueError: the layers are too large for one multiprocessor.
    """

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        from streamcl.engine import triton_kernel  # a CPU's installation of torch brings no Triton

        self.kernel: Any = triton_kernel.scan
        engine, model = self.engine, self.engine.model
        deep = isinstance(model, DeepFM)
        start = {name: span.start for name, span in engine.dense.spans.items()}
        prefix = "deep." if deep else ""
        hidden = config.model.hidden
        entering = engine.fields * engine.dim + learner.numbers
        first, second = hidden[0], hidden[1] if len(hidden) > 1 else 0
        largest = max(padded(entering) * padded(first), padded(first) * padded(second))
        if largest > LARGEST:
            raise ValueError(f"model.hidden: a layer of {largest:,} weights, padded, is more than {LARGEST:,}")
        fields = engine.slot_field.cpu().numpy()
        begins, many = np.unique(fields, return_index=True)[1], np.bincount(fields, minlength=engine.fields)
        self.fixed = [sent(each.astype(np.int64), engine.device) for each in (fields, begins, many)]
        rule = self.renewal_rule if self.renewal_rule is not None and any(self.renewal_rule.rates) else None
        spans = dict(zip(rule.taps.places, rule.spans, strict=True)) if rule is not None else {}
        self.means = (rule.mean, rule.mean_use) if rule is not None else (engine.dense.flat,) * 2
        rates = config.optimizer.learning_rate, config.optimizer.l1, config.optimizer.l2, engine.row_rate
        decay = rule.decay if rule is not None else 0.0
        numbers = [*rates, engine.max_grad_norm, 1.0 - decay, engine.shift]
        self.settings = torch.tensor(numbers, dtype=engine.dtype, device=engine.device)
        cells = engine.fields * engine.dim
        self.scratch = [engine.table.new_zeros(self.rows, max(n, 1)) for n in (cells, cells if deep else 0, 1)]
        self.units, self.entering = first + second, entering
        head = [start[f"{prefix}head.{part}"] for part in ("weight", "bias")]
        layers = [start[f"{prefix}hidden.{i}.{p}"] for i in range(len(hidden)) for p in ("weight", "bias")]
        linear = [start["linear.weight"], start["linear.bias"]] if deep else [0, 0]
        names = ("AT_W1", "AT_B1", "AT_W2", "AT_B2", "AT_W3", "AT_B3", "AT_LW", "AT_LB")
        places = zip(names, [*layers, *[0] * (4 - len(layers)), *head, *linear], strict=True)
        self.shape: dict[str, int | bool] = dict(
            **dict(places),
            B=self.rows,
            S=self.slots,
            F=engine.fields,
            D=max(engine.dim, 1),
            N=learner.numbers,
            W=engine.table.shape[1],
            BAG=int(many.max(initial=1)),
            H1=first,
            H2=second,
            SP=padded(self.slots),
            FP=padded(engine.fields),
            DP=padded(engine.dim),
            NP=padded(learner.numbers),
            EP=padded(entering),
            WP=padded(engine.table.shape[1]),
            TP=min(padded(self.rows * self.slots), TILE),
            H1P=padded(first),
            H2P=padded(second),
            HP=padded(second or first),
            FIRST=engine.first,
            PAIRS=deep,
            OPTIMIZER=KINDS[config.optimizer.kind],
            LOOKS=self.looks,
            WATCHES=self.watches,
            **{f"RENEW{i + 1}": spans[i].start if i in spans else -1 for i in range(2)},
        )
        self.warps = 16 if largest > 8192 else 8 if largest > 1024 else 4

    def arguments(self, a: Ahead, count: int) -> list[Tensor | int]:
        """What the program is given, what it fills at the end."""
        engine, flat = self.engine, self.engine.dense.flat
        names = "kind", "ids", "weights", "numbers", "y", "share", "touched", "distinct", "order", "starts"
        columns = [sent(getattr(a, name)[:count], engine.device) for name in names]
        columns[names.index("share")] = columns[names.index("share")].to(flat)
        dense, rows = (
            [table, *slots, table, table][:3]
            for table, slots in ((flat, engine.dense.slots), (engine.table, engine.row_slots))
        )
        hidden = self.units if self.looks or self.watches else 0
        found = [flat.new_zeros(count, n) for n in (1, self.entering * self.looks, hidden)]
        found.append(flat.new_zeros(count))
        done = torch.zeros(1, dtype=torch.int32, device=engine.device)
        return [count, *columns, *self.fixed, *dense, *rows, self.settings, *self.scratch, *self.means, *found, done]

    def advance(self, a: Ahead, count: int) -> Said:
        given = self.arguments(a, count)
        self.kernel[(1,)](*given, **self.shape, num_warps=self.warps, maxnreg=min(65_536 // (32 * self.warps), 255))
        output, entered, hidden, norm, done = (each.cpu().numpy() for each in given[-5:])  # type: ignore[union-attr]
        return Said(output, entered, hidden, norm, int(done[0]))
