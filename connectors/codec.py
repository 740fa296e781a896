"""Payloads as JSON objects, and any message as a line of JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from streamcl.config import Config
from streamcl.protocols import BadInput
from streamcl.records import Message

_SPACE = b" \t\r\n"


class JSON:
    """One JSON object per payload, in UTF-8.

    Stricter than Python's own: no NaN or Infinity literals, no lone surrogates, no top level other than an object,
    at most 1,024 levels deep. Integers beyond 64 bits come back as floats, so send long ids as strings.

    Raises:
        BadInput: `undecodable`, or `non_finite` for a literal NaN or Infinity, which some producers write; the text
            names the fault and its byte, never what stands there.
    """

    @classmethod
    def open(cls, config: Config, place: str) -> JSON:  # noqa: ARG003 - the same everywhere
        return cls()

    @classmethod
    def check(cls, config: Config, place: str) -> Sequence[str]:  # noqa: ARG003 - nothing can be wrong
        return ["json"]

    def decode(self, value: bytes) -> Mapping[str, Any]:
        try:
            decoded = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            number = error.doc[error.pos :].startswith(("NaN", "Infinity")) if error.doc else False
            reason = "non_finite" if number else "undecodable"
            raise BadInput(reason, _explain(value, error)) from None  # the cause would carry the payload
        if not isinstance(decoded, dict):
            at = len(value) - len(value.lstrip(_SPACE))
            raise BadInput("undecodable", f"the top level is not an object, at byte {at}")
        return decoded

    def encode(self, value: Mapping[str, Any]) -> bytes:
        """Compact, keys in the order given. NaN and infinity, which JSON lacks, become null."""
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _explain(value: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError as fault:
        return f"not UTF-8, at byte {fault.start}"
    return f"not JSON: {error.msg}, at byte {len(text[: error.pos].encode())}"  # orjson counts characters


def envelope(message: Message) -> bytes:
    """A message as one JSON object, nothing lost: the format of dead letters in files.

        {"key": T, "value": T, "headers": [[name, T], ...], "time_s": 12.5}

    T is the text of the bytes; {"base64": "..."} where they are not UTF-8; null where there are none. The time is null
    where it is the time of sending. `opened` is the inverse.
    """
    headers = [[name, _text(value)] for name, value in message.headers]
    content = {"key": _text(message.key), "value": _text(message.value), "headers": headers, "time_s": message.time_s}
    return orjson.dumps(content)


def opened(line: bytes) -> Message:
    """The message in an envelope. Raises ValueError, KeyError or TypeError when it is none."""
    content = orjson.loads(line)
    headers = tuple((str(name), _bytes(text) or b"") for name, text in content["headers"])
    time_s = content["time_s"]
    return Message(_bytes(content["value"]), _bytes(content["key"]), headers, None if time_s is None else float(time_s))


def _text(raw: bytes | None) -> Any:
    if raw is None or is_text(raw):
        return None if raw is None else raw.decode()
    return {"base64": base64.b64encode(raw).decode()}


def _bytes(text: Any) -> bytes | None:
    if isinstance(text, dict):
        return base64.b64decode(text["base64"], validate=True)
    return None if text is None else bytes(text, "utf-8")


def as_line(value: bytes | None) -> bytes | None:
    """A JSON object as one line, its bytes kept unless they hold a line feed; None for anything else."""
    try:
        decoded = orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(decoded, dict):
        return None
    return orjson.dumps(decoded) if b"\n" in (value or b"") else value


def is_text(raw: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
