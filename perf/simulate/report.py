"""Renders simulations as one HTML file without external resources."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby

from perf import charts
from perf.charts import Series
from perf.html_report import Figure, environment
from perf.plot import Axis
from perf.simulate.results import Simulation, SimulationRun
from perf.simulate.settings import MEANINGS

_HOUR_S = 3600.0
# A logarithmic axis has no 0.
_LEAST_S = 0.01


def render(run: SimulationRun) -> str:
    groups = [(start_s, list(group)) for start_s, group in groupby(run.simulations, key=lambda one: one.start_s)]
    return (
        environment()
        .get_template("simulate/report.html.jinja")
        .render(
            run=run,
            groups=[(start_s, group, list(_figures(group))) for start_s, group in groups],
            meanings={one.strategy: MEANINGS[one.strategy] for one in run.simulations},
            missed=[bar for bar in run.bars if not bar.met],
            command=shlex.join(run.command),
        )
    )


def _figures(group: Sequence[Simulation]) -> Iterator[Figure]:
    yield Figure("Cost and waiting", _trade(group), "Down and to the left is better.")
    yield Figure("Replicas that are paid for", _over_time(group, "paid"), "They start, serve or finish their requests.")
    yield Figure("Requests without a first token", _over_time(group, "waiting"))
    yield Figure("Time to first token", _distribution(group), "Marks: median and p95.")
    cached = [(one.strategy, round(one.cached_share * 100, 1)) for one in group]
    yield Figure("Prompt tokens from the cache, %", charts.bars("Prompt tokens from the cache", cached, "%"))
    hours = [(one.strategy, one.replica_hours) for one in group]
    yield Figure("Replica-hours", charts.bars("Replica-hours", hours, "replica-hours"))


def _trade(group: Sequence[Simulation]) -> str:
    series = [Series(one.strategy, [(one.replica_hours, one.ttft_s.p95)], [one.strategy]) for one in group]
    y = Axis("TTFT p95, s", log=True)
    return charts.scatter("TTFT against replica-hours", series, Axis("replica-hours"), y, frontier=False)


def _over_time(group: Sequence[Simulation], name: str) -> str:
    unit, label = (_HOUR_S, "hours") if group[0].points[-1].at > 2 * _HOUR_S else (1.0, "seconds")
    series = [
        Series(one.strategy, [(point.at / unit, float(getattr(point, name))) for point in one.points]) for one in group
    ]
    y = Axis("requests" if name == "waiting" else "replicas", integer=True)
    return charts.lines(f"{name} over time", series, Axis(label), y, mode="lines")


def _distribution(group: Sequence[Simulation]) -> str:
    series = [
        Series(one.strategy, [(max(value, _LEAST_S), percent) for value, percent in one.ttft_curve])
        for one in group
        if one.ttft_curve
    ]
    return charts.cdf("Time to first token", series, Axis("TTFT, s", log=True, zero=False), "requests")
