"""What may stand in a command, and what a bad one is refused for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamcl.commands import command_of, forget_message
from streamcl.protocols import BadInput
from streamcl.records import Origin, Record, Selector

ORIGIN = Origin("commands", 0, 7)


def record(value: bytes | None) -> Record:
    return Record(ORIGIN, "orders", 5.0, value)


def read(**payload: Any) -> Selector:
    command = command_of(record(json.dumps({"command": "forget", "id": "r", **payload}).encode()), 1000)
    assert (command.id, command.origin, command.time_s) == ("r", ORIGIN, 5.0)
    return command.who


def test_all_conditions_are_read() -> None:
    assert read(key="u") == Selector("u")
    assert read(key=17) == Selector("17")  # as events' keys are read
    assert read(event_ids=["a", 2]) == Selector(ids=frozenset({"a", "2"}))
    assert read(key="u", from_s=1, until_s=2.5) == Selector("u", from_s=1.0, until_s=2.5)


def test_what_is_written_is_read_again() -> None:
    who = Selector("u", frozenset({"b", "a"}), 1.0, 2.0)
    message = forget_message("r", who, 9.0, 3)
    assert (message.partition, message.time_s) == (3, 9.0)
    assert command_of(record(message.value), 1000).who == who


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "undecodable"),
        (b"{", "undecodable"),
        (b"[1]", "undecodable"),
        (b" " * 1001, "too_large"),
        (b'{"command": "obey", "id": "r", "key": "u"}', "schema"),
        (b'{"command": "forget", "key": "u"}', "schema"),
        (b'{"command": "forget", "id": "", "key": "u"}', "schema"),
    ],
)
def test_a_bad_command_has_a_reason(value: bytes | None, reason: str) -> None:
    with pytest.raises(BadInput) as refused:
        command_of(record(value), 1000)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    "payload",
    [
        {},  # everything
        {"key": None},
        {"key": ""},
        {"key": 1.5},
        {"event_ids": []},
        {"event_ids": "a"},
        {"from_s": "secret"},
        {"until_s": True},
        {"from_s": 1, "kye": "secret"},  # a typo must not widen what is meant
    ],
    ids=str,
)
def test_a_selector_that_is_not_plain_is_refused_without_telling_it(payload: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="field") as refused:
        read(**payload)
    assert refused.value.reason == "schema"
    assert "secret" not in str(refused.value)


def test_everything_can_not_be_asked_for() -> None:
    with pytest.raises(BadInput, match="everything would be meant"):
        forget_message("r", Selector(), 0.0, 0)


def test_a_range_begins_at_its_first_second_and_ends_before_its_last() -> None:
    who = Selector(from_s=1.0, until_s=2.0)
    assert [who.meets("u", "e", t) for t in (0.9, 1.0, 1.9, 2.0, float("nan"))] == [False, True, True, False, True]


def test_every_condition_must_hold_and_who_is_unknown_is_meant() -> None:
    who = Selector("u", frozenset({"e"}))
    assert who.meets("u", "e", 0.0)
    assert who.meets("", "e", 0.0)
    assert not who.meets("v", "e", 0.0)
    assert not who.meets("u", "f", 0.0)
