"""`streamcl shadow`: run a second configuration beside the live one, compare, and promote or drop it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from streamcl import garbage, logs
from streamcl.config import Config, changes
from streamcl.console import Json, out
from streamcl.host import FixedShards, Host, stopping
from streamcl.lease import Held
from streamcl.promotion import drop as drop_shadow
from streamcl.promotion import promote as promote_shadow
from streamcl.protocols import StreamclError
from streamcl.recovery import store_of
from streamcl.shadow import Beginning, Shadow, beside, history
from streamcl.telemetry import Telemetry

app = typer.Typer(
    name="shadow",
    help="Let other settings learn beside a live worker, and put them in its place.",
    no_args_is_help=True,
)

T = TypeVar("T")
Live = Annotated[Path, typer.Argument(metavar="CONFIG", help="The live worker's TOML file.")]
Other = Annotated[
    Path, typer.Argument(metavar="OTHER", help="The other settings: a whole TOML file, of the same name.")
]
ENDINGS = ("_since", "_window")


@app.command()
def run(
    config: Live,
    other: Other,
    from_start: Annotated[
        bool, typer.Option(help="Begin at the start of the log instead of where the live shard stands.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Of /metrics. Default: OTHER's, or the next one where that is the live's."),
    ] = None,
    idle_exit_s: Annotated[
        float | None, typer.Option(min=0.0, help="Leave once nothing has come for this long. Default: never.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn by OTHER's settings from all that the live worker takes, until told to stop; publish nothing.

    It goes from checkpoint to checkpoint of the live worker, whose folder it must see. A first start begins with the
    live state where OTHER changes nothing that means other state (a rate, say), else afresh at the same place; with
    model.warm_start in OTHER with those weights. A later one goes on. /metrics has both side by side, by `role`.

    \b
    streamcl shadow run clicks.toml clicks-dcn.toml       # beside `streamcl run clicks.toml`
    streamcl shadow status clicks.toml clicks-dcn.toml
    streamcl shadow promote clicks.toml clicks-dcn.toml   # both stopped; then `streamcl run clicks-dcn.toml`
    """
    live, settings = _both(config, other)
    taken = live.telemetry.port == settings.telemetry.port != 0
    listens = port if port is not None else settings.telemetry.port + 1 if taken else settings.telemetry.port
    shard = settings.shard.model_copy(update={"indices": tuple(range(settings.shard.count))})
    told = settings.telemetry.model_copy(update={"port": listens})
    settings = settings.model_copy(update={"telemetry": told, "shard": shard})
    logs.go_on_as(settings.telemetry.log_format)
    with contextlib.closing(Telemetry(settings, "shadow")) as telemetry:
        make = partial(_open, live)
        host = Host(settings, FixedShards(settings), telemetry, bootstrap=Beginning(from_start=from_start), build=make)
        with stopping(host):
            telemetry.start()
            garbage.spare()
            host.work(idle_exit_s)
    _show(live, settings, as_json)


def _open(live: Config, config: Config) -> Shadow:
    return Shadow.open(config, live.of_shard(config.shard.index))


@app.command()
def status(config: Live, other: Other, as_json: Json = False) -> None:
    """Metrics of both at the last place where both stood, and since the shadow began; changes nothing."""
    _show(*_both(config, other), as_json)


