"""What leaves a worker, as messages: predictions and dead letters. Pure: a second run makes the same bytes."""

from __future__ import annotations

import hashlib
from typing import Any

from streamcl import __version__
from streamcl.protocols import Codec
from streamcl.records import DeadLetter, Headers, Message, Prediction, Scores


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """`{"score": p}`; for multiclass the list of probabilities and the class that leads."""
    served = scores.served.tolist()
    if len(served) == 1:
        return {"score": served[0]}
    return {"score": served, "class": int(scores.served.argmax())}


def prediction_message(prediction: Prediction, codec: Codec) -> Message:
    """Keyed by the event's key. Readers drop repeats by the header `streamcl-input` (topic-independent origin)."""
    body = {
        "id": prediction.id,
        **scores_to_json(prediction.scores),
        "version": prediction.scores.version,
        "time": prediction.time_s,
        "input": str(prediction.origin),
    }
    headers: Headers = (
        ("streamcl-input", str(prediction.origin).encode()),
        ("streamcl-weights", str(prediction.scores.version).encode()),
    )
    return Message(codec.encode(body), prediction.key.encode("utf-8", "surrogatepass"), headers)


def dead_letter_message(letter: DeadLetter, codec: Codec, max_bytes: int) -> Message:
    """The original key, value and headers, and why and where from; a stub (size, hash) when it is too large."""
    record = letter.record
    value = record.value
    if value is not None and len(value) > max_bytes:
        value = codec.encode({"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()})
    origin = record.origin
    ours = {
        "reason": letter.reason,
        "error": letter.error,
        "topic": record.topic,
        "input": origin.input,
        "partition": str(origin.partition),
        "offset": str(origin.offset),
        "timestamp-ms": str(round(record.time_s * 1000)),
        "version": __version__,
    }
    headers = tuple((f"streamcl-{name}", text.encode()) for name, text in ours.items())
    return Message(value, record.key, record.headers + headers)
