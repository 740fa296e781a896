from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from streamcl.metrics.examples import Examples, rows
from streamcl.records import mark
from tests.metrics.sliced import outcome


def test_columns_are_what_the_outcomes_say() -> None:
    outcomes = [outcome(1.0, 0.25, "a", 3.0), replace(outcome(0.0, 0.5, "", 2.0), drawn=0.5)]
    examples = Examples.of(outcomes)
    assert examples.labels.tolist() == [1.0, 0.0]
    assert examples.served.tolist() == [[0.25], [0.5]]
    assert examples.scores.tolist() == [0.25, 0.5]
    assert examples.weights.tolist() == [each.weight for each in outcomes] == [3.0, 4.0]
    assert examples.owners.tolist() == [mark("a"), 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_has_no_finite_loss_is_left_out(bad: float) -> None:
    examples = Examples.of([outcome(1.0, 0.25, "a"), outcome(0.0, 0.5, "b"), outcome(1.0, 0.75, "c")])
    assert examples.scored([0.5, 0.5, 0.5]) is examples
    left = examples.scored([0.5, bad, 0.5])
    assert left.scores.tolist() == [0.25, 0.75]
    assert [ticket.key for ticket in left.tickets] == ["a", "c"]
    assert left.owners.tolist() == [mark("a"), mark("c")]


def test_rows_are_those_of_an_array_whatever_their_width() -> None:
    served = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    assert np.array_equal(rows(list(served)), served)
