"""The comparison as a page: one HTML file that loads nothing. Needs Matplotlib; only who writes it imports this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from streamcl import page
from streamcl.sweep.results import Results, Row
from streamcl.sweep.space import BASE
from streamcl.sweep.tables import HEADS, cells, number, signed

COLOURS = ("#3b82f6", "#e08a1e", "#16a085", "#dc4c4c", "#9b59d0", "#0ea5b7", "#b45309", "#db2777")
NAMED = len(COLOURS)
"""Curves with a colour and a line in the legend, beside the base's; the others are thin and grey."""
LONGEST = 64
STYLE = page.STYLE | {"font.size": 12}


def write_report(path: Path, results: Results) -> Path:
    """Write the page; returns its path."""
    parts = [_head(results), _cards(results), _curves(results), _table(results), _rest(results), _rounds(results)]
    notes = "".join(f"<p class='soft'>{escape(note)}</p>" for note in results.notes())
    failed = [(escape(row.name), escape(row.failure)) for row in results.rows if row.failure]
    if failed:
        parts.append(_section("Failed", page.table(("configuration", "why"), failed)))
    parts.append(_section("How to read this", notes))
    return page.write(path, f"streamcl sweep: {results.name}", "\n".join(part for part in parts if part))


def _section(title: str, body: str) -> str:
    return f"<section class='figures'>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _head(results: Results) -> str:
    seeds = f", {len(results.seeds)} seeds each" if len(results.seeds) > 1 else f", seed {results.seeds[0]}"
    ended = " Interrupted: what follows covers what was finished." if results.interrupted else ""
    text = (
        f"{len(results.rows)} configurations{seeds}, over {results.events:,} of {results.log.events:,} events, judged"
        f" by {results.objective}; {results.seconds:,.0f} s in {results.jobs} processes.{ended}"
    )
    return f"<h1>{escape(results.name)}</h1>\n<p class='soft'>{escape(text)}</p>"


def _cards(results: Results) -> str:
    objective = results.objective
    base = next((row for row in results.rows if row.name == BASE), None)
    cards = []
    if results.chosen:
        row = results.row(results.chosen)
        told = f"{objective} {number(row.figures.get(objective))} over {row.events:,} events"
        cards.append(("chosen", escape(row.name), told))
        if row.difference:
            gap = row.difference
            told = f"95 % from {signed(gap.low)} to {signed(gap.high)}, p (Holm) {number(row.p_holm)}"
            cards.append(("mean loss less the base's", signed(gap.mean), told))
        if results.rest and results.rest.difference:
            gap = results.rest.difference
            told = f"95 % from {signed(gap.low)} to {signed(gap.high)}, p {number(gap.p)}"
            cards.append(("the same on the rest", signed(gap.mean), told))
    if base and base.figures:
        told = f"{objective} {number(base.figures.get(objective))} over {base.events:,} events"
        cards.append(("base", "as configured", told))
    made = "".join(f'<div class="card"><span>{a}</span><b>{b}</b><small>{c}</small></div>' for a, b, c in cards)
    return f'<div class="cards words">{made}</div>' if made else ""


def _curves(results: Results) -> str:
    if not any(row.curve and row.curve.x for row in results.rows):
        return ""
    unit = "squared error" if results.task == "regression" else "log-loss (nats)"
    with mpl.rc_context(STYLE):
        loss = page.svg(_plot(results, "loss", f"{unit}, mean of a block"), "loss")
        ahead = page.svg(_plot(results, "ahead", f"{unit}, sum"), "ahead")
    below = "A line that falls is losing less than the base where it falls; the test is about where it ends."
    parts = [_section("Loss along the stream", loss)]
    if any(row.curve and row.curve.ahead for row in results.rows):
        parts.append(_section("Loss less the base's, summed up", f"{ahead}<p class='soft'>{below}</p>"))
    return "\n".join(parts)


def _drawn(results: Results) -> Iterator[tuple[int, Row, int]]:
    """(place among all rows, row, its colour's number; -1: the base, NAMED and above: one of many); the best last."""
    others = [row for row in results.rows if row.name != BASE]
    for place, row in reversed(list(enumerate(results.rows))):
        yield place, row, -1 if row.name == BASE else others.index(row)


def _plot(results: Results, what: str, label: str) -> Figure:
    named = min(len(results.rows), NAMED + 1)
    figure = Figure(figsize=(6.0, 3.6 + 0.19 * named), layout="constrained")
    axes = figure.subplots()
    for place, row, colour in _drawn(results):
        values: Sequence[float] | None = getattr(row.curve, what) if row.curve else None
        if not row.curve or values is None:
            continue
        name = row.name if len(row.name) <= LONGEST else f"{row.name[: LONGEST - 1]}…"
        if colour < 0:
            style: Any = {"color": page.INK, "linestyle": "--", "linewidth": 1.6, "label": name}
        elif colour < NAMED:
            style = {"color": COLOURS[colour], "linewidth": 2.4 if row.name == results.chosen else 1.4, "label": name}
        else:
            style = {"color": page.INK, "alpha": 0.25, "linewidth": 0.8}
        (line,) = axes.plot(row.curve.x, values, **style)
        line.set_gid(f"run-{place}")
    axes.set(xlabel="events", ylabel=label)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower left", fontsize=9)
    return figure


def _table(results: Results) -> str:
    head = ("configuration", *(HEADS.get(column, column) for column in cells(results, results.rows[0])))
    lines = []
    for row in results.rows:
        told = [escape(row.name), *map(escape, cells(results, row).values())]
        lines.append([f"<b>{cell}</b>" for cell in told] if row.name == results.chosen else told)
    return _section("Figures", page.table(head, lines))


def _rest(results: Results) -> str:
    rest = results.rest
    if rest is None:
        return ""
    names = [name for name in rest.figures if name in rest.base]
    lines = [(HEADS.get(name, name), number(rest.figures[name]), number(rest.base[name])) for name in names]
    return _section(f"The rest: behind event {rest.begins_at:,}", page.table(("", "chosen", BASE), lines))


def _rounds(results: Results) -> str:
    if len(results.plan) < 2:
        return ""
    lines = [
        (str(at), f"{cut.events:,}", "the end" if cut.keep is None else f"the best {cut.keep}, and the base")
        for at, cut in enumerate(results.plan, 1)
    ]
    return _section("Rounds", page.table(("round", "up to events", "then go on"), lines))
