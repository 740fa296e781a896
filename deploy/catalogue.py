"""The table of metrics: what a worker or a replica exports, where it is seen and what wakes somebody."""

from __future__ import annotations

import re

from deploy.alerts import alerts
from deploy.boards import BOARDS
from streamcl.families import Family, families

HEAD = """# Metrics

What `/metrics` of a worker (`[telemetry]`) and of an endpoint that serves (`streamcl serve`, `run --serve`) export. The
table is written by `python -m deploy` from the code. With several shards in a process, gauges of a shard carry a label
`shard` too; in a shadow those of quality carry `role`. No key, user or id is ever a label, and a family has 1,024
series at most (`streamcl_series_dropped` counts what is left out). A plug-in's own readings come as `streamcl_NAME`.

| metric | type | unit | labels | of | meaning | panel | alert |
|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """docs/metrics.md."""
    panels = {
        f"{board.title}: {p.title}": " ".join(e for e, _ in p.queries)
        for board in BOARDS.values()
        for p in board.panels
    }
    rules = {alert.name: alert.expr for alert in alerts()}
    return HEAD + "".join(_row(family, _users(family, panels), _users(family, rules)) for family in families())


def used(expr: str) -> set[str]:
    """Names of metrics in an expression."""
    return set(re.findall(r"\b(?:streamcl|process)_\w+", expr))


def _users(family: Family, texts: dict[str, str]) -> list[str]:
    names = family.samples()
    return [name for name, text in texts.items() if names & used(text)]


def _row(family: Family, panels: list[str], rules: list[str]) -> str:
    cells = [f"`{family.name}`", family.kind, family.unit, ", ".join(family.labels), family.of, family.text]
    cells += ["; ".join(panels), ", ".join(rules)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
