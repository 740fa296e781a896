"""The JSON codec takes objects and nothing else, and an envelope loses nothing."""

from __future__ import annotations

import math
import traceback

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.codec import JSON, as_line, envelope, opened
from streamcl.protocols import BadInput
from streamcl.records import Message

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
messages = st.builds(
    Message,
    value=st.none() | st.binary(max_size=30) | st.text(max_size=10).map(str.encode),
    key=st.none() | st.binary(max_size=5),
    headers=st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=5)), max_size=3).map(tuple),
    time_s=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_what_is_encoded_decodes_to_itself(value: dict[str, object]) -> None:
    assert JSON().decode(JSON().encode(value)) == value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"", "not JSON: Input is a zero-length, empty document, at byte 0"),
        (b'{"id": "secret", "n": 1', "at byte 23"),
        (b' \n["secret"]', "the top level is not an object, at byte 2"),
        (b'"secret"', "the top level is not an object, at byte 0"),
        (b"null", "the top level is not an object, at byte 0"),
        (b'{"secret": NaN}', "at byte 11"),
        (b'{"secret": -Infinity}', "at byte 12"),
        (b'{"secret": 1e999}', "at byte 11"),
        (b'{"a": "secret\xff"}', "not UTF-8, at byte 13"),
        (b'\xff{"a": "secret"}', "not UTF-8, at byte 0"),
        (b'{"a": "\\ud800"}', "at byte"),
        (b'{"a": 1} secret', "at byte 9"),
        (b"[" * 2000, "depth limit exceeded"),
    ],
)
def test_a_bad_payload_is_undecodable_by_byte_and_never_shown(value: bytes, error: str) -> None:
    with pytest.raises(BadInput) as caught:
        JSON().decode(value)
    literal = b"NaN" in value or b"Infinity" in value
    assert caught.value.reason == ("non_finite" if literal else "undecodable")
    assert error in str(caught.value)
    assert "secret" not in "".join(traceback.format_exception(caught.value, limit=0))


def test_the_byte_counts_bytes_where_the_parser_counts_characters() -> None:
    value = '{"é":"éé", x}'.encode()
    with pytest.raises(BadInput, match=f"at byte {value.index(b'x')}$"):
        JSON().decode(value)


@given(st.binary(max_size=40))
def test_any_bytes_decode_to_an_object_or_are_bad_input(value: bytes) -> None:
    try:
        assert isinstance(JSON().decode(value), dict)
    except BadInput as error:
        assert error.reason == "undecodable"


def test_numbers_that_json_lacks_become_null() -> None:
    assert JSON().encode({"a": math.nan, "b": math.inf}) == b'{"a":null,"b":null}'


@given(messages)
def test_an_envelope_is_one_line_and_gives_the_message_back(message: Message) -> None:
    line = envelope(message)
    assert b"\n" not in line
    assert opened(line) == message


def test_an_envelope_shows_text_as_text_and_other_bytes_as_base64() -> None:
    line = envelope(Message(b"\xff", "ü".encode(), (("reason", b"undecodable"),), 1.5))
    assert orjson.loads(line) == {
        "key": "ü",
        "value": {"base64": "/w=="},
        "headers": [["reason", "undecodable"]],
        "time_s": 1.5,
    }


@pytest.mark.parametrize("line", [b"x", b"[]", b"{}", b'{"key":1,"value":1,"headers":[],"time_s":0}'])
def test_what_is_no_envelope_is_refused(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        opened(line)


def test_only_an_object_on_one_line_is_a_line() -> None:
    assert as_line(b'{ "a": 1 }') == b'{ "a": 1 }'
    assert as_line(b'{\n"a": 1}') == b'{"a":1}'
    assert as_line(b"[1]") is as_line(b"x") is as_line(b"") is as_line(None) is None
