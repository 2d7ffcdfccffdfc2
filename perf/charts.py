"""Charts as strings of inline SVG, each with its words for those who hear it; no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

import numpy as np

from perf.plot import (
    CHAR,
    CROSS,
    EDGE,
    FONT,
    MARKERS,
    WIDTH,
    Axis,
    Limit,
    Look,
    Plot,
    Point,
    Scale,
    add,
    axes,
    limits_across,
    path_of,
    picture,
    scale_of,
    tick_text,
    ticks_below,
    written,
)
from perf.words import clean, figure, short


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[Point]
    labels: Sequence[str] = ()  # of each point, in scatter charts


def _told(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """The chart in words, for those who hear it."""
    ends = [f"{one.name}: {_end(one.points[0])}, {_end(one.points[-1])}" for one in series if one.points]
    return f"{y.label} against {x.label}. {'; '.join(ends)}."


def _end(point: Point) -> str:
    return f"{figure(point[1])} at {figure(point[0])}"


def lines(
    title: str, series: Sequence[Series], x: Axis, y: Axis, limits: Sequence[Limit] = (), look: Look = "both"
) -> str:
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points]
    # A limit far above what was measured would press the lines against the ground. One that is not has room above it.
    near = [limit.value * 1.08 for limit in limits if limit.value <= 3 * max(ys)]
    told = " ".join([_told(series, x, y), *(f"{limit.label}." for limit in limits)])
    scales = (x, scale_of(x, xs, 8)), (y, scale_of(y, [*ys, *near]))
    plot = axes(title, told, *scales, [one.name for one in series], limits, look)
    for style, one in enumerate(series):
        plot.line(one.points, style)
        for point in () if look == "lines" else one.points:
            plot.mark(point, style, f"{one.name}: {figure(point[1])} at {figure(point[0])} {x.label}")
    limits_across(plot, limits)
    return plot.written()


def cdf(title: str, series: Sequence[Series], x: Axis, of: str, limits: Sequence[Limit] = ()) -> str:
    """Of series whose points are (value, percent); markers stand at the median and at p95."""
    y = Axis(f"% of {of}", ticks=(0, 25, 50, 75, 100))
    scale = scale_of(x, [point[0] for one in series for point in one.points], 20)
    medians = "; ".join(
        f"{one.name}: p50 {figure(_value_at(one, 50))}, p95 {figure(_value_at(one, 95))}" for one in series
    )
    percents = Scale(y.ticks, 0, 100)
    plot = axes(title, f"Distribution of {x.label}. {medians}.", (x, scale), (y, percents), [s.name for s in series])
    for number, limit in enumerate(limit for limit in limits if scale.low <= limit.value <= scale.high):
        _upright(plot, limit, above=number == 0)
    for style, one in enumerate(series):
        plot.line(one.points, style)
        for percent in (50, 95):
            value = _value_at(one, percent)
            plot.mark((value, percent), style, f"{one.name}: p{percent} {figure(value)} {x.label}")
    return plot.written()


def quantiles(values: Sequence[float], percents: Sequence[float] | None = None) -> list[Point]:
    """(value, percent), as many as a curve of this size can show; the last percent finer, for it holds the tail."""
    at = np.concatenate([np.arange(99), np.linspace(99, 100, 11)]) if percents is None else np.array(percents)
    return [(float(value), float(percent)) for value, percent in zip(np.percentile(values, at), at, strict=True)]


def _value_at(series: Series, percent: float) -> float:
    values, percents = zip(*series.points, strict=True)
    return float(np.interp(percent, percents, values))


def _upright(plot: Plot, limit: Limit, above: bool) -> None:
    """The label stands above the area, beside that of the y axis; that of another limit at its foot."""
    x, half = plot.x.at(limit.value, plot.left, plot.right), len(limit.label) * CHAR / 2
    y = plot.top - 0.85 * FONT if above else plot.bottom - 7
    if x > (plot.left + plot.right) / 2:
        at, anchor = min(x + half, plot.right), "end"
    else:
        at, anchor = max(x - half, plot.left + 8 * FONT), "start"
    add(plot.svg, "path", class_="limit", d=f"M{x:.1f},{plot.bottom:.1f}V{plot.top - 6:.1f}")
    add(plot.svg, "text", limit.label, class_="limit halo", x=at, y=y, text_anchor=anchor)


def scatter(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Points with labels. A pale line joins those to which no other is better in both."""
    points = [point for one in series for point in one.points]
    x_scale, y_scale = (scale_of(axis, [point[i] for point in points], 20) for i, axis in enumerate((x, y)))
    names = [one.name for one in series]
    plot = axes(title, _told(series, x, y), (x, x_scale), (y, y_scale), names, look="marks")
    front = [plot.place(point) for point in frontier(points)]
    if len(front) > 1:
        add(plot.svg, "path", class_="front", d=path_of(front))
    plot.taken.extend((px - 5, py - 5, px + 5, py + 5) for px, py in map(plot.place, points))
    for style, one in enumerate(series):
        for point, label in zip(one.points, one.labels, strict=True):
            plot.mark(point, style, f"{one.name}, {label}: {figure(point[1])} at {figure(point[0])}")
            plot.label(point, short(clean(label), 16))
    return plot.written()


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those points (more is better) to which no other is better in both, from the smallest x on."""
    found: list[Point] = []
    for point in sorted(points, reverse=True):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found[::-1]


def timeline(title: str, series: Sequence[Series], y: Axis) -> str:
    return lines(title, series, Axis("seconds since the window opened"), y, look="lines")


def bars(title: str, rows: Sequence[tuple[str, float]], unit: str) -> str:
    """Lying bars, each with its name before and its value behind it."""
    pitch = 1.9 * FONT
    rows = [(short(clean(name), 28), value) for name, value in rows]
    svg = picture(title, f"{unit}. {'; '.join(f'{name}: {figure(value)}' for name, value in rows)}.")
    left = max(len(name) for name, _ in rows) * CHAR + 10
    room = WIDTH - left - max(len(figure(value)) for _, value in rows) * CHAR - 10
    most = max(value for _, value in rows) or 1.0
    for row, (name, value) in enumerate(rows):
        base, wide = row * pitch + 0.95 * FONT, max(value / most * room, 1.0)
        add(svg, "text", name, x=0, y=base + 0.33 * FONT)
        add(svg, "rect", class_="bar s0", x=left, y=base - 0.6 * FONT, width=wide, height=1.2 * FONT)
        add(svg, "text", figure(value), x=left + wide + 6, y=base + 0.33 * FONT)
    return written(svg, pitch * len(rows))


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a waterfall, in seconds; no first token of its own where an answer came whole."""

    due: float
    sent: float
    first: float | None
    done: float


