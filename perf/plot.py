"""What charts are made of: scales, axes, grid, legend, marks; inline SVG, coloured by the page's style sheet.

All are WIDTH units wide and scale to their column. Room is kept for letters of FONT units, which phones and paper get;
large screens may have smaller ones. A series has a colour, a dash and a marker, so that no chart needs the colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree as ET

from perf.words import clean, short

WIDTH, HEIGHT = 480, 290
FONT = 15.0
CHAR = 0.6 * FONT  # the mean width of a letter of wide sans-serif faces; nothing here can measure text
DIGIT = 0.64 * FONT
FOOT = 2.8 * FONT  # ticks and the label of the x axis
EDGE = 14  # right of a plot
COLOURS = 8  # classes s0 to s7 of the style sheet
DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 4")
MARKERS = (
    "m-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",  # circle
    "m-3.7,-3.7h7.4v7.4h-7.4z",  # square
    "m0,-5l4.8,8.4h-9.6z",  # triangle
    "m0,-5.2l5.2,5.2l-5.2,5.2l-5.2,-5.2z",  # diamond
    "m0,5l4.8,-8.4h-9.6z",  # triangle, tip down
)
CROSS = "m-4,-4l8,8m0,-8l-8,8"

Point = tuple[float, float]
Look = Literal["both", "lines", "marks"]  # how series are drawn


@dataclass(frozen=True, slots=True)
class Axis:
    label: str  # with its unit
    log: bool | None = False  # None: if the values ask for it
    zero: bool = True
    ticks: Sequence[float] = ()  # these values instead of round ones
    whole: bool = False  # of things that are counted


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

    def at(self, value: float, start: float, end: float) -> float:
        """Where between two edges; of one value alone, in the middle."""
        first, last, this = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (this - first) / (last - first) if last > first else 0.5
        inset = math.copysign(self.inset, end - start)
        return start + inset + share * (end - start - 2 * inset)


def scale_of(axis: Axis, values: Sequence[float], asked_by: float = 50) -> Scale:
    """Logarithmic, if that is open, where the largest value is `asked_by` times the smallest or more."""
    low, high = min(values), max(values)
    log = low > 0 and (high >= asked_by * low if axis.log is None else axis.log)
    if axis.ticks:
        return Scale(sorted(set(axis.ticks)), low, high, log, inset=16)
    if log:
        ticks = _decades(low, high)
    else:
        ticks = _steps(min(low, 0) if axis.zero else low, high, least=1 if axis.whole else 0)
    return Scale(ticks, ticks[0], ticks[-1], log)


def _steps(low: float, high: float, count: int = 5, least: float = 0) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, that have both ends between them."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / count * (1 - 1e-9))
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * multiple, 12) for multiple in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, or the powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [round(factor * 10.0**power, 12) for power in powers for factor in factors]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return ticks[first : max(last, first + 1) + 1]


def tick_text(value: float) -> str:
    return f"{value:,.10g}"


def add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str | float) -> ET.Element:
    """`class_` is `class`, and `_` is `-`."""
    written = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        for name, value in attributes.items()
        if value != ""
    }
    element = ET.SubElement(parent, tag, written)
    if text is not None:
        element.text = clean(text)
    return element


def picture(title: str, told: str) -> ET.Element:
    svg = ET.Element("svg", {"class": "chart", "role": "img"})
    add(svg, "title", title)
    add(svg, "desc", told)
    return svg


def written(svg: ET.Element, height: float = HEIGHT) -> str:
    svg.set("viewBox", f"0 0 {WIDTH} {height:.0f}")
    return ET.tostring(svg, encoding="unicode")


def path_of(points: Iterable[Point]) -> str:
    """A line that starts anew where it would go back: there another repeat begins."""
    parts, before = [], math.inf
    for x, y in points:
        parts.append(f"{'L' if x >= before else 'M'}{x:.1f},{y:.1f}")
        before = x
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart in the making: the area within its axes, in units of the SVG."""

    svg: ET.Element
    x: Scale
    y: Scale
    left: float
    top: float
    right: float
    bottom: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # by labels of points

    def written(self) -> str:
        return written(self.svg, self.bottom + FOOT)

    def place(self, point: Point) -> Point:
        return self.x.at(point[0], self.left, self.right), self.y.at(point[1], self.bottom, self.top)

    def line(self, points: Iterable[Point], style: int) -> None:
        dash = DASHES[style % len(DASHES)]
        path = path_of(map(self.place, points))
        add(self.svg, "path", class_=f"line s{style % COLOURS}", d=path, stroke_dasharray=dash)

    def mark(self, point: Point, style: int, told: str) -> None:
        _mark(self.svg, self.place(point), style, told)

    def label(self, point: Point, text: str) -> None:
        """Beside the point where nothing else is written; nowhere if there is no such place."""
        x, y = self.place(point)
        wide, high = len(text) * CHAR, FONT
        for left, base in ((x + 8, y + 5), (x - 8 - wide, y + 5), (x - wide / 2, y - 9), (x - wide / 2, y + 20)):
            box = (left, base - high, left + wide, base)
            inside = box[0] >= self.left and box[2] <= WIDTH and box[1] >= self.top - 8 and box[3] <= self.bottom
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                add(self.svg, "text", text, class_="halo", x=left, y=base)
                return


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(svg: ET.Element, at: Point, style: int, told: str | None = None) -> None:
    shape = MARKERS[style % len(MARKERS)]
    mark = add(svg, "path", class_=f"mark s{style % COLOURS}", d=f"M{at[0]:.1f},{at[1]:.1f}{shape}")
    if told is not None:
        add(mark, "title", told)


