"""Renders a run as one HTML file without external resources."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from perf import charts, stages
from perf.charts import Series, WaterfallRow
from perf.exits import Exit
from perf.formatting import clean, format_number, format_percent, shorten
from perf.plot import Axis, Limit, Point
from perf.results import Distribution, Run, Second, Stage
from perf.slo import Slo

MAX_CURVES = 8  # load levels in one chart
MIN_TIMELINE_S = 5
MAX_TIMELINE_POINTS = 200
WATERFALL_ROWS = 36
MAX_ERROR_KINDS = 12
MAX_TEXT_LENGTH = 2000
METRICS = {
    "ttft": ("Time to first token", "TTFT, ms"),
    "tpot": ("Time per output token", "TPOT, ms"),
    "itl": ("Gaps between the chunks of a stream", "ITL, ms"),
    "e2e": ("End to end", "from due to the end of the response, ms"),
}
STATUSES: dict[int, tuple[str, str]] = {
    Exit.FAILED: ("Failed", "bad"),
    Exit.CLIENT_LIMITED: ("Client-limited", "warn"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    svg: str
    note: str = ""


def render(run: Run) -> str:
    """Raises ResultsError if the run's objective is invalid."""
    slo = stages.objective(run)
    groups = stages.groups(run)
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            status=_status(run),
            groups=[(group, list(_figures(group, slo))) for group in groups],
            limited=stages.limited(run),
            checks={(stage.scenario, stage.name): stages.checks(stage, slo) for stage in run.stages},
            pareto=_pareto(groups),
            errors=_errors(run),
            search=_search(run),
            settings=_settings(run.settings),
            command=shlex.join(run.command),
        )
    )


def _printable(value: object) -> object:
    """Removes control characters from texts and limits their length; markup stays as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return shorten(clean(value), MAX_TEXT_LENGTH)


@cache
def environment() -> Environment:
    """Renders the templates of this package. Undefined names are errors."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, percent=format_percent, load=stages.load)
    environment.filters.update(efficiency=stages.efficiency)
    environment.globals.update(times=_times)
    return environment


def _status(run: Run) -> tuple[str, str]:
    """The verdict in one word, and its CSS class."""
    code = run.verdict.exit_code
    if code == Exit.OK:
        return ("Passed" if run.slo else "Completed"), "good"
    return STATUSES.get(code, (f"Exit code {code}", "bad"))


def _settings(settings: dict[str, Any]) -> dict[str, str]:
    return {name: _setting(value) for name, value in settings.items()}


def _setting(value: Any) -> str:
    match value:
        case str():
            return value
        case bool():
            return "yes" if value else "no"
        case [*parts] if not any(isinstance(part, list | dict) for part in parts):
            return ", ".join(map(str, parts))
        case _:
            return json.dumps(value)


def _times(stage: Stage) -> list[tuple[str, Distribution]]:
    """All latency distributions of a stage by name."""
    distributions = {
        "TTFT": stage.ttft_ms,
        "TTFT from sending": stage.ttft_service_ms,
        "TPOT": stage.tpot_ms,
        "ITL": stage.itl_ms,
        "end to end": stage.e2e_ms,
        "end to end from sending": stage.e2e_service_ms,
    }
    return [(name, times) for name, times in distributions.items() if times is not None]


