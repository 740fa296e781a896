"""The offline peer: a DeepFM in plain torch, trained from scratch at each event-day on everything before it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamcl.bench.quality import Trace
from streamcl.bench.streams import TIME, Dataset

NAME = "deepfm retrained daily"
DAY_S = 86_400.0


class DeepFM(nn.Module):
    """Guo et al. 2017, arXiv 1703.04247, on F categorical fields and N numbers: (B, F) rows, (B, N) -> (B,) logits.

    Row 0 of each table stands for a value that was not in the training data; it stays zero.
    """

    def __init__(self, sizes: Sequence[int], numbers: int, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.first = nn.ModuleList(_table(size, 1, 0.0) for size in sizes)
        self.vectors = nn.ModuleList(_table(size, dim, 0.01) for size in sizes)
        widths = [len(sizes) * dim + numbers, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.deep = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.linear = nn.Linear(numbers, 1)

    def forward(self, rows: Tensor, numbers: Tensor) -> Tensor:
        first = [table(rows[:, f]) for f, table in enumerate(self.first)]
        vectors = [table(rows[:, f]) for f, table in enumerate(self.vectors)]
        out = self.linear(numbers) + self.deep(torch.cat([*vectors, numbers], 1)) + sum(first)
        if vectors:
            v = torch.stack(vectors)  # (F, B, D)
            out = out + 0.5 * (v.sum(0) ** 2 - (v * v).sum(0)).sum(1, keepdim=True)
        scores: Tensor = out[:, 0]
        return scores


def _table(size: int, dim: int, scale: float) -> nn.Embedding:
    table = nn.Embedding(size, dim, padding_idx=0)
    with torch.no_grad():
        table.weight.normal_(std=scale)
        table.weight[0] = 0.0
    return table


def retrained_deepfm(
    data: Dataset,
    *,
    every_s: float = DAY_S,
    dim: int = 8,
    hidden: Sequence[int] = (64, 32),
    epochs: int = 3,
    rate: float = 3e-3,
    decay: float = 1e-5,
    batch: int = 256,
    seed: int = 0,
) -> Trace:
    """Each day's events are scored by a model that has seen all days before, `epochs` times, and nothing of that day.

    Events of the first day get the score one half. `decay` is Adam's L2 term. One torch thread. It reads categorical
    and numeric features, no bags.
    """
    rows, sizes, numbers = _columns(data)
    labels = torch.from_numpy(data.labels().astype(np.float32))
    times = np.array([float(payload[TIME]) for payload in data.payloads])
    scores = np.full(len(times), 0.5)
    began = time.process_time()
    days = np.floor(times / every_s)
    starts = [*np.flatnonzero(np.diff(days, prepend=days[:1])).tolist(), len(times)]
    for start, end in pairwise(starts):
        torch.manual_seed(seed)
        mean, deviation = _moments(numbers[:start])
        scaled = ((numbers[:end] - mean) / deviation).nan_to_num(0.0)  # a missing number reads as the mean
        known = [int(rows[:start, f].max()) + 1 for f in range(rows.shape[1])]
        seen = torch.where(rows[:end] < torch.tensor(known), rows[:end], 0) if known else rows[:end]
        model = DeepFM(sizes, numbers.shape[1], dim, hidden)
        _train(model, seen[:start], scaled[:start], labels[:start], epochs, rate, decay, batch)
        with torch.inference_mode():
            scores[start:end] = torch.sigmoid(model(seen[start:end], scaled[start:end])).double().numpy()
    return Trace(NAME, scores, time.process_time() - began)


def _moments(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, without what is missing (NaN)."""
    mean = numbers.nanmean(0)
    others = (~numbers.isnan()).sum(0) - 1
    return mean.nan_to_num(0.0), (((numbers - mean) ** 2).nansum(0) / others.clamp(min=1)).sqrt().clamp(min=1e-6)


def _train(
    model: DeepFM, rows: Tensor, numbers: Tensor, labels: Tensor, epochs: int, rate: float, decay: float, batch: int
) -> None:
    update = torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
    for _ in range(epochs):
        for some in torch.split(torch.randperm(len(rows)), batch):
            loss = nn.functional.binary_cross_entropy_with_logits(model(rows[some], numbers[some]), labels[some])
            update.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            update.step()


def _columns(data: Dataset) -> tuple[Tensor, list[int], Tensor]:
    """Rows (N, F), numbered from 1 in the order of first appearance, the size of each table, numbers (N, M)."""
    kinds: Mapping[str, Any] = data.features
    columns: list[NDArray[np.int64]] = []
    sizes = []
    for name in (name for name, kind in kinds.items() if kind == "categorical"):
        known: dict[Any, int] = {}
        columns.append(np.array([known.setdefault(p.get(name), len(known) + 1) for p in data.payloads], np.int64))
        sizes.append(len(known) + 1)
    names = [name for name, kind in kinds.items() if kind == "numeric"]
    numbers = np.array([[float(p.get(name, np.nan)) for name in names] for p in data.payloads], np.float32)
    rows = np.stack(columns, 1) if columns else np.zeros((len(data.payloads), 0), np.int64)
    return torch.from_numpy(rows), sizes, torch.from_numpy(numbers.reshape(len(data.payloads), len(names)))
