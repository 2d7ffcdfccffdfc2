"""The faults of `make chaos`: what each does to the running service, and whether it may end open requests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.chaos import faults
from tests.chaos.network import Link
from tests.chaos.stack import Stack

Inject = Callable[[Stack, Link], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """`cuts` is whether open requests of the broken part may end early. No other request may fail."""

    name: str
    inject: Inject
    cuts: bool = False


def _kill(text: str, last: bool = False) -> Inject:
    """Kill the first process with this text in its command line, or the last one."""

    async def inject(stack: Stack, link: Link) -> None:
        found = stack.service.find(text)
        await asyncio.to_thread(faults.kill, found[-1:] if last else found[:1])

    return inject


def _stop(text: str, seconds: float) -> Inject:
    async def inject(stack: Stack, link: Link) -> None:
        with faults.stopped(stack.service.find(text)[:1]):
            await asyncio.sleep(seconds)

    return inject


async def _hang(stack: Stack, link: Link) -> None:
    """A thread of a model replica that is not the first one stands still for 8 s."""
    replica = stack.service.find(":model-toy")[0]
    busiest = max(replica.threads()[1:], key=lambda thread: thread.user_time + thread.system_time)
    with faults.hung(busiest.id):
        await asyncio.sleep(8)


async def _out_of_memory(stack: Stack, link: Link) -> None:
    """A replica gets no memory for 5 s. It may end; if it is alive it goes on."""
    with suppress(psutil.NoSuchProcess), faults.out_of_memory(stack.service.find(":model-toy")[0]):
        await asyncio.sleep(5)


async def _slow_disk(stack: Stack, link: Link) -> None:
    with faults.slow_disk(stack.service.folder):
        await asyncio.sleep(10)


async def _clock_late(stack: Stack, link: Link) -> None:
    """The wall clock is an hour late for 5 s."""
    stack.move_clock(-3600)
    await asyncio.sleep(5)
    stack.move_clock(3600)


async def _clock_ahead(stack: Stack, link: Link) -> None:
    """The wall clock jumps two hours ahead, and stays there: Ray's timers need it. See docs/operations.md."""
    stack.move_clock(7200)


async def _collector_hangs(stack: Stack, link: Link) -> None:
    stack.collector.stall()
    await asyncio.sleep(10)
    stack.collector.resume()


async def _redis_hangs(stack: Stack, link: Link) -> None:
    stack.redis.send(signal.SIGSTOP)
    await asyncio.sleep(8)
    stack.redis.send(signal.SIGCONT)


async def _redis_is_gone(stack: Stack, link: Link) -> None:
    stack.redis.kill()
    await asyncio.sleep(8)
    await asyncio.to_thread(stack.redis.start)


async def _prometheus_hangs(stack: Stack, link: Link) -> None:
    with faults.stopped([stack.prometheus]):
        await asyncio.sleep(8)


async def _network_stalls(stack: Stack, link: Link) -> None:
    """Nothing passes for 3 s on the connections of the client behind the link; then all of it does."""
    link.drop()
    await asyncio.sleep(3)
    link.restore()


async def _network_is_cut(stack: Stack, link: Link) -> None:
    link.reset()


SCENARIOS = (
    Scenario("kill a model replica", _kill(":model-toy")),
    Scenario("stop a model replica for 15 s", _stop(":model-toy", 15)),
    Scenario("hang a thread of a model replica for 8 s", _hang),
    Scenario("no memory for a model replica", _out_of_memory),
    Scenario("kill an ingress", _kill(":Ingress"), cuts=True),
    Scenario("kill HAProxy", _kill("haproxy.cfg", last=True), cuts=True),
    Scenario("kill HAProxyManager", _kill("ray::HAProxyManager"), cuts=True),
    Scenario("kill Ray's own proxy", _kill("ray::ProxyActor")),
    Scenario("kill the controller", _kill("ray::ServeController")),
    Scenario("the disk is busy for 10 s", _slow_disk),
    Scenario("the clock is 1 h late for 5 s", _clock_late),
    Scenario("the clock jumps 2 h ahead", _clock_ahead),
    Scenario("the tracing backend hangs for 10 s", _collector_hangs),
    Scenario("Redis hangs for 8 s", _redis_hangs),
    Scenario("Redis is gone for 8 s", _redis_is_gone),
    Scenario("Prometheus hangs for 8 s", _prometheus_hangs),
    Scenario("the network of one client stalls for 3 s", _network_stalls),
    Scenario("the network of one client is cut", _network_is_cut, cuts=True),
)
