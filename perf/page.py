"""A run as one page that needs no network."""

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
from perf.charts import Row, Series
from perf.exits import Exit
from perf.plot import Axis, Limit, Point
from perf.results import Distribution, Run, Second, Stage
from perf.slo import Slo
from perf.words import clean, figure, percent, short

CURVES = 8  # in one chart, of so many levels at most
SECONDS = 5  # fewer are no timeline
TICKS = 200  # points of one
ROWS = 36  # requests of a waterfall
KINDS = 12  # of errors
LONGEST_TEXT = 2000
QUANTITIES = {
    "ttft": ("Time to first token", "TTFT, ms"),
    "tpot": ("Time per output token", "TPOT, ms"),
    "itl": ("Gaps between the events of a stream", "ITL, ms"),
    "e2e": ("End to end", "due to the end of the answer, ms"),
}
STATES: dict[int, tuple[str, str]] = {
    Exit.FAILED: ("Failed", "bad"),
    Exit.CLIENT_LIMITED: ("Client-limited", "warn"),
}


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    svg: str
    note: str = ""


def render(run: Run) -> str:
    """Raises ResultsError for an objective that is none."""
    slo = stages.objective(run)
    groups = stages.groups(run)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            run=run,
            state=_state(run),
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


def _printed(value: object) -> object:
    """Texts without control characters and of a length that a page can bear; what is markup already stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return short(clean(value), LONGEST_TEXT)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, percent=percent, load=stages.load)
    environment.filters.update(efficiency=stages.efficiency)
    environment.globals.update(times=_times)
    return environment


def _state(run: Run) -> tuple[str, str]:
    """The verdict in one word, and of which colour it is."""
    code = run.verdict.exit_code
    if code == Exit.OK:
        return ("Passed" if run.slo else "Completed"), "good"
    return STATES.get(code, (f"Exit code {code}", "bad"))


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
    """All latencies of a stage, by what they are."""
    named = {
        "TTFT": stage.ttft_ms,
        "TTFT from sending": stage.ttft_service_ms,
        "TPOT": stage.tpot_ms,
        "ITL": stage.itl_ms,
        "end to end": stage.e2e_ms,
        "end to end from sending": stage.e2e_service_ms,
    }
    return [(name, times) for name, times in named.items() if times is not None]


def _figures(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    yield from _against_load(group, slo)
    yield from _distributions(group, slo)
    yield from _timelines(group)
    yield from _waterfall(group)


def _limits(slo: Slo | None, quantity: str) -> list[Limit]:
    return [
        Limit(bound.limit_s * 1e3, f"SLO p{bound.percentile:g} < {bound.limit_s * 1e3:g} ms")
        for bound in (slo.bounds if slo else ())
        if bound.quantity == quantity
    ]


def _against_load(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    """Of two levels or more."""
    rows = group.by_level
    levels = {stages.level(stage)[0] for stage in rows}
    if len(levels) < 2:
        return
    axis = Axis(stages.level(rows[0])[1], log=None, ticks=sorted(levels))
    for quantity in ("ttft", "tpot", "e2e"):
        series = [Series(part, _percentiles(rows, quantity, part)) for part in ("p50", "p95")]
        if len(series[0].points) > 1:
            title, label = QUANTITIES[quantity]
            title = f"{title} against load"
            svg = charts.lines(title, series, axis, Axis(label, log=None), _limits(slo, quantity))
            yield Figure(title, svg)
    yield from _throughput(rows, axis)


def _throughput(rows: Sequence[Stage], axis: Axis) -> Iterator[Figure]:
    batches = stages.by_batch(rows[0])
    scale, unit = (1, "times the smallest batch’s tokens/s") if batches else (100, "% of linear scaling")
    drawn: list[tuple[str, str, Callable[[Stage], float | None]]] = [
        ("Throughput against load", "tokens/s, all requests together", lambda stage: stage.tokens_per_s),
        (
            "Efficiency against load",
            unit,
            lambda stage: None if stage.efficiency is None else stage.efficiency * scale,
        ),
    ]
    for title, label, read in drawn:
        points = _points(rows, read)
        if len(points) > 1:
            yield Figure(title, charts.lines(title, [Series(label, points)], axis, Axis(label)))


def _percentiles(rows: Sequence[Stage], quantity: str, part: str) -> list[Point]:
    return _points(rows, lambda stage: getattr(getattr(stage, f"{quantity}_ms"), part, None))


def _points(rows: Sequence[Stage], read: Callable[[Stage], float | None]) -> list[Point]:
    pairs = ((stages.level(stage)[0], read(stage)) for stage in rows)
    return [(level, value) for level, value in pairs if value is not None]


def _distributions(group: stages.Group, slo: Slo | None) -> Iterator[Figure]:
    shown = _spread(group.by_level, CURVES)
    note = "" if len(shown) == len(group.stages) else f"{len(shown)} of {len(group.stages)} levels."
    for quantity, (title, label) in QUANTITIES.items():
        series = [Series(stage.name, points) for stage in shown if (points := _quantiles(stage, quantity))]
        if series:
            of, title = "gaps" if quantity == "itl" else "requests", f"{title}, distribution"
            axis = Axis(label, log=None, zero=False)
            yield Figure(title, charts.cdf(title, series, axis, of, _limits(slo, quantity)), note)


def _quantiles(stage: Stage, quantity: str) -> list[Point]:
    """Nothing of fewer than two: one request has no distribution."""
    if quantity == "itl":
        return [(value, float(percent)) for percent, value in enumerate(stage.itl_quantiles_ms)]
    values = [value for value in getattr(stage.samples, f"{quantity}_ms") if value is not None]
    return charts.quantiles(values) if len(values) > 1 else []


def _spread(rows: list[Stage], most: int) -> list[Stage]:
    """As many at most, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def _timelines(group: stages.Group) -> Iterator[Figure]:
    shown = [
        (stage, _thinned(stage.timeline)) for stage in _spread(group.by_level, CURVES) if len(stage.timeline) >= SECONDS
    ]
    if not shown:
        return
    drawn: list[tuple[str, Axis, Callable[[Second], float]]] = [
        ("Throughput over time", Axis("tokens/s"), lambda second: second.tokens),
        ("Requests in flight over time", Axis("requests in flight", whole=True), lambda second: second.in_flight),
    ]
    for title, axis, read in drawn:
        series = [Series(stage.name, [(one.at_s, read(one)) for one in seconds]) for stage, seconds in shown]
        yield Figure(title, charts.timeline(title, series, axis))


