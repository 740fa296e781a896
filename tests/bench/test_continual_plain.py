import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamcl.bench.continual_plain import GEM_MEMORY, MARGIN, PLAIN, Gem, Plain, dual, projected
from streamcl.bench.continual_run import measure
from tests.bench.continual_data import tiny_course


def test_plain_replay_keeps_what_it_learned() -> None:
    course = tiny_course(0)
    # who knows nothing but the last two classes is right in 20 per cent
    assert measure(course, PLAIN["plain torch er"](course, 0)).figures["final"] > 40.0


def test_a_batch_is_learned_from_when_it_is_full_and_the_rest_at_the_end() -> None:
    course = tiny_course(0)
    contender = Plain(course, 0, batch=7)
    steps: list[int] = []
    contender.step = lambda live: steps.append(len(live))  # type: ignore[method-assign]
    for i in range(len(course.rows)):
        contender.learn(i)
    assert steps[:-1] == [7] * (len(course.rows) // 7)
    assert sum(steps) == len(course.rows)
    assert len(contender.kept) == course.memory["capacity"]
    assert len(set(contender.kept)) == len(contender.kept)


def test_a_masked_loss_lets_only_the_classes_of_the_batch_compete() -> None:
    contender = Plain(tiny_course(0), 0, batch=2, masked=True)
    places = [0, 1]
    y = contender.y[places]
    present = torch.tensor(sorted(set(y.tolist())))
    logits = contender.net(contender.x[places])[:, present]
    expected = torch.nn.functional.cross_entropy(logits, torch.searchsorted(present, y))
    assert float(contender.loss(places, masked=True).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_a_projected_gradient_raises_the_loss_of_no_past_task(tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    past, gradient = rng.normal(size=(tasks, 12)), rng.normal(size=12)
    v = dual(past @ past.T, past @ gradient)
    assert (v >= 0).all()
    # the ridge of 1e-6 lets products fall short by about 1e-6 of the sizes at hand
    assert (past @ (gradient + v @ past) > -1e-3).all()


def test_a_gradient_that_harms_nobody_is_left_as_it_is_and_another_gets_the_margin() -> None:
    past = torch.tensor([[1.0, 0.0]])
    assert torch.equal(projected(torch.tensor([1.0, 2.0]), past), torch.tensor([1.0, 2.0]))
    found = projected(torch.tensor([-1.0, 2.0]), past)
    torch.testing.assert_close(found, torch.tensor([MARGIN, 2.0]), atol=1e-4, rtol=0)


def test_gem_remembers_the_last_examples_of_each_task_before() -> None:
    course = tiny_course(0)
    contender = Gem(course, 0, batch=10)
    assert contender.tasks(before=0) == []
    for segment, places in enumerate(contender.tasks(before=3)):
        own = np.flatnonzero(course.segments == segment)
        assert places == own[-GEM_MEMORY:].tolist()


def test_gem_is_torchs_sgd_while_there_is_no_task_before() -> None:
    course = tiny_course(0)
    gem, plain = Gem(course, 0, batch=10), Plain(course, 0, batch=10)
    live = list(range(10))
    gem.step(live)
    plain.step(live)
    for one, other in zip(gem.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(one, other)
