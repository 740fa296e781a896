"""The peers with weights: Vowpal Wabbit on the same fields and a cross, and a DeepFM that is retrained every period."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamcl.bench.next_click_events import RECENT, Clicks, Examples, Ranking, payloads
from streamcl.bench.next_click_neighbours import Said
from streamcl.bench.retrained import DeepFM
from streamcl.random import key_of, uniform_array

SPACES = {"item": "i", "prev": "p", "again": "a", "pair": "x", "seen": "s", "pairs": "w"}
"""VW's namespaces by field."""
VW_BASE = "--loss_function logistic --link logistic -b 24 --quiet"


def vw_line(payload: Mapping[str, Any], label: str = "") -> str:
    """A payload in VW's text format."""
    parts = []
    for name, space in SPACES.items():
        value = payload[name]
        parts.append(f"|{space} {' '.join(map(str, value)) if isinstance(value, list) else value} ")
    return label + "".join(parts)


def vowpal_wabbit(name: str, examples: Examples, ranking: Ranking, arguments: str) -> Said:
    """VW's Python API: all five parsed and predicted, then learned. `ranks` are its raw scores."""
    from vowpalwabbit import Workspace

    vw = Workspace(f"{VW_BASE} {arguments}")
    scores, ranks = np.empty(examples.shown.shape), np.empty(ranking.candidates.shape)
    chosen = {int(n): s for s, n in enumerate(ranking.example)}
    began, apart = time.process_time(), 0.0
    for n in range(len(examples)):
        if n in chosen:
            asked = time.process_time()
            s = chosen[n]
            for at, payload in enumerate(payloads(examples, n, ranking.candidates[s])):
                example = vw.parse(vw_line(payload))
                ranks[s, at] = vw.predict(example)
                vw.finish_example(example)
            apart += time.process_time() - asked
        shown = payloads(examples, n, examples.shown[n])
        place = examples.place[n]
        parsed = [vw.parse(vw_line(payload, "1 " if at == place else "-1 ")) for at, payload in enumerate(shown)]
        scores[n] = [vw.predict(example) for example in parsed]
        for example in parsed:
            vw.learn(example)
            vw.finish_example(example)
    cpu_s = time.process_time() - began - apart
    vw.finish()
    return Said(name, scores, logits(ranks), cpu_s, rankings_s=apart)


def logits(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(chances, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(p) - np.log1p(-p))


ROWS = 1 << 20
"""Of the table of pairs."""


def retrained(
    name: str,
    clicks: Clicks,
    examples: Examples,
    ranking: Ranking,
    *,
    periods: int,
    warm: bool,
    epochs: int = 1,
    rate: float = 3e-3,
    dim: int = 8,
    hidden: Sequence[int] = (64, 32),
    batch: int = 2048,
    seed: int = 0,
) -> Said:
    """A period's clicks are scored by a model that has learned from those before, and nothing of that period.

    It is trained on the last `periods` of them, `epochs` times, anew or (`warm`) from what it was; Adam, lazy on rows.
    Clicks of the first period get one half.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    items = int(clicks.items.max()) + 1
    model = _fresh(items, dim, hidden, seed)
    scores = np.zeros(examples.shown.shape)
    ranks = np.zeros(ranking.candidates.shape)
    ends = [*np.searchsorted(examples.step, clicks.starts).tolist(), len(examples)]
    asked = 0.0
    for period, (start, end) in enumerate(pairwise(ends)):
        if not period or start == end:
            continue
        if not warm:
            model = _fresh(items, dim, hidden, seed + period)
        _train(model, examples, slice(ends[max(0, period - periods)], start), epochs, rate, batch, seed + period)
        scores[start:end] = _scores(model, examples.recent[start:end], examples.shown[start:end])
        which = (ranking.example >= start) & (ranking.example < end)
        at = time.process_time()
        ranks[which] = _scores(model, examples.recent[ranking.example[which]], ranking.candidates[which])
        asked += time.process_time() - at
    cpu_s = time.process_time() - began - asked
    return Said(name, 1.0 / (1.0 + np.exp(-scores)), ranks, cpu_s, rankings_s=asked)


LAST = 3
"""Items before that the net reads; each has fields of its own for itself and its pair with the item in question."""


def _fresh(items: int, dim: int, hidden: Sequence[int], seed: int) -> DeepFM:
    torch.manual_seed(seed)
    model = DeepFM([1 + RECENT, *[items] * (1 + LAST), *[ROWS] * LAST], 0, dim, hidden)
    for table in (*model.first, *model.vectors):
        table.sparse = True
    return model


def _columns(recent: NDArray[np.int32], shown: NDArray[np.int32]) -> Tensor:
    """(n * k, F) rows: how long ago, the item, those before, and their pairs; 0 is missing."""
    k = shown.shape[1]
    item = shown.reshape(-1, 1).astype(np.int64)
    every = np.repeat(recent.astype(np.int64), k, 0)  # (n * k, RECENT)
    same = every == item
    ago = np.where(same.any(1), same.argmax(1) + 1, 0)[:, None]
    before = every[:, :LAST]
    pairs = np.where(before > 0, _hashed(np.minimum(before, item), np.maximum(before, item)), 0)
    return torch.from_numpy(np.concatenate([ago, item, before, pairs], 1))


def _hashed(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    mixed = (low.astype(np.uint64) * np.uint64(1 << 20) + high.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    return np.asarray(1 + (mixed >> np.uint64(40)) % np.uint64(ROWS - 1), np.int64)


def _scores(model: DeepFM, recent: NDArray[np.int32], shown: NDArray[np.int32]) -> NDArray[np.float64]:
    """Logits, like shown."""
    parts = []
    with torch.inference_mode():
        for some in np.array_split(np.arange(len(shown)), max(1, shown.size // 200_000)):
            rows = _columns(recent[some], shown[some])
            parts.append(model(rows, torch.zeros(len(rows), 0)).double().numpy())
    return np.concatenate(parts).reshape(shown.shape)


def _train(model: DeepFM, examples: Examples, which: slice, epochs: int, rate: float, batch: int, seed: int) -> None:
    tables = [table.weight for table in (*model.first, *model.vectors)]
    known = {id(each) for each in tables}
    rest = [each for each in model.parameters() if id(each) not in known]
    updates = [torch.optim.SparseAdam(tables, rate), torch.optim.Adam(rest, rate)]
    start, end, _ = which.indices(len(examples))
    width = examples.shown.shape[1]
    for epoch in range(epochs):
        u = uniform_array(key_of(seed, f"bench.next_click.batches.{epoch}"), end - start)
        order = start + np.argsort(u, kind="stable")
        for some in np.array_split(order, max(1, width * len(order) // batch)):
            rows = _columns(examples.recent[some], examples.shown[some])
            labels = (np.arange(width) == examples.place[some][:, None]).ravel()
            y = torch.from_numpy(labels.astype(np.float32))
            loss = nn.functional.binary_cross_entropy_with_logits(model(rows, torch.zeros(len(rows), 0)), y)
            for update in updates:
                update.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for update in updates:
                update.step()
