"""What leaves a worker, as messages: predictions and dead letters. Pure: a second run makes the same bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import orjson

from streamcl import __version__
from streamcl.protocols import Codec
from streamcl.records import DeadLetter, Headers, Message, Prediction, Scores


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """`{"score": p}`; for multiclass the list of probabilities and the class that leads."""
    served = scores.served.tolist()
    if len(served) == 1:
        return {"score": served[0]}
    return {"score": served, "class": int(scores.served.argmax())}


def prediction_message(prediction: Prediction, codec: Codec, topic: str = "", by_id: bool = False) -> Message:
    """Keyed by the event's key, or `by_id`. Readers drop repeats by the header `streamcl-input`, the event's origin.

    `topic` is where the event stood, for people who look for it: an origin names the input instead.
    """
    body = {
        "id": prediction.id,
        **scores_to_json(prediction.scores),
        "version": prediction.scores.version,
        "time": prediction.time_s,
        "input": str(prediction.origin),
    }
    headers: Headers = (
        ("streamcl-input", str(prediction.origin).encode()),
        ("streamcl-topic", topic.encode()),
        ("streamcl-id", prediction.id.encode("utf-8", "surrogatepass")),
        ("streamcl-weights", str(prediction.scores.version).encode()),
    )
    key = prediction.id if by_id else prediction.key
    return Message(codec.encode(body), key.encode("utf-8", "surrogatepass"), headers)


def rejected_message(message: Message, error: str) -> Message:
    """A prediction that its destination refuses, as a dead letter: the headers that it had say where it came from."""
    ours = {"reason": "rejected_by_broker", "error": error[:ERROR_CHARACTERS], "version": __version__}
    headers = tuple((f"streamcl-{name}", text.encode("utf-8", "replace")) for name, text in ours.items())
    return replace(message, headers=message.headers + headers)


OUR_BYTES = 4096
"""What our own headers of a dead letter take at most."""

ERROR_CHARACTERS = 500
"""An error names a field, and a field's name may be a megabyte long."""


def dead_letter_message(letter: DeadLetter, max_bytes: int) -> Message:
    """The original key, value and headers, and why and where from.

    A record whose key, value and headers take more than `max_bytes` becomes a stub, JSON: size and hash of its value,
    a short key, no headers of its own. A dead letter that its broker refused would stop the worker at every start.
    """
    record = letter.record
    key, value, theirs = record.key, record.value, record.headers
    size = len(key or b"") + len(value or b"") + sum(len(name) + len(text or b"") for name, text in theirs)
    if size > max_bytes:
        value = orjson.dumps({"bytes": len(value or b""), "sha256": hashlib.sha256(value or b"").hexdigest()})
        key, theirs = key if len(key or b"") <= OUR_BYTES else None, ()
    origin = record.origin
    ours = {
        "reason": letter.reason,
        "error": letter.error[:ERROR_CHARACTERS],
        "topic": record.topic,
        "input": origin.input,
        "partition": str(origin.partition),
        "offset": str(origin.offset),
        "timestamp-ms": str(round(record.time_s * 1000)),
        "version": __version__,
    }
    headers = tuple((f"streamcl-{name}", text.encode("utf-8", "replace")) for name, text in ours.items())
    return Message(value, key, theirs + headers)
