"""One HTML file with its plots inside: it loads nothing, and follows the reader's light or dark.

Plots are Matplotlib's, as SVG in the page's own colours. Only who writes a page imports this.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

INK = "#010203"  # drawn in this, then replaced by the page's own text colour
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "streamcl", "font.family": "sans-serif", "font.size": 11,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": INK, "grid.alpha": 0.12, "axes.grid": True,
    "legend.frameon": False, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


def svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page: no prologue, no metadata, ids of its own, the page's text colour.

    Draw it under `mpl.rc_context(STYLE)`.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    made = buffer.getvalue()
    made = re.sub(r"<metadata>.*?</metadata>", "", made[made.index("<svg") :], flags=re.DOTALL)
    made = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", made)
    return made.replace(INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already. No head where all of its cells are empty."""

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    titles = line(head, "th") if any(head) else ""
    return f'<div class="wide"><table>{titles}{"".join(line(row, "td") for row in rows)}</table></div>'


def write(path: Path, title: str, body: str) -> Path:
    """`body` is HTML. Returns the path."""
    path.write_text(Template(PAGE).substitute(title=escape(title), body=body), encoding="utf-8")
    return path


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f9; --sheet: #ffffff; --ink: #1c2430; --soft: #667085; --line: #e3e6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11151b; --sheet: #1a2028; --ink: #e6eaf0; --soft: #98a2b3; --line: #2c3440; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 0 0 .6rem; font-size: 1.1rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
section, .card { background: var(--sheet); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.3rem; }
section { margin-top: 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 1rem; margin-top: 1.4rem; }
.card span, .card small { display: block; color: var(--soft); } .card b { font-size: 1.8rem; line-height: 1.3; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 0 1rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th { text-align: left; color: var(--soft); font-weight: 500; }
th, td { padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
.pair th, .pair td { white-space: nowrap; padding-right: .45rem; }
.figures svg { max-width: 46rem; margin: 0 auto; } .figures td, .figures th { white-space: nowrap; }
.figures tr:has(td > b) td { background: rgba(59, 130, 246, .14); }
.words b { font-size: 1.15rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""
