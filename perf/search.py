"""Searches for the highest load that meets an SLO: doubling or halving until it is bracketed, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import sqrt
from typing import Literal

from perf.phases import PhaseController
from perf.records import Record
from perf.results import FindMax, Probe
from perf.slo import Slo

MAX_PROBES = 12
# The search ends when the lowest failed load is within this share of the best one. The result is slightly below the
# server's capacity.
TOLERANCE = 0.03
LOWEST_RATE = 0.05
_CHECK_INTERVAL_S = 0.25
Limit = Literal["latency", "errors", "queue", "client", "none"]


async def find_max(
    of: Literal["rate", "concurrency"],
    slo: Slo,
    start: float,
    highest: float,
    probe: Callable[[float], Awaitable[tuple[Probe, Limit]]],
) -> FindMax:
    """`probe` measures a load and returns whether it met the SLO and, if not, the limiting factor.

    Calls it at most MAX_PROBES times.
    """
    integer = of == "concurrency"
    probes: list[Probe] = []
    best: float | None = None
    broke: float | None = None
    limit: Limit = "none"
    retried = False
    load = min(max(start, 1 if integer else LOWEST_RATE), highest)
    while len(probes) < MAX_PROBES:
        result, cause = await probe(load)
        probes.append(result)
        if cause == "client" and not retried:
            retried = True  # once: another process may have used the client's cores
            continue
        if result.met:
            best = load
        else:
            broke, limit = load, cause
        following = None if limit == "client" and not result.met else _next(best, broke, highest, integer)
        if following is None:
            break
        load = following
    return FindMax(of=of, slo=str(slo), best=best, broke_at=broke, limit=limit, probes=probes)


def _next(best: float | None, broke: float | None, highest: float, integer: bool) -> float | None:
    """The next load to probe; None if the result is exact enough or no load is left."""
    if broke is None:
        assert best is not None
        # A rate starts near an estimate; a number of streams starts at 1.
        return None if best >= highest else min(best * (4 if integer else 2), highest)
    if best is None:
        lower = broke // 2 if integer else broke / 2
        return lower if lower >= (1 if integer else LOWEST_RATE) else None
    if broke <= best * (1 + TOLERANCE) or (integer and broke - best <= 1):
        return None
    middle = sqrt(best * broke)
    return float(min(max(round(middle), best + 1), broke - 1)) if integer else middle


class EarlyStop:
    """Ends a probe as soon as no possible remaining result can meet the SLO.

    Counts each finished request and checks those in flight every 0.25 s, since it runs during the measurement.
    """

    def __init__(self, slo: Slo, planned: int, clock: Callable[[], float]) -> None:
        # A request has many gaps: a few late ones do not decide the percentile of all gaps.
        self._late = {bound: 0 for bound in slo.bounds if bound.metric != "itl"}
        self._planned = planned
        self._clock = clock
        self._checked = clock()

    def on_finish(self, controller: PhaseController, record: Record) -> None:
        if record.in_window:
            for bound in self._late:
                self._late[bound] += not bound.met_by(record)
        if controller.phase == "window" and self._clock() > self._checked + _CHECK_INTERVAL_S:
            self._checked = self._clock()
            if self.is_missed(controller.unfinished_records):
                controller.stop()

    def is_missed(self, unfinished: Sequence[Record]) -> bool:
        now = self._clock()
        for bound, late in self._late.items():
            if bound.metric in ("ttft", "e2e"):
                late += sum(not record.chunks and now - record.due > bound.limit_s for record in unfinished)
            if late > self._planned * (1 - bound.percentile / 100) + 1:
                return True
        return False
