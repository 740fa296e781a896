"""The command line. `streamcl COMMAND --help` teaches; results go to stdout, everything else to stderr.

Exit codes: 0 done · 1 something outside failed (broker, file, a bar that was missed) · 2 the command or the config is
wrong · 3 another worker has taken over this shard · 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from streamcl import __version__, channel, connect, garbage, inspection, logs, plasticity, summary
from streamcl import reshard as resharding
from streamcl.backtest import build as backtest
from streamcl.backtest import order_of, pair, redirected
from streamcl.bench.command import bench
from streamcl.bootstrap import Bootstrap
from streamcl.config import Config, ConfigError, changes, fingerprint
from streamcl.console import Json, out
from streamcl.demo import command as demo
from streamcl.engine.choice import engine_of
from streamcl.forget import forget
from streamcl.group.launch import of_rank
from streamcl.group.ranks import Ranks
from streamcl.host import FixedShards, Host, stopping
from streamcl.live import Live
from streamcl.protocols import Fenced, Membership, StreamclError
from streamcl.records import Turn
from streamcl.recovery import store_of
from streamcl.rollback import rollback
from streamcl.serve import Listening
from streamcl.serve import serve as serve_forever
from streamcl.shadow_commands import app as shadow
from streamcl.snapshot import difference, environment
from streamcl.sweep.command import sweep as sweeping
from streamcl.telemetry import Telemetry
from streamcl.warm_start import warm_start as warmed
from streamcl.worker import Worker, logged

log = logging.getLogger("streamcl")
app = typer.Typer(
    name="streamcl",
    help="Learn from a stream, one example at a time: Kafka in, predictions and metrics out.",
    epilog="Exit codes: 0 done; 1 something outside failed; 2 wrong command or config; 3 fenced; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(inspection.app)
app.command()(bench)
app.command()(forget)
app.command()(rollback)
app.add_typer(shadow)
app.command(name="demo")(demo)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file; see `streamcl schema`.")]


WarmStart = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Weights that a first start begins with, as model.warm_start: a file, or a snapshot's folder.",
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: turns errors that a user can cure into one line and an exit code."""
    logs.begin()
    try:
        app(args=arguments)
    except StreamclError as error:
        typer.secho(f"streamcl: {error}", err=True, fg="red")
        raise SystemExit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, Fenced) else 1) from None


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    config: ConfigFile,
    shards: Annotated[
        str | None, typer.Option(metavar="0,2,4|K/N", help="Run these shards; 1/4: those with index % 4 == 1.")
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option(help="Go on although the environment or a setting changed without a clean stop.")
    ] = False,
    idle_exit_s: Annotated[
        float | None, typer.Option(min=0.0, help="Leave, cleanly, once nothing has come for this long. Default: never.")
    ] = None,
    bootstrap: Annotated[
        bool, typer.Option(help="A first start learns what the topics hold by now without publishing, then goes live.")
    ] = False,
    history: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="It learns from this instead: events=file:///old.jsonl (repeatable)."),
    ] = None,
    serve: Annotated[
        int | None,
        typer.Option(min=0, max=65535, metavar="PORT", help="Also answer predictions here, from the live model."),
    ] = None,
    warm_start: WarmStart = None,
    as_json: Json = False,
) -> None:
    """Run shards until told to stop (SIGTERM, Ctrl-C): they finish their turn, save, and leave.

    Brokers that go away are waited for. Exit code 3: another worker has taken over a shard.

    Under torchrun it is a rank of a group, which learn one model together in rounds; see [group]:

    \b
    torchrun --nproc-per-node 4 --max-restarts 100 --no-python streamcl run CONFIG
    """
    settings = of_rank(_with_shards(_begun_with(Config.load(config), warm_start), shards), history=bool(history))
    if serve is not None:
        settings = _with_serve(settings, in_worker=True, port=serve)
    logs.go_on_as(settings.telemetry.log_format)
    with contextlib.closing(Telemetry(settings)) as telemetry, contextlib.ExitStack() as signals:
        ranks = signals.enter_context(contextlib.closing(Ranks.of_environment(settings.group)))
        membership = signals.enter_context(contextlib.closing(_membership(settings)))
        past = _bootstrap(settings, history or ()) if bootstrap or history else None
        host = Host(settings, membership, telemetry, accept_changes=accept_changes, bootstrap=past, ranks=ranks)
        if settings.serve.in_worker:
            signals.enter_context(_answering(settings, host))
        signals.enter_context(stopping(host))
        telemetry.start()
        garbage.spare()
        host.work(idle_exit_s)
    _summarise({seat.last: seat.readings for _, seat in sorted(host.seats.items()) if seat.last}, settings, as_json)


@contextlib.contextmanager
def _answering(config: Config, host: Host) -> Iterator[None]:
    """Predictions from the live model, on a thread beside the loop."""

    def worker() -> Worker | None:
        lives = [seat.life for seat in list(host.seats.values()) if seat.life]
        return lives[0].worker if lives else None

    endpoint = Listening(Live(config, worker), config)
    thread = threading.Thread(target=endpoint.run, name="serve", daemon=True)
    thread.start()
    try:
        yield
    finally:
        endpoint.stop()
        thread.join(timeout=10.0)