def axes(
    title: str,
    told: str,
    x: tuple[Axis, Scale],
    y: tuple[Axis, Scale],
    names: Sequence[str] = (),
    limits: Sequence[Limit] = (),
    look: Look = "both",
) -> Plot:
    """The area is as high whatever stands above it: the legend, and the limits that are beyond it."""
    svg = picture(title, told)
    above = _beyond(svg, _legend(svg, names, look), [limit.label for limit in limits if limit.value > y[1].high])
    top = above + 2 * FONT
    left = max((len(tick_text(tick)) for tick in y[1].ticks), default=0) * DIGIT + 10
    plot = Plot(svg, x[1], y[1], left, top, WIDTH - EDGE, above + HEIGHT - FOOT)
    _grid(plot)
    ticks_below(plot, x[0].label)
    add(svg, "text", y[0].label, class_="axis", x=0, y=top - 0.85 * FONT)
    return plot


def _beyond(svg: ET.Element, top: float, labels: Sequence[str]) -> float:
    for label in labels:
        top += 1.2 * FONT
        add(svg, "text", f"{label} is above this chart", class_="limit", x=0, y=top - 0.2 * FONT)
    return top


def limits_across(plot: Plot, limits: Sequence[Limit]) -> None:
    """Those within the area. A label stands where the load is low, the next one at the other end."""
    for number, limit in enumerate(limit for limit in limits if limit.value <= plot.y.high):
        y = plot.y.at(max(limit.value, plot.y.low), plot.bottom, plot.top)
        x, anchor = (plot.right, "end") if number % 2 else (plot.left + 4, "start")
        add(plot.svg, "path", class_="limit", d=f"M{plot.left:.1f},{y:.1f}H{plot.right:.1f}")
        add(plot.svg, "text", limit.label, class_="limit halo", x=x, y=y - 5, text_anchor=anchor)


def _legend(svg: ET.Element, names: Sequence[str], look: Look) -> float:
    """In as many rows as it takes; returns where it ends. One series needs none."""
    if len(names) < 2:
        return 0.0
    x, y = 0.0, FONT
    for style, name in enumerate(names):
        name = short(clean(name), 36)
        wide = 38 + len(name) * CHAR + 10
        if x and x + wide > WIDTH:
            x, y = 0.0, y + 1.4 * FONT
        middle = y - 0.33 * FONT
        if look != "marks":
            dash = DASHES[style % len(DASHES)]
            add(svg, "path", class_=f"line s{style % COLOURS}", d=f"M{x:.1f},{middle:.1f}h30", stroke_dasharray=dash)
        if look != "lines":
            _mark(svg, (x + 15, middle), style)
        add(svg, "text", name, x=x + 36, y=y)
        x += wide
    return y + 0.4 * FONT


def _grid(plot: Plot) -> None:
    for tick in plot.y.ticks:
        y = plot.y.at(tick, plot.bottom, plot.top)
        add(plot.svg, "path", class_="grid", d=f"M{plot.left:.1f},{y:.1f}H{plot.right:.1f}")
        add(plot.svg, "text", tick_text(tick), class_="tick", x=plot.left - 8, y=y + 0.33 * FONT, text_anchor="end")
    add(plot.svg, "path", class_="base", d=f"M{plot.left:.1f},{plot.bottom:.1f}H{plot.right:.1f}")


def ticks_below(plot: Plot, label: str) -> None:
    """The x axis; ticks have their numbers as far as these have room beside each other."""
    middle = (plot.left + plot.right) / 2
    add(plot.svg, "text", label, class_="axis", x=middle, y=plot.bottom + FOOT - 4, text_anchor="middle")
    free = -math.inf
    for tick in plot.x.ticks:
        at = plot.x.at(tick, plot.left, plot.right)
        half = len(tick_text(tick)) * DIGIT / 2
        add(plot.svg, "path", class_="base", d=f"M{at:.1f},{plot.bottom:.1f}v4")
        middle = min(at, WIDTH - half)
        if middle - half >= free:
            y = plot.bottom + 4 + FONT
            add(plot.svg, "text", tick_text(tick), class_="tick", x=middle, y=y, text_anchor="middle")
            free = middle + half + CHAR
