"""Clients who hang up: nothing of theirs stays, and hardly a token is made for nobody."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.graph.house import idle, lines, made_after

pytestmark = pytest.mark.ray

STREAMS = 500
TOGETHER = 16


async def cut(client: httpx.AsyncClient, name: str, after: int, patience_s: float | None) -> float:
    """Hang up on a long stream after so many tokens, or when patience ends. The monotonic instant when that is done."""
    body = {"model": "slow", "prompt": "abc", "max_tokens": 1000, "include_text": False}
    read = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            async with client.stream("POST", "/generate_stream", json=body, headers={"x-request-id": name}) as response:
                assert response.status_code == 200
                async for line in lines(response):
                    read += line.startswith("data: ")
                    if read >= after:
                        break
                else:
                    raise AssertionError("a stream of 1000 tokens ended by itself")
    return time.monotonic()


async def test_500_streams_cut_at_random_points_leave_nothing(client: httpx.AsyncClient, token_log: Path) -> None:
    """A fifth hangs up within 150 ms, mostly before the first token; the others after 1 to 8 tokens."""
    rng = random.Random(3)
    together = asyncio.Semaphore(TOGETHER)

    async def one(i: int) -> tuple[str, float]:
        name, patience_s = f"cut{i}_", rng.random() * 0.15 if i % 5 == 0 else None
        async with together:
            return name.rstrip("_"), await cut(client, name, rng.randint(1, 8), patience_s)

    cuts = dict(await asyncio.gather(*(one(i) for i in range(STREAMS))))
    await idle(client, "slow")
    extra = made_after(token_log, cuts)
    print(f"tokens made after a cut: {sum(extra) / STREAMS:.2f} on average, {max(extra)} at most")
    assert len(extra) == STREAMS
    assert max(extra) <= 2


@pytest.mark.parametrize("headers", [{"x-request-disconnect-disabled": "?1"}, {"x-request-timeout-seconds": "0"}])
async def test_no_header_keeps_a_slot_for_one_who_left(
    client: httpx.AsyncClient, token_log: Path, headers: dict[str, str]
) -> None:
    """Ray Serve knows both of them."""
    name = next(iter(headers))
    body = {"model": "slow", "prompt": "a", "max_tokens": 100}
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/generate", json=body, timeout=0.7, headers={"x-request-id": f"{name}_", **headers})
    left = time.monotonic()
    await idle(client, "slow")
    (extra,) = made_after(token_log, {name: left})
    assert extra <= 2


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/generate_batch"])
async def test_one_who_waits_for_the_whole_may_leave_too(client: httpx.AsyncClient, token_log: Path, path: str) -> None:
    prompt = {"prompts": ["a"]} if path == "/generate_batch" else {"prompt": "a"}
    name = "whole" + path.replace("/", "-")
    body = {"model": "slow", "max_tokens": 1000, **prompt}
    with pytest.raises(httpx.ReadTimeout):
        await client.post(path, json=body, timeout=0.7, headers={"x-request-id": f"{name}_"})
    left = time.monotonic()
    await idle(client, "slow")
    (extra,) = made_after(token_log, {name: left})
    assert extra <= 2
