import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from streamcl.config import Config
from streamcl.engine.eager import ROWS_FASTER, Eager
from streamcl.engine.optimizers import Adagrad
from streamcl.features import Featurizer
from streamcl.state import digest
from tests.steps import take

RATE, ROW_RATE = 0.05, 0.02
RULES = ["sgd", "adagrad", "adam", "ftrl"]
TASKS = ["binary", "multiclass", "regression"]
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def config(kind: str = "deepfm", task: str = "binary", rule: str = "sgd", buckets: int = 6, **optimizer: Any) -> Config:
    return Config.parse(
        {
            "name": "t",
            "task": task,
            "events": {"url": "memory://a/b", "label": "y"},
            "features": {
                "a": {"kind": "categorical", "buckets": buckets},
                "b": {"kind": "bag", "buckets": 4, "max_items": 3},
                "n": "numeric",
            },
            "model": {"kind": kind, "embedding_dim": 3, "hidden": [4], "classes": 3, "init_scale": 0.5},
            "optimizer": {"kind": rule, "learning_rate": RATE, "embedding_learning_rate": ROW_RATE, **optimizer},
        }
    )


def engine(*args: Any, **kwargs: Any) -> Eager:
    made = config(*args, **kwargs)
    return Eager(made, Featurizer(made).layout)


def batch(task: str, step: int, rows: int = 3) -> Batch:
    """Few rows and several examples, so that ids stand twice within an example and across examples."""
    g = torch.Generator().manual_seed(step)
    a = torch.randint(0, 7, (rows, 1), generator=g)
    b = 7 + torch.randint(0, 5, (rows, 3), generator=g)
    weights = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]).repeat(rows, 1)
    y = torch.randint(0, 3 if task == "multiclass" else 2, (rows,), generator=g).float()
    share = torch.tensor([1.0, *[0.5 / max(rows - 1, 1)] * (rows - 1)])
    return torch.cat((a, b), 1), weights, torch.randn(rows, 1, generator=g), y, share


