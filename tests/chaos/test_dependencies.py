"""The tracing backend, Prometheus and Redis hang or are gone (R15): no call fails, and none is slower."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.chaos.measure import Times, in_turn, short_calls
from tests.chaos.stack import Stack, stack
from tests.graph.service import http_client

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]

ROUNDS, CALLS = 4, 100
# In each comparison the two sides differ by this much without a fault, on a machine that other programs use.
NOISE = 0.15


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Every request is traced."""
    with stack(tmp_path_factory.mktemp("dependencies"), ingresses=1, traced=1.0) as running:
        yield running


async def hang_collector(stack: Stack, on: bool) -> None:
    stack.collector.stall() if on else stack.collector.resume()


async def hang_prometheus(stack: Stack, on: bool) -> None:
    stack.prometheus.send_signal(signal.SIGSTOP if on else signal.SIGCONT)


async def hang_redis(stack: Stack, on: bool) -> None:
    stack.redis.send(signal.SIGSTOP if on else signal.SIGCONT)


async def nothing(stack: Stack, on: bool) -> None:
    """The noise of the comparison."""


@pytest.mark.parametrize("fault", [nothing, hang_collector, hang_prometheus, hang_redis], ids=lambda one: one.__name__)
async def test_a_dependency_that_hangs_fails_and_delays_no_call(running: Stack, fault: object) -> None:
    async def switch(on: bool) -> None:
        with suppress(psutil.NoSuchProcess):
            await fault(running, on)  # type: ignore[operator]

    async with http_client(running.service) as client:
        await short_calls(client, "toy", 50, Times())
        without, during = await in_turn(client, "toy", switch, ROUNDS, CALLS)
    ratios = [during.percentile_ms(percent) / without.percentile_ms(percent) for percent in (50, 99)]
    print(f"without: {without.summary}; with: {during.summary}; ratio p50 {ratios[0]:.3f}, p99 {ratios[1]:.3f}")
    assert not without.failures
    assert not during.failures
    assert ratios[0] <= 1.05 + NOISE


def test_the_service_ends_in_time_without_its_dependencies(running: Stack) -> None:
    running.collector.stall()
    running.redis.kill()
    running.prometheus.kill()
    assert running.service.interrupt(seconds=30) in (0, 130)
