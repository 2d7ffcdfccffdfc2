"""Converts tables of panels to Grafana's JSON: positions, thresholds and links to runbooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from grafana_foundation_sdk.builders import (
    common,
    dashboard as build,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog import builder as cog
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shape, dashboard as model, heatmap as heat
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from alerts.dashboards.promql import alerts

COLUMNS = 24
TAG = "serve_app"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

Kind = Literal["lines", "stat", "heatmap", "states", "table"]
Builder: TypeAlias = timeseries.Panel | stat.Panel | heatmap.Panel | statetimeline.Panel | table.Panel
HEIGHT: dict[Kind, int] = {"lines": 8, "stat": 4, "heatmap": 8, "states": 8, "table": 8}


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel. `queries` are pairs of PromQL and legend. Values above `thresholds`, or below if `low_is_bad`, are
    yellow or red."""

    title: str
    description: str
    unit: str  # Grafana's id of the unit
    queries: tuple[tuple[str, str], ...]
    kind: Kind = "lines"
    thresholds: tuple[float, ...] = ()
    low_is_bad: bool = False
    alerts: tuple[str, ...] = ()
    width: int = 8
    stacked: bool = False
    maximum: float | None = None  # upper end of the axis
    value_names: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # value -> (text, colour)


@dataclass(frozen=True, slots=True)
class Variable:
    """A dashboard variable of which a user selects some values or all. `regex` extracts the values from the series of
    `query`."""

    name: str
    label: str
    query: str
    regex: str = ""


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: Mapping[str, tuple[Panel, ...]]
    variables: tuple[Variable, ...] = ()
    since: str = "now-3h"


def document(dashboard: Dashboard) -> str:
    """The dashboard as JSON. Equal tables give equal JSON."""
    made = (
        build.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags([TAG])
        .time(dashboard.since, "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(_siblings())
        .annotation(_firing())
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in dashboard.variables:
        made.with_variable(_variable(variable))
    for placed in _placed(dashboard):
        if isinstance(placed, build.Row):
            made.with_row(placed)
        else:
            made.with_panel(placed)
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _siblings() -> build.DashboardLink:
    """A link to the other dashboards that keeps the selected variables and the time range."""
    kind = model.DashboardLinkType.DASHBOARDS
    return build.DashboardLink(TAG).type(kind).tags([TAG]).include_vars(True).keep_time(True)


def _firing() -> build.AnnotationQuery:
    """Firing alerts as annotations in every panel."""
    firing = 'ALERTS{alertstate="firing", severity=~"critical|warning"}'
    return build.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).icon_color("red").expr(firing)


def _variable(variable: Variable) -> build.QueryVariable:
    return (
        build.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(SOURCE)
        .query(variable.query)
        .regex(variable.regex)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _placed(dashboard: Dashboard) -> Iterator[build.Row | Builder]:
    """Rows and panels with their positions in the grid."""
    y = number = 0
    for title, panels in dashboard.rows.items():
        number += 1
        yield build.Row(title).id(number).grid_pos(model.GridPos(h=1, w=COLUMNS, x=0, y=y))
        y += 1
        for line in _on_lines(panels):
            x, height = 0, max(HEIGHT[panel.kind] for panel in line)
            for panel in line:
                number += 1
                yield _built(panel).id(number).grid_pos(model.GridPos(h=height, w=panel.width, x=x, y=y))
                x += panel.width
            y += height


def _on_lines(panels: Sequence[Panel]) -> Iterator[list[Panel]]:
    """Split panels into lines that fit into the width of the grid."""
    line: list[Panel] = []
    for panel in panels:
        if sum(one.width for one in (*line, panel)) > COLUMNS:
            yield line
            line = []
        line.append(panel)
    yield line


def _built(panel: Panel) -> Builder:
    made = _OF_KIND[panel.kind](panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    made.thresholds(_thresholds(panel)).links(_runbooks(panel))
    if panel.value_names:
        made.mappings([_value_names(panel.value_names)])
    for number, (expression, legend) in enumerate(panel.queries):
        made.with_target(_target(panel, expression, legend).ref_id(chr(ord("A") + number)))
    return made


def _target(panel: Panel, expression: str, legend: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(SOURCE).expr(expression).legend_format(legend)
    if panel.kind in ("stat", "table"):
        target.instant()
    else:
        target.range()
    formats = {"heatmap": PromQueryFormat.HEATMAP, "table": PromQueryFormat.TABLE}
    return target.format(formats.get(panel.kind, PromQueryFormat.TIME_SERIES))


def _thresholds(panel: Panel) -> build.ThresholdsConfig:
    colours = ("yellow", "red") if len(panel.thresholds) > 1 else ("red",)
    if panel.low_is_bad:  # from the worst value to the best, with green above all thresholds
        first, *above = (*reversed(colours[: len(panel.thresholds)]), "green") if panel.thresholds else ("green",)
        steps = list(zip(sorted(panel.thresholds), above, strict=True))
    else:
        first, steps = "green", list(zip(sorted(panel.thresholds), colours, strict=False))
    all_steps = [model.Threshold(value=None, color=first), *(model.Threshold(value, colour) for value, colour in steps)]
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(all_steps)


def _runbooks(panel: Panel) -> list[cog.Builder[model.DashboardLink]]:
    """One link for each runbook. Several alerts may share a runbook."""
    urls = dict.fromkeys(alerts()[name]["annotations"]["runbook_url"] for name in panel.alerts)
    link = model.DashboardLinkType.LINK
    return [
        build.DashboardLink(f"Runbook: {url.rpartition('/')[2].removesuffix('.md')}")
        .type(link)
        .url(url)
        .target_blank(True)
        for url in urls
    ]


def _value_names(names: Mapping[int, tuple[str, str]]) -> model.ValueMap:
    results = {str(value): model.ValueMappingResult(text=text, color=colour) for value, (text, colour) in names.items()}
    return model.ValueMap(options=results)


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).display_mode(shape.LegendDisplayMode.LIST)
    made = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 5)
        .show_points(shape.VisibilityMode.NEVER)
        .legend(legend.placement(shape.LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(shape.TooltipDisplayMode.MULTI).sort(shape.SortOrder.DESCENDING))
    )
    if panel.maximum is not None:
        made.max(panel.maximum)
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(shape.StackingMode.NORMAL))
    if panel.thresholds:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(shape.GraphThresholdsStyleMode.DASHED))
    return made


def _stat(panel: Panel) -> stat.Panel:
    reduce = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(reduce)
        .color_mode(shape.BigValueColorMode.VALUE)
        .graph_mode(shape.BigValueGraphMode.NONE)
        .text_mode(shape.BigValueTextMode.AUTO)
        .no_value("no data")
    )


def _heatmap(panel: Panel) -> heatmap.Panel:
    colour = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return (
        heatmap.Panel()
        .calculate(False)
        .color(colour)
        .y_axis(heatmap.YAxisConfig().unit(panel.unit))
        .cell_values(heatmap.CellValues().unit("short"))
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .mode(shape.TooltipDisplayMode.SINGLE)
        .show_y_histogram()
    )


def _states(panel: Panel) -> statetimeline.Panel:
    return statetimeline.Panel().merge_values(True).show_value(shape.VisibilityMode.AUTO).row_height(0.8)


def _table(panel: Panel) -> table.Panel:
    return table.Panel().show_header(True).filterable(True)


_OF_KIND: dict[Kind, Callable[[Panel], Builder]] = {
    "lines": _lines,
    "stat": _stat,
    "heatmap": _heatmap,
    "states": _states,
    "table": _table,
}
