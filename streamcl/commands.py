"""Commands: records that steer a shard from inside its stream, so that recovery and replay repeat them in place.

There is one, `forget`. It reaches what is held of single events: waiting tickets, labels that wait, closed ids, replay
memory, error memory, the window of the diagnostics, what metrics group by; and after it no checkpoint of before is
kept. It does not reach

- what the weights, optimiser, running means and deviations, metrics, drift detectors and the choice of lambda have
  taken from an event: they hold sums, which are nobody's;
- what waiting tickets of others were served, though an error memory had a share in it;
- deltas, which hold weights and no events, and go once no checkpoint needs them;
- what lies outside: the topics of events, labels, predictions, outcomes, dead letters and commands. Their retention
  must be shorter than what was promised;
- a model of River's, which may hold examples; nobody can say whose.

What comes of somebody after the command is held like anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from streamcl.features import category
from streamcl.protocols import BadInput
from streamcl.records import Command, Message, Record, Selector

FIELDS = {"command", "id", "key", "event_ids", "from_s", "until_s", "time_s"}
TIME = "time_s"
"""Field of the time at which a command was given: where a recorded one stands among recorded events."""
LONGEST_ID = 200


def command_of(record: Record, max_bytes: int) -> Command:
    """Raises BadInput; a field that is not known would mean a condition that is not heeded."""
    payload = _payload(record.value, max_bytes)
    if unknown := payload.keys() - FIELDS:
        raise BadInput("schema", f"unknown field {min(unknown)[:100]!r}")
    if payload.get("command") != "forget":
        raise BadInput("schema", "field 'command': the one that there is is forget")
    id = payload.get("id")
    if not isinstance(id, str) or not 0 < len(id) <= LONGEST_ID:
        raise BadInput("schema", f"field 'id': expected a text of 1 to {LONGEST_ID} characters")
    return Command(id, _selector(payload), record.origin, record.time_s)


def _payload(value: bytes | None, max_bytes: int) -> Mapping[str, Any]:
    if value is None:
        raise BadInput("undecodable", "no payload (a tombstone)")
    if len(value) > max_bytes:
        raise BadInput("too_large", f"{len(value)} bytes; events.max_bytes is {max_bytes}")
    try:
        payload = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise BadInput("undecodable", f"not JSON, at byte {error.pos}") from None  # the cause would carry the payload
    if not isinstance(payload, dict):
        raise BadInput("undecodable", "the top level is not an object")
    return payload


def _selector(payload: Mapping[str, Any]) -> Selector:
    key, ids = payload.get("key"), payload.get("event_ids")
    if ids is not None and not (isinstance(ids, list) and ids):
        raise BadInput("schema", "field 'event_ids': expected a list that is not empty")
    who = Selector(
        key=None if key is None else _text("key", key),
        ids=frozenset(_text("event_ids", each) for each in ids or ()),
        from_s=_time(payload, "from_s"),
        until_s=_time(payload, "until_s"),
    )
    if who == Selector():
        raise BadInput("schema", "field 'key': without key, event_ids, from_s or until_s everything would be meant")
    return who


def _text(name: str, value: Any) -> str:
    text = category(name, value)
    if not text:
        raise BadInput("schema", f"field {name!r}: empty")
    return text


def _time(payload: Mapping[str, Any], name: str) -> float | None:
    value = payload.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInput("schema", f"field {name!r}: expected a time in seconds")
    return float(value)


def forget_message(id: str, who: Selector, time_s: float, partition: int) -> Message:
    """The record of a command. Raises BadInput as its reader would."""
    given = {"key": who.key, "event_ids": sorted(who.ids) or None, "from_s": who.from_s, "until_s": who.until_s}
    said = {name: value for name, value in given.items() if value is not None}
    value = orjson.dumps({"command": "forget", "id": id, **said, TIME: time_s})
    _selector(said)
    return Message(value, time_s=time_s, partition=partition)
