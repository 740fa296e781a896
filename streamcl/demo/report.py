"""The demo's report: one HTML file with its plots inside. It loads nothing, and follows the reader's light or dark."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from streamcl import page
from streamcl.demo.ledger import ANSWER_WITHIN, BEFORE, FREEZE_AT, Ledger
from streamcl.demo.view import clock, number
from streamcl.page import INK, STYLE, svg, table

LIVE, FROZEN, BAYES, DRIFT, ALARM = "#3b82f6", "#e08a1e", "#16a085", "#dc4c4c", "#9b59d0"
SLICES = 60


def write_report(path: Path, ledger: Ledger, summary: Mapping[str, Any]) -> Path:
    """Write the page; `summary` is what `Result.summary` returned. Returns the path."""
    with mpl.rc_context(STYLE):
        loss, calibration = svg(loss_plot(ledger), "loss"), svg(calibration_plot(ledger), "calibration")
    body = Template(BODY).substitute(
        subtitle=escape(_subtitle(summary)),
        cards=_cards(summary),
        loss=loss,
        calibration=calibration,
        figures=_figures(summary),
        drift=_drift(summary, ledger),
        run=_run(summary),
        freeze=f"{FREEZE_AT:.0%}",
        before=f"{BEFORE:,}",
        within=f"{ANSWER_WITHIN:.0%}",
    )
    return page.write(path, "streamcl demo report", body)


def loss_plot(ledger: Ledger) -> Figure:
    """Prequential log-loss along the stream: live, frozen, best possible; true drifts and alarms marked."""
    curve, figure = ledger.curve(SLICES), Figure(figsize=(9.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for point in ledger.simulation.drift_points:
        axes.axvline(point.impression, color=DRIFT, linestyle="--", linewidth=1.4)
        where: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (5, -4)}
        axes.annotate(point.name, (point.impression, 1.0), color=DRIFT, va="top", fontsize=9.5, **where)
    axes.plot(curve.impression, curve.base_rate, color=INK, alpha=0.45, linestyle=":", label="base rate (NE = 1)")
    axes.plot(curve.impression, curve.frozen, color=FROZEN, linewidth=2, label=f"frozen after {FREEZE_AT:.0%}")
    axes.plot(curve.impression, curve.live, color=LIVE, linewidth=2.4, label="live model")
    axes.plot(curve.impression, curve.bayes, color=BAYES, linewidth=2, label="best possible")
    alarms = [alarm.impression for alarm in ledger.alarms]
    axes.plot(alarms, [0.02] * len(alarms), "^", color=ALARM, markersize=9, label="drift alarm",
              transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    axes.set(xlabel="impression", ylabel="log-loss (nats)", xlim=(0, len(ledger.label)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(loc="outside upper center", ncols=5)
    return figure


def deciles(ledger: Ledger) -> list[tuple[float, float, float]]:
    """(mean score, click rate, its standard error) of the settled impressions in ten equal groups by live score."""
    scores, labels = ledger.live[: ledger.settled], ledger.label[: ledger.settled]
    groups = [group for group in np.array_split(np.argsort(scores, kind="stable"), 10) if len(group)]
    rows = [(float(scores[g].mean()), float(labels[g].mean()), len(g)) for g in groups]
    return [(score, rate, float(np.sqrt(rate * (1 - rate) / n))) for score, rate, n in rows]


def calibration_plot(ledger: Ledger) -> Figure:
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes, rows = figure.subplots(), deciles(ledger)
    top = 1.08 * max([0.1, *(max(score, rate + 2 * error) for score, rate, error in rows)])
    axes.plot([0, top], [0, top], color=INK, alpha=0.45, linestyle=":", label="perfect")
    if rows:
        score, rate, error = (list(column) for column in zip(*rows, strict=True))
        bars = [2 * each for each in error]
        axes.errorbar(score, rate, yerr=bars, fmt="o-", color=LIVE, capsize=3, label="live model (± 2 standard errors)")
    axes.set(xlabel="mean predicted probability", ylabel="observed click rate", xlim=(0, top), ylim=(0, top))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _subtitle(summary: Mapping[str, Any]) -> str:
    ended = "" if summary["finished"] else " Interrupted: what follows covers the part that ran."
    return (
        f"{summary['impressions']:,} impressions through {summary['transport']}, seed {summary['seed']}, "
        f"in {clock(summary['seconds'])} minutes.{ended}"
    )


def _cards(summary: Mapping[str, Any]) -> str:
    last = summary["last_tenth"]
    cards = (
        ("log-loss, last tenth", last["live"]["log_loss"], f"{number(last['frozen']['log_loss'])} if frozen"),
        ("NE, last tenth", last["live"]["ne"], f"{number(last['bayes']['ne'])} is the best possible"),
        ("AUC, last tenth", last["live"]["auc"], f"{number(last['frozen']['auc'])} if frozen"),
        ("log-loss at the start", summary["before_learning"]["log_loss"], f"first {BEFORE:,} impressions"),
    )
    return "".join(
        f'<div class="card"><span>{title}</span><b>{number(value)}</b><small>{note}</small></div>'
        for title, value, note in cards
    )


def _figures(summary: Mapping[str, Any]) -> str:
    names = {"live": "live", "frozen": "frozen", "bayes": "best possible"}
    parts = (("whole", summary["whole_stream"]), ("last tenth", summary["last_tenth"]))
    keys = ("log_loss", "ne", "auc", "calibration")
    rows = [
        ("" if at else part, names[name], *(number(values[name][key]) for key in keys))
        for part, values in parts
        for at, name in enumerate(names)
    ]
    return table(("", "", "log-loss", "NE", "AUC", "calibration"), rows)


def _drift(summary: Mapping[str, Any], ledger: Ledger) -> str:
    rows = []
    for point in summary["drift_points"]:
        place = f"{point['impression']:,}"
        answer = next((a for a in summary["alarms"] if a["drift"] == point["name"] and not a["repeat"]), None)
        if answer:
            delay = f"{answer['after_impressions']:,} impressions, {answer['after_s'] / 60:.0f} min of event time"
        else:
            delay = "no alarm" if point["impression"] < ledger.seen else "not reached"
        rows.append((place, escape(point["name"]), f"{answer['impression']:,}" if answer else "-", delay))
    others = [alarm for alarm in summary["alarms"] if alarm["drift"] is None or alarm["repeat"]]
    rows += [("-", _other(alarm), f"{alarm['impression']:,}", "-") for alarm in others]
    return table(("true drift at", "what changed", "alarm at", "delay"), rows)


def _other(alarm: Mapping[str, Any]) -> str:
    return "none: a false alarm" if alarm["drift"] is None else f"again: {escape(alarm['drift'])}"


def _run(summary: Mapping[str, Any]) -> str:
    rows = [
        ("impressions answered", f"{summary['impressions']:,}"),
        ("with an outcome (labelled)", f"{summary['labelled']:,}"),
        ("still waiting for a label at the end", f"{summary['tickets_waiting']:,}"),
        ("labels that differ from the simulator's truth", f"{summary['labels_unlike_truth']:,}"),
        ("click rate", number(summary["click_rate"])),
        ("events per second, wall time", f"{summary['events_per_s']:,.0f}"),
        *((f"counted as {escape(name)}", f"{count:,}") for name, count in sorted(summary["counts"].items())),
    ]
    return table(("", ""), rows)


BODY = """<h1>streamcl demo</h1>
<p class="soft">$subtitle</p>
<div class="cards">$cards</div>
<section>
<h2>Learning along the stream</h2>
$loss
<p class="soft">Every impression is scored before its label is known, then learned from. The frozen model is a copy of
the live one that stopped learning after $freeze of the impressions. The best possible loss is that of the simulator's
own click probabilities, which no model is shown.</p>
</section>
<div class="pair">
<section>
<h2>Calibration by decile of the score</h2>
$calibration
</section>
<section>
<h2>Figures</h2>
$figures
<p class="soft">Log-loss in nats. NE is log-loss over the entropy of the base rate, lower is better. Calibration is
predicted over observed clicks, 1 is right. &ldquo;At the start&rdquo; means the first $before impressions, when clicks
had come in but hardly any window had closed without one.</p>
</section>
</div>
<section>
<h2>Drift</h2>
$drift
<p class="soft">An alarm counts for a drift when it comes within $within of the stream after it. It can't come at once:
non-clicks are known only when their window closes. One near the start is the model itself being new: for one window it
has only clicks to learn from, and then the non-clicks prove it wrong.</p>
</section>
<section>
<h2>The run</h2>
$run
</section>"""
