"""Building blocks of the charts: scales, axes, grid, legend and marks as inline SVG, coloured by the page's CSS.

Charts are WIDTH units wide and scale to their column. Layout reserves space for text of FONT units, the size on phones
and on paper; large screens may use a smaller size. A series has a colour, a dash pattern and a marker, so that charts
can be read without colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree as ET

from perf.formatting import clean, shorten

WIDTH, HEIGHT = 480, 290
FONT = 15.0
CHAR = 0.6 * FONT  # mean width of a letter in wide sans-serif fonts; text cannot be measured here
DIGIT = 0.64 * FONT
X_AXIS_HEIGHT = 2.8 * FONT  # tick labels and axis label
RIGHT_MARGIN = 14
COLOURS = 8  # classes s0 to s7 of the style sheet
DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
MARKERS = (
    "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "m-3.7,-3.7h7.4v7.4h-7.4z",  # square
    "m0,-5l4.8,8.4h-9.6z",  # triangle
    "m0,-5.2l5.2,5.2l-5.2,5.2l-5.2,-5.2z",  # diamond
    "m0,5l4.8,-8.4h-9.6z",  # inverted triangle
)
CROSS = "m-4,-4l8,8m0,-8l-8,8"

Point = tuple[float, float]
DrawMode = Literal["both", "lines", "marks"]


@dataclass(frozen=True, slots=True)
class Axis:
    label: str  # with its unit
    log: bool | None = False  # None: logarithmic if the values span a large range
    zero: bool = True
    ticks: Sequence[float] = ()  # these values instead of round ones
    integer: bool = False  # whole ticks only, for counts


@dataclass(frozen=True, slots=True)
class Limit:
    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Scale:
    ticks: Sequence[float]
    low: float
    high: float
    log: bool = False
    inset: float = 0.0

    def position(self, value: float, start: float, end: float) -> float:
        """Maps a value to a coordinate between two edges; a scale of a single value maps to the middle."""
        low, high, this = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (this - low) / (high - low) if high > low else 0.5
        inset = math.copysign(self.inset, end - start)
        return start + inset + share * (end - start - 2 * inset)


def scale_of(axis: Axis, values: Sequence[float], log_ratio: float = 50) -> Scale:
    """A scale that covers the values. With `axis.log` None: logarithmic from a ratio of `log_ratio` on."""
    low, high = min(values), max(values)
    log = low > 0 and (high >= log_ratio * low if axis.log is None else axis.log)
    if axis.ticks:
        return Scale(sorted(set(axis.ticks)), low, high, log, inset=16)
    if log:
        ticks = _log_ticks(low, high)
    else:
        ticks = _linear_ticks(min(low, 0) if axis.zero else low, high, min_step=1 if axis.integer else 0)
    return Scale(ticks, ticks[0], ticks[-1], log)


def _linear_ticks(low: float, high: float, count: int = 5, min_step: float = 0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose the range."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / count * (1 - 1e-9))
    step = max(step, min_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * multiple, 12) for multiple in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; only powers of ten if the range is large."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : max(last, first + 1) + 1]


def tick_label(value: float) -> str:
    return f"{value:,.10g}"


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str | float) -> ET.Element:
    """Adds an element. In attribute names, `class_` stands for `class` and `_` for `-`."""
    formatted = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for name, value in attributes.items()
        if value != ""
    }
    element = ET.SubElement(parent, tag, formatted)
    if text is not None:
        element.text = clean(text)
    return element


def new_svg(title: str, description: str) -> ET.Element:
    svg = ET.Element("svg", {"class": "chart", "role": "img"})
    add(svg, "title", title)
    add(svg, "desc", description)
    return svg


def to_text(svg: ET.Element, height: float = HEIGHT) -> str:
    svg.set("viewBox", f"0 0 {WIDTH} {height:.0f}")
    return ET.tostring(svg, encoding="unicode")


def path_of(points: Iterable[Point]) -> str:
    """A polyline. A point to the left of the one before starts a new line: it belongs to the next repeat."""
    parts, before = [], math.inf
    for x, y in points:
        parts.append(f"{'L' if x >= before else 'M'}{x:.1f},{y:.1f}")
        before = x
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart and the rectangle within its axes, in SVG units."""

    svg: ET.Element
    x: Scale
    y: Scale
    left: float
    top: float
    right: float
    bottom: float
    occupied: list[tuple[float, float, float, float]] = field(default_factory=list)  # boxes of marks and labels

    def to_text(self) -> str:
        return to_text(self.svg, self.bottom + X_AXIS_HEIGHT)

    def place(self, point: Point) -> Point:
        return self.x.position(point[0], self.left, self.right), self.y.position(point[1], self.bottom, self.top)

    def line(self, points: Iterable[Point], series: int) -> None:
        dash = DASHES[series % len(DASHES)]
        path = path_of(map(self.place, points))
        add(self.svg, "path", class_=f"line s{series % COLOURS}", d=path, stroke_dasharray=dash)

    def mark(self, point: Point, series: int, tooltip: str) -> None:
        _mark(self.svg, self.place(point), series, tooltip)

    def label(self, point: Point, text: str) -> None:
        """Writes next to the point where there is free space; writes nothing if there is none."""
        x, y = self.place(point)
        width, height = len(text) * CHAR, FONT
        for left, base in ((x + 8, y + 5), (x - 8 - width, y + 5), (x - width / 2, y - 9), (x - width / 2, y + 20)):
            box = (left, base - height, left + width, base)
            inside = box[0] >= self.left and box[2] <= WIDTH and box[1] >= self.top - 8 and box[3] <= self.bottom
            if inside and not any(_overlap(box, other) for other in self.occupied):
                self.occupied.append(box)
                add(self.svg, "text", text, class_="halo", x=left, y=base)
                return


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(svg: ET.Element, at: Point, series: int, tooltip: str | None = None) -> None:
    shape = MARKERS[series % len(MARKERS)]
    mark = add(svg, "path", class_=f"mark s{series % COLOURS}", d=f"M{at[0]:.1f},{at[1]:.1f}{shape}")
    if tooltip is not None:
        add(mark, "title", tooltip)


