"""Describes the stages of a run for reports: groups by load level, the load as text, and checks of the SLO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from perf.formatting import format_number, format_percent
from perf.results import ResultsError, Run, Stage
from perf.slo import Bound, Slo, SloError

HEADINGS = {
    "single": "One request at a time",
    "batch": "Batches",
    "streaming": "Streaming",
    "concurrency": "Concurrency",
    "rate": "Rate",
    "batch-profile": "Batch profile",
    "find-max": "Search for the highest load",
}


@dataclass(frozen=True, slots=True)
class Group:
    """The stages of one scenario with the same kind of loop, which can be compared in one chart."""

    scenario: str
    loop: str
    stages: list[Stage]

    @property
    def heading(self) -> str:
        return HEADINGS[self.scenario]

    @property
    def by_level(self) -> list[Stage]:
        return sorted(self.stages, key=lambda stage: level(stage)[0])

    @property
    def anchor(self) -> str:
        return f"{self.scenario}-{self.loop}"


def groups(run: Run) -> list[Group]:
    """In the order of the run."""
    found: dict[tuple[str, str], list[Stage]] = {}
    for stage in run.stages:
        found.setdefault((stage.scenario, stage.load.loop), []).append(stage)
    return [Group(scenario, loop, stages) for (scenario, loop), stages in found.items()]


def is_batch(stage: Stage) -> bool:
    return stage.scenario in ("batch", "batch-profile")


def level(stage: Stage) -> tuple[float, str]:
    """The load as a number, and its unit."""
    if is_batch(stage):
        return stage.load.batch_size, "prompts per request"
    if stage.load.loop == "open":
        return stage.load.rate or stage.requests / (stage.window_s or 1), "requests due per second"
    return stage.load.concurrency or 1, "concurrent streams"


def load(stage: Stage) -> str:
    """The load in words: `open loop, poisson, 4 requests/s`."""
    parts = [f"{stage.load.loop} loop"]
    if stage.load.loop == "open":
        parts.append(stage.load.arrival)
        if stage.load.rate is not None:
            parts.append(f"{stage.load.rate:g} requests/s")
    elif stage.load.concurrency is not None:
        parts.append("1 stream" if stage.load.concurrency == 1 else f"{stage.load.concurrency} streams")
    if stage.load.batch_size > 1:
        parts.append(f"{stage.load.batch_size} prompts per request")
    if not stage.load.streaming:
        parts.append("no streaming")
    return ", ".join(parts)


def efficiency(stage: Stage) -> str:
    """Concurrency: percent of linear scaling. Batches: a multiple of the throughput of one prompt."""
    if stage.efficiency is None or is_batch(stage):
        return "–" if stage.efficiency is None else f"{format_number(stage.efficiency)}×"
    return format_percent(stage.efficiency)


def errors(stages: Iterable[Stage]) -> dict[str, int]:
    """Failures by kind, the most frequent first."""
    counts: Counter[str] = Counter()
    for stage in stages:
        counts.update(stage.errors)
    return dict(counts.most_common())


def objective(run: Run) -> Slo | None:
    """Raises ResultsError."""
    try:
        return None if run.slo is None else Slo.parse(run.slo)
    except SloError as error:
        raise ResultsError(f"slo: {error}") from None


@dataclass(frozen=True, slots=True)
class Check:
    """One bound of the SLO at one stage; `missed` is the sentence of the suite if it was not met."""

    bound: Bound
    measured: bool
    missed: str | None


def checks(stage: Stage, slo: Slo | None) -> list[Check]:
    """Empty for the stages of a search, which exceeds the SLO to find the limit."""
    if slo is None or stage.scenario == "find-max":
        return []
    return [_check(stage, bound) for bound in slo.bounds]


def _check(stage: Stage, bound: Bound) -> Check:
    """A bound is not measured at stages without its metric, such as TTFT without streaming."""
    if getattr(stage, f"{bound.metric}_ms") is None and stage.finished:
        return Check(bound, False, None)
    name = f"{bound.metric}_p{bound.percentile:g} "
    return Check(bound, True, next((sentence for sentence in stage.missed if sentence.startswith(name)), None))


def limited(run: Run) -> list[Stage]:
    """Stages in which the client was the bottleneck."""
    return [stage for stage in run.stages if stage.client.limited]
