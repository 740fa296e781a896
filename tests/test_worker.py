"""The loop: one prediction per event, in stream order, and a defined fate for everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from connectors import memory
from streamcl.config import Config
from streamcl.protocols import ConnectorError, StreamclError
from streamcl.records import EVENTS, LABELS, Fate, Stream, Turn
from streamcl.state import digest
from streamcl.worker import Worker, build
from tests.journey import BROKER, Item, click, fill, settings, view

NO_DRIFT = {"detector": "none"}


def inline(folder: Path, **changes: Any) -> Config:
    """A worker whose labels stand in the events."""
    events = {"url": f"memory://{BROKER}/views", "id": "id", "key": "user", "time": "ts", "label": "clicked"}
    return settings(folder, **{"labels": None, "events": events, **changes})


def run(config: Config) -> tuple[Worker, list[Turn]]:
    worker = build(config)
    if worker.control:
        worker.control.open()
    worker.progress.position = dict(worker.source.seek({}))
    turns = list(worker.run())
    worker.flush()
    return worker, turns


def letters() -> list[dict[str, str]]:
    """The headers of each dead letter."""
    found = memory.broker(BROKER).messages("shop-dead-letters")
    return [{k.removeprefix("streamcl-"): v.decode() for k, v in m.headers} for m in found]


def test_each_event_is_answered_once_with_its_key_and_origin(tmp_path: Path) -> None:
    fill([view(id, float(id), clicked=1) for id in range(12)])
    worker, _ = run(inline(tmp_path))
    sent = memory.broker(BROKER).messages("scores")
    assert [dict(m.headers)["streamcl-input"].decode() for m in sent] == [f"events:0:{i}" for i in range(12)]
    assert [m.key for m in sent] == [str(i % 5).encode() for i in range(12)]
    assert [json.loads(m.value or b"")["version"] for m in sent] == list(range(12))
    assert worker.counts == {"predicted": 12, "inline": 12, "learned": 12}


def test_a_prediction_sees_every_earlier_label_and_no_later_one(tmp_path: Path) -> None:
    def scores(labels: list[int]) -> list[float]:
        fill([view(id, float(id), clicked=y) for id, y in enumerate(labels)])
        run(inline(tmp_path))
        return [json.loads(m.value or b"")["score"] for m in memory.broker(BROKER).messages("scores")]

    one, other = scores([1, 0, 1, 0, 1, 1]), scores([1, 0, 1, 1, 1, 1])
    assert one[:4] == other[:4]
    assert one[4] != other[4]


def test_learning_uses_the_features_and_scores_of_prediction_time(tmp_path: Path) -> None:
    fill([view(0, 0.0, price=5.0), *[view(i, float(i), price=100.0) for i in range(1, 8)], click(0, 8.0)])
    worker, turns = run(settings(tmp_path, worker={"max_records": 1, "poll_timeout_s": 0.01}))
    [outcome] = [o for turn in turns for o in turn.outcomes if o.fate == Fate.JOINED]
    assert outcome.ticket.features.dense[0] == 5.0
    assert outcome.ticket.scores.version == 0
    assert outcome.delay_s == 8.0
    assert worker.learner.version == 1


def test_an_event_without_its_inline_label_is_answered_and_counted(tmp_path: Path) -> None:
    fill([view(0, 0.0, clicked=1), view(1, 1.0), view(2, 2.0, clicked=None)])
    worker, _ = run(inline(tmp_path))
    assert worker.counts == {"predicted": 3, "inline": 1, "learned": 1, "unlabelled": 2}


def raw(value: bytes) -> Item:
    return Item("views", value, 5.0)


def event(**fields: Any) -> Item:
    payload = {"id": "x", "ts": 5.0, "user": 1, "price": 1.0, "clicked": 1, **fields}
    return raw(json.dumps({k: v for k, v in payload.items() if v != "absent"}).encode())


BAD: list[tuple[Item, str, str]] = [
    (raw(b'{"id": "x", "ts": 5.0, "us'), "undecodable", "byte"),
    (raw(b"[1, 2]"), "undecodable", "object"),
    (raw(b"\xff\xfe{}"), "undecodable", ""),
    (raw(b'{"id": "x", "ts": 5.0, "user": 1, "price": NaN}'), "non_finite", ""),
    (event(id="absent"), "schema", "'id'"),
    (event(id=""), "schema", "'id'"),
    (event(id=[1]), "schema", "'id'"),
    (event(ts="absent"), "schema", "'ts'"),
    (event(ts="noon"), "schema", "'ts'"),
    (event(ts=4.1e9), "future", "'ts'"),
    (event(price="cheap"), "schema", "'price'"),
    (event(price=True), "schema", "'price'"),
    (event(price=1e300), "non_finite", "'price'"),
    (event(user={"a": 1}), "schema", "'user'"),
    (event(user=1.5), "schema", "'user'"),
    (event(clicked=2), "schema", "'clicked'"),
    (event(clicked="yes"), "schema", "'clicked'"),
    (event(blob="x" * 10_000_000), "too_large", "bytes"),
]


@pytest.mark.parametrize(("bad", "reason", "named"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_event_goes_to_the_dead_letters_and_the_stream_goes_on(
    tmp_path: Path, bad: Item, reason: str, named: str
) -> None:
    fill([view(0, 4.0, clicked=1), bad, view(1, 6.0, clicked=0)])
    worker, turns = run(inline(tmp_path))
    [letter] = letters()
    assert letter["reason"] == reason
    assert named in letter["error"]
    assert (letter["topic"], letter["partition"], letter["offset"]) == ("views", "0", "1")
    assert worker.counts["dead_letter"] == 1
    assert worker.counts["learned"] == 2
    assert sum(turn.counts.get("dead_letter", 0) for turn in turns) == 1


def test_the_dead_letter_carries_the_original_bytes_and_a_huge_one_a_stub(tmp_path: Path) -> None:
    fill([raw(b"{broken"), event(blob="x" * 2_000_000)])
    run(inline(tmp_path))
    broken, huge = memory.broker(BROKER).messages("shop-dead-letters")
    assert broken.value == b"{broken"
    assert json.loads(huge.value or b"")["bytes"] > 2_000_000


def test_a_prediction_that_its_destination_refuses_becomes_a_dead_letter_that_a_flush_makes_durable(
    tmp_path: Path,
) -> None:
    fill([view(id, float(id), clicked=1) for id in range(3)])
    worker, _ = run(inline(tmp_path))
    sink, refused = worker.outlets.predictions, memory.broker(BROKER).messages("scores")[1]
    assert sink is not None and sink.rejected is not None
    assert letters() == []
    flush, told = sink.flush, sink.rejected

    def refusing() -> None:
        told(refused, "InvalidRecord: not to my taste")
        flush()

    sink.flush = refusing  # type: ignore[method-assign]  # the destination tells while it is waited for
    worker.flush()
    [letter] = letters()
    assert letter["reason"] == "rejected_by_broker"
    assert letter["error"] == "InvalidRecord: not to my taste"
    assert letter["input"] == "events:0:1"


def test_an_error_never_shows_a_value(tmp_path: Path) -> None:
    fill([event(price="secret-4711"), event(user=["secret-4711"]), event(id={"secret-4711": 1})])
    run(inline(tmp_path))
    assert len(letters()) == 3
    assert "4711" not in json.dumps(letters())


@pytest.mark.parametrize(("policy", "learned"), [("ignore", 1), ("dead_letter", 0)])
def test_unknown_fields_are_ignored_or_dead_letters_as_configured(tmp_path: Path, policy: str, learned: int) -> None:
    fill([event(colour="red")])
    config = inline(tmp_path)
    config = config.model_copy(update={"events": config.events.model_copy(update={"unknown_fields": policy})})
    worker, _ = run(config)
    assert worker.counts["learned"] == learned
    assert [letter["error"] for letter in letters()] == ["unknown field 'colour'"] * (1 - learned)


def test_a_million_new_categories_take_no_more_memory_and_stop_nothing(tmp_path: Path) -> None:
    worker = build(inline(tmp_path))
    encode = worker.decoder.featurizer.encode
    rows = {int(encode({"user": f"new-{i}"}).ids[0]) for i in range(1_000_000)}
    assert rows == set(range(1, 14))  # 13 buckets; row 0 stands for a missing value
    assert worker.learner.engine.table.shape[0] == 14  # type: ignore[union-attr]


def test_time_that_goes_backwards_changes_no_watermark_and_loses_no_event(tmp_path: Path) -> None:
    times = [100.0, 50.0, 101.0, 3.0, 102.0]
    fill([view(i, t) for i, t in enumerate(times)] + [click(1, 103.0)])
    worker, _ = run(settings(tmp_path, join={"attribution_window_s": 60.0}))
    assert worker.counts["predicted"] == 5
    assert worker.counts["joined"] == 1
    assert worker.readings()["watermark_s"] == 102.0  # the slower of the two streams


def test_a_repeated_event_id_is_a_dead_letter_not_a_second_prediction(tmp_path: Path) -> None:
    fill([view(0, 0.0), view(0, 1.0), click(0, 2.0)])
    worker, _ = run(settings(tmp_path))
    assert worker.counts == {"predicted": 1, "joined": 1, "learned": 1, "dead_letter": 1}
    assert letters()[0]["reason"] == "duplicate_ticket"


def test_a_label_that_would_blow_up_the_weights_is_quarantined(tmp_path: Path) -> None:
    config = inline(tmp_path, optimizer={"max_grad_norm": 1e-9})
    fill([view(0, 0.0, clicked=1)])
    worker, _ = run(config)
    assert worker.counts == {"predicted": 1, "inline": 1, "quarantined": 1}
    assert letters()[0]["reason"] == "quarantined_label"
    fresh = build(config)
    assert digest(worker.learner.state_dict()) == digest(fresh.learner.state_dict())


def test_a_stream_that_is_mostly_bad_stops_the_worker_with_the_last_reason(tmp_path: Path) -> None:
    fill([view(i, 1.0, clicked=1) for i in range(499)] + [raw(b"{")] * 501)
    with pytest.raises(StreamclError, match=r"501 of the last 1000 records were bad.*topic views.*"):
        run(inline(tmp_path))


def test_a_record_delivered_again_is_an_error_not_a_second_lesson(tmp_path: Path) -> None:
    fill([view(i, float(i), clicked=1) for i in range(3)])
    worker, _ = run(inline(tmp_path))
    worker.source.seek({Stream(EVENTS, 0): 1})
    with pytest.raises(ConnectorError, match="events:0:1 was delivered again; expected offset 3"):
        worker.turn(worker.source.poll(1, 0.01))


def test_turns_of_nothing_are_yielded_so_that_health_can_see_the_loop_turn(tmp_path: Path) -> None:
    fill([view(0, 0.0, clicked=1)])
    memory.broker(BROKER).finished = False
    worker = build(inline(tmp_path))
    turns = worker.run()
    assert next(turns).records == 1
    assert next(turns).records == 0
    worker.stop()
    assert list(turns) == []


def test_stop_ends_the_loop_after_the_turn_under_way(tmp_path: Path) -> None:
    fill([view(i, float(i), clicked=1) for i in range(20)])
    worker = build(inline(tmp_path))
    for turn in worker.run():
        assert turn.records == 5
        worker.stop()
    assert worker.progress.records == 5


def test_the_order_of_several_inputs_is_logged_before_anything_leaves(tmp_path: Path) -> None:
    fill([view(0, 0.0), click(0, 1.0), view(1, 2.0)], partitions=2)
    config = settings(tmp_path)
    worker = build(config)
    assert worker.control is not None
    worker.control.open()
    sent: list[int] = []
    control, send = worker.control, worker.outlets.send

    def sending(turn: Turn) -> None:
        sent.append(len(list(control.read(0))))
        send(turn)

    worker.outlets.send = sending  # type: ignore[method-assign]
    worker.progress.position = dict(worker.source.seek({}))
    list(worker.run())
    assert sent[0] == 1
    [(_, order)] = list(worker.control.read(0))
    assert [tuple(run) for run in order.runs] == [
        (Stream(EVENTS, 0), 1),
        (Stream(LABELS, 0), 1),
        (Stream(EVENTS, 0), 1),
    ]
    assert order.position == worker.progress.position


@pytest.mark.parametrize(
    ("task", "label", "check"),
    [
        ("multiclass", lambda i: i % 3, lambda s: len(s["score"]) == 3 and abs(sum(s["score"]) - 1) < 1e-6),
        ("regression", lambda i: 40.0 + i % 3, lambda s: isinstance(s["score"], float)),
    ],
)
def test_multiclass_and_regression_make_the_same_journey(
    tmp_path: Path, task: str, label: Callable[[int], float], check: Callable[[dict[str, Any]], bool]
) -> None:
    fill([view(i, float(i), clicked=label(i)) for i in range(200)])
    model = {"kind": "mlp", "embedding_dim": 2, "hidden": [8], "classes": 3}
    worker, _ = run(inline(tmp_path, task=task, model=model))
    sent = [json.loads(m.value or b"") for m in memory.broker(BROKER).messages("scores")]
    assert all(check(s) for s in sent)
    assert worker.counts["learned"] == 200
    name = "accuracy" if task == "multiclass" else "mae"
    assert np.isfinite(worker.readings()[name])


def test_a_river_model_can_stand_in_the_worker(tmp_path: Path) -> None:
    fill([view(i, float(i), clicked=i % 2) for i in range(50)])
    config = inline(tmp_path, river="river.linear_model:LogisticRegression", trust_pickle=True)
    worker, _ = run(config)
    assert worker.counts["learned"] == 50
    again = build(config)
    again.load_state_dict(worker.state_dict())
    features = worker.decoder.featurizer.encode({"user": 1, "price": 2.0})
    assert again.learner.predict(features).served == worker.learner.predict(features).served


def test_what_a_connector_counts_is_among_the_readings(tmp_path: Path) -> None:
    fill([view(1, 1.0)])
    worker = build(settings(tmp_path))
    vars(worker.source)["retries"] = 3
    readings = worker.readings()
    assert readings["source_retries"] == 3.0
    assert "sink_rebuilds" not in readings  # topics in memory have no producer
