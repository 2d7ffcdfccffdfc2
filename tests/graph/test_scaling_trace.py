"""Ten minutes of bursty traffic on a real Ray: replicas by work against Ray Serve's own policy, at the same time."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from itertools import pairwise

import httpx
import pytest

from tests.graph.service import Config, Service, http_client, model_config
from tests.graph.test_autoscaling import replicas, stream

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

SECONDS = 600.0
# A replica computes 8 requests together, 25 tokens per second each: 4 requests of 50 tokens per second.
SLOTS, TOKENS = 8, 50
# A burst for 20 s in every three minutes. One replica computes the usual traffic, also by Ray Serve's default target.
USUAL, BURST, BURST_S, PERIOD_S = 0.5, 8.0, 20.0, 180.0
# What Ray Serve documents as the defaults of its AutoscalingConfig.
RAYS_DEFAULTS = {
    "target_ongoing_requests": 2,
    "upscale_delay_s": 30,
    "downscale_delay_s": 600,
    "look_back_period_s": 30,
}
# Replicas stay for 60 s after they were needed, of which their start takes up to 20 s on a busy machine.
WITHIN_S = 40


def scaled(name: str, **scaling: float) -> Config:
    return model_config(
        name,
        "builtin:toy?load_s=2&step_ms=40",
        deployment={
            "num_replicas": None,
            "max_ongoing_requests": 2 * SLOTS,
            "max_queued_requests": 1000,
            "graceful_shutdown_timeout_s": 60,
            "autoscaling": {"min_replicas": 1, "max_replicas": 4, **scaling},
        },
        engine={"max_running": SLOTS},
    )


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    models = [scaled("work", target_ttft_s=2, downscale_delay_s=60), scaled("ray", **RAYS_DEFAULTS)]
    ingress = {"max_ongoing_requests": 2000, "max_queued_requests": 100}
    with Service(models, ingress=ingress) as service:
        service.wait_until_ready()
        yield service


def arrivals(seed: int) -> list[float]:
    """Instants in seconds of a Poisson process whose rate has bursts."""
    rng, now, found = random.Random(seed), 0.0, []
    while now < SECONDS:
        now += rng.expovariate(BURST)
        rate = BURST if now % PERIOD_S > PERIOD_S - BURST_S else USUAL
        if rng.random() < rate / BURST:
            found.append(now)
    return found


class Observed:
    """What one model did: the seconds until the first token of each request, and its replicas over time."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.failures: list[str] = []
        self.replicas = [1]

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.first, n=20)[-1]

    def changes_of_direction(self, within: int) -> int:
        """How often the number of replicas rises and falls again, or the other way round, within so many seconds."""
        steps = [(at, after - before) for at, (before, after) in enumerate(pairwise(self.replicas)) if after != before]
        return sum(
            next_at - at < within and change * next_change < 0
            for (at, change), (next_at, next_change) in pairwise(steps)
        )


async def observe(client: httpx.AsyncClient, models: dict[str, Observed], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, one in models.items():
            found = await replicas(client, name)
            one.replicas.append(one.replicas[-1] if found < 0 else found)
        await asyncio.sleep(1)


async def send(client: httpx.AsyncClient, name: str, one: Observed, at: float, began: float) -> None:
    await asyncio.sleep(at - (time.monotonic() - began))
    try:
        _, first, _ = await stream(client, name, TOKENS)
    except (AssertionError, httpx.HTTPError) as error:
        one.failures.append(f"{at:.1f} s: {error!r}")
    else:
        one.first.append(first)


async def test_first_tokens_come_in_half_the_time_at_no_more_replica_seconds(service: Service) -> None:
    models = {"work": Observed(), "ray": Observed()}
    instants = arrivals(seed=7)
    async with http_client(service) as client:
        client.timeout = httpx.Timeout(300)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(observe(client, models, SECONDS))
            for name, one in models.items():
                for at in instants:
                    group.create_task(send(client, name, one, at, began))
    work, ray = models["work"], models["ray"]
    for name, one in models.items():
        print(
            f"{name}: {len(one.first)} requests, first token p50 {statistics.median(one.first):.2f} s, "
            f"p95 {one.p95:.2f} s, replica-seconds {sum(one.replicas)}, "
            f"changes of direction {one.changes_of_direction(WITHIN_S)}"
        )
    assert (work.failures, ray.failures) == ([], [])
    assert work.p95 <= ray.p95 / 2
    assert sum(work.replicas) <= sum(ray.replicas)
    assert work.changes_of_direction(WITHIN_S) == 0
