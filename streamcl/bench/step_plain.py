"""The reference of `bench step`: the same step in plain torch and plain NumPy, with nothing of ours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

FIELDS, DIM, HIDDEN = 12, 16, (128, 64)
ROWS = FIELDS * 1000
RATE, ROW_RATE, INITIAL = 0.05, 0.1, 0.1

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Torch:
    """A click model by autograd: rows are gathered, and only they move; torch.optim.Adagrad for the rest.

    Args:
        replay: Rows of a reservoir (Vitter's algorithm R) that are learned beside each event.
        renewing: Continual backpropagation on the hidden layers, as its authors' code goes about it: utilities are
            averaged in each step, and a unit is made anew when enough of a replacement has accumulated.
    """

    def __init__(self, replay: int = 0, renewing: bool = False) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        widths = (FIELDS * DIM, *HIDDEN)
        self.layers = [nn.Linear(a, b) for a, b in itertools.pairwise((*widths, 1))]
        self.table = 0.01 * torch.randn(ROWS, DIM)
        self.squares = torch.full_like(self.table, INITIAL)
        self.optimizer = torch.optim.Adagrad(
            [param for layer in self.layers for param in layer.parameters()], RATE, initial_accumulator_value=INITIAL
        )
        self.replay, self.seen = replay, 0
        self.rng = np.random.default_rng(0)
        self.kept_ids, self.kept_y = torch.zeros(20_000, FIELDS, dtype=torch.int64), torch.zeros(20_000)
        self.renewal = Renewal(self.layers) if renewing else None

    def forward(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B,) logits of rows (B, F, D), and what the hidden layers say."""
        h, said = rows.flatten(1), []
        for layer in self.layers[:-1]:
            h = torch.relu(layer(h))
            said.append(h)
        return self.layers[-1](h)[:, 0], said

    def predict(self, ids: Ids) -> float:
        with torch.inference_mode():
            logits, _ = self.forward(self.table[torch.from_numpy(ids)[None]])
            return float(torch.sigmoid(logits)[0])

    def learn(self, ids: Ids, label: float) -> None:
        live_ids, live_y = torch.from_numpy(ids)[None], torch.tensor([label])
        all_ids, y, share = live_ids, live_y, torch.ones(1)
        held = min(self.seen, len(self.kept_y))
        if self.replay and held:
            drawn = torch.from_numpy(self.rng.integers(0, held, self.replay))
            all_ids, y = torch.cat((live_ids, self.kept_ids[drawn])), torch.cat((live_y, self.kept_y[drawn]))
            share = torch.cat((share, torch.full((self.replay,), 1.0 / self.replay)))
        rows = self.table[all_ids].requires_grad_()
        logits, said = self.forward(rows)
        loss = functional.binary_cross_entropy_with_logits(logits, y, share, reduction="sum")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        touched, where = torch.unique(all_ids, return_inverse=True)
        with torch.no_grad():
            gradient = torch.zeros(len(touched), DIM).index_add_(0, where.view(-1), rows.grad.view(-1, DIM))  # type: ignore[union-attr]
            squares = self.squares[touched] + gradient * gradient
            self.squares[touched] = squares
            self.table[touched] -= ROW_RATE * gradient / squares.sqrt()
            if self.renewal is not None:
                self.renewal.step(said, self.optimizer)
        if self.replay:
            self._write(live_ids, label)

    def _write(self, ids: Tensor, label: float) -> None:
        self.seen += 1
        capacity = len(self.kept_y)
        slot = self.seen - 1 if self.seen <= capacity else int(self.rng.integers(self.seen))
        if slot < capacity:
            self.kept_ids[slot], self.kept_y[slot] = ids[0], label


class Renewal:
    """Continual backpropagation, contribution utility; Dohare et al. 2024, Nature 632:768-774."""

    RATE, MATURITY, DECAY = 1e-4, 100, 0.99

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.utility = [torch.zeros(layer.out_features) for layer in layers[:-1]]
        self.age = [torch.zeros(len(u)) for u in self.utility]
        self.owed = [0.0 for _ in self.utility]

    def step(self, said: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        for place, h in enumerate(said):
            contribution = h.abs().mean(0) * self.layers[place + 1].weight.abs().sum(0)
            self.utility[place].lerp_(contribution, 1.0 - self.DECAY)
            self.age[place] += 1
            old = self.age[place] > self.MATURITY
            self.owed[place] += self.RATE * int(old.sum())
            if self.owed[place] >= 1.0:
                self.owed[place] -= 1.0
                unit = int(torch.where(old, self.utility[place], torch.inf).argmin())
                self._renew(place, unit, optimizer)

    def _renew(self, place: int, unit: int, optimizer: torch.optim.Optimizer) -> None:
        incoming, outgoing = self.layers[place], self.layers[place + 1]
        bound = (6.0 / incoming.in_features) ** 0.5
        incoming.weight[unit].uniform_(-bound, bound)
        incoming.bias[unit] = 0.0
        outgoing.weight[:, unit] = 0.0
        optimizer.state[incoming.weight]["sum"][unit] = INITIAL
        optimizer.state[incoming.bias]["sum"][unit] = INITIAL
        optimizer.state[outgoing.weight]["sum"][:, unit] = INITIAL
        self.utility[place][unit] = 0.0
        self.age[place][unit] = 0.0


class DeepRiver:
    """The pattern of a River wrapper around torch: a dict becomes a tensor, and every step is a training step.

    Source:
        deep-river's Classifier: `learn_one` of a dict, `train()`, `zero_grad`, forward, loss, `backward`, `step`.
    """

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def learn_one(self, x: dict[str, float], y: int) -> None:
        self.net.train()
        self.optimizer.zero_grad()
        output = self.net(torch.tensor([list(x.values())], dtype=torch.float32))
        loss = functional.cross_entropy(output, torch.tensor([y]))
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


class NumPy:
    """A net of one hidden layer by hand: softmax, SGD, one example at a time."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        rng = np.random.default_rng(0)
        bound = (6.0 / inputs) ** 0.5
        self.w1 = rng.uniform(-bound, bound, (hidden, inputs)).astype(np.float32)
        self.b1 = np.zeros(hidden, np.float32)
        self.w2, self.b2 = np.zeros((classes, hidden), np.float32), np.zeros(classes, np.float32)

    def learn(self, x: Floats, y: int) -> None:
        h = self.w1 @ x + self.b1
        np.maximum(h, 0.0, out=h)
        z = self.w2 @ h + self.b2
        p = np.exp(z - z.max())
        p /= p.sum()
        p[y] -= 1.0
        back = (p @ self.w2) * (h > 0.0)
        p *= np.float32(0.01)
        back *= np.float32(0.01)
        self.w2 -= p[:, None] * h
        self.b2 -= p
        self.w1 -= back[:, None] * x
        self.b1 -= back