class Slow:
    """The same step by one dense table, plain autograd and torch.optim over all of it."""

    def __init__(self, made: Eager, task: str, rule: str) -> None:
        self.model, self.task, self.first = made.model, task, made.first
        self.table = made.table.clone().requires_grad_()
        self.params = {n: p.detach().clone().requires_grad_() for n, p in made.model.named_parameters()}
        kinds: dict[str, Any] = {
            "sgd": lambda groups: torch.optim.SGD(groups),
            "adagrad": lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=Adagrad.INITIAL, eps=0.0),
            "adam": lambda groups: torch.optim.Adam(groups),
        }
        groups = [{"params": [self.table], "lr": ROW_RATE}, {"params": list(self.params.values()), "lr": RATE}]
        self.optimizer = kinds[rule](groups)

    def loss(self, ids: Tensor, weights: Tensor, dense: Tensor, y: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros(())
        for row in range(len(ids)):
            a, *bag = (self.table[i] * w for i, w in zip(ids[row], weights[row], strict=True))
            fields = torch.stack((a, sum(bag, torch.zeros_like(a))))[None]
            args = (fields[:, :, : self.first], fields[:, :, self.first :], dense[row : row + 1])
            out = torch.func.functional_call(self.model, self.params, args)
            total = total + share[row] * self._one(out[0], y[row])
        return total

    def _one(self, out: Tensor, y: Tensor) -> Tensor:
        if self.task == "binary":
            p = torch.sigmoid(out[0])
            return -(y * p.log() + (1 - y) * (1 - p).log())
        if self.task == "multiclass":
            return -functional.log_softmax(out, 0)[int(y)]
        return 0.5 * (out[0] - y) ** 2

    def step(self, *args: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(self.loss(*args))
        self.optimizer.step()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["logistic", "fm", "mlp", "deepfm", "dcnv2"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
def test_steps_are_those_of_torch_on_a_dense_table(rule: str, kind: str, task: str) -> None:
    made = engine(kind, task, rule)
    slow = Slow(made, task, rule)
    for step in range(12):
        assert take(made, *batch(task, step))
        slow.step(*batch(task, step))
    torch.testing.assert_close(made.table, slow.table.detach(), rtol=1e-4, atol=1e-5)
    for name, param in made.dense.params.items():
        torch.testing.assert_close(param.detach(), slow.params[name].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_class_counts_as_much_as_its_weight_says(task: str) -> None:
    weights = torch.tensor([0.5, 3.0, 2.0][: 2 if task == "binary" else 3])
    made = config("mlp", task)
    loss = made.loss.model_copy(update={"class_weights": tuple(weights.tolist())})
    weighted, plain = (Eager(each, Featurizer(made).layout) for each in (made.model_copy(update={"loss": loss}), made))
    for step in range(6):
        ids, slots, dense, y, share = batch(task, step)
        assert take(weighted, ids, slots, dense, y, share)
        assert take(plain, ids, slots, dense, y, share * weights[y.long()])
    torch.testing.assert_close(weighted.dense.flat, plain.dense.flat)
    torch.testing.assert_close(weighted.table, plain.table)


@pytest.mark.parametrize("task", TASKS)
def test_adam_is_that_of_torch_where_every_step_touches_every_row(task: str) -> None:
    made = engine("deepfm", task, "adam", buckets=2)
    slow = Slow(made, task, "adam")
    for step in range(12):
        _, _, dense, y, share = batch(task, step, rows=5)
        ids = torch.tensor([[i % 3, 3 + i, 3 + (i + 1) % 5, 3 + i] for i in range(5)])
        weights = torch.full((5, 4), 0.5)
        assert take(made, ids, weights, dense, y, share)
        slow.step(ids, weights, dense, y, share)
    torch.testing.assert_close(made.table, slow.table.detach(), rtol=1e-3, atol=1e-4)
    for name, param in made.dense.params.items():
        torch.testing.assert_close(param.detach(), slow.params[name].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", ["adam", "ftrl"])
def test_rows_step_like_their_rule_on_the_summed_gradient(rule: str) -> None:
    made = engine("deepfm", "binary", rule, l1=0.01 if rule == "ftrl" else 0.0)
    for step in range(6):
        slow, args = Slow(made, "binary", "sgd"), batch("binary", step)
        torch.autograd.backward(slow.loss(*args))
        touched = torch.unique(args[0])
        assert slow.table.grad is not None
        state = [slot[touched] for slot in made.row_slots]
        expected, _ = made.row_update.step(made.table[touched], slow.table.grad[touched], state)
        assert take(made, *args)
        torch.testing.assert_close(made.table[touched], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_cross_entropies_and_half_the_squared_error(task: str) -> None:
    made = engine("deepfm", task)
    slow, (ids, weights, dense, y, _) = Slow(made, task, "sgd"), batch(task, 1, rows=1)
    got = made.losses(made.predict(ids, weights, dense), y)
    expected = slow.loss(ids, weights, dense, y, torch.ones(1)).detach()
    torch.testing.assert_close(got, expected[None])


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("rule", RULES)
def test_only_touched_rows_and_their_history_change(rule: str, l2: float) -> None:
    made = engine(rule=rule, l2=l2)
    before = [t.clone() for t in (made.table, *made.row_slots)]
    ids, weights, dense, y, share = batch("binary", 0)
    assert take(made, ids, weights, dense, y, share)
    others = torch.ones(len(made.table), dtype=torch.bool)
    others[ids] = False
    assert others.sum() > 2
    for old, new in zip(before, (made.table, *made.row_slots), strict=True):
        assert torch.equal(old[others], new[others])
    assert not torch.equal(before[0][~others], made.table[~others])


class Spy(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own class is untyped
    """Notes each operation and the size of the largest tensor that it makes or takes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [[t.numel() for t in group if isinstance(t, Tensor)] for group in (args, [out])]
        self.seen.append((func.overloadpacket.__name__, *(max(s, default=0) for s in sizes)))
        return out


@contextmanager
def spying() -> Iterator[Spy]:
    with Spy() as spy:
        yield spy


@pytest.mark.parametrize("rule", RULES)
def test_no_operation_of_a_step_walks_the_table(rule: str) -> None:
    made = engine(rule=rule, buckets=10_000)
    with spying() as spy:
        assert take(made, *batch("binary", 0))
        made.predict(*(t[:1] for t in batch("binary", 0)[:3]))
    rows = len(made.table)
    walking = {name for name, taken, given in spy.seen if taken >= rows or given >= rows}
    assert walking <= {"index", "index_copy_", "detach", "new_zeros"}  # gather, scatter, and two that read no number
    assert max(given for name, _, given in spy.seen if name not in ("index_copy_", "detach")) < rows
    assert any(name == "index_copy_" for name, *_ in spy.seen)


def spoiled(fault: str) -> Batch:
    ids, weights, dense, y, share = batch("regression", 0)
    if fault == "label":
        y[0] = math.nan
    elif fault == "number":
        dense[1] = math.inf
    elif fault == "overflow":
        y[0] = 3e38
    else:
        y[0] = 1e5
    return ids, weights, dense, y, share


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", ["label", "number", "overflow", "large"])
def test_an_unusable_gradient_changes_nothing(fault: str, rule: str) -> None:
    made = engine(task="regression", rule=rule, max_grad_norm=100.0)
    assert take(made, *batch("regression", 5))
    before = digest(made.state_dict())
    assert not take(made, *spoiled(fault))
    assert digest(made.state_dict()) == before


def test_the_limit_is_the_norm_of_the_whole_gradient() -> None:
    args = batch("binary", 0)
    made = engine(rule="sgd")
    slow = Slow(made, "binary", "sgd")
    torch.autograd.backward(slow.loss(*args))
    parts = [p.grad.flatten() for p in (slow.table, *slow.params.values()) if p.grad is not None]
    norm = float(torch.cat(parts).norm())
    assert take(engine(rule="sgd", max_grad_norm=norm * 1.001), *args)
    assert not take(engine(rule="sgd", max_grad_norm=norm * 0.999), *args)


def test_rows_learn_faster_than_dense_weights_unless_told() -> None:
    made = config()
    plain = made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"embedding_learning_rate": None})})
    slow, fast = (Eager(c, Featurizer(made).layout) for c in (made, plain))
    start, args = slow.table.clone(), batch("binary", 0)
    assert take(slow, *args)
    assert take(fast, *args)
    ratio = ROWS_FASTER * RATE / ROW_RATE
    torch.testing.assert_close(fast.table - start, ratio * (slow.table - start), rtol=1e-3, atol=1e-6)


def test_empty_slots_of_a_bag_take_no_part() -> None:
    made, (ids, weights, dense, *_) = engine(), batch("binary", 0)
    weights[:, 2:] = 0.0
    other = ids.clone()
    other[:, 2:] = 7
    assert torch.equal(made.predict(ids, weights, dense), made.predict(other, weights, dense))


@pytest.mark.parametrize("rule", RULES)
def test_a_restored_engine_goes_on_to_the_bit(rule: str) -> None:
    whole, other = engine(rule=rule), engine(rule=rule)
    for step in range(3):
        take(whole, *batch("binary", step))
    other.load_state_dict(whole.state_dict())
    for step in range(3, 6):
        take(whole, *batch("binary", step))
        take(other, *batch("binary", step))
    assert digest(other.state_dict()) == digest(whole.state_dict())


def test_a_state_stays_what_it_was_while_learning_goes_on() -> None:
    made = engine(rule="adam")
    state, before = made.state_dict(), digest(made.state_dict())
    take(made, *batch("binary", 0))
    assert digest(state) == before
    assert digest(made.state_dict()) != before


def test_the_parameters_of_the_model_are_the_ones_that_learn() -> None:
    made = engine()
    before = made.dense.flat.clone()
    assert take(made, *batch("binary", 0))
    assert not torch.equal(made.dense.flat, before)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in made.model.parameters()]), made.dense.flat)
