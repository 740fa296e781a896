import hashlib

import numpy as np
import orjson
from msgspec.structs import replace

from connectors.codec import JSON
from streamcl import __version__
from streamcl.messages import OUR_BYTES, dead_letter_message, prediction_message, rejected_message, scores_to_json
from streamcl.records import EVENTS, DeadLetter, Origin, Prediction, Record, Scores

ORIGIN = Origin(EVENTS, 2, 40)


def scores(*served: float) -> Scores:
    raw = np.array(served, np.float32)
    return Scores(raw, raw, version=9)


def letter(value: bytes | None, key: bytes | None = b"k") -> DeadLetter:
    record = Record(ORIGIN, "clicks", 12.3456, value, key, headers=(("trace", b"\xff"),))
    return DeadLetter(record, "schema", "field 'näme': fault")


def test_a_prediction_says_whose_it_is_what_it_is_and_where_it_comes_from() -> None:
    message = prediction_message(Prediction("e1", "user", 7.5, scores(0.25), ORIGIN), JSON(), "clicks")
    assert orjson.loads(message.value or b"") == {
        "id": "e1",
        "score": 0.25,
        "version": 9,
        "time": 7.5,
        "input": "events:2:40",
    }
    assert message.key == b"user"
    assert message.headers == (
        ("streamcl-input", b"events:2:40"),
        ("streamcl-topic", b"clicks"),
        ("streamcl-id", b"e1"),
        ("streamcl-weights", b"9"),
    )
    assert message.time_s is None  # the time of sending: a broker deletes what looks old


def test_a_prediction_for_a_compacted_topic_is_keyed_by_its_id() -> None:
    message = prediction_message(Prediction("e1", "user", 7.5, scores(0.25), ORIGIN), JSON(), "clicks", by_id=True)
    assert message.key == b"e1"


def test_a_rejected_prediction_keeps_what_it_was_and_says_why() -> None:
    message = prediction_message(Prediction("e1", "user", 7.5, scores(0.25), ORIGIN), JSON(), "clicks")
    letter = rejected_message(message, "InvalidRecord: " + "x" * 1000)
    assert (letter.value, letter.key) == (message.value, message.key)
    assert letter.headers[: len(message.headers)] == message.headers
    found = dict(letter.headers)
    assert found["streamcl-reason"] == b"rejected_by_broker"
    assert found["streamcl-error"].startswith(b"InvalidRecord: x")
    assert len(found["streamcl-error"]) <= 500


def test_a_multiclass_prediction_lists_probabilities_and_names_the_leader() -> None:
    assert scores_to_json(scores(0.25, 0.5, 0.25)) == {"score": [0.25, 0.5, 0.25], "class": 1}
    assert scores_to_json(scores(0.5, 0.5)) == {"score": [0.5, 0.5], "class": 0}


def test_the_same_prediction_is_the_same_bytes() -> None:
    one, two = (prediction_message(Prediction("e", "k", 1.0, scores(0.1), ORIGIN), JSON()) for _ in range(2))
    assert one == two


def test_a_dead_letter_keeps_key_value_and_headers_and_says_why_and_where_from() -> None:
    message = dead_letter_message(letter(b"raw \xff"), max_bytes=100)
    assert (message.value, message.key, message.time_s) == (b"raw \xff", b"k", None)
    assert message.headers[0] == ("trace", b"\xff")
    assert {name: raw.decode() for name, raw in message.headers[1:]} == {
        "streamcl-reason": "schema",
        "streamcl-error": "field 'näme': fault",
        "streamcl-topic": "clicks",
        "streamcl-input": "events",
        "streamcl-partition": "2",
        "streamcl-offset": "40",
        "streamcl-timestamp-ms": "12346",
        "streamcl-version": __version__,
    }


def test_a_dead_letter_that_is_too_large_becomes_a_stub_that_proves_what_it_was() -> None:
    value = b"x" * 101  # beside a key of 1 byte and a header of 6
    stub = dead_letter_message(letter(value), max_bytes=107)
    assert orjson.loads(stub.value or b"") == {"bytes": 101, "sha256": hashlib.sha256(value).hexdigest()}
    assert stub.key == b"k"
    assert "trace" not in dict(stub.headers)
    assert dead_letter_message(letter(value), max_bytes=108).value == value


def test_a_huge_key_or_field_name_makes_no_dead_letter_that_a_broker_would_refuse() -> None:
    whole = letter(b"{}", b"k" * 2_000_000)
    message = dead_letter_message(replace(whole, error="unknown field " + "x" * 2_000_000), max_bytes=1_000_000)
    assert message.key is None
    assert sum(len(name) + len(text) for name, text in message.headers) < OUR_BYTES


def test_a_tombstone_stays_one() -> None:
    message = dead_letter_message(letter(None, None), max_bytes=100)
    assert (message.value, message.key) == (None, None)
