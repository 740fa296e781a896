from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional

from streamcl.bench import continual_sequences
from streamcl.bench.continual_sequences import (
    COPY,
    KEYS,
    NO_ANSWER,
    NOISES,
    ONE_STEP,
    PAIRS,
    RECALL,
    SELECTIVE,
    SLOTS,
    SYMBOLS,
    TASKS,
    TRACES,
    Method,
    Task,
    Trainer,
    accuracy,
    gradient_error,
    measure,
    measure_exactness,
    methods,
    min_gru,
    work_growth,
)
from streamcl.models.linear_state import MinGRU, Recurrent
from streamcl.models.online_credit import OnlineCredit


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With two, work this small takes many times longer on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


BY_NAME = {task.name: task for task in TASKS}
tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@tasks
def test_a_batch_of_histories_depends_on_seed_and_number_alone(task: Task) -> None:
    first, again, next_one, other = (task.draw(*at, 9) for at in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.x, next_one.x)
    assert not torch.equal(first.x, other.x)


@tasks
def test_all_keys_are_asked_at_the_same_events_and_at_the_end(task: Task) -> None:
    x, y = task.draw(0, 0, 9)
    assert x.shape == (len(y), KEYS, task.inputs)
    asked = (y != NO_ANSWER).all(1)
    assert torch.equal(asked, (y != NO_ANSWER).any(1))
    assert asked.tolist() == sorted(asked.tolist())
    assert set(y[asked].flatten().tolist()) == set(range(task.classes))


@pytest.mark.parametrize("name", [COPY, SELECTIVE])
def test_a_copys_answers_are_its_symbols_in_order(name: str) -> None:
    x, y = BY_NAME[name].draw(0, 1, 12)
    for b in range(KEYS):
        tokens = x[:, b].argmax(1)
        assert tokens[tokens < SYMBOLS].tolist() == y[-2:, b].tolist()
        assert tokens[-2:].tolist() == [SYMBOLS + NOISES, SYMBOLS + NOISES + 1]
        assert (tokens[8:-2] >= SYMBOLS).all()  # a gap of half the delay at least


def test_a_recalls_answer_is_the_value_that_came_with_the_key() -> None:
    x, y = BY_NAME[RECALL].draw(0, 1, 12)
    for b in range(KEYS):
        pairs = {int(e[:SLOTS].argmax()): int(e[SLOTS : SLOTS + SYMBOLS].argmax()) for e in x[:PAIRS, b]}
        assert len(pairs) == PAIRS
        assert [pairs[int(e[:SLOTS].argmax())] for e in x[-PAIRS:, b]] == y[-PAIRS:, b].tolist()
        assert x[-PAIRS:, b, SLOTS:].sum() == 0
        assert x[PAIRS:-PAIRS, b, SLOTS + SYMBOLS :].sum(1).eq(1).all()


def gradients_of_one_answer(backbone: Recurrent, window: int | None) -> dict[str, torch.Tensor]:
    task = BY_NAME[RECALL]
    x, y = task.draw(0, 0, 6)
    trainer = Trainer(backbone, task.classes, 0.0, window)
    with torch.no_grad():
        trainer.head.weight.copy_(torch.randn(trainer.head.weight.shape, generator=torch.Generator().manual_seed(0)))
    trainer.learn(continual_sequences.Histories(x[: 6 + PAIRS + 1], y[: 6 + PAIRS + 1]))  # up to the first answer
    module: torch.nn.Module = backbone  # type: ignore[assignment]
    return {name.split(".")[-1]: param.grad for name, param in module.named_parameters() if param.grad is not None}


