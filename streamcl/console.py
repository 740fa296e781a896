"""How a command answers: for people, or one JSON object on stdout for a program."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def out(value: Any) -> None:
    """One JSON object on stdout, numbers exact."""
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode())
