"""The charts of a report as inline SVG texts with a title and a description for screen readers; no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

import numpy as np

from perf.formatting import clean, format_number, shorten
from perf.plot import (
    CHAR,
    CROSS,
    FONT,
    MARKERS,
    RIGHT_MARGIN,
    WIDTH,
    Axis,
    DrawMode,
    Limit,
    Plot,
    Point,
    Scale,
    add,
    axes,
    limit_lines,
    new_svg,
    path_of,
    scale_of,
    tick_label,
    to_text,
    x_axis,
)


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[Point]
    labels: Sequence[str] = ()  # of each point, in scatter charts


def _description(series: Sequence[Series], x: Axis, y: Axis) -> str:
    ends = [f"{one.name}: {_point_text(one.points[0])}, {_point_text(one.points[-1])}" for one in series if one.points]
    return f"{y.label} against {x.label}. {'; '.join(ends)}."


def _point_text(point: Point) -> str:
    return f"{format_number(point[1])} at {format_number(point[0])}"


def lines(
    title: str, series: Sequence[Series], x: Axis, y: Axis, limits: Sequence[Limit] = (), mode: DrawMode = "both"
) -> str:
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points]
    # The y axis covers a limit, with space for its label, unless it is so high that the lines would look flat.
    near = [limit.value * 1.08 for limit in limits if limit.value <= 3 * max(ys)]
    description = " ".join([_description(series, x, y), *(f"{limit.label}." for limit in limits)])
    scales = (x, scale_of(x, xs, 8)), (y, scale_of(y, [*ys, *near]))
    plot = axes(title, description, *scales, [one.name for one in series], limits, mode)
    for number, one in enumerate(series):
        plot.line(one.points, number)
        for point in () if mode == "lines" else one.points:
            plot.mark(point, number, f"{one.name}: {_point_text(point)} {x.label}")
    limit_lines(plot, limits)
    return plot.to_text()


def cdf(title: str, series: Sequence[Series], x: Axis, of: str, limits: Sequence[Limit] = ()) -> str:
    """Cumulative distributions. Points are (value, percent); markers show the median and p95."""
    y = Axis(f"% of {of}", ticks=(0, 25, 50, 75, 100))
    scale = scale_of(x, [point[0] for one in series for point in one.points], 20)
    percentiles = "; ".join(
        f"{one.name}: p50 {format_number(_value_at(one, 50))}, p95 {format_number(_value_at(one, 95))}"
        for one in series
    )
    description = f"Distribution of {x.label}. {percentiles}."
    plot = axes(title, description, (x, scale), (y, Scale(y.ticks, 0, 100)), [one.name for one in series])
    for number, limit in enumerate(limit for limit in limits if scale.low <= limit.value <= scale.high):
        _vertical_limit(plot, limit, above=number == 0)
    for number, one in enumerate(series):
        plot.line(one.points, number)
        for percent in (50, 95):
            value = _value_at(one, percent)
            plot.mark((value, percent), number, f"{one.name}: p{percent} {format_number(value)} {x.label}")
    return plot.to_text()


def quantiles(values: Sequence[float], percents: Sequence[float] | None = None) -> list[Point]:
    """(value, percent) at 110 percents by default: the last percent is finer, because it holds the tail."""
    at = np.concatenate([np.arange(99), np.linspace(99, 100, 11)]) if percents is None else np.array(percents)
    return [(float(value), float(percent)) for value, percent in zip(np.percentile(values, at), at, strict=True)]


def _value_at(series: Series, percent: float) -> float:
    values, percents = zip(*series.points, strict=True)
    return float(np.interp(percent, percents, values))


def _vertical_limit(plot: Plot, limit: Limit, above: bool) -> None:
    """The label stands above the plot area, next to the y axis label, or at the bottom of it."""
    x, half = plot.x.position(limit.value, plot.left, plot.right), len(limit.label) * CHAR / 2
    y = plot.top - 0.85 * FONT if above else plot.bottom - 7
    if x > (plot.left + plot.right) / 2:
        at, anchor = min(x + half, plot.right), "end"
    else:
        at, anchor = max(x - half, plot.left + 8 * FONT), "start"
    add(plot.svg, "path", class_="limit", d=f"M{x:.1f},{plot.bottom:.1f}V{plot.top - 6:.1f}")
    add(plot.svg, "text", limit.label, class_="limit halo", x=at, y=y, text_anchor=anchor)


def scatter(title: str, series: Sequence[Series], x: Axis, y: Axis, frontier: bool = True) -> str:
    """Labelled points; with `frontier` a pale line joins those that no other exceeds in both coordinates."""
    points = [point for one in series for point in one.points]
    x_scale, y_scale = (scale_of(axis, [point[i] for point in points], 20) for i, axis in enumerate((x, y)))
    names = [one.name for one in series]
    plot = axes(title, _description(series, x, y), (x, x_scale), (y, y_scale), names, mode="marks")
    best = [plot.place(point) for point in pareto_frontier(points)] if frontier else []
    if len(best) > 1:
        add(plot.svg, "path", class_="front", d=path_of(best))
    plot.occupied.extend((px - 5, py - 5, px + 5, py + 5) for px, py in map(plot.place, points))
    for number, one in enumerate(series):
        for point, label in zip(one.points, one.labels, strict=True):
            plot.mark(point, number, f"{one.name}, {label}: {_point_text(point)}")
            plot.label(point, shorten(clean(label), 16))
    return plot.to_text()


def pareto_frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other point exceeds in both coordinates, by ascending x."""
    frontier: list[Point] = []
    for point in sorted(points, reverse=True):
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    return frontier[::-1]