def _thinned(seconds: Sequence[Second]) -> list[Second]:
    """Means of as many seconds as it takes to have TICKS points; repeats are kept apart."""
    size = -(-len(seconds) // TICKS)
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
    """Of the highest level, around its slowest request."""
    stage = group.by_level[-1]
    rows = _around_the_slowest(stage)
    if len(rows) > 1:
        title = f"Requests one by one: {short(clean(stage.name), 60)}"
        note = f"{len(rows)} of {stage.finished} finished requests, around the slowest."
        yield Figure(title, charts.waterfall(title, rows), note if len(rows) < stage.finished else "")


def _around_the_slowest(stage: Stage) -> list[Row]:
    kept = stage.samples
    if not kept.e2e_ms:
        return []
    slowest = max(range(len(kept.e2e_ms)), key=kept.e2e_ms.__getitem__)
    same = [index for index, repeat in enumerate(kept.repeat) if repeat == kept.repeat[slowest]]
    first = max(0, min(same.index(slowest) - ROWS // 2, len(same) - ROWS))
    return [_row(stage, index) for index in same[first : first + ROWS]]


def _row(stage: Stage, index: int) -> Row:
    kept = stage.samples
    due, ttft = kept.due_s[index], kept.ttft_ms[index]
    late_ms = max(kept.e2e_ms[index] - kept.service_ms[index], 0.0)
    return Row(due, due + late_ms / 1e3, None if ttft is None else due + ttft / 1e3, due + kept.e2e_ms[index] / 1e3)


def _pareto(groups: Sequence[stages.Group]) -> Figure | None:
    series = []
    for group in groups:
        rows = [stage for stage in group.stages if stage.tpot_ms is not None and stage.tpot_ms.p50 > 0]
        points = [(1e3 / stage.tpot_ms.p50, stage.tokens_per_s) for stage in rows if stage.tpot_ms is not None]
        if points:
            series.append(Series(f"{group.scenario} ({group.loop} loop)", points, [stage.name for stage in rows]))
    if sum(len(one.points) for one in series) < 2:
        return None
    title = "Throughput against speed for one user"
    x, y = Axis("tokens/s one user sees (1 / TPOT p50)"), Axis("tokens/s, all requests together")
    return Figure(title, charts.scatter(title, series, x, y), "Up and to the right is better.")


def _errors(run: Run) -> Figure | None:
    kinds = list(stages.errors(run.stages).items())
    if not kinds:
        return None
    rest = sum(count for _, count in kinds[KINDS:])
    rows = kinds[:KINDS] + ([(f"{len(kinds) - KINDS} other kinds", rest)] if rest else [])
    title = "Failed requests by kind"
    return Figure(title, charts.bars(title, rows, "Failed requests"))


def _search(run: Run) -> Figure | None:
    found = run.find_max
    if found is None or len(found.probes) < 2:
        return None
    unit = "requests due a second" if found.of == "rate" else "streams at a time"
    best = [Limit(found.best, f"best: {found.best:g}")] if found.best is not None else []
    tried = [(probe.at, probe.met) for probe in found.probes]
    title = "Loads tried, in order"
    note = "A disc met the objective, a cross did not."
    return Figure(title, charts.search(title, tried, Axis(unit, log=None), best), note)
