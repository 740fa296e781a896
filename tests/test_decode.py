from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from connectors.codec import JSON
from streamcl.config import Config
from streamcl.decode import MOST_CHARACTERS, Decoder
from streamcl.protocols import BadInput, Seconds
from streamcl.records import EVENTS, LABELS, Event, Label, Origin, Record


def decoder(task: str = "binary", labels: Any = None, **events: Any) -> Decoder:
    plain = {"url": "memory://a/events", "id": "id", "label": "y"}
    config: dict[str, Any] = {
        "name": "t",
        "task": task,
        "events": {**plain, **events},
        "features": {"n": "numeric", "user.name": "categorical"},
        "model": {"classes": 3},
    }
    if labels is not None:
        config["labels"] = {"url": "memory://a/labels", **labels}
    return Decoder(Config.parse(config), JSON())


def record(payload: Any, input: str = EVENTS, key: bytes | None = None, time_s: float = 1000.0) -> Record:
    value = payload if payload is None or isinstance(payload, bytes) else orjson.dumps(payload)
    return Record(Origin(input, 3, 17), "topic", time_s, value, key)


def event(made: Decoder, payload: Mapping[str, Any], **kwargs: Any) -> Event:
    decoded = made.decode(record({"id": "e", **payload}, **kwargs))
    assert isinstance(decoded, Event)
    return decoded


def label(made: Decoder, payload: Mapping[str, Any], **kwargs: Any) -> Label:
    decoded = made.decode(record(payload, LABELS, **kwargs))
    assert isinstance(decoded, Label)
    return decoded


def refusal(made: Decoder, payload: Any, input: str = EVENTS) -> tuple[str, str]:
    with pytest.raises(BadInput) as caught:
        made.decode(record(payload, input))
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    ("payload", "reason", "named"),
    [
        (None, "undecodable", "tombstone"),
        (b"", "undecodable", "not JSON"),
        (b'{"id": "hunter2"', "undecodable", "not JSON"),
        (b'["hunter2"]', "undecodable", "not an object"),
        (b"\xff\xfe", "undecodable", "not UTF-8"),
        (b'{"n": NaN}', "non_finite", "not JSON"),
        (b" " * 2000, "too_large", "2000 bytes; events.max_bytes is 1000"),
        ({}, "schema", "'id'"),
        ({"id": None}, "schema", "'id'"),
        ({"id": ""}, "schema", "'id'"),
        ({"id": ["hunter2"]}, "schema", "'id'"),
        ({"id": 1.5}, "schema", "'id'"),
        ({"id": 1, "n": "hunter2"}, "schema", "'n'"),
        ({"id": 1, "n": 1e39}, "non_finite", "'n'"),
        ({"id": 1, "user": {"name": ["hunter2"]}}, "schema", "'user.name'"),
        ({"id": 1, "key": {"hunter2": 1}}, "schema", "'key'"),
        ({"id": 1, "y": "hunter2"}, "schema", "'y'"),
        ({"id": 1, "y": 0.5}, "schema", "'y'"),
        ({"id": 1, "time": "hunter2"}, "schema", "'time'"),
        ({"id": 1, "time": None}, "schema", "'time'"),
        ({"id": 1, "time": True}, "schema", "'time'"),
        ({"id": 1, "time": 1e300}, "non_finite", "'time'"),
        ({"id": 1, "time": 1000.0 + 61.0}, "future", "'time'"),
        ({"id": 1, "time": 1, "secret": "hunter2"}, "unknown_feature", "'secret'"),
    ],
)
def test_a_bad_event_has_a_reason_and_names_the_field_but_not_the_value(payload: Any, reason: str, named: str) -> None:
    made = decoder(time="time", key="key", max_bytes=1000, max_future_s=60.0, unknown_fields="dead_letter")
    if isinstance(payload, dict) and "time" not in payload:
        payload = {"time": 1, **payload}
    found, text = refusal(made, payload)
    assert found == reason
    assert named in text
    assert "hunter2" not in text
    assert "0.5" not in text


def test_an_unknown_field_with_a_huge_name_makes_a_short_text() -> None:
    reason, text = refusal(decoder(unknown_fields="dead_letter"), {"id": 1, "x" * 100_000: 1})
    assert reason == "unknown_feature"
    assert len(text) < 200


