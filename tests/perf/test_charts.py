"""Number formats, scales and the SVG charts of a report."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from perf import charts, formatting, plot
from perf.charts import Series, WaterfallRow
from perf.plot import Axis, Limit

SPANS = [(0.0, 1.0), (3.0, 3.0), (0.001, 0.0013), (17.0, 4211.0), (1e-7, 1e6), (99.0, 101.0), (0.0, 0.0), (1.0, 50.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0, "0"),
        (0.0, "0"),
        (12, "12"),
        (1234567, "1,234,567"),
        (0.12345, "0.123"),
        (1.2345, "1.23"),
        (9.996, "10.0"),
        (12.345, "12.3"),
        (99.96, "100"),
        (1234.5, "1,234"),
    ],
)
def test_number_has_three_significant_digits(value: float | None, text: str) -> None:
    assert formatting.format_number(value) == text


def test_formatted_number_is_within_half_a_percent() -> None:
    for value in np.random.default_rng(1).lognormal(3, 4, 2000):
        assert float(formatting.format_number(float(value)).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (0, "0 %"), (0.504, "50 %"), (0.9996, "99.96 %"), (1, "100 %")]
)
def test_share_just_below_100_percent_is_not_shown_as_100_percent(share: float | None, text: str) -> None:
    assert formatting.format_percent(share) == text


@pytest.mark.parametrize("log", [False, None])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("low", "high"), SPANS)
def test_scale_covers_its_values_with_few_ticks(low: float, high: float, zero: bool, log: bool | None) -> None:
    scale = plot.scale_of(Axis("ms", log=log, zero=zero), [low, high])
    assert scale.low <= low * (1 + 1e-9)
    assert high <= scale.high * (1 + 1e-9)
    assert 2 <= len(scale.ticks) <= 16
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert 0 <= scale.position(low, 0, 100) <= scale.position(high, 0, 100) <= 100 + 1e-9


def test_integer_axis_has_whole_ticks() -> None:
    for highest in (1, 2, 3, 7, 40):
        assert all(tick == int(tick) for tick in plot.scale_of(Axis("requests", integer=True), [1, highest]).ticks)


def test_scale_of_one_value_maps_it_to_the_middle() -> None:
    scale = plot.scale_of(Axis("streams", ticks=[8]), [8])
    assert scale.position(8, 100, 200) == 150


def test_quantiles_are_those_of_numpy() -> None:
    values = np.random.default_rng(2).gamma(2, 30, 5000)
    curve = {format_percent: value for value, format_percent in charts.quantiles(list(values))}
    assert len(curve) < 120
    for format_percent in (0, 50, 90, 95, 99, 100):
        assert curve[format_percent] == pytest.approx(np.percentile(values, format_percent))


def test_pareto_frontier_has_the_points_that_no_other_exceeds_in_both() -> None:
    points = [(1.0, 9.0), (2.0, 8.0), (2.0, 5.0), (3.0, 8.0), (4.0, 1.0), (0.5, 9.0)]
    frontier = charts.pareto_frontier(points)
    assert frontier == [(1.0, 9.0), (3.0, 8.0), (4.0, 1.0)]
    exceeded = [p for p in points if any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    assert sorted(set(points) - set(exceeded)) == frontier


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]


def all_charts() -> dict[str, str]:
    axis = Axis("concurrent streams", log=None, ticks=[1, 2, 4])
    curve = charts.quantiles([float(n) for n in range(1, 200)])
    return {
        "lines": charts.lines("L", [Series("p50", [(1, 5), (2, 7), (4, 90)])], axis, Axis("ms"), [Limit(50, "SLO")]),
        "cdf": charts.cdf("C", [Series("a", curve), Series("b", curve)], Axis("ms", zero=False), "requests"),
        "scatter": charts.scatter("S", [Series("a", [(1, 2)], ["8"])], Axis("x"), Axis("y")),
        "bars": charts.bars("B", [("timeout", 3), ("http 429", 1)], "Failed requests"),
        "timeline": charts.timeline("T", [Series("a", [(0, 3), (1, 0)])], Axis("requests", integer=True)),
        "waterfall": charts.waterfall("W", [WaterfallRow(0, 0.01, 0.2, 0.9), WaterfallRow(0.1, 0.1, None, 0.5)]),
        "search": charts.search("F", [(4, True), (8, False)], Axis("requests/s"), [Limit(4, "best: 4")]),
    }


@pytest.mark.parametrize("kind", all_charts())
def test_chart_is_an_image_with_title_and_description(kind: str) -> None:
    svg = ET.fromstring(all_charts()[kind])
    assert svg.get("role") == "img"
    assert [child.tag for child in svg][:2] == ["title", "desc"]
    assert all(svg.findtext(tag) for tag in ("title", "desc"))


@pytest.mark.parametrize("kind", all_charts())
def test_chart_takes_its_colours_from_the_page(kind: str) -> None:
    for element in ET.fromstring(all_charts()[kind]).iter():
        assert not {"fill", "stroke", "style", "font-size"} & set(element.attrib)


def test_series_differ_in_more_than_colour() -> None:
    svg = charts.lines("L", [Series(str(n), [(0, n), (1, n)]) for n in range(8)], Axis("x"), Axis("y"))
    legend = [
        (element.get("stroke-dasharray"), element.get("class"))
        for element in ET.fromstring(svg).iter("path")
        if (element.get("class") or "").startswith("line")
    ]
    looks = {(n % len(plot.DASHES), n % len(plot.MARKERS)) for n in range(8)}
    assert len(looks) == 8
    assert len(set(legend)) == 8


def test_limit_far_above_does_not_flatten_the_lines_and_is_named() -> None:
    line = [Series("p50", [(1, 5), (2, 7)])]
    far = charts.lines("L", line, Axis("x"), Axis("ms"), [Limit(500, "SLO p50 < 500 ms")])
    assert "SLO p50 < 500 ms is above this chart" in texts(far)
    assert "500" not in texts(far)
    near = charts.lines("L", line, Axis("x"), Axis("ms"), [Limit(15, "SLO p50 < 15 ms")])
    assert "SLO p50 < 15 ms" in texts(near)


def test_repeat_starts_a_new_line() -> None:
    assert plot.path_of([(0, 1), (1, 2), (0, 3), (1, 4)]) == "M0.0,1.0L1.0,2.0M0.0,3.0L1.0,4.0"


def test_characters_that_xml_forbids_are_replaced() -> None:
    assert (
        formatting.clean("a\x00b\x1b\ud800c\n\u00e9\U0001f600\ufffe\u202e")
        == "a\ufffdb\ufffd\ufffdc\n\u00e9\U0001f600\ufffd\ufffd"
    )
    svg = charts.bars("\x00", [("<b>&\x0b", 1)], "Failed requests")
    assert "<b>&\ufffd" in texts(svg)