def timeline(title: str, series: Sequence[Series], y: Axis) -> str:
    return lines(title, series, Axis("seconds from the start of the window"), y, mode="lines")


def bars(title: str, rows: Sequence[tuple[str, float]], unit: str) -> str:
    """Horizontal bars with their names to the left and their values to the right."""
    pitch = 1.9 * FONT
    rows = [(shorten(clean(name), 28), value) for name, value in rows]
    svg = new_svg(title, f"{unit}. {'; '.join(f'{name}: {format_number(value)}' for name, value in rows)}.")
    left = max(len(name) for name, _ in rows) * CHAR + 10
    max_width = WIDTH - left - max(len(format_number(value)) for _, value in rows) * CHAR - 10
    highest = max(value for _, value in rows) or 1.0
    for row, (name, value) in enumerate(rows):
        base, width = row * pitch + 0.95 * FONT, max(value / highest * max_width, 1.0)
        add(svg, "text", name, x=0, y=base + 0.33 * FONT)
        add(svg, "rect", class_="bar s0", x=left, y=base - 0.6 * FONT, width=width, height=1.2 * FONT)
        add(svg, "text", format_number(value), x=left + width + 6, y=base + 0.33 * FONT)
    return to_text(svg, pitch * len(rows))


@dataclass(frozen=True, slots=True)
class WaterfallRow:
    """The times of a request in seconds; `first` is None without streaming."""

    due: float
    sent: float
    first: float | None
    done: float


Part = Literal["late", "wait", "flow"]


def waterfall(title: str, rows: Sequence[WaterfallRow]) -> str:
    pitch, top = 8.0, 3.3 * FONT
    x = Axis("seconds from the start of the window", zero=False)
    scale = scale_of(x, [at for row in rows for at in (row.due, row.done)])
    svg = new_svg(title, f"{len(rows)} requests from {rows[0].due:.2f} s to {max(row.done for row in rows):.2f} s.")
    plot = Plot(svg, scale, Scale([], 0, 1), 8, top, WIDTH - RIGHT_MARGIN, top + pitch * len(rows) + 8)
    _part_legend(svg, _part_names(rows))
    add(svg, "text", "requests, ordered by due time", class_="axis", x=0, y=2.6 * FONT)
    _vertical_grid(plot)
    x_axis(plot, x.label)
    for number, row in enumerate(rows):
        _request(plot, row, top + 4 + pitch * number, pitch - 2)
    return plot.to_text()


def _vertical_grid(plot: Plot) -> None:
    for tick in plot.x.ticks:
        x = plot.x.position(tick, plot.left, plot.right)
        add(plot.svg, "path", class_="grid", d=f"M{x:.1f},{plot.top:.1f}V{plot.bottom:.1f}")
    add(plot.svg, "path", class_="base", d=f"M{plot.left:.1f},{plot.bottom:.1f}H{plot.right:.1f}")


def _part_names(rows: Sequence[WaterfallRow]) -> dict[Part, str]:
    if all(row.first is None for row in rows):
        return {"late": "due, not sent", "wait": "no response yet"}
    return {"late": "due, not sent", "wait": "no token yet", "flow": "tokens arrive"}


def _part_legend(svg: ET.Element, names: dict[Part, str]) -> None:
    x = 0.0
    for part, name in names.items():
        _part(svg, part, x, x + 16, 0.45 * FONT, 0.6 * FONT)
        add(svg, "text", name, x=x + 21, y=FONT)
        x += 21 + len(name) * CHAR + 8


def _part(svg: ET.Element, part: Part, start: float, end: float, y: float, height: float) -> None:
    """Parts differ in colour and in height."""
    share = {"late": 0.25, "wait": 0.55, "flow": 1.0}[part]
    inset = height * (1 - share) / 2
    add(svg, "rect", class_=part, x=start, y=y + inset, width=max(end - start, 0.8), height=height * share)


def _request(plot: Plot, row: WaterfallRow, y: float, height: float) -> None:
    first = row.done if row.first is None else row.first
    due, sent, token, done = (plot.x.position(at, plot.left, plot.right) for at in (row.due, row.sent, first, row.done))
    group = add(plot.svg, "g")
    add(group, "title", f"due {row.due:.3f} s, sent {row.sent:.3f} s, first token {first:.3f} s, done {row.done:.3f} s")
    if sent - due >= 0.5:
        _part(group, "late", due, sent, y, height)
    _part(group, "wait", sent, token, y, height)
    if row.first is not None:
        _part(group, "flow", token, done, y, height)


def search(title: str, probes: Sequence[tuple[float, bool]], y: Axis, limits: Sequence[Limit] = ()) -> str:
    """Probed loads in order: a circle met the objective, a cross missed it."""
    x = Axis("probe", ticks=range(1, len(probes) + 1))
    loads = [load for load, _ in probes]
    results = [f"{tick_label(load)} {'met' if met else 'missed'} the objective" for load, met in probes]
    plot = axes(title, f"{'; '.join(results)}.", (x, scale_of(x, x.ticks)), (y, scale_of(y, loads)))
    add(plot.svg, "path", class_="front", d=path_of(plot.place((n, load)) for n, load in enumerate(loads, 1)))
    for number, ((load, met), result) in enumerate(zip(probes, results, strict=True), 1):
        at = plot.place((number, load))
        shape, kind = (MARKERS[0], "mark good") if met else (CROSS, "cross")
        mark = add(plot.svg, "path", class_=kind, d=f"M{at[0]:.1f},{at[1]:.1f}{shape}")
        add(mark, "title", result)
    limit_lines(plot, limits)
    return plot.to_text()
