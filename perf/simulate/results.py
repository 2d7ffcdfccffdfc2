"""The file `results.json` of a simulation. Times in seconds unless a name says otherwise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from pydantic import Field

from perf.charts import quantiles
from perf.results import Machine, ResultModel
from perf.simulate.outcome import Outcome
from perf.simulate.settings import Job

# A change of the number of replicas that goes the other way than one less than this before it is a flap.
FLAP_S = 300.0
_MOST_SAMPLES = 240


class Percentiles(ResultModel):
    p50: float
    p95: float
    p99: float
    max: float


class Point(ResultModel):
    """The service at one moment. `waiting` requests have no first token; `paid` replicas start, serve or drain."""

    at: float
    ready: int
    paid: int
    waiting: int


class Simulation(ResultModel):
    """One strategy with one start time of a replica."""

    strategy: str
    router: str
    scaler: str
    start_s: float
    requests: int
    failed: dict[str, int] = Field(description="refused by a full queue, lost with a replica, or past its deadline")
    queue_s: Percentiles = Field(description="From the arrival of a request until its prompt is computed.")
    ttft_s: Percentiles = Field(description="From the arrival of a request to its first token.")
    ttft_curve: list[tuple[float, float]] = Field(description="TTFT in seconds, percent of the finished requests.")
    queue_curve: list[tuple[float, float]] = Field(description="Queue time, percent of the finished requests.")
    prompt_tokens: int
    cached_tokens: int
    replica_s: float
    usd: float
    most_ready: int
    decisions: int
    direction_changes: int
    flaps: int = Field(description=f"Changes of direction less than {FLAP_S:g} s after the change before.")
    lost_replicas: int
    resumed: int
    most_running: int
    routing_ms: Percentiles | None = Field(description="Processor time of a routing decision of the routing table.")
    decision_ms: Percentiles = Field(description="Processor time of a scaling decision.")
    cpu_s: float
    points: list[Point]

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)

    @property
    def failures(self) -> int:
        return sum(self.failed.values())

    @property
    def replica_hours(self) -> float:
        return self.replica_s / 3600


class Bar(ResultModel):
    """Something that the product must show. `measured` is a sentence."""

    name: str
    measured: str
    met: bool


class SimulationRun(ResultModel):
    """All simulations of one command."""

    tool: str
    started_at: str
    seconds: float
    command: list[str]
    commit: str | None
    machine: Machine
    scale: str
    seed: int
    users: int
    settings: dict[str, dict[str, Any]]
    simulations: list[Simulation]
    bars: list[Bar]


def summary(job: Job, outcome: Outcome) -> Simulation:
    finished = [request for request in outcome.requests if not request.error]
    queue = [request.began - request.arrived for request in finished if request.began is not None]
    ttft = [request.first - request.arrived for request in finished if request.first is not None]
    directions, flaps = _directions(outcome)
    every = max(1, len(outcome.samples) // _MOST_SAMPLES)
    return Simulation(
        strategy=job.strategy.name,
        router=job.strategy.router,
        scaler=job.strategy.scaler,
        start_s=job.profile.start_s,
        requests=len(outcome.requests),
        failed=dict(Counter(request.error for request in outcome.requests if request.error)),
        queue_s=percentiles(queue),
        ttft_s=percentiles(ttft),
        ttft_curve=_curve(ttft),
        queue_curve=_curve(queue),
        prompt_tokens=sum(request.prompt for request in finished),
        cached_tokens=sum(request.cached for request in finished),
        replica_s=outcome.replica_s,
        usd=outcome.replica_s / 3600 * job.fleet.usd_per_hour,
        most_ready=max(sample.ready for sample in outcome.samples),
        decisions=len(outcome.decisions),
        direction_changes=directions,
        flaps=flaps,
        lost_replicas=outcome.lost_replicas,
        resumed=outcome.resumed,
        most_running=outcome.most_running,
        routing_ms=percentiles(np.array(outcome.routing_s) * 1e3) if outcome.routing_s else None,
        decision_ms=percentiles(np.array(outcome.decision_s) * 1e3),
        cpu_s=outcome.cpu_s,
        points=[Point(at=s.at, ready=s.ready, paid=s.paid, waiting=s.waiting) for s in outcome.samples[::every]],
    )


def percentiles(values: Any) -> Percentiles:
    if not len(values):
        return Percentiles(p50=0, p95=0, p99=0, max=0)
    p50, p95, p99, most = (float(value) for value in np.percentile(values, [50, 95, 99, 100]))
    return Percentiles(p50=p50, p95=p95, p99=p99, max=most)


def _curve(values: list[float]) -> list[tuple[float, float]]:
    return quantiles(values) if values else []


def _directions(outcome: Outcome) -> tuple[int, int]:
    """How often the number of replicas was changed the other way than before, and how often soon after it."""
    changes, flaps, before, target, at = 0, 0, 0, outcome.first_target, 0.0
    for now, wanted in outcome.decisions:
        direction = 1 if wanted > target else -1
        if before and direction != before:
            changes += 1
            flaps += now - at < FLAP_S
        before, target, at = direction, wanted, now
    return changes, flaps
