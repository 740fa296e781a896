"""The answer of every bench: rows (what was measured), bars (what was promised), and where it ran.

Output contract: `--json` prints one object on stdout; exit code 0 only if all bars are ok; progress goes to stderr.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import torch
from rich.console import Console
from rich.table import Table

from streamcl.bench.options import OptionError

Value = float | int | str | bool | None

WIDEST = 400  # characters of a table in a file: no column is cut off

PACKAGES = ("streamcl", "torch", "numpy", "river", "vowpalwabbit", "kafka-python", "confluent-kafka")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured, ours or a peer's. Metrics carry their unit in the name.

    People see the rows of one `table` together, in columns of their own.
    """

    name: str
    values: Mapping[str, Value] = field(default_factory=dict)
    table: str = ""

    def to_json(self) -> dict[str, Value]:
        return {"name": self.name, **self.values}


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise: `value` must be at least `limit`, or at most it when `at_least` is False. NaN never passes."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Value]:
        return {"name": self.name, "value": self.value, "limit": self.limit, "ok": self.ok}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the plot. Curves of one panel share its axes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    panel: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What a bench found.

    `aims` are read like bars but decide nothing: what we would like and don't promise. `headline` stands at the top
    level of the JSON object. `notes` say what a reader needs to judge the figures (slices, definitions).
    """

    bench: str
    config: Mapping[str, Any]
    seeds: Sequence[int]
    seconds: float
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    aims: Sequence[Bar] = ()
    headline: Mapping[str, Value] = field(default_factory=dict)
    notes: Sequence[str] = ()
    curves: Sequence[Curve] = ()
    axes: tuple[str, str] = ("events", "")

    @property
    def exit_code(self) -> int:
        return 0 if all(bar.ok for bar in self.bars) else 1

    def to_json(self) -> dict[str, Any]:
        """The contract's object; NaN and infinity become null when it is written."""
        return {
            "bench": self.bench,
            **self.headline,
            "config": dict(self.config),
            "seeds": list(self.seeds),
            "seconds": round(self.seconds, 3),
            "machine": machine(),
            "rows": [row.to_json() for row in self.rows],
            "bars": [bar.to_json() for bar in self.bars],
            "aims": [bar.to_json() for bar in self.aims],
            "notes": list(self.notes),
        }


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code. `cpus` counts those this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpus": len(affinity(0)) if affinity else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def progress(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def emit(report: Report, *, as_json: bool, plot: Path | None) -> None:
    """Print the report on stdout and draw it if asked to."""
    if plot is not None:
        draw(report, plot)
    if as_json:
        print(orjson.dumps(report.to_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        terminal = Console()
        console = Console(width=max(terminal.width, 120))
        _print_tables(report, console if terminal.is_terminal else Console(width=WIDEST))
        for note in report.notes:
            console.print(f"· {note}", markup=False, highlight=False)
        console.print(f"{report.seconds:.1f} s, {machine()}", markup=False, highlight=False)


def _print_tables(report: Report, console: Console) -> None:
    for table in dict.fromkeys(row.table for row in report.rows):
        rows = [row for row in report.rows if row.table == table]
        columns = list(dict.fromkeys(key for row in rows for key in row.values))
        title = f"bench {report.bench} {table}".rstrip()
        named = [{**row.to_json(), "name": row.name.removeprefix(f"{table}: ")} for row in rows]
        _print_table(console, title, ["name", *columns], named)
    for title, bars in (("bars", report.bars), ("aims (not promised)", report.aims)):
        if bars:
            _print_table(console, title, ["name", "value", "limit", "ok"], [bar.to_json() for bar in bars])


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Value]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        if column == "name":
            table.add_column(column, no_wrap=True)
        else:
            table.add_column(column, justify="right", min_width=7, overflow="fold")  # long headers fold, not numbers
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console.print(table)


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 and math.isfinite(value) else f"{value:.4f}"
    return str(value)


def draw(report: Report, path: Path) -> None:
    """Write the report's curves, one panel beside the other. Raises OptionError without curves or matplotlib."""
    if not report.curves:
        raise OptionError(f"--plot: bench {report.bench} has no curves")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("--plot: needs matplotlib; install streamcl[bench]") from error
    panels = list(dict.fromkeys(curve.panel for curve in report.curves))
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in (curve for curve in report.curves if curve.panel == panel):
            axis.plot(curve.x, curve.y, label=curve.name, linewidth=1)
        axis.set(title=panel or report.bench, xlabel=report.axes[0], ylabel=report.axes[1])
        axis.legend(fontsize="small")
    figure.savefig(path)
