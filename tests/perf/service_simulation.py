"""Small services for the tests of perf.simulate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from perf import machine
from perf.simulate.cluster import Cluster
from perf.simulate.outcome import Outcome
from perf.simulate.results import Bar, SimulationRun, summary
from perf.simulate.settings import STRATEGIES, Burst, Fleet, Job, Losses, Profile, Strategy, Traffic
from perf.simulate.traffic import Trace, generate

# 100 tokens of a prompt per second, 10 tokens of an answer per second and sequence, and no limit of all together.
SIMPLE = Profile(start_s=5, prompt_rate=100, answer_rate=1e9, alone_rate=10, step_tokens=50, slots=2)
NO_LOSSES = Losses(per_hour=0)
SMALL = Traffic(users=40_000, seconds=90, bursts=(Burst(30, 20, 4.0),))
BY_NAME = {strategy.name: strategy for strategy in STRATEGIES}
# Many losses, so that each kind occurs within 90 s.
LOSSES = Losses(per_hour=30, noticed=0.5, notice_s=10)


def trace(at: list[float], prompt: list[int], answer: list[int], seconds: float = 100.0) -> Trace:
    count = len(at)
    numbers, zeros = np.arange(count), np.zeros(count, dtype=np.int64)
    return Trace(
        np.array(at), numbers, numbers, zeros, zeros, np.array(prompt), np.array(answer), zeros.astype(bool), seconds
    )


def run(job: Job, requests: Trace) -> Outcome:
    return Cluster(job, requests).run()


def one_replica(profile: Profile, requests: Trace) -> Outcome:
    job = Job(BY_NAME["round-robin"], profile, Traffic(), NO_LOSSES, Fleet(most=1), 1)
    return run(job, requests)


def small(strategy: Strategy, losses: Losses = LOSSES, start_s: float = 5.0, **fleet: int) -> Outcome:
    bounds = replace(Fleet(most=12, max_queued=160), **fleet)
    job = Job(strategy, Profile(start_s=start_s), SMALL, losses, bounds, 3)
    return run(job, generate(SMALL, 3))


def simulation_run() -> SimulationRun:
    """All strategies with a small service, and a bar that is missed."""
    job = Job(STRATEGIES[0], Profile(start_s=5), SMALL, LOSSES, Fleet(most=12, max_queued=160), 3)
    return SimulationRun(
        tool="test",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        command=["python", "-m", "perf.simulate"],
        commit=None,
        machine=machine.describe(),
        scale="quick",
        seed=3,
        users=SMALL.users,
        settings={"losses": {"per_hour": 30.0, "start_s": 5.0}},
        simulations=[summary(replace(job, strategy=strategy), small(strategy)) for strategy in STRATEGIES],
        bars=[Bar(name="a bar", measured="1 s", met=True), Bar(name="another one", measured="2 s", met=False)],
    )
