"""What recurrent backbones remember: synthetic histories, one event at a time, learnt online with several credit rules.

Each history is a key's: it begins with an empty state, its answers are asked long after what they depend on, and they
are scored before they are learned. Many keys move in step, one event of each at a time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from streamcl.bench.report import Bar, Row, progress
from streamcl.models.legs import LegS
from streamcl.models.linear_state import ElementWise, KeyState, MinGRU, MinLSTM, Recurrent
from streamcl.models.lssl import DiagonalLSSL
from streamcl.models.online_credit import OnlineCredit
from streamcl.models.retnet import RetNet
from streamcl.random import key_of, uniform_array

KEYS = 32  # that move in step
UNITS = 32  # of state per key; an LSSL has as many complex ones, RetNet 16 x 16
SYMBOLS, NOISES = 4, 4
SLOTS, PAIRS = 6, 4  # keys that a recall's pairs may have, and pairs in a history
NO_ANSWER = -1
CORE = 4  # methods that the promises and the quick run need

COPY, SELECTIVE, RECALL = "copy", "selective copy", "associative recall"
TRACES, ONE_STEP, WHOLE = "minGRU, RTRL traces", "minGRU, TBPTT(1)", "minGRU, BPTT over the whole history"

DEFINITION = (
    "sequences: accuracy of the last fifth of the answers, each scored before it is learned; histories of new keys,"
    f" {KEYS} at once; copy: 2 of {SYMBOLS} symbols, a gap of noise, then both are asked for in order; selective copy:"
    f" the same at random places among noise; associative recall: {PAIRS} pairs of a key and a value, a gap of noise,"
    " then each key asks for its value; linear head; Adam, its rate from a few trials on other draws (minGRU with"
    " traces, RetNet), the same for other rules of a backbone, not tuned for the rest"
)


class Histories(NamedTuple):
    """x (T, B, in) events of B keys, y (T, B) the answer that is asked for or NO_ANSWER; asked of all keys at once."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Task:
    """`draw(seed, n, delay)` gives the n-th batch of histories."""

    name: str
    inputs: int
    classes: int
    draw: Callable[[int, int, int], Histories]


@dataclass(frozen=True, slots=True)
class Method:
    """A backbone and how credit reaches its past.

    `window` k: backpropagation through the last k events, the state before them held (0: through all). None: the
    backbone's own (traces, or none that is needed).
    """

    name: str
    build: Callable[[int, int], Any]
    learning_rate: float
    window: int | None = None


class Draws:
    """The numbers of one batch of histories, by the name of what they decide."""

    def __init__(self, task: str, seed: int, batch: int) -> None:
        self.task, self.seed, self.batch = task, seed, batch

    def uniform(self, what: str, *shape: int) -> NDArray[np.float64]:
        count = math.prod(shape)
        key = key_of(self.seed, f"bench.sequences.{self.task}.{what}")
        return uniform_array(key, count, self.batch * count).reshape(shape)

    def below(self, n: int, what: str, *shape: int) -> NDArray[np.int64]:
        return (self.uniform(what, *shape) * n).astype(np.int64)

    def orders(self, what: str, *shape: int) -> NDArray[np.int64]:
        """Random permutations along the last axis."""
        return self.uniform(what, *shape).argsort(-1)


