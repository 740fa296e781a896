"""The command line of the benches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from streamcl.bench import BENCHES, main
from streamcl.bench.options import Options
from streamcl.protocols import StreamclError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help=", ".join(BENCHES))],
    data: Annotated[Path | None, typer.Option(help="folder of recorded streams")] = None,
    stream: Annotated[str | None, typer.Option(help="which stream")] = None,
    preset: Annotated[str | None, typer.Option(help="hyper-parameters by name")] = None,
    task: Annotated[str | None, typer.Option(help="which task")] = None,
    method: Annotated[str | None, typer.Option(help="which method")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a small run, within a minute")] = False,
    seeds: Annotated[int | None, typer.Option(help="how many seeds")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
    plot: Annotated[Path | None, typer.Option(help="draw the curves into this file")] = None,
    via: Annotated[str | None, typer.Option(help="URL whose topics the events travel through")] = None,
    kills: Annotated[int | None, typer.Option(help="how often a process is killed")] = None,
    events: Annotated[int | None, typer.Option(help="how many events are streamed")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="how long a run without an end lasts")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="reckon what a larger one would come to")] = False,
) -> None:
    """Measure what is promised, beside its peers. Exit code 0: every bar is met; 2: it could not be measured."""
    asked = data, stream, preset, task, method, device, quick, seeds, as_json, plot, via, kills, events, minutes
    options = Options(*asked, simulate)
    try:
        code = main(name, options)
    except StreamclError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    raise typer.Exit(code)