def _bootstrap(config: Config, history: Sequence[str]) -> Bootstrap:
    """Of what the topics hold, or of recorded `history`, which every shard learns whole."""
    if not history:
        if config.kafka.start_at != "earliest":
            raise ConfigError(f"--bootstrap: kafka.start_at is {config.kafka.start_at!r}, which leaves no history")
        return Bootstrap()
    recorded = redirected(config, dict(map(pair, history)), None)
    return Bootstrap(lambda: connect.open_source(recorded))


def _summarise(workers: summary.Ended, config: Config, as_json: bool) -> None:
    """One shard's summary when there is but one; else each, and their sums."""
    alone = config.shard.count == 1 and len(workers) == 1
    shards = [summary.of_shard(worker, readings) for worker, readings in workers.items()]
    if as_json:
        out(shards[0] if alone else {**summary.totals(config, workers), "shards": shards})
        return
    for each in shards:
        Console().print(summary.table(each))
    if not alone:
        told = summary.totals(config, workers)
        Console().print(f"{len(shards)} shards: {told['records']} records, learned hash {told['learned_hash']}")


def _membership(config: Config) -> Membership:
    return connect.join_group(config) if config.shard.assignment == "group" else FixedShards(config)


def _with_shards(config: Config, text: str | None) -> Config:
    """The config with `--shards`: a list of indices, or `K/N` for those with index % N == K."""
    if text is None:
        return config
    if config.shard.assignment == "group":
        raise ConfigError("--shards: a group hands out the shards (shard.assignment)")
    try:
        if "/" in text:
            worker, workers = map(int, text.split("/"))
            indices = list(range(worker, config.shard.count, workers)) if 0 <= worker < workers else []
        else:
            indices = [int(part) for part in text.split(",")]
    except ValueError:
        indices = []
    if not indices:
        raise ConfigError(f"--shards {text}: expected 0,2,4 or 1/4 (K/N, K below N), of {config.shard.count} shards")
    data = config.model_dump(mode="json")
    return Config.parse({**data, "shard": {**data["shard"], "indices": indices}}, "--shards")


@app.command()
def replay(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A TOML file; with --sweep: in the place of its `base`."),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Read this instead: events=file:///log.jsonl, labels=... (repeatable)."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(metavar="URL", help="A control log to follow; default for Kafka inputs: their own.")
    ] = None,
    predictions: Annotated[str | None, typer.Option(metavar="URL", help="Also send the predictions somewhere.")] = None,
    sweep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare configurations: a TOML file; see below.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Of a sweep: finished runs, the report. Default: the file's name, -out."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Of a sweep: processes side by side. Default: cores.")] = None,
    warm_start: WarmStart = None,
    as_json: Json = False,
) -> None:
    """Backtest: run the same loop over a recorded stream. Same log, same config: same model, same predictions.

    Nothing is published and no checkpoint written. Files are merged by (record timestamp, input, partition, offset).

    With --sweep many configurations run over the same log, in parallel processes, and are compared with the base
    on the same events: report.html, a table, JSON. What is finished is kept in the folder, and not run again.
    The sweep's file:

    \b
    base = "clicks.toml"    # the others are this with some settings changed
    seeds = [0, 1]          # each runs with each; default: the base's
    events = 100_000        # a prefix of the log; default: all of it
    objective = "ne"        # log_loss, auc, gauc, accuracy, rmse, mae
    choose_on = 0.2         # on this share; only chosen and base go on
    halving = {eta = 3, first = 5_000}  # after 5,000, 15,000, ... events

    \b
    \\[grid]                  # every combination
    optimizer.learning_rate = [0.02, 0.05, 0.1]
    model.embedding_dim = [8, 16]

    \b
    \\[random]                # and draws
    draws = 9
    space.optimizer.learning_rate = {log_uniform = [0.01, 0.3]}

    \b
    [\\[list]]                # and single ones
    name = "replay"
    replay = {retention = "recency", per_event = 4}

    \b
    Ranges: uniform, log_uniform, integers = \\[low, high]; choice = [...].
    Exit code 1: some configurations have failed; the others stand.
    """
    redirect = dict(pair(text) for text in input or ())
    if sweep is not None:
        if predictions:
            raise ConfigError("--predictions: a sweep has many answers to each event, and sends none")
        sweeping(sweep, config, redirect, order, folder, jobs, as_json)
    if folder is not None or jobs is not None:
        raise ConfigError("--out, --jobs: are those of --sweep")
    if config is None:
        raise ConfigError("CONFIG: missing; see `streamcl replay --help`")
    settings = redirected(_begun_with(Config.load(config), warm_start), redirect, predictions)
    worker = backtest(settings)
    with contextlib.closing(worker), stopping(worker):
        warmed(worker)
        worker.progress.position = dict(worker.source.seek({}))
        url = order or order_of(settings, worker.source.streams())
        garbage.spare()
        turns = worker.rerun(logged(connect.connector(url).open_control(url, settings), 0)) if url else worker.run()
        for _ in _progress(turns, worker):
            pass
        worker.flush()
        _summarise({worker: worker.readings()}, settings, as_json)


