import pytest
import torch
from torch import nn

from streamcl.engine.dense import Dense
from streamcl.engine.optimizers import build_update
from streamcl.state import digest
from streamcl.stations import Optimizer

KINDS = ["sgd", "adagrad", "adam", "ftrl"]


def dense(kind: str = "sgd", seed: int = 0) -> Dense:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return Dense(net, build_update(Optimizer.model_validate({"kind": kind}), 0.1))


def learn(made: Dense, steps: int, start: int = 0) -> None:
    for i in range(start, start + steps):
        made.step(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(i)))


def test_parameters_lie_end_to_end_and_stay_the_modules_own() -> None:
    made = dense()
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in made.params.values()]), made.flat)
    made.flat.fill_(2.0)
    assert all(bool((p == 2.0).all()) for p in made.params.values())
    assert [made.part(torch.arange(26), name).shape for name in made.params] == [(4, 3), (4,), (2, 4), (2,)]
    assert made.part(torch.arange(26), "2.weight").tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_slices_made_anew_are_as_if_they_had_never_been_learned(kind: str, dim: int) -> None:
    made = dense(kind)
    learn(made, 5)
    before = [made.flat.clone(), *(slot.clone() for slot in made.slots)]
    index = torch.tensor([1])
    fresh = torch.full((1, 4) if dim == 0 else (2, 1), 0.3)
    made.renew("2.weight", index, fresh, dim)
    touched = made.part(torch.zeros(26), "2.weight").index_fill(dim, index, 1.0).reshape(-1)
    mask = torch.zeros(26, dtype=torch.bool)
    mask[16:24] = touched.bool()
    after = [made.flat, *made.slots]
    assert all(torch.equal(a[~mask], b[~mask]) for a, b in zip(after, before, strict=True))
    for column, new in zip(after, (fresh.reshape(-1), *made.update.slots(fresh.reshape(-1))), strict=True):
        assert torch.equal(column[mask], new)


def test_a_linear_layer_behind_a_map_is_cut_by_channel() -> None:
    made = dense()
    made.renew("0.weight", torch.tensor([2]), torch.zeros(2, 1, 2), 1, (2, 3, 2))
    assert made.params["0.weight"].detach().reshape(2, 3, 2)[:, 2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert int((made.params["0.weight"] == 0.0).sum()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_where_it_was(kind: str) -> None:
    made, other = dense(kind), dense(kind, seed=1)
    learn(made, 7)
    other.load_state_dict(made.state_dict())
    for each in (made, other):
        learn(each, 5, 7)
    assert digest(made.state_dict()) == digest(other.state_dict())


def test_a_weight_counts_its_own_steps() -> None:
    """Row and column of a matrix may be made anew at different times: a weight is as old as the younger of the two."""
    made, ages = dense("adam"), torch.zeros(4, 3)
    for i in range(200):
        learn(made, 1, i)
        ages += 1.0
        if i % 7 == 3:
            made.renew("0.weight", torch.tensor([i % 4]), torch.zeros(1, 3))
            ages[i % 4] = 0.0
        if i % 5 == 2:
            made.renew("0.weight", torch.tensor([i % 3]), torch.zeros(4, 1), 1)
            ages[:, i % 3] = 0.0
    assert torch.equal(made.part(made.slots[2], "0.weight"), ages)