@app.command()
def promote(
    config: Live,
    other: Other,
    install: Annotated[
        bool, typer.Option(help="Then put OTHER's text in CONFIG's place; what stood there is kept as CONFIG.before.")
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option(help="Although events wait for labels that came before the shadow began.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option(help="Although the live worker did not stop cleanly and has no control log.")
    ] = False,
    wait_s: Annotated[float, typer.Option(min=0.0, help="How long to wait for both workers to stop.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Put the shadow in the live worker's place: same position, no event lost, answered twice or learned twice.

    Both workers have stopped. Killed at any point it is answered by the same command; behind it start a worker with
    OTHER. One with the former settings is refused from then on.
    """
    live, settings = _both(config, other)
    theirs = Config.load(other)
    deadline = time.monotonic() + wait_s
    told = []
    for index in range(live.shard.count):
        shards = live.of_shard(index), theirs.of_shard(index)
        told.append(_patiently(partial(promote_shadow, *shards, accept_loss, accept_changes), deadline))
    if install:
        _install(config, other)
    if as_json:
        out({"promoted": told, "config": str(config if install else other)})
        return
    for index, each in enumerate(told):
        typer.echo(f"shard {index} of {settings.shard.count} stands at {each['records']} records: {each['snapshot']}")
    typer.echo(f"Start a worker with {config if install else other}.")


@app.command()
def drop(config: Live, other: Other, as_json: Json = False) -> None:
    """Delete the shadow's checkpoints and figures. The live worker is not touched; stop the shadow's first."""
    live, settings = _both(config, other)
    dropped = [drop_shadow(settings.of_shard(index)) for index in range(live.shard.count)]
    if not any(dropped):
        raise StreamclError(f"{store_of(settings.of_shard(0)).folder}: there is no shadow to drop")
    if as_json:
        out({"dropped": sum(dropped)})
    else:
        typer.echo(f"dropped: {sum(dropped)} of {live.shard.count} shards had one")


def _both(config: Path, other: Path) -> tuple[Config, Config]:
    live = Config.load(config)
    return live, beside(live, Config.load(other))


def _patiently(work: Callable[[], T], deadline: float) -> T:
    """While a worker lives that is about to stop."""
    while True:
        try:
            return work()
        except Held:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _install(config: Path, other: Path) -> None:
    """By renames alone, so that a crash leaves one of the two whole; done once, it does nothing more."""
    try:
        wanted = other.read_bytes()
        if config.read_bytes() == wanted:
            return
        for target, data in ((config.with_name(f"{config.name}.before"), config.read_bytes()), (config, wanted)):
            partial_file = target.with_name(f"{target.name}.partial")
            with partial_file.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial_file.replace(target)
    except OSError as error:
        raise StreamclError(f"{config}: promoted, but not installed: {error}; start a worker with {other}") from error


def _show(live: Config, settings: Config, as_json: bool) -> None:
    shards = [_stand(live.of_shard(index), settings.of_shard(index)) for index in range(live.shard.count)]
    if all(each["shadow"] is None for each in shards):
        raise StreamclError(f"{store_of(settings.of_shard(0)).folder}: there is no shadow")
    if as_json:
        out({"name": live.name, "shards": shards})
        return
    for index, each in enumerate(shards):
        if each["shadow"] is None:
            continue
        begun, pair = each["begun"], each["pair"]
        title = f"{live.name}, shard {index}: begun {begun['begun']} at {begun['records']} records"
        if not pair:
            typer.echo(f"{title}; no checkpoint of the live worker since")
            continue
        title += f", compared at {pair['records']}, {each['behind_records']} behind the live checkpoint"
        table = Table("", "live", "shadow", "difference", title=title, title_justify="left")
        for name, mine, its in each["figures"]:
            table.add_row(name, f"{mine:.6g}", f"{its:.6g}", f"{its - mine:+.4g}")
        Console().print(table)


def _stand(live: Config, settings: Config) -> dict[str, Any]:
    theirs, ours = store_of(settings).ls(), store_of(live).ls()
    if not theirs or not ours:
        return {"shadow": None, "live": ours[-1].name if ours else None}
    newest, pairs = theirs[-1], history(settings)
    pair: Mapping[str, Any] = pairs[-1] if pairs else {}
    begun = next(fact for fact in reversed(newest.manifest["lineage"]) if fact["kind"] == "shadow")
    changed = changes(ours[-1].manifest["config"], settings.model_copy(update={"name": live.name}))
    return {
        "shadow": newest.name,
        "live": ours[-1].name,
        "begun": begun,
        "changed": [path for path, change in changed if change != "free"],
        "behind_records": ours[-1].manifest["records"] - (pair or begun)["records"],
        "pair": pair,
        "figures": _figures(pair) if pair else [],
    }


def _figures(pair: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """What both have: since the shadow began first, then of late, then over all that each has seen."""
    names = [name for name in pair["live"] if name in pair["shadow"]]
    order = {name: len(ENDINGS) for name in names}
    order |= {name: at for at, ending in enumerate(ENDINGS) for name in names if name.endswith(ending)}
    return [(name, pair["live"][name], pair["shadow"][name]) for name in sorted(names, key=lambda n: (order[n], n))]
