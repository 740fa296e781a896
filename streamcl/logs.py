"""Lines on stderr: for people, or an object a line for whatever collects them."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JSONLines(logging.Formatter):
    """`time` (RFC 3339, UTC), `level`, `logger`, `message`, `thread`; `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().encode(errors="replace").decode(),  # lone surrogates, of odd file names
            "thread": record.threadName,
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(told).decode()


def begin() -> None:
    """As text, before any configuration is known."""
    logging.basicConfig(format=TEXT, level=logging.INFO, stream=sys.stderr)
    logging.getLogger("kafka").setLevel(logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def go_on_as(form: Literal["text", "json"]) -> None:
    """From now on, as `telemetry.log_format` says."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JSONLines() if form == "json" else logging.Formatter(TEXT))