def _figures(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    yield from _against_load(group, slo)
    yield from _distributions(group, slo)
    yield from _timelines(group)
    yield from _waterfall(group)


def _limits(slo: Slo | None, metric: str) -> list[Limit]:
    return [
        Limit(bound.limit_s * 1e3, f"SLO p{bound.percentile:g} < {bound.limit_s * 1e3:g} ms")
        for bound in (slo.bounds if slo else ())
        if bound.metric == metric
    ]


def _against_load(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    """Charts of latency, throughput and efficiency by load level, if there are at least two levels."""
    rows = group.by_level
    levels = {stages.level(stage)[0] for stage in rows}
    if len(levels) < 2:
        return
    axis = Axis(stages.level(rows[0])[1], log=None, ticks=sorted(levels))
    for metric in ("ttft", "tpot", "e2e"):
        series = [Series(part, _percentiles(rows, metric, part)) for part in ("p50", "p95")]
        if len(series[0].points) > 1:
            title, label = METRICS[metric]
            title = f"{title} against load"
            svg = charts.lines(title, series, axis, Axis(label, log=None), _limits(slo, metric))
            yield Figure(title, svg)
    yield from _throughput(rows, axis)


def _throughput(rows: Sequence[Stage], axis: Axis) -> Iterator[Figure]:
    batches = stages.is_batch(rows[0])
    scale, unit = (1, "multiple of the throughput of the smallest batch") if batches else (100, "% of linear scaling")
    charted: list[tuple[str, str, Callable[[Stage], float | None]]] = [
        ("Throughput against load", "tokens/s of all requests", lambda stage: stage.tokens_per_s),
        (
            "Efficiency against load",
            unit,
            lambda stage: None if stage.efficiency is None else stage.efficiency * scale,
        ),
    ]
    for title, label, read in charted:
        points = _points(rows, read)
        if len(points) > 1:
            yield Figure(title, charts.lines(title, [Series(label, points)], axis, Axis(label)))


def _percentiles(rows: Sequence[Stage], metric: str, part: str) -> list[Point]:
    return _points(rows, lambda stage: getattr(getattr(stage, f"{metric}_ms"), part, None))


def _points(rows: Sequence[Stage], read: Callable[[Stage], float | None]) -> list[Point]:
    pairs = ((stages.level(stage)[0], read(stage)) for stage in rows)
    return [(level, value) for level, value in pairs if value is not None]


def _distributions(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    shown = _evenly_spaced(group.by_level, MAX_CURVES)
    note = "" if len(shown) == len(group.stages) else f"{len(shown)} of {len(group.stages)} levels."
    for metric, (title, label) in METRICS.items():
        series = [Series(stage.name, points) for stage in shown if (points := _quantiles(stage, metric))]
        if series:
            of, title = "gaps" if metric == "itl" else "requests", f"{title}, distribution"
            axis = Axis(label, log=None, zero=False)
            yield Figure(title, charts.cdf(title, series, axis, of, _limits(slo, metric)), note)


def _quantiles(stage: Stage, metric: str) -> list[Point]:
    """Empty for fewer than two requests."""
    if metric == "itl":
        return [(value, float(format_percent)) for format_percent, value in enumerate(stage.itl_quantiles_ms)]
    values = [value for value in getattr(stage.samples, f"{metric}_ms") if value is not None]
    return charts.quantiles(values) if len(values) > 1 else []


def _evenly_spaced(rows: list[Stage], most: int) -> list[Stage]:
    """At most `most` of the stages, evenly spaced, with the first and the last one."""
    if len(rows) <= most:
        return rows
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _timelines(group: stages.Group) -> Iterator[Figure]:
    shown = [
        (stage, _downsampled(stage.timeline))
        for stage in _evenly_spaced(group.by_level, MAX_CURVES)
        if len(stage.timeline) >= MIN_TIMELINE_S
    ]
    if not shown:
        return
    charted: list[tuple[str, Axis, Callable[[Second], float]]] = [
        ("Throughput over time", Axis("tokens/s"), lambda second: second.tokens),
        ("Requests in flight over time", Axis("requests in flight", integer=True), lambda second: second.in_flight),
    ]
    for title, axis, read in charted:
        series = [Series(stage.name, [(one.at_s, read(one)) for one in seconds]) for stage, seconds in shown]
        yield Figure(title, charts.timeline(title, series, axis))


def _downsampled(seconds: Sequence[Second]) -> list[Second]:
    """Means over several seconds, so that at most MAX_TIMELINE_POINTS points are left; repeats are not mixed."""
    size = -(-len(seconds) // MAX_TIMELINE_POINTS)
    parts: list[list[Second]] = []
    for second in seconds:
        if not parts or len(parts[-1]) == size or second.at_s < parts[-1][-1].at_s:
            parts.append([])
        parts[-1].append(second)
    return [
        Second(
            at_s=part[0].at_s,
            tokens=sum(one.tokens for one in part) / len(part),
            started=sum(one.started for one in part),
            in_flight=round(sum(one.in_flight for one in part) / len(part)),
        )
        for part in parts
    ]


def _waterfall(group: stages.Group) -> Iterator[Figure]:
    """The requests of the highest level around its slowest one."""
    stage = group.by_level[-1]
    rows = _around_the_slowest(stage)
    if len(rows) > 1:
        title = f"Single requests: {shorten(clean(stage.name), 60)}"
        note = f"{len(rows)} of {stage.finished} finished requests, around the slowest."
        yield Figure(title, charts.waterfall(title, rows), note if len(rows) < stage.finished else "")


def _around_the_slowest(stage: Stage) -> list[WaterfallRow]:
    samples = stage.samples
    if not samples.e2e_ms:
        return []
    slowest = max(range(len(samples.e2e_ms)), key=samples.e2e_ms.__getitem__)
    same = [index for index, repeat in enumerate(samples.repeat) if repeat == samples.repeat[slowest]]
    first = max(0, min(same.index(slowest) - WATERFALL_ROWS // 2, len(same) - WATERFALL_ROWS))
    return [_row(stage, index) for index in same[first : first + WATERFALL_ROWS]]


def _row(stage: Stage, index: int) -> WaterfallRow:
    samples = stage.samples
    due, ttft = samples.due_s[index], samples.ttft_ms[index]
    late_ms = max(samples.e2e_ms[index] - samples.service_ms[index], 0.0)
    return WaterfallRow(
        due, due + late_ms / 1e3, None if ttft is None else due + ttft / 1e3, due + samples.e2e_ms[index] / 1e3
    )


def _pareto(groups: Sequence[stages.Group]) -> Figure | None:
    series = []
    for group in groups:
        rows = [stage for stage in group.stages if stage.tpot_ms is not None and stage.tpot_ms.p50 > 0]
        points = [(1e3 / stage.tpot_ms.p50, stage.tokens_per_s) for stage in rows if stage.tpot_ms is not None]
        if points:
            series.append(Series(f"{group.scenario} ({group.loop} loop)", points, [stage.name for stage in rows]))
    if sum(len(one.points) for one in series) < 2:
        return None
    title = "Throughput against speed per stream"
    x, y = Axis("tokens/s per stream (1 / TPOT p50)"), Axis("tokens/s of all requests")
    return Figure(title, charts.scatter(title, series, x, y), "Up and to the right is better.")


def _errors(run: Run) -> Figure | None:
    kinds = list(stages.errors(run.stages).items())
    if not kinds:
        return None
    rest = sum(count for _, count in kinds[MAX_ERROR_KINDS:])
    rows = kinds[:MAX_ERROR_KINDS] + ([(f"{len(kinds) - MAX_ERROR_KINDS} other kinds", rest)] if rest else [])
    title = "Failed requests by kind"
    return Figure(title, charts.bars(title, rows, "Failed requests"))


def _search(run: Run) -> Figure | None:
    found = run.find_max
    if found is None or len(found.probes) < 2:
        return None
    unit = "requests due per second" if found.of == "rate" else "concurrent streams"
    best = [Limit(found.best, f"best: {found.best:g}")] if found.best is not None else []
    tried = [(probe.at, probe.met) for probe in found.probes]
    title = "Probed loads in order"
    note = "Circle: the objective was met. Cross: it was missed."
    return Figure(title, charts.search(title, tried, Axis(unit, log=None), best), note)
