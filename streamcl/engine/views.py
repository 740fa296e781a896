"""What a learner holds, as the compiled loop takes it: views wherever the loop is to change it, see `layout`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamcl.engine import layout, table_rows
from streamcl.engine.dense import Dense
from streamcl.engine.kernels import KINDS
from streamcl.engine.weights import Average
from streamcl.features import RunningNorm
from streamcl.memory.replay import Replay
from streamcl.models import FM, DCNv2, DeepFM, Logistic
from streamcl.models.tower import MLP
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.plasticity.diagnostics import Diagnostics

if TYPE_CHECKING:
    from streamcl.config import Config
    from streamcl.engine.eager import Eager
    from streamcl.learner import Learner

TASKS = {"binary": layout.BINARY, "multiclass": layout.MULTICLASS, "regression": layout.REGRESSION}
NO_ROWS = np.zeros(0, np.int64)
POWERS = 4096
SETS = {"live": 0, "ema": 1}

Arrays = NDArray[Any]


def plan_of(config: Config, learner: Learner) -> layout.Plan:
    """What a step is."""
    engine, model = learner.engine, learner.engine.model
    dense, dtype = engine.dense, engine.dense.flat.numpy().dtype
    rate = config.optimizer.learning_rate
    rates = [[r, config.optimizer.l1, config.optimizer.l2] for r in (rate, engine.row_rate)]
    linear = model if isinstance(model, Logistic) else getattr(model, "linear", None)
    paired = isinstance(model, FM | DeepFM)
    projected = isinstance(model, FM | DeepFM) and model.pairs is not None
    at = {name: span.start for name, span in dense.spans.items()}
    layers = _layers(model.tower, "" if isinstance(model, MLP) else "deep.", dense)
    crosses = range(len(model.cross)) if isinstance(model, DCNv2) else ()
    memory = learner.memory
    return layout.Plan(
        task=TASKS[config.task],
        optimizer=KINDS[config.optimizer.kind],
        outputs=config.outputs,
        first=engine.first,
        fields=engine.fields,
        dim=engine.dim if model.embedding else 0,
        linear=-1 if linear is None else at["weight" if linear is model else "linear.weight"],
        pairs=layout.NO_PAIRS if not paired else layout.PROJECTED if projected else layout.SUMMED,
        projection=at["pairs.weight"] if projected else 0,
        crosses=np.array([[at[f"cross.{i}.{part}"] for part in ("weight", "bias")] for i in crosses], np.int64).reshape(
            -1, 2
        ),
        layers=np.array(layers, np.int64).reshape(-1, 4),
        slot_field=engine.slot_field.numpy(),
        key=np.uint64(memory.key),
        draw=learner.per_event if memory.capacity else 0,
        share=learner.replay_weight / max(learner.per_event, 1),
        label_scaled=np.ones(1, np.bool_),
        alpha=engine.alpha,
        delayed={"fnw": layout.FNW, "fnc": layout.FNC}.get(config.loss.kind, layout.NO_DELAY),
        shift=engine.shift,
        class_weights=np.array(config.loss.class_weights, np.float64),
        largest=float(engine.max_grad_norm),
        rates=np.array(rates[0], dtype),
        row_rates=np.array(rates[1], dtype),
    )


def net_of(engine: Eager) -> layout.Net:
    """Views of what the engine holds."""
    dense, table = engine.dense, engine.table.numpy()
    flat = dense.flat.numpy()
    slots = [[slot.numpy().reshape(-1) for slot in each] for each in (dense.slots, engine.row_slots)]
    rows, tables = table.reshape(-1), engine.tables.of if engine.tables else table_rows.none(flat.dtype)
    return layout.Net(flat, _three(slots[0], flat[:0]), table, rows, _three(slots[1], flat[:0]), tables)


def _layers(tower: MLP | None, prefix: str, dense: Dense) -> list[tuple[int, int, int, int]]:
    """Inputs, units, and where weights and bias begin, of each layer."""
    if tower is None:
        return []
    names = [*(f"{prefix}hidden.{i}" for i in range(len(tower.hidden))), f"{prefix}head"]
    shapes = [dense.params[f"{name}.weight"].shape for name in names]
    starts = [[dense.spans[f"{name}.{part}"].start for part in ("weight", "bias")] for name in names]
    return [(shape[1], shape[0], w, b) for shape, (w, b) in zip(shapes, starts, strict=True)]


def _three(slots: Sequence[Arrays], like: Arrays) -> tuple[Arrays, Arrays, Arrays]:
    """Slots; for those that the optimiser hasn't `like`, from which nothing is read."""
    a, b, c = (*slots, like, like, like)[:3]
    return a, b, c


def _copied(norm: RunningNorm) -> tuple[Arrays, Arrays, Arrays]:
    return norm.count.copy(), norm.mean.copy(), norm.m2.copy()


def powers_of(rule: ContinualBackprop | None) -> Arrays:
    """decay ** age of the first ages: a power takes as long as ten other operations."""
    wanted = rule is not None and rule.utility in ("mean_corrected", "adaptable")
    return np.asarray((rule.decay if rule else 0.0) ** np.arange(POWERS if wanted else 0, dtype=np.float64))


