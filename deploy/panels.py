"""What a panel is, and how Grafana is told of it; `boards` says which there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import BigValueGraphMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDE = 24  # columns of a dashboard
HEIGHTS = {"stat": 4, "series": 8, "heat": 8}


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        queries: (expression, legend) each.
        unit: Of Grafana: `s`, `bytes`, `percentunit`, `short`, `none`, `eps` for events a second, ...
        text: What is seen, and what to do when it looks wrong.
        limit: From here on it is red; `low`: below it.
        may_be_empty: Why a worker in health may have nothing to show here. "": it must.
    """

    title: str
    unit: str
    text: str
    queries: Sequence[tuple[str, str]]
    kind: Literal["stat", "series", "heat"] = "series"
    width: int = 8
    limit: float | None = None
    low: bool = False
    may_be_empty: str = ""


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    text: str
    rows: Sequence[Row]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def to_json(board: Board) -> str:
    """What Grafana imports, and what its sidecar loads."""
    built = (
        dashboard.Dashboard(f"streamcl / {board.title}")
        .uid(board.uid)
        .description(board.text)
        .tags(["streamcl"])
        .editable()
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("streamcl")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["streamcl"])
            .include_vars(True)
            .keep_time(True)
        )
        .annotation(_drift())
    )
    for variable in _variables():
        built.with_variable(variable)
    x = y = below = number = 0
    for row in board.rows:
        y, x = y + below, 0
        number += 1
        built.with_row(dashboard.Row(row.title).id(number).grid_pos(models.GridPos(h=1, w=WIDE, x=0, y=y)))
        y, below = y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDE:
                x, y, below = 0, y + below, 0
            number += 1
            height = HEIGHTS[panel.kind]
            built.with_panel(_panel(panel).id(number).grid_pos(models.GridPos(h=height, w=panel.width, x=x, y=y)))
            x, below = x + panel.width, max(below, height)
    return str(JSONEncoder(sort_keys=True, indent=1).encode(built.build())) + "\n"


def _panel(panel: Panel) -> Any:
    made: Any
    if panel.kind == "stat":
        made = stat.Panel().graph_mode(BigValueGraphMode.NONE)
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    elif panel.kind == "heat":
        made = heatmap.Panel().calculate(False)
    else:
        made = timeseries.Panel().fill_opacity(8).line_width(1)
    made.title(panel.title).description(panel.text).datasource(SOURCE).unit(panel.unit)
    if panel.limit is not None:
        colors = ("red", "green") if panel.low else ("green", "red")
        steps = [models.Threshold(None, colors[0]), models.Threshold(panel.limit, colors[1])]
        made.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    for at, (expr, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(chr(ord("A") + at))
        made.with_target(query.format(PromQueryFormat.HEATMAP).range() if panel.kind == "heat" else query.range())
    return made


def _variables() -> list[Any]:
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    names: list[Any] = [source]
    narrowed = ""
    for name in ("namespace", "job", "instance"):
        query = f"label_values(streamcl_build_info{{{narrowed}}}, {name})"
        variable = (
            dashboard.QueryVariable(name)
            .label(name.capitalize())
            .datasource(SOURCE)
            .query(query)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .include_all(True)
            .all_value(".*")  # without a namespace, as outside of Kubernetes, the label is missing: it matches too
            .multi(True)
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
        names.append(variable)
        narrowed += ("," if narrowed else "") + f'{name}=~"${name}"'
    return names


def _drift() -> Any:
    """A mark on every panel where drift was signalled."""
    expr = f"sum by (instance) (increase(streamcl_drift_alarms_total{{{SELECTED}}}[$__rate_interval])) > 0"
    return dashboard.AnnotationQuery().name("Drift").datasource(SOURCE).enable(True).icon_color("orange").expr(expr)


SELECTED = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