Part = Literal["late", "wait", "flow"]


def waterfall(title: str, rows: Sequence[Row]) -> str:
    pitch, top = 8.0, 3.3 * FONT
    x = Axis("seconds since the window opened", zero=False)
    scale = scale_of(x, [at for row in rows for at in (row.due, row.done)])
    told = f"{len(rows)} requests from {rows[0].due:.2f} s to {max(row.done for row in rows):.2f} s."
    svg = picture(title, told)
    plot = Plot(svg, scale, Scale([], 0, 1), 8, top, WIDTH - EDGE, top + pitch * len(rows) + 8)
    _parts(svg, _named(rows))
    add(svg, "text", "requests, in the order in which they were due", class_="axis", x=0, y=2.6 * FONT)
    _uprights(plot)
    ticks_below(plot, x.label)
    for number, row in enumerate(rows):
        _request(plot, row, top + 4 + pitch * number, pitch - 2)
    return plot.written()


def _uprights(plot: Plot) -> None:
    for tick in plot.x.ticks:
        x = plot.x.at(tick, plot.left, plot.right)
        add(plot.svg, "path", class_="grid", d=f"M{x:.1f},{plot.top:.1f}V{plot.bottom:.1f}")
    add(plot.svg, "path", class_="base", d=f"M{plot.left:.1f},{plot.bottom:.1f}H{plot.right:.1f}")


def _named(rows: Sequence[Row]) -> dict[Part, str]:
    """Those parts that there are."""
    if all(row.first is None for row in rows):
        return {"late": "not yet sent", "wait": "no answer yet"}
    return {"late": "not yet sent", "wait": "no token yet", "flow": "tokens arrive"}


def _parts(svg: ET.Element, named: dict[Part, str]) -> None:
    x = 0.0
    for part, name in named.items():
        _part(svg, part, x, x + 16, 0.45 * FONT, 0.6 * FONT)
        add(svg, "text", name, x=x + 21, y=FONT)
        x += 21 + len(name) * CHAR + 8


def _part(svg: ET.Element, part: Part, start: float, end: float, y: float, height: float) -> None:
    """Told apart by height as well: a hair, half a bar and a whole one."""
    share = {"late": 0.25, "wait": 0.55, "flow": 1.0}[part]
    inset = height * (1 - share) / 2
    add(svg, "rect", class_=part, x=start, y=y + inset, width=max(end - start, 0.8), height=height * share)


def _request(plot: Plot, row: Row, y: float, height: float) -> None:
    first = row.done if row.first is None else row.first
    due, sent, token, done = (plot.x.at(at, plot.left, plot.right) for at in (row.due, row.sent, first, row.done))
    group = add(plot.svg, "g")
    add(group, "title", f"due {row.due:.3f} s, sent {row.sent:.3f}, first token {first:.3f}, done {row.done:.3f}")
    if sent - due >= 0.5:
        _part(group, "late", due, sent, y, height)
    _part(group, "wait", sent, token, y, height)
    if row.first is not None:
        _part(group, "flow", token, done, y, height)


def search(title: str, tried: Sequence[tuple[float, bool]], y: Axis, limits: Sequence[Limit] = ()) -> str:
    """Loads in the order in which they were tried: a disc met the objective, a cross did not."""
    x = Axis("probe", ticks=range(1, len(tried) + 1))
    loads = [load for load, _ in tried]
    told = "; ".join(f"{tick_text(load)} {'met' if met else 'did not meet'} the objective" for load, met in tried)
    plot = axes(title, f"{told}.", (x, scale_of(x, x.ticks)), (y, scale_of(y, loads)))
    add(plot.svg, "path", class_="front", d=path_of(plot.place((n, load)) for n, load in enumerate(loads, 1)))
    for number, (load, met) in enumerate(tried, 1):
        at = plot.place((number, load))
        shape, kind = (MARKERS[0], "mark good") if met else (CROSS, "cross")
        mark = add(plot.svg, "path", class_=kind, d=f"M{at[0]:.1f},{at[1]:.1f}{shape}")
        add(mark, "title", f"{tick_text(load)} {'met' if met else 'did not meet'} the objective")
    limits_across(plot, limits)
    return plot.written()
