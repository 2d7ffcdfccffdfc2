"""Times of short calls with and without a fault, in turn, so that both see the same machine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import numpy as np

BODY = {"prompt": "abc", "max_tokens": 6}


@dataclass
class Times:
    """Times to first token in seconds, and the calls that failed."""

    ttft_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.ttft_s, percent)) * 1e3

    @property
    def summary(self) -> str:
        p50, p99 = (self.percentile_ms(percent) for percent in (50, 99))
        return f"{len(self.ttft_s)} calls, {len(self.failures)} failed, TTFT p50 {p50:.1f} ms, p99 {p99:.1f} ms"


async def short_calls(client: httpx.AsyncClient, model: str, count: int, into: Times) -> None:
    """`count` streams of 6 tokens, one after the other."""
    for _ in range(count):
        began, first, last = time.monotonic(), None, ""
        async with client.stream("POST", "/generate_stream", json={**BODY, "model": model}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    first = first or time.monotonic()
                    last = line
        if first is None or '"finished":true' not in last:
            into.failures.append(last or f"status {response.status_code}")
        else:
            into.ttft_s.append(first - began)


async def in_turn(
    client: httpx.AsyncClient, model: str, switch: Callable[[bool], Awaitable[None]], rounds: int, count: int
) -> tuple[Times, Times]:
    """Times without and with the fault, which `switch` turns on and off, in `rounds` rounds of `count` calls each."""
    without, with_fault = Times(), Times()
    for _ in range(rounds):
        for on, into in ((False, without), (True, with_fault)):
            await switch(on)
            await short_calls(client, model, count, into)
    await switch(False)
    return without, with_fault
