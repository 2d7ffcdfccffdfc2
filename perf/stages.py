"""What a stage says to a reader: its load in words, and whether it kept the objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from perf.results import ResultsError, Run, Stage
from perf.slo import Bound, Slo, SloError
from perf.words import figure, percent

HEADS = {
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
    """The stages of one scenario with one kind of loop: what may be compared and drawn in one chart."""

    scenario: str
    loop: str
    stages: list[Stage]

    @property
    def head(self) -> str:
        return HEADS[self.scenario]

    @property
    def by_level(self) -> list[Stage]:
        return sorted(self.stages, key=lambda stage: level(stage)[0])

    @property
    def anchor(self) -> str:
        return f"{self.scenario}-{self.loop}"


def groups(run: Run) -> list[Group]:
    """In the order in which they ran."""
    found: dict[tuple[str, str], list[Stage]] = {}
    for stage in run.stages:
        found.setdefault((stage.scenario, stage.load.loop), []).append(stage)
    return [Group(scenario, loop, stages) for (scenario, loop), stages in found.items()]


def by_batch(stage: Stage) -> bool:
    return stage.scenario in ("batch", "batch-profile")


def level(stage: Stage) -> tuple[float, str]:
    """How much load it was, and of what."""
    if by_batch(stage):
        return stage.load.batch_size, "prompts a request"
    if stage.load.loop == "open":
        return stage.load.rate or stage.requests / (stage.window_s or 1), "requests due a second"
    return stage.load.concurrency or 1, "streams at a time"


def load(stage: Stage) -> str:
    """In words: `open loop, poisson, 4 requests/s`."""
    said = [f"{stage.load.loop} loop"]
    if stage.load.loop == "open":
        said.append(stage.load.arrival)
        if stage.load.rate is not None:
            said.append(f"{stage.load.rate:g} requests/s")
    elif stage.load.concurrency is not None:
        said.append("1 stream" if stage.load.concurrency == 1 else f"{stage.load.concurrency} streams")
    if stage.load.batch_size > 1:
        said.append(f"{stage.load.batch_size} prompts a request")
    if not stage.load.streaming:
        said.append("whole answers")
    return ", ".join(said)


def efficiency(stage: Stage) -> str:
    """Of concurrency a share of what could be had, of batches how many times one prompt's speed."""
    if stage.efficiency is None or by_batch(stage):
        return "–" if stage.efficiency is None else f"{figure(stage.efficiency)}×"
    return percent(stage.efficiency)


def errors(stages: Iterable[Stage]) -> dict[str, int]:
    """By kind, the commonest first."""
    found: Counter[str] = Counter()
    for stage in stages:
        found.update(stage.errors)
    return dict(found.most_common())


def objective(run: Run) -> Slo | None:
    """Raises ResultsError."""
    try:
        return None if run.slo is None else Slo.parse(run.slo)
    except SloError as error:
        raise ResultsError(f"slo: {error}") from None


@dataclass(frozen=True, slots=True)
class Check:
    """One bound at one stage: what the suite said if it did not hold."""

    bound: Bound
    measured: bool
    missed: str | None


def checks(stage: Stage, slo: Slo | None) -> list[Check]:
    """A search's own stages are not held to it: going beyond is how it finds the limit."""
    if slo is None or stage.scenario == "find-max":
        return []
    return [_check(stage, bound) for bound in slo.bounds]


def _check(stage: Stage, bound: Bound) -> Check:
    """Answers that come whole have no first token; where nothing was answered, everything was missed."""
    if getattr(stage, f"{bound.quantity}_ms") is None and stage.finished:
        return Check(bound, False, None)
    name = f"{bound.quantity}_p{bound.percentile:g} "
    return Check(bound, True, next((told for told in stage.missed if told.startswith(name)), None))


def limited(run: Run) -> list[Stage]:
    """Whose figures are the client's."""
    return [stage for stage in run.stages if stage.client.limited]
