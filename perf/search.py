"""The highest load that meets an SLO: doubling or halving until it lies between two probes, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import sqrt
from typing import Literal

from perf.gate import Gate
from perf.records import Record
from perf.results import FindMax, Probe
from perf.slo import Slo

MAX_PROBES = 12
# Between the best load and the next that broke; what is measured is a little less than a server's own capacity.
TOLERANCE = 0.03
LOWEST_RATE = 0.05
_LOOK_INTERVAL_S = 0.25
Limit = Literal["latency", "errors", "queue", "client", "none"]


async def find_max(
    of: Literal["rate", "concurrency"],
    slo: Slo,
    start: float,
    highest: float,
    probe: Callable[[float], Awaitable[tuple[Probe, Limit]]],
) -> FindMax:
    """`probe` tells of a load whether it met the SLO, and if not what it broke on. At most MAX_PROBES of them."""
    whole = of == "concurrency"
    probes: list[Probe] = []
    best: float | None = None
    broke: float | None = None
    limit: Limit = "none"
    excused = False
    at = min(max(start, 1 if whole else LOWEST_RATE), highest)
    while len(probes) < MAX_PROBES:
        found, why = await probe(at)
        probes.append(found)
        if why == "client" and not excused:
            excused = True  # once: somebody else may have wanted the client's cores just then
            continue
        if found.met:
            best = at
        else:
            broke, limit = at, why
        following = None if limit == "client" and not found.met else _next(best, broke, highest, whole)
        if following is None:
            break
        at = following
    return FindMax(of=of, slo=str(slo), best=best, broke_at=broke, limit=limit, probes=probes)


def _next(best: float | None, broke: float | None, highest: float, whole: bool) -> float | None:
    """None: near enough, or nowhere to go."""
    if broke is None:
        assert best is not None
        # A rate begins near an estimate, streams at one.
        return None if best >= highest else min(best * (4 if whole else 2), highest)
    if best is None:
        lower = broke // 2 if whole else broke / 2
        return lower if lower >= (1 if whole else LOWEST_RATE) else None
    if broke <= best * (1 + TOLERANCE) or (whole and broke - best <= 1):
        return None
    middle = sqrt(best * broke)
    return float(min(max(round(middle), best + 1), broke - 1)) if whole else middle


class Hope:
    """Ends a probe as soon as no answer that may still come can make it meet the SLO: too many are too late already.

    It is told every request that ended, and looks at those under way now and then: it works while time is measured.
    """

    def __init__(self, slo: Slo, planned: int, clock: Callable[[], float]) -> None:
        # One request has many gaps, so a few late ones of them say little about the others.
        self._late = {bound: 0 for bound in slo.bounds if bound.quantity != "itl"}
        self._planned = planned
        self._clock = clock
        self._looked = clock()

    def ended(self, gate: Gate, record: Record) -> None:
        if record.counts:
            for bound in self._late:
                self._late[bound] += not bound.met_by(record)
        if gate.phase == "window" and self._clock() > self._looked + _LOOK_INTERVAL_S:
            self._looked = self._clock()
            if self.is_lost(gate.under_way):
                gate.stop()

    def is_lost(self, under_way: Sequence[Record]) -> bool:
        now = self._clock()
        for bound, late in self._late.items():
            if bound.quantity in ("ttft", "e2e"):
                late += sum(not record.chunks and now - record.due > bound.limit_s for record in under_way)
            if late > self._planned * (1 - bound.percentile / 100) + 1:
                return True
        return False