def test_unknown_fields_are_ignored_unless_the_config_says_so() -> None:
    made = decoder()
    assert event(made, {"other": {}}).id == "e"
    assert made.unknown_fields({"id": 1, "y": 1, "n": 1, "user": {}, "other": 1}) == {"other"}


def test_max_bytes_is_the_largest_payload_that_passes() -> None:
    payload = orjson.dumps({"id": "e"})
    assert decoder(max_bytes=len(payload)).decode(record(payload))
    assert refusal(decoder(max_bytes=len(payload) - 1), payload)[0] == "too_large"


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("binary", [0, 1, 0.0, 1.0, True, False], [2, -1, 0.5, "1", [1], 1e39]),
        ("multiclass", [0, 1, 2, 2.0], [3, -1, 1.5, True, "1", 1e39]),
        ("regression", [0, -7.5, 3e38], [True, "1", [1.0], 1e39]),
    ],
)
def test_labels_are_what_their_task_allows(task: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert event(decoder(task), {"y": value}).label == float(value)
        assert label(decoder(task, labels={"label": "y"}), {"id": 1, "y": value}).value == float(value)
    for value in bad:
        assert "'y'" in refusal(decoder(task), {"id": 1, "y": value})[1]
        assert "'y'" in refusal(decoder(task, labels={"label": "y"}), {"id": 1, "y": value}, LABELS)[1]


@pytest.mark.parametrize("payload", [{}, {"y": None}])
def test_an_inline_label_may_be_absent(payload: Any) -> None:
    assert event(decoder(), payload).label is None


def test_a_label_record_without_a_label_takes_the_default_or_is_refused() -> None:
    assert label(decoder(labels={"default": 1}), {"id": 1}).value == 1.0
    assert label(decoder(labels={"default": 1}), {"id": 1, "label": 0}).value == 0.0
    assert refusal(decoder(labels={}), {"id": 1}, LABELS) == ("schema", "field 'label': the label is missing")


def test_a_label_has_an_id_a_time_and_an_origin_of_its_own() -> None:
    made = decoder(labels={"id": "ref.event", "time": "at", "time_unit": "ms"})
    found = label(made, {"ref": {"event": 9}, "label": 1, "at": 5500})
    assert found == Label("9", 1.0, 5.5, Origin(LABELS, 3, 17))
    assert refusal(made, {"label": 1, "at": 1}, LABELS) == ("schema", "field 'ref.event': the id is missing")


def test_times_are_seconds_or_milliseconds_or_the_records_own() -> None:
    assert event(decoder(time="at"), {"at": 12.5}).time_s == 12.5
    assert event(decoder(time="at", time_unit="ms"), {"at": 12_500}).time_s == 12.5
    assert event(decoder(), {"at": 12.5}, time_s=99.0).time_s == 99.0


class Clocked:
    """A codec whose payloads are times of a known unit."""

    def decode(self, value: bytes) -> Mapping[str, Any]:
        return {"id": "e", "at": Seconds(value), "plain": float(value)}

    def encode(self, value: Mapping[str, Any]) -> bytes:
        raise NotImplementedError


def test_a_time_whose_unit_the_codec_knows_is_taken_in_it() -> None:
    for field, seconds in (("at", 12.5), ("plain", 0.0125)):
        made = Decoder(decoder(time=field, time_unit="ms").config, Clocked())
        found = made.decode(record(b"12.5"))
        assert found.time_s == seconds
        assert type(found.time_s) is float


def test_the_future_begins_after_max_future_s_and_the_past_has_no_end() -> None:
    made = decoder(time="at", max_future_s=60.0)
    assert event(made, {"at": 1060.0}).time_s == 1060.0
    assert refusal(made, {"id": 1, "at": 1060.001})[0] == "future"
    assert event(made, {"at": -5}).time_s == -5.0


@pytest.mark.parametrize(("value", "identity"), [("x", "x"), (7, "7"), (0, "0"), (True, "true")])
def test_ids_are_texts(value: Any, identity: str) -> None:
    assert event(decoder(), {"id": value}).id == identity


def test_an_id_or_a_key_that_no_answer_could_carry_is_refused() -> None:
    longest = "x" * MOST_CHARACTERS
    made = decoder(key="user")
    assert event(made, {"id": longest, "user": longest}).id == longest
    for payload, key in (({"id": longest + "x"}, None), ({"user": longest + "x"}, None), ({}, b"x" * 4097)):
        with pytest.raises(BadInput, match=r"4097 characters, at most are 4096") as refused:
            event(made, payload, key=key)
        assert refused.value.reason == "too_large"


def test_without_an_id_field_the_place_in_the_log_is_the_id() -> None:
    assert event(decoder(id=None), {}).id == "events:3:17"


def test_a_segment_is_a_text_that_may_be_absent_and_no_feature() -> None:
    made = decoder(segment="task.id", unknown_fields="dead_letter")
    assert event(made, {"task": {"id": 3}}).segment == "3"
    assert event(made, {"task": {"id": "spring"}}).segment == "spring"
    assert event(made, {"task": {"id": None}}).segment == event(made, {}).segment == event(decoder(), {}).segment == ""
    told, untold = event(made, {"n": 1, "task": {"id": 3}}).features, event(made, {"n": 1}).features
    assert told.dense.tobytes() == untold.dense.tobytes()
    assert told.ids.tobytes() == untold.ids.tobytes()
    assert refusal(made, {"id": 1, "task": {"id": 0.5}}) == (
        "schema",
        "field 'task.id': a category must be a string, integer or boolean, not a fraction",
    )
    assert refusal(made, {"id": 1, "task": {"id": "x" * (MOST_CHARACTERS + 1)}})[0] == "too_large"


def test_the_key_is_the_field_or_else_the_records_key_or_else_the_id() -> None:
    made = decoder(key="user.id")
    assert event(made, {"user": {"id": 5}}, key=b"k").key == "5"
    assert event(made, {}, key=b"k").key == "k"
    assert event(made, {}, key=b"").key == ""
    assert event(made, {}).key == "e"
    assert event(decoder(), {}, key=b"\xff").key == "\ufffd"


class Upper:
    """A codec that no event could be read with: `ID 1`."""

    def decode(self, value: bytes) -> Mapping[str, Any]:
        name, number = value.decode().split()
        return {name.lower(): int(number)}

    def encode(self, value: Mapping[str, Any]) -> bytes:
        raise NotImplementedError


def test_labels_have_a_codec_of_their_own() -> None:
    config = decoder(labels={"default": 1}).config
    made = Decoder(config, JSON(), Upper())
    assert label_of(made, b"ID 9") == "9"
    assert event(made, {}).id == "e"
    assert refusal(made, b"ID 9")[0] == "undecodable"


def label_of(made: Decoder, value: bytes) -> str:
    return made.decode(record(value, LABELS)).id


def test_decoding_twice_gives_the_same() -> None:
    made, payload = decoder(), {"id": "e", "n": 1.5, "user": {"name": "x"}, "y": 1}
    one, two = (event(made, payload) for _ in range(2))
    assert (one.id, one.key, one.time_s, one.origin, one.label) == (two.id, two.key, two.time_s, two.origin, two.label)
    assert [a.tobytes() for a in one.features] == [a.tobytes() for a in two.features]


def test_an_event_keeps_the_texts_that_metrics_tell_it_apart_by() -> None:
    """Those of key and segment it has anyway; what they are read from is no unknown field."""
    data = {
        "name": "t",
        "events": {"url": "memory://a/events", "id": "id", "label": "y", "key": "user", "segment": "task"},
        "features": {"user": "categorical", "device.os": "categorical"},
        "metrics": {"group_by": "user", "segments": ["device.os", "task"], "ranking": {"group_by": "request.id"}},
    }
    made = Decoder(Config.parse(data), JSON())
    payload = {"user": "u", "task": "a", "device": {"os": 7}, "request": {"id": "r"}, "other": 1}
    assert event(made, payload).traits == {"device.os": "7", "request.id": "r"}
    assert event(made, {"user": "u", "device": {"os": None}}).traits == {}
    assert made.unknown_fields(payload) == {"other"}
    assert refusal(made, {"id": "e", "request": {"id": ["hunter2"]}}) == (
        "schema",
        "field 'request.id': a category must be a string, integer or boolean, not list",
    )