def _progress(turns: Iterator[Turn], worker: Worker) -> Iterator[Turn]:
    """Ends a source that never ends by itself once it has nothing left."""
    columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    idle_since = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replay", total=None)
        for turn in turns:
            yield turn
            lag = sum(worker.source.lag().values())
            bar.update(task, advance=turn.records, total=worker.progress.records + lag if lag else None)
            idle_since = time.monotonic() if turn.records else idle_since
            if not turn.records and not lag and time.monotonic() - idle_since > 5.0:
                worker.stop()


@app.command()
def reshard(
    config: ConfigFile,
    old: Annotated[int, typer.Option("--from", min=1, help="How many shards there are; all of them stopped cleanly.")],
    new: Annotated[int, typer.Option("--to", min=1, help="How many there shall be; as many, if topics have grown.")],
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make M shards of N, offline: positions, tickets and counts move, and nothing is lost or learned twice.

    Then set shard.count = M. The old snapshots stay, marked, so that no worker starts from them.
    """
    settings = Config.load(config)
    planned = resharding.plan(settings, old, new)
    told = planned.describe()
    if as_json:
        out(told)
    else:
        columns = ("shard", "model_of", "position", "new_partitions", "records", "tickets")
        table = Table(*columns, title=f"{settings.name}: {old} shards to {new}", title_justify="left")
        for shard in told["shards"]:
            table.add_row(*(orjson.dumps(shard[column]).decode() for column in columns))
        Console().print(table)
    if not dry_run:
        resharding.carry_out(planned)


@app.command()
def serve(
    config: ConfigFile,
    host: Annotated[str | None, typer.Option(help="Where to listen. Default: serve.host, loopback.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0: any. Default: serve.port.")] = None,
) -> None:
    """Answer `POST /v1/predict` from the worker's newest snapshot, following new ones; `/docs` describes it.

    Key, certificate and limits stand in the config's [serve].
    """
    settings = _with_serve(Config.load(config), host=host, port=port)
    logs.go_on_as(settings.telemetry.log_format)
    serve_forever(settings)


def _begun_with(config: Config, path: Path | None) -> Config:
    """The config with `--warm-start`."""
    if path is None:
        return config
    data = config.model_dump(mode="json")
    return Config.parse({**data, "model": {**data["model"], "warm_start": str(path)}}, "--warm-start")


def _with_serve(config: Config, **given: Any) -> Config:
    """The config with what the command line says about `[serve]`."""
    data, given = config.model_dump(mode="json"), {name: value for name, value in given.items() if value is not None}
    return Config.parse({**data, "serve": {**data["serve"], **given}}, "command line")


@app.command()
def check(config: ConfigFile, as_json: Json = False) -> None:
    """Validate a config, connect, and print what `run` would do. Changes nothing but an empty checkpoint folder."""
    settings = Config.load(config)
    urls = [*settings.inputs.values(), settings.dead_letters_url]
    urls += settings.published
    urls += [url for url in (settings.deltas_url,) if url and channel.is_topic(url)]
    plasticity.check(settings)
    findings = channel.check(settings)
    for scheme in sorted({url.partition(":")[0] for url in urls}):
        mine = [url for url in urls if url.partition(":")[0] == scheme]
        findings += connect.connector(mine[0]).check(mine, settings)
    findings += connect.check_codecs(settings)
    store = store_of(settings)
    store.probe()
    newest = store.newest()
    changed = changes(newest.manifest["config"], settings) if newest else []
    engine, because = engine_of(settings)
    now = environment(engine, "cuda" if settings.worker.device == "cuda" else "cpu")
    plan = {
        "name": settings.name,
        "fingerprint": fingerprint(settings),
        "inputs": settings.inputs,
        "predictions": settings.predictions,
        "outcomes": settings.outcomes_url,
        "deltas": settings.deltas_url,
        "dead_letters": settings.dead_letters_url,
        "control": settings.control_url,
        "checkpoints": str(store.folder),
        "snapshot": newest.snapshot.name if newest else None,
        "changed_since": dict(changed),
        "environment_changed": difference(newest.manifest["environment"], now) if newest else [],
        "engine": engine if not because else f"{engine}: {because} has no compiled form",
        "findings": findings,
    }
    if as_json:
        out(plan)
    else:
        for name, value in plan.items():
            typer.echo(f"{name:20} {value}")
    if any(change == "new" for _, change in changed):
        raise ConfigError(f"{store.folder}: {', '.join(p for p, c in changed if c == 'new')} changed: other state")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config. `change` says what changing a setting means for a live checkpoint."""
    out(Config.model_json_schema())


if __name__ == "__main__":
    main()
