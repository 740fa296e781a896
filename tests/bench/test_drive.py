import numpy as np
import pytest

from connectors.codec import JSON
from streamcl.bench.drive import Incomplete, Topic
from streamcl.bench.streams import LABEL, TIME, Dataset, synthetic
from streamcl.decode import Decoder
from streamcl.learner import Learner
from streamcl.records import Fate, Origin, Outcome, Record, Ticket

SMALL = {"model": {"embedding_dim": 2, "hidden": [4]}}


def by_hand(topic: Topic) -> list[float]:
    """Oracle: decode, predict, learn; no worker."""
    config = topic.config(SMALL)
    decoder, learner, scores = Decoder(config, JSON()), Learner(config), []
    for offset, value in enumerate(topic.data.messages()):
        event = decoder.decode(Record(Origin("events", 0, offset), "t", float(offset), value))
        said = learner.predict(event.features)  # type: ignore[union-attr]
        scores.append(float(said.served[0]))
        ticket = Ticket(str(offset), float(offset), event.features, said, event.origin)  # type: ignore[union-attr]
        assert learner.learn(Outcome(ticket, event.label, Fate.INLINE, 0.0))  # type: ignore[union-attr, arg-type]
    return scores


def test_the_workers_scores_are_those_of_a_plain_loop() -> None:
    topic = Topic(synthetic("drifting", 60, 0))
    trace = topic.run("ours", SMALL)
    assert trace.name == "ours"
    assert trace.scores.tolist() == by_hand(topic)
    assert trace.cpu_s > 0


def test_a_topic_can_be_run_again_and_publishing_changes_nothing() -> None:
    topic = Topic(synthetic("drifting", 30, 0))
    first, second = topic.run("a", SMALL), topic.run("b", SMALL, publish=True)
    assert np.array_equal(first.scores, second.scores)


def test_an_event_that_is_refused_spoils_the_run() -> None:
    payloads = [{"a": "1", TIME: 0.0, LABEL: 1}, {"a": [], TIME: 1.0, LABEL: 0}]
    with pytest.raises(Incomplete, match="2 events, but the worker counted"):
        Topic(Dataset("bad", {"a": "categorical"}, payloads)).run("x", SMALL)
