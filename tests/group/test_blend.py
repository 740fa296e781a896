"""What ranks have made of a row becomes their mean, by steps; and what only one has touched is that one's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from streamcl.engine.optimizers import build_update
from streamcl.group.blend import Share, blend
from streamcl.stations import Optimizer

ROWS, WIDTH = 6, 2
told = st.lists(
    st.dictionaries(
        st.integers(0, ROWS - 1),
        st.tuples(st.integers(1, 9), st.lists(st.floats(-3, 3, width=32), min_size=WIDTH, max_size=WIDTH)),
    ),
    min_size=1,
    max_size=4,
)


def share(rows: dict[int, Any], slots: tuple[torch.Tensor, ...] = ()) -> Share:
    at = torch.tensor(sorted(rows), dtype=torch.int64)
    values = torch.tensor([rows[i][1] for i in sorted(rows)], dtype=torch.float32).view(-1, WIDTH)
    steps = torch.tensor([rows[i][0] for i in sorted(rows)], dtype=torch.int64)
    return Share(at, values, tuple(slot[at] for slot in slots), steps)


def by_dicts(base: dict[int, list[float]], ranks: list[dict[int, Any]]) -> dict[int, list[float]]:
    """The slow, obvious one."""
    merged = dict(base)
    for row, before in base.items():
        mine = [rank[row] for rank in ranks if row in rank]
        total = sum(steps for steps, _ in mine)
        for j in range(WIDTH if mine else 0):
            moved = sum(steps * (value[j] - before[j]) for steps, value in mine)
            merged[row] = [*merged[row][:j], before[j] + moved / total, *merged[row][j + 1 :]]
    return merged


@effort(deadline=None)
@given(told)
def test_a_row_becomes_the_mean_of_what_the_ranks_that_touched_it_made_of_it(ranks: list[dict[int, Any]]) -> None:
    base = {row: [row / 4, -row / 2] for row in range(ROWS)}
    start = torch.tensor([base[row] for row in range(ROWS)])
    new, slots = blend(build_update(Optimizer(kind="sgd"), 0.1), start, (), [share(rank) for rank in ranks])
    expected = by_dicts(base, ranks)
    np.testing.assert_allclose(new.numpy(), [expected[row] for row in range(ROWS)], rtol=1e-5, atol=1e-5)
    assert slots == ()
    for row in range(ROWS):
        mine = [rank[row][1] for rank in ranks if row in rank]
        if len(mine) <= 1:
            assert new[row].tolist() == (mine[0] if mine else base[row])


@pytest.mark.parametrize("kind", ["adagrad", "adam", "ftrl", "sgd"])
def test_a_row_that_one_rank_has_touched_is_that_ranks_to_the_bit_with_its_slots(kind: Any) -> None:
    update = build_update(Optimizer(kind=kind, l1=0.01 if kind == "ftrl" else 0.0), 0.3)
    start = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    slots = update.slots(start)
    value, held = update.step(start, torch.sin(7 * start), slots)
    half = torch.arange(ROWS // 2)
    mine = Share(half, value[half], tuple(slot[half] for slot in held), torch.ones(ROWS // 2))
    idle = Share(half[:0], value[:0], tuple(slot[:0] for slot in held), torch.ones(0))
    new, kept = blend(update, start, slots, [idle, mine])
    for column, after, before in zip((new, *kept), (value, *held), (start, *slots), strict=True):
        assert torch.equal(column[half], after[half])
        assert torch.equal(column[ROWS // 2 :], before[ROWS // 2 :])


@pytest.mark.parametrize("kind", ["adagrad", "adam", "ftrl", "sgd"])
def test_ranks_that_have_done_the_same_change_nothing_by_meeting(kind: Any) -> None:
    update = build_update(Optimizer(kind=kind), 0.3)
    start = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    slots = update.slots(start)
    value, held = update.step(start, torch.cos(start), slots)
    every = Share(torch.arange(ROWS), value, held, torch.full((ROWS,), 3))
    new, kept = blend(update, start, slots, [every, every, every])
    for column, after in zip((new, *kept), (value, *held), strict=True):
        torch.testing.assert_close(column, after, rtol=1e-5, atol=1e-6)


def test_ftrls_weight_follows_from_its_slots_after_ranks_have_met() -> None:
    update = build_update(Optimizer(kind="ftrl", l1=0.05), 0.3)
    start = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
    slots = update.slots(start)
    shares = []
    for rank in range(3):
        value, held = update.step(start, torch.sin(start * (rank + 2)), slots)
        shares.append(Share(torch.arange(ROWS), value, held, torch.full((ROWS,), rank + 1)))
    new, (z, n) = blend(update, start, slots, shares)
    again, _ = update.step(new, torch.zeros_like(new), (z, n))
    torch.testing.assert_close(again, new, rtol=1e-5, atol=1e-6)
