"""CUDA graphs: a step of fixed shapes, captured once, and then played back for each event with one call.

The step is the eager engine's, with nothing in it that the host would have to know: rows of the table that a step
touches are as many as its slots, the first again and again where they are fewer, all with one and the same new value;
a gradient that is unusable moves nothing, neither then nor behind it. So it may be read, and tested, without a graph:
on a CPU it runs as it stands.

Not yet run on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from streamcl.engine import on_device
from streamcl.engine.ahead import Ahead
from streamcl.engine.device import CPU
from streamcl.engine.layout import LEARN
from streamcl.engine.on_device import OnDevice, Said, sent
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.plasticity.layers import Taps

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.learner import Learner

log = logging.getLogger(__name__)

WARM_UP = 3
"""Runs before a capture, on a stream of their own: libraries that are loaded first must not be in it."""


def obstacle(config: Config, plugins: Sequence[object] = ()) -> str | None:
    """What of a configuration can't be captured, by its path; None when all of it can."""
    return on_device.obstacle(config, plugins)


class _Inputs(NamedTuple):
    """Of one operation; or of all of a chunk, (K, ...) each."""

    ids: Tensor  # (B, S)
    weights: Tensor  # (B, S)
    numbers: Tensor  # (B, N)
    y: Tensor  # (B,)
    share: Tensor  # (B,)
    touched: Tensor  # (T,)
    place: Tensor  # (T,)
    distinct: Tensor  # ()


class _Outputs(NamedTuple):
    output: Tensor  # (O,)
    entered: Tensor  # (E,), or (0,) where nobody asks
    hidden: Tensor  # (U,), or (0,)
    norm: Tensor  # ()
    alive: Tensor  # () whether all steps up to here were taken


