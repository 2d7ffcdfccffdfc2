"""Offers more requests than a model can compute, and counts what becomes of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.graph.service import stream_events


@dataclass
class Tally:
    """What became of requests: statuses, the seconds of each refusal, TTFTs, and tokens of complete answers.

    `wrong` are answers that do not keep to the contract, such as a stream without an end, and requests that hang.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"statuses {dict(self.statuses)}, refusals p99 {percentile(self.refusal_s, 99) * 1e3:.1f} ms, "
            f"TTFT p50 {percentile(self.ttft_s, 50) * 1e3:.0f} ms, p99 {percentile(self.ttft_s, 99) * 1e3:.0f} ms, "
            f"{self.tokens} tokens"
        )


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


async def send(
    client: httpx.AsyncClient, body: Mapping[str, Any], tally: Tally, headers: Mapping[str, str] | None = None
) -> None:
    """One stream of the native API, read to its end."""
    began, tokens, finished = time.monotonic(), 0, False
    async with client.stream("POST", "/generate_stream", json=dict(body), headers=dict(headers or {})) as response:
        tally.statuses[response.status_code] += 1
        if response.status_code != 200:
            await response.aread()
            tally.refusal_s.append(time.monotonic() - began)
            if response.status_code in (429, 503) and int(response.headers["retry-after"]) < 1:
                tally.wrong.append("no retry-after")
            return
        async for event in stream_events(response):
            if "error" in event:
                tally.wrong.append(event["error"]["code"])
                return
            if not tokens:
                tally.ttft_s.append(time.monotonic() - began)
            tokens += 1
            finished = finished or event.get("finish_reason") is not None
    tally.tokens += tokens
    if not finished:
        tally.wrong.append("no end")


async def offer(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    per_second: float,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    limit_s: float = 60.0,
) -> Tally:
    """Send requests at random times (a Poisson process) for a while, whatever becomes of the earlier ones."""
    draw, tally, tasks = random.Random(5), Tally(), set[asyncio.Task[None]]()
    at = began = time.monotonic()
    while (at := at + draw.expovariate(per_second)) < began + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        tasks.add(asyncio.create_task(send(client, body, tally, headers)))
    done, hanging = await asyncio.wait(tasks, timeout=limit_s)
    for task in hanging:
        task.cancel()
    tally.wrong += ["hangs"] * len(hanging) + [repr(task.exception()) for task in done if task.exception()]
    return tally


async def keep_busy(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    parallel: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
) -> Tally:
    """Send requests one after the other in each of `parallel` tasks."""
    tally, end = Tally(), time.monotonic() + seconds

    async def repeat() -> None:
        while time.monotonic() < end:
            await send(client, body, tally, headers)

    await asyncio.gather(*(repeat() for _ in range(parallel)))
    return tally
