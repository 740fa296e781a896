import numpy as np
import pytest
import torch

from streamcl.bench.retrained import DAY_S, DeepFM, retrained_deepfm
from streamcl.bench.streams import LABEL, TIME, Dataset


def days(count: int, each: int, flip_at: int) -> Dataset:
    """The label is the item's; from event `flip_at` on it is the opposite."""
    payloads = [
        {"item": f"i{n % 4}", TIME: (n // each) * DAY_S + n % each, LABEL: int((n % 4 < 2) != (n >= flip_at))}
        for n in range(count * each)
    ]
    return Dataset("days", {"item": "categorical"}, payloads)


def test_a_day_is_scored_by_what_came_before_it_alone() -> None:
    same, flipped = days(4, 40, 10_000), days(4, 40, 120)
    one, other = (retrained_deepfm(data, epochs=20, rate=0.05).scores for data in (same, flipped))
    assert (one[:40] == 0.5).all()
    assert (one == other).all()  # the labels of the last day teach nothing that day
    right = (one[40:] > 0.5) == (same.labels()[40:] > 0)
    assert right.all()


def test_a_value_that_was_not_there_the_day_before_is_unknown() -> None:
    data = days(2, 40, 10_000)
    new = [{**payload, "item": f"new{n}"} if n >= 40 else payload for n, payload in enumerate(data.payloads)]
    scores = retrained_deepfm(Dataset("new", data.features, new), epochs=2).scores
    assert len(np.unique(scores[40:])) == 1


def test_the_sum_over_pairs_is_that_of_all_products() -> None:
    torch.manual_seed(0)
    model = DeepFM([5, 5, 5], 0, 3, [])
    parameters = dict(model.named_parameters())
    torch.nn.init.zeros_(parameters["deep.0.weight"])
    v = [parameters[f"vectors.{f}.weight"][i] for f, i in enumerate((1, 2, 3))]
    expected = v[0] @ v[1] + v[0] @ v[2] + v[1] @ v[2]
    biases = parameters["deep.0.bias"] + parameters["linear.bias"]
    found = model(torch.tensor([[1, 2, 3]]), torch.zeros(1, 0)) - biases
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_a_missing_number_reads_as_the_mean_of_the_days_before() -> None:
    rows = [{"n": float(n % 4), TIME: (n // 40) * DAY_S + n % 40, LABEL: int(n % 4 > 1)} for n in range(80)]
    mean = sum(float(row["n"]) for row in rows[:40]) / 40
    last = [{**rows[-1], "n": mean}, {key: value for key, value in rows[-1].items() if key != "n"}]
    scores = [
        retrained_deepfm(Dataset("numbers", {"n": "numeric"}, [*rows[:-1], row]), epochs=5).scores[-1] for row in last
    ]
    assert scores[0] == scores[1]
