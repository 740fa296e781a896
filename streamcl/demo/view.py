"""What the demo shows while it runs: a live board on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from streamcl.demo.ledger import BEFORE

RECENT = 2_000  # impressions that "now" means
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Glance:
    """Everything the board shows at one moment. Rates and times of this class are the only wall-clock ones."""

    title: str
    share: float  # of the traffic that has been read, 0 .. 1
    per_s: float  # impressions answered per second since the glance before
    elapsed_s: float
    now: Mapping[str, float | None]
    before: Mapping[str, float | None]
    bayes: Mapping[str, float | None]
    readings: Mapping[str, float]
    replay_capacity: int
    curve: tuple[float, ...]  # log-loss of the live model by slice of the stream; NaN: not there yet
    drifts: tuple[str, ...]
    alarms: tuple[str, ...]

    @property
    def left_s(self) -> float:
        """NaN before there is anything to go by."""
        return self.elapsed_s * (1 - self.share) / self.share if self.share > 0.01 else math.nan


class View:
    """Shows glances, a few per second on a terminal, one line per `line_every_s` elsewhere.

    Use as a context; `due` says whether a glance would be shown, so that nobody computes one in vain.
    """

    def __init__(self, console: Console, line_every_s: float = 5.0) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._every_s = 0.4 if self._live else line_every_s
        self._next = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, glance: Glance) -> None:
        self._next = time.monotonic() + self._every_s
        if self._live:
            self._live.update(board(glance), refresh=True)
        else:
            self._console.print(line(glance), soft_wrap=True, highlight=False)


def line(glance: Glance) -> str:
    """One plain line."""
    tickets, lag = (glance.readings.get(name, 0.0) for name in ("tickets", "lag_records"))
    return (
        f"{glance.share:4.0%}  {glance.per_s:5.0f} events/s  log-loss {number(glance.now['log_loss'])} "
        f"(before {number(glance.before['log_loss'])}, best possible {number(glance.bayes['log_loss'])})  "
        f"NE {number(glance.now['ne'])}  AUC {number(glance.now['auc'])}  tickets {tickets:.0f}  lag {lag:.0f}  "
        f"alarms {len(glance.alarms)}  left {clock(glance.left_s)}"
    )


def board(glance: Glance) -> RenderableType:
    """The whole board."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right")
    left = f"{glance.share:4.0%}  {clock(glance.elapsed_s)} gone, {clock(glance.left_s)} left"
    bar.add_row(ProgressBar(total=1.0, completed=glance.share), left)
    body = Group(_quality(glance), Text(), _flow(glance), Text(), _curve(glance), Text(), _drift(glance), Text(), bar)
    return Panel(body, title=f"[bold]{glance.title}", subtitle="Ctrl-C ends it", border_style="cyan")


def _quality(glance: Glance) -> Table:
    table = Table("", "now", f"first {BEFORE:,}", "best possible", box=None, padding=(0, 2), header_style="dim")
    for name, key in (("log-loss (nats)", "log_loss"), ("NE (1 = base rate)", "ne"), ("AUC", "auc")):
        now, before, bayes = glance.now[key], glance.before[key], glance.bayes[key]
        table.add_row(name, f"[bold green]{number(now)}", number(before), f"[dim]{number(bayes)}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _flow(glance: Glance) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = glance.readings.get("replay_rows", 0.0)
    table.add_row(
        "[dim]events/s", f"[bold]{glance.per_s:,.0f}",
        "[dim]lag", f"{glance.readings.get('lag_records', 0.0):,.0f} records",
        "[dim]tickets waiting", f"{glance.readings.get('tickets', 0.0):,.0f}",
        "[dim]replay", f"{rows:,.0f} of {glance.replay_capacity:,}",
    )  # fmt: skip
    return table


def _curve(glance: Glance) -> Text:
    return Text.assemble(("log-loss so far", "dim"), "  ", (spark(glance.curve), "cyan"))


def _drift(glance: Glance) -> Table:
    table = Table.grid(padding=(0, 3))
    table.add_row("[dim]true drifts", Text("\n".join(glance.drifts) or "none yet"))
    table.add_row("[dim]drift alarms", Text(", ".join(glance.alarms) or "none yet", "yellow"))
    return table


def spark(values: tuple[float, ...]) -> str:
    """A line of blocks, the least value lowest; a dot where there is none yet."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    step = (high - low) / (len(BLOCKS) - 1) or 1.0
    return "".join(BLOCKS[round((v - low) / step)] if math.isfinite(v) else "·" for v in values)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}" if math.isfinite(seconds) else "-:--"
