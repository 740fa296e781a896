"""`streamcl checkpoint`: a look at the snapshots of a shard, for people and programs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.console import Json, out
from streamcl.protocols import StreamclError
from streamcl.recovery import store_of
from streamcl.snapshot import Damaged, Snapshot

app = typer.Typer(name="checkpoint", help="Look at a shard's snapshots.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="A config, or a folder that holds snapshots.")]


def _store(place: Path) -> Store:
    return Store(place, trust_pickle=True) if place.is_dir() else store_of(Config.load(place))


def _line(snapshot: Snapshot) -> dict[str, Any]:
    manifest = snapshot.manifest
    return {
        "name": snapshot.name,
        "records": manifest.get("records"),
        "clean": manifest.get("clean"),
        "bytes": snapshot.size_bytes,
        "written": snapshot.written_bytes,
        "digest": snapshot.digest,
    }


@app.command()
def ls(place: Place, as_json: Json = False) -> None:
    """List snapshots, oldest first; damaged ones are named on stderr."""
    store = _store(place)
    lines = [_line(snapshot) for snapshot in store.ls()]
    if as_json:
        out({"snapshots": lines, "damaged": store.damaged})
        return
    table = Table("name", "records", "clean", "bytes", "written", "digest")
    for line in lines:
        table.add_row(*(str(value) for value in line.values()))
    Console().print(table)


@app.command()
def show(place: Place, name: Annotated[str | None, typer.Argument(help="Default: the newest.")] = None) -> None:
    """Print what a snapshot says about itself: position, config, environment."""
    store = _store(place)
    loaded = store.load(name) if name else store.newest()
    if loaded is None:
        raise StreamclError(f"{store.folder}: no snapshot")
    out({**_line(loaded.snapshot), "format": loaded.snapshot.format, "manifest": dict(loaded.manifest)})


@app.command()
def verify(place: Place, as_json: Json = False) -> None:
    """Read every snapshot, byte by byte; exit code 1 when one is damaged."""
    store = _store(place)
    good = []
    for snapshot in store.ls():
        with contextlib.suppress(Damaged):  # the store lists it
            good.append(store.verify(snapshot.name).name)
    if as_json:
        out({"sound": good, "damaged": store.damaged})
    else:
        typer.echo("\n".join([*(f"{name}: sound" for name in good), *(f"{n}: {why}" for n, why in store.damaged)]))
    if store.damaged:
        raise typer.Exit(1)
