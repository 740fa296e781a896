import numpy as np
import pytest

from streamcl import connect
from streamcl.config import Config
from streamcl.demo.ledger import BEFORE, Alarm, Ledger
from streamcl.demo.simulator import Settings, simulate
from streamcl.metrics.losses import log_losses
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Signal, Stream, Ticket, Turn
from streamcl.worker import Worker

N = 200


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(simulate(Settings(events=N, seed=1)))


@pytest.fixture
def worker() -> Worker:
    config = Config.parse({
        "name": "t", "events": {"url": "memory://t/e", "label": "y"},
        "features": {"user": {"kind": "categorical", "buckets": 8}},
        "model": {"kind": "logistic"},
    })  # fmt: skip
    # The ledger asks it for nothing but its learner.
    return Worker(config, None, connect.codecs(config))  # type: ignore[arg-type]


def _outcome(ledger: Ledger, i: int, score: float = 0.3, version: int = 0) -> Outcome:
    features = Encoded(np.array([1]), np.ones(1, np.float32), np.zeros(0, np.float32))
    scores = Scores(np.zeros(1, np.float32), np.array([score], np.float32), version)
    ticket = Ticket(ledger.simulation.id(i), float(ledger.simulation.time_s[i]), features, scores, Origin(EVENTS, 0, i))
    return Outcome(ticket, float(ledger.simulation.label[i]), Fate.JOINED, 0.0)


def _turn(*outcomes: Outcome, seen: int = 0, alarms: int = 0) -> Turn:
    signals = tuple(Signal("drift", "loss", Origin(EVENTS, 0, 0)) for _ in range(alarms))
    return Turn(len(outcomes), {Stream(EVENTS, 0): seen}, outcomes=outcomes, signals=signals)


def test_only_impressions_without_a_gap_before_them_are_settled(ledger: Ledger, worker: Worker) -> None:
    ledger.observe(_turn(*(_outcome(ledger, i) for i in (0, 1, 2, 4))), worker)
    assert (ledger.settled, ledger.labelled) == (3, 4)
    ledger.observe(_turn(_outcome(ledger, 3)), worker)
    assert ledger.settled == 5


def test_figures_are_those_of_the_outcomes(ledger: Ledger, worker: Worker) -> None:
    scores = np.linspace(0.05, 0.9, N)
    ledger.observe(_turn(*(_outcome(ledger, i, scores[i]) for i in range(N)), seen=N), worker)
    expected = log_losses(ledger.simulation.label, scores).mean()
    figures = ledger.figures()
    assert figures["whole_stream"]["live"]["log_loss"] == pytest.approx(expected, abs=1e-5)
    assert (figures["impressions"], figures["settled"], figures["labels_unlike_truth"]) == (N, N, 0)


def test_the_mean_of_the_curve_is_the_loss_of_the_whole(ledger: Ledger, worker: Worker) -> None:
    ledger.observe(_turn(*(_outcome(ledger, i, 0.1 + 0.004 * i) for i in range(N))), worker)
    assert ledger.curve(10).live.mean() == pytest.approx(log_losses(ledger.label, ledger.live).mean())


def test_a_slice_that_is_not_settled_is_missing_from_the_curve(ledger: Ledger, worker: Worker) -> None:
    ledger.observe(_turn(*(_outcome(ledger, i) for i in range(50))), worker)
    assert np.isfinite(ledger.curve(4).live).tolist() == [True, False, False, False]


def test_a_label_unlike_the_truth_is_counted(ledger: Ledger, worker: Worker) -> None:
    good = _outcome(ledger, 0)
    ledger.observe(_turn(Outcome(good.ticket, 1.0 - good.label, good.fate, 0.0)), worker)
    assert ledger.figures()["labels_unlike_truth"] == 1


def test_nothing_is_defined_before_the_first_outcome(ledger: Ledger) -> None:
    figures = ledger.figures()
    assert set(figures["whole_stream"]["live"].values()) == {None}
    assert figures["click_rate"] is None


def test_the_frozen_model_is_the_live_one_until_it_freezes(ledger: Ledger, worker: Worker) -> None:
    ledger.observe(_turn(*(_outcome(ledger, i, 0.2, version=i) for i in range(30))), worker)
    assert ledger.frozen[:30].tolist() == ledger.live[:30].tolist()


def test_a_frozen_model_no_longer_learns(ledger: Ledger, worker: Worker) -> None:
    outcomes = [_outcome(ledger, i) for i in range(N)]
    for outcome in outcomes[:30]:
        worker.learner.learn(outcome)
    ledger.observe(_turn(*outcomes[:30]), worker)
    frozen_answer = worker.learner.predict(outcomes[0].ticket.features).served[0]
    for outcome in outcomes[30:]:
        worker.learner.learn(outcome)
    ledger.observe(_turn(_outcome(ledger, 30, 0.2, version=31), _outcome(ledger, 31, 0.2, version=12)), worker)
    assert worker.learner.predict(outcomes[0].ticket.features).served[0] != frozen_answer
    assert ledger.frozen[30] == frozen_answer
    assert ledger.frozen[31] == np.float32(0.2)  # served by weights from before the freeze


@pytest.mark.parametrize(
    ("at", "drift", "after"),
    [(50, None, None), (95, "what is popular changes", 5), (130, None, None), (150, "tastes", 0)],
)
def test_an_alarm_is_credited_only_to_a_drift_shortly_before_it(
    ledger: Ledger, worker: Worker, at: int, drift: str | None, after: int | None
) -> None:
    ledger.observe(_turn(seen=at + 1, alarms=1), worker)
    [alarm] = ledger.alarms
    assert (alarm.impression, alarm.after_impressions, alarm.repeat) == (at, after, False)
    assert alarm.drift is None if drift is None else str(alarm.drift).startswith(drift)


def test_a_second_alarm_for_a_drift_is_a_repeat(ledger: Ledger, worker: Worker) -> None:
    for seen in (92, 99):
        ledger.observe(_turn(seen=seen, alarms=1), worker)
    assert [alarm.repeat for alarm in ledger.alarms] == [False, True]
    assert ledger.alarms[0] == Alarm(
        91, ledger.alarms[0].time_s, "what is popular changes", 1, ledger.alarms[0].after_s
    )


def test_before_learning_means_the_first_impressions(worker: Worker) -> None:
    ledger = Ledger(simulate(Settings(events=BEFORE + 100, seed=1)))
    ledger.observe(_turn(*(_outcome(ledger, i) for i in range(BEFORE + 50))), worker)
    assert ledger.before() == slice(0, BEFORE)
    assert ledger.recent(80) == slice(BEFORE - 30, BEFORE + 50)