class Graph(OnDevice):
    """Plays captured steps; where a capture fails, the same steps uncaptured, and says so once."""

    name = "graph"

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        engine, k, cells = self.engine, self.most, self.rows * self.slots

        def zeros(*shape: int, dtype: torch.dtype = engine.dtype) -> Tensor:
            return torch.zeros(k, *shape, dtype=dtype, device=engine.device)

        self.given = _Inputs(
            ids=zeros(self.rows, self.slots, dtype=torch.int64),
            weights=zeros(self.rows, self.slots),
            numbers=zeros(self.rows, learner.numbers),
            y=zeros(self.rows),
            share=zeros(self.rows),
            touched=zeros(cells, dtype=torch.int64),
            place=zeros(cells, dtype=torch.int64),
            distinct=zeros(dtype=torch.int32),
        )
        self.taps = Taps(engine.model, engine.layers) if engine.layers and (self.watches or self.looks) else None
        units = sum(layer.units for layer in engine.layers) if self.taps else 0
        entered, last = engine.widths if self.looks else (0, 0)
        self.found = _Outputs(
            output=zeros(engine.outputs),
            entered=zeros(entered),
            hidden=zeros(max(units, last)),
            norm=zeros(),
            alive=zeros(dtype=torch.bool),
        )
        self.at = torch.zeros(1, dtype=torch.int64, device=engine.device)  # the operation that is next
        self.alive = torch.ones((), dtype=torch.bool, device=engine.device)
        self.captured: dict[Callable[[], None], torch.cuda.CUDAGraph] | None = None if engine.device != CPU else {}

    def advance(self, a: Ahead, count: int) -> Said:
        if self.captured is None:
            self.captured = self._capture()
        for name, column in self.given._asdict().items():
            column[:count].copy_(sent(getattr(a, name)[:count], self.engine.device))
        self.at.zero_()
        self.alive.fill_(True)
        for kind in a.kind[:count].tolist():
            work = self._learn if kind == LEARN else self._answer
            graph = self.captured.get(work)
            if graph is None:
                work()
            else:
                graph.replay()
        output, entered, hidden, norm, alive = (
            each[:count].cpu().numpy() for each in self.found
        )  # the first one waits
        return Said(output, entered, hidden, norm, int(alive.sum()))

    def _capture(self) -> dict[Callable[[], None], torch.cuda.CUDAGraph]:
        """Graphs of both kinds of operations; none where it can't be had. Nothing is learned in it."""
        found: dict[Callable[[], None], torch.cuda.CUDAGraph] = {}
        self.alive.fill_(False)
        try:
            for work in (self._answer, self._learn):
                beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    for _ in range(WARM_UP):
                        self.at.zero_()
                        work()
                torch.cuda.current_stream().wait_stream(beside)
                found[work] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(found[work]):
                    work()
        except RuntimeError as error:
            log.warning("steps are not captured as CUDA graphs, but launched one by one: %s", str(error).split("\n")[0])
            return {}
        return found

    def _next(self) -> _Inputs:
        return _Inputs(*(column.index_select(0, self.at)[0] for column in self.given))

    def _put(self, **values: Tensor) -> None:
        """What has come of this operation; go on to the next."""
        for name, value in {**values, "alive": self.alive}.items():
            getattr(self.found, name).index_copy_(0, self.at, value.unsqueeze(0))
        self.at.add_(1)

    def _answer(self) -> None:
        """What is said of the first row."""
        given, row = self._next(), slice(0, 1)
        with torch.no_grad():
            output, *looked = self.engine.look(given.ids[row], given.weights[row], given.numbers[row])
            found = {"output": output[0].clone()}
            if self.looks:
                hidden = torch.zeros_like(self.found.hidden[0])
                hidden[len(hidden) - looked[1].shape[1] :] = looked[1][0]
                found |= {"entered": looked[0][0].clone(), "hidden": hidden}
            self._put(**found)

    def _learn(self) -> None:
        """A step on all rows."""
        engine, given = self.engine, self._next()
        rows = engine.table[given.ids].requires_grad_()
        with torch.enable_grad():
            output = engine.forward(rows, given.weights, given.numbers)
            engine.take_hidden(output)
            losses, share = engine.losses(output, given.y), given.share
            if engine.class_weights is not None:
                share = share * engine.class_weights.to(share)[given.y.long()]
            by_slot, *by_param = torch.autograd.grad(
                losses.dot(share), [rows, *engine.dense.params.values()], allow_unused=True, materialize_grads=True
            )
        with torch.no_grad():
            self._move(given, engine.dense.gradient(by_param), by_slot.reshape(-1, engine.table.shape[1]))

    def _move(self, given: _Inputs, dense: Tensor, by_slot: Tensor) -> None:
        """Update by gradients (P,) and (T, W)."""
        engine = self.engine
        gradient = torch.zeros_like(by_slot)
        gradient.index_put_((given.place,), by_slot, accumulate=True)  # those behind the distinct ones stay zero
        norm = torch.linalg.vector_norm(dense)
        whole = torch.hypot(torch.linalg.vector_norm(gradient), norm)
        self.alive.logical_and_(whole <= engine.max_grad_norm)  # False also when the norm is NaN
        again = torch.arange(len(gradient), device=engine.device) >= given.distinct
        gradient = torch.where(again.unsqueeze(1), gradient[:1], gradient)
        held = engine.table[given.touched], gradient, [slot[given.touched] for slot in engine.row_slots]
        rows, slots = engine.row_update.step(*held)
        for column, new in zip((engine.table, *engine.row_slots), (rows, *slots), strict=True):
            column.index_copy_(0, given.touched, torch.where(self.alive, new, column[given.touched]))
        flat, slots = engine.dense.update.step(engine.dense.flat, dense, engine.dense.slots)
        for column, new in zip((engine.dense.flat, *engine.dense.slots), (flat, *slots), strict=True):
            column.copy_(torch.where(self.alive, new, column))
        if self.renewal_rule is not None and any(self.renewal_rule.rates):
            self._average(self.renewal_rule)
        said = {"hidden": torch.cat([value[0] for value in self.taps.vectors()])} if self.taps else {}
        self._put(norm=norm, **said)

    def _average(self, rule: ContinualBackprop) -> None:
        """The running means of continual backpropagation, as it moves them itself."""
        h = torch.cat(rule.taps.vectors(), 1)  # (B, U)
        for mean, value in ((rule.mean, h.mean(0)), (rule.mean_use, h.abs().mean(0))):
            mean.copy_(torch.where(self.alive, mean.lerp(value, 1.0 - rule.decay), mean))
