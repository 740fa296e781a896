import torch

from streamcl.learner import Learner
from streamcl.records import EVENTS, Origin, Signal
from streamcl.state import digest, flatten, unflatten
from tests.continual.rows import config
from tests.test_learner import learned, stream

BOUNDARY = Signal("boundary", "segment", Origin(EVENTS, 0, 0))


def test_previous_weights_are_those_of_the_last_boundary_and_teach_nothing_before() -> None:
    made, outcomes = config(plugins=["previous"]), stream("binary", 20)
    learner = learned(made, outcomes[:10])
    previous = learner.engine.sets["previous"]
    assert not previous.ready
    then = learner.engine.dense.flat.clone(), learner.engine.table.clone()
    assert learner.learn(outcomes[10], [BOUNDARY])
    for item in outcomes[11:]:
        learner.learn(item, [Signal("drift", "adwin", Origin(EVENTS, 0, 0))])
    assert previous.ready
    assert torch.equal(previous.flat, then[0])
    assert torch.equal(previous.table, then[1])


def test_previous_weights_are_resumed_and_an_empty_state_has_none() -> None:
    made, outcomes = config(plugins=["previous"]), stream("binary", 20)
    learner = learned(made, outcomes[:10])
    learner.learn(outcomes[10], [BOUNDARY])
    used = learned(made, outcomes[5:15])
    used.load_state_dict(unflatten(*flatten(learner.state_dict())))
    for item in outcomes[11:]:
        assert learner.learn(item)
        assert used.learn(item)
    assert digest(used.state_dict()) == digest(learner.state_dict())
    fresh = Learner(made)
    fresh.learn(outcomes[0], [BOUNDARY])
    fresh.plugins["previous"].load_state_dict({})
    assert not fresh.engine.sets["previous"].ready