def axes(
    title: str,
    description: str,
    x: tuple[Axis, Scale],
    y: tuple[Axis, Scale],
    names: Sequence[str] = (),
    limits: Sequence[Limit] = (),
    mode: DrawMode = "both",
) -> Plot:
    """An empty chart. Its plot area has the same height whatever stands above it: legend and limits out of range."""
    svg = new_svg(title, description)
    out_of_range = [limit.label for limit in limits if limit.value > y[1].high]
    above = _limits_out_of_range(svg, _legend(svg, names, mode), out_of_range)
    top = above + 2 * FONT
    left = max((len(tick_label(tick)) for tick in y[1].ticks), default=0) * DIGIT + 10
    plot = Plot(svg, x[1], y[1], left, top, WIDTH - RIGHT_MARGIN, above + HEIGHT - X_AXIS_HEIGHT)
    _grid(plot)
    x_axis(plot, x[0].label)
    add(svg, "text", y[0].label, class_="axis", x=0, y=top - 0.85 * FONT)
    return plot


def _limits_out_of_range(svg: ET.Element, top: float, labels: Sequence[str]) -> float:
    """Names the limits above the chart; returns the y coordinate below the texts."""
    for label in labels:
        top += 1.2 * FONT
        add(svg, "text", f"{label} is above this chart", class_="limit", x=0, y=top - 0.2 * FONT)
    return top


def limit_lines(plot: Plot, limits: Sequence[Limit]) -> None:
    """Horizontal lines for the limits in range. Labels alternate between the left and the right end."""
    for number, limit in enumerate(limit for limit in limits if limit.value <= plot.y.high):
        y = plot.y.position(max(limit.value, plot.y.low), plot.bottom, plot.top)
        x, anchor = (plot.right, "end") if number % 2 else (plot.left + 4, "start")
        add(plot.svg, "path", class_="limit", d=f"M{plot.left:.1f},{y:.1f}H{plot.right:.1f}")
        add(plot.svg, "text", limit.label, class_="limit halo", x=x, y=y - 5, text_anchor=anchor)


def _legend(svg: ET.Element, names: Sequence[str], mode: DrawMode) -> float:
    """Draws the legend in as many rows as needed, none for one series; returns the y coordinate below it."""
    if len(names) < 2:
        return 0.0
    x, y = 0.0, FONT
    for series, name in enumerate(names):
        name = shorten(clean(name), 36)
        width = 38 + len(name) * CHAR + 10
        if x and x + width > WIDTH:
            x, y = 0.0, y + 1.4 * FONT
        middle = y - 0.33 * FONT
        if mode != "marks":
            dash = DASHES[series % len(DASHES)]
            add(svg, "path", class_=f"line s{series % COLOURS}", d=f"M{x:.1f},{middle:.1f}h30", stroke_dasharray=dash)
        if mode != "lines":
            _mark(svg, (x + 15, middle), series)
        add(svg, "text", name, x=x + 36, y=y)
        x += width
    return y + 0.4 * FONT


def _grid(plot: Plot) -> None:
    for tick in plot.y.ticks:
        y = plot.y.position(tick, plot.bottom, plot.top)
        add(plot.svg, "path", class_="grid", d=f"M{plot.left:.1f},{y:.1f}H{plot.right:.1f}")
        add(plot.svg, "text", tick_label(tick), class_="tick", x=plot.left - 8, y=y + 0.33 * FONT, text_anchor="end")
    add(plot.svg, "path", class_="base", d=f"M{plot.left:.1f},{plot.bottom:.1f}H{plot.right:.1f}")


def x_axis(plot: Plot, label: str) -> None:
    """Ticks and axis label; tick labels that would overlap are left out."""
    middle = (plot.left + plot.right) / 2
    add(plot.svg, "text", label, class_="axis", x=middle, y=plot.bottom + X_AXIS_HEIGHT - 4, text_anchor="middle")
    free_from = -math.inf
    for tick in plot.x.ticks:
        x = plot.x.position(tick, plot.left, plot.right)
        half = len(tick_label(tick)) * DIGIT / 2
        add(plot.svg, "path", class_="base", d=f"M{x:.1f},{plot.bottom:.1f}v4")
        centre = min(x, WIDTH - half)
        if centre - half >= free_from:
            y = plot.bottom + 4 + FONT
            add(plot.svg, "text", tick_label(tick), class_="tick", x=centre, y=y, text_anchor="middle")
            free_from = centre + half + CHAR
