"""Payloads as JSON objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from streamcl.protocols import BadInput

_SPACE = b" \t\r\n"


class JSON:
    """One JSON object per payload, in UTF-8.

    Stricter than Python's own: no NaN or Infinity literals, no lone surrogates, no top level other than an object,
    at most 1,024 levels deep. Integers beyond 64 bits come back as floats, so send long ids as strings.

    Raises:
        BadInput: `undecodable`; the text names the fault and its byte, never what stands there.
    """

    def decode(self, value: bytes) -> Mapping[str, Any]:
        try:
            decoded = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise BadInput("undecodable", _explain(value, error)) from None  # the cause would carry the payload
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
