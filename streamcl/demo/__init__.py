"""`streamcl demo`: simulated traffic, the real worker, a live view and a report. Needs no broker, Docker or network.

simulator   traffic whose truth is known      traffic   sends it
ledger      what became of every impression   view      the terminal
stage       puts them together                report    one HTML file
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from streamcl.config import ConfigError
from streamcl.demo.simulator import Settings
from streamcl.demo.stage import Plan, Result, run
from streamcl.demo.view import number
from streamcl.protocols import StreamclError

EVENTS, QUICK_EVENTS = 30_000, 4_000
SECONDS = 95.0  # of traffic at the default pace; start, end and report come on top


def command(
    events: Annotated[int | None, typer.Option(min=10, help=f"impressions [default: {EVENTS:,}]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the traffic and the model")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_EVENTS:,} impressions, as fast as they go")] = False,
    in_memory: Annotated[bool, typer.Option("--in-memory", help="no broker: topics in this process")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the summary as one JSON object on stdout")] = False,
) -> None:
    """Watch a model learn from simulated clicks over Kafka, drift and all; about two minutes. Ctrl-C ends it early."""
    raise typer.Exit(main(events, seed, out, quick=quick, in_memory=in_memory, as_json=as_json))


def main(
    events: int | None = None,
    seed: int = 0,
    out: Path = Path("demo-out"),
    *,
    quick: bool = False,
    in_memory: bool = False,
    as_json: bool = False,
) -> int:
    """Run the demo, write `out/report.html` and `out/summary.json`; the exit code: 0, 1 on failure, 130 on Ctrl-C.

    Raises:
        ConfigError: before anything is run, where the report can't be drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("demo: its report needs matplotlib: pip install 'streamcl[demo]'")
    console = Console(stderr=as_json)
    settings = Settings(events=events or (QUICK_EVENTS if quick else EVENTS), seed=seed)
    pace = float("inf") if quick else max(1.2 * EVENTS / SECONDS, 1.0)
    logging.getLogger("kafka").setLevel(logging.ERROR)
    try:
        result = run(Plan(settings, pace, embedded_broker=not in_memory), console)
        return _conclude(result, out, console, as_json)
    except StreamclError as error:
        print(f"streamcl demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("streamcl demo: interrupted, nothing written", file=sys.stderr)
        return 130


def _conclude(result: Result, out: Path, console: Console, as_json: bool) -> int:
    from streamcl.demo.report import write_report  # a worker's start must not wait for matplotlib

    summary = result.summary()
    out.mkdir(parents=True, exist_ok=True)
    encoded = orjson.dumps(summary, option=orjson.OPT_INDENT_2)
    (out / "summary.json").write_bytes(encoded)
    report = write_report(out / "report.html", result.ledger, summary)
    for text in told(summary):
        console.print(text, highlight=False)
    console.print(f"Report: {report.resolve()}", highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.buffer.write(encoded + b"\n")
        sys.stdout.flush()
    return 0 if result.finished else 130


def told(summary: Mapping[str, Any]) -> list[str]:
    """The summary in sentences."""
    last, before = summary["last_tenth"], summary["before_learning"]
    reached = sum(1 for point in summary["drift_points"] if point["impression"] < summary["impressions"])
    found = sum(1 for alarm in summary["alarms"] if alarm["drift"] and not alarm["repeat"])
    return [
        f"{'Done' if summary['finished'] else 'Interrupted'} after {summary['seconds']:.0f} s: "
        f"{summary['impressions']:,} impressions, {summary['labelled']:,} labelled and learned from, "
        f"{summary['events_per_s']:,.0f} per second.",
        f"Log-loss {number(before['log_loss'])} at the start, {number(last['live']['log_loss'])} over the last tenth; "
        f"frozen early {number(last['frozen']['log_loss'])}, best possible {number(last['bayes']['log_loss'])}.",
        f"NE {number(last['live']['ne'])}, AUC {number(last['live']['auc'])} over the last tenth. "
        f"Drift alarms: {len(summary['alarms'])}; true drifts found: {found} of {reached}.",
    ]
