"""Runs the service under load with faults and judges what is left: `soak` without, `chaos` with faults of the stack."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from tests.chaos import figures
from tests.chaos.census import Census, actors
from tests.chaos.figures import Check, Fault, Figures
from tests.chaos.load import Load, Outcome, stream, undisturbed
from tests.chaos.network import Link
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.stack import Stack
from tests.graph.service import http_client, wait_until
from tests.graph.streams import toy_calls

# A fault ends when its scenario has ended and all actors of Ray run again. These requests are counted to it too.
_AFTERWARDS_S = 1.0
_RECOVERED_S = 90
LOST = ("refused", "failed", "broken", "wrong")


@dataclass(frozen=True)
class Options:
    """`per_s` requests arrive each second, of which `share` have a fault of a client or of the network."""

    seconds: float
    seed: int
    per_s: float = 15.0
    share: float = 0.01


@asynccontextmanager
async def loaded(stack: Stack, options: Options) -> AsyncIterator[tuple[Load, Link, Census]]:
    """The load, the link of one client and the census while they run, over a service that is warm."""
    port = stack.service.port
    async with http_client(stack.service) as client, Link(port) as link, Link(port) as faulty:
        expected = await undisturbed(client)
        running = actors(stack.service)
        load = Load(client, faulty, port, expected, options.per_s, options.share, options.seed)
        async with Census(stack.service, client) as census:
            async with load, behind(link, expected, load):
                yield load, link, census
            await census.settle(running)
            await asyncio.sleep(5)  # samples of the idle service


@asynccontextmanager
async def behind(link: Link, expected: dict[tuple[str, int], object], load: Load) -> AsyncIterator[None]:
    """One client that sends one stream after the other through the link."""

    async def streams() -> None:
        async with httpx.AsyncClient(base_url=link.url) as client:
            for number in range(10**9):
                call = toy_calls(20)[number % 6]
                found = await stream(client, call, expected[call.path, 20])
                load.outcomes.append(replace(found, name=f"link {found.name}"))
                await asyncio.sleep(0.1)

    task = asyncio.create_task(streams())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def soak(stack: Stack, options: Options) -> Figures:
    """Load alone. Memory, descriptors and latency must stay as they are after the warm-up, a fifth of the time."""
    async with loaded(stack, options) as (load, _, census):
        began = census.began
        await asyncio.sleep(options.seconds)
    warm_s = min(300.0, options.seconds / 5)
    found = _figures("soak", stack, options, load, census, [])
    found.warm_s = warm_s
    lag = float(np.percentile(census.lags_s, 99)) if census.lags_s else 0.0
    found.checks += [Check("event-loop delay p99", lag, figures.LAG_P99_S, "s")]
    found.checks += figures.of_processes(census.processes.values(), found.seconds, warm_s)
    found.checks += figures.of_loops(census.tasks.values(), found.seconds, warm_s)
    latency = figures.drift(load.outcomes, began, options.seconds, warm_s)
    found.checks += [latency] if latency else []
    return found


async def chaos(stack: Stack, options: Options, scenarios: Sequence[Scenario] = SCENARIOS) -> Figures:
    """All scenarios in an order of the seed, again and again until the time is over; each at least once."""
    order, faults = random.Random(options.seed), list[Fault]()
    async with loaded(stack, options) as (load, link, census):
        end = census.began + options.seconds
        await asyncio.sleep(5)
        while not faults or time.monotonic() < end:
            for scenario in order.sample(scenarios, len(scenarios)):
                faults.append(await _inject(scenario, stack, link, census))
                await asyncio.sleep(order.uniform(2, 5))
    attributed = [_counted(fault, load.outcomes, census.began) for fault in faults]
    found = _figures("chaos", stack, options, load, census, attributed)
    lost = sum(fault.lost for fault in attributed if not fault.cuts)
    elsewhere = sum(one.kind in LOST for one in load.outcomes) - sum(fault.lost for fault in attributed)
    found.checks += [
        Check("requests lost by faults that may cut none", lost, 0, "requests"),
        Check("requests lost without a fault", elsewhere, 0, "requests"),
        *(Check(f"recovery: {one.name}", one.recovered - one.began, 60, "s") for one in attributed),
    ]
    return found


async def _inject(scenario: Scenario, stack: Stack, link: Link, census: Census) -> Fault:
    """Let one fault happen, and wait until the service answers and its actors run, or `_RECOVERED_S` are over."""
    before, began = actors(stack.service), time.monotonic()
    await scenario.inject(stack, link)
    ended = time.monotonic()
    async with http_client(stack.service) as client:

        async def well() -> bool:
            try:
                good = (await client.get("/health", timeout=5)).status_code == 200
            except httpx.TransportError:
                return False
            return good and actors(stack.service) == before

        try:
            await wait_until(well, seconds=_RECOVERED_S, every_s=0.2)
        except AssertionError:
            print(f"{scenario.name}: not recovered. Actors before: {before}; now: {actors(stack.service)}", flush=True)
    recovered = time.monotonic() - census.began
    print(
        f"{began - census.began:6.1f} s: {scenario.name}, recovered {time.monotonic() - began:.1f} s later", flush=True
    )
    return Fault(scenario.name, began - census.began, ended - census.began, recovered, scenario.cuts)


def _counted(fault: Fault, outcomes: Sequence[Outcome], began: float) -> Fault:
    """The fault with the requests that ran while it lasted. A lost request belongs to the fault in which it ended."""
    start, end = fault.began + began, fault.recovered + began + _AFTERWARDS_S
    during = [one for one in outcomes if one.began <= end and one.ended >= start]
    lost = [one for one in during if one.kind in LOST and one.ended <= end]
    gap = max((one.longest_gap_s for one in during if one.kind == "answered"), default=0.0)
    reasons = tuple(f"{one.name} {one.kind}: {one.detail[:200]}" for one in lost[:5])
    return replace(fault, requests=len(during), lost=len(lost), longest_gap_s=gap, reasons=reasons)


def _figures(name: str, stack: Stack, options: Options, load: Load, census: Census, faults: list[Fault]) -> Figures:
    wrong = [one for one in load.outcomes if one.kind == "wrong"]
    checks = [
        Check("requests without an end", load.hung, 0, "requests"),
        Check("wrong answers", len(wrong), 0, "requests"),
        Check("requests, KV blocks or actors left at the end", len(census.left), 0, "kinds"),
    ]
    if not faults:
        lost = sum(one.kind in LOST for one in load.outcomes)
        checks.append(Check("requests lost", lost, 0, "requests"))
    print(*census.left, sep="\n")
    for one in [one for one in load.outcomes if one.kind in LOST][:10]:
        print(f"{one.kind}: {one.name} at {one.began - census.began:.1f} s: {one.detail[:300]}")
    seconds, processes = time.monotonic() - census.began, list(census.processes.values())
    kinds = dict(load.kinds)
    return Figures(name, options.seed, seconds, 0, kinds, faults, checks, load.outcomes, processes, census.began)


def output(folder: Path, found: Figures) -> int:
    """Print and write the figures. Returns the exit status: 0 if all limits hold."""
    print(found.text())
    found.write(folder)
    print(f"{folder}/report.html shows the curves; figures.json, processes.csv and requests.csv have the values.")
    return 0 if found.held else 1
