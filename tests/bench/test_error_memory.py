import math
from dataclasses import replace

import numpy as np
import pytest

from streamcl.bench import error_memory, error_memory_cost, run
from streamcl.bench.error_memory import BEDS, FULL, QUICK, Findings
from streamcl.bench.error_memory_agreement import kernel_mean, rmse_and_correlation
from streamcl.bench.error_memory_cost import LIMITS_US, Case, cases, microseconds
from streamcl.bench.error_memory_quality import KNN, SKETCH, Plan, Variant, forms, measure
from streamcl.bench.error_memory_serving import (
    MODES,
    Setting,
    Stream,
    config_of,
    know,
    put_right,
    put_right_by_choice,
    record,
    spans,
)
from streamcl.bench.options import OptionError, Options
from streamcl.bench.streams import LABEL, TIME, DataError, Dataset
from streamcl.learner import Learner
from streamcl.memory.compensation import Choice
from streamcl.records import Scores
from tests.bench.test_report import assert_contract

BASE = {"model": {"kind": "deepfm", "embedding_dim": 4, "hidden": [8]}, "optimizer": {"learning_rate": 0.1}}
SYNC = Setting("sync every 200")


def clicks(events: int = 120, impression: int = 1) -> Dataset:
    rng = np.random.default_rng(0)
    users, items, labels = (rng.integers(0, n, events) for n in (9, 13, 2))
    payloads = [
        {"user": str(user), "item": str(item), TIME: float(i), LABEL: int(label)}
        for i, (user, item, label) in enumerate(zip(users, items, labels, strict=True))
    ]
    return Dataset("ml-100k", {"user": "categorical", "item": "categorical"}, payloads, impression=impression)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are renewed often enough for streams this short."""
    monkeypatch.setitem(MODES, SYNC.mode, 15)


def through_learners(stream: Stream, setting: Setting, memories: list[dict[str, object]]) -> list[Scores]:
    """A live learner and a copy of it that serves: what the bench does without either."""
    live = Learner(config_of(stream.data, BASE))
    copy = Learner(config_of(stream.data, {**BASE, "error_memory": memories}))
    for event in range(stream.start):
        live.learn(stream.outcome(event))
    said: list[Scores] = []
    learned = stream.start
    for event in range(stream.start, len(stream.features)):
        for known in range(learned, stream.known(event, setting.delay)):
            scores = said[known - stream.start]
            copy.recall.observe(scores, float(stream.labels[known]))
            live.learn(stream.outcome(known, scores))
            learned = known + 1
        if (event - stream.start) % setting.every == 0 and copy.version != live.version:
            copy.engine.load_state_dict(live.engine.state_dict())
            copy.version = live.version
            copy.recall.renew(live.version)
        said.append(copy.predict(stream.features[event]))
    return said


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("delay", [0, 7, 40])
@pytest.mark.parametrize("impression", [1, 5])
def test_what_is_recorded_and_compensated_is_what_learners_serve(delay: int, impression: int) -> None:
    stream, setting = Stream.of(clicks(impression=impression)), Setting(SYNC.mode, delay)
    key, knn = {"kind": "key", "key": "user"}, {"kind": "knn", "gamma": 1}
    said = through_learners(stream, setting, [{**key, "lambda": 0.5}, knn])
    served = record(stream, BASE, [setting])[setting]
    first = put_right(know(stream, setting, served, key, 0), 0, 0.5)
    found = know(stream, setting, served.behind(first), knn, 0)
    scores, strengths = put_right_by_choice(stream, setting, found, knn, 1)
    np.testing.assert_allclose(scores, [each.served[0] for each in said], atol=1e-6)
    np.testing.assert_allclose(found.label_mean, [each.recalled[1].label_mean[0] for each in said], atol=1e-5)
    assert delay or strengths.max() > 0.0
    assert served.version.tolist() == [each.version for each in said]
    assert len(set(served.version.tolist())) > 1 or delay == 40
    assert (found.support > 0).any() or delay == 40  # labels later than the next refresh are not taken


@pytest.mark.usefixtures("often")
def test_a_replica_s_memory_is_of_its_own_weights_however_late_the_labels_come() -> None:
    stream, setting = Stream.of(clicks()), Setting(SYNC.mode, 20)  # later than the next refresh
    asked = replace(setting, asked=True)
    served = record(stream, BASE, [setting, asked])
    found = know(stream, setting, served[setting], {"kind": "knn"}, 0, served[asked])
    live = Learner(config_of(stream.data, BASE))
    copy = Learner(config_of(stream.data, {**BASE, "error_memory": [{"kind": "knn", "lambda": 0.5}]}))
    for event in range(stream.start):
        live.learn(stream.outcome(event))
    learned, said = stream.start, []
    for event in range(stream.start, len(stream.features)):
        for known in range(learned, stream.known(event, setting.delay)):
            copy.recall.observe(copy.predict(stream.features[known]), float(stream.labels[known]))
            live.learn(stream.outcome(known))
            learned = known + 1
        if (event - stream.start) % setting.every == 0 and copy.version != live.version:
            copy.engine.load_state_dict(live.engine.state_dict())
            copy.version = live.version
            copy.recall.renew(live.version)
        said.append(float(copy.predict(stream.features[event]).served[0]))
    np.testing.assert_allclose(put_right(found, 0, 0.5), said, atol=1e-6)
    stale = know(stream, setting, served[setting], {"kind": "knn"}, 0)
    assert (found.support > 0).sum() > (stale.support > 0).sum()


@pytest.mark.parametrize("gamma", [0, 1])
def test_a_fixed_lambda_puts_right_as_the_product_does(gamma: int) -> None:
    stream = Stream.of(clicks())
    known = know(stream, SYNC, record(stream, BASE, [SYNC])[SYNC], {"kind": "sketch", "bits": 3}, 0)
    choice = Choice((float(gamma),), (0.3,), 1.0, "binary")
    assert put_right(known, gamma, 0.3).astype(np.float32).tolist() == [choice.serve(r)[0] for r in known.recalled]
    assert put_right(known, gamma, 0.0).tolist() == known.given.tolist()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("delay", [0, 7, 1000])
def test_every_event_is_served_once_by_weights_that_know_what_stands_before_it(mode: str, delay: int) -> None:
    stream, setting = Stream.of(clicks(impression=5)), Setting(mode, delay)
    covered: list[int] = []
    for weights, first, last in spans(stream, setting):
        covered += range(first, last)
        assert weights == (stream.known(first, delay) if setting.every else stream.start)
        assert stream.start <= weights <= max(stream.start, first - delay)
    assert covered == list(range(60, 120))


@pytest.mark.usefixtures("often")
def test_a_label_changes_no_base_score_given_before_it() -> None:
    data = clicks()
    changed = [
        {**payload, LABEL: 1 - payload[LABEL] if i == 90 else payload[LABEL]} for i, payload in enumerate(data.payloads)
    ]
    wanted = [Setting("per event"), SYNC]
    one, two = (record(Stream.of(each), BASE, wanted) for each in (data, replace(data, payloads=changed)))
    for setting, first in zip(wanted, (31, 45), strict=True):  # 60 train; refreshed at 60, 75, 90, 105
        base = [each[setting].base[:, 0] for each in (one, two)]
        assert base[0][:first].tolist() == base[1][:first].tolist()
        assert base[0][first:].tolist() != base[1][first:].tolist()


def test_what_is_judged_has_no_say_in_lambda() -> None:
    data = clicks()
    flipped = [{**payload, LABEL: int(i >= 90) ^ int(payload[LABEL])} for i, payload in enumerate(data.payloads)]
    plan = Plan(("frozen",))
    one, two = (
        measure(Stream.of(each), BEDS["ml-100k"], plan, 0).figures for each in (data, replace(data, payloads=flipped))
    )
    chosen = [variant for variant in one if variant.strength == "chosen"]
    assert len(chosen) == 8
    assert [one[variant]["lambda"] for variant in chosen] == [two[variant]["lambda"] for variant in chosen]
    assert [one[variant]["auc"] for variant in chosen] != [two[variant]["auc"] for variant in chosen]


PLAN = Plan(("per event", "sync every 2,000"), (SYNC.mode,), (10,))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_memory, "recorded", lambda *_: clicks())
    monkeypatch.setattr(error_memory_cost, "microseconds", lambda _: 1.0)
    monkeypatch.setitem(MODES, "sync every 2,000", 20)
    for name, size in (("QUICK", QUICK), ("FULL", FULL)):
        small = replace(size, streams=("ml-100k",), events=None, plan=PLAN, seeds=1, rows=(10,))
        monkeypatch.setattr(error_memory, name, small)


@pytest.mark.usefixtures("tiny", "often")
def test_the_report_has_every_form_beside_none_and_the_same_bars_quick_and_full() -> None:
    quick, full = (run("error-memory", Options(quick=each)) for each in (True, False))
    assert_contract(quick.to_json())
    assert [bar.name for bar in quick.bars] == [bar.name for bar in full.bars]
    names = [row.name for row in quick.rows]
    for form in forms(BEDS["ml-100k"]):
        assert f"ml-100k: sync every 2,000, {form}, gamma 0, lambda auto" in names
    assert f"ml-100k: {SYNC.mode}, {KNN}, gamma 0, lambda chosen, never reset, labels 10 late" in names
    none = next(row for row in quick.rows if row.name == "ml-100k: sync every 2,000, none")
    assert none.values.keys() == {"auc", "gauc", "log_loss", "calibration", "ece"}
    knn = next(row for row in quick.rows if row.name == f"ml-100k: sync every 2,000, {KNN}, gamma 1, lambda chosen")
    assert knn.values["d_auc"] == pytest.approx(float(str(knn.values["auc"])) - float(str(none.values["auc"])))
    assert math.isnan(float(str(knn.values["p_auc"])))  # one seed tells nothing of chance
    assert [curve.name for curve in quick.curves] == ["key user", "key item", KNN, SKETCH, "key user + kNN"]


@pytest.mark.usefixtures("tiny", "often")
@pytest.mark.parametrize("task", ["quality", "agreement", "cost"])
def test_one_task_can_be_asked_for(task: str) -> None:
    report = run("error-memory", Options(quick=True, task=task))
    assert report.bars
    agreeing = [bar.name.startswith("agreement: rmse") for bar in report.bars]
    assert any(agreeing) == (task == "agreement")
    assert any(bar.name.startswith("cost") for bar in report.bars) == (task == "cost")
    assert any(bar.name.startswith("base auc") for bar in report.bars) == (task == "quality")


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(DataError, match="--data DIR must name the folder that holds ml-100k"):
        run("error-memory", Options(task="quality", stream="ml-100k"))
    with pytest.raises(OptionError, match="--task: 'speed' is none of all, quality, agreement, cost"):
        run("error-memory", Options(task="speed"))


@pytest.mark.usefixtures("often")
def test_seeds_are_paired_and_the_worst_mode_counts() -> None:
    stream = Stream.of(clicks())
    found = Findings(BEDS["ml-100k"], QUICK, [measure(stream, BEDS["ml-100k"], PLAN, seed) for seed in (0, 1)])
    autos = [Variant(Setting(mode), SKETCH, gamma, "auto") for mode in PLAN.modes for gamma in (0, 1)]
    worst = min(float(found.gains(variant, "auc").mean()) for variant in autos)
    assert worst in [bar.value for bar in found.auto_bars("") if f"auc of {SKETCH} -" in bar.name]
    assert found.row("x", autos[0]).values["sd_auc"] == pytest.approx(
        float(np.std(found.gains(autos[0], "auc"), ddof=1))
    )


def test_the_kernel_is_the_chance_that_all_bits_agree() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    got = kernel_mean(np.array([[2.0, 0.0]]), rows, np.array([1.0, 0.0, 0.0]), bits=2)
    assert got == pytest.approx([1.0 / (1.0 + 0.25)])


def test_more_arrays_come_nearer_to_the_kernel() -> None:
    few, many = (rmse_and_correlation(4, arrays, 0) for arrays in (5, 80))
    assert many[0] < 0.5 * few[0]
    assert many[1] > few[1]


def test_every_limit_of_the_cost_has_its_case_and_a_case_is_timed() -> None:
    assert LIMITS_US.keys() <= {case.name for case in cases((10,))}
    assert microseconds(Case("kNN", {"kind": "knn", "capacity": 50}, 4, 50)) > 0.0