def scratch_of(plan: layout.Plan, rows: int, numbers: int, net: layout.Net) -> layout.Scratch:
    """For steps of at most so many rows."""
    dtype, slots = net.flat.dtype, len(plan.slot_field)
    entering, units = plan.fields * plan.dim + numbers, plan.layers[:-1, 1].sum()
    widest = max(entering, *plan.layers[:, :2].ravel().tolist(), 1)
    buckets = 1 << (2 * rows * max(slots, 1)).bit_length()

    def zeros(*shape: int) -> Arrays:
        return np.zeros(shape, dtype)

    return layout.Scratch(
        x=zeros(rows, entering),
        dx=zeros(rows, entering),
        crossed=zeros(len(plan.crosses), rows, entering),
        factors=zeros(len(plan.crosses), rows, entering),
        turned=zeros(len(plan.crosses), rows, entering),
        own=zeros(entering),
        back=zeros(rows if len(plan.crosses) else 0, entering),
        acts=zeros(rows * units),
        deltas=zeros(rows * units),
        z=zeros(rows, plan.outputs),
        dz=zeros(rows, plan.outputs),
        total=zeros(rows, plan.dim),
        pull=zeros(rows, plan.dim),
        products=zeros(rows, plan.dim),
        y=zeros(rows),
        share=np.zeros(rows),
        numbers=zeros(rows, numbers),
        place=np.zeros((rows, slots), np.int64),
        ids=np.zeros((rows, slots), np.int64),
        weights=np.zeros((rows, slots), np.float32),
        touched=np.zeros(rows * slots, np.int64),
        row_grads=zeros(rows * slots, net.table.shape[1]),
        grads=zeros(len(net.flat)),
        g=zeros(widest),
        mix=np.zeros(max(widest, rows + 3), np.int64),
        buckets=np.zeros((2, buckets), np.int64),
        stamps=np.zeros(buckets, np.int64),
        stamp=np.zeros(1, np.int64),
        keep=np.zeros((3, numbers + 1)),
        said=zeros(plan.outputs),
    )


def norms_of(learner: Learner) -> layout.Norms:
    """Copies: a label that can't be learned leaves no trace."""
    numerics, target = learner.numerics, learner.target
    width = len(numerics.count)
    scaled = np.ones(width, np.bool_) if numerics.scaled is None else numerics.scaled
    clip = np.broadcast_to(np.asarray(numerics.clip, np.float64), (width,)).copy()
    return layout.Norms(*_copied(numerics), clip, scaled, *_copied(target))


def rows_of(memory: Replay) -> layout.Rows:
    return layout.Rows(memory.ids, memory.weights, memory.dense, memory.y, memory.sample_weights)


def renewal_of(rule: ContinualBackprop | None, plan: layout.Plan, powers: Arrays) -> layout.Renewal:
    if rule is None or not any(rule.rates):
        whole, real = np.zeros(0, np.int64), np.zeros(0)
        none = np.zeros(0, plan.rates.dtype)
        return layout.Renewal(False, False, 0.0, 0, whole, real, whole, whole, whole, none, none, whole, real)
    levels = len(plan.layers) - 1
    starts, rates = np.full(levels, -1, np.int64), np.zeros(levels)
    replaced, eligible = np.zeros(levels, np.int64), np.zeros(levels, np.int64)
    for i, (place, span) in enumerate(zip(rule.taps.places, rule.spans, strict=True)):
        starts[place], rates[place] = span.start, rule.rates[i]
        replaced[place], eligible[place] = rule.replaced[i] - rule.replaced_before[i], rule.eligible_steps[i]
    return layout.Renewal(
        on=True,
        corrected=rule.utility in ("mean_corrected", "adaptable"),
        decay=rule.decay,
        maturity=rule.maturity,
        starts=starts,
        rates=rates,
        replaced=replaced,
        eligible=eligible,
        step=np.array([rule.step], np.int64),
        mean_use=rule.mean_use.numpy(),
        mean=rule.mean.numpy(),
        born=rule.born.numpy(),
        powers=powers,
    )


def average_of(average: Average | None, net: layout.Net) -> layout.Average:
    if average is None:
        return layout.Average(False, 0.0, np.zeros(1, np.int64), net.flat[:0], net.table[:0], NO_ROWS)
    flat, table, at = average.flat.numpy(), average.table.numpy(), average.at.numpy()
    return layout.Average(True, average.decay, np.array([average.step], np.int64), flat, table, at)


def serving_of(served: Any) -> layout.Serving:
    """Of the plug-in `served`, if there is one."""
    if served is None:
        return layout.Serving(NO_ROWS, np.zeros(0), 0.0)
    options = served.options
    sets = np.array([SETS[name] for name in options.sets], np.int64)
    return layout.Serving(sets, served.losses.copy(), 0.5 ** (1.0 / options.half_life_events))


def watch_of(diagnostics: Diagnostics | None, plan: layout.Plan) -> layout.Watch:
    if diagnostics is None:
        return layout.Watch(0, 1, np.zeros(2, np.int64), np.zeros((0, 0), plan.rates.dtype))
    steps = np.array([diagnostics.steps, diagnostics.sampled], np.int64)
    return layout.Watch(diagnostics.sample_every, diagnostics.report_every, steps, diagnostics.ring.numpy())
