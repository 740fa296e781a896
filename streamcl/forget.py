"""`streamcl forget`: the command goes into the stream, to every shard, and each answers in its audit file."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from streamcl import connect
from streamcl.audit import Audit
from streamcl.commands import forget_message
from streamcl.config import Config, ConfigError
from streamcl.console import Json, out
from streamcl.protocols import BadInput, StreamclError
from streamcl.records import Selector
from streamcl.recovery import store_of

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2


def forget(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The workers' TOML file.")],
    key: Annotated[str | None, typer.Option(help="Events of this key (user, session), as events.key tells it.")] = None,
    event_id: Annotated[list[str] | None, typer.Option(metavar="ID", help="These events (repeatable).")] = None,
    since: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Events from then on: seconds since 1970, or ISO 8601.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Events before then.")] = None,
    wait: Annotated[bool, typer.Option(help="Return once every shard has it on record.")] = False,
    timeout_s: Annotated[float, typer.Option(min=0.0, help="How long --wait waits.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Have every shard forget events that meet all of these conditions, and every checkpoint from before it.

    Memories, waiting events and checkpoints are reached; weights and other sums are not, nor the topics themselves.
    """
    settings = Config.load(config)
    who = Selector(key, frozenset(event_id or ()), _seconds("--from", since), _seconds("--until", until))
    id = _send(settings, who)
    _warn_of_other_shards(settings)
    applied = _applied(settings, id, timeout_s) if wait else {}
    if as_json:
        out({"request": id, "shards": settings.shard.count, **({"applied": applied} if wait else {})})
        return
    typer.echo(id)
    for shard, line in applied.items():
        rows, retired = sum(line["rows"].values()), len(line["retired"])
        typer.echo(f"shard {shard}: {rows} rows erased, {retired} checkpoints retired, at {line['position']}")


def _send(config: Config, who: Selector) -> str:
    """One record for each shard, in a partition that is its own; the id of the request."""
    if config.commands is None:
        raise ConfigError("commands: no URL in the config, so no worker reads commands; set it, and restart them")
    id, now_s = uuid.uuid4().hex, time.time()
    try:
        messages = [forget_message(id, who, now_s, shard) for shard in range(config.shard.count)]
    except BadInput as error:
        raise ConfigError(f"nothing to forget: {error}; see `streamcl forget --help`") from error
    with contextlib.closing(connect.open_sink(config.commands, config)) as sink:
        sink.send(messages)
        sink.flush()
    return id


def _applied(config: Config, id: str, timeout_s: float) -> dict[int, Mapping[str, Any]]:
    """By shard the line of its audit file, once all have one."""
    deadline = time.monotonic() + timeout_s
    shards = [store_of(config.of_shard(index)) for index in range(config.shard.count)]
    audits = {index: Audit(store.folder, store.remote) for index, store in enumerate(shards)}
    found: dict[int, Mapping[str, Any]] = {}
    while len(found) < len(audits):
        for index in audits.keys() - found.keys():
            mine = [line for line in audits[index].lines() if line["request"] == id]
            found |= {index: mine[0]} if mine else {}
        if len(found) < len(audits) and time.monotonic() > deadline:
            missing = ", ".join(str(index) for index in sorted(audits.keys() - found.keys()))
            raise StreamclError(f"request {id}: not on record after {timeout_s:g} s; still owed by shards: {missing}")
        time.sleep(LOOK_EVERY_S if len(found) < len(audits) else 0.0)
    return dict(sorted(found.items()))


def _warn_of_other_shards(config: Config) -> None:
    count, folder = config.shard.count, config.checkpoint.folder
    for path in sorted(folder.glob(f"{config.name}-*-of-*")):
        if not path.name.endswith(f"-of-{count}"):
            log.warning("%s is of another number of shards, and no worker clears it: delete it", path)


def _seconds(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{name} {text}: expected seconds since 1970, or 2031-05-17T08:00:00+00:00") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
