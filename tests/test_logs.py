"""Log lines as JSON, and as text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from io import StringIO

import orjson
import pytest

from streamcl import logs


@pytest.fixture
def lines() -> Iterator[StringIO]:
    """What a handler on the root writes."""
    root, stream = logging.getLogger(), StringIO()
    before, root.handlers = root.handlers, [logging.StreamHandler(stream)]
    level = root.level
    root.setLevel(logging.INFO)
    yield stream
    root.handlers = before
    root.setLevel(level)


def test_a_json_line_is_one_object_whatever_the_text_holds(lines: StringIO) -> None:
    logs.go_on_as("json")
    logging.getLogger("shop").warning("dead letter:\n%s \udcff", {"a": "ü"})
    [line] = lines.getvalue().splitlines()
    told = orjson.loads(line)
    assert told["message"].startswith("dead letter:\n{'a': 'ü'}")
    assert (told["level"], told["logger"]) == ("warning", "shop")
    assert told["time"].endswith("+00:00")


def test_an_exception_comes_in_its_object(lines: StringIO) -> None:
    logs.go_on_as("json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("shop").error("stopped", exc_info=sys.exc_info())
    assert "ValueError: broken" in orjson.loads(lines.getvalue())["exception"]


def test_text_comes_back(lines: StringIO) -> None:
    logs.go_on_as("json")
    logs.go_on_as("text")
    logging.getLogger("shop").info("saved")
    assert lines.getvalue().endswith("INFO shop: saved\n")
