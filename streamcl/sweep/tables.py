"""The comparison as a table, for a terminal and for the page."""

from __future__ import annotations

import math

from rich.table import Table

from streamcl.sweep.results import Results, Row

COLUMNS = {
    "binary": ("ne", "log_loss", "auc", "gauc", "calibration", "ne_window", "auc_window"),
    "multiclass": ("ne", "log_loss", "accuracy", "ne_window", "accuracy_window"),
    "regression": ("rmse", "mae", "rmse_window", "mae_window"),
}
"""By task; the JSON object has more."""
HEADS = {
    "ne": "NE", "log_loss": "log-loss", "auc": "AUC", "gauc": "gAUC", "rmse": "RMSE", "mae": "MAE",
    "ne_window": "NE, last", "auc_window": "AUC, last", "accuracy_window": "accuracy, last",
    "rmse_window": "RMSE, last", "mae_window": "MAE, last",
    "difference": "loss less base's", "interval": "95 %", "p": "p", "p_holm": "p (Holm)", "rate": "events/s",
}  # fmt: skip


def cells(results: Results, row: Row) -> dict[str, str]:
    """By column; "" where there is nothing to say."""
    made = {"status": row.status, "events": f"{row.events:,}"}
    for name in COLUMNS[results.task]:
        made[name] = number(row.figures.get(name)) + _spread(row.sd.get(name))
    gap = row.difference
    made["difference"] = signed(gap.mean) if gap else ""
    judged = gap is not None and not math.isnan(gap.p)
    made["interval"] = f"{signed(gap.low)} … {signed(gap.high)}" if gap and judged else ""
    made["p"], made["p_holm"] = (number(gap.p), number(row.p_holm)) if gap and judged else ("", "")
    made["rate"] = f"{row.events_per_s:,.0f}" if row.events_per_s else ""
    return made


def table(results: Results) -> Table:
    """For a terminal: less than the page has, the chosen one in bold."""
    least = ("status", "events", *COLUMNS[results.task][:5], "difference", "interval", "p_holm", "rate")
    made = Table(title=f"{results.name}: by {results.objective}", title_justify="left")
    made.add_column("configuration", overflow="fold")
    for column in least:
        made.add_column(HEADS.get(column, column), justify="right", no_wrap=True)
    for row in results.rows:
        told = cells(results, row)
        style = "bold green" if row.name == results.chosen else "red" if row.status == "failed" else None
        made.add_row(row.name, *(told[column] for column in least), style=style)
    return made


def number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if 0 < abs(value) < 0.0001:
        return f"{value:.0e}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.5f}"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
