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
    """What became of requests: statuses, the seconds of each refusal, TTFTs, and the number of tokens.

    `ttft_s` are measured by the client, `service_ttft_s` by the ingress.
    `wrong` are answers that do not keep to the contract, such as a stream without an end, and requests that hang.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    service_ttft_s: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"statuses {dict(self.statuses)}, {self.tokens} tokens, p50 and p99 in ms: refusals "
            f"{shown(self.refusal_s)}, TTFT {shown(self.ttft_s)}, TTFT at the ingress {shown(self.service_ttft_s)}"
        )


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


def shown(seconds: list[float]) -> str:
    """The median and the 99th percentile in milliseconds."""
    return f"{percentile(seconds, 50) * 1e3:.0f} and {percentile(seconds, 99) * 1e3:.0f}"


async def send(
    client: httpx.AsyncClient, body: Mapping[str, Any], tally: Tally, headers: Mapping[str, str] | None = None
) -> None:
    """One stream of the native API, read to its end."""
    began, first, finished = time.monotonic(), True, False
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
            if first:
                tally.ttft_s.append(time.monotonic() - began)
                tally.service_ttft_s.append(event["metrics"]["ttft_ms"] / 1e3)
            first = False
            tally.tokens += "token" in event
            finished = finished or event.get("finish_reason") is not None
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
    """Send requests at random times (a Poisson process) for a while, whatever becomes of the earlier ones.

    If `max_tokens` of the body is a range, each request gets a number of it.
    """
    draw, tally, tasks = random.Random(5), Tally(), set[asyncio.Task[None]]()
    at = began = time.monotonic()
    while (at := at + draw.expovariate(per_second)) < began + seconds:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        tasks.add(asyncio.create_task(send(client, drawn(body, draw), tally, headers)))
    done, hanging = await asyncio.wait(tasks, timeout=limit_s)
    for task in hanging:
        task.cancel()
    tally.wrong += ["hangs"] * len(hanging) + [repr(task.exception()) for task in done if task.exception()]
    return tally


def drawn(body: Mapping[str, Any], draw: random.Random) -> Mapping[str, Any]:
    """The body with one number of tokens, if it has a range of them."""
    tokens = body["max_tokens"]
    return {**body, "max_tokens": draw.choice(tokens)} if isinstance(tokens, range) else body


async def keep_busy(
    client: httpx.AsyncClient,
    body: Mapping[str, Any],
    parallel: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
    tally: Tally | None = None,
) -> Tally:
    """Send requests one after the other in each of `parallel` tasks. Counts them in `tally` while they run."""
    tally, end, draw = tally or Tally(), time.monotonic() + seconds, random.Random(6)

    async def repeat() -> None:
        while time.monotonic() < end:
            await send(client, drawn(body, draw), tally, headers)

    await asyncio.gather(*(repeat() for _ in range(parallel)))
    return tally