def test_traces_learn_an_answer_as_backpropagation_through_the_history_does() -> None:
    inputs = BY_NAME[RECALL].inputs
    traced = gradients_of_one_answer(OnlineCredit(min_gru(inputs, 0)), None)
    whole = gradients_of_one_answer(min_gru(inputs, 0), 0)
    assert traced.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(traced[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_window_sees_its_last_events_only() -> None:
    """The oracle: from the state before the window, held, by hand."""
    task, window = BY_NAME[RECALL], 3
    found = gradients_of_one_answer(min_gru(task.inputs, 0), window)
    cell = min_gru(task.inputs, 0)
    x, y = task.draw(0, 0, 6)
    state = cell.init_state(KEYS)
    last = 6 + PAIRS
    for t in range(last + 1):
        h, state = cell.step(x[t], state)
        if t == last - window:
            state = {"s": state["s"].detach()}
    head = torch.randn(task.classes, cell.width, generator=torch.Generator().manual_seed(0))
    functional.cross_entropy(h @ head.T, y[last]).backward()  # type: ignore[no-untyped-call]
    for name, gradient in found.items():
        wanted = cell.param(name).grad
        assert wanted is not None
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_every_method_runs_and_its_accuracy_is_its_seeds(method: Method) -> None:
    once, again = (accuracy(BY_NAME[RECALL], method, 2, 2, 3) for _ in range(2))
    assert 0.0 <= once <= 1.0
    assert once == again


def test_answers_are_scored_before_they_are_learned() -> None:
    """With a head of zeros every score is equal, and the first class is chosen."""
    task = BY_NAME[COPY]
    histories = task.draw(0, 0, 4)
    trainer = Trainer(min_gru(task.inputs, 0), task.classes, 0.1, 1)
    assert trainer.learn(histories)[0] == pytest.approx(float((histories.y[-2] == 0).float().mean()))


def test_a_wrong_trace_is_found() -> None:
    class Wrong(MinGRU):
        def by_gate(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            keep, found = super().by_gate(x, s)
            return keep, {**found, "z": 1.01 * found["z"]}

    assert gradient_error(lambda: MinGRU(3, 4), 50, 0) < 1e-5
    assert gradient_error(lambda: Wrong(3, 4), 50, 0) > 1e-3


def test_a_state_that_grows_is_found() -> None:
    class Hoarder:
        width = 2

        def init_state(self, n: int) -> dict[str, torch.Tensor]:
            return {"all": torch.zeros(n, 1)}

        def step(
            self, x: torch.Tensor, state: dict[str, torch.Tensor], _dt: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return x, {"all": torch.cat((state["all"], x[:, :1]), 1)}

    assert work_growth(Hoarder(), 2, 10) > 2.0
    assert work_growth(OnlineCredit(MinGRU(2, 3)), 2, 10) == 1.0


def test_the_quick_run_measures_what_the_bars_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int]] = []

    def told(task: Task, method: Method, seed: int, _batches: int, _delay: int) -> float:
        asked.append((task.name, method.name, seed))
        return {TRACES: 0.9, ONE_STEP: 0.3}.get(method.name, 0.5) - 0.1 * seed * (method.name == TRACES)

    kept: Callable[[int, int], object] = lambda _length, _events: ([], [])  # noqa: E731
    monkeypatch.setattr(continual_sequences, "accuracy", told)
    monkeypatch.setattr(continual_sequences, "measure_exactness", kept)
    rows, bars = measure(True, [0, 1])
    assert len(asked) == len(rows) * 2
    assert {(task, method) for task, method, _ in asked} >= {(t.name, m) for t in TASKS for m in (TRACES, ONE_STEP)}
    assert [bar.value for bar in bars] == pytest.approx([0.5] * 3)  # of the worst seed
    held = {"state_bytes_per_key": 4 * (32 + 2 * 32 * (10 + 1))}  # s, and a trace for each weight and bias of 2 gates
    assert rows[0].values == pytest.approx(
        {"accuracy": 0.85, "lowest_seed": 0.8, "highest_seed": 0.9, "seeds": 2} | held
    )


def test_exactness_is_promised_of_all_that_carry_traces() -> None:
    rows, bars = measure_exactness(20, 5)
    assert {row.name for row in rows if "gradient_error" in row.values} == {
        "minGRU with traces",
        "minLSTM with traces",
        "LSSL with traces",
    }
    assert all(bar.ok for bar in bars)
