"""What leaves a worker, as messages: predictions, outcomes, dead letters. Pure: a second run makes the same bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson
from msgspec.structs import replace

from streamcl import __version__
from streamcl.features import Layout
from streamcl.protocols import BadInput, Codec
from streamcl.records import (
    TASK,
    DeadLetter,
    Encoded,
    Fate,
    Headers,
    Learned,
    Message,
    Origin,
    Prediction,
    Record,
    Scores,
)


def scores_to_json(scores: Scores) -> dict[str, Any]:
    """`{"score": p}`; for multiclass the list of probabilities and the class that leads.

    Where there are further tasks `{"tasks": {NAME: p}}` stands beside it.
    """
    served = scores.served.tolist()
    if len(served) == 1:
        noted = scores.notes.items()
        tasks = {name.removeprefix(TASK): float(value[0]) for name, value in noted if name.startswith(TASK)}
        return {"score": served[0], **({"tasks": tasks} if tasks else {})}
    return {"score": served, "class": int(scores.served.argmax())}


def prediction_message(prediction: Prediction, codec: Codec, topic: str = "", by_id: bool = False) -> Message:
    """Keyed by the event's key, or `by_id`. Readers drop repeats by the header `streamcl-input`, the event's origin.

    `topic` is where the event stood, for people who look for it: an origin names the input instead.
    """
    return prediction_messages((prediction,), codec, topic, by_id)[0]


def prediction_messages(
    predictions: Iterable[Prediction], codec: Codec, topic: str = "", by_id: bool = False
) -> list[Message]:
    """Of many."""
    encode, made = codec.encode, []
    place = ("streamcl-topic", topic.encode())
    for prediction in predictions:
        id, scores, origin = prediction.id, prediction.scores, str(prediction.origin)
        version, served = scores.version, scores.served
        one = len(served) == 1 and not scores.notes  # as `scores_to_json` has it
        body = {"id": id, "score": served.item()} if one else {"id": id, **scores_to_json(scores)}
        body["version"], body["time"], body["input"] = version, prediction.time_s, origin
        identity = id.encode("utf-8", "surrogatepass")
        headers: Headers = (
            ("streamcl-input", origin.encode()),
            place,
            ("streamcl-id", identity),
            ("streamcl-weights", b"%d" % version),
        )
        key = identity if by_id else prediction.key.encode("utf-8", "surrogatepass")
        made.append(Message(encode(body), key, headers))
    return made


NUMBER = "streamcl-number"


def outcome_message(learned: Learned, max_bytes: int) -> Message:
    """What was learned, without a key: its topic has one partition. Readers drop repeats by the header NUMBER.

    Of the slots only the filled ones are told, by their index. Floats are exact; NaN, a missing number, is null. An
    outcome of more than `max_bytes` has no value: a broker that refused it would stop the worker at every start.
    """
    ids, weights, dense = learned.features
    slots = np.flatnonzero(weights)
    body = {
        "number": learned.number,
        "records": learned.records,
        "id": learned.id,
        "input": str(learned.origin),
        "time": learned.time_s,
        "delay": learned.delay_s,
        "fate": learned.fate,
        "label": learned.label,
        "slots": slots.tolist(),
        "ids": ids[slots].tolist(),
        "weights": weights[slots].tolist(),
        "dense": dense.tolist(),
    }
    value = orjson.dumps(body)
    return Message(value if len(value) <= max_bytes else None, None, ((NUMBER, str(learned.number).encode()),))


def outcome_number(record: Record) -> int | None:
    """Of an outcome's message, from its header alone; None when it is no such message."""
    try:
        return int(dict(record.headers)[NUMBER])
    except (KeyError, ValueError):
        return None


def outcome_of(value: bytes | None, layout: Layout) -> Learned:
    """The inverse of `outcome_message`. Raises BadInput: no outcome, or one of other features."""
    try:
        body = orjson.loads(value or b"")
        ids, weights = layout.slot_base.copy(), np.zeros(len(layout.slot_base), np.float32)
        slots = np.array(body["slots"], np.int64)
        ids[slots], weights[slots] = body["ids"], body["weights"]
        dense = np.array(body["dense"], np.float32)  # null becomes NaN
        label = float(body["label"])
        name, partition, offset = body["input"].rsplit(":", 2)
        within = (slots >= 0).all() and layout.known(slots, ids[slots]) and np.isfinite(weights).all()
        if dense.shape != (len(layout.numerics),) or not (within and math.isfinite(label)):
            raise BadInput("schema", "an outcome of other features than this model's")
        return Learned(
            number=int(body["number"]),
            records=int(body["records"]),
            id=str(body["id"]),
            origin=Origin(name, int(partition), int(offset)),
            features=Encoded(ids, weights, dense),
            label=label,
            fate=Fate(body["fate"]),
            time_s=float(body["time"]),
            delay_s=float(body["delay"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise BadInput(
            "undecodable", f"no outcome: {type(error).__name__}"
        ) from None  # the cause would carry the payload


def rejected_message(message: Message, error: str) -> Message:
    """What its destination refuses, as a dead letter: the headers that it had say where it came from."""
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