def draw_copy(task: str, scattered: bool, seed: int, batch: int, delay: int) -> Histories:
    """Two symbols and `delay` events of noise, then the events "say the first" and "say the second".

    Scattered, the symbols stand at random places of the first half; else they come first.
    """
    draws = Draws(task, seed, batch)
    symbols = draws.below(SYMBOLS, "symbols", KEYS, 2)
    tokens = SYMBOLS + draws.below(NOISES, "noise", KEYS, 2 + delay)
    places = np.tile(np.arange(2), (KEYS, 1))
    if scattered:
        places = np.sort(draws.orders("places", KEYS, 2 + delay // 2)[:, :2], 1)
    np.put_along_axis(tokens, places, symbols, 1)
    asked = np.tile(SYMBOLS + NOISES + np.arange(2), (KEYS, 1))
    return _histories(_one_hot(np.hstack((tokens, asked)), SYMBOLS + NOISES + 2), symbols)


def draw_recall(seed: int, batch: int, delay: int) -> Histories:
    """Events that hold a key and its value, then `delay` of noise, then each key alone, in another order."""
    draws = Draws(RECALL, seed, batch)
    keys, values = draws.orders("keys", KEYS, SLOTS)[:, :PAIRS], draws.below(SYMBOLS, "values", KEYS, PAIRS)
    pairs = np.zeros((KEYS, PAIRS, SLOTS + SYMBOLS + NOISES), np.float32)
    pairs[..., :SLOTS] = _one_hot(keys, SLOTS)
    asked = pairs.copy()
    pairs[..., SLOTS : SLOTS + SYMBOLS] = _one_hot(values, SYMBOLS)
    noise = np.zeros((KEYS, delay, SLOTS + SYMBOLS + NOISES), np.float32)
    noise[..., SLOTS + SYMBOLS :] = _one_hot(draws.below(NOISES, "noise", KEYS, delay), NOISES)
    order = draws.orders("order", KEYS, PAIRS)
    asked = np.take_along_axis(asked, order[..., None], 1)
    return _histories(np.concatenate((pairs, noise, asked), 1), np.take_along_axis(values, order, 1))


def _one_hot(tokens: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    return np.eye(size, dtype=np.float32)[tokens]


def _histories(x: NDArray[np.float32], answers: NDArray[np.int64]) -> Histories:
    """Of events (B, T, in) whose last ones ask for `answers` (B, A)."""
    unasked = np.full((len(x), x.shape[1] - answers.shape[1]), NO_ANSWER)
    y = np.concatenate((unasked, answers), 1)
    return Histories(torch.from_numpy(x.swapaxes(0, 1).copy()), torch.from_numpy(y.T.copy()))


TASKS = (
    Task(COPY, SYMBOLS + NOISES + 2, SYMBOLS, partial(draw_copy, COPY, False)),
    Task(SELECTIVE, SYMBOLS + NOISES + 2, SYMBOLS, partial(draw_copy, SELECTIVE, True)),
    Task(RECALL, SLOTS + SYMBOLS + NOISES, SYMBOLS, draw_recall),
)


def min_gru(inputs: int, seed: int) -> MinGRU:
    return MinGRU(inputs, UNITS, seed=seed, horizon=UNITS, output_gate=True)


def methods() -> list[Method]:
    """All that are compared; the first `CORE` in the quick run too, and with every seed."""
    lssl: Callable[[int, int], ElementWise] = lambda n, seed: DiagonalLSSL(n, UNITS, UNITS, seed=seed)  # noqa: E731
    return [
        Method(TRACES, lambda n, seed: OnlineCredit(min_gru(n, seed)), 0.05),
        Method(ONE_STEP, min_gru, 0.05, window=1),
        Method("minGRU, TBPTT(8)", min_gru, 0.05, window=8),
        Method("RetNet, mimetic start, keys as drawn", partial(_retnet, mimetic=True), 0.02),
        Method(WHOLE, min_gru, 0.05, window=0),
        Method("minGRU, fixed feedback .9", lambda n, seed: OnlineCredit(min_gru(n, seed), decay=0.9), 0.05),
        Method("minGRU without output gate, RTRL traces", lambda n, seed: OnlineCredit(_ungated(n, seed)), 0.05),
        Method("minLSTM, RTRL traces", lambda n, seed: OnlineCredit(_min_lstm(n, seed)), 0.05),
        Method("LSSL, RTRL traces", lambda n, seed: OnlineCredit(lssl(n, seed)), 0.05),
        Method("LSSL, TBPTT(1)", lssl, 0.05, window=1),
        Method("RetNet, keys as drawn", _retnet, 0.02),
        Method("HiPPO-LegS, 16 coefficients", lambda n, _seed: LegS(n, 16), 0.02),
    ]


def _min_lstm(inputs: int, seed: int) -> MinLSTM:
    return MinLSTM(inputs, UNITS, seed=seed, horizon=UNITS, output_gate=True)


def _ungated(inputs: int, seed: int) -> MinGRU:
    return MinGRU(inputs, UNITS, seed=seed, horizon=UNITS)


def _retnet(inputs: int, seed: int, mimetic: bool = False) -> RetNet:
    return RetNet(inputs, UNITS, key=16, value=16, seed=seed, mimetic=mimetic)


class Trainer:
    """A backbone and a linear head that learn at every answer, one event at a time."""

    def __init__(self, backbone: Any, classes: int, learning_rate: float, window: int | None) -> None:
        self.backbone: Recurrent = backbone
        self.window = window
        self.head = nn.utils.skip_init(nn.Linear, backbone.width, classes)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for param in self.head.parameters():
                param.zero_()  # the first scores are the prior
        learning = [p for p in (*backbone.parameters(), *self.head.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.Adam(learning, lr=learning_rate)

    def learn(self, histories: Histories) -> list[float]:
        """The share of right answers at each event that asks."""
        state = self.backbone.init_state(histories.x.shape[1])
        recent: deque[tuple[Tensor, KeyState]] = deque(maxlen=1 if self.window is None else self.window or None)
        found = []
        for x, y in zip(*histories, strict=True):
            recent.append((x, state))
            asked = y[0].item() != NO_ANSWER
            with torch.set_grad_enabled(asked and self.window is None):
                h, after = self.backbone.step(x, state)
            if asked:
                found.append(self._answer(h if self.window is None else self._again(recent), y))
            state = {name: value.detach() for name, value in after.items()}
        return found

    def _again(self, recent: deque[tuple[Tensor, KeyState]]) -> Tensor:
        """h of the last event, differentiable through all of `recent`: with today's weights, from the oldest state."""
        state = recent[0][1]
        for x, _ in recent:
            h, state = self.backbone.step(x, state)
        return h

    def _answer(self, h: Tensor, y: Tensor) -> float:
        logits = self.head(h)
        right = float((logits.argmax(1) == y).float().mean())
        self.optimizer.zero_grad()
        functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return right


def accuracy(task: Task, method: Method, seed: int, batches: int, delay: int) -> float:
    """Of the last fifth of the answers."""
    trainer = Trainer(method.build(task.inputs, seed), task.classes, method.learning_rate, method.window)
    found = [share for n in range(batches) for share in trainer.learn(task.draw(seed, n, delay))]
    return statistics.fmean(found[-len(found) // 5 :])


def gradient_error(build: Callable[[], ElementWise], length: int, seed: int) -> float:
    """Largest difference between the gradient by traces and by backpropagation through time, over the largest entry.

    In float32, of a linear loss on the last of `length` events of 4 keys; per parameter, then the largest.
    """
    cell = build()
    draw = uniform_array(key_of(seed, "bench.sequences.gradient"), length * 4 * cell.inputs) * 2.0 - 1.0
    x = torch.from_numpy(draw).float().view(length, 4, cell.inputs)
    credit = OnlineCredit(cell)
    state, traced = cell.init_state(4), credit.init_state(4)
    for event in x:
        h, state = cell.step(event, state)
        g, traced = credit.step(event, traced)
    params = [cell.param(name) for name in cell.traced]
    wanted = torch.autograd.grad(h.sum(), params)
    found = torch.autograd.grad(g.sum(), params)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch is asked to do: operations, and bytes of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.bytes += sum(
            t.nbytes for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)
        )
        return out


def work_growth(backbone: Any, inputs: int, events: int) -> float:
    """Work and state of the last of so many events over those of the second, whichever grew most; 1 is flat."""
    state = backbone.init_state(1)
    x = torch.ones(1, inputs)
    spent: list[tuple[int, int, int]] = []
    for event in range(events):
        with Work() as work:
            _, state = backbone.step(x, state)
        state = {name: value.detach() for name, value in state.items()}
        if event in (1, events - 1):
            spent.append((work.operations, work.bytes, sum(value.nbytes for value in state.values())))
    first, last = spent
    return max(b / a for a, b in zip(first, last, strict=True))


def measure(quick: bool, seeds: Sequence[int]) -> tuple[list[Row], list[Bar]]:
    """Rows: accuracy by task and method, worst gradient difference and growth of work by backbone.

    Beyond the core, methods are run with the first two seeds: they inform, no promise rests on them.
    """
    torch.set_num_threads(1)  # work this small takes many times longer with two
    batches, delay = (60, 20) if quick else (150, 24)
    rows, found = [], {}
    for task in TASKS:
        for place, method in enumerate(methods()[:CORE] if quick else methods()):
            progress(f"sequences: {task.name}: {method.name}")
            each = [accuracy(task, method, seed, batches, delay) for seed in (seeds if place < CORE else seeds[:2])]
            found[task.name, method.name] = each
            held = sum(value.nbytes for value in method.build(task.inputs, 0).init_state(1).values())
            rows.append(Row(f"{task.name}: {method.name}", {**_spread(each), "state_bytes_per_key": held}))
    more, bars = measure_exactness(200 if quick else 1000, 100 if quick else 1000)
    return [*rows, *more], [*_promises(found, quick), *bars]


def _spread(each: Sequence[float]) -> dict[str, float | int]:
    return {"accuracy": statistics.fmean(each), "lowest_seed": min(each), "highest_seed": max(each), "seeds": len(each)}


def _promises(found: dict[tuple[str, str], list[float]], quick: bool) -> list[Bar]:
    """Traces learn what one step can't; paired by seed, the worst one counts."""
    limits = {COPY: 0.15, SELECTIVE: 0.3, RECALL: 0.2} if quick else {COPY: 0.4, SELECTIVE: 0.5, RECALL: 0.5}
    bars = []
    for task, limit in limits.items():
        gains = [a - b for a, b in zip(found[task, TRACES], found[task, ONE_STEP], strict=True)]
        bars.append(Bar(f"{task}: RTRL traces over TBPTT(1), worst seed", min(gains), limit))
    return bars


def measure_exactness(length: int, events: int) -> tuple[list[Row], list[Bar]]:
    """That traces are exact, and that no backbone's work or state grows."""
    rows, errors, growths = [], [], []
    builds: dict[str, Callable[[], Any]] = {
        "minGRU": lambda: MinGRU(8, UNITS, output_gate=True),
        "minLSTM": lambda: MinLSTM(8, UNITS, output_gate=True),
        "LSSL": lambda: DiagonalLSSL(8, UNITS),
    }
    for name, build in builds.items():
        errors.append(gradient_error(build, length, 0))
        growths.append(work_growth(OnlineCredit(build()), 8, events))
        rows.append(Row(f"{name} with traces", {"gradient_error": errors[-1], "growth": growths[-1]}))
    for name, backbone in {"RetNet": RetNet(8, UNITS), "HiPPO-LegS": LegS(8, 16)}.items():
        growths.append(work_growth(backbone, 8, events))
        rows.append(Row(name, {"growth": growths[-1]}))
    return rows, [
        Bar(f"gradient by traces against BPTT over {length} events, relative", max(errors), 1e-5, at_least=False),
        Bar(f"work and bytes of event {events} over event 2", max(growths), 1.0, at_least=False),
    ]
