"""The highest load that meets an SLO: doubling or halving until it lies between two probes, then bisection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from math import sqrt
from typing import Literal

from perf.gate import Gate
from perf.results import FindMax, Probe
from perf.slo import Slo

MAX_PROBES = 12
TOLERANCE = 0.05
LOWEST_RATE = 0.05
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
    at = min(max(start, 1 if whole else LOWEST_RATE), highest)
    while len(probes) < MAX_PROBES:
        found, why = await probe(at)
        probes.append(found)
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


def is_hopeless(gate: Gate, slo: Slo, planned: int, now: float) -> bool:
    """Whether no answer that may still come can make this probe meet the SLO: too many are too late already."""
    for bound in slo.bounds:
        if bound.quantity == "itl":  # of which one request has many
            continue
        allowed = planned * (1 - bound.percentile / 100)
        late = sum(not bound.met_by(record) for record in gate.measured.records if record.done or record.error)
        if bound.quantity in ("ttft", "e2e"):
            under_way = [r for r in gate.measured.records if not (r.done or r.error)]
            late += sum(not r.chunks and now - r.due > bound.limit_s for r in under_way)
        if late > allowed + 1:
            return True
    return False
