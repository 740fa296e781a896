"""`streamcl rollback`: a stopped shard goes back to a checkpoint that is still there.

Two things may be meant by it:

| | `rollback --to S` | `rollback --to S --relearn` |
|---|---|---|
| the model: weights, optimiser, replay, error memory | of S | of S |
| position, waiting events, counts, metrics | of now | of S |
| what came since S | stays unlearned | is learned again, under the present settings, and not answered again |
| in the control log | an order: repeated by recovery and replay | nothing: the new snapshot begins where S stood |

The first undoes what the model has learned since S, poison above all, and the stream goes on where it is. The second is
for settings that were wrong: they are changed, and the shard learns anew from S on. A shard that was rolled back simply
to the state of S would be led by its control log to where it was before.

A death anywhere in between is answered by a start, or by the same command: the order is written first, and names the
control offset and the records of S; who meets it has passed that model, or finds it in a snapshot. Without a control
log (a single partition, at least once) the fact stands in the snapshots from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from streamcl.config import Config, ConfigError, changes
from streamcl.console import Json, out
from streamcl.progress import LEAP, Progress
from streamcl.protocols import State, StreamclError
from streamcl.records import EVENTS, Order, Was
from streamcl.recovery import Keeper, store_of
from streamcl.snapshot import Loaded, Snapshot
from streamcl.standing import standing

FIGURES = ("log_loss", "auc", "rmse")


def rollback(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The worker's TOML file; its worker has stopped.")],
    to: Annotated[
        str | None, typer.Option(metavar="SNAPSHOT", help="Go back to this one: a name that --list shows.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="What there is to go back to; changes nothing.")] = False,
    relearn: Annotated[
        bool, typer.Option(help="Go back whole, and learn what came since again, under the present settings.")
    ] = False,
    shard: Annotated[int, typer.Option(min=0, help="Of several: which.")] = 0,
    accept_changes: Annotated[
        bool, typer.Option(help="Go back although the worker did not stop cleanly, or settings changed without that.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Undo what a model has learned since a checkpoint: its weights go back, the stream does not.

    Position, waiting labels and counts stay, so nothing is lost, answered twice or learned twice. Stop the worker first
    and start it again behind it; how far back one can go is `checkpoint.retain`. After `streamcl forget` there is
    nothing older to go back to.

    \b
    streamcl rollback clicks.toml --list
    streamcl rollback clicks.toml --to 0000000041-2050000
    """
    settings = Config.load(config)
    if shard >= settings.shard.count:
        raise ConfigError(f"--shard {shard}: shard.count is {settings.shard.count}")
    settings = settings.of_shard(shard)
    if show == (to is not None):
        raise ConfigError("rollback: give --to SNAPSHOT, or --list for what there is")
    if show or to is None:
        _show(settings, as_json)
        return
    with standing(settings, accept_changes) as keeper:
        wanted = _load(keeper, to)
        saved = _relearn(keeper, wanted) if relearn else _go_back(keeper, wanted)
    told = _told(saved)
    if as_json:
        out({**told, "to": to, "relearn": relearn})
        return
    what = "the shard stands where it stood, and will learn on from there" if relearn else "the model is what it was"
    typer.echo(f"{what} in {to}; saved as {told['name']}, at {told['records']} records. Start the worker.")


def _show(config: Config, as_json: bool) -> None:
    lines = [_told(snapshot) for snapshot in reversed(store_of(config).ls())]
    if as_json:
        out({"snapshots": lines})
        return
    there = [name for name in FIGURES if any(f"{name}_window" in line["metrics"] for line in lines)]
    title = f"{config.name}, shard {config.shard.index}; metrics over the recent window"
    table = Table(title=title, title_justify="left")
    for name in ("snapshot", "clean", *there):
        table.add_column(name, no_wrap=True)
    table.add_column("facts")
    for line in lines:
        figures = [f"{line['metrics'].get(f'{name}_window', math.nan):.5g}" for name in there]
        facts = ", ".join(f"{fact['kind']} at {fact.get('records', 0)}" for fact in line["lineage"])
        table.add_row(line["name"], str(line["clean"]), *figures, facts)
    Console().print(table)


def _told(snapshot: Snapshot) -> dict[str, Any]:
    told: Mapping[str, Any] = snapshot.manifest
    return {
        "name": snapshot.name,
        "records": told.get("records"),
        "position": told.get("position"),
        "clean": told.get("clean"),
        "digest": snapshot.digest,
        "metrics": dict(told.get("metrics", {})),
        "lineage": list(told.get("lineage", ())),
    }


def _load(keeper: Keeper, name: str) -> Loaded:
    names = [snapshot.name for snapshot in keeper.store.ls()]
    if name not in names:
        raise StreamclError(f"{keeper.store.folder}: no snapshot {name}; there are {', '.join(names)}")
    loaded = keeper.store.load(name)
    other = [path for path, change in changes(loaded.manifest["config"], keeper.worker.config) if change == "new"]
    if other:
        raise ConfigError(
            f"{loaded.snapshot.path}: {', '.join(other)} changed since it was written, which means another model: "
            "change back, or let the other settings learn beside these first (`streamcl shadow`)"
        )
    facts = loaded.manifest.get("lineage", ())
    if any(fact["kind"] == "promoted" and fact not in facts for fact in keeper.worker.lineage.facts):
        raise StreamclError(f"{loaded.snapshot.path} is from before a shadow took this shard's place")
    return loaded


def _go_back(keeper: Keeper, wanted: Loaded) -> Snapshot:
    worker, told = keeper.worker, wanted.manifest
    worker.lineage.find = lambda _: wanted.state["learner"]
    was = Was(int(told["control_offset"]), int(told["records"]))
    order, offset = Order((), dict(worker.progress.position), was=was), worker.control_offset
    if worker.control:
        offset = worker.control.append(order)
    for _ in worker.rerun([(offset, order)]):  # as whoever meets the order later
        pass
    return keeper.save(clean=True)


def _relearn(keeper: Keeper, wanted: Loaded) -> Snapshot:
    worker, offset = keeper.worker, int(wanted.manifest["control_offset"])
    now = worker.progress
    worker.load_state_dict({**wanted.state, "deltas": {}, "progress": _unheard(wanted.state["progress"], now)})
    worker.control_offset = offset
    worker.source.seek(worker.progress.position)  # raises Gap where retention was faster
    worker.lineage.add("relearn", records=now.records, to=worker.progress.records)
    return keeper.save()  # not a clean stop: what follows is a fact, under these settings


def _unheard(then: State, now: Progress) -> State:
    """Progress as it was, but what has been answered since then is history; its outcomes' numbers are used up."""
    progress = Progress()
    progress.load_state_dict(then)
    answered = {stream: offset for stream, offset in now.position.items() if stream.input == EVENTS}
    progress.publish_from = {**answered, **now.publish_from} if now.bootstrapping() else answered
    progress.outcomes = now.outcomes + LEAP
    return progress.state_dict()
